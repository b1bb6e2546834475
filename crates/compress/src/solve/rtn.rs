//! Round to nearest: every group by itself.

use std::time::Instant;

use bevel_base::{DType, pack};
use bevel_kernels::{Cpu, Wide, run_wide};

use super::grid::{Grid, dequantize};
use super::quantizer::{Quantizer, Rounded};
use super::scales::Scales;
use super::stripes::{STRIPE, transposed};
use super::{Form, SolveReport, SolveResult, Solved, output_error};
use crate::Stats;

/// Rounds `w`, `[rows, cols]`; errors weigh as much as `importance`, `[cols]`, where it is given.
pub(super) fn rtn(
    cpu: &Cpu,
    w: &[f32],
    rows: usize,
    cols: usize,
    grid: &Grid,
    importance: Option<&[f32]>,
) -> SolveResult<Form> {
    let order: Vec<usize> = (0..cols).collect();
    // MLX chooses codes by scales that are not rounded yet.
    let exact = grid.unrounded();
    let sharp = exact.as_ref().unwrap_or(grid);
    let quantizer =
        Quantizer { grid: sharp, order: &order, importance: &[], fixed: true, isa: cpu.isa() };
    let mut stripes = quantizer.stripes(rows);
    quantizer.fix(cpu, w, importance, &mut stripes)?;
    round(cpu, w, rows, sharp, &order, &mut stripes);
    if exact.is_some() {
        stripes.iter_mut().for_each(|stripe| stripe.scales.each(|p| grid.stored_all(p)));
    }
    Quantizer { grid, ..quantizer }.form(cpu, stripes, rows, None)
}

/// Rounds `w`, `[rows, cols]`, to what the stripes' scales say.
pub(super) fn round(
    cpu: &Cpu,
    w: &[f32],
    rows: usize,
    grid: &Grid,
    order: &[usize],
    stripes: &mut [Rounded],
) {
    let turned = transposed(cpu, w, rows, order);
    cpu.pool().run_chunks(stripes, 1, |i, stripe| {
        let (first, stripe) = (i * STRIPE, &mut stripe[0]);
        run_wide(cpu.isa(), RoundAll { grid, stripe, w: &turned, rows, first });
    });
}

/// Mean squares of inputs, where they are wanted and known.
pub(super) fn importance(stats: &Stats, weighted: bool) -> Option<Vec<f32>> {
    (weighted && stats.tokens() > 0).then(|| stats.importance())
}

/// All columns of a stripe.
struct RoundAll<'a> {
    grid: &'a Grid,
    stripe: &'a mut Rounded,
    /// `[cols, rows]`
    w: &'a [f32],
    rows: usize,
    first: usize,
}

impl Wide for RoundAll<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Rounded { scales, codes, .. } = self.stripe;
        let mut q = [0.0; STRIPE];
        let q = &mut q[..scales.rows()];
        let lines = self.w.chunks_exact(self.rows).zip(codes.chunks_exact_mut(q.len()));
        for (col, (w, codes)) in lines.enumerate() {
            let w = &w[self.first..][..q.len()];
            Scales::round(scales, &self.grid.levels, col / self.grid.group, w, codes, q);
        }
    }
}

/// Rounds to a layout that has no grid: plain types, and those whose codes stand for several values.
pub(super) fn pack_rows(
    cpu: &Cpu,
    w: &[f32],
    cols: usize,
    dtype: DType,
    importance: Option<&[f32]>,
) -> SolveResult<Form> {
    let row_bytes = dtype.row_bytes(cols)?;
    let mut bytes = vec![0; w.len() / cols.max(1) * row_bytes];
    let failed = std::sync::Mutex::new(None);
    cpu.pool().run_chunks(&mut bytes, row_bytes.max(1), |row, bytes| {
        let w = &w[row * cols..][..cols];
        if let Err(error) = pack::quantize(dtype, w, importance, bytes) {
            *failed.lock().expect("nobody panics with it") = Some(error);
        }
    });
    match failed.into_inner().expect("nobody panics with it") {
        Some(error) => Err(error.into()),
        None => Ok(Form::Packed { dtype, bytes }),
    }
}

/// The result of rounding, measured. Where it was `weighted` it is not what it is compared with.
pub(super) fn solved(
    cpu: &Cpu,
    w: &[f32],
    rows: usize,
    stats: &Stats,
    form: Form,
    weighted: bool,
    start: Instant,
) -> SolveResult<Solved> {
    let weights = dequantize(cpu, &form, rows, stats.cols())?;
    let rounding = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let error = output_error(cpu, w, &weights, stats);
    let seconds = vec![("round", rounding), ("measure", start.elapsed().as_secs_f64())];
    let rtn_error = (!weighted).then_some(error);
    let report = SolveReport { error, rtn_error, seconds, ..SolveReport::default() };
    Ok(Solved { weights, form, report })
}
