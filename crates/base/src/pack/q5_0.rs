//! Q5_0: 5-bit integers with one scale per 32 values.

use bytemuck::{Pod, Zeroable};

use super::block::{Block, Coded, Half};
use super::grid::{Levels, NO_OFFSET};
use super::levels::{Integers, code};
use super::symmetric::fit_scale;

/// 32 values `d * (q - 16)`, `q` of 5 bits: 5.5 bits a value.
///
/// ```text
/// byte  0..2   d    f16
///       2..6   qh   u32, bit i: bit 4 of q[i]
///       6..22  qs   byte i: bits 0..4 of q[i] in the low half, of q[16 + i] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_0 {
    /// The scale. Its sign is free.
    pub d: Half,
    /// The fifth bits, little-endian.
    pub qh: [u8; 4],
    /// The low four bits, two values a byte.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ5_0>() == 22);

/// Joins the low halves and the fifth bits of 32 values.
#[inline(always)]
pub(super) fn join(qs: &[u8; 16], qh: [u8; 4]) -> [u8; 32] {
    let qh = u32::from_le_bytes(qh);
    std::array::from_fn(|i| {
        let low = if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 };
        low | (((qh >> i) & 1) as u8) << 4
    })
}

/// The inverse of [`join`].
#[inline(always)]
pub(super) fn split(codes: &[u8; 32]) -> ([u8; 16], [u8; 4]) {
    let qs = std::array::from_fn(|i| codes[i] & 15 | codes[16 + i] << 4);
    let (eights, _) = codes.as_chunks::<8>();
    let qh = std::array::from_fn(|k| {
        let fifth = u64::from_le_bytes(eights[k]) >> 4 & 0x0101_0101_0101_0101;
        // Bit 8i goes to bit 56 + i.
        (fifth.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
    });
    (qs, qh)
}

impl Block<32> for BlockQ5_0 {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 32]) {
        let d = self.d.to_f32();
        let q = join(&self.qs, self.qh);
        for i in 0..32 {
            out[i] = d * (i32::from(q[i]) - 16) as f32;
        }
    }
}

impl Coded<32> for BlockQ5_0 {
    const LIMIT: f32 = Half::MAX * 16.0;
    const GROUP: usize = 32;
    const LEVELS: Levels = Levels::Integers { low: -16, high: 15 };

    #[inline(always)]
    fn search(x: &[f32; 32], w: &[f32; 32]) -> (Self, [u8; 32]) {
        let (d, q) = fit_scale::<Integers<-16, 15>, 32>(x, w);
        (Self { d: Half::exactly(d), ..Self::zeroed() }, q.map(|q| code(q + 16.0)))
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 32]) {
        (self.qs, self.qh) = split(codes);
    }

    #[inline(always)]
    fn group(&self, _: usize) -> (f32, f32) {
        (self.d.to_f32(), NO_OFFSET)
    }
}
