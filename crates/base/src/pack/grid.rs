//! Packed layouts whose scales are chosen first and whose codes are then chosen by somebody else: a
//! solver that goes column by column and makes up for each column's error in those that follow.

use super::block::{Coded, Work, prepare, run_wide};
use super::{check_lengths, check_values};
use super::{iq4, mxfp4, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0, tq};
use crate::{DType, Error, Result};

/// A packed layout seen as scales for groups of columns, and a set of levels each code picks from:
/// `ŵ = step · level + offset`.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    dtype: DType,
    group_len: usize,
    levels: Levels,
    fit: FitBlocks,
    put_codes: fn(&[u8], &mut [u8]),
}

/// [`Grid::fit`] of one layout, lengths and values checked.
type FitBlocks = fn(&[f32], Option<&[f32]>, &mut [u8], &mut [f32], &mut [f32]);

/// What the codes of a layout stand for, before the step and the offset.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Levels {
    /// Code `c` stands for `low + c`.
    Integers {
        /// The level of code zero.
        low: i32,
        /// The level of the last code.
        high: i32,
    },
    /// Code `c` stands for entry `c`. Entries ascend.
    Table(&'static [f32]),
}

impl Levels {
    /// How many levels there are, at most 256.
    pub fn count(self) -> usize {
        match self {
            Levels::Integers { low, high } => (high - low) as usize + 1,
            Levels::Table(table) => table.len(),
        }
    }

    /// The level that `code` stands for.
    pub fn level(self, code: u8) -> f32 {
        match self {
            Levels::Integers { low, .. } => (low + i32::from(code)) as f32,
            Levels::Table(table) => table[usize::from(code)],
        }
    }

    /// The code of the level nearest to `t`.
    pub fn nearest(self, t: f32) -> u8 {
        match self {
            Levels::Integers { low, high } => {
                (t.clamp(low as f32, high as f32).round_ties_even() as i32 - low) as u8
            }
            Levels::Table(table) => {
                table.windows(2).take_while(|pair| t - pair[0] > pair[1] - t).count() as u8
            }
        }
    }
}

/// What layouts without an offset add. Unlike `+0`, it leaves `-0` as it is.
pub(super) const NO_OFFSET: f32 = -0.0;

impl Grid {
    /// The grid of a layout; `None` for plain types, and for layouts whose codes stand for several
    /// values at once.
    pub fn of(dtype: DType) -> Option<Grid> {
        Some(match dtype {
            DType::Q4_0 => Grid::new::<q4_0::BlockQ4_0, _>(dtype),
            DType::Q4_1 => Grid::new::<q4_1::BlockQ4_1, _>(dtype),
            DType::Q5_0 => Grid::new::<q5_0::BlockQ5_0, _>(dtype),
            DType::Q5_1 => Grid::new::<q5_1::BlockQ5_1, _>(dtype),
            DType::Q8_0 => Grid::new::<q8_0::BlockQ8_0, _>(dtype),
            DType::Q2_K => Grid::new::<q2_k::BlockQ2K, _>(dtype),
            DType::Q3_K => Grid::new::<q3_k::BlockQ3K, _>(dtype),
            DType::Q4_K => Grid::new::<q4_k::BlockQ4K, _>(dtype),
            DType::Q5_K => Grid::new::<q5_k::BlockQ5K, _>(dtype),
            DType::Q6_K => Grid::new::<q6_k::BlockQ6K, _>(dtype),
            DType::IQ4_NL => Grid::new::<iq4::BlockIQ4NL, _>(dtype),
            DType::IQ4_XS => Grid::new::<iq4::BlockIQ4XS, _>(dtype),
            DType::TQ1_0 => Grid::new::<tq::BlockTQ1_0, _>(dtype),
            DType::TQ2_0 => Grid::new::<tq::BlockTQ2_0, _>(dtype),
            DType::MXFP4 => Grid::new::<mxfp4::BlockMXFP4, _>(dtype),
            _ => return None,
        })
    }

    fn new<B: Coded<N>, const N: usize>(dtype: DType) -> Grid {
        Grid {
            dtype,
            group_len: B::GROUP,
            levels: B::LEVELS,
            fit: |x, importance, blocks, steps, offsets| {
                let blocks = bytemuck::cast_slice_mut(blocks);
                run_wide(Fit::<B, N> { x, importance, blocks, steps, offsets });
            },
            put_codes: |codes, blocks| {
                let blocks: &mut [B] = bytemuck::cast_slice_mut(blocks);
                for (block, codes) in blocks.iter_mut().zip(codes.as_chunks().0) {
                    block.put_codes(codes);
                }
            },
        }
    }

    /// The layout.
    pub fn dtype(self) -> DType {
        self.dtype
    }

    /// Columns in a block.
    pub fn block_len(self) -> usize {
        self.dtype.block_len()
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.dtype.block_bytes()
    }

    /// Columns that share a step and an offset: a divisor of [`Grid::block_len`].
    pub fn group_len(self) -> usize {
        self.group_len
    }

    /// What codes stand for.
    pub fn levels(self) -> Levels {
        self.levels
    }

    /// Chooses the scales of whole blocks by the search of [`quantize`](super::quantize), weighted
    /// by `importance` where given, and writes them into `blocks` with codes of zero bits. `steps`
    /// and `offsets` receive each group's: `step · level + offset` is bit for bit what
    /// [`dequantize`](super::dequantize) gives.
    ///
    /// # Errors
    /// As [`quantize`](super::quantize).
    pub fn fit(
        self,
        x: &[f32],
        importance: Option<&[f32]>,
        blocks: &mut [u8],
        steps: &mut [f32],
        offsets: &mut [f32],
    ) -> Result<()> {
        check_lengths(self.dtype, x.len(), blocks.len())?;
        check_values(x, importance)?;
        for (what, found) in [("steps", &*steps), ("offsets", &*offsets)] {
            let groups = x.len() / self.group_len;
            if found.len() != groups {
                return Err(Error::ByteLength {
                    what: format!("{groups} {what}, 4 bytes each"),
                    expected: groups * size_of::<f32>(),
                    found: size_of_val(found),
                });
            }
        }
        (self.fit)(x, importance, blocks, steps, offsets);
        Ok(())
    }

    /// Writes codes, one a byte, into blocks whose scales [`Grid::fit`] chose.
    ///
    /// # Panics
    /// Where `codes` is not as long as `blocks` has columns, or a code stands for no level.
    pub fn put_codes(self, codes: &[u8], blocks: &mut [u8]) {
        assert_eq!(codes.len() * self.block_bytes(), blocks.len() * self.block_len());
        let highest = codes.iter().fold(0, |highest, &code| highest.max(code));
        assert!(usize::from(highest) < self.levels.count(), "{} has no code {highest}", self.dtype);
        (self.put_codes)(codes, blocks);
    }
}

struct Fit<'a, B, const N: usize> {
    x: &'a [f32],
    importance: Option<&'a [f32]>,
    blocks: &'a mut [B],
    steps: &'a mut [f32],
    offsets: &'a mut [f32],
}

impl<B: Coded<N>, const N: usize> Work for Fit<'_, B, N> {
    #[inline(always)]
    fn run(self) {
        let groups = N / B::GROUP;
        for (i, (x, block)) in self.x.as_chunks::<N>().0.iter().zip(self.blocks).enumerate() {
            let (x, w) = prepare(x, self.importance.map(|w| &w[i * N..][..N]), B::LIMIT);
            (*block, _) = B::search(&x, &w);
            for j in 0..groups {
                let at = i * groups + j;
                (self.steps[at], self.offsets[at]) = block.group(j);
            }
        }
    }
}
