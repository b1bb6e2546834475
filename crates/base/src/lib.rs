//! The vocabulary of bevel: element types and packed weight layouts, tensor views, file mappings,
//! aligned buffers and the thread pool. Nothing here knows a file format or a model.

mod aligned;
mod dtype;
mod error;
pub mod grouped;
mod mapping;
pub mod pack;
mod paged;
mod pattern;
mod pool;
mod process;
mod slab;
mod tensor;

pub use aligned::AlignedVec;
pub use dtype::DType;
pub use error::{Error, Result};
pub use grouped::GroupedMatrix;
pub use mapping::Mapping;
pub use paged::PagedVec;
pub use pattern::matches;
pub use pool::Pool;
pub use process::{
    keep_freed_memory, on_termination, raise_file_limit, refuse_writes_past_the_limit,
    return_freed_memory, share_freed_memory,
};
pub use slab::SlabBytes;
pub use tensor::{Shape, TensorView};
