//! The bevel binary.
fn main() {}
