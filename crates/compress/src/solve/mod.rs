//! From a weight matrix and what is known about its inputs to a smaller matrix that computes nearly
//! the same: one matrix at a time, in memory.
//!
//! [`solve`] is the only way in. A [`Target`] says what numbers the result may be made of, a
//! [`Method`] how they are chosen. Errors are measured as the squared difference of the layer's
//! outputs, `tr(ΔW H ΔWᵀ)` with `H = Σ x xᵀ`, wherever `H` is known.

mod awq;
mod clip;
mod compare;
mod error;
mod gptq;
mod grid;
mod hessian;
mod loss;
mod obs;
mod quantizer;
mod range;
mod refine;
mod resolve;
mod row;
mod rtn;
mod scales;
mod solved;
mod sparsegpt;
mod sparsity;
mod stripes;
mod target;
mod wanda;

use std::time::Instant;

use bevel_kernels::Cpu;
use serde::{Deserialize, Serialize};

pub use awq::{AwqScales, awq_scales};
pub use compare::{output_error, rounding_error};
pub use error::{SolveError, SolveResult};
pub use row::RowRounding;
pub use solved::{Form, SolveReport, Solved};
pub use sparsegpt::sparsegpt;
pub use sparsity::{Pruned, Sparsity};
pub use target::{Codes, GroupSpec, Range, ScaleType, Target};
pub use wanda::wanda;

use crate::Stats;

/// How the numbers are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Round to nearest; with scales that mind how large each column's inputs are, where statistics
    /// are there and [`Rtn::weighted`] asks for it.
    Rtn(Rtn),
    /// Column by column, each column's error made up for in those that follow (arXiv 2210.17323).
    Gptq(Gptq),
    /// Each group's range searched for the least error of the layer's output, then rounded to nearest:
    /// the second half of AWQ (arXiv 2306.00978), whose first is [`awq_scales`]. Packed layouts choose
    /// their ranges themselves: there it is what [`Rtn::weighted`] gives.
    Awq(Awq),
}

/// Options of AWQ's search for ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Awq {
    /// How often each group is visited. The first visit knows the errors of the groups before it, later
    /// ones those of all others.
    pub sweeps: usize,
}

impl Default for Awq {
    fn default() -> Self {
        Self { sweeps: 3 }
    }
}

/// Options of rounding to nearest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rtn {
    /// Errors weigh as much as the mean square of the input they are multiplied with.
    pub weighted: bool,
}

/// Options of GPTQ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gptq {
    /// λ as a part of the mean of `H`'s diagonal, added to the diagonal. 0.01 in the paper.
    pub damping: f32,
    /// The order of columns.
    pub order: Order,
    /// How much of the inputs' drift from the full model's is corrected for, as GPTAQ
    /// (arXiv 2504.02692) does, with endless tokens; with few it is less. Zero is GPTQ. Needs
    /// [`Needs::cross`](crate::Needs::cross).
    pub drift: f32,
    /// Sweeps of coordinate descent over the codes and scales that the walk ended with; zero is GPTQ
    /// as published. `None` is as many as pay: the fewer levels there are to choose from, the more of
    /// the walk's choices are regretted.
    pub refine: Option<usize>,
}

/// The order in which columns are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// As they lie; a group's scales are fixed when its first column is reached.
    Natural,
    /// Largest diagonal of `H` first, with the scales of all groups fixed before.
    StaticGroups,
    /// Largest diagonal of `H` first, groups made of columns that follow each other in that order:
    /// the result has a `group_of`. For integer codes in groups only.
    ActOrder,
}

impl Default for Gptq {
    fn default() -> Self {
        Self { damping: 0.01, order: Order::StaticGroups, drift: 0.0, refine: None }
    }
}

/// Quantizes `w`, `[rows, cols]`.
///
/// # Errors
/// [`SolveError`]: weights or statistics that are not finite, a target that does not fit the shape,
/// statistics that the method needs and that are missing.
pub fn solve(
    cpu: &Cpu,
    w: &[f32],
    rows: usize,
    cols: usize,
    stats: &Stats,
    target: &Target,
    method: &Method,
) -> SolveResult<Solved> {
    assert_eq!(w.len(), rows * cols, "weights of a [{rows}, {cols}] matrix");
    assert_eq!(stats.cols(), cols, "statistics of a matrix with other columns");
    if let Some((index, &value)) = w.iter().enumerate().find(|(_, w)| !w.is_finite()) {
        return Err(SolveError::Weights { index, value });
    }
    let start = Instant::now();
    let weighted = !matches!(method, Method::Rtn(Rtn { weighted: false }));
    let importance = rtn::importance(stats, weighted);
    match (grid::Grid::new(target, w, cols)?, method, target) {
        (Some(grid), Method::Gptq(options), _) => gptq::gptq(cpu, w, rows, stats, &grid, options),
        (Some(grid), Method::Awq(options), Target::Grouped(_)) => {
            let form = clip::clip(cpu, w, rows, stats, &grid, options)?;
            rtn::solved(cpu, w, rows, stats, form, weighted, start)
        }
        (Some(grid), Method::Rtn(_) | Method::Awq(_), _) => {
            let form = rtn::rtn(cpu, w, rows, cols, &grid, importance.as_deref())?;
            rtn::solved(cpu, w, rows, stats, form, weighted, start)
        }
        (None, _, Target::Packed(dtype)) => {
            let form = rtn::pack_rows(cpu, w, cols, *dtype, importance.as_deref())?;
            let mut solved = rtn::solved(cpu, w, rows, stats, form, weighted, start)?;
            solved.report.fell_back = matches!(method, Method::Gptq(_));
            Ok(solved)
        }
        (None, _, Target::Grouped(_)) => unreachable!("groups have a grid"),
    }
}
