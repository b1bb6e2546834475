//! Packed weight layouts: what a file's bytes are as numbers, and how numbers become such bytes.
//!
//! A packed tensor is rows of blocks; a block is a [`Block`]: a `repr(C)` struct of bytes with the
//! layout drawn in its documentation. Blocks of 32 values carry their own scale. Super-blocks of 256
//! values carry one or two half-precision scales and a small integer for each group of 16 or 32, which
//! is scaled by them. [`dequantize`] and [`quantize`] work on any whole number of blocks; callers
//! cut a tensor into rows and give them to threads.
//!
//! | layout | bits/value | block | values | when to use it |
//! |---|---|---|---|---|
//! | F32, F64 | 32, 64 | 1 | | references |
//! | BF16, F16 | 16 | 1 | | as trained; F16 where the range allows |
//! | F8_E4M3, F8_E5M2 | 8 | 1 | | checkpoints published so; scales are kept elsewhere |
//! | [Q8_0](q8_0) | 8.5 | 32 | `d q` | as good as lossless; activations |
//! | [Q6_K](q6_k) | 6.5625 | 256 | `d s q` | nearly lossless; output and embedding tables |
//! | [Q5_1](q5_1), [Q5_0](q5_0) | 6, 5.5 | 32 | `d q + m`, `d q` | rows that 256 does not divide |
//! | [Q5_K](q5_k) | 5.5 | 256 | `d s q - dmin m` | a little loss |
//! | [Q4_1](q4_1), [Q4_0](q4_0) | 5, 4.5 | 32 | `d q + m`, `d q` | rows that 256 does not divide |
//! | [Q4_K](q4_k) | 4.5 | 256 | `d s q - dmin m` | the usual compromise |
//! | [IQ4_NL](iq4) | 4.5 | 32 | `d level(q)` | better than Q4_0 at its size |
//! | [IQ4_XS](iq4) | 4.25 | 256 | `d s level(q)` | nearly Q4_K, smaller |
//! | [MXFP4](mxfp4) | 4.25 | 32 | `2^e level(q)` | models trained in it |
//! | [Q3_K](q3_k) | 3.4375 | 256 | `d s q` | visible loss |
//! | [IQ3_S](iq3), [IQ3_XXS](iq3) | 3.4375, 3.0625 | 256 | `d s ±entry` | with calibration |
//! | [Q2_K](q2_k) | 2.625 | 256 | `d s q - dmin m` | large models only |
//! | [IQ2_S, IQ2_XS, IQ2_XXS](iq2) | 2.5625, 2.3125, 2.0625 | 256 | `d s ±entry` | with calibration |
//! | [TQ2_0, TQ1_0](tq) | 2.0625, 1.6875 | 256 | `d t` | models trained to be ternary |
//!
//! Packing minimizes the squared error, weighted by importance where the caller knows it: many scales
//! are tried side by side and improved by least squares, and the choice is made by the error with
//! scales as they will be stored. Entries of codebooks are found by comparing all of them. Where
//! somebody else chooses the codes, [`grid`] offers the search for scales alone.

mod affine;
mod block;
mod codebook;
pub mod grid;
pub mod grids;
pub mod iq2;
pub mod iq3;
pub mod iq4;
mod lanes;
mod levels;
pub mod mxfp4;
mod plain;
pub mod q2_k;
pub mod q3_k;
pub mod q4_0;
pub mod q4_1;
pub mod q4_k;
pub mod q5_0;
pub mod q5_1;
pub mod q5_k;
pub mod q6_k;
pub mod q8_0;
mod symmetric;
pub mod tq;

pub use block::{Block, Coded, Half, Quantize};
pub(crate) use block::{Work, run_wide};
pub use plain::{e4m3, to_e4m3};

use crate::{DType, Error, Result};

/// Unpacks whole blocks into f32. `out.len()` values are expected in `data`.
///
/// # Errors
/// [`Error::NotWeight`] where the type holds integers or booleans, [`Error::RowLength`] where
/// `out` is no whole number of blocks, [`Error::ByteLength`] where `data` is not what `out` needs.
pub fn dequantize(dtype: DType, data: &[u8], out: &mut [f32]) -> Result<()> {
    check_lengths(dtype, out.len(), data.len())?;
    match dtype {
        DType::F32 => plain::from_f32(data, out),
        DType::F16 => plain::from_f16(data, out),
        DType::BF16 => plain::from_bf16(data, out),
        DType::F64 => plain::from_f64(data, out),
        DType::F8_E4M3 => plain::from_f8::<3>(data, out),
        DType::F8_E5M2 => plain::from_f8::<2>(data, out),
        DType::Q4_0 => block::unpack::<q4_0::BlockQ4_0, _>(data, out),
        DType::Q4_1 => block::unpack::<q4_1::BlockQ4_1, _>(data, out),
        DType::Q5_0 => block::unpack::<q5_0::BlockQ5_0, _>(data, out),
        DType::Q5_1 => block::unpack::<q5_1::BlockQ5_1, _>(data, out),
        DType::Q8_0 => block::unpack::<q8_0::BlockQ8_0, _>(data, out),
        DType::Q2_K => block::unpack::<q2_k::BlockQ2K, _>(data, out),
        DType::Q3_K => block::unpack::<q3_k::BlockQ3K, _>(data, out),
        DType::Q4_K => block::unpack::<q4_k::BlockQ4K, _>(data, out),
        DType::Q5_K => block::unpack::<q5_k::BlockQ5K, _>(data, out),
        DType::Q6_K => block::unpack::<q6_k::BlockQ6K, _>(data, out),
        DType::IQ2_XXS => block::unpack::<iq2::BlockIQ2XXS, _>(data, out),
        DType::IQ2_XS => block::unpack::<iq2::BlockIQ2XS, _>(data, out),
        DType::IQ2_S => block::unpack::<iq2::BlockIQ2S, _>(data, out),
        DType::IQ3_XXS => block::unpack::<iq3::BlockIQ3XXS, _>(data, out),
        DType::IQ3_S => block::unpack::<iq3::BlockIQ3S, _>(data, out),
        DType::IQ4_NL => block::unpack::<iq4::BlockIQ4NL, _>(data, out),
        DType::IQ4_XS => block::unpack::<iq4::BlockIQ4XS, _>(data, out),
        DType::TQ1_0 => block::unpack::<tq::BlockTQ1_0, _>(data, out),
        DType::TQ2_0 => block::unpack::<tq::BlockTQ2_0, _>(data, out),
        DType::MXFP4 => block::unpack::<mxfp4::BlockMXFP4, _>(data, out),
        DType::Bool
        | DType::U8
        | DType::I8
        | DType::I16
        | DType::U16
        | DType::I32
        | DType::U32
        | DType::I64
        | DType::U64 => return Err(Error::NotWeight(dtype)),
    }
    Ok(())
}

/// Packs values into blocks, round-to-nearest with the layout's best search. `importance`, where
/// given, weighs each value's squared error (same length as `values`).
///
/// Values beyond what the layout can represent become its largest. The result is a function of the
/// arguments alone, block by block: not of the processor, nor of how a tensor is cut into calls.
///
/// # Errors
/// [`Error::NotFinite`] where a value is a NaN or infinite, [`Error::Importance`] where a weight is
/// negative or not finite, [`Error::NotWeight`] for integers and booleans, [`Error::RowLength`] and
/// [`Error::ByteLength`] where lengths disagree.
pub fn quantize(
    dtype: DType,
    values: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> Result<()> {
    check_lengths(dtype, values.len(), out.len())?;
    check_values(values, importance)?;
    match dtype {
        DType::F32 => plain::to_f32(values, out),
        DType::F16 => plain::to_f16(values, out),
        DType::BF16 => plain::to_bf16(values, out),
        DType::F64 => plain::to_f64(values, out),
        DType::F8_E4M3 => plain::to_f8::<3>(values, out),
        DType::F8_E5M2 => plain::to_f8::<2>(values, out),
        DType::Q4_0 => block::pack::<q4_0::BlockQ4_0, _>(values, importance, out),
        DType::Q4_1 => block::pack::<q4_1::BlockQ4_1, _>(values, importance, out),
        DType::Q5_0 => block::pack::<q5_0::BlockQ5_0, _>(values, importance, out),
        DType::Q5_1 => block::pack::<q5_1::BlockQ5_1, _>(values, importance, out),
        DType::Q8_0 => block::pack::<q8_0::BlockQ8_0, _>(values, importance, out),
        DType::Q2_K => block::pack::<q2_k::BlockQ2K, _>(values, importance, out),
        DType::Q3_K => block::pack::<q3_k::BlockQ3K, _>(values, importance, out),
        DType::Q4_K => block::pack::<q4_k::BlockQ4K, _>(values, importance, out),
        DType::Q5_K => block::pack::<q5_k::BlockQ5K, _>(values, importance, out),
        DType::Q6_K => block::pack::<q6_k::BlockQ6K, _>(values, importance, out),
        DType::IQ4_NL => block::pack::<iq4::BlockIQ4NL, _>(values, importance, out),
        DType::IQ4_XS => block::pack::<iq4::BlockIQ4XS, _>(values, importance, out),
        DType::TQ1_0 => block::pack::<tq::BlockTQ1_0, _>(values, importance, out),
        DType::TQ2_0 => block::pack::<tq::BlockTQ2_0, _>(values, importance, out),
        DType::MXFP4 => block::pack::<mxfp4::BlockMXFP4, _>(values, importance, out),
        DType::IQ2_XXS => block::pack::<iq2::BlockIQ2XXS, _>(values, importance, out),
        DType::IQ2_XS => block::pack::<iq2::BlockIQ2XS, _>(values, importance, out),
        DType::IQ2_S => block::pack::<iq2::BlockIQ2S, _>(values, importance, out),
        DType::IQ3_XXS => block::pack::<iq3::BlockIQ3XXS, _>(values, importance, out),
        DType::IQ3_S => block::pack::<iq3::BlockIQ3S, _>(values, importance, out),
        DType::Bool
        | DType::U8
        | DType::I8
        | DType::I16
        | DType::U16
        | DType::I32
        | DType::U32
        | DType::I64
        | DType::U64 => return Err(Error::NotWeight(dtype)),
    }
    Ok(())
}

/// Refuses what cannot be packed, and importance that weighs nothing.
fn check_values(values: &[f32], importance: Option<&[f32]>) -> Result<()> {
    if let Some((index, &value)) = first_bad(values, |v| v.is_finite()) {
        return Err(Error::NotFinite { index, value });
    }
    if let Some(importance) = importance {
        if importance.len() != values.len() {
            return Err(Error::ByteLength {
                what: format!("importance of {} values, 4 bytes each", values.len()),
                expected: size_of_val(values),
                found: size_of_val(importance),
            });
        }
        if let Some((index, &value)) = first_bad(importance, |v| v.is_finite() & (v >= 0.0)) {
            return Err(Error::Importance { index, value });
        }
    }
    Ok(())
}

/// The first value that is not `good`. Searches in chunks, so that the usual answer comes fast.
fn first_bad(values: &[f32], good: impl Fn(f32) -> bool) -> Option<(usize, &f32)> {
    struct Scan<'a, G>(&'a [f32], G, &'a mut usize);
    impl<G: Fn(f32) -> bool> block::Work for Scan<'_, G> {
        #[inline(always)]
        fn run(self) {
            for chunk in self.0.chunks_exact(CHUNK) {
                let mut bad = [0u32; CHUNK];
                for l in 0..CHUNK {
                    bad[l] = u32::from(!(self.1)(chunk[l]));
                }
                if bad.iter().fold(0, |any, bad| any | bad) != 0 {
                    break;
                }
                *self.2 += CHUNK;
            }
        }
    }
    const CHUNK: usize = 64;
    let mut checked = 0;
    block::run_wide(Scan(values, &good, &mut checked));
    values.iter().enumerate().skip(checked).find(|(_, v)| !good(**v))
}

fn check_lengths(dtype: DType, values: usize, found: usize) -> Result<()> {
    let expected = dtype.row_bytes(values)?;
    if found != expected {
        return Err(Error::ByteLength {
            what: format!("{values} values of {dtype}"),
            expected,
            found,
        });
    }
    Ok(())
}
