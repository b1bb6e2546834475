//! One tensor from one type to another: whole rows, a slab at a time, spread over the pool.

use bevel_base::{DType, Pool, pack};

use crate::progress::Meter;
use crate::{Error, Result};

/// Values that one task handles, rounded to whole rows.
const CHUNK_VALUES: usize = 1 << 15;
/// Tasks of a slab for each thread.
const CHUNKS_PER_THREAD: usize = 8;

/// A tensor and the types to go from and to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    pub(crate) name: &'a str,
    pub(crate) from: DType,
    pub(crate) to: DType,
    pub(crate) row_len: usize,
    /// How much an error in each column matters, `[row_len]` for each of the matrices stacked in the
    /// tensor; empty where that is unknown.
    pub(crate) importance: &'a [f32],
    /// Rows of each of those matrices.
    pub(crate) matrix_rows: usize,
}

/// What changed, summed over a tensor in the order of its values.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// Σ(w − ŵ)²
    error: f64,
    /// Σw²
    signal: f64,
    /// Values beyond the new type's range.
    pub(crate) saturated: u64,
}

impl Tally {
    /// √(Σ(w − ŵ)² / Σw²)
    pub(crate) fn relative_error(&self) -> f64 {
        if self.error == 0.0 { 0.0 } else { (self.error / self.signal).sqrt() }
    }

    pub(crate) fn add(&mut self, other: Tally) {
        self.error += other.error;
        self.signal += other.signal;
        self.saturated += other.saturated;
    }
}

/// The buffers for tensors of any size: some megabytes.
pub(crate) struct Transcoder<'a> {
    pool: &'a Pool,
    chunks: Vec<Chunk>,
}

/// One task's part of a slab.
#[derive(Default)]
struct Chunk {
    values: Vec<f32>,
    packed: Vec<u8>,
    restored: Vec<f32>,
    importance: Vec<f32>,
    outcome: Option<Result<Tally>>,
}

impl<'a> Transcoder<'a> {
    pub(crate) fn new(pool: &'a Pool) -> Self {
        let chunks = (0..pool.threads() * CHUNKS_PER_THREAD).map(|_| Chunk::default()).collect();
        Self { pool, chunks }
    }

    /// Passes the rows in `data` on to `write` in the type `job.to`. Where both types are the same
    /// the bytes are passed on as they are, once they are known to hold finite numbers. `release` is
    /// called when a slab is done with, so that the pages of a large tensor need not stay in memory.
    ///
    /// # Errors
    /// [`Error::NotFinite`], [`Error::Tensor`], and those of `write` and `meter`.
    pub(crate) fn run(
        &mut self,
        job: &Job<'_>,
        data: &[u8],
        meter: &mut Meter<'_, '_>,
        release: &dyn Fn(),
        write: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Tally> {
        let row_bytes = job.row_bytes(job.from)?;
        let rows_per_chunk = (CHUNK_VALUES / job.row_len.max(1)).max(1);
        let chunk_bytes = rows_per_chunk * row_bytes;
        let mut total = Tally::default();
        if chunk_bytes == 0 {
            return Ok(total);
        }
        let slab_bytes = chunk_bytes * self.chunks.len();
        for (number, slab) in data.chunks(slab_bytes).enumerate() {
            let parts = slab.len().div_ceil(chunk_bytes);
            let first_value = number * self.chunks.len() * rows_per_chunk * job.row_len;
            let chunks = &mut self.chunks[..parts];
            self.pool.run_chunks(chunks, 1, |i, chunk| {
                let start = i * chunk_bytes;
                let part = &slab[start..slab.len().min(start + chunk_bytes)];
                let offset = first_value + i * rows_per_chunk * job.row_len;
                chunk[0].outcome = Some(chunk[0].transcode(job, part, offset));
            });
            for chunk in chunks {
                total.add(chunk.outcome.take().unwrap_or_else(|| Ok(Tally::default()))?);
                if job.from != job.to {
                    write(&chunk.packed)?;
                }
            }
            if job.from == job.to {
                write(slab)?;
            }
            release();
            meter.advance(job.name, slab.len())?;
        }
        Ok(total)
    }
}

impl<'a> Job<'a> {
    /// A job in which all columns matter equally.
    pub(crate) fn new(name: &'a str, from: DType, to: DType, row_len: usize) -> Self {
        Self { name, from, to, row_len, importance: &[], matrix_rows: usize::MAX }
    }

    fn row_bytes(&self, dtype: DType) -> Result<usize> {
        dtype.row_bytes(self.row_len).map_err(|source| self.wrap(source))
    }

    /// The importance of each of `count` rows from row `first` on; of none where it is unknown.
    fn importance_of(&self, first: usize, count: usize) -> impl Iterator<Item = &[f32]> {
        let count = if self.importance.is_empty() { 0 } else { count };
        (first..first + count).map(|row| {
            let matrix = row / self.matrix_rows;
            &self.importance[matrix * self.row_len..][..self.row_len]
        })
    }

    fn wrap(&self, source: bevel_base::Error) -> Error {
        Error::Tensor { tensor: self.name.to_owned(), source }
    }
}

impl Chunk {
    /// Unpacks `part`, whose first value is number `offset` of the tensor, and packs it again.
    fn transcode(&mut self, job: &Job<'_>, part: &[u8], offset: usize) -> Result<Tally> {
        let len = part.len() / job.row_bytes(job.from)? * job.row_len;
        self.values.resize(len, 0.0);
        pack::dequantize(job.from, part, &mut self.values).map_err(|e| job.wrap(e))?;
        if let Some((index, value)) = first_not_finite(&self.values) {
            let (tensor, index) = (job.name.to_owned(), offset + index);
            return Err(Error::NotFinite { tensor, index, value });
        }
        if job.from == job.to {
            return Ok(Tally::default());
        }
        self.packed.resize(len / job.row_len * job.row_bytes(job.to)?, 0);
        let importance = job.importance_of(offset / job.row_len, len / job.row_len);
        self.importance.clear();
        importance.for_each(|row| self.importance.extend_from_slice(row));
        let importance = (!self.importance.is_empty()).then_some(&self.importance[..]);
        pack::quantize(job.to, &self.values, importance, &mut self.packed)
            .map_err(|e| job.wrap(e))?;
        self.restored.resize(len, 0.0);
        pack::dequantize(job.to, &self.packed, &mut self.restored).map_err(|e| job.wrap(e))?;
        Ok(tally(job.to, &self.values, &self.restored))
    }
}

/// The first value that is a NaN or infinite.
pub(crate) fn first_not_finite(values: &[f32]) -> Option<(usize, f32)> {
    // Looking at 64 at a time lets the compiler use vectors for the usual answer.
    let bad = |chunk: &[f32]| !chunk.iter().fold(true, |all, v| all & v.is_finite());
    let start = values.chunks(64).position(bad)? * 64;
    let index = start + values[start..].iter().position(|v| !v.is_finite())?;
    Some((index, values[index]))
}

pub(crate) fn tally(to: DType, values: &[f32], restored: &[f32]) -> Tally {
    /// Sums side by side, so that they can be formed in vectors.
    const LANES: usize = 8;
    let (mut error, mut signal) = ([0f64; LANES], [0f64; LANES]);
    let mut saturated = 0;
    let largest = largest(to);
    for (w, v) in values.chunks(LANES).zip(restored.chunks(LANES)) {
        for (i, (&w, &v)) in w.iter().zip(v).enumerate() {
            let (w, d) = (f64::from(w), f64::from(w) - f64::from(v));
            error[i] += d * d;
            signal[i] += w * w;
        }
    }
    if let Some(largest) = largest {
        saturated = values.iter().filter(|v| v.abs() > largest).count() as u64;
    }
    Tally { error: error.iter().sum(), signal: signal.iter().sum(), saturated }
}

/// The largest value a type holds, where f32 goes beyond it and it does not adapt to a block.
fn largest(dtype: DType) -> Option<f32> {
    match dtype {
        DType::F16 => Some(65504.0),
        DType::BF16 => Some(f32::from_bits(0x7f7f_0000)),
        _ => None,
    }
}
