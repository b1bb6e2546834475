//! Pages: their headers, how they are packed, and the values in them.

use std::io::Read;

use super::delta::lengths;
use super::levels::Hybrid;
use super::schema::Column;
use super::thrift::{Reader, Result, Wire};

/// The longest page, unpacked. Writers aim at one megabyte.
const LONGEST: usize = 256 << 20;
/// Snappy's densest element copies 64 bytes by three.
const SNAPPY_RATIO: usize = 24;

const DICTIONARY_PAGE: i64 = 2;
const DATA_PAGE: i64 = 0;
const DATA_PAGE_V2: i64 = 3;

const PLAIN: i64 = 0;
const PLAIN_DICTIONARY: i64 = 2;
const RLE: i64 = 3;
const DELTA_LENGTH_BYTE_ARRAY: i64 = 6;
const DELTA_BYTE_ARRAY: i64 = 7;
const RLE_DICTIONARY: i64 = 8;

/// What stands before a page's bytes.
#[derive(Clone, Debug, Default)]
struct PageHeader {
    kind: i64,
    unpacked: usize,
    stored: usize,
    values: u64,
    encoding: i64,
    definition_encoding: i64,
    repetition_encoding: i64,
    /// Bytes of the levels, in version 2, where they are not packed with the values.
    definition_len: usize,
    repetition_len: usize,
    not_packed: bool,
}

/// The strings that a column's indices point to: bytes, and where each begins and ends.
#[derive(Debug, Default)]
pub(super) struct Dictionary {
    bytes: Vec<u8>,
    places: Vec<(u32, u32)>,
}

/// A page that is being read.
#[derive(Debug)]
pub(super) struct Page {
    bytes: Vec<u8>,
    /// Values left, nulls counted.
    pub(super) left: u64,
    repetition: Hybrid,
    definition: Hybrid,
    values: Values,
}

/// Values that are read one by one.
#[derive(Debug)]
enum Values {
    /// Each after its length.
    Plain {
        position: usize,
    },
    Indices(Hybrid),
    /// All after their lengths; in the second form each shares its beginning with the one before.
    Lengths {
        position: usize,
        next: usize,
        lengths: Vec<usize>,
        shared: Option<Vec<usize>>,
    },
}

/// What a step through a column's pages finds.
pub(super) enum Found {
    Dictionary(Dictionary),
    Page(Page),
    /// An index page or one of a kind to come.
    Nothing,
}

/// Reads the page that begins at `*position` of a chunk; `*position` moves past it.
pub(super) fn read(
    chunk: &[u8],
    position: &mut usize,
    codec: i64,
    column: &Column,
) -> Result<Found> {
    let mut reader = Reader::new(&chunk[*position..]);
    let header = header(&mut reader)?;
    let start = *position + reader.position();
    let stored = start.checked_add(header.stored).and_then(|end| chunk.get(start..end));
    let stored = stored.ok_or_else(|| {
        let rest = chunk.len() - start;
        format!("a page should take {} bytes, but {rest} follow", header.stored)
    })?;
    *position = start + header.stored;
    match header.kind {
        DICTIONARY_PAGE => {
            let bytes = unpack(stored, header.unpacked, codec)?;
            Dictionary::new(bytes, header.values).map(Found::Dictionary)
        }
        DATA_PAGE => Page::version_1(&header, stored, codec, column).map(Found::Page),
        DATA_PAGE_V2 => Page::version_2(&header, stored, codec, column).map(Found::Page),
        _ => Ok(Found::Nothing),
    }
}

fn header(reader: &mut Reader<'_>) -> Result<PageHeader> {
    let mut header = PageHeader::default();
    let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    reader.fields(&mut |reader, id, wire| {
        match (id, wire) {
            (1, Wire::Integer) => header.kind = reader.integer()?,
            (2, Wire::Integer) => header.unpacked = size(reader.count()?),
            (3, Wire::Integer) => header.stored = size(reader.count()?),
            (5 | 7 | 8, Wire::Struct) => {
                let version_2 = id == 8;
                reader.fields(&mut |reader, id, wire| {
                    match (id, wire, version_2) {
                        (1, Wire::Integer, _) => header.values = reader.count()?,
                        (2, Wire::Integer, false) => header.encoding = reader.integer()?,
                        (3, Wire::Integer, false) => {
                            header.definition_encoding = reader.integer()?
                        }
                        (4, Wire::Integer, false) => {
                            header.repetition_encoding = reader.integer()?
                        }
                        (4, Wire::Integer, true) => header.encoding = reader.integer()?,
                        (5, Wire::Integer, true) => header.definition_len = size(reader.count()?),
                        (6, Wire::Integer, true) => header.repetition_len = size(reader.count()?),
                        (7, Wire::True | Wire::False, true) => {
                            header.not_packed = wire == Wire::False;
                        }
                        _ => return Ok(false),
                    }
                    Ok(true)
                })?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(header)
}

/// A page's bytes as they were before they were packed.
fn unpack(stored: &[u8], len: usize, codec: i64) -> Result<Vec<u8>> {
    if len > LONGEST {
        return Err(format!("a page of {len} bytes; expected at most {LONGEST}"));
    }
    let limited = |reader: &mut dyn Read| {
        let mut out = Vec::new();
        let read = reader.take(len as u64 + 1).read_to_end(&mut out);
        read.map_err(|error| format!("a page does not unpack: {error}"))?;
        Ok::<_, String>(out)
    };
    let out = match codec {
        0 => stored.to_vec(),
        1 => {
            if len > stored.len().saturating_mul(SNAPPY_RATIO) + 64 {
                return Err(format!("a page of {} bytes cannot unpack to {len}", stored.len()));
            }
            let mut out = vec![0; len];
            let unpacked = snap::raw::Decoder::new().decompress(stored, &mut out);
            let n = unpacked.map_err(|error| format!("a page does not unpack: {error}"))?;
            out.truncate(n);
            out
        }
        2 => limited(&mut flate2::read::MultiGzDecoder::new(stored))?,
        6 => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(stored);
            limited(&mut decoder.map_err(|error| format!("a page does not unpack: {error}"))?)?
        }
        other => {
            let name = match other {
                3 => "LZO",
                4 => "Brotli",
                5 | 7 => "LZ4",
                _ => "an unknown codec",
            };
            return Err(format!(
                "it is packed by {name}; bevel reads plain, Snappy, gzip and zstd: write it again with one of these"
            ));
        }
    };
    match out.len() == len {
        true => Ok(out),
        false => Err(format!("a page unpacks to {} bytes or more, expected {len}", out.len())),
    }
}

impl Dictionary {
    fn new(bytes: Vec<u8>, count: u64) -> Result<Self> {
        let mut places = Vec::new();
        let mut position = 0;
        for _ in 0..count {
            let value = plain(&bytes, &mut position)?;
            let place = |at: usize| u32::try_from(at).map_err(|_| "a dictionary is too long");
            places.push((place(position - value.len())?, place(position)?));
        }
        Ok(Self { bytes, places })
    }

    fn get(&self, index: u32) -> Result<&[u8]> {
        let place = self.places.get(index as usize);
        let &(start, end) = place.ok_or_else(|| {
            format!("index {index} into a dictionary of {} strings", self.places.len())
        })?;
        Ok(&self.bytes[start as usize..end as usize])
    }
}

/// A string after its length.
fn plain<'a>(bytes: &'a [u8], position: &mut usize) -> Result<&'a [u8]> {
    let rest = &bytes[*position..];
    let early = || "a page ends within a string".to_owned();
    let (len, rest) = rest.split_first_chunk().ok_or_else(early)?;
    let value = rest.get(..u32::from_le_bytes(*len) as usize).ok_or_else(early)?;
    *position += 4 + value.len();
    Ok(value)
}

/// Bits that numbers up to `most` take.
fn width(most: u32) -> u32 {
    u32::BITS - most.leading_zeros()
}

impl Page {
    fn version_1(header: &PageHeader, stored: &[u8], codec: i64, column: &Column) -> Result<Self> {
        let bytes = unpack(stored, header.unpacked, codec)?;
        let mut position = 0;
        let mut levels = |most: u32, encoding: i64| {
            if most == 0 {
                return Hybrid::new(0, 0, 0);
            }
            if encoding != RLE {
                return Err("its levels are in the old BIT_PACKED encoding".to_owned());
            }
            let early = || "a page ends within its levels".to_owned();
            let rest: &[u8] = &bytes[position..];
            let (len, rest) = rest.split_first_chunk().ok_or_else(early)?;
            let len = u32::from_le_bytes(*len) as usize;
            rest.get(..len).ok_or_else(early)?;
            let start = position + 4;
            position = start + len;
            Hybrid::new(start, position, width(most))
        };
        let most_repeated = u32::from(column.element_definition.is_some());
        let repetition = levels(most_repeated, header.repetition_encoding)?;
        let definition = levels(column.max_definition, header.definition_encoding)?;
        let values = Values::new(header.encoding, &bytes, position)?;
        Ok(Self { bytes, left: header.values, repetition, definition, values })
    }

    fn version_2(header: &PageHeader, stored: &[u8], codec: i64, column: &Column) -> Result<Self> {
        let (repetition_len, definition_len) = (header.repetition_len, header.definition_len);
        let levels = repetition_len.checked_add(definition_len);
        let levels = levels.filter(|&len| len <= stored.len() && len <= header.unpacked);
        let levels = levels.ok_or("a page ends within its levels")?;
        let codec = if header.not_packed { 0 } else { codec };
        let mut bytes = stored[..levels].to_vec();
        // A page of nulls has no values, and then nothing was packed.
        if stored.len() > levels {
            bytes.extend(unpack(&stored[levels..], header.unpacked - levels, codec)?);
        }
        let most_repeated = u32::from(column.element_definition.is_some());
        let repetition = Hybrid::new(0, repetition_len, width(most_repeated))?;
        let definition = Hybrid::new(repetition_len, levels, width(column.max_definition))?;
        let values = Values::new(header.encoding, &bytes, levels)?;
        Ok(Self { bytes, left: header.values, repetition, definition, values })
    }

    /// The next value's repetition and definition levels.
    pub(super) fn levels(&mut self) -> Result<(u32, u32)> {
        self.left -= 1;
        Ok((self.repetition.next(&self.bytes)?, self.definition.next(&self.bytes)?))
    }

    /// The next string, into `out`, which holds the one before of the same page.
    pub(super) fn value(&mut self, dictionary: &Dictionary, out: &mut Vec<u8>) -> Result<()> {
        let early = || "a page ends within a string".to_owned();
        match &mut self.values {
            Values::Plain { position } => {
                let value = plain(&self.bytes, position)?;
                out.clear();
                out.extend_from_slice(value);
            }
            Values::Indices(indices) => {
                let value = dictionary.get(indices.next(&self.bytes)?)?;
                out.clear();
                out.extend_from_slice(value);
            }
            Values::Lengths { position, next, lengths, shared } => {
                let len = *lengths.get(*next).ok_or_else(early)?;
                let keep = match shared {
                    Some(shared) => *shared.get(*next).ok_or_else(early)?,
                    None => 0,
                };
                *next += 1;
                let end = position.checked_add(len).ok_or_else(early)?;
                let value = self.bytes.get(*position..end).ok_or_else(early)?;
                *position = end;
                if keep > out.len() {
                    return Err("a string shares more than the one before has".to_owned());
                }
                out.truncate(keep);
                out.extend_from_slice(value);
            }
        }
        Ok(())
    }
}

impl Values {
    fn new(encoding: i64, bytes: &[u8], start: usize) -> Result<Self> {
        let mut position = start;
        match encoding {
            PLAIN => Ok(Self::Plain { position }),
            PLAIN_DICTIONARY | RLE_DICTIONARY => match bytes.get(start) {
                Some(&width) => {
                    Ok(Self::Indices(Hybrid::new(start + 1, bytes.len(), width.into())?))
                }
                // A page of nulls.
                None => Ok(Self::Indices(Hybrid::new(start, start, 1)?)),
            },
            DELTA_LENGTH_BYTE_ARRAY => {
                let lengths = lengths(bytes, &mut position)?;
                Ok(Self::Lengths { position, next: 0, lengths, shared: None })
            }
            DELTA_BYTE_ARRAY => {
                let shared = Some(lengths(bytes, &mut position)?);
                let lengths = lengths(bytes, &mut position)?;
                Ok(Self::Lengths { position, next: 0, lengths, shared })
            }
            other => {
                Err(format!("strings are in encoding {other}, which Parquet has not for them"))
            }
        }
    }
}
