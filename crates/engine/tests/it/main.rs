//! Tests of the engine: its state machines over random histories, and the whole on real models.

mod beams;
mod blocks;
mod engine;
mod memory;
mod scheduler;
