//! Tests of quantization, conversion and inspection.

mod budget;
mod calibrated;
mod calibration;
mod coded;
mod convert;
mod directories;
mod imatrix;
mod inspect;
mod memory;
mod mixes;
mod quantize;
mod solve;
mod stats;
mod support;
