//! The library facade of bevel.
