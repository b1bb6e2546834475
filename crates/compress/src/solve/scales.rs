//! The scales of a stripe of rows, lying so that a column's are next to each other, and rounding to
//! the levels between them.

use bevel_base::pack;

use super::grid::{Grid, Levels};

/// What the codes of a group of a row are scaled with: `ŵ = step · (level + shift) + offset`.
pub(super) type Parameters = [f32; 3];

/// The scales of a stripe of rows.
#[derive(Clone)]
pub(super) struct Scales {
    rows: usize,
    /// `[groups, 3, rows]`
    parameters: Vec<f32>,
    /// Blocks of packed layouts, `[rows, row_bytes]`.
    blocks: Vec<u8>,
}

impl Scales {
    pub(super) fn new(grid: &Grid, rows: usize, cols: usize) -> Self {
        Self {
            rows,
            parameters: vec![0.0; grid.groups(cols) * 3 * rows],
            blocks: vec![0; rows * grid.row_bytes(cols)],
        }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn blocks(&self) -> &[u8] {
        &self.blocks
    }

    /// Block `index` of row `row`.
    pub(super) fn block(&mut self, row: usize, index: usize, bytes: usize) -> &mut [u8] {
        let start = row * (self.blocks.len() / self.rows) + index * bytes;
        &mut self.blocks[start..][..bytes]
    }

    pub(super) fn set(&mut self, row: usize, group: usize, parameters: Parameters) {
        for (i, parameter) in parameters.into_iter().enumerate() {
            self.parameters[(group * 3 + i) * self.rows + row] = parameter;
        }
    }

    pub(super) fn get(&self, row: usize, group: usize) -> Parameters {
        std::array::from_fn(|i| self.parameters[(group * 3 + i) * self.rows + row])
    }

    /// Changes the parameters of all groups.
    pub(super) fn each(&mut self, change: impl Fn(Parameters) -> Parameters) {
        for group in 0..self.parameters.len() / (3 * self.rows) {
            for row in 0..self.rows {
                self.set(row, group, change(self.get(row, group)));
            }
        }
    }

    /// Takes row `row` of one span's scales as the groups from `group` on, and block `block`.
    pub(super) fn take(&mut self, span: &Scales, row: usize, group: usize, block: usize) {
        for i in 0..span.parameters.len() / (3 * span.rows) {
            self.set(row, group + i, span.get(row, i));
        }
        let bytes = span.blocks.len() / span.rows;
        self.block(row, block, bytes).copy_from_slice(&span.blocks[row * bytes..][..bytes]);
    }

    /// `level + shift` of a column's codes (indices of levels), `[rows]`: what the step is
    /// multiplied with.
    #[inline(always)]
    pub(super) fn levels(&self, levels: &Levels, group: usize, codes: &[u8], out: &mut [f32]) {
        let shifts = &self.parameters[(group * 3 + 1) * self.rows..][..self.rows];
        for (r, out) in out.iter_mut().enumerate() {
            *out = match levels {
                Levels::Integers { low, .. } => low + f32::from(codes[r]) + shifts[r],
                Levels::Table { levels, .. } => levels[usize::from(codes[r])],
                Levels::Float8 => pack::e4m3(codes[r]),
            };
        }
    }

    /// Rounds a column, `w` (`[rows]`), to the levels of its group: their indices and `ŵ`.
    #[inline(always)]
    pub(super) fn round(
        &self,
        levels: &Levels,
        group: usize,
        w: &[f32],
        codes: &mut [u8],
        q: &mut [f32],
    ) {
        let parameters = &self.parameters[group * 3 * self.rows..][..3 * self.rows];
        let (steps, rest) = parameters.split_at(self.rows);
        let (shifts, offsets) = rest.split_at(self.rows);
        let n = w.len();
        assert!(n == self.rows && codes.len() == n && q.len() == n, "a column of the stripe");
        match levels {
            Levels::Integers { low, high } => {
                for r in 0..n {
                    let t = quotient(w[r] - offsets[r], steps[r]) - shifts[r];
                    let level = nearest_integer(t, *low, *high);
                    codes[r] = (level - low) as u8;
                    q[r] = steps[r] * (level + shifts[r]) + offsets[r];
                }
            }
            Levels::Table { levels, .. } => {
                for r in 0..n {
                    let t = quotient(w[r] - offsets[r], steps[r]);
                    let (mut level, mut code) = (levels[0], 0);
                    for next in &levels[1..] {
                        // The nearer one, and of two as near the lower; of two zeros that of `t`'s sign.
                        let signs = (level == *next) & level.is_sign_negative();
                        let above = (t - level > *next - t) | (signs & (t >= 0.0));
                        level = if above { *next } else { level };
                        code += u8::from(above);
                    }
                    codes[r] = code;
                    q[r] = steps[r] * level + offsets[r];
                }
            }
            Levels::Float8 => {
                for r in 0..n {
                    let code = pack::to_e4m3(quotient(w[r], steps[r]));
                    codes[r] = code;
                    q[r] = steps[r] * pack::e4m3(code);
                }
            }
        }
    }
}

/// The integer between `low` and `high` nearest to `t`.
#[inline(always)]
pub(super) fn nearest_integer(t: f32, low: f32, high: f32) -> f32 {
    // Adding 1.5 · 2²³ leaves no bits for the fraction.
    const MAGIC: f32 = 12_582_912.0;
    let t = if t > low { t } else { low };
    let t = if t < high { t } else { high };
    (t + MAGIC) - MAGIC
}

/// 1 / step, or 0 for a step of zero.
#[inline(always)]
pub(super) fn inverse(step: f32) -> f32 {
    if step == 0.0 { 0.0 } else { 1.0 / step }
}

/// w / step, or 0 for a step of zero. A product with the inverse would round twice.
#[inline(always)]
fn quotient(w: f32, step: f32) -> f32 {
    if step == 0.0 { 0.0 } else { w / step }
}
