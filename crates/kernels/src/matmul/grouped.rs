//! [`GroupedMatrix`] to tiles: codes keep their bits, scales and minima their single precision.

use std::ops::Range;

use bevel_base::grouped::{Coding, GroupedMatrix, Zeros};
use bevel_base::pack::e4m3;

use super::layout::{Dense, Format, GROUP, Integer, Layout, ROWS, Scales, Visitor};
use super::packed::{PackedMatrix, fill, put_codes};
use crate::Cpu;

impl PackedMatrix {
    /// Repacks some rows of a matrix of codes. Every weight keeps its value, but for the last bit of
    /// a sum `scale · code + minimum`.
    ///
    /// Groups are of any multiple of 16 columns, or one for all, in a row of whole 32 columns; those of
    /// FP8 of any even number. What does not fit, and columns that are not sorted by group (see
    /// [`sort_columns`]), is stored as f32: [`PackedMatrix::is_widened`] tells.
    ///
    /// Products take levels as integers: those of NF4 are rounded to a 112th of the largest.
    ///
    /// # Panics
    /// Where the matrix is none that [`GroupedMatrix::checked`] accepts, or has fewer rows.
    pub fn pack_grouped(cpu: &Cpu, matrix: &GroupedMatrix, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= matrix.rows, "{rows:?} of {}", matrix.rows);
        let plan = Plan::of(matrix);
        let (layout, cols) = (plan.layout, matrix.cols);
        let bytes = layout.tile_bytes(cols, plan.columns);
        let first = rows.start;
        let (codes, scales) = fill(cpu, rows.len(), bytes, |row, lane, codes, scales| {
            let source = Row { matrix, row: first + row, lane };
            match layout {
                Layout::Dense(Dense::F8) => source.put_float8(codes, scales),
                Layout::Dense(_) => source.put_dense(codes),
                Layout::Pairs => unreachable!("codes stay codes or become f32"),
                Layout::Integer(integer) => {
                    integer.visit(PutInteger { plan: &plan, source, codes, scales });
                }
            }
        });
        let mut packed = Self::of_parts(plan.name(matrix), layout, rows.len(), cols, codes, scales);
        packed.columns = plan.columns;
        packed.widened = layout == Layout::Dense(Dense::F32);
        match &matrix.coding {
            Coding::Levels(levels) => {
                packed.with_levels(levels.map(|level| level / plan.level_unit))
            }
            _ => packed,
        }
    }
}

/// How a matrix is stored.
#[derive(Clone, Copy)]
struct Plan {
    layout: Layout,
    /// Columns that share a record of scales.
    columns: usize,
    /// What levels are multiplied with to be the matrix's.
    level_unit: f32,
}

impl Plan {
    fn of(matrix: &GroupedMatrix) -> Self {
        let dense = Self { layout: Layout::Dense(Dense::F32), columns: GROUP, level_unit: 1.0 };
        let (cols, size) = (matrix.cols, matrix.group_size.min(matrix.cols));
        if matrix.group_of.is_some() || size == 0 {
            return dense;
        }
        let mut level_unit = 1.0;
        match &matrix.coding {
            Coding::Float8 => {
                // Even and odd columns are summed apart.
                let fits = size.is_multiple_of(2) || size == cols;
                if !fits || matrix.codes.iter().any(|&code| e4m3(code).is_nan()) {
                    return dense;
                }
                return Self { layout: Layout::Dense(Dense::F8), columns: size, level_unit };
            }
            Coding::Levels(levels) => level_unit = unit_of_levels(levels),
            Coding::Integer { .. } | Coding::Affine { .. } => {}
        }
        if !cols.is_multiple_of(GROUP) || !size.is_multiple_of(GROUP / 2) {
            return dense;
        }
        let halves = !size.is_multiple_of(GROUP);
        let columns = match size {
            _ if halves => GROUP,
            _ if size == cols => (cols / GROUP).next_power_of_two() * GROUP,
            _ => GROUP << (size / GROUP).trailing_zeros(),
        };
        let integer = match &matrix.coding {
            Coding::Integer { bits, zeros } if !halves && is_symmetric(*bits, zeros) => {
                match bits {
                    ..=2 => Integer::SpanSym2,
                    3 => Integer::SpanSym3,
                    4 => Integer::SpanSym4,
                    5 => Integer::SpanSym5,
                    6 => Integer::SpanSym6,
                    _ => Integer::SpanSym8,
                }
            }
            Coding::Integer { bits, .. } | Coding::Affine { bits, .. } => match (halves, bits) {
                (true, ..=4) => Integer::HalvesAffine4,
                (true, _) => Integer::HalvesAffine8,
                (false, ..=2) => Integer::SpanAffine2,
                (false, 3) => Integer::SpanAffine3,
                (false, 4) => Integer::SpanAffine4,
                (false, 5) => Integer::SpanAffine5,
                (false, 6) => Integer::SpanAffine6,
                (false, _) => Integer::SpanAffine8,
            },
            Coding::Levels(_) if halves => Integer::HalvesTable4,
            Coding::Levels(_) => Integer::SpanTable4,
            Coding::Float8 => unreachable!("returned above"),
        };
        Self { layout: Layout::Integer(integer), columns, level_unit }
    }

    /// What the weights are, for messages.
    fn name(&self, matrix: &GroupedMatrix) -> String {
        let codes = match &matrix.coding {
            Coding::Integer { bits, .. } | Coding::Affine { bits, .. } => format!("{bits}-bit"),
            Coding::Levels(_) => "4-bit levels".to_owned(),
            Coding::Float8 => "F8_E4M3".to_owned(),
        };
        let stored = if self.layout == Layout::Dense(Dense::F32) { ", as F32" } else { "" };
        format!("{codes} in groups of {}{stored}", matrix.group_size)
    }
}

/// True where every zero point is the middle of the codes.
fn is_symmetric(bits: u32, zeros: &Zeros) -> bool {
    match zeros {
        Zeros::Symmetric => true,
        Zeros::Each(zeros) => zeros.iter().all(|&zero| u32::from(zero) == 1 << (bits - 1)),
    }
}

/// The unit in which levels are closest to integers that fit in a signed byte: the largest power of two
/// of which they are whole multiples, if there is one.
///
/// NF4's levels then are off by 0.0017 of the largest (root of the mean square), a twentieth of what
/// rounding a weight to the nearest level costs.
fn unit_of_levels(levels: &[f32; 16]) -> f32 {
    const MOST: f32 = 127.0;
    let largest = levels.iter().fold(0f32, |most, level| most.max(level.abs()));
    if largest == 0.0 {
        return 1.0;
    }
    let error = |unit: f32| -> f64 {
        let square =
            |level: &f32| f64::from(level - (level / unit).round_ties_even() * unit).powi(2);
        levels.iter().map(square).sum()
    };
    let powers = (-16..16).rev().map(|k| 2f32.powi(k)).filter(|unit| largest / unit <= MOST);
    // From the largest level on 127 to half of that.
    let others = (0..=6350).map(|i| largest / (MOST - 0.01 * i as f32));
    powers.chain(others).min_by(|&a, &b| error(a).total_cmp(&error(b))).expect("many units")
}

/// A row of a matrix and the lane of the tile it goes to.
#[derive(Clone, Copy)]
struct Row<'a> {
    matrix: &'a GroupedMatrix,
    row: usize,
    lane: usize,
}

impl Row<'_> {
    fn codes(&self) -> &[u8] {
        &self.matrix.codes[self.row * self.matrix.cols..][..self.matrix.cols]
    }

    /// The position of the parameters of the group that column `col` lies in.
    fn group_at(&self, col: usize) -> usize {
        self.row * self.matrix.groups() + col / self.matrix.group_size
    }

    fn put_dense(&self, tile: &mut [u8]) {
        let mut values = vec![0.0; self.matrix.cols];
        self.matrix.dequantize_row(self.row, &mut values);
        for (column, value) in tile.chunks_exact_mut(ROWS * 4).zip(values) {
            column[self.lane * 4..][..4].copy_from_slice(&value.to_le_bytes());
        }
    }

    fn put_float8(&self, tile: &mut [u8], scales: &mut [u8]) {
        for (column, &code) in tile.chunks_exact_mut(ROWS).zip(self.codes()) {
            column[self.lane] = code;
        }
        for (group, record) in scales.chunks_exact_mut(ROWS * 4).enumerate() {
            let at = self.row * self.matrix.groups() + group;
            put_single(record, 0, self.lane, self.matrix.scales[at]);
        }
    }
}

/// Writes a row's codes and scales into a tile of the format that is visited.
struct PutInteger<'a> {
    plan: &'a Plan,
    source: Row<'a>,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl Visitor for PutInteger<'_> {
    type Output = ();

    fn visit<F: Format>(self) {
        let Self { plan, source, codes: tile, scales } = self;
        let (coding, matrix) = (F::CODING, source.matrix);
        // Codes of fewer bits than the tile's, around a zero that lies elsewhere.
        let shift = match &matrix.coding {
            Coding::Integer { bits, .. } if !coding.scales.has_min() => {
                coding.zero - (1 << (bits - 1))
            }
            _ => 0,
        };
        let (groups, _) = source.codes().as_chunks::<GROUP>();
        for (planes, codes) in tile.chunks_exact_mut(coding.group_bytes()).zip(groups) {
            let codes = codes.map(|code| code + shift);
            put_codes(coding.bits, &codes, source.lane, bytemuck::cast_slice_mut(planes));
        }

        let (_, record_bytes) = coding.scales.record();
        for (index, record) in scales.chunks_exact_mut(record_bytes).enumerate() {
            let col = index * plan.columns;
            let parameters = |col: usize| {
                let at = source.group_at(col);
                let scale = matrix.scales[at];
                let zero = f32::from(coding.zero);
                let minimum = match &matrix.coding {
                    Coding::Integer { zeros: Zeros::Each(zeros), .. } => {
                        scale * (zero - f32::from(zeros[at]))
                    }
                    Coding::Integer { bits, zeros: Zeros::Symmetric } => {
                        scale * (zero - (1 << (bits - 1)) as f32)
                    }
                    Coding::Affine { minima, .. } => minima[at] + scale * zero,
                    Coding::Levels(_) | Coding::Float8 => 0.0,
                };
                (scale * plan.level_unit, minimum)
            };
            let mut put = |index, value| put_single(record, index, source.lane, value);
            match coding.scales {
                Scales::Halves => {
                    put(0, parameters(col).0);
                    put(1, parameters(col + GROUP / 2).0);
                }
                Scales::HalvesMin => {
                    for half in 0..2 {
                        let (scale, minimum) = parameters(col + half * GROUP / 2);
                        put(2 * half, scale);
                        put(2 * half + 1, minimum);
                    }
                }
                _ => {
                    let (scale, minimum) = parameters(col);
                    put(0, scale);
                    if coding.scales.has_min() {
                        put(1, minimum);
                    }
                }
            }
        }
    }
}

/// Writes value `index` of a row's scales into a record.
fn put_single(record: &mut [u8], index: usize, lane: usize, value: f32) {
    record[(index * ROWS + lane) * 4..][..4].copy_from_slice(&value.to_le_bytes());
}

/// The matrix with its columns sorted by group, and which column of the original each one is, where
/// columns were quantized in another order (act-order): `W · x = sorted · x[order]`. `None` where the
/// columns are sorted already, or where the groups have other sizes than sorting needs: all of
/// `group_size` columns, the last one being what is left.
pub fn sort_columns(matrix: &GroupedMatrix) -> Option<(GroupedMatrix, Vec<u32>)> {
    let group_of = matrix.group_of.as_ref()?;
    let mut order: Vec<u32> = (0..matrix.cols as u32).collect();
    order.sort_by_key(|&col| group_of[col as usize]);
    let regular =
        |(i, &col): (usize, &u32)| group_of[col as usize] as usize == i / matrix.group_size;
    if !order.iter().enumerate().all(regular) {
        return None;
    }
    let rows = matrix.codes.chunks_exact(matrix.cols.max(1));
    let codes = rows.flat_map(|row| order.iter().map(|&col| row[col as usize])).collect();
    let sorted = GroupedMatrix {
        codes,
        coding: matrix.coding.clone(),
        scales: matrix.scales.clone(),
        group_of: None,
        ..*matrix
    };
    Some((sorted, order))
}
