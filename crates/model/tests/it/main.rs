//! Tests of `bevel-model`.

mod chat;
mod families;
mod tokenizer;
