//! Parquet, against files by `pyarrow` and `datasets`.

use std::fs;
use std::path::{Path, PathBuf};

use bevel_formats::parquet::{ParquetFile, parse_records};
use serde_json::{Value, json};

use crate::support::{check_error, golden};

const FILES: [&str; 6] = [
    "plain",
    "dictionary-snappy",
    "version2-zstd",
    "delta-gzip",
    "lengths-version2",
    "small-pages",
];

fn path(name: &str) -> PathBuf {
    golden(&format!("parquet/{name}.parquet"))
}

/// The rows as `pyarrow` has them.
fn expected() -> Vec<Value> {
    serde_json::from_slice(&fs::read(golden("parquet/rows.json")).unwrap()).unwrap()
}

fn all(bytes: &[u8]) -> Result<Vec<Value>, bevel_formats::Error> {
    let mut rows = Vec::new();
    parse_records(Path::new("a.parquet"), bytes, 1000, &mut |row| rows.push(row))?;
    Ok(rows)
}

#[test]
fn every_encoding_gives_the_rows_of_pyarrow() {
    let expected = expected();
    for name in FILES {
        let file = ParquetFile::open(&path(name)).unwrap();
        assert_eq!(file.rows(), 40);
        assert_eq!(file.text_columns(), ["text", "messages", "tags", "needed"], "{name}");
        let fields = ["text", "messages", "tags", "needed"];
        let rows: Vec<Value> = file.records(&fields).unwrap().map(Result::unwrap).collect();
        assert_eq!(rows.len(), expected.len(), "{name}");
        for (i, (row, expected)) in rows.iter().zip(&expected).enumerate() {
            assert_eq!(row, expected, "row {i} of {name}");
        }
    }
}

#[test]
fn only_the_columns_asked_for_are_read() {
    let file = ParquetFile::open(&path("small-pages")).unwrap();
    let rows: Vec<Value> =
        file.records(&["needed", "nowhere"]).unwrap().map(Result::unwrap).collect();
    assert_eq!(rows[39], json!({"needed": "row 39"}));
    check_error(
        file.records(&["id", "nowhere"]),
        &["small-pages.parquet", "`id` or `nowhere`", "\"text\", \"messages\""],
    );
}

#[test]
fn conversations_as_the_hub_has_them() {
    let file = ParquetFile::open(&path("datasets")).unwrap();
    let rows: Vec<Value> = file.records(&["messages"]).unwrap().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 20);
    let turns = json!([
        {"content": "question 7", "role": "user"},
        {"content": "answer 7", "role": "assistant"},
    ]);
    assert_eq!(rows[7], json!({ "messages": turns }));
}

#[test]
fn what_is_not_read_is_said() {
    let file = ParquetFile::open(&path("lz4")).unwrap();
    let first = file.records(&["text"]).unwrap().next().unwrap();
    check_error(first, &["lz4.parquet", "`text`", "LZ4", "zstd"]);
    let parse = |bytes: &[u8]| all(bytes);
    check_error(parse(b""), &["a.parquet", "empty"]);
    check_error(parse(b"{\"text\": 1}"), &["no Parquet file"]);
    check_error(parse(b"PAR1PAR1"), &["its end is missing"]);
    check_error(parse(b"PARE____PARE"), &["encrypted"]);
    check_error(parse(b"PAR1\xff\xff\xff\xffPAR1"), &["4294967295 bytes"]);
    check_error(parse(b"PAR1\0\x01\0\0\0PAR1"), &["no schema"]);
}

#[test]
fn every_truncation_is_an_error() {
    for name in ["small-pages", "version2-zstd"] {
        let bytes = fs::read(path(name)).unwrap();
        for len in (0..bytes.len()).step_by(13) {
            assert!(all(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
            // A whole footer after pages of which some are missing.
            let mut cut = bytes.clone();
            cut.drain(4..4 + len.min(bytes.len() / 2));
            let _ = all(&cut);
        }
    }
}
