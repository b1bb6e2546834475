use crate::DType;

/// What can go wrong with element types, buffers and mappings.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A row's length is no multiple of the layout's block length.
    #[error(
        "{dtype} packs blocks of {block} values; a row of {len} values cannot be packed: choose a type whose block divides the row"
    )]
    RowLength {
        /// The packed type.
        dtype: DType,
        /// Values in a block.
        block: usize,
        /// Values in the row.
        len: usize,
    },
    /// A byte buffer does not hold what its type and shape ask for.
    #[error("{what}: expected {expected} bytes, found {found}")]
    ByteLength {
        /// What the bytes should be.
        what: String,
        /// Bytes the type and shape ask for.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// A shape's element count or byte count does not fit in the address space.
    #[error("shape {shape} of {dtype} overflows the address space")]
    Overflow {
        /// The offending shape, written out.
        shape: String,
        /// Its element type.
        dtype: DType,
    },
    /// A type name that bevel does not know.
    #[error("unknown type `{0}`; known types are {list}", list = DType::names().collect::<Vec<_>>().join(", "))]
    UnknownDType(String),
    /// The type holds integers or booleans, which no layer multiplies with.
    #[error("{0} is not a weight type: weights are floating point or packed")]
    NotWeight(DType),
    /// An importance weight that cannot weigh anything.
    #[error("importance {index} of the row is {value}; it must be finite and not negative")]
    Importance {
        /// Position in the row.
        index: usize,
        /// The weight found.
        value: f32,
    },
    /// Quantization met a value that no layout can represent.
    #[error("value {index} of the row is {value}; only finite numbers can be packed")]
    NotFinite {
        /// Position in the row.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// A [`GroupedMatrix`](crate::GroupedMatrix) whose parts do not fit together.
    #[error("a grouped weight matrix has {0}")]
    Grouped(String),
    /// A file could not be opened or mapped.
    #[error("cannot read `{path}`: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
