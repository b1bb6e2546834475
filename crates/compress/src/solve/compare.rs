//! What rounding to nearest would have cost, judged by some rows of a matrix: rows are rounded one by
//! one, so that a few of them tell about all.

use bevel_kernels::Cpu;

use super::grid::{Grid, dequantize};
use super::loss::{difference, output_energy, relative};
use super::{SolveResult, Solved, Target, rtn};
use crate::Stats;

/// Rows that are rounded; of a matrix with no more, all.
const ROWS: usize = 64;

/// `tr(D H Dᵀ) / tr(W H Wᵀ)` for `D = W − Ŵ`: the error of a layer's outputs as a part of them, both
/// squared. `w` and `rounded` are `[rows, cols]`; for a `H` that is not known see
/// [`SolveReport::error`](super::SolveReport::error).
pub fn output_error(cpu: &Cpu, w: &[f32], rounded: &[f32], stats: &Stats) -> f64 {
    let energy = output_energy(cpu, stats, w);
    relative(output_energy(cpu, stats, &difference(w, rounded)), energy)
}

/// The [`output_error`] that rounding `w`, `[rows, cols]`, to nearest would have, in a small part of
/// the time that solving it takes.
///
/// Up to 64 rows are rounded. Their error is taken for that of all; where the matrix was `solved` it is
/// how much larger their error is than there, which differs less from row to row.
///
/// # Errors
/// Those of [`solve`](super::solve).
pub fn rounding_error(
    cpu: &Cpu,
    w: &[f32],
    rows: usize,
    stats: &Stats,
    target: &Target,
    solved: Option<&Solved>,
) -> SolveResult<f64> {
    let cols = stats.cols();
    let rows: Vec<usize> = chosen(rows).collect();
    let part = |all: &[f32]| -> Vec<f32> {
        rows.iter().flat_map(|row| &all[row * cols..][..cols]).copied().collect()
    };
    let before = part(w);
    let form = match (Grid::new(target, w, cols)?, target) {
        (Some(grid), _) => rtn::rtn(cpu, &before, rows.len(), cols, &grid, None)?,
        (None, Target::Packed(dtype)) => rtn::pack_rows(cpu, &before, cols, *dtype, None)?,
        (None, Target::Grouped(_)) => unreachable!("groups have a grid"),
    };
    let rounded = dequantize(cpu, &form, rows.len(), cols)?;
    if let Some(solved) = solved {
        let energy = |other: &[f32]| output_energy(cpu, stats, &difference(&before, other));
        let (lost, rounding) = (energy(&part(&solved.weights)), energy(&rounded));
        if lost > 0.0 {
            return Ok(solved.report.error * rounding / lost);
        }
    }
    Ok(output_error(cpu, &before, &rounded, stats))
}

/// Rows from all over a matrix, at distances without a period: heads have one.
fn chosen(rows: usize) -> impl Iterator<Item = usize> {
    const GOLDEN: f64 = 0.618_033_988_749_895;
    let count = rows.min(ROWS);
    (0..count).map(move |i| match rows <= ROWS {
        true => i,
        false => ((i as f64 + (i as f64 * GOLDEN).fract()) * rows as f64 / count as f64) as usize,
    })
}

#[cfg(test)]
mod tests {
    use super::chosen;

    #[test]
    fn rows_are_chosen_from_all_over() {
        assert!(chosen(0).next().is_none());
        assert!(chosen(64).eq(0..64));
        for rows in [65, 576, 4096, 151_936] {
            let found: Vec<usize> = chosen(rows).collect();
            assert_eq!(found.len(), 64);
            assert!(found.is_sorted() && found[63] < rows, "{found:?}");
            let in_head =
                |position: usize| found.iter().filter(|row| *row % 64 == position).count();
            assert!((0..64).all(|position| in_head(position) < 8), "{rows} rows: {found:?}");
        }
    }
}
