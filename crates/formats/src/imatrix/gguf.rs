//! The GGUF format: two F32 tensors for each entry, `NAME.in_sum2` and `NAME.counts`.

use std::path::Path;

use bevel_base::{DType, TensorView};

use super::{Imatrix, ImatrixEntry};
use crate::gguf::{Array, GgufWriter, Header, Metadata, Value};
use crate::{Error, Result, TensorInfo, TensorSpec};

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
const DATASETS: &str = "imatrix.datasets";
const CHUNKS: &str = "imatrix.chunk_count";
const CHUNK_SIZE: &str = "imatrix.chunk_size";

pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Imatrix> {
    let header = Header::parse(path, bytes)?;
    let mut found = Imatrix {
        chunks: number(path, &header.metadata, CHUNKS)?,
        chunk_size: number(path, &header.metadata, CHUNK_SIZE)?,
        ..Imatrix::default()
    };
    if let Some(Value::Array(Array::String(names))) = header.metadata.get(DATASETS) {
        found.datasets.clone_from(names);
    }
    for (tensor, info) in &header.tensors {
        if let Some(name) = tensor.strip_suffix(COUNTS)
            && !header.tensors.contains_key(&format!("{name}{SUMS}"))
        {
            return Err(wrong(path, name, format!("it has `{COUNTS}` without `{SUMS}`")));
        }
        let Some(name) = tensor.strip_suffix(SUMS) else { continue };
        let counts = header.tensors.get(&format!("{name}{COUNTS}"));
        let counts = counts
            .ok_or_else(|| wrong(path, name, format!("it has `{SUMS}` without `{COUNTS}`")))?;
        let sums = values(path, name, info, bytes)?;
        let counts = values(path, name, counts, bytes)?.into_iter().map(|count| {
            // An f32 has whole numbers up to 2^24; larger counts were rounded when written.
            let is_count = count.is_finite() && (0.0..1e18).contains(&count);
            let reason = || format!("a count is {count}; expected a number of tokens");
            is_count.then_some(count.round() as u64).ok_or_else(|| wrong(path, name, reason()))
        });
        let counts = counts.collect::<Result<_>>()?;
        found.entries.insert(name.to_owned(), ImatrixEntry { sums, counts });
    }
    if found.entries.is_empty() {
        return Err(Error::WrongFile {
            path: path.to_owned(),
            expected: "importance matrix",
            found: format!(
                "it is a GGUF file without tensors named `…{SUMS}`, such as a model; give the file that `llama-imatrix` or bevel wrote"
            ),
        });
    }
    Ok(found)
}

fn wrong(path: &Path, tensor: &str, reason: String) -> Error {
    Error::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), reason }
}

/// A metadata number; 0 where it is not there.
fn number(path: &Path, metadata: &Metadata, key: &str) -> Result<u32> {
    let Some(value) = metadata.get(key) else { return Ok(0) };
    value.as_usize().and_then(|n| n.try_into().ok()).ok_or_else(|| Error::Header {
        path: path.to_owned(),
        reason: format!("`{key}` must be a u32, not {value:?}"),
    })
}

fn values(path: &Path, name: &str, info: &TensorInfo, bytes: &[u8]) -> Result<Vec<f32>> {
    if info.dtype != DType::F32 {
        return Err(wrong(path, name, format!("it is stored as {}, expected F32", info.dtype)));
    }
    // The header's parser has checked that the range lies within the bytes.
    TensorView::new(info.dtype, info.shape.clone(), &bytes[info.range()])
        .and_then(|view| view.to_f32())
        .map_err(|error| wrong(path, name, error.to_string()))
}

pub(super) fn write(
    imatrix: &Imatrix,
    path: &Path,
    entries: &[(&str, &ImatrixEntry)],
) -> Result<()> {
    let mut metadata = Metadata::new();
    metadata.insert("general.type".to_owned(), "imatrix".into());
    let datasets = Value::Array(Array::String(imatrix.datasets.clone()));
    metadata.insert(DATASETS.to_owned(), datasets);
    metadata.insert(CHUNKS.to_owned(), Value::U32(imatrix.chunks));
    metadata.insert(CHUNK_SIZE.to_owned(), Value::U32(imatrix.chunk_size));

    let mut specs = Vec::with_capacity(2 * entries.len());
    for (name, entry) in entries {
        let matrices = entry.counts.len();
        let columns = entry.sums.len() / matrices;
        // As ggml counts dimensions: a single matrix is a row.
        let (sums, counts) = match matrices {
            1 => (vec![columns], vec![1]),
            _ => (vec![matrices, columns], vec![matrices, 1]),
        };
        specs.push(TensorSpec::new(format!("{name}{SUMS}"), DType::F32, sums));
        specs.push(TensorSpec::new(format!("{name}{COUNTS}"), DType::F32, counts));
    }
    let mut writer = GgufWriter::create(path, &metadata, &specs, None)?;
    for (pair, (_, entry)) in specs.chunks(2).zip(entries) {
        let bytes: Vec<u8> = entry.sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        writer.write(&pair[0].name, &bytes)?;
        let bytes: Vec<u8> =
            entry.counts.iter().flat_map(|&count| (count as f32).to_le_bytes()).collect();
        writer.write(&pair[1].name, &bytes)?;
    }
    writer.finish().map(drop)
}
