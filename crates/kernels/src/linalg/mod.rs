//! Dense linear algebra over row-major slices: what calibrated compression and training need of it. The same bits on
//! every number of threads, and in single precision on every instruction set.

mod cholesky;
mod gemm;
mod gram;
mod panels;
mod tile;
mod transpose;
mod view;

pub use cholesky::{NotPositive, cholesky, inverse_cholesky_upper};
pub(crate) use gemm::multiply_alone;
pub use gemm::{Region, Term, Update, gemm, gemm_in, multiply};
pub use gram::{column_sums, gram, mirror};
pub use panels::{Panels, Precision, Rows};
pub use view::View;
