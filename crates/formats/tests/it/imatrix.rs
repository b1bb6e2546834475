//! Importance matrices, against files by `llama-imatrix` and by the `gguf` package.

use std::fs;
use std::path::{Path, PathBuf};

use bevel_formats::imatrix::{Imatrix, ImatrixEntry};

use crate::support::{check_error, golden};

fn read(name: &str) -> Imatrix {
    Imatrix::read(&golden(&format!("imatrix/{name}"))).unwrap()
}

#[test]
fn the_numbers_are_those_that_the_gguf_package_reads() {
    let found = read("austen.gguf");
    let text = fs::read(golden("imatrix/austen.json")).unwrap();
    let expected: serde_json::Map<_, _> = serde_json::from_slice(&text).unwrap();
    assert_eq!(found.entries.len(), 28);
    assert_eq!(found.entries.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, expected) in &expected {
        let entry = &found.entries[name];
        assert_eq!(entry.sums.len() as u64, expected["columns"].as_u64().unwrap(), "{name}");
        assert_eq!(entry.counts, [expected["count"].as_u64().unwrap()], "{name}");
        assert_eq!(entry.sums[0], expected["first"].as_f64().unwrap() as f32, "{name}");
        let sum: f64 = entry.sums.iter().map(|&sum| f64::from(sum)).sum();
        let wanted = expected["sum"].as_f64().unwrap();
        assert!((sum - wanted).abs() < 1e-9 * wanted, "{name}: {sum} {wanted}");
    }
    assert_eq!((found.datasets.as_slice(), found.chunks), (["tour.txt".to_owned()].as_slice(), 3));
    assert_eq!(found.chunk_size, 64);
}

#[test]
fn both_formats_say_the_same() {
    let (new, old) = (read("austen.gguf"), read("austen.dat"));
    assert_eq!((old.chunks, old.chunk_size, &old.datasets), (3, 0, &new.datasets));
    assert!(new.entries.keys().eq(old.entries.keys()));
    for (name, entry) in &new.entries {
        let pairs = entry.mean_squares().into_iter().zip(old.entries[name].mean_squares());
        for (a, b) in pairs {
            assert!((a - b).abs() <= 3e-7 * a, "{name}: {a} {b}");
        }
    }
}

#[test]
fn bytes_are_those_of_llama_cpp() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out");
    let bytes = |name: &str| fs::read(golden(&format!("imatrix/{name}"))).unwrap();
    for (from, legacy, expected) in [
        ("austen.gguf", false, "austen.gguf"),
        ("austen.gguf", true, "austen.dat"),
        ("austen.dat", true, "austen.dat"),
    ] {
        let found = read(from);
        match legacy {
            true => found.write_legacy(&path).unwrap(),
            false => found.write(&path).unwrap(),
        }
        assert!(fs::read(&path).unwrap() == bytes(expected), "{from} to {expected}");
    }
}

#[test]
fn experts_have_counts_of_their_own() {
    let found = read("experts.gguf");
    assert_eq!((found.chunks, found.chunk_size), (7, 512));
    assert_eq!(found.datasets, ["first.txt", "second.txt"]);
    let importance = |name, matrices, columns| found.importance(name, matrices, columns);
    let means = [0.5, 1.0, 1.5, 2.0, 2.0, 4.0, 6.0, 8.0, 1.0, 1.0, 1.0, 1.0];
    assert_eq!(importance("blk.0.ffn_up_exps.weight", 3, 4).unwrap().unwrap(), means);
    assert_eq!(
        importance("blk.0.attn_q.weight", 1, 4).unwrap().unwrap(),
        [0.2, 0.4, 0.6, 0.8].map(|m: f32| m)
    );
    assert_eq!(importance("output.weight", 1, 4), Ok(None));
    check_error(importance("blk.0.attn_q.weight", 1, 8), &["attn_q", "4 columns", "1 × 8"]);

    // Through both formats: the older one keeps the means, not the counts.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("experts");
    found.write(&path).unwrap();
    let mut again = Imatrix::read(&path).unwrap();
    again.entries.sort_by(|a, _, b, _| b.cmp(a));
    assert_eq!(again, found);
    found.write_legacy(&path).unwrap();
    let again = Imatrix::read(&path).unwrap();
    assert_eq!(again.importance("blk.0.ffn_up_exps.weight", 3, 4).unwrap().unwrap(), means);
    assert_eq!(again.datasets, ["second.txt"]);
}

#[test]
fn what_cannot_be_written_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.gguf");
    let check = |entry: Option<ImatrixEntry>, parts: &[&str]| {
        let entries = entry.map(|entry| ("w".to_owned(), entry)).into_iter().collect();
        let imatrix = Imatrix { entries, ..Imatrix::default() };
        check_error(imatrix.write(&path), parts);
        check_error(imatrix.write_legacy(&path), parts);
        assert!(!path.exists());
    };
    check(None, &["a.gguf", "no entries"]);
    check(Some(ImatrixEntry::dense(vec![], 1)), &["`w`", "0 sums"]);
    check(Some(ImatrixEntry::dense(vec![1.0, f32::NAN], 1)), &["`w`", "sum 1 is NaN"]);
    let three = ImatrixEntry { sums: vec![1.0; 4], counts: vec![1; 3] };
    check(Some(three), &["4 sums", "3 counts"]);
}

/// Writes `bytes`, which reading must refuse with all of `parts`.
#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) {
    check_error(Imatrix::parse(Path::new("bad.dat"), bytes), parts);
}

#[test]
fn every_truncation_of_the_older_format_is_an_error() {
    let bytes = fs::read(golden("imatrix/austen.dat")).unwrap();
    // The text's name may be missing, with or without the chunks.
    let tail = "tour.txt".len() + 4;
    for len in (0..bytes.len()).filter(|&len| len % 97 == 0 || bytes.len() - len < 64) {
        let whole = len == bytes.len() - tail || len == bytes.len() - tail - 4;
        let parsed = Imatrix::parse(Path::new("cut.dat"), &bytes[..len]);
        assert_eq!(parsed.is_ok(), whole, "{len} of {} bytes", bytes.len());
    }
}

#[test]
fn damaged_files_are_named() {
    let entry = |name: &str, calls: i32, values: i32, data: &[f32]| {
        let mut out = (name.len() as i32).to_le_bytes().to_vec();
        out.extend(name.as_bytes());
        out.extend(calls.to_le_bytes());
        out.extend(values.to_le_bytes());
        data.iter().for_each(|value| out.extend(value.to_le_bytes()));
        out
    };
    let file = |entries: &[Vec<u8>]| {
        let mut out = (entries.len() as i32).to_le_bytes().to_vec();
        entries.iter().for_each(|entry| out.extend(entry));
        out
    };
    refused(b"", &["bad.dat", "importance matrix", "empty"]);
    refused(b"some text that is no matrix", &["begins with"]);
    refused(&i32::MAX.to_le_bytes(), &["importance matrix"]);
    refused(&file(&[entry("w", 1, i32::MAX, &[1.0])]), &["`w`", "4 follow", "truncated"]);
    refused(&file(&[entry("w", 1, -1, &[1.0])]), &["`w`", "-1"]);
    refused(&file(&[entry("w", -1, 1, &[1.0])]), &["`w`", "-1"]);
    refused(&file(&[entry("w", 1, 1, &[f32::INFINITY])]), &["`w`", "inf"]);
    refused(&file(&[entry("w", 1, 0, &[1.0])]), &["bad.dat"]);
    let twice = entry("w", 1, 1, &[1.0]);
    refused(&file(&[twice.clone(), twice]), &["`w`", "twice"]);
    // Zero chunks: the values are means already.
    let means = Imatrix::parse(Path::new("a"), &file(&[entry("w", 0, 1, &[3.0])])).unwrap();
    assert_eq!(means.entries["w"].mean_squares(), [3.0]);
}

#[test]
fn other_gguf_files_are_no_importance_matrices() {
    let model: PathBuf = golden("every.gguf");
    check_error(Imatrix::read(&model), &["every.gguf", "in_sum2", "llama-imatrix"]);
    let bytes = fs::read(golden("imatrix/experts.gguf")).unwrap();
    let replaced = |from: &[u8], to: &[u8]| {
        let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
        let mut out = bytes.clone();
        out[at..at + to.len()].copy_from_slice(to);
        out
    };
    refused(&replaced(b"weight.counts", b"weight.countz"), &["ffn_up", "without `.counts`"]);
    refused(&replaced(b"weight.in_sum2", b"weight.in_sum3"), &["ffn_up", "without `.in_sum2`"]);
    refused(&replaced(&5f32.to_le_bytes(), &(-1f32).to_le_bytes()), &["ffn_up", "-1"]);
}
