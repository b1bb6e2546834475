use std::path::{Path, PathBuf};

use bevel_base::DType;
use bevel_formats::TensorSpec;

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

/// The bytes that the goldens put into tensor `t`.
pub(crate) fn pattern(t: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (7 * i + t) as u8).collect()
}

pub(crate) fn spec<const N: usize>(name: &str, dtype: DType, shape: [usize; N]) -> TensorSpec {
    TensorSpec::new(name, dtype, shape)
}

/// Names in a directory, sorted.
pub(crate) fn names_in(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Checks that a result is an error whose message has all of `parts`.
#[track_caller]
pub(crate) fn check_error<T, E: std::fmt::Display>(result: Result<T, E>, parts: &[&str]) {
    let message = match result {
        Ok(_) => panic!("expected an error with {parts:?}"),
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}
