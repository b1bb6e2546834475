//! Tests of `bevel-model`.

mod chat;
mod families;
mod hostile;
mod limits;
#[path = "../../../../fuzz/replay.rs"]
mod replay;
mod quantized;
mod targets;
mod tokenizer;

#[global_allocator]
static ALLOCATOR: replay::Counting = replay::Counting;
