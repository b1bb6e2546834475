//! Dense linear algebra in single precision over row-major slices: what calibrated compression
//! needs of it. The same bits on every instruction set and number of threads.

mod cholesky;
mod gemm;
mod gram;
mod tile;
mod view;

pub use cholesky::{NotPositive, cholesky, inverse_cholesky_upper};
pub use gemm::{Region, Update, gemm};
pub use gram::{column_sums, gram, mirror};
pub use view::View;
