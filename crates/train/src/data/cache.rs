//! Tokens of data that were read before.
//!
//! A file for each combination of data, tokenizer, template and options, whose SHA-256 is its name:
//!
//! | bytes | |
//! |---|---|
//! | 8 | `BVLTOK` and the version, two digits |
//! | 32 | the key: SHA-256 of all that the tokens follow from |
//! | 8 + 8 + 8 | examples, how many were cut off, how many had nothing to be learnt; u64 |
//! | | for each example: tokens as u32 length and u32 ids, and a bit for each whether it is learnt |
//! | 32 | SHA-256 of all before |
//!
//! Numbers are little-endian. A file that is anything else is taken for none, and written anew.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bevel_base::Pool;
use bevel_formats::AtomicFile;
use bevel_formats::records::DataFile;
use sha2::{Digest, Sha256};

use super::read::{self, Item};
use super::{Examples, Reader};
use crate::{Error, Result};

const MAGIC: &[u8; 8] = b"BVLTOK01";
const ENDING: &str = "tokens";
/// Less data becomes tokens sooner than a file for it is worth.
const WORTH: u64 = 4 << 20;
/// Files that are kept; the oldest go.
const KEPT: usize = 8;

/// What became of the cache.
#[derive(Debug)]
pub enum Cached {
    /// The tokens were in it.
    Found,
    /// They are in it now.
    Written,
    /// The data are few, or no files, and it was not looked into.
    Unused,
    /// It could not be written, which does no harm.
    Failed(Error),
}

pub(super) fn files<T: Item>(
    reader: &Reader<'_>,
    files: &[DataFile],
    pool: &Pool,
    directory: &Path,
) -> Result<(Examples<T>, Cached)> {
    if !is_worth_it(files) {
        return Ok((read::files(reader, files, pool)?, Cached::Unused));
    }
    let key = key::<T>(reader, files)?;
    let name: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = directory.join(name).with_extension(ENDING);
    if let Some(found) = std::fs::read(&path).ok().and_then(|bytes| decode(&bytes, &key)) {
        return Ok((found, Cached::Found));
    }
    let examples = read::files(reader, files, pool)?;
    Ok(match write(&path, &encode(&examples, &key)) {
        Ok(()) => (examples, Cached::Written),
        Err(error) => (examples, Cached::Failed(error)),
    })
}

/// Whether there are files only, and enough in them.
fn is_worth_it(files: &[DataFile]) -> bool {
    let sizes = files.iter().map(|file| {
        let data = std::fs::metadata(&file.path).ok().filter(std::fs::Metadata::is_file);
        data.map(|data| data.len())
    });
    sizes.sum::<Option<u64>>().is_some_and(|all| all >= WORTH)
}

/// The SHA-256 of all that examples follow from.
fn key<T: Item>(reader: &Reader<'_>, files: &[DataFile]) -> Result<[u8; 32]> {
    let Reader { tokenizer, template, context, whole } = reader;
    let mut hash = Sha256::new();
    // Each part with its length, so that none can run into the next.
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(MAGIC);
    // How text is cut may change between versions.
    part(env!("CARGO_PKG_VERSION").as_bytes());
    part(T::MEMBERS.concat().as_bytes());
    part(&tokenizer.to_json_bytes());
    part(format!("{:?}", (tokenizer.eos(), tokenizer.special_texts())).as_bytes());
    part(format!("{:?}", (context, whole, template.map(|t| t.source()))).as_bytes());
    for file in files {
        part(format!("{:?}", file.kind).as_bytes());
        // Whether it is packed. The name says nothing else.
        let ending = file.path.extension().unwrap_or_default().to_ascii_lowercase();
        part(ending.as_encoded_bytes());
        part(&content(&file.path)?);
    }
    Ok(hash.finalize().into())
}

fn content(path: &Path) -> Result<[u8; 32]> {
    let failed = |error| Error::Io { path: path.display().to_string(), error };
    let mut file = File::open(path).map_err(failed)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 18]);
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(hash.finalize().into()),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn encode<T: Item>(examples: &Examples<T>, key: &[u8; 32]) -> Vec<u8> {
    let mut out = [MAGIC.as_slice(), key].concat();
    for number in [examples.all.len(), examples.cut, examples.empty] {
        out.extend((number as u64).to_le_bytes());
    }
    for example in examples.all.iter().flat_map(Item::examples) {
        out.extend((example.tokens.len() as u32).to_le_bytes());
        out.extend(example.tokens.iter().flat_map(|token| token.to_le_bytes()));
        let byte = |bits: &[bool]| {
            bits.iter().enumerate().fold(0, |byte, (i, &bit)| byte | u8::from(bit) << i)
        };
        out.extend(example.learnt.chunks(8).map(byte));
    }
    let sum = Sha256::digest(&out);
    out.extend(sum);
    out
}

/// The examples of a file's bytes; `None` where they are of anything else, or damaged.
fn decode<T: Item>(bytes: &[u8], key: &[u8; 32]) -> Option<Examples<T>> {
    let (bytes, sum) = bytes.split_last_chunk::<32>()?;
    let mut rest = bytes.strip_prefix(MAGIC)?.strip_prefix(key)?;
    if Sha256::digest(bytes)[..] != sum[..] {
        return None;
    }
    let mut take = |len: usize| {
        let (taken, after) = rest.split_at_checked(len)?;
        rest = after;
        Some(taken)
    };
    let mut counts = [0; 3];
    for count in &mut counts {
        *count = usize::try_from(u64::from_le_bytes(take(8)?.try_into().ok()?)).ok()?;
    }
    let [count, cut, empty] = counts;
    let mut examples = Examples { all: Vec::new(), cut, empty };
    for _ in 0..count {
        let item = T::from_examples(&mut || {
            let len = u32::from_le_bytes(take(4)?.try_into().ok()?) as usize;
            let ids = take(len.checked_mul(4)?)?.as_chunks().0;
            let tokens = ids.iter().map(|&id| u32::from_le_bytes(id)).collect();
            let bits = take(len.div_ceil(8))?;
            let learnt = (0..len).map(|i| bits[i / 8] >> (i % 8) & 1 == 1).collect();
            Some(super::Example { tokens, learnt })
        });
        examples.all.push(item?);
    }
    rest.is_empty().then_some(examples)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let failed = |error| Error::Io { path: directory.display().to_string(), error };
    std::fs::create_dir_all(directory).map_err(failed)?;
    make_room(directory);
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes).map_err(failed)?;
    Ok(file.finish()?)
}

/// Removes the oldest files where there are many. What cannot be removed stays.
fn make_room(directory: &Path) {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut files: Vec<(SystemTime, PathBuf)> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == ENDING))
        .filter_map(|path| Some((std::fs::metadata(&path).ok()?.modified().ok()?, path)))
        .collect();
    files.sort();
    for (_, path) in files.iter().rev().skip(KEPT - 1) {
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Example, Pair};

    fn example(len: u32) -> Example {
        Example {
            tokens: (0..len).map(|i| i * 70_000).collect(),
            learnt: (0..len).map(|i| i % 3 == 1).collect(),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let key = [7; 32];
        let examples =
            Examples { all: [1, 8, 9, 300].map(example).to_vec(), cut: 3, empty: usize::MAX };
        let bytes = encode(&examples, &key);
        assert_eq!(decode(&bytes, &key), Some(examples));
        let pair = Pair { chosen: example(5), rejected: example(17) };
        let pairs = Examples { all: vec![pair], cut: 0, empty: 1 };
        assert_eq!(decode(&encode(&pairs, &key), &key), Some(pairs));
    }

    #[test]
    fn what_is_damaged_or_of_others_is_none() {
        let key = [7; 32];
        let examples = Examples { all: [2, 5].map(example).to_vec(), cut: 0, empty: 0 };
        let bytes = encode(&examples, &key);
        let decode = |bytes: &[u8]| decode::<Example>(bytes, &key);
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]), None, "{len} bytes");
        }
        for i in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[i] ^= 1;
            assert_eq!(decode(&changed), None, "byte {i}");
        }
        assert_eq!(super::decode::<Example>(&bytes, &[8; 32]), None, "another key");
        assert_eq!(decode(&[bytes.as_slice(), b"x"].concat()), None);
        // A right sum over lengths that lie.
        let mut lies = bytes[..bytes.len() - 32].to_vec();
        lies[40..48].copy_from_slice(&u64::MAX.to_le_bytes());
        let sum = Sha256::digest(&lies);
        lies.extend(sum);
        assert_eq!(decode(&lies), None);
    }

    #[test]
    fn the_oldest_make_room() {
        let directory = tempfile::tempdir().unwrap();
        let at = |i: usize| directory.path().join(format!("{i}.{ENDING}"));
        for i in 0..KEPT + 2 {
            let file = File::create(at(i)).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(i as u64))
                .unwrap();
        }
        std::fs::write(directory.path().join("other"), "x").unwrap();
        write(&at(100), b"new").unwrap();
        let left: Vec<bool> = (0..KEPT + 2).map(|i| at(i).exists()).collect();
        assert_eq!(left.iter().filter(|&&left| left).count(), KEPT - 1);
        assert!(!left[0] && !left[2] && left[3] && at(100).exists());
        assert!(directory.path().join("other").exists());
    }
}
