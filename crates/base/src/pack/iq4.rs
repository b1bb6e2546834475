//! IQ4_NL and IQ4_XS: 4-bit indices into a table of 16 levels that lie denser around zero, as
//! weights do.

use bytemuck::{Pod, Zeroable};

use super::block::{Block, Coded, Half};
use super::grid::{Levels, NO_OFFSET};
use super::levels::{IQ4_CODES, Integers, Iq4};
use super::symmetric::{fit_scale, fit_super_block};

pub use super::levels::IQ4_LEVELS;

/// 32 values `d * IQ4_LEVELS[q]`, `q` of 4 bits: 4.5 bits a value.
///
/// ```text
/// byte  0..2   d    f16
///       2..18  qs   byte i: q[i] in the low half, q[16 + i] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ4NL {
    /// The scale. Its sign is free.
    pub d: Half,
    /// Two indices a byte.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockIQ4NL>() == 18);

/// 256 values `d * (sc[j] - 32) * IQ4_LEVELS[q]`, `q` of 4 bits, `j` the group of 32: 4.25 bits a
/// value.
///
/// ```text
/// byte  0..2    d         f16
///       2..4    scales_h  u16: bits 4..6 of sc[j] in bits 2j..2j + 2
///       4..8    scales_l  byte k: bits 0..4 of sc[2k] in the low half, of sc[2k + 1] in the high half
///       8..136  qs        byte 16j + i: q[32j + i] in the low half, q[32j + 16 + i] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ4XS {
    /// The scale of the scales.
    pub d: Half,
    /// The high two bits of the scales, little-endian.
    pub scales_h: [u8; 2],
    /// The low four bits of the scales.
    pub scales_l: [u8; 4],
    /// Two indices a byte.
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<BlockIQ4XS>() == 136);

impl BlockIQ4XS {
    /// The integer scale of group `j` of 32 values, -32 to 31.
    #[inline(always)]
    pub fn scale(&self, j: usize) -> i8 {
        let low = (self.scales_l[j / 2] >> (j % 2 * 4)) & 15;
        let high = (u16::from_le_bytes(self.scales_h) >> (2 * j)) & 3;
        (low | (high as u8) << 4) as i8 - 32
    }
}

impl Block<32> for BlockIQ4NL {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 32]) {
        look_up(self.d.to_f32(), &self.qs, out);
    }
}

impl Block<256> for BlockIQ4XS {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let d = self.d.to_f32();
        let qs = self.qs.as_chunks().0;
        for (j, (qs, out)) in qs.iter().zip(out.as_chunks_mut().0).enumerate() {
            look_up(d * f32::from(self.scale(j)), qs, out);
        }
    }
}

#[inline(always)]
fn look_up(d: f32, qs: &[u8; 16], out: &mut [f32; 32]) {
    for i in 0..16 {
        out[i] = d * f32::from(IQ4_LEVELS[usize::from(qs[i] & 15)]);
        out[16 + i] = d * f32::from(IQ4_LEVELS[usize::from(qs[i] >> 4)]);
    }
}

/// [`IQ4_LEVELS`] as levels of a grid.
static IQ4_TABLE: [f32; 16] = {
    let mut table = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = IQ4_LEVELS[i] as f32;
        i += 1;
    }
    table
};

/// The index of a level that [`Iq4`] snapped to.
#[inline(always)]
fn index(level: f32) -> u8 {
    IQ4_CODES[(level as i32 + 127) as usize & 255]
}

impl Coded<32> for BlockIQ4NL {
    const LIMIT: f32 = Half::MAX * 127.0;
    const GROUP: usize = 32;
    const LEVELS: Levels = Levels::Table(&IQ4_TABLE);

    #[inline(always)]
    fn search(x: &[f32; 32], w: &[f32; 32]) -> (Self, [u8; 32]) {
        let (d, q) = fit_scale::<Iq4, 32>(x, w);
        (Self { d: Half::exactly(d), qs: [0; 16] }, q.map(index))
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 32]) {
        self.qs = std::array::from_fn(|i| codes[i] | codes[16 + i] << 4);
    }

    #[inline(always)]
    fn group(&self, _: usize) -> (f32, f32) {
        (self.d.to_f32(), NO_OFFSET)
    }
}

impl Coded<256> for BlockIQ4XS {
    const LIMIT: f32 = Half::MAX * 4064.0;
    const GROUP: usize = 32;
    const LEVELS: Levels = Levels::Table(&IQ4_TABLE);

    #[inline(always)]
    fn search(x: &[f32; 256], w: &[f32; 256]) -> (Self, [u8; 256]) {
        let fit = fit_super_block::<Iq4, Integers<-32, 31>, 32, 8>(x, w);
        let mut scales_h = 0;
        let mut scales_l = [0; 4];
        for j in 0..8 {
            let scale = (fit.scales[j] + 32.0) as u8;
            scales_h |= u16::from(scale >> 4) << (2 * j);
            scales_l[j / 2] |= (scale & 15) << (j % 2 * 4);
        }
        let block = Self {
            d: Half::exactly(fit.d),
            scales_h: scales_h.to_le_bytes(),
            scales_l,
            qs: [0; 128],
        };
        (block, fit.levels.map(index))
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 256]) {
        self.qs = std::array::from_fn(|b| {
            let at = b / 16 * 32 + b % 16;
            codes[at] | codes[at + 16] << 4
        });
    }

    #[inline(always)]
    fn group(&self, j: usize) -> (f32, f32) {
        (self.d.to_f32() * f32::from(self.scale(j)), NO_OFFSET)
    }
}
