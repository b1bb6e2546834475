use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// An element type: plain numbers, or a packed block layout in which a *row* of values is stored
/// as consecutive blocks.
///
/// Names are the ones that GGUF and safetensors users type. [`crate::pack`] holds the layouts.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of a single.
    BF16,
    /// IEEE double precision (stored tensors only).
    F64,
    /// FP8 with 4 exponent and 3 mantissa bits, no infinities (OCP E4M3FN).
    F8_E4M3,
    /// FP8 with 5 exponent and 2 mantissa bits (OCP E5M2).
    F8_E5M2,
    /// Boolean, one byte.
    Bool,
    /// Unsigned byte.
    U8,
    /// Signed byte.
    I8,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 16-bit integer.
    U16,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
    /// 4 bits, blocks of 32, f16 scale.
    Q4_0,
    /// 4 bits, blocks of 32, f16 scale and minimum.
    Q4_1,
    /// 5 bits, blocks of 32, f16 scale.
    Q5_0,
    /// 5 bits, blocks of 32, f16 scale and minimum.
    Q5_1,
    /// 8 bits, blocks of 32, f16 scale.
    Q8_0,
    /// 2 bits, super-blocks of 256 with 4-bit scales and minima per 16.
    Q2_K,
    /// 3 bits, super-blocks of 256 with 6-bit scales per 16.
    Q3_K,
    /// 4 bits, super-blocks of 256 with 6-bit scales and minima per 32.
    Q4_K,
    /// 5 bits, super-blocks of 256 with 6-bit scales and minima per 32.
    Q5_K,
    /// 6 bits, super-blocks of 256 with 8-bit scales per 16.
    Q6_K,
    /// 2.06 bits: an E8-lattice codebook of 256 entries.
    IQ2_XXS,
    /// 2.31 bits: an E8-lattice codebook of 512 entries.
    IQ2_XS,
    /// 2.56 bits: an E8-lattice codebook of 1024 entries.
    IQ2_S,
    /// 3.06 bits: a codebook of 256 four-value entries.
    IQ3_XXS,
    /// 3.44 bits: a codebook of 512 four-value entries.
    IQ3_S,
    /// 4 bits, blocks of 32, a non-linear table of 16 levels.
    IQ4_NL,
    /// 4.25 bits, super-blocks of 256, the same table, 6-bit scales per 32.
    IQ4_XS,
    /// Ternary, 1.69 bits: five trits a byte.
    TQ1_0,
    /// Ternary, 2.06 bits: two bits a value.
    TQ2_0,
    /// OCP microscaling FP4: E2M1 values, a power-of-two scale per 32.
    MXFP4,
}

/// Type, name, values in a block, bytes in a block.
const TABLE: [(DType, &str, usize, usize); 35] = [
    (DType::F32, "F32", 1, 4),
    (DType::F16, "F16", 1, 2),
    (DType::BF16, "BF16", 1, 2),
    (DType::F64, "F64", 1, 8),
    (DType::F8_E4M3, "F8_E4M3", 1, 1),
    (DType::F8_E5M2, "F8_E5M2", 1, 1),
    (DType::Bool, "BOOL", 1, 1),
    (DType::U8, "U8", 1, 1),
    (DType::I8, "I8", 1, 1),
    (DType::I16, "I16", 1, 2),
    (DType::U16, "U16", 1, 2),
    (DType::I32, "I32", 1, 4),
    (DType::U32, "U32", 1, 4),
    (DType::I64, "I64", 1, 8),
    (DType::U64, "U64", 1, 8),
    (DType::Q4_0, "Q4_0", 32, 18),
    (DType::Q4_1, "Q4_1", 32, 20),
    (DType::Q5_0, "Q5_0", 32, 22),
    (DType::Q5_1, "Q5_1", 32, 24),
    (DType::Q8_0, "Q8_0", 32, 34),
    (DType::Q2_K, "Q2_K", 256, 84),
    (DType::Q3_K, "Q3_K", 256, 110),
    (DType::Q4_K, "Q4_K", 256, 144),
    (DType::Q5_K, "Q5_K", 256, 176),
    (DType::Q6_K, "Q6_K", 256, 210),
    (DType::IQ2_XXS, "IQ2_XXS", 256, 66),
    (DType::IQ2_XS, "IQ2_XS", 256, 74),
    (DType::IQ2_S, "IQ2_S", 256, 82),
    (DType::IQ3_XXS, "IQ3_XXS", 256, 98),
    (DType::IQ3_S, "IQ3_S", 256, 110),
    (DType::IQ4_NL, "IQ4_NL", 32, 18),
    (DType::IQ4_XS, "IQ4_XS", 256, 136),
    (DType::TQ1_0, "TQ1_0", 256, 54),
    (DType::TQ2_0, "TQ2_0", 256, 66),
    (DType::MXFP4, "MXFP4", 32, 17),
];

impl DType {
    /// Every type, plain ones first.
    pub fn all() -> impl Iterator<Item = DType> {
        TABLE.iter().map(|row| row.0)
    }

    /// Every type's name, in the order of [`DType::all`].
    pub fn names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().map(|row| row.1)
    }

    /// The name users type and files carry.
    pub const fn name(self) -> &'static str {
        TABLE[self as usize].1
    }

    /// Values in a block; 1 for plain types.
    pub const fn block_len(self) -> usize {
        TABLE[self as usize].2
    }

    /// Bytes in a block.
    pub const fn block_bytes(self) -> usize {
        TABLE[self as usize].3
    }

    /// True where a block holds more than one value.
    pub const fn is_packed(self) -> bool {
        self.block_len() > 1
    }

    /// True where values are numbers a weight can have: floating point or packed.
    pub const fn is_weight(self) -> bool {
        use DType::*;
        self.is_packed() || matches!(self, F32 | F16 | BF16 | F64 | F8_E4M3 | F8_E5M2)
    }

    /// Stored bits per value, scales counted.
    pub fn bits_per_weight(self) -> f64 {
        (self.block_bytes() * 8) as f64 / self.block_len() as f64
    }

    /// Bytes of a row of `len` values.
    ///
    /// # Errors
    /// [`Error::RowLength`] where blocks do not divide the row, [`Error::Overflow`] where the
    /// byte count does not fit.
    pub fn row_bytes(self, len: usize) -> Result<usize> {
        let block = self.block_len();
        if !len.is_multiple_of(block) {
            return Err(Error::RowLength { dtype: self, block, len });
        }
        (len / block)
            .checked_mul(self.block_bytes())
            .ok_or_else(|| Error::Overflow { shape: format!("[{len}]"), dtype: self })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for DType {
    type Err = Error;

    /// Upper and lower case are alike.
    fn from_str(name: &str) -> Result<Self> {
        TABLE
            .iter()
            .find(|row| row.1.eq_ignore_ascii_case(name))
            .map(|row| row.0)
            .ok_or_else(|| Error::UnknownDType(name.to_owned()))
    }
}

// `name`, `block_len` and `block_bytes` index the table by discriminant.
const _: () = {
    let mut i = 0;
    while i < TABLE.len() {
        assert!(TABLE[i].0 as usize == i);
        i += 1;
    }
};
