//! The tile layouts that kernels read, and which one each element type is repacked into.
//!
//! A matrix is cut into **tiles** of 16 rows; the last tile is padded with zero rows. A vector
//! register holds the same columns of all 16 rows, so a kernel never sums across a register.
//!
//! # Dense tiles: F32, F16, BF16, F8_E4M3
//! ```text
//! [column][16 rows]      a column of a tile: 64 bytes of f32, 32 of f16 or bf16, 16 of f8
//! ```
//! Numbers of 8 bits have scales, `[group][16 rows] f32`; a group is any even number of columns.
//!
//! # Pair tiles: bf16 whose products take bf16 inputs
//! ```text
//! [pair of columns][16 rows][2]      64 bytes a pair; an odd last column has a zero beside it
//! ```
//!
//! # Integer tiles
//! Columns come in groups of 32. A group is eight **quads**, quad k being columns 4k .. 4k+4. An
//! int8 dot-product instruction multiplies the four bytes of each 32-bit lane, so a quad of one byte
//! a code is one 64-byte register with a row a lane:
//! ```text
//! byte     0   1   2   3 |  4   5   6   7 | ..  | 60  61  62  63
//! row      0   0   0   0 |  1   1   1   1 | ..  | 15  15  15  15
//! column  4k  +1  +2  +3 | 4k  +1  +2  +3 | ..  | 4k  +1  +2  +3
//! ```
//! Codes of `bits` bits are split into bit planes in which the quads of a group share bytes. Each
//! plane is a run of 64-byte registers; a group's planes follow each other, `64 * bits` bytes in all:
//! ```text
//! plane of 8 bits   8 registers   register k: quad k
//! plane of 4 bits   4 registers   register j: low nibbles quad j, high nibbles quad j+4
//! plane of 2 bits   2 registers   register j: bits 2i, 2i+1 are quad 4j+i
//! plane of 1 bit    1 register    bit k is quad k
//!
//! bits   8: [8]   6: [4][2]   5: [4][1]   4: [4]   3: [2][1]   2: [2]   low bits first
//! ```
//! Scales lie in a buffer of their own, tile by tile, in one of the shapes of [`Scales`].

use bevel_base::DType;
use bevel_base::pack::iq4::IQ4_LEVELS;
use bevel_base::pack::mxfp4::MXFP4_LEVELS;

use super::activations::GROUP_BYTES;

/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// Columns of a group: one activation scale, at most two weight scales a row.
pub(super) const GROUP: usize = 32;
/// Quads of a group.
pub(super) const QUADS: usize = GROUP / 4;
/// Groups of a super-block of 256 columns.
pub(super) const SUPER: usize = 8;

/// How the scales of a tile lie. All lists hold a value for each of the 16 rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scales {
    /// Each group: `[f16 scale]`.
    Group,
    /// Each group: `[bf16 scale]`.
    GroupBf16,
    /// Each group: `[f16 scale][f16 minimum]`; the minimum is added.
    GroupMin,
    /// Each super-block: `[f16 scale]`.
    Super,
    /// Each super-block: `[f16 d]`, then for each group `[i8 scale]`, in units of `d`.
    Sub32,
    /// Each super-block: `[f16 d][f16 dmin]`, then for each group `[i8 scale][i8 minimum]`; the
    /// minimum, in units of `dmin`, is subtracted.
    Sub32Min,
    /// Each super-block: `[f16 d]`, then for each half group `[i8 scale]`.
    Sub16,
    /// Each super-block: `[f16 d][f16 dmin]`, then for each half group one byte: the scale in its
    /// low nibble, the minimum in its high one; the minimum is subtracted.
    Sub16Min,
    /// Each span of groups, a power of two of them that the tile tells: `[f32 scale]`.
    Span,
    /// Each span: `[f32 scale][f32 minimum]`; the minimum is added.
    SpanMin,
    /// Each group, for its two halves: `[f32 scale]`.
    Halves,
    /// Each group, for its two halves: `[f32 scale][f32 minimum]`; the minimum is added.
    HalvesMin,
}

impl Scales {
    /// Groups that share a record, and the record's bytes.
    pub(super) const fn record(self) -> (usize, usize) {
        match self {
            Scales::Group | Scales::GroupBf16 => (1, 32),
            Scales::GroupMin => (1, 64),
            Scales::Super => (SUPER, 32),
            Scales::Sub32 => (SUPER, 32 + 8 * 16),
            Scales::Sub32Min => (SUPER, 64 + 8 * 32),
            Scales::Sub16 => (SUPER, 32 + 16 * 16),
            Scales::Sub16Min => (SUPER, 64 + 16 * 16),
            Scales::Span => (1, 64),
            Scales::SpanMin | Scales::Halves => (1, 128),
            Scales::HalvesMin => (1, 256),
        }
    }

    /// Bytes of a tile of `groups` groups; `1 << span_log` groups make a span.
    pub(super) const fn bytes(self, groups: usize, span_log: u32) -> usize {
        let (groups_of_record, bytes) = self.record();
        match self {
            Scales::Span | Scales::SpanMin => groups.div_ceil(1 << span_log) * bytes,
            _ => groups / groups_of_record * bytes,
        }
    }

    /// Where the record of `group` starts, and the group's position inside the record.
    #[inline(always)]
    pub(super) const fn locate(self, group: usize, span_log: u32) -> (usize, usize) {
        let (groups_of_record, bytes) = self.record();
        match self {
            Scales::Span | Scales::SpanMin => ((group >> span_log) * bytes, 0),
            _ => (group / groups_of_record * bytes, group % groups_of_record),
        }
    }

    /// True where each half of a group has its own scale.
    pub(super) const fn halves(self) -> bool {
        matches!(self, Scales::Sub16 | Scales::Sub16Min | Scales::Halves | Scales::HalvesMin)
    }

    /// True where a minimum joins the scale.
    pub(super) const fn has_min(self) -> bool {
        matches!(
            self,
            Scales::GroupMin
                | Scales::Sub32Min
                | Scales::Sub16Min
                | Scales::SpanMin
                | Scales::HalvesMin
        )
    }
}

/// What the codes of an integer tile mean: weight = scale · (level − zero) + minimum.
#[derive(Clone, Copy, Debug)]
pub(super) struct Coding {
    /// Bits of a code: 2, 3, 4, 5, 6 or 8.
    pub(super) bits: usize,
    /// True where the level is a table's entry, false where it is the code itself.
    pub(super) lookup: bool,
    /// The level that means zero.
    pub(super) zero: u8,
    /// The shape of the scales.
    pub(super) scales: Scales,
}

impl Coding {
    const fn integer(bits: usize, zero: u8, scales: Scales) -> Self {
        Self { bits, lookup: false, zero, scales }
    }

    const fn table(bits: usize, scales: Scales) -> Self {
        Self { bits, lookup: true, zero: 128, scales }
    }

    /// Bytes of a group's codes.
    pub(super) const fn group_bytes(self) -> usize {
        64 * self.bits
    }

    /// True where levels fill a byte around 128, so that they are best read as signed bytes by
    /// instruction sets whose byte products saturate.
    pub(super) const fn full_byte(self) -> bool {
        self.zero == 128
    }
}

/// A coding known at compile time: what the integer kernels are instantiated for.
pub(super) trait Format {
    const CODING: Coding;
}

macro_rules! formats {
    ($($name:ident = $coding:expr;)*) => {
        $(
            pub(super) struct $name;
            impl Format for $name {
                const CODING: Coding = $coding;
            }
        )*

        /// The integer tile formats.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Integer { $($name),* }

        impl Integer {
            /// What the codes mean.
            pub(super) fn coding(self) -> Coding {
                match self { $(Integer::$name => $name::CODING),* }
            }

            /// Calls `visitor` with the format as a type.
            pub(super) fn visit<V: Visitor>(self, visitor: V) -> V::Output {
                match self { $(Integer::$name => visitor.visit::<$name>()),* }
            }
        }
    };
}

/// Something to do with a format known at compile time.
pub(super) trait Visitor {
    type Output;
    fn visit<F: Format>(self) -> Self::Output;
}

formats! {
    Sym4 = Coding::integer(4, 8, Scales::Group);
    Sym5 = Coding::integer(5, 16, Scales::Group);
    Sym8 = Coding::integer(8, 128, Scales::Group);
    Affine4 = Coding::integer(4, 0, Scales::GroupMin);
    Affine5 = Coding::integer(5, 0, Scales::GroupMin);
    K2 = Coding::integer(2, 0, Scales::Sub16Min);
    K3 = Coding::integer(3, 4, Scales::Sub16);
    K4 = Coding::integer(4, 0, Scales::Sub32Min);
    K5 = Coding::integer(5, 0, Scales::Sub32Min);
    K6 = Coding::integer(6, 32, Scales::Sub16);
    Ternary = Coding::integer(2, 1, Scales::Super);
    Table4 = Coding::table(4, Scales::Group);
    Table4Bf16 = Coding::table(4, Scales::GroupBf16);
    Table4Sub = Coding::table(4, Scales::Sub32);
    Table3Sub = Coding::table(3, Scales::Sub32);
    Table3Sub16 = Coding::table(3, Scales::Sub16);
    SpanSym2 = Coding::integer(2, 2, Scales::Span);
    SpanSym3 = Coding::integer(3, 4, Scales::Span);
    SpanSym4 = Coding::integer(4, 8, Scales::Span);
    SpanSym5 = Coding::integer(5, 16, Scales::Span);
    SpanSym6 = Coding::integer(6, 32, Scales::Span);
    SpanSym8 = Coding::integer(8, 128, Scales::Span);
    SpanAffine2 = Coding::integer(2, 0, Scales::SpanMin);
    SpanAffine3 = Coding::integer(3, 0, Scales::SpanMin);
    SpanAffine4 = Coding::integer(4, 0, Scales::SpanMin);
    SpanAffine5 = Coding::integer(5, 0, Scales::SpanMin);
    SpanAffine6 = Coding::integer(6, 0, Scales::SpanMin);
    // Byte products of the full range saturate unless they are signed.
    SpanAffine8 = Coding::integer(8, 128, Scales::SpanMin);
    SpanTable4 = Coding::table(4, Scales::Span);
    HalvesAffine4 = Coding::integer(4, 0, Scales::HalvesMin);
    HalvesAffine8 = Coding::integer(8, 128, Scales::HalvesMin);
    HalvesTable4 = Coding::table(4, Scales::Halves);
}

/// Number formats of dense tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dense {
    F32,
    F16,
    Bf16,
    /// F8_E4M3 without NaN.
    F8,
}

impl Dense {
    /// The format whose number a kernel was compiled for.
    pub(super) const fn of(number: u8) -> Self {
        match number {
            0 => Dense::F32,
            1 => Dense::F16,
            2 => Dense::Bf16,
            _ => Dense::F8,
        }
    }

    /// Bytes of a value.
    pub(super) const fn bytes(self) -> usize {
        match self {
            Dense::F32 => 4,
            Dense::F16 | Dense::Bf16 => 2,
            Dense::F8 => 1,
        }
    }
}

/// How kernels take activations; diagrams in `activations.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inputs {
    F32,
    Bf16,
    Int8,
}

impl Inputs {
    /// Bytes of a token of `cols` values.
    pub(super) fn bytes(self, cols: usize) -> usize {
        match self {
            Inputs::F32 => cols * 4,
            Inputs::Bf16 => cols.div_ceil(2) * 4,
            Inputs::Int8 => cols / GROUP * GROUP_BYTES,
        }
    }
}

/// The execution layout of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    Dense(Dense),
    Pairs,
    Integer(Integer),
}

impl Layout {
    /// The layout that `dtype` is repacked into, if it is a weight type. Every weight keeps its exact
    /// value, but for F64, which is rounded to single precision.
    pub(super) fn of(dtype: DType) -> Option<Self> {
        use DType::*;
        Some(match dtype {
            F32 | F64 => Layout::Dense(Dense::F32),
            F16 => Layout::Dense(Dense::F16),
            BF16 | F8_E4M3 | F8_E5M2 => Layout::Dense(Dense::Bf16),
            Q4_0 => Layout::Integer(Integer::Sym4),
            Q4_1 => Layout::Integer(Integer::Affine4),
            Q5_0 => Layout::Integer(Integer::Sym5),
            Q5_1 => Layout::Integer(Integer::Affine5),
            Q8_0 => Layout::Integer(Integer::Sym8),
            Q2_K => Layout::Integer(Integer::K2),
            Q3_K => Layout::Integer(Integer::K3),
            Q4_K => Layout::Integer(Integer::K4),
            Q5_K => Layout::Integer(Integer::K5),
            Q6_K => Layout::Integer(Integer::K6),
            TQ1_0 | TQ2_0 => Layout::Integer(Integer::Ternary),
            IQ4_NL => Layout::Integer(Integer::Table4),
            MXFP4 => Layout::Integer(Integer::Table4Bf16),
            IQ4_XS | IQ3_XXS | IQ3_S => Layout::Integer(Integer::Table4Sub),
            IQ2_XXS => Layout::Integer(Integer::Table3Sub),
            IQ2_XS | IQ2_S => Layout::Integer(Integer::Table3Sub16),
            Bool | U8 | I8 | I16 | U16 | I32 | U32 | I64 | U64 => return None,
        })
    }

    /// What products take.
    pub(super) fn inputs(self) -> Inputs {
        match self {
            Layout::Dense(_) => Inputs::F32,
            Layout::Pairs => Inputs::Bf16,
            Layout::Integer(_) => Inputs::Int8,
        }
    }

    /// Bytes of a tile's codes (or values) and of its scales. `columns` share a scale, where the
    /// layout leaves their number open.
    pub(super) fn tile_bytes(self, cols: usize, columns: usize) -> (usize, usize) {
        match self {
            Layout::Dense(Dense::F8) => (cols * ROWS, cols.div_ceil(columns) * ROWS * 4),
            Layout::Dense(dense) => (cols * ROWS * dense.bytes(), 0),
            Layout::Pairs => (cols.div_ceil(2) * ROWS * 4, 0),
            Layout::Integer(integer) => {
                let (coding, groups) = (integer.coding(), cols / GROUP);
                (groups * coding.group_bytes(), coding.scales.bytes(groups, span_log(columns)))
            }
        }
    }
}

/// The power of two that is the number of groups in a span of `columns`.
#[inline(always)]
pub(super) const fn span_log(columns: usize) -> u32 {
    (columns / GROUP).trailing_zeros()
}

/// The levels of look-up types, as signed bytes, and the power of two that the type's scales are
/// multiplied by so that the levels are integers.
pub(super) fn levels(dtype: DType) -> (&'static [i8; 16], f32) {
    match dtype {
        DType::IQ4_NL | DType::IQ4_XS => (&IQ4_LEVELS, 1.0),
        DType::MXFP4 => (&MXFP4_LEVELS, 1.0),
        DType::IQ3_XXS => (&IQ3_XXS, 0.25),
        DType::IQ3_S => (&IQ3_S, 1.0),
        DType::IQ2_XXS | DType::IQ2_XS | DType::IQ2_S => (&IQ2, 0.125),
        _ => (&[0; 16], 1.0),
    }
}

/// The magnitudes of IQ3_XXS's codebook, with both signs.
const IQ3_XXS: [i8; 16] = [4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62];
/// The magnitudes of IQ3_S's codebook, with both signs.
const IQ3_S: [i8; 16] = [1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15];
/// The magnitudes of the IQ2 codebooks, with both signs; three bits address them.
const IQ2: [i8; 16] = [8, 25, 43, 0, -8, -25, -43, 0, 0, 0, 0, 0, 0, 0, 0, 0];
