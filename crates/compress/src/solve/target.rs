use bevel_base::DType;

/// What numbers a matrix may be made of.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// A GGUF layout.
    Packed(DType),
    /// Codes with a scale for each group of columns.
    Grouped(GroupSpec),
}

/// Codes with a scale for each group of columns: what becomes a
/// [`GroupedMatrix`](bevel_base::GroupedMatrix).
#[derive(Clone, Debug, PartialEq)]
pub struct GroupSpec {
    /// What codes mean.
    pub codes: Codes,
    /// Columns that share a scale; `None` for the whole row.
    pub group_size: Option<usize>,
    /// What scales are stored as. They are rounded before codes are chosen, so that what is written
    /// is what was optimized.
    pub scale: ScaleType,
    /// How scales are chosen.
    pub range: Range,
}

/// What codes mean.
#[derive(Clone, Debug, PartialEq)]
pub enum Codes {
    /// `scale · (code − zero)`, codes of 2 to 8 bits; the zero point is half of the codes where
    /// symmetric, and each group's own integer otherwise.
    Integer {
        /// 2 to 8.
        bits: u32,
        /// The zero point is `2^(bits − 1)` everywhere.
        symmetric: bool,
    },
    /// `scale · code + minimum`: MLX. The minimum is stored as the scale is.
    Affine {
        /// 2 to 8.
        bits: u32,
    },
    /// `scale · levels[code]`: NF4, FP4, the E2M1 of MXFP4 and NVFP4.
    Levels([f32; 16]),
    /// `scale · e4m3(code)`.
    Float8,
}

/// What a scale is stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleType {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// The upper half of a single.
    Bf16,
    /// A power of two (E8M0, as in MXFP4).
    PowerOfTwo,
    /// FP8 E4M3 times one single-precision number for the whole matrix (NVFP4).
    E4m3,
}

/// How the scale of a group is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Range {
    /// Every value is inside.
    MinMax,
    /// The range is shrunk step by step, and what has the least `Σ |error|^norm` kept, as in the
    /// authors' GPTQ: `steps` 100, `max_shrink` 0.8, `norm` 2.4.
    Shrink {
        /// Steps from the whole range to nothing.
        steps: usize,
        /// The last shrink factor tried, as the part that is cut off.
        max_shrink: f32,
        /// The exponent.
        norm: f32,
    },
    /// The least squared error, weighted by importance where it is known: several ranges, each
    /// improved by least squares.
    Search,
}

impl Range {
    /// [`Range::Shrink`] with the values of the authors' GPTQ.
    pub const MSE: Range = Range::Shrink { steps: 100, max_shrink: 0.8, norm: 2.4 };
}
