use std::fmt;
use std::path::Path;

use bevel_base::{DType, Shape};
use indexmap::IndexMap;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::METADATA;
use crate::wrong_file::wrong_file;
use crate::{Error, Result, TensorInfo};

/// Everything in one file but the tensor data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What stands under `__metadata__`.
    pub metadata: IndexMap<String, String>,
    /// Tensors in the order of their data.
    pub tensors: IndexMap<String, TensorInfo>,
    /// Where the tensor data starts.
    pub data_start: usize,
}

/// Longer headers are refused, as by the `safetensors` package.
const MAX_HEADER: u64 = 100_000_000;
/// Models use up to four dimensions; this leaves room.
const MAX_DIMS: usize = 16;

impl Header {
    /// Parses the header of a whole file lying in `bytes` and checks that the tensors fill the rest
    /// of the file without gaps or overlaps. Tensor data is not touched. `path` is used in messages.
    ///
    /// # Errors
    /// [`Error::WrongFile`] where `bytes` do not begin like a safetensors file, [`Error::Header`]
    /// and [`Error::Tensor`] where they contradict themselves.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Header> {
        let header_error = |reason: String| Error::Header { path: path.to_owned(), reason };
        let Some((len, rest)) =
            bytes.split_first_chunk().filter(|(_, rest)| rest.first() == Some(&b'{'))
        else {
            return Err(wrong_file(path, "safetensors file", bytes));
        };
        let len = u64::from_le_bytes(*len);
        if len > MAX_HEADER {
            return Err(header_error(format!(
                "it claims {len} bytes; the format allows {MAX_HEADER}"
            )));
        }
        let json = rest.get(..len as usize).ok_or_else(|| {
            let left = rest.len();
            header_error(format!("it takes {len} bytes, but only {left} follow; the file is truncated or damaged: copy or download it again"))
        })?;
        let raw: RawHeader =
            serde_json::from_slice(json).map_err(|error| header_error(error.to_string()))?;

        let data_start = 8 + json.len();
        let data_len = bytes.len() - data_start;
        let mut tensors = IndexMap::with_capacity(raw.tensors.len());
        for (name, raw) in raw.tensors {
            let tensor_error = |reason: String| Error::Tensor {
                path: path.to_owned(),
                tensor: name.clone(),
                reason,
            };
            let info = raw.place(data_start, data_len).map_err(tensor_error)?;
            tensors.insert(name, info);
        }
        tensors
            .sort_by(|_, a, _, b| (a.range.start, a.range.end).cmp(&(b.range.start, b.range.end)));

        let mut end = data_start;
        for (name, info) in &tensors {
            if info.range.start != end {
                let (start, end) = (info.range.start - data_start, end - data_start);
                let reason = format!(
                    "its data starts at {start}, but the data before it ends at {end}; tensors must neither overlap nor leave gaps"
                );
                return Err(Error::Tensor { path: path.to_owned(), tensor: name.clone(), reason });
            }
            end = info.range.end;
        }
        if end != bytes.len() {
            let (found, expected) = (bytes.len(), end);
            return Err(header_error(format!(
                "its tensors end at byte {expected}, but the file has {found} bytes; copy or download it again"
            )));
        }
        Ok(Header { metadata: raw.metadata, tensors, data_start })
    }
}

/// The header as JSON has it.
struct RawHeader {
    metadata: IndexMap<String, String>,
    tensors: IndexMap<String, RawTensor>,
}

#[derive(serde::Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    /// Start and end, from the start of the data.
    data_offsets: (u64, u64),
}

impl RawTensor {
    fn place(&self, data_start: usize, data_len: usize) -> Result<TensorInfo, String> {
        let dtype = dtype_of(&self.dtype)
            .ok_or_else(|| format!("its type `{}` is not supported", self.dtype))?;
        if self.shape.len() > MAX_DIMS {
            return Err(format!(
                "it has {} dimensions; bevel reads up to {MAX_DIMS}",
                self.shape.len()
            ));
        }
        let dims: Option<Vec<usize>> = self.shape.iter().map(|&dim| dim.try_into().ok()).collect();
        let shape =
            Shape::from(dims.ok_or_else(|| format!("its dimensions overflow: {:?}", self.shape))?);
        let expected = shape.byte_len(dtype).map_err(|error| error.to_string())?;
        let (start, end) = self.data_offsets;
        if start > end || end > data_len as u64 {
            return Err(format!(
                "its data lies at {start} to {end}, but the file has {data_len} bytes of data; the file is truncated or damaged: copy or download it again"
            ));
        }
        let range = data_start + start as usize..data_start + end as usize;
        if range.len() != expected {
            return Err(format!(
                "{shape} values of type {dtype} take {expected} bytes, but it has {}",
                range.len()
            ));
        }
        Ok(TensorInfo { dtype, shape, file: 0, range })
    }
}

/// Plain types have the same names here and in [`DType`].
fn dtype_of(name: &str) -> Option<DType> {
    DType::all().find(|dtype| !dtype.is_packed() && dtype.name() == name)
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with a tensor per key")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut metadata = None;
                let mut tensors = IndexMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    let first = if name == METADATA {
                        metadata.replace(map.next_value()?).is_none()
                    } else {
                        tensors.insert(name.clone(), map.next_value()?).is_none()
                    };
                    if !first {
                        return Err(A::Error::custom(format!("`{name}` comes twice")));
                    }
                }
                Ok(RawHeader { metadata: metadata.unwrap_or_default(), tensors })
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}
