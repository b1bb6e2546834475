//! Rounding of single rows, for training: weights that change with every step are rounded anew in each.

use bevel_kernels::{Cpu, Isa, Wide, run_wide};

use super::grid::Grid;
use super::scales::Scales;
use super::{GroupSpec, ScaleType, SolveError, SolveResult, Target};

/// Rounds rows to nearest, each as [`solve`](super::solve) rounds it among others.
#[derive(Debug)]
pub struct RowRounding {
    grid: Grid,
    isa: Isa,
}

impl RowRounding {
    /// For rows of so many columns.
    ///
    /// # Errors
    /// [`SolveError::Target`] for scales that depend on the whole matrix, and for groups that do not divide the rows.
    pub fn new(cpu: &Cpu, spec: &GroupSpec, cols: usize) -> SolveResult<Self> {
        if spec.scale == ScaleType::E4m3 {
            return Err(SolveError::Target("scales depend on the whole matrix".to_owned()));
        }
        let grid =
            Grid::new(&Target::Grouped(spec.clone()), &[], cols)?.expect("groups have a grid");
        Ok(Self { grid, isa: cpu.isa() })
    }

    /// Replaces a row by the numbers that its codes stand for.
    ///
    /// # Errors
    /// Those of the search for scales.
    pub fn round(&self, row: &mut [f32]) -> SolveResult<()> {
        let mut scales = Scales::new(&self.grid, 1, row.len());
        for (span, x) in row.chunks(self.grid.span).enumerate() {
            self.grid.fit(self.isa, &mut scales, 0, span, x, None)?;
        }
        run_wide(self.isa, RoundRow { grid: &self.grid, scales: &scales, row });
        Ok(())
    }
}

struct RoundRow<'a> {
    grid: &'a Grid,
    scales: &'a Scales,
    row: &'a mut [f32],
}

impl Wide for RoundRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (group, values) in self.row.chunks_mut(self.grid.group).enumerate() {
            for value in values {
                let (mut code, mut rounded) = ([0], [0.0]);
                self.scales.round(&self.grid.levels, group, &[*value], &mut code, &mut rounded);
                *value = rounded[0];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solve::{Codes, Form, Method, Range, Rtn, solve};
    use crate::{Needs, Stats};

    #[test]
    fn a_row_is_rounded_as_among_others() {
        let (rows, cols) = (5, 192);
        let mut random = 7u32;
        let w: Vec<f32> = (0..rows * cols)
            .map(|_| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (random >> 8) as f32 / (1u32 << 24) as f32 - 0.5
            })
            .collect();
        let cpu = Cpu::new(2).unwrap();
        for (bits, symmetric) in [(2, true), (3, true), (4, true), (4, false), (8, true)] {
            let spec = GroupSpec {
                codes: Codes::Integer { bits, symmetric },
                group_size: Some(64),
                scale: ScaleType::F16,
                range: Range::Search,
            };
            let nothing = Stats::new(cols, Needs::default());
            let (target, method) =
                (Target::Grouped(spec.clone()), Method::Rtn(Rtn { weighted: false }));
            let solved = solve(&cpu, &w, rows, cols, &nothing, &target, &method).unwrap();
            let Form::Grouped { matrix, .. } = solved.form else { panic!("groups") };
            let rounding = RowRounding::new(&cpu, &spec, cols).unwrap();
            let mut rounded = w.clone();
            rounded.chunks_mut(cols).for_each(|row| rounding.round(row).unwrap());
            assert!(rounded == matrix.dequantize(), "{bits} bits, symmetric: {symmetric}");
        }
    }
}
