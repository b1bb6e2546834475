//! Tests of `bevel-model`.

mod adapters;
mod chat;
mod families;
mod hostile;
mod limits;
mod quantized;
#[path = "../../../../fuzz/replay.rs"]
mod replay;
mod targets;
mod tokenizer;

#[global_allocator]
static ALLOCATOR: replay::Counting = replay::Counting;
