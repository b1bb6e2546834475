//! Checkpoints whose linear layers are quantized.

mod reading;
