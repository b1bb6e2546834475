use std::ops::Range;

use bevel_base::{DType, SlabBytes};
use half::bf16;

use super::activations::pair_word;
use super::blocks::{self, Parts};
use super::kernels::Kernel;
use super::layout::{self, Coding, Dense, GROUP, Inputs, Layout, QUADS, ROWS, SUPER, Scales};
use super::scalar;
use crate::{Cpu, Result};

/// A weight matrix `[rows = out, cols = in]` in the layout that kernels read: tiles of 16 rows,
/// interleaved. Values are those of the file, exactly (F64 is rounded to single precision).
pub struct PackedMatrix {
    /// What the weights were in the file, for messages.
    name: String,
    layout: Layout,
    rows: usize,
    cols: usize,
    /// Columns that share a record of scales, where the layout leaves their number open.
    pub(super) columns: usize,
    /// True where the weights take more bits than their codes.
    pub(super) widened: bool,
    /// True where products take activations as they are.
    exact: bool,
    /// Codes or values, tile by tile.
    codes: SlabBytes,
    /// Scales, tile by tile; none for dense layouts.
    scales: SlabBytes,
    /// Levels of look-up types, plus 128: rounded, where they are no integers.
    pub(super) levels: [u8; 16],
    /// The same exactly, without the 128.
    pub(super) table: [f32; 16],
    /// A power of two that every scale is multiplied by; not 1 only in some look-up types.
    factor: f32,
}

/// One tile, as kernels see it.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    /// `[group][64 * bits]` bytes or `[column][16]` values.
    pub(super) codes: &'a [u8],
    /// In the shape of the coding's [`Scales`], or f32.
    pub(super) scales: &'a [u8],
    /// Columns that share a record of scales, where the layout leaves their number open.
    pub(super) columns: usize,
    /// Levels of look-up types, plus 128: rounded, where they are no integers.
    pub(super) levels: &'a [u8; 16],
    /// The same exactly, without the 128.
    pub(super) table: &'a [f32; 16],
    /// What scales are multiplied by in look-up types.
    pub(super) factor: f32,
}

impl Tile<'_> {
    /// The power of two that is the number of groups in a span.
    #[inline(always)]
    pub(super) fn span_log(&self) -> u32 {
        layout::span_log(self.columns)
    }
}

/// How [`PackedMatrix::pack_with`] packs.
#[derive(Clone, Copy)]
pub struct Packing<'a> {
    /// Products with BF16 and with 8-bit floats round their inputs to bf16, as those of
    /// [`PackedMatrix::pack_bf16`] do.
    pub bf16: bool,
    /// Told, on any thread, each part of the data that is not needed any more, so that a matrix that is mapped from a
    /// file need not lie in memory twice.
    pub release: &'a (dyn Fn(&[u8]) + Sync),
}

impl Default for Packing<'_> {
    fn default() -> Self {
        Self { bf16: false, release: &|_| {} }
    }
}

/// The numbers that products multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factors {
    /// Integers of 8 bits or fewer.
    Bytes,
    /// The upper halves of f32.
    Bf16,
    /// Single-precision numbers.
    F32,
}

impl PackedMatrix {
    /// Repacks `data`: `rows` rows of `cols` values of type `dtype`, as they lie in a file.
    ///
    /// # Errors
    /// [`crate::Error::Base`] where `dtype` holds no weights, where blocks do not divide a row, and where
    /// `data` has another length than `rows * cols` values take.
    pub fn pack(cpu: &Cpu, dtype: DType, rows: usize, cols: usize, data: &[u8]) -> Result<Self> {
        Self::pack_with(cpu, dtype, rows, cols, data, &Packing::default())
    }

    /// The same, otherwise.
    ///
    /// # Errors
    /// Those of [`PackedMatrix::pack`].
    pub fn pack_with(
        cpu: &Cpu,
        dtype: DType,
        rows: usize,
        cols: usize,
        data: &[u8],
        packing: &Packing<'_>,
    ) -> Result<Self> {
        let expected = bevel_base::Shape::from([rows, cols]).byte_len(dtype)?;
        if data.len() != expected {
            let what = format!("matrix [{rows}, {cols}] of {dtype}");
            let found = data.len();
            return Err(bevel_base::Error::ByteLength { what, expected, found }.into());
        }
        if cols == 0 {
            return Self::new(cpu, dtype, rows, cols, &[], packing);
        }
        Self::new(cpu, dtype, rows, cols, &[data], packing)
    }

    /// Repacks the rows of several pieces, one piece below the other: tensors that are multiplied as
    /// one, or rows picked from a tensor. Each piece holds whole rows of `cols` values.
    ///
    /// # Errors
    /// Those of [`PackedMatrix::pack`].
    pub fn pack_rows(cpu: &Cpu, dtype: DType, cols: usize, pieces: &[&[u8]]) -> Result<Self> {
        let row_bytes = dtype.row_bytes(cols)?;
        let mut rows = 0;
        for piece in pieces {
            if row_bytes == 0 || piece.len() % row_bytes != 0 {
                let what = format!("rows of {cols} values of {dtype}");
                let expected = piece.len() / row_bytes.max(1) * row_bytes;
                let found = piece.len();
                return Err(bevel_base::Error::ByteLength { what, expected, found }.into());
            }
            rows += piece.len() / row_bytes;
        }
        Self::new(cpu, dtype, rows, cols, pieces, &Packing::default())
    }

    /// Rounds `values`, `[rows, cols]`, to bf16. Products round their inputs to bf16 too and add up in
    /// single precision, which takes half the time of products of f32 where
    /// [`Isa::has_bf16_products`](crate::Isa::has_bf16_products), and much more elsewhere.
    ///
    /// # Panics
    /// Where `values` has another length.
    pub fn pack_bf16(cpu: &Cpu, rows: usize, cols: usize, values: &[f32]) -> Self {
        assert_eq!(values.len(), rows * cols, "values of a matrix [{rows}, {cols}]");
        let bytes = Layout::Pairs.tile_bytes(cols, GROUP);
        let (codes, scales) = fill(cpu, rows, bytes, |index, lane, codes, _| {
            let pairs = codes.chunks_exact_mut(ROWS * 4);
            for (tile, pair) in pairs.zip(values[index * cols..][..cols].chunks(2)) {
                let bits = |i: usize| pair.get(i).map_or(0, |&v| bf16::from_f32(v).to_bits());
                tile[lane * 4..][..4].copy_from_slice(&pair_word(bits(0), bits(1)));
            }
        });
        Self::of_parts(DType::BF16.to_string(), Layout::Pairs, rows, cols, codes, scales)
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// True where no layout fits the weights' groups, so that they are stored as f32 and take more
    /// memory than their codes do.
    pub fn is_widened(&self) -> bool {
        self.widened
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.len()
    }

    /// Writes row `index` into `out` (`[cols]`): an embedding's look-up.
    ///
    /// # Panics
    /// Where `index` is no row or `out` has another length.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.rows, "row {index} of a matrix of {} rows", self.rows);
        assert_eq!(out.len(), self.cols, "length of the row");
        scalar::read_row(self.layout, &self.tile(index / ROWS), index % ROWS, out);
    }

    /// With products of activations as they are, rounded neither to int8 nor to bf16, and of levels that are not
    /// rounded to integers either. They take several times as long, and where there is anything to round
    /// otherwise they have the same bits on every instruction set.
    pub fn with_exact_products(self) -> Self {
        Self { exact: true, ..self }
    }

    /// What is multiplied.
    pub fn factors(&self) -> Factors {
        match self.inputs() {
            Inputs::Int8 => Factors::Bytes,
            Inputs::Bf16 => Factors::Bf16,
            Inputs::F32 => Factors::F32,
        }
    }

    pub(super) fn tiles(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    pub(super) fn tile(&self, index: usize) -> Tile<'_> {
        let (codes, scales) = self.layout.tile_bytes(self.cols, self.columns);
        Tile {
            codes: &self.codes[index * codes..][..codes],
            scales: &self.scales[index * scales..][..scales],
            columns: self.columns,
            levels: &self.levels,
            table: &self.table,
            factor: self.factor,
        }
    }

    pub(super) fn tile_bytes(&self) -> usize {
        let (codes, scales) = self.layout.tile_bytes(self.cols, self.columns);
        codes + scales
    }

    /// What products take.
    pub(super) fn inputs(&self) -> Inputs {
        match self.layout.inputs() {
            Inputs::Int8 | Inputs::Bf16 if self.exact => Inputs::F32,
            inputs => inputs,
        }
    }

    pub(super) fn kernel(&self, cpu: &Cpu) -> Kernel {
        Kernel::select(self.layout, self.exact, cpu)
    }

    fn new(
        cpu: &Cpu,
        dtype: DType,
        rows: usize,
        cols: usize,
        pieces: &[&[u8]],
        packing: &Packing<'_>,
    ) -> Result<Self> {
        let layout = match Layout::of(dtype).ok_or(bevel_base::Error::NotWeight(dtype))? {
            Layout::Dense(Dense::Bf16) if packing.bf16 => Layout::Pairs,
            layout => layout,
        };
        let row_bytes = dtype.row_bytes(cols)?;
        let row = |index: usize| {
            let mut start = index * row_bytes;
            for piece in pieces {
                if start < piece.len() {
                    return &piece[start..start + row_bytes];
                }
                start -= piece.len();
            }
            &[]
        };
        let bytes = layout.tile_bytes(cols, GROUP);
        let put = |index, lane, codes: &mut [u8], scales: &mut [u8]| {
            put_row(dtype, layout, row(index), lane, codes, scales);
        };
        let done = |rows: Range<usize>| {
            if let [piece] = pieces {
                (packing.release)(&piece[rows.start * row_bytes..rows.end * row_bytes]);
            }
        };
        let (codes, scales) = fill_parts(cpu, rows, bytes, put, &done);
        let (levels, factor) = layout::levels(dtype);
        let packed = Self::of_parts(dtype.to_string(), layout, rows, cols, codes, scales);
        Ok(Self { factor, ..packed.with_levels(levels.map(f32::from)) })
    }

    /// A matrix of tiles without levels.
    pub(super) fn of_parts(
        name: String,
        layout: Layout,
        rows: usize,
        cols: usize,
        codes: SlabBytes,
        scales: SlabBytes,
    ) -> Self {
        Self {
            name,
            layout,
            rows,
            cols,
            columns: GROUP,
            widened: false,
            exact: false,
            codes,
            scales,
            levels: [0; 16],
            table: [0.0; 16],
            factor: 1.0,
        }
    }

    /// With the levels of a look-up type, in units of its scales.
    pub(super) fn with_levels(self, table: [f32; 16]) -> Self {
        let levels = table.map(|level| (level.round_ties_even() as i8 as u8) ^ 0x80);
        Self { table, levels, ..self }
    }
}

/// Tiles for `rows` rows, each of a pair of bytes for codes and scales. `put(row, lane, codes,
/// scales)` writes a row into its lane of a zeroed tile; rows are put on all threads.
pub(super) fn fill(
    cpu: &Cpu,
    rows: usize,
    (code_bytes, scale_bytes): (usize, usize),
    put: impl Fn(usize, usize, &mut [u8], &mut [u8]) + Sync,
) -> (SlabBytes, SlabBytes) {
    fill_parts(cpu, rows, (code_bytes, scale_bytes), put, &|_| {})
}

/// The same; `done` is told each run of rows that was put.
fn fill_parts(
    cpu: &Cpu,
    rows: usize,
    (code_bytes, scale_bytes): (usize, usize),
    put: impl Fn(usize, usize, &mut [u8], &mut [u8]) + Sync,
    done: &(dyn Fn(Range<usize>) + Sync),
) -> (SlabBytes, SlabBytes) {
    let tiles = rows.div_ceil(ROWS);
    let mut codes = SlabBytes::zeroed(tiles * code_bytes);
    let mut scales = SlabBytes::zeroed(tiles * scale_bytes);
    if tiles * code_bytes == 0 {
        return (codes, scales);
    }
    // Both buffers are cut into as many parts, of some megabyte each.
    let part = (1usize << 20).div_ceil(code_bytes).min(tiles.div_ceil(cpu.pool().threads()));
    let shared = SharedMut::new(&mut scales);
    cpu.pool().run_chunks(&mut codes, part * code_bytes, |index, codes| {
        // SAFETY: parts of different indices do not overlap, as those of `codes`.
        let scales = unsafe {
            shared.part(index * part * scale_bytes, codes.len() / code_bytes * scale_bytes)
        };
        for i in 0..codes.len() / code_bytes {
            let codes = &mut codes[i * code_bytes..][..code_bytes];
            let scales = &mut scales[i * scale_bytes..][..scale_bytes];
            // Codes are or-ed in: a first touch that reads would map the system's page of
            // zeros, which the write after it has to replace in every thread's view.
            codes.fill(0);
            scales.fill(0);
            let first = (index * part + i) * ROWS;
            for lane in 0..ROWS.min(rows - first) {
                put(first + lane, lane, codes, scales);
            }
        }
        let first = index * part * ROWS;
        done(first..rows.min(first + codes.len() / code_bytes * ROWS));
    });
    (codes, scales)
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix({} [{}, {}])", self.name, self.rows, self.cols)
    }
}

/// A buffer of which tasks write parts that do not overlap.
struct SharedMut<'a> {
    start: *mut u8,
    len: usize,
    borrow: std::marker::PhantomData<&'a mut [u8]>,
}

impl<'a> SharedMut<'a> {
    fn new(bytes: &'a mut [u8]) -> Self {
        let borrow = std::marker::PhantomData;
        Self { start: bytes.as_mut_ptr(), len: bytes.len(), borrow }
    }

    /// # Safety
    /// No two parts that live at the same time overlap.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, start: usize, len: usize) -> &mut [u8] {
        assert!(start <= self.len && len <= self.len - start, "a part outside the buffer");
        // SAFETY: inside the buffer, which is borrowed mutably; the caller keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

// SAFETY: only disjoint parts are handed out.
unsafe impl Sync for SharedMut<'_> {}

/// Writes a row of the file into lane `lane` of a zeroed tile.
fn put_row(
    dtype: DType,
    layout: Layout,
    row: &[u8],
    lane: usize,
    codes: &mut [u8],
    scales: &mut [u8],
) {
    let coding = match layout {
        Layout::Dense(dense) => return put_dense(dtype, dense, row, lane, codes),
        Layout::Pairs => return put_pairs(dtype, row, lane, codes),
        Layout::Integer(integer) => integer.coding(),
    };
    let groups = dtype.block_len() / GROUP;
    blocks::each_block(dtype, row, &mut |index, parts| {
        let (group_codes, _) = parts.codes[..groups * GROUP].as_chunks::<GROUP>();
        for (i, group_codes) in group_codes.iter().enumerate() {
            let start = (index * groups + i) * coding.group_bytes();
            let planes = &mut codes[start..][..coding.group_bytes()];
            put_codes(coding.bits, group_codes, lane, bytemuck::cast_slice_mut(planes));
        }
        put_scales(coding, parts, index * groups, lane, scales);
    });
}

/// Writes the 32 codes of one row into a group's planes (as 32-bit words, one a row and register).
pub(super) fn put_codes(bits: usize, codes: &[u8; GROUP], lane: usize, planes: &mut [u32]) {
    let (quads, _) = codes.as_chunks::<4>();
    for (k, &quad) in quads.iter().enumerate() {
        debug_assert!(k < QUADS);
        // The plane's bits of four codes, one a byte.
        let quad = u32::from_le_bytes(quad);
        let low4 = quad & 0x0f0f_0f0f;
        let low2 = quad & 0x0303_0303;
        let (bit2, bit4) = ((quad >> 2) & 0x0101_0101, (quad >> 4) & 0x0101_0101);
        let high2 = (quad >> 4) & 0x0303_0303;
        let mut put = |register: usize, bits: u32| {
            planes[register * ROWS + lane] |= bits.to_le();
        };
        match bits {
            8 => put(k, quad),
            4..=6 => {
                put(k % 4, low4 << (k / 4 * 4));
                if bits == 5 {
                    put(4, bit4 << k);
                } else if bits == 6 {
                    put(4 + k / 4, high2 << (k % 4 * 2));
                }
            }
            _ => {
                put(k / 4, low2 << (k % 4 * 2));
                if bits == 3 {
                    put(2, bit2 << k);
                }
            }
        }
    }
}

/// Writes one row's scales of the block whose first group is `group`.
fn put_scales(coding: Coding, block: &Parts, group: usize, lane: usize, scales: &mut [u8]) {
    let (start, _) = coding.scales.locate(group, 0);
    let record = &mut scales[start..];
    let put_half = |record: &mut [u8], index: usize, half: u16| {
        record[index * 32 + lane * 2..][..2].copy_from_slice(&half.to_le_bytes());
    };
    put_half(record, 0, block.scale);
    match coding.scales {
        Scales::Group | Scales::GroupBf16 | Scales::Super => {}
        Scales::GroupMin => put_half(record, 1, block.min),
        Scales::Sub32 => {
            for i in 0..SUPER {
                record[32 + i * 16 + lane] = block.sub_scales[i] as u8;
            }
        }
        Scales::Sub32Min => {
            put_half(record, 1, block.min);
            for i in 0..SUPER {
                record[64 + i * 32 + lane] = block.sub_scales[i] as u8;
                record[64 + i * 32 + 16 + lane] = block.sub_mins[i];
            }
        }
        Scales::Sub16 => {
            for i in 0..2 * SUPER {
                record[32 + i * 16 + lane] = block.sub_scales[i] as u8;
            }
        }
        Scales::Sub16Min => {
            put_half(record, 1, block.min);
            for i in 0..2 * SUPER {
                record[64 + i * 16 + lane] = block.sub_scales[i] as u8 | block.sub_mins[i] << 4;
            }
        }
        Scales::Span | Scales::SpanMin | Scales::Halves | Scales::HalvesMin => {
            unreachable!("no file type has scales in single precision")
        }
    }
}

/// Writes a row of plain numbers into column-major lanes.
fn put_dense(dtype: DType, dense: Dense, row: &[u8], lane: usize, tile: &mut [u8]) {
    fn put<const N: usize, const M: usize>(
        row: &[u8],
        lane: usize,
        tile: &mut [u8],
        convert: impl Fn([u8; N]) -> [u8; M],
    ) {
        let (values, _) = row.as_chunks::<N>();
        for (column, &value) in tile.chunks_exact_mut(ROWS * M).zip(values) {
            column[lane * M..][..M].copy_from_slice(&convert(value));
        }
    }
    match (dtype, dense) {
        (DType::F64, _) => {
            put(row, lane, tile, |v: [u8; 8]| (f64::from_le_bytes(v) as f32).to_le_bytes())
        }
        (DType::F8_E4M3 | DType::F8_E5M2, _) => {
            put(row, lane, tile, |byte: [u8; 1]| bf16_of_byte(dtype, byte).to_le_bytes())
        }
        (_, Dense::F32) => put(row, lane, tile, |v: [u8; 4]| v),
        (_, Dense::F16 | Dense::Bf16) => put(row, lane, tile, |v: [u8; 2]| v),
        (_, Dense::F8) => unreachable!("plain numbers of 8 bits are stored as bf16"),
    }
}

/// Writes a row of bf16 or 8-bit numbers into pairs of columns.
fn put_pairs(dtype: DType, row: &[u8], lane: usize, tile: &mut [u8]) {
    let mut put = |bits: &mut dyn Iterator<Item = u16>| {
        for pair in tile.chunks_exact_mut(ROWS * 4) {
            let (first, second) = (bits.next().unwrap_or(0), bits.next().unwrap_or(0));
            pair[lane * 4..][..4].copy_from_slice(&pair_word(first, second));
        }
    };
    match dtype {
        DType::BF16 => put(&mut row.as_chunks().0.iter().map(|&v| u16::from_le_bytes(v))),
        _ => put(&mut row.iter().map(|&byte| bf16_of_byte(dtype, [byte]).to_bits())),
    }
}

/// A number of 8 bits, which bf16 holds exactly.
fn bf16_of_byte(dtype: DType, byte: [u8; 1]) -> bf16 {
    let mut value = [0.0];
    bevel_base::pack::dequantize(dtype, &byte, &mut value).expect("one value");
    bf16::from_f32(value[0])
}
