//! [`GroupedMatrix`] to tiles: codes keep their bits, scales and minima their single precision.

use std::ops::Range;

use bevel_base::grouped::{Coding, GroupedMatrix, Zeros};
use bevel_base::pack::e4m3;

use super::layout::{Dense, Float, Format, GROUP, Integer, Layout, ROWS, RUN, Scales, Visitor};
use super::packed::{PackedMatrix, fill, put_codes};
use crate::Cpu;

impl PackedMatrix {
    /// Repacks some rows of a matrix of codes. Every weight keeps its value, but for the last bit of
    /// a sum `scale · code + minimum`.
    ///
    /// Integer codes take groups of any multiple of 16 columns, or one group for all, in a row of
    /// whole 32 columns; levels that are no integers and FP8 take groups and rows of any multiple of
    /// 8. What fits neither, and columns that are not sorted by group (see [`sort_columns`]), is
    /// stored as f32: [`PackedMatrix::is_widened`] tells.
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
                Layout::Dense(_) => source.put_dense(codes),
                Layout::Pairs => unreachable!("codes stay codes or become f32"),
                Layout::Float(float) => source.put_float(float, codes, scales),
                Layout::Integer(integer) => {
                    integer.visit(PutInteger { plan: &plan, source, codes, scales });
                }
            }
        });
        let mut packed = Self::of_parts(plan.name(matrix), layout, rows.len(), cols, codes, scales);
        packed.columns = plan.columns;
        packed.widened = matches!(layout, Layout::Dense(_));
        if let Coding::Levels(levels) = &matrix.coding {
            packed.table = *levels;
            if let Some(unit) = plan.level_unit {
                packed.levels = levels.map(|level| ((level / unit) as i8 as u8) ^ 0x80);
            }
        }
        packed
    }
}

/// How a matrix is stored.
#[derive(Clone, Copy)]
struct Plan {
    layout: Layout,
    /// Columns that share a record of scales.
    columns: usize,
    /// What integer levels are multiplied with to be the matrix's.
    level_unit: Option<f32>,
}

impl Plan {
    fn of(matrix: &GroupedMatrix) -> Self {
        let dense = Self { layout: Layout::Dense(Dense::F32), columns: GROUP, level_unit: None };
        let (cols, size) = (matrix.cols, matrix.group_size.min(matrix.cols));
        if matrix.group_of.is_some() || size == 0 {
            return dense;
        }
        // One group has no end that would have to lie between two registers.
        let whole = |unit: usize| cols.is_multiple_of(unit) && size.is_multiple_of(unit);
        let float = |float| match whole(RUN) {
            true => Self { layout: Layout::Float(float), columns: size, level_unit: None },
            false => dense,
        };
        let level_unit = match &matrix.coding {
            Coding::Float8 if matrix.codes.iter().any(|&code| e4m3(code).is_nan()) => return dense,
            Coding::Float8 => return float(Float::Float8),
            Coding::Levels(levels) => match integer_unit(levels) {
                None => return float(Float::Levels),
                unit => unit,
            },
            Coding::Integer { .. } | Coding::Affine { .. } => None,
        };
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
            Coding::Levels(_) | Coding::Float8 if halves => Integer::HalvesTable4,
            Coding::Levels(_) | Coding::Float8 => Integer::SpanTable4,
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
        let stored = if matches!(self.layout, Layout::Dense(_)) { ", as F32" } else { "" };
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

/// The largest power of two of which all levels are whole multiples that fit in a signed byte.
fn integer_unit(levels: &[f32; 16]) -> Option<f32> {
    let units = (0..8).map(|k| 0.5f32.powi(k));
    units.into_iter().find(|unit| {
        levels.iter().all(|level| {
            let multiple = level / unit;
            multiple.fract() == 0.0 && multiple.abs() <= 127.0
        })
    })
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

    fn put_float(&self, float: Float, tile: &mut [u8], scales: &mut [u8]) {
        let runs = tile.chunks_exact_mut(float.run_bytes());
        for (run, codes) in runs.zip(self.codes().chunks_exact(RUN)) {
            for (j, &code) in codes.iter().enumerate() {
                match float {
                    Float::Levels => run[self.lane * 4 + j / 2] |= (code & 15) << (j % 2 * 4),
                    Float::Float8 => run[j * ROWS + self.lane] = code,
                }
            }
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
                (scale * plan.level_unit.unwrap_or(1.0), minimum)
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
