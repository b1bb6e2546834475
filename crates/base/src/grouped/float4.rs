//! The parts of 4-bit float formats of the Open Compute microscaling family: MXFP4 and NVFP4.

/// What the codes of an E2M1 float stand for. Bit 3 is the sign, and there is a zero of each.
pub const E2M1_LEVELS: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The power of two that an E8M0 code stands for: `2^(code − 127)`; 255 is no number.
pub fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        code => f32::from_bits(u32::from(code) << 23),
    }
}
