//! The older `.dat` format, without a magic number: entries one after another, then the number of
//! chunks and the last text's name.

use std::io::Write;
use std::path::Path;

use super::{Imatrix, ImatrixEntry};
use crate::wrong_file::wrong_file;
use crate::{AtomicFile, Error, Result};

/// The least that an entry takes: three lengths and one value.
const LEAST_ENTRY: usize = 16;

pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Imatrix> {
    let mut reader = Reader { path, bytes, position: 0 };
    let entries = match bytes.first_chunk() {
        Some(&count) => i32::from_le_bytes(count),
        None => 0,
    };
    let plausible = usize::try_from(entries)
        .is_ok_and(|n| n > 0 && n <= bytes.len().saturating_sub(4) / LEAST_ENTRY);
    if !plausible {
        return Err(wrong_file(path, "importance matrix", bytes));
    }
    reader.position = 4;
    let mut found = Imatrix::default();
    for i in 0..entries {
        let (name, entry) = reader.entry(i)?;
        if found.entries.insert(name.clone(), entry).is_some() {
            return Err(reader.error(format!("tensor `{name}` comes twice")));
        }
    }
    if reader.rest() == 0 {
        return Ok(found);
    }
    found.chunks = reader.count("the number of chunks")? as u32;
    if reader.rest() == 0 {
        return Ok(found);
    }
    let len = reader.count("the length of the text's name")?;
    let name = reader.take(len, "the text's name")?;
    if !name.is_empty() {
        found.datasets.push(String::from_utf8_lossy(name).into_owned());
    }
    match reader.rest() {
        0 => Ok(found),
        rest => Err(reader.error(format!("{rest} bytes follow what should be its end"))),
    }
}

struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    fn entry(&mut self, i: i32) -> Result<(String, ImatrixEntry)> {
        let len = self.count(&format!("the length of name {i}"))?;
        let name = self.take(len, &format!("name {i}"))?;
        let name = str::from_utf8(name)
            .map_err(|_| self.error(format!("the name of entry {i} is no UTF-8")))?
            .to_owned();
        let calls = self.count(&format!("the chunks of tensor `{name}`"))?;
        let values = self.count(&format!("the number of values of tensor `{name}`"))?;
        let what = format!("the values of tensor `{name}`");
        let too_many = || self.error(format!("{what} overflow: {values}"));
        let byte_len = values.checked_mul(4).ok_or_else(too_many)?;
        let bytes = self.take(byte_len, &what)?;
        let sums = bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect();
        // Files from before chunks were counted say 0: their values are means.
        Ok((name, ImatrixEntry { sums, counts: vec![calls.max(1) as u64] }))
    }

    fn count(&mut self, what: &str) -> Result<usize> {
        let bytes = self.take(4, what)?;
        let value = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        usize::try_from(value).map_err(|_| self.error(format!("{what} is {value}")))
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8]> {
        let range = self.position..self.position.saturating_add(len);
        let rest = self.rest();
        let taken = self.bytes.get(range.clone()).ok_or_else(|| {
            self.error(format!(
                "{what} should take {len} bytes, but {rest} follow; the file is truncated or damaged"
            ))
        })?;
        self.position = range.end;
        Ok(taken)
    }

    fn rest(&self) -> usize {
        self.bytes.len() - self.position
    }

    fn error(&self, reason: String) -> Error {
        Error::Header { path: self.path.to_owned(), reason }
    }
}

pub(super) fn write(
    imatrix: &Imatrix,
    path: &Path,
    entries: &[(&str, &ImatrixEntry)],
) -> Result<()> {
    let too_large = |what: &str| Error::Unwritable {
        path: path.to_owned(),
        reason: format!("{what} does not fit into the 31 bits of the `.dat` format; write GGUF"),
    };
    let mut out = Vec::new();
    let put = |number: usize, what: &str| -> Result<[u8; 4]> {
        i32::try_from(number).map(i32::to_le_bytes).map_err(|_| too_large(what))
    };
    let measured: Vec<_> =
        entries.iter().filter(|(_, entry)| entry.counts.iter().any(|&count| count > 0)).collect();
    out.extend(put(measured.len(), "the number of entries")?);
    for (name, entry) in measured {
        out.extend(put(name.len(), "a name's length")?);
        out.extend(name.as_bytes());
        let most = entry.counts.iter().copied().max().unwrap_or_default();
        let calls = most.div_ceil(u64::from(imatrix.chunk_size.max(1)));
        out.extend(put(calls.try_into().unwrap_or(usize::MAX), "the number of chunks")?);
        out.extend(put(entry.sums.len(), "the number of values")?);
        let columns = entry.sums.len() / entry.counts.len();
        for (sums, &count) in entry.sums.chunks(columns).zip(&entry.counts) {
            for &sum in sums {
                let value = match count {
                    0 => calls as f32,
                    count if count == calls => sum,
                    count => sum / count as f32 * calls as f32,
                };
                out.extend(value.to_le_bytes());
            }
        }
    }
    out.extend(imatrix.chunks.to_le_bytes());
    let dataset = imatrix.datasets.last().map_or("", String::as_str);
    out.extend(put(dataset.len(), "the text's name")?);
    out.extend(dataset.as_bytes());

    let mut file = AtomicFile::create(path)?;
    file.write_all(&out).map_err(Error::io("write", path))?;
    file.finish()
}
