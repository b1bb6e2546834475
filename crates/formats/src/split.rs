use std::ops::Range;
use std::path::{Path, PathBuf};

/// Cuts a list of tensors, given as byte counts, into runs of at most `max_bytes` each. A tensor
/// larger than that gets a shard of its own. No limit or no tensors give one run.
pub(crate) fn runs(byte_lens: &[u64], max_bytes: Option<u64>) -> Vec<Range<usize>> {
    let limit = max_bytes.unwrap_or(u64::MAX);
    let mut runs = Vec::new();
    let (mut start, mut bytes) = (0, 0u64);
    for (i, &len) in byte_lens.iter().enumerate() {
        if i > start && bytes.saturating_add(len) > limit {
            runs.push(start..i);
            (start, bytes) = (i, 0);
        }
        bytes = bytes.saturating_add(len);
    }
    runs.push(start..byte_lens.len());
    runs
}

/// The name of shard `index` (from 0) of `count`: `model.gguf` itself where there is only one,
/// else `model-00001-of-00003.gguf`.
pub(crate) fn shard_path(path: &Path, index: usize, count: usize) -> PathBuf {
    if count == 1 {
        return path.to_owned();
    }
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{:05}-of-{count:05}", index + 1));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

/// Undoes [`shard_path`]: the unsplit name, the index from 0 and the count. `None` where the name
/// is not a shard's.
pub(crate) fn parse_shard_path(path: &Path) -> Option<(PathBuf, usize, usize)> {
    let extension = path.extension()?.to_str()?;
    let (rest, count) = path.file_stem()?.to_str()?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let five_digits = |text: &str| {
        (text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
    };
    let (number, count): (usize, usize) = (five_digits(number)?, five_digits(count)?);
    let unsplit = path.with_file_name(format!("{stem}.{extension}"));
    (1..=count).contains(&number).then(|| (unsplit, number - 1, count))
}
