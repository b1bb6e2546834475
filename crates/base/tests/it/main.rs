//! The packed layouts, tried from outside.

mod dequantize;
mod grid;
mod grouped;
mod plain;
mod quantize;
mod round_trip;
