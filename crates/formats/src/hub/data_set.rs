//! Data sets: which of a repository's files hold the rows of a split.

use std::path::PathBuf;

use super::cache::{RepoCache, files_below};
use super::contact::{Contact, contact};
use super::download::Source;
use super::repo::is_safe_path;
use super::select::Sibling;
use super::{Error, HubConfig, Progress, RepoId, Result};
use crate::records::describes;

/// Shards with this many bytes are far more than calibration reads.
pub const ENOUGH: u64 = 64 << 20;
/// What holds rows, best first: of one data set in two formats the first is taken.
const FORMATS: [&[&str]; 5] =
    [&[".parquet"], &[".jsonl", ".ndjson"], &[".json"], &[".csv"], &[".txt", ".text"]];
const PACKED: [&str; 2] = [".gz", ".zst"];

/// Brings rows of a data set into the cache and returns their files in the order of their names:
/// Parquet, JSON, CSV or text. Of a data set that has more bytes than `most`, these are the first shards that
/// have as many.
///
/// The name's selection is a split (`train`), a configuration and a split (`en/train`), or a file;
/// without one it is `train`, where the data set has that. As for models, the hub is asked which
/// commit the revision stands for, and the cache serves where it cannot be reached; the cache is laid
/// out as `huggingface_hub` does it, under `datasets--owner--name`.
///
/// # Errors
/// [`Error::NoData`] and [`Error::ChooseData`]; otherwise as [`fetch`](super::fetch).
pub fn fetch_data_set(
    config: &HubConfig,
    repo: &RepoId,
    most: u64,
    progress: &mut dyn Progress,
) -> Result<Vec<PathBuf>> {
    let repo = &repo.clone().of_data_set();
    let cache = RepoCache::new(config, repo);
    let cached = from_cache(&cache, repo, most);
    let (client, commit, siblings) = match contact(config, repo, cached, progress)? {
        Contact::Cache(found) => return Ok(found),
        Contact::Hub { client, commit, siblings } => (client, commit, siblings),
    };
    let chosen = choose(repo, &siblings)?;
    let files = enough(&chosen, most);
    if files.len() < chosen.len() {
        let (few, all) = (files.len(), chosen.len());
        progress.note(&format!("`{repo}` has {all} files; {few} are enough."));
    }
    let source = Source { client: &client, cache: &cache, repo, commit: &commit };
    for file in files {
        source.file(&file.path, None, progress)?;
    }
    cache.set_ref(repo.revision(), &commit)?;
    let snapshot = cache.snapshot(&commit);
    Ok(files.iter().map(|file| snapshot.join(&file.path)).collect())
}

/// What the cache alone gives.
fn from_cache(cache: &RepoCache, repo: &RepoId, most: u64) -> Result<Vec<PathBuf>> {
    let commit = match repo.is_commit() {
        true => Some(repo.revision().to_owned()),
        false => cache.commit_of(repo.revision()),
    };
    let snapshot = commit.map(|commit| cache.snapshot(&commit));
    let siblings = snapshot.as_deref().map(files_below).unwrap_or_default();
    let missing = |_| Error::NotCached {
        repo: repo.to_string(),
        file: repo.selection().unwrap_or("the data set").to_owned(),
        cache: cache.root().display().to_string(),
    };
    let chosen = choose(repo, &siblings).map_err(missing)?;
    let snapshot = snapshot.unwrap_or_default();
    Ok(enough(&chosen, most).iter().map(|file| snapshot.join(&file.path)).collect())
}

/// The first files that have `most` bytes together. A file of unknown size counts as [`ENOUGH`].
fn enough<'a, 'b>(files: &'b [&'a Sibling], most: u64) -> &'b [&'a Sibling] {
    let mut bytes = 0u64;
    let last = files.iter().position(|file| {
        bytes = bytes.saturating_add(file.size.unwrap_or(ENOUGH));
        bytes >= most
    });
    &files[..last.map_or(files.len(), |last| last + 1)]
}

/// The files with the rows of one split, of one format, in the order of their names.
fn choose<'a>(repo: &RepoId, siblings: &'a [Sibling]) -> Result<Vec<&'a Sibling>> {
    if let Some(file) = siblings.iter().find(|file| !is_safe_path(&file.path)) {
        return Err(Error::UnsafePath { repo: repo.to_string(), path: file.path.clone() });
    }
    let mut data: Vec<&Sibling> =
        siblings.iter().filter(|file| format(&file.path).is_some()).collect();
    data.sort_by(|a, b| a.path.cmp(&b.path));
    let of = |wanted: &str| -> Vec<&'a Sibling> {
        if let Some(file) = data.iter().find(|file| file.path == wanted) {
            return vec![file];
        }
        data.iter()
            .copied()
            .filter(|file| wanted.split('/').all(|w| names(&file.path, w)))
            .collect()
    };
    let mut found = match repo.selection() {
        Some(wanted) => of(wanted),
        None => Some(of("train")).filter(|train| !train.is_empty()).unwrap_or_else(|| data.clone()),
    };
    let best = found.iter().filter_map(|file| format(&file.path)).min();
    found.retain(|file| format(&file.path) == best);
    let list = |files: &[&Sibling]| {
        let lines = files.iter().take(20).map(|file| format!("  {}", file.path));
        lines.collect::<Vec<_>>().join("\n")
    };
    if found.is_empty() {
        return Err(match data.is_empty() {
            true => Error::NoData { repo: repo.id().to_owned(), files: siblings.len() },
            false => Error::ChooseData {
                repo: repo.id().to_owned(),
                why: format!("no file that `{}` names", repo.selection().unwrap_or("train")),
                list: list(&data),
            },
        });
    }
    // Configurations lie in directories of their own; a split is none.
    let directory =
        |file: &&Sibling| file.path.rsplit_once('/').map_or("", |(dir, _)| dir).to_owned();
    let first = directory(&found[0]);
    if found.iter().any(|file| directory(file) != first) {
        return Err(Error::ChooseData {
            repo: repo.id().to_owned(),
            why: "files in several directories".to_owned(),
            list: list(&found),
        });
    }
    Ok(found)
}

/// How good a file's format is, the best 0; `None` for what holds no rows.
fn format(path: &str) -> Option<usize> {
    let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
    if name.starts_with('.') || describes(&name) {
        return None;
    }
    let unpacked = PACKED.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    // Packed Parquet and packed text are not read.
    let formats = if unpacked == name { &FORMATS[..] } else { &FORMATS[..4] };
    let is = |ends: &&[&str]| ends.iter().any(|end| unpacked.ends_with(end));
    formats.iter().position(is).filter(|&format| format > 0 || unpacked == name)
}

/// True where `wanted` is a directory of the path or one of its words: `data/train-00000-of-00002`
/// is of `train`. Words are parted by all but letters, and by digits.
fn names(path: &str, wanted: &str) -> bool {
    let is = |part: &str| part.eq_ignore_ascii_case(wanted);
    path.split('/').any(is) || path.split(|c: char| !c.is_alphabetic()).any(is)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, files: &[&str], expected: Result<&[&str], &str>) {
        let repo: RepoId = name.parse().unwrap();
        let siblings: Vec<Sibling> =
            files.iter().map(|path| Sibling { path: (*path).to_owned(), size: Some(1) }).collect();
        let found = choose(&repo, &siblings);
        match (found, expected) {
            (Ok(found), Ok(expected)) => {
                let paths: Vec<&str> = found.iter().map(|file| file.path.as_str()).collect();
                assert_eq!(paths, expected);
            }
            (Err(error), Err(part)) => {
                let message = error.to_string();
                assert!(message.contains(part), "`{part}` is not in: {message}");
            }
            (found, expected) => panic!("{found:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn a_split_is_found_by_its_name() {
        let files = [
            "README.md",
            "dataset_infos.json",
            "data/test-00000-of-00001.parquet",
            "data/train-00001-of-00002.parquet",
            "data/train-00000-of-00002.parquet",
        ];
        let train = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"];
        check("a/b", &files, Ok(&train));
        check("a/b:train", &files, Ok(&train));
        check("a/b:test", &files, Ok(&files[2..3]));
        check("a/b:data/test-00000-of-00001.parquet", &files, Ok(&files[2..3]));
        check("a/b:validation", &files, Err("no file that `validation` names"));
        check("a/b", &["README.md", "a.py", "dataset_info.json"], Err("no .parquet"));
        check("a/b", &["x.jsonl.gz", "x.parquet.gz"], Ok(&["x.jsonl.gz"]));
        check("a/b", &["train.txt", "train.jsonl"], Ok(&["train.jsonl"]));
        check("a/b", &["training.jsonl"], Ok(&["training.jsonl"]));
    }

    #[test]
    fn a_configuration_must_be_chosen() {
        let files = ["de/train-0.parquet", "en/test-0.parquet", "en/train-0.parquet"];
        check("a/b", &files, Err("  de/train-0.parquet\n  en/train-0.parquet"));
        check("a/b:en", &files, Ok(&files[1..]));
        check("a/b:en/train", &files, Ok(&files[2..]));
    }

    #[test]
    fn shards_are_taken_until_they_are_enough() {
        let file = |size| Sibling { path: String::new(), size };
        let files = [file(Some(ENOUGH / 2)), file(Some(ENOUGH / 2)), file(Some(1)), file(None)];
        let all: Vec<&Sibling> = files.iter().collect();
        assert_eq!(enough(&all, ENOUGH).len(), 2);
        assert_eq!(enough(&all[2..], ENOUGH).len(), 2);
        assert_eq!(enough(&all[..1], ENOUGH).len(), 1);
        assert_eq!(enough(&all, u64::MAX).len(), 4);
    }
}
