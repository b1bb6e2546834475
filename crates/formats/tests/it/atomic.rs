//! Output appears whole or not at all.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use bevel_base::DType;
use bevel_formats::gguf::{GgufFile, GgufWriter, Metadata};
use bevel_formats::{AtomicFile, Error};

use crate::support::{check_error, names_in, pattern, spec};

#[test]
fn the_old_content_stays_until_the_new_one_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.json");
    fs::write(&path, "old").unwrap();
    let mut file = AtomicFile::create(&path).unwrap();
    file.write_all(b"new").unwrap();
    file.flush().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    let names = names_in(directory.path());
    assert_eq!(names.len(), 2);
    assert!(names[1].starts_with("out.json.") && names[1].ends_with(".partial"), "{names:?}");
    file.finish().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(names_in(directory.path()), ["out.json"]);
}

#[test]
fn what_a_killed_process_of_the_same_number_left_is_in_nobodys_way() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.json");
    let left = (0..500).map(|count| format!("out.json.{}-{count}.partial", std::process::id()));
    let left: Vec<PathBuf> = left.map(|name| directory.path().join(name)).collect();
    left.iter().for_each(|path| fs::write(path, "left").unwrap());
    let mut file = AtomicFile::create(&path).unwrap();
    file.write_all(b"new").unwrap();
    file.finish().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert!(left.iter().all(|path| fs::read(path).unwrap() == b"left"));
}

#[test]
fn dropped_files_leave_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.json");
    let mut file = AtomicFile::create(&path).unwrap();
    file.write_all(b"new").unwrap();
    drop(file);
    assert_eq!(names_in(directory.path()), [""; 0]);
}

#[test]
fn two_writers_of_one_file_do_not_mix() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.json");
    let mut first = AtomicFile::create(&path).unwrap();
    let mut second = AtomicFile::create(&path).unwrap();
    first.write_all(b"first").unwrap();
    second.write_all(b"second").unwrap();
    second.finish().unwrap();
    first.finish().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"first");
}

#[test]
fn places_that_cannot_be_written() {
    let directory = tempfile::tempdir().unwrap();
    check_error(AtomicFile::create(directory.path()), &["cannot write", "is a directory"]);
    let missing = directory.path().join("no/out.json");
    check_error(
        AtomicFile::create(&missing),
        &["no/out.json`", "no directory `", "/no`; create it"],
    );
    check_error(AtomicFile::create(Path::new("..")), &["`..`", "is a directory"]);
}

#[test]
fn full_disks_are_called_that() {
    let error = |kind: io::ErrorKind| Error::Io {
        action: "write",
        path: "out.gguf".into(),
        source: kind.into(),
    };
    let message = error(io::ErrorKind::StorageFull).to_string();
    assert!(
        message.starts_with("cannot write `out.gguf`: the disk is full (no space left"),
        "{message}"
    );
    assert!(error(io::ErrorKind::QuotaExceeded).to_string().contains("quota"));
}

/// Where [`writes_a_megabyte`] writes when it runs as a child.
const DIRECTORY: &str = "BEVEL_TEST_DIRECTORY";

#[test]
fn writes_a_megabyte() {
    let own = tempfile::tempdir().unwrap();
    let directory = std::env::var_os(DIRECTORY).map_or(own.path().to_owned(), PathBuf::from);
    let path = directory.join("out.gguf");
    let data = pattern(0, 1 << 20);
    if let Err(error) = write(&path, &data) {
        panic!("{error}");
    }
    let file = GgufFile::open(&path).unwrap();
    assert!(file.tensor("big").unwrap().data() == data);
}

fn write(path: &Path, data: &[u8]) -> bevel_formats::Result<()> {
    let tensor = [spec("big", DType::I8, [data.len()])];
    let mut writer = GgufWriter::create(path, &Metadata::new(), &tensor, None)?;
    for piece in data.chunks(10_000) {
        writer.write("big", piece)?;
    }
    writer.finish().map(drop)
}

/// Runs the test above in a process whose files may not grow past 64 KiB, which stops writes like a
/// full disk does and needs no privileges.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_file_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("out.gguf"), "old").unwrap();
    // With the signal ignored, a write past the limit fails with EFBIG.
    let output = Command::new("sh")
        .args(["-c", r#"trap '' XFSZ; ulimit -f 64; exec "$0" "$@""#])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "atomic::writes_a_megabyte", "--nocapture"])
        .env(DIRECTORY, directory.path())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("out.gguf`: the file grows past what the file system"), "{text}");
    assert_eq!(names_in(directory.path()), ["out.gguf"]);
    assert_eq!(fs::read(directory.path().join("out.gguf")).unwrap(), b"old");
}
