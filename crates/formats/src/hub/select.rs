//! Which of a repository's files make the model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::repo::is_safe_path;
use super::{Error, RepoId, Result};

/// A file of a repository: its path with `/`, and its size in bytes where the hub tells.
#[derive(Clone, Debug)]
pub(super) struct Sibling {
    pub(super) path: String,
    pub(super) size: Option<u64>,
}

/// The files to fetch, in this order.
#[derive(Debug)]
pub(super) enum Plan {
    /// A Hugging Face directory: the small files, then the weights.
    Directory { small: Vec<String>, weights: Weights },
    /// One GGUF model: one file, or the parts of a split one in order.
    Gguf(Vec<String>),
}

/// Where a directory's weights are.
#[derive(Debug)]
pub(super) enum Weights {
    /// In these files.
    Files(Vec<String>),
    /// In the shards that this index lists.
    Index(String),
}

/// Everything besides weights that bevel reads.
const SMALL: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "adapter_config.json",
];
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const PICKLES: [&str; 5] = [".bin", ".pt", ".pth", ".ckpt", ".pkl"];
/// The largest index that is read: a million tensors need less.
const INDEX_LIMIT: u64 = 256 << 20;

/// Chooses the files: safetensors with their configuration if there are any, else one GGUF model.
/// A selection in the name always means a GGUF.
pub(super) fn plan(repo: &RepoId, siblings: &[Sibling]) -> Result<Plan> {
    if let Some(file) = siblings.iter().find(|file| !is_safe_path(&file.path)) {
        return Err(Error::UnsafePath { repo: repo.to_string(), path: file.path.clone() });
    }
    let has = |name: &str| siblings.iter().any(|file| file.path == name);
    let top = |suffix: &'static str| {
        let paths = siblings.iter().map(|file| &file.path);
        paths.filter(move |path| path.ends_with(suffix) && !path.contains('/'))
    };
    if let Some(wanted) = repo.selection() {
        return choose(repo, wanted, &models(siblings)).map(Plan::Gguf);
    }
    let small = || SMALL.into_iter().filter(|name| has(name)).map(str::to_owned).collect();
    let weights = if has(INDEX) {
        Some(Weights::Index(INDEX.to_owned()))
    } else if has(SINGLE) {
        Some(Weights::Files(vec![SINGLE.to_owned()]))
    } else {
        let files: Vec<String> = top(".safetensors").cloned().collect();
        (!files.is_empty()).then_some(Weights::Files(files))
    };
    if let Some(weights) = weights {
        return Ok(Plan::Directory { small: small(), weights });
    }
    let models = models(siblings);
    match models.len() {
        0 => {}
        1 => return Ok(Plan::Gguf(whole(repo, &models[0])?)),
        _ => return Err(Error::ChooseGguf { repo: repo.to_string(), list: list(&models) }),
    }
    let is_pickle = |file: &&Sibling| PICKLES.iter().any(|suffix| file.path.ends_with(suffix));
    Err(match siblings.iter().find(is_pickle) {
        Some(file) => Error::PickleOnly { repo: repo.to_string(), file: file.path.clone() },
        None => Error::NoWeights { repo: repo.to_string(), files: siblings.len() },
    })
}

/// The shards that an index names, each once.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let path = || index.display().to_string();
    let bytes = std::fs::metadata(index).map_err(Error::io("read", index, 0))?.len();
    if bytes > INDEX_LIMIT {
        return Err(Error::Index { path: path(), why: format!("it is {bytes} bytes long") });
    }
    let text = std::fs::read(index).map_err(Error::io("read", index, 0))?;
    let parsed: Index = serde_json::from_slice(&text)
        .map_err(|error| Error::Index { path: path(), why: error.to_string() })?;
    let shards: BTreeSet<String> = parsed.weight_map.into_values().collect();
    match shards.iter().find(|shard| !is_safe_path(shard)) {
        Some(shard) => Err(Error::UnsafePath { repo: path(), path: shard.clone() }),
        None if shards.is_empty() => {
            Err(Error::Index { path: path(), why: "`weight_map` is empty".to_owned() })
        }
        None => Ok(shards.into_iter().collect()),
    }
}

/// One GGUF model of a repository.
struct Model<'a> {
    /// The path up to `.gguf`, without the `-00001-of-00003` of a split one.
    stem: &'a str,
    /// Its files in order.
    files: Vec<&'a Sibling>,
    /// Number of files it should have.
    parts: usize,
}

/// GGUF models by stem. Vision projectors (`mmproj`) and importance matrices are none.
fn models(siblings: &[Sibling]) -> Vec<Model<'_>> {
    let mut models = BTreeMap::<(&str, usize), Vec<&Sibling>>::new();
    for file in siblings {
        let Some(stem) = file.path.strip_suffix(".gguf") else { continue };
        let name = stem.rsplit('/').next().unwrap_or(stem).to_ascii_lowercase();
        if !name.contains("mmproj") && !name.contains("imatrix") {
            models.entry(without_part(stem)).or_default().push(file);
        }
    }
    let model = |((stem, parts), mut files): (_, Vec<_>)| {
        files.sort_by_key(|file: &&Sibling| &file.path);
        Model { stem, files, parts }
    };
    models.into_iter().map(model).collect()
}

/// `name-00001-of-00003` is part of `name`, of three.
fn without_part(stem: &str) -> (&str, usize) {
    let split = || {
        let (rest, total) = stem.rsplit_once("-of-")?;
        let (name, part) = rest.rsplit_once('-')?;
        let number = |text: &str| match text.len() {
            5 if text.bytes().all(|b| b.is_ascii_digit()) => text.parse::<usize>().ok(),
            _ => None,
        };
        number(part)?;
        Some((name, number(total)?))
    };
    split().unwrap_or((stem, 1))
}

/// The one model that a file name or a quantization means.
fn choose(repo: &RepoId, wanted: &str, models: &[Model<'_>]) -> Result<Vec<String>> {
    let by_file = |model: &&Model<'_>| model.files.iter().any(|file| file.path == wanted);
    let by_label = |model: &&Model<'_>| ends_with_label(model.stem, wanted);
    let mut found: Vec<&Model<'_>> = models.iter().filter(by_file).collect();
    if found.is_empty() {
        found = models.iter().filter(by_label).collect();
    }
    match found[..] {
        [model] => whole(repo, model),
        _ => Err(Error::NoSuchGguf {
            repo: repo.id().to_owned(),
            wanted: wanted.to_owned(),
            list: list(models),
        }),
    }
}

/// True where the stem's last words are the label: `model-Q4_K_M` ends with `q4_k_m`, while
/// `model-IQ4_XS` does not end with `Q4_XS`. A word begins after `-`, `.`, `_` or `/`.
fn ends_with_label(stem: &str, label: &str) -> bool {
    let Some(start) = stem.len().checked_sub(label.len()) else { return false };
    let at_boundary =
        || start == 0 || matches!(stem.as_bytes()[start - 1], b'-' | b'.' | b'_' | b'/');
    stem.is_char_boundary(start) && stem[start..].eq_ignore_ascii_case(label) && at_boundary()
}

/// A model's files, if none of a split one is missing.
fn whole(repo: &RepoId, model: &Model<'_>) -> Result<Vec<String>> {
    if model.files.len() != model.parts {
        return Err(Error::NoSuchGguf {
            repo: repo.id().to_owned(),
            wanted: format!("all {} parts of {}", model.parts, model.stem),
            list: list(std::slice::from_ref(model)),
        });
    }
    Ok(model.files.iter().map(|file| file.path.clone()).collect())
}

/// One model a line, with its size.
fn list(models: &[Model<'_>]) -> String {
    let line = |model: &Model<'_>| {
        let sizes = model.files.iter().map(|file| file.size);
        let size = sizes
            .sum::<Option<u64>>()
            .map_or(String::new(), |bytes| format!("  {:.2} GB", bytes as f64 / 1e9));
        let parts = match model.files.len() {
            1 => String::new(),
            n => format!("  ({n} of {} parts)", model.parts),
        };
        format!("  {}{size}{parts}", model.files[0].path)
    };
    if models.is_empty() {
        return "  no .gguf file".to_owned();
    }
    models.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_end_a_name_at_a_word() {
        for (stem, label, expected) in [
            ("SmolLM2-135M-Instruct-Q4_K_M", "q4_k_m", true),
            ("SmolLM2-135M-Instruct.Q4_1", "Q4_1", true),
            ("model_q4_0", "Q4_0", true),
            ("Q4_K_M/model-Q4_K_M", "Q4_K_M", true),
            ("model-Q4_K_M", "Q4_K", false),
            ("model-IQ4_XS", "Q4_XS", false),
            ("é", "Q4_K_M", false),
            ("aé", "x", false),
        ] {
            assert_eq!(ends_with_label(stem, label), expected, "{stem} {label}");
        }
    }

    #[test]
    fn split_names_are_one_model() {
        assert_eq!(without_part("dir/m-Q8_0-00002-of-00003"), ("dir/m-Q8_0", 3));
        assert_eq!(without_part("m-2-of-3"), ("m-2-of-3", 1));
        assert_eq!(without_part("m"), ("m", 1));
    }
}
