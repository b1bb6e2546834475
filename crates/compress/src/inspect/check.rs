use std::path::Path;

use bevel_base::{DType, Pool, pack};
use serde::Serialize;

use super::files::Files;
use crate::progress::{Meter, OnProgress, Stage};
use crate::report::type_name;
use crate::transcode::first_not_finite;
use crate::{Error, Result};

/// A tensor with values that are no numbers, or infinite.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BrokenTensor {
    /// Its name in the file.
    pub name: String,
    /// Its type.
    #[serde(serialize_with = "type_name")]
    pub dtype: DType,
    /// How many values are broken: all of a block where its scale is.
    pub values: u64,
    /// Position of the first, row by row.
    pub first: u64,
}

/// Values that one task looks at, a multiple of every block.
const CHUNK: usize = 1 << 15;

/// Reads every value of a model and lists the tensors that hold a NaN or an infinity.
///
/// # Errors
/// Those of opening the files, and [`Error::Stopped`].
pub fn check(
    path: &Path,
    pool: &Pool,
    on_progress: &mut OnProgress<'_>,
) -> Result<Vec<BrokenTensor>> {
    let files = Files::open(path)?;
    let total = files.tensors().values().map(|t| t.byte_len() as u64).sum();
    let mut meter = Meter { stage: Stage::Check, done: 0, total, on_progress };
    let mut tasks: Vec<Task> = (0..pool.threads() * 8).map(|_| Task::default()).collect();
    let mut broken = Vec::new();
    for (name, info) in files.tensors() {
        let data = files.tensor(name)?.data();
        if !info.dtype.is_weight() {
            meter.advance(name, data.len())?;
            continue;
        }
        let chunk_bytes = CHUNK / info.dtype.block_len() * info.dtype.block_bytes();
        let (mut values, mut first) = (0, None);
        for (number, slab) in data.chunks(chunk_bytes * tasks.len()).enumerate() {
            let parts: Vec<&[u8]> = slab.chunks(chunk_bytes).collect();
            let slab_start = number * tasks.len() * CHUNK;
            let tasks = &mut tasks[..parts.len()];
            pool.run_chunks(tasks, 1, |i, task| task[0].look(info.dtype, parts[i]));
            for (i, task) in tasks.iter_mut().enumerate() {
                let outcome = task.outcome.take().unwrap_or(Ok((0, 0)));
                let (bad, at) =
                    outcome.map_err(|source| Error::Tensor { tensor: name.clone(), source })?;
                if bad > 0 {
                    first = first.or(Some((slab_start + i * CHUNK + at) as u64));
                    values += bad;
                }
            }
            files.release(name);
            meter.advance(name, slab.len())?;
        }
        if let Some(first) = first {
            broken.push(BrokenTensor { name: name.clone(), dtype: info.dtype, values, first });
        }
    }
    Ok(broken)
}

#[derive(Default)]
struct Task {
    values: Vec<f32>,
    /// Broken values and the position of the first.
    outcome: Option<Result<(u64, usize), bevel_base::Error>>,
}

impl Task {
    fn look(&mut self, dtype: DType, data: &[u8]) {
        self.values.resize(data.len() / dtype.block_bytes() * dtype.block_len(), 0.0);
        let outcome = pack::dequantize(dtype, data, &mut self.values);
        self.outcome = Some(outcome.map(|()| match first_not_finite(&self.values) {
            None => (0, 0),
            Some((at, _)) => (self.values.iter().filter(|v| !v.is_finite()).count() as u64, at),
        }));
    }
}
