//! Tests of `bevel-model`.

mod chat;
mod tokenizer;
