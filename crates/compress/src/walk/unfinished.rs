//! What a run that may take hours keeps on the disk, so that a run that was killed goes on where it
//! was and ends in the same bytes.
//!
//! Beside the output lies a directory `OUTPUT.unfinished`:
//! ```text
//! run.json              what is being done: a run that does something else refuses to go on
//! allocation.json       the types that a budget was spent on
//! lock                  held by the program that is at it
//! part-0003.safetensors what became of the tensors of part 3: a layer, or the output head
//! streams-0004          the residual streams that part 4 begins with
//! full-0004             those of the uncompressed model, where it walks beside
//! ```
//! A part is done when its file has its name, which it gets last. The streams lie there before.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use bevel_base::grouped::{Coding, Zeros};
use bevel_base::{DType, GroupedMatrix};
use bevel_formats::TensorSpec;
use bevel_formats::safetensors::{Checkpoint, SafetensorsWriter};
use bevel_kernels::Cpu;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::{Linear, Walk};
use crate::provenance::hexadecimal;
use crate::solve::{Form, SolveReport};
use crate::{Calibration, Error, Provenance, Result};

/// What a run does: two runs that agree in this give the same bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fingerprint {
    /// Version of bevel.
    pub(crate) version: String,
    /// Hash of the model's files.
    pub(crate) source_sha256: String,
    /// The recipe, as TOML.
    pub(crate) recipe: String,
    /// Hash of the calibration tokens.
    pub(crate) calibration_sha256: String,
    /// The instruction set: the last bits of activations are its own.
    pub(crate) instructions: String,
}

/// The directory of an unfinished run.
#[derive(Debug)]
pub(crate) struct Unfinished {
    dir: PathBuf,
    /// Parts that are done.
    done: usize,
    /// The reports of the parts that this run did: with their seconds, which files do not keep.
    reports: Reports,
}

/// Reports by tensor and part of it.
type Reports = HashMap<(String, Option<usize>), SolveReport>;

/// What became of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) linear: Linear,
    pub(crate) form: Form,
    pub(crate) report: SolveReport,
}

impl Outcome {
    /// False where the matrix was changed by folding and not quantized.
    pub(crate) fn is_solved(&self) -> bool {
        !matches!(self.form, Form::Packed { dtype: DType::F32, .. })
    }
}

/// What a part's file says about a matrix beside its values.
#[derive(Serialize, Deserialize)]
struct Saved {
    name: String,
    part: Option<usize>,
    rows: usize,
    cols: usize,
    global_scale: Option<f32>,
    /// The packed type, or what codes mean.
    form: SavedForm,
    report: SavedReport,
}

/// A [`SolveReport`] without the seconds: they were another run's.
#[derive(Serialize, Deserialize)]
struct SavedReport {
    error: f64,
    rtn_error: Option<f64>,
    tokens: u64,
    fell_back: bool,
    damping_retries: usize,
    dead_columns: usize,
}

impl From<&SolveReport> for SavedReport {
    fn from(report: &SolveReport) -> Self {
        let SolveReport {
            error, rtn_error, tokens, fell_back, damping_retries, dead_columns, ..
        } = *report;
        Self { error, rtn_error, tokens, fell_back, damping_retries, dead_columns }
    }
}

impl From<&SavedReport> for SolveReport {
    fn from(saved: &SavedReport) -> Self {
        let SavedReport { error, rtn_error, tokens, fell_back, damping_retries, dead_columns } =
            *saved;
        let seconds = Vec::new();
        Self { error, rtn_error, tokens, fell_back, damping_retries, dead_columns, seconds }
    }
}

#[derive(Serialize, Deserialize)]
enum SavedForm {
    Packed(String),
    Integer { bits: u32, group_size: usize },
    Affine { bits: u32, group_size: usize },
    Levels { levels: [f32; 16], group_size: usize },
    Float8 { group_size: usize },
}

const META: &str = "bevel.part";

impl Unfinished {
    /// The directory for an output; one that an unfinished run left is taken up, or with `restart`
    /// emptied.
    ///
    /// # Errors
    /// [`Error::OtherRun`] where the unfinished run did something else, [`Error::Io`].
    pub(crate) fn open(out: &Path, fingerprint: &Fingerprint, restart: bool) -> Result<Self> {
        let dir = directory(out);
        let record = dir.join("run.json");
        if restart {
            clear(&dir)?;
        }
        match fs::read(&record) {
            Ok(text) => {
                let found: Option<Fingerprint> = serde_json::from_slice(&text).ok();
                if let Some(what) = found.map_or(Some("record"), |f| f.differs(fingerprint)) {
                    return Err(Error::OtherRun { dir, what });
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
                let text = serde_json::to_vec_pretty(fingerprint).expect("strings serialize");
                write_atomically(&record, &text)?;
            }
            Err(error) => return Err(Error::io("read", &record)(error)),
        }
        let mut unfinished = Self { dir, done: 0, reports: Reports::new() };
        while unfinished.part(unfinished.done).is_file() {
            unfinished.done += 1;
        }
        // Sooner than after the hours that the rest takes.
        unfinished.results()?;
        Ok(unfinished)
    }

    /// Parts that are done.
    pub(crate) fn done(&self) -> usize {
        self.done
    }

    /// The directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Loads the streams that the next part begins with.
    pub(crate) fn resume(&self, walk: &mut Walk<'_>) -> Result<()> {
        let (streams, full) = self.streams(self.done);
        walk.resume(&streams, &full)
    }

    /// Keeps what became of the next part's tensors, and the streams after it.
    pub(crate) fn commit(&mut self, walk: &mut Walk<'_>, outcomes: &[Outcome]) -> Result<()> {
        let (streams, full) = self.streams(self.done + 1);
        walk.save(&streams, &full)?;
        save_part(&self.part(self.done), outcomes)?;
        let (old, old_full) = self.streams(self.done);
        for path in [old, old_full] {
            let _ = fs::remove_file(path);
        }
        self.done += 1;
        for Outcome { linear, report, .. } in outcomes {
            self.reports.insert((linear.name.clone(), linear.part), report.clone());
        }
        Ok(())
    }

    /// Opens what became of all parts, by tensor and expert.
    pub(crate) fn results(&self) -> Result<Results> {
        let (parts, places) = (Vec::new(), IndexMap::new());
        let mut results = Results { parts, places, reports: self.reports.clone() };
        for part in 0..self.done {
            results.add(&self.part(part))?;
        }
        Ok(results)
    }

    fn part(&self, index: usize) -> PathBuf {
        self.dir.join(format!("part-{index:04}.safetensors"))
    }

    fn streams(&self, part: usize) -> (PathBuf, PathBuf) {
        (self.dir.join(format!("streams-{part:04}")), self.dir.join(format!("full-{part:04}")))
    }
}

/// What a run found out before its walk, in the file `name` of its directory: taken from there, or
/// found by `find` in that directory and kept there.
///
/// # Errors
/// [`Error::OtherRun`] where another run left the file, [`Error::Io`], and those of `find`.
pub(crate) fn kept<T: Serialize + for<'de> Deserialize<'de>>(
    out: &Path,
    name: &str,
    fingerprint: &Fingerprint,
    restart: bool,
    find: impl FnOnce(&Path) -> Result<T>,
) -> Result<T> {
    #[derive(Serialize, Deserialize)]
    struct Kept<T> {
        run: Fingerprint,
        found: T,
    }

    let dir = directory(out);
    let path = dir.join(name);
    if restart {
        clear(&dir)?;
    }
    if let Ok(text) = fs::read(&path) {
        let Kept { run, found } =
            serde_json::from_slice(&text).map_err(|_| Error::BrokenPart(path))?;
        return match run.differs(fingerprint) {
            Some(what) => Err(Error::OtherRun { dir, what }),
            None => Ok(found),
        };
    }
    if dir.join("run.json").exists() {
        return Err(Error::OtherRun { dir, what: "recipe" });
    }
    fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    let found = find(&dir)?;
    let kept = Kept { run: fingerprint.clone(), found };
    write_atomically(&path, &serde_json::to_vec(&kept).expect("names and numbers serialize"))?;
    Ok(kept.found)
}

/// Throws away what an unfinished run left, but for the lock of the one that does so.
fn clear(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::io("read", dir))?,
    };
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| !path.ends_with(LOCK)) {
        fs::remove_file(&path).map_err(Error::io("remove", &path))?;
    }
    Ok(())
}

const LOCK: &str = "lock";

/// The right to an output's unfinished run: two programs at the same would take each other's files
/// away.
#[derive(Debug)]
pub(crate) struct Claim {
    dir: PathBuf,
    /// Locked as long as it is open.
    _lock: fs::File,
}

impl Claim {
    /// Takes the right.
    ///
    /// # Errors
    /// [`Error::Busy`] where another program has it, [`Error::Io`].
    pub(crate) fn take(out: &Path) -> Result<Self> {
        let dir = directory(out);
        fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        let path = dir.join(LOCK);
        let lock = fs::File::create(&path).map_err(Error::io("create", &path))?;
        // Where a file system has no locks, users have to take care themselves.
        match lock.try_lock() {
            Err(fs::TryLockError::WouldBlock) => Err(Error::Busy(out.to_owned())),
            _ => Ok(Self { dir, _lock: lock }),
        }
    }
}

impl Drop for Claim {
    /// Leaves nothing where there is nothing to go on with.
    fn drop(&mut self) {
        let is_alone = fs::read_dir(&self.dir).is_ok_and(|entries| entries.count() == 1);
        if is_alone {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Removes what an output's unfinished run left, if anything.
pub(crate) fn remove_kept(out: &Path) -> Result<()> {
    let dir = directory(out);
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", &dir)(error))
        }
        _ => Ok(()),
    }
}

/// Where the unfinished run of an output lies.
pub(crate) fn directory(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(".unfinished");
    out.with_file_name(name)
}

impl Fingerprint {
    pub(crate) fn new(provenance: &Provenance, calibration: &Calibration, cpu: &Cpu) -> Self {
        let Provenance { version, source_sha256, recipe } = provenance.clone();
        let calibration_sha256 = hexadecimal(&calibration.fingerprint);
        let instructions = cpu.isa().to_string();
        Self { version, source_sha256, recipe, calibration_sha256, instructions }
    }

    /// What another run does differently.
    fn differs(&self, other: &Self) -> Option<&'static str> {
        let parts = [
            ("version of bevel", &self.version, &other.version),
            ("model", &self.source_sha256, &other.source_sha256),
            ("recipe", &self.recipe, &other.recipe),
            ("calibration data", &self.calibration_sha256, &other.calibration_sha256),
            ("instruction set (BEVEL_ISA chooses it)", &self.instructions, &other.instructions),
        ];
        parts.into_iter().find(|(_, a, b)| a != b).map(|(what, ..)| what)
    }
}

fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let mut file = bevel_formats::AtomicFile::create(path)?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    Ok(file.finish()?)
}

/// The tensors of a part's file: name, type, shape and bytes.
type Blobs = Vec<(TensorSpec, Vec<u8>)>;

fn save_part(path: &Path, outcomes: &[Outcome]) -> Result<()> {
    let mut blobs = Blobs::new();
    let saved: Vec<Saved> =
        outcomes.iter().enumerate().map(|(i, outcome)| save(i, outcome, &mut blobs)).collect();
    let saved = serde_json::to_string(&saved).expect("names and numbers serialize");
    let metadata = IndexMap::from([(META.to_owned(), saved)]);
    let specs: Vec<TensorSpec> = blobs.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::create(path, &metadata, &specs, None)?;
    for (spec, bytes) in &blobs {
        writer.write(&spec.name, bytes)?;
    }
    writer.finish()?;
    Ok(())
}

fn save(index: usize, outcome: &Outcome, blobs: &mut Blobs) -> Saved {
    let mut put = |what: &str, dtype: DType, bytes: Vec<u8>| {
        let len = bytes.len() / dtype.block_bytes();
        blobs.push((TensorSpec::new(format!("{index}.{what}"), dtype, [len]), bytes));
    };
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut global = None;
    let form = match &outcome.form {
        Form::Packed { dtype, bytes } => {
            put("bytes", DType::U8, bytes.clone());
            SavedForm::Packed(dtype.name().to_owned())
        }
        Form::Grouped { matrix, global_scale } => {
            put("codes", DType::U8, matrix.codes.clone());
            put("scales", DType::F32, floats(&matrix.scales));
            if let Some(group_of) = &matrix.group_of {
                let bytes = group_of.iter().flat_map(|g| g.to_le_bytes()).collect();
                put("group_of", DType::U32, bytes);
            }
            global = *global_scale;
            let group_size = matrix.group_size;
            match &matrix.coding {
                Coding::Integer { bits, zeros } => {
                    if let Zeros::Each(zeros) = zeros {
                        put("zeros", DType::U8, zeros.clone());
                    }
                    SavedForm::Integer { bits: *bits, group_size }
                }
                Coding::Affine { bits, minima } => {
                    put("minima", DType::F32, floats(minima));
                    SavedForm::Affine { bits: *bits, group_size }
                }
                Coding::Levels(levels) => SavedForm::Levels { levels: *levels, group_size },
                Coding::Float8 => SavedForm::Float8 { group_size },
            }
        }
    };
    let Linear { name, part, rows, cols } = outcome.linear.clone();
    Saved { name, part, rows, cols, global_scale: global, form, report: (&outcome.report).into() }
}

/// What became of a run's matrices, read when asked for.
pub(crate) struct Results {
    parts: Vec<Checkpoint>,
    /// File, number in it, and what it says.
    places: IndexMap<(String, Option<usize>), (usize, usize, Saved)>,
    reports: Reports,
}

impl Results {
    fn add(&mut self, path: &Path) -> Result<()> {
        let file = Checkpoint::open(path).map_err(|_| Error::BrokenPart(path.to_owned()))?;
        let broken = || Error::BrokenPart(path.to_owned());
        let text = file.metadata().get(META).ok_or_else(broken)?;
        let saved: Vec<Saved> = serde_json::from_str(text).map_err(|_| broken())?;
        for (number, saved) in saved.into_iter().enumerate() {
            let key = (saved.name.clone(), saved.part);
            self.places.insert(key, (self.parts.len(), number, saved));
        }
        self.parts.push(file);
        Ok(())
    }

    /// What became of a tensor's matrices, in order; nothing where it was left alone.
    pub(crate) fn all(&self, name: &str) -> Result<Vec<Outcome>> {
        let mut parts: Vec<Option<usize>> =
            self.places.keys().filter(|(n, _)| n == name).map(|(_, part)| *part).collect();
        parts.sort_unstable();
        parts.into_iter().filter_map(|part| self.get(name, part).transpose()).collect()
    }

    /// What became of a matrix. `None` where it was left alone.
    pub(crate) fn get(&self, name: &str, part: Option<usize>) -> Result<Option<Outcome>> {
        let key = (name.to_owned(), part);
        let Some((file, number, saved)) = self.places.get(&key) else { return Ok(None) };
        let file = &self.parts[*file];
        let bytes = |what: &str| -> Result<Vec<u8>> {
            Ok(file.tensor(&format!("{number}.{what}"))?.data().to_vec())
        };
        let floats = |what: &str| -> Result<Vec<f32>> {
            Ok(bytes(what)?.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
        };
        let has = |what: &str| file.tensors().contains_key(&format!("{number}.{what}"));
        let wrong = |source| Error::Tensor { tensor: name.to_owned(), source };
        let grouped = |group_size: usize, coding: Coding| -> Result<Form> {
            let group_of = match has("group_of") {
                true => Some(
                    bytes("group_of")?
                        .as_chunks()
                        .0
                        .iter()
                        .map(|&b| u32::from_le_bytes(b))
                        .collect(),
                ),
                false => None,
            };
            let matrix = GroupedMatrix {
                rows: saved.rows,
                cols: saved.cols,
                group_size,
                coding,
                codes: bytes("codes")?,
                scales: floats("scales")?,
                group_of,
            };
            let matrix = matrix.checked().map_err(wrong)?;
            Ok(Form::Grouped { matrix, global_scale: saved.global_scale })
        };
        let form = match &saved.form {
            SavedForm::Packed(dtype) => {
                Form::Packed { dtype: dtype.parse().map_err(wrong)?, bytes: bytes("bytes")? }
            }
            SavedForm::Integer { bits, group_size } => {
                let zeros = match has("zeros") {
                    true => Zeros::Each(bytes("zeros")?),
                    false => Zeros::Symmetric,
                };
                grouped(*group_size, Coding::Integer { bits: *bits, zeros })?
            }
            SavedForm::Affine { bits, group_size } => {
                grouped(*group_size, Coding::Affine { bits: *bits, minima: floats("minima")? })?
            }
            SavedForm::Levels { levels, group_size } => {
                grouped(*group_size, Coding::Levels(*levels))?
            }
            SavedForm::Float8 { group_size } => grouped(*group_size, Coding::Float8)?,
        };
        let linear = Linear { name: name.to_owned(), part, rows: saved.rows, cols: saved.cols };
        let report = self.reports.get(&key).cloned();
        let report = report.unwrap_or_else(|| (&saved.report).into());
        Ok(Some(Outcome { linear, form, report }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(form: Form) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("part-0000.safetensors");
        let linear =
            |part| Linear { name: "blk.0.ffn_up.weight".to_owned(), part, rows: 2, cols: 4 };
        let outcomes = [Some(1), None].map(|part| Outcome {
            linear: linear(part),
            form: form.clone(),
            report: SolveReport::default(),
        });
        save_part(&path, &outcomes).unwrap();
        let (parts, places) = (Vec::new(), IndexMap::new());
        let mut results = Results { parts, places, reports: Reports::new() };
        results.add(&path).unwrap();
        for outcome in outcomes {
            let found = results.get(&outcome.linear.name, outcome.linear.part).unwrap();
            assert_eq!(found, Some(outcome));
        }
        assert_eq!(results.get("blk.0.ffn_up.weight", Some(0)).unwrap(), None);
    }

    #[test]
    fn parts_are_read_as_they_were_written() {
        check(Form::Packed { dtype: DType::Q8_0, bytes: (0..34).collect() });
        let matrix = |coding, group_of| {
            let matrix = GroupedMatrix {
                rows: 2,
                cols: 4,
                group_size: 2,
                coding,
                codes: vec![0, 1, 2, 3, 3, 2, 1, 0],
                scales: vec![0.5, 1.5, f32::MIN_POSITIVE, -2.0],
                group_of,
            };
            Form::Grouped { matrix, global_scale: Some(0.1) }
        };
        let minima = vec![1.0, -1.0, 0.1, 0.2];
        check(matrix(Coding::Integer { bits: 2, zeros: Zeros::Symmetric }, None));
        let zeros = Zeros::Each(vec![1, 2, 3, 0]);
        check(matrix(Coding::Integer { bits: 3, zeros }, Some(vec![1, 0, 1, 0])));
        check(matrix(Coding::Affine { bits: 4, minima }, None));
        check(matrix(Coding::Levels(std::array::from_fn(|i| i as f32 / 3.0)), None));
        check(matrix(Coding::Float8, None));
    }

    #[test]
    fn another_run_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("small.gguf");
        let text = |s: &str| s.to_owned();
        let print = Fingerprint {
            version: text("1"),
            source_sha256: text("a"),
            recipe: text("r"),
            calibration_sha256: text("c"),
            instructions: text("i"),
        };
        assert_eq!(Unfinished::open(&out, &print, false).unwrap().done(), 0);
        assert_eq!(Unfinished::open(&out, &print, false).unwrap().done(), 0);
        let other = Fingerprint { calibration_sha256: text("d"), ..print.clone() };
        let error = Unfinished::open(&out, &other, false).unwrap_err();
        assert!(matches!(error, Error::OtherRun { what: "calibration data", .. }), "{error}");
        assert_eq!(Unfinished::open(&out, &other, true).unwrap().done(), 0);
        assert!(Unfinished::open(&out, &print, false).is_err());
    }
}
