use std::collections::{HashSet, VecDeque};
use std::path::{Path, PathBuf};

use super::file::is_split_key;
use super::header::alignment;
use super::{
    ALIGNMENT_KEY, Array, MAGIC, MAX_DIMS, Metadata, SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS,
    VERSION, Value, ggml_type_id,
};
use crate::split::{runs, shard_path};
use crate::stream::{Placement, ShardLayout, TensorStream};
use crate::{Error, Result, TensorSpec};

/// Writes GGUF version 3. Metadata and tensors are declared first, so that every offset is known;
/// then the data streams through, tensor after tensor, in pieces of any size.
///
/// Nothing appears under the final names before [`GgufWriter::finish`]; a writer that is dropped
/// removes what it has written.
#[derive(Debug)]
pub struct GgufWriter {
    stream: TensorStream,
}

/// llama.cpp keeps names in 64 bytes with a zero at the end.
const MAX_NAME: usize = 63;

impl GgufWriter {
    /// Starts `path`, or, where the tensors take more than `max_shard_bytes`, shards named
    /// `NAME-00001-of-00003.gguf` beside it. Data is aligned to `general.alignment` where the
    /// metadata has it, else to 32 bytes. Keys that describe a split are replaced.
    ///
    /// # Errors
    /// [`Error::Unwritable`] where GGUF cannot express a tensor, [`Error::Io`].
    pub fn create(
        path: &Path,
        metadata: &Metadata,
        tensors: &[TensorSpec],
        max_shard_bytes: Option<u64>,
    ) -> Result<Self> {
        let wrong = |reason: String| Error::Unwritable { path: path.to_owned(), reason };
        let alignment = alignment(metadata).map_err(wrong)? as u64;
        let mut names = HashSet::new();
        let stored: Vec<Stored<'_>> = tensors
            .iter()
            .map(|spec| {
                if !names.insert(&spec.name) {
                    return Err(wrong(format!("tensor `{}` comes twice", spec.name)));
                }
                Stored::new(spec, alignment)
                    .map_err(|reason| wrong(format!("tensor `{}`: {reason}", spec.name)))
            })
            .collect::<Result<_>>()?;

        let padded: Vec<u64> = stored.iter().map(|tensor| tensor.padded).collect();
        let runs = runs(&padded, max_shard_bytes);
        let count = u16::try_from(runs.len())
            .map_err(|_| wrong(format!("{} shards are too many: raise their size", runs.len())))?;
        let shards = runs.into_iter().zip(0u16..).map(|(run, number)| {
            let mut pairs = shard_metadata(metadata, number);
            if count > 1 {
                let total = i32::try_from(tensors.len())
                    .map_err(|_| wrong("it has too many tensors to be split".to_owned()))?;
                pairs.push((SPLIT_NUMBER, Value::U16(number)));
                pairs.push((SPLIT_COUNT, Value::U16(count)));
                pairs.push((SPLIT_TENSORS, Value::I32(total)));
            }
            let path = shard_path(path, number.into(), count.into());
            Ok(layout(path, &pairs, &stored[run], alignment))
        });
        let shards = shards.collect::<Result<Vec<_>>>()?;
        Ok(Self { stream: TensorStream::new(path, shards)? })
    }

    /// Bytes of the file that [`GgufWriter::create`] would write in one piece.
    ///
    /// # Errors
    /// As those of [`GgufWriter::create`].
    pub fn file_len(metadata: &Metadata, tensors: &[TensorSpec]) -> Result<u64> {
        let wrong = |reason: String| Error::Unwritable { path: PathBuf::new(), reason };
        let alignment = alignment(metadata).map_err(wrong)? as u64;
        let stored = tensors.iter().map(|spec| Stored::new(spec, alignment));
        let stored = stored.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
        Ok(layout(PathBuf::new(), &shard_metadata(metadata, 0), &stored, alignment).file_len)
    }

    /// Takes the next bytes of tensor `name`. Tensors come in the declared order.
    ///
    /// # Errors
    /// [`Error::Unwritable`] where another tensor is due or bytes are too many, [`Error::Io`].
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<()> {
        self.stream.write(name, data)
    }

    /// Syncs the files and renames them into place. Returns their names.
    ///
    /// # Errors
    /// [`Error::Unwritable`] where data is missing, [`Error::Io`].
    pub fn finish(self) -> Result<Vec<PathBuf>> {
        self.stream.finish()
    }
}

/// A declared tensor that was found expressible.
struct Stored<'a> {
    spec: &'a TensorSpec,
    type_id: u32,
    byte_len: u64,
    /// Bytes with the zeros up to the next tensor.
    padded: u64,
}

impl<'a> Stored<'a> {
    fn new(spec: &'a TensorSpec, alignment: u64) -> Result<Self, String> {
        if spec.name.len() > MAX_NAME {
            return Err(format!("its name is longer than {MAX_NAME} bytes"));
        }
        let dims = spec.shape.dims();
        if dims.len() > MAX_DIMS || dims.contains(&0) {
            let shape = &spec.shape;
            return Err(format!(
                "GGUF stores up to {MAX_DIMS} dimensions, none of them zero, not {shape}"
            ));
        }
        let type_id = ggml_type_id(spec.dtype).ok_or_else(|| {
            format!("GGUF has no type {}; convert the tensor to another one", spec.dtype)
        })?;
        let byte_len = spec.shape.byte_len(spec.dtype).map_err(|error| error.to_string())? as u64;
        let padded = byte_len
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| "its size overflows".to_owned())?;
        Ok(Self { spec, type_id, byte_len, padded })
    }
}

/// The pairs of shard `number`: the first carries the model's, the others only what is needed to
/// find the data.
fn shard_metadata(metadata: &Metadata, number: u16) -> Vec<(&str, Value)> {
    metadata
        .iter()
        .filter(|(key, _)| !is_split_key(key) && (number == 0 || *key == ALIGNMENT_KEY))
        .map(|(key, value)| (key.as_str(), value.clone()))
        .collect()
}

fn layout(
    path: PathBuf,
    pairs: &[(&str, Value)],
    tensors: &[Stored<'_>],
    alignment: u64,
) -> ShardLayout {
    let mut header = Vec::new();
    header.extend(MAGIC);
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((pairs.len() as u64).to_le_bytes());
    for (key, value) in pairs {
        put_string(&mut header, key);
        put_value(&mut header, value);
    }
    let mut offset = 0u64;
    for tensor in tensors {
        let dims = tensor.spec.shape.dims();
        put_string(&mut header, &tensor.spec.name);
        header.extend((dims.len() as u32).to_le_bytes());
        dims.iter().rev().for_each(|&dim| header.extend((dim as u64).to_le_bytes()));
        header.extend(tensor.type_id.to_le_bytes());
        header.extend(offset.to_le_bytes());
        offset += tensor.padded;
    }
    header.resize(header.len().next_multiple_of(alignment as usize), 0);

    let mut next = header.len() as u64;
    let mut placements = VecDeque::with_capacity(tensors.len());
    for tensor in tensors {
        let (name, byte_len) = (tensor.spec.name.clone(), tensor.byte_len);
        placements.push_back(Placement { name, offset: next, byte_len });
        next += tensor.padded;
    }
    ShardLayout { path, header, tensors: placements, file_len: next }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    out.extend(value.type_id().to_le_bytes());
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push((*v).into()),
        Value::String(v) => put_string(out, v),
        Value::Array(v) => put_array(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.element_type_id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::U16(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::I16(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::U32(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::I32(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::F32(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|&x| u8::from(x))),
        Array::String(v) => v.iter().for_each(|x| put_string(out, x)),
        Array::Array(v) => v.iter().for_each(|x| put_array(out, x)),
        Array::U64(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::I64(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::F64(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
    }
}
