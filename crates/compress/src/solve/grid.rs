//! What a target is to a solver: spans of columns whose scales are chosen together, groups of columns
//! that share them, and a set of levels, `ŵ = step · (level + shift) + offset`.

use bevel_base::pack::{self, grid};
use bevel_base::{DType, GroupedMatrix, grouped};
use bevel_kernels::Cpu;

use super::range;
use super::scales::{Parameters, Scales};
use super::{Codes, Form, GroupSpec, Range, ScaleType, SolveError, SolveResult, Target};

/// A target as scales and levels.
#[derive(Debug)]
pub(super) struct Grid {
    /// Columns whose scales are chosen together, a multiple of `group`; the last span of a row may
    /// be shorter.
    pub(super) span: usize,
    /// Columns that share a step, a shift and an offset.
    pub(super) group: usize,
    pub(super) levels: Levels,
    pub(super) source: Source,
    /// Rounds of the search for a group's scale.
    rounds: usize,
}

/// Who chooses the scales.
#[derive(Debug)]
pub(super) enum Source {
    /// The search of a packed layout.
    Packed(grid::Grid),
    /// The search of [`range`], with the number that scales are multiples of.
    Grouped(GroupSpec, f32),
}

/// The numbers that codes stand for.
#[derive(Clone, Debug)]
pub(super) enum Levels {
    /// Code `c` stands for `low + c`.
    Integers { low: f32, high: f32 },
    /// Ascending numbers, the middles between neighbours, and the code of each.
    Table { levels: Vec<f32>, middles: Vec<f32>, codes: Vec<u8> },
    /// FP8 E4M3.
    Float8,
}

impl Levels {
    fn table(numbers: impl Iterator<Item = f32>) -> Self {
        let mut sorted: Vec<(f32, u8)> = numbers.zip(0..).collect();
        sorted.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let (levels, codes): (Vec<f32>, Vec<u8>) = sorted.into_iter().unzip();
        let middles = levels.windows(2).map(|pair| pair[0] + (pair[1] - pair[0]) * 0.5).collect();
        Levels::Table { levels, middles, codes }
    }

    /// How many there are.
    fn count(&self) -> usize {
        match self {
            Levels::Integers { low, high } => (high - low) as usize + 1,
            Levels::Table { levels, .. } => levels.len(),
            Levels::Float8 => 253,
        }
    }

    /// Sweeps of coordinate descent that pay. At 4 bits the first gains nearly all there is; at 2 the
    /// sixth still lowers the divergence on other text (`benches/runs/gptq.json`).
    pub(super) fn sweeps(&self) -> usize {
        match self.count() {
            ..=4 => 6,
            5..=8 => 3,
            _ => 1,
        }
    }

    /// The level of largest magnitude.
    pub(super) fn largest(&self) -> f32 {
        match self {
            Levels::Integers { low, high } => high.max(-low),
            Levels::Table { levels, .. } => levels.iter().fold(0.0, |most, l| l.abs().max(most)),
            Levels::Float8 => 448.0,
        }
    }
}

impl Grid {
    /// The grid of a target for the weights `w`; `None` for types whose codes stand for several
    /// values at once, and for those that have none.
    pub(super) fn new(target: &Target, w: &[f32], cols: usize) -> SolveResult<Option<Self>> {
        match target {
            Target::Packed(dtype) => {
                dtype.row_bytes(cols)?;
                Ok(grid::Grid::of(*dtype).map(Self::packed))
            }
            Target::Grouped(spec) => Self::grouped(spec, w, cols).map(Some),
        }
    }

    fn packed(grid: grid::Grid) -> Self {
        let levels = match grid.levels() {
            grid::Levels::Integers { low, high } => {
                Levels::Integers { low: low as f32, high: high as f32 }
            }
            grid::Levels::Table(table) => Levels::table(table.iter().copied()),
        };
        Self {
            span: grid.block_len(),
            group: grid.group_len(),
            levels,
            source: Source::Packed(grid),
            rounds: range::ROUNDS,
        }
    }

    /// True where groups may be of columns that do not lie side by side: a row is one group, or has
    /// groups of up to `longest` integers.
    pub(super) fn can_regroup(&self, longest: usize) -> bool {
        let Source::Grouped(spec, _) = &self.source else { return false };
        let is_row = spec.group_size.is_none();
        matches!(spec.codes, Codes::Integer { .. }) && (is_row || self.group <= longest)
    }

    fn grouped(spec: &GroupSpec, w: &[f32], cols: usize) -> SolveResult<Self> {
        let levels = match &spec.codes {
            Codes::Integer { bits, .. } | Codes::Affine { bits } => {
                if !(2..=8).contains(bits) {
                    return Err(SolveError::Target(format!("codes have 2 to 8 bits, not {bits}")));
                }
                Levels::Integers { low: 0.0, high: ((1u32 << bits) - 1) as f32 }
            }
            Codes::Levels(levels) => {
                if levels.iter().any(|level| !level.is_finite()) {
                    return Err(SolveError::Target("a level is not a number".to_owned()));
                }
                Levels::table(levels.iter().copied())
            }
            Codes::Float8 => Levels::Float8,
        };
        let group = spec.group_size.unwrap_or(cols);
        if group == 0 || !cols.is_multiple_of(group) {
            return Err(SolveError::Target(format!(
                "rows of {cols} columns cannot be cut into groups of {group}; choose a size that divides them"
            )));
        }
        let largest = w.iter().fold(0f32, |most, w| w.abs().max(most));
        let unit = match spec.scale {
            // The largest scale becomes the largest FP8 number.
            ScaleType::E4m3 if largest > 0.0 => largest / (levels.largest() * 448.0),
            _ => 1.0,
        };
        let source = Source::Grouped(spec.clone(), unit);
        Ok(Self { span: group, group, levels, source, rounds: range::ROUNDS })
    }

    /// With scales of groups that are the best of some, and not improved: for estimates.
    pub(super) fn hurried(self) -> Self {
        Self { rounds: 0, ..self }
    }

    /// Groups in a row.
    pub(super) fn groups(&self, cols: usize) -> usize {
        cols.div_ceil(self.group)
    }

    /// Bytes of a row's blocks; none for codes in groups.
    pub(super) fn row_bytes(&self, cols: usize) -> usize {
        match &self.source {
            Source::Packed(grid) => cols / grid.block_len() * grid.block_bytes(),
            Source::Grouped(..) => 0,
        }
    }

    /// The scheme, where scales can be changed after they were chosen.
    pub(super) fn adjustable(&self) -> Option<&GroupSpec> {
        match &self.source {
            Source::Grouped(spec, _) => Some(spec),
            Source::Packed(_) => None,
        }
    }

    /// A scale as it will be stored.
    #[inline(always)]
    pub(super) fn stored(&self, spec: &GroupSpec, scale: f32) -> f32 {
        match &self.source {
            Source::Grouped(_, unit) => range::stored(spec, *unit, scale),
            Source::Packed(_) => scale,
        }
    }

    /// The grid that MLX rounds to, whose scales and minima become what is stored only afterwards:
    /// affine codes over the whole range.
    pub(super) fn unrounded(&self) -> Option<Self> {
        match &self.source {
            Source::Grouped(
                spec @ GroupSpec { codes: Codes::Affine { .. }, range: Range::MinMax, .. },
                unit,
            ) => Some(Self {
                source: Source::Grouped(GroupSpec { scale: ScaleType::F32, ..spec.clone() }, *unit),
                levels: self.levels.clone(),
                ..*self
            }),
            _ => None,
        }
    }

    /// The parameters of a group as they will be stored.
    pub(super) fn stored_all(&self, [step, shift, offset]: Parameters) -> Parameters {
        match &self.source {
            Source::Grouped(spec, unit) => {
                let minimum = range::stored_minimum(spec, offset);
                [range::stored(spec, *unit, step), shift, minimum]
            }
            Source::Packed(_) => [step, shift, offset],
        }
    }

    /// Chooses the scales of span `span` of the stripe's row `row` for the values `x`, weighted by
    /// `importance` where it is given.
    pub(super) fn fit(
        &self,
        isa: bevel_kernels::Isa,
        scales: &mut Scales,
        row: usize,
        span: usize,
        x: &[f32],
        importance: Option<&[f32]>,
    ) -> SolveResult<()> {
        let first = span * (self.span / self.group);
        match &self.source {
            Source::Packed(grid) => {
                let groups = x.len() / self.group;
                let (mut steps, mut offsets) = ([0.0; MOST_GROUPS], [0.0; MOST_GROUPS]);
                let (steps, offsets) = (&mut steps[..groups], &mut offsets[..groups]);
                let blocks = scales.block(row, span, grid.block_bytes());
                grid.fit(x, importance, blocks, steps, offsets)?;
                for (i, (&step, &offset)) in steps.iter().zip(&*offsets).enumerate() {
                    scales.set(row, first + i, [step, 0.0, offset]);
                }
            }
            Source::Grouped(spec, unit) => {
                let parameters =
                    range::fit(isa, spec, &self.levels, *unit, self.rounds, x, importance);
                scales.set(row, first, parameters);
            }
        }
        Ok(())
    }

    /// What is to be written: codes `[rows, cols]` with the scales of stripes of rows.
    pub(super) fn form(
        &self,
        stripes: &[Scales],
        mut codes: Vec<u8>,
        cols: usize,
        group_of: Option<Vec<u32>>,
    ) -> SolveResult<Form> {
        let rows = stripes.iter().map(Scales::rows).sum();
        let (spec, unit) = match &self.source {
            Source::Packed(grid) => {
                let mut bytes =
                    stripes.iter().flat_map(Scales::blocks).copied().collect::<Vec<u8>>();
                if let Levels::Table { codes: order, .. } = &self.levels {
                    codes.iter_mut().for_each(|code| *code = order[usize::from(*code)]);
                }
                grid.put_codes(&codes, &mut bytes);
                return Ok(Form::Packed { dtype: grid.dtype(), bytes });
            }
            Source::Grouped(spec, unit) => (spec, *unit),
        };
        let groups = self.groups(cols);
        let each = |which: usize| -> Vec<f32> {
            let rows = stripes.iter().flat_map(|s| (0..s.rows()).map(move |row| (s, row)));
            rows.flat_map(|(s, row)| (0..groups).map(move |g| s.get(row, g)[which])).collect()
        };
        let coding = match &spec.codes {
            Codes::Integer { bits, symmetric: true } => {
                grouped::Coding::Integer { bits: *bits, zeros: grouped::Zeros::Symmetric }
            }
            Codes::Integer { bits, symmetric: false } => {
                let zeros = each(1).into_iter().map(|shift| -shift as u8).collect();
                grouped::Coding::Integer { bits: *bits, zeros: grouped::Zeros::Each(zeros) }
            }
            Codes::Affine { bits } => grouped::Coding::Affine { bits: *bits, minima: each(2) },
            Codes::Levels(levels) => {
                if let Levels::Table { codes: order, .. } = &self.levels {
                    codes.iter_mut().for_each(|code| *code = order[usize::from(*code)]);
                }
                grouped::Coding::Levels(*levels)
            }
            Codes::Float8 => grouped::Coding::Float8,
        };
        let matrix = GroupedMatrix {
            rows,
            cols,
            group_size: self.group,
            coding,
            codes,
            scales: each(0),
            group_of,
        };
        let global_scale = (spec.scale == ScaleType::E4m3).then_some(unit);
        Ok(Form::Grouped { matrix: matrix.checked()?, global_scale })
    }
}

/// Groups in a block of a packed layout, at most.
const MOST_GROUPS: usize = 16;

/// The numbers that a form stands for, `[rows, cols]`.
pub(super) fn dequantize(
    cpu: &Cpu,
    form: &Form,
    rows: usize,
    cols: usize,
) -> SolveResult<Vec<f32>> {
    match form {
        Form::Packed { dtype, bytes } => unpack(*dtype, bytes, rows * cols),
        Form::Grouped { matrix, .. } => {
            let mut weights = vec![0.0; rows * cols];
            let row = |row: usize, out: &mut [f32]| matrix.dequantize_row(row, out);
            cpu.pool().run_chunks(&mut weights, cols.max(1), row);
            Ok(weights)
        }
    }
}

fn unpack(dtype: DType, bytes: &[u8], len: usize) -> SolveResult<Vec<f32>> {
    let mut weights = vec![0.0; len];
    pack::dequantize(dtype, bytes, &mut weights)?;
    Ok(weights)
}
