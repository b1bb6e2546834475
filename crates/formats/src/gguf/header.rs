use std::fmt;
use std::path::Path;

use bevel_base::Shape;
use indexmap::IndexMap;
use indexmap::map::Entry;

use super::types::{describe_unsupported, ggml_type_of};
use super::{ALIGNMENT_KEY, Array, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, Metadata, VERSION, Value};
use crate::tensor::find_overlap;
use crate::wrong_file::wrong_file;
use crate::{Error, Result, TensorInfo};

/// Everything in one file but the tensor data.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// 2 or 3; the layouts are alike.
    pub version: u32,
    /// Key–value pairs in file order.
    pub metadata: Metadata,
    /// Tensors in file order.
    pub tensors: IndexMap<String, TensorInfo>,
    /// Where the tensor data starts.
    pub data_start: usize,
}

/// Longer headers are refused: about twenty times that of a vocabulary of 256,000 tokens.
const MAX_HEADER: usize = 256 << 20;
/// Arrays of arrays of arrays: nobody writes even the first.
const MAX_DEPTH: usize = 4;

impl Header {
    /// Parses the header of a whole file lying in `bytes` and checks that every tensor lies within
    /// the file and that none overlap. Tensor data is not touched. `path` is used in messages.
    ///
    /// # Errors
    /// [`Error::WrongFile`] where `bytes` do not begin like a GGUF file, [`Error::Header`] and
    /// [`Error::Tensor`] where they contradict themselves.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Header> {
        if !bytes.starts_with(MAGIC) {
            return Err(wrong_file(path, "GGUF file", bytes));
        }
        let head = &bytes[..bytes.len().min(MAX_HEADER)];
        let mut reader = Reader { path, bytes: head, position: MAGIC.len() };
        let version = reader.version()?;
        let tensor_count = reader.u64(What::Field("the number of tensors"))?;
        let pair_count = reader.u64(What::Field("the number of metadata pairs"))?;

        let mut metadata = Metadata::new();
        for i in 0..pair_count {
            let (key, value) = reader.pair(i, pair_count)?;
            match metadata.entry(key) {
                Entry::Occupied(pair) => {
                    return Err(reader.error(format!("the key `{}` comes twice", pair.key())));
                }
                Entry::Vacant(place) => place.insert(value),
            };
        }
        let alignment = alignment(&metadata).map_err(|reason| reader.error(reason))?;

        let mut stored = IndexMap::new();
        for i in 0..tensor_count {
            let (name, tensor) = reader.tensor(i, tensor_count)?;
            match stored.entry(name) {
                Entry::Occupied(tensor) => {
                    return Err(reader.error(format!("tensor `{}` comes twice", tensor.key())));
                }
                Entry::Vacant(place) => place.insert(tensor),
            };
        }
        let data_start = reader.position.next_multiple_of(alignment);

        let tensors = stored
            .into_iter()
            .map(|(name, tensor)| {
                let info = tensor.place(data_start, alignment, bytes.len()).map_err(|reason| {
                    Error::Tensor { path: path.to_owned(), tensor: name.clone(), reason }
                })?;
                Ok((name, info))
            })
            .collect::<Result<IndexMap<_, _>>>()?;
        let ranges = tensors.iter().map(|(name, info)| (name.as_str(), info.range()));
        if let Some((later, earlier)) = find_overlap(ranges) {
            let reason = format!("its bytes overlap with those of tensor `{earlier}`");
            return Err(Error::Tensor { path: path.to_owned(), tensor: later.to_owned(), reason });
        }
        Ok(Header { version, metadata, tensors, data_start })
    }
}

/// The alignment that a file's metadata asks for, in bytes.
pub(super) fn alignment(metadata: &Metadata) -> Result<usize, String> {
    let value = metadata.get(ALIGNMENT_KEY).unwrap_or(&Value::U32(DEFAULT_ALIGNMENT));
    match value {
        Value::U32(n) if n.is_power_of_two() => Ok(*n as usize),
        other => Err(format!("`{ALIGNMENT_KEY}` must be a u32 and a power of two, not {other:?}")),
    }
}

/// A tensor as the header describes it; the offset is from the start of the data.
struct StoredTensor {
    type_id: u32,
    /// Innermost first.
    dims: Vec<u64>,
    offset: u64,
}

impl StoredTensor {
    fn place(&self, start: usize, alignment: usize, file: usize) -> Result<TensorInfo, String> {
        let dtype = ggml_type_of(self.type_id).ok_or_else(|| describe_unsupported(self.type_id))?;
        if self.dims.contains(&0) {
            return Err(format!("one of its dimensions is zero: {:?}", self.dims));
        }
        let dims: Option<Vec<usize>> =
            self.dims.iter().rev().map(|&dim| dim.try_into().ok()).collect();
        let dims = dims.ok_or_else(|| format!("its dimensions overflow: {:?}", self.dims))?;
        let shape = Shape::from(dims);
        let byte_len = shape.byte_len(dtype).map_err(|error| error.to_string())?;
        if !self.offset.is_multiple_of(alignment as u64) {
            let offset = self.offset;
            return Err(format!("its offset {offset} is no multiple of the alignment {alignment}"));
        }
        let range = usize::try_from(self.offset)
            .ok()
            .and_then(|offset| start.checked_add(offset))
            .and_then(|start| Some(start..start.checked_add(byte_len)?));
        match range {
            Some(range) if range.end <= file => Ok(TensorInfo { dtype, shape, file: 0, range }),
            _ => Err(format!(
                "its {byte_len} bytes at offset {} of the data end past the end of the file, which has {file} bytes; the file is truncated or damaged: copy or download it again",
                self.offset
            )),
        }
    }
}

/// Reads little-endian values off a header.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    fn version(&mut self) -> Result<u32> {
        match self.u32(What::Field("the version"))? {
            version @ 2..=VERSION => Ok(version),
            1 => Err(self.error("it has version 1; convert the original model again")),
            swapped if swapped.swap_bytes() <= 0xffff => Err(self.error(
                "it is big-endian; bevel reads little-endian files: convert the original model again",
            )),
            newer => Err(self.error(format!("it has version {newer}; bevel reads 2 and 3"))),
        }
    }

    fn pair(&mut self, index: u64, count: u64) -> Result<(String, Value)> {
        let key = self.string(What::Key(index, count))?;
        let what = What::Value(&key);
        let type_id = self.u32(what)?;
        let value = match type_id {
            8 => Value::String(self.string(what)?),
            9 => Value::Array(self.array(&key, 1)?),
            0 => Value::U8(u8::from_le_bytes(self.fixed(what)?)),
            1 => Value::I8(i8::from_le_bytes(self.fixed(what)?)),
            2 => Value::U16(u16::from_le_bytes(self.fixed(what)?)),
            3 => Value::I16(i16::from_le_bytes(self.fixed(what)?)),
            4 => Value::U32(u32::from_le_bytes(self.fixed(what)?)),
            5 => Value::I32(i32::from_le_bytes(self.fixed(what)?)),
            6 => Value::F32(f32::from_le_bytes(self.fixed(what)?)),
            7 => Value::Bool(self.bools(&key, 1)?[0]),
            10 => Value::U64(u64::from_le_bytes(self.fixed(what)?)),
            11 => Value::I64(i64::from_le_bytes(self.fixed(what)?)),
            12 => Value::F64(f64::from_le_bytes(self.fixed(what)?)),
            _ => return Err(self.unknown_value_type(&key, type_id)),
        };
        Ok((key, value))
    }

    /// An array's element type, length and elements.
    fn array(&mut self, key: &str, depth: usize) -> Result<Array> {
        if depth > MAX_DEPTH {
            return Err(self.error(format!("`{key}` nests arrays more than {MAX_DEPTH} deep")));
        }
        let what = What::Value(key);
        let type_id = self.u32(what)?;
        let len = self.u64(what)?;
        // Strings begin with their length, arrays with type and length.
        let least_bytes = match type_id {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            _ => return Err(self.unknown_value_type(key, type_id)),
        };
        let left = self.bytes.len() - self.position;
        let len = usize::try_from(len).ok().filter(|len| *len <= left / least_bytes).ok_or_else(
            || self.error(format!("`{key}` claims {len} elements, but only {left} bytes follow")),
        )?;
        Ok(match type_id {
            0 => Array::U8(self.numbers(len, what, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(len, what, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(len, what, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(len, what, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(len, what, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(len, what, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(len, what, f32::from_le_bytes)?),
            7 => Array::Bool(self.bools(key, len)?),
            10 => Array::U64(self.numbers(len, what, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(len, what, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(len, what, f64::from_le_bytes)?),
            8 => {
                let mut strings = Vec::with_capacity(len);
                for i in 0..len {
                    strings.push(self.string(What::Element(i, key))?);
                }
                Array::String(strings)
            }
            _ => {
                let mut arrays = Vec::with_capacity(len);
                for _ in 0..len {
                    arrays.push(self.array(key, depth + 1)?);
                }
                Array::Array(arrays)
            }
        })
    }

    fn tensor(&mut self, index: u64, count: u64) -> Result<(String, StoredTensor)> {
        let name = self.string(What::TensorName(index, count))?;
        let what = What::Tensor(&name);
        let rank = self.u32(what)?;
        if rank as usize > MAX_DIMS {
            let reason = format!("it has {rank} dimensions; GGUF allows {MAX_DIMS}");
            return Err(Error::Tensor { path: self.path.to_owned(), tensor: name, reason });
        }
        let mut dims = Vec::with_capacity(rank as usize);
        for _ in 0..rank {
            dims.push(self.u64(what)?);
        }
        let type_id = self.u32(what)?;
        let offset = self.u64(what)?;
        Ok((name, StoredTensor { type_id, dims, offset }))
    }

    fn numbers<T, const N: usize>(
        &mut self,
        len: usize,
        what: What<'_>,
        from_bytes: fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let bytes = self.take(len.saturating_mul(N), what)?;
        Ok(bytes.as_chunks().0.iter().map(|&chunk| from_bytes(chunk)).collect())
    }

    fn bools(&mut self, key: &str, len: usize) -> Result<Vec<bool>> {
        let bytes = self.take(len, What::Value(key))?;
        match bytes.iter().find(|&&byte| byte > 1) {
            Some(byte) => Err(self.error(format!("`{key}` holds the Boolean {byte}, not 0 or 1"))),
            None => Ok(bytes.iter().map(|&byte| byte == 1).collect()),
        }
    }

    fn string(&mut self, what: What<'_>) -> Result<String> {
        let len = usize::try_from(self.u64(what)?).unwrap_or(usize::MAX);
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => {
                let at = error.valid_up_to();
                Err(self
                    .error(format!("{what} is not UTF-8 text: byte {at} of its {len} is wrong")))
            }
        }
    }

    fn u32(&mut self, what: What<'_>) -> Result<u32> {
        Ok(u32::from_le_bytes(self.fixed(what)?))
    }

    fn u64(&mut self, what: What<'_>) -> Result<u64> {
        Ok(u64::from_le_bytes(self.fixed(what)?))
    }

    fn fixed<const N: usize>(&mut self, what: What<'_>) -> Result<[u8; N]> {
        let bytes = self.take(N, what)?;
        Ok(*bytes.first_chunk().expect("`take` returned N bytes"))
    }

    /// The next `len` bytes, which hold `what`.
    fn take(&mut self, len: usize, what: What<'_>) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.position..];
        let Some(taken) = rest.get(..len) else {
            let (at, left) = (self.position, rest.len());
            let end = if self.bytes.len() == MAX_HEADER {
                format!("bevel reads headers of at most {MAX_HEADER} bytes")
            } else {
                "the file is truncated or damaged: copy or download it again".to_owned()
            };
            return Err(self.error(format!(
                "{what} takes {len} bytes at offset {at}, but only {left} follow; {end}"
            )));
        };
        self.position += len;
        Ok(taken)
    }

    fn unknown_value_type(&self, key: &str, id: u32) -> Error {
        self.error(format!("`{key}` has the value type {id}; GGUF has 0 to 12"))
    }

    fn error(&self, reason: impl Into<String>) -> Error {
        Error::Header { path: self.path.to_owned(), reason: reason.into() }
    }
}

/// What bytes hold, to be put into words where they are missing or wrong.
#[derive(Clone, Copy)]
enum What<'a> {
    Field(&'static str),
    /// Number, from 0, and count.
    Key(u64, u64),
    Value(&'a str),
    Element(usize, &'a str),
    /// Number, from 0, and count.
    TensorName(u64, u64),
    Tensor(&'a str),
}

impl fmt::Display for What<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            What::Field(name) => write!(f, "{name}"),
            What::Key(i, count) => write!(f, "metadata key {i} of {count}"),
            What::Value(key) => write!(f, "the value of `{key}`"),
            What::Element(i, key) => write!(f, "element {i} of `{key}`"),
            What::TensorName(i, count) => write!(f, "the name of tensor {i} of {count}"),
            What::Tensor(name) => write!(f, "the description of tensor `{name}`"),
        }
    }
}
