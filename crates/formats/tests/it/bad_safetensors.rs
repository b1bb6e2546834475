//! Damaged, hostile and mistaken safetensors files: each is an error that names file and tensor.

use std::fs;
use std::path::Path;

use bevel_base::DType;
use bevel_formats::safetensors::{Checkpoint, Header, SafetensorsWriter};
use indexmap::IndexMap;

use crate::support::{check_error, golden, names_in, spec};

/// A file with this header and this much data.
fn file(json: &str, data: usize) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes(), json.as_bytes(), &vec![0; data]].concat()
}

#[track_caller]
fn check(json: &str, data: usize, parts: &[&str]) {
    let result = Header::parse(Path::new("bad.safetensors"), &file(json, data));
    check_error(result, &[&["`bad.safetensors`"], parts].concat());
}

/// One tensor, `w`, with 8 bytes of data behind it.
#[track_caller]
fn check_tensor(dtype: &str, shape: &str, offsets: &str, parts: &[&str]) {
    let json = format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
    check(&json, 8, parts);
}

#[track_caller]
fn check_file(name: &str, content: &[u8], parts: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::write(&path, content).unwrap();
    check_error(Checkpoint::open(&path), &[&[name], parts].concat());
}

#[test]
fn good_bytes_are_good() {
    let json = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let header = Header::parse(Path::new("good.safetensors"), &file(json, 8)).unwrap();
    assert_eq!(header.tensors["w"].shape, [2].into());
}

#[test]
fn other_files() {
    check_file("empty.safetensors", b"", &["is empty"]);
    check_file("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1", &["git lfs pull"]);
    check_file("page.safetensors", b"<HTML><body>", &["web page"]);
    check_file("pytorch_model.bin", b"PK\x03\x04abcdefg", &["pickle", "can run any code"]);
    check_file(
        "old.pt",
        b"\x80\x02}q\x00.abcdefg",
        &["pickle", "convert the model to safetensors"],
    );
    check_file("noise.safetensors", &[7; 20], &["begins with the bytes"]);
    check_file("short.safetensors", &[7; 3], &["begins with the bytes"]);
    let gguf = fs::read(golden("every.gguf")).unwrap();
    check_file("g.safetensors", &gguf, &["it is a GGUF file"]);
    check_error(Checkpoint::open(Path::new("does/not/exist")), &["does/not/exist", "no such file"]);
}

#[test]
fn directories() {
    let directory = tempfile::tempdir().unwrap();
    check_error(Checkpoint::open(directory.path()), &["model.safetensors.index.json"]);
    fs::write(directory.path().join("pytorch_model.bin"), b"PK\x03\x04").unwrap();
    check_error(Checkpoint::open(directory.path()), &["pytorch_model.bin", "can run any code"]);
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = fs::read(golden("every.safetensors")).unwrap();
    for len in 0..bytes.len() {
        let result = Header::parse(Path::new("every.safetensors"), &bytes[..len]);
        check_error(result, &["`every.safetensors`"]);
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    let result = Header::parse(Path::new("every.safetensors"), &longer);
    check_error(result, &["tensors end at byte 1256", "1257 bytes"]);
}

#[test]
fn headers() {
    let len = |len: u64| [&len.to_le_bytes()[..], b"{}"].concat();
    let parse = |bytes: &[u8]| Header::parse(Path::new("bad.safetensors"), bytes);
    check_error(parse(&len(u64::MAX)), &["18446744073709551615", "100000000"]);
    check_error(parse(&len(3)), &["takes 3 bytes", "only 2 follow", "truncated"]);
    check(r#"{"w":1}"#, 0, &["invalid type", "column 6"]);
    check(r#"{"w":{"dtype":"F32"}}"#, 0, &["missing field `shape`"]);
    check("{", 0, &["EOF"]);
    check("{\"\u{0}\":{}}", 0, &["control character"]);
    check(r#"{"__metadata__":{"a":1}}"#, 0, &["expected a string"]);
    check(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, &["`__metadata__` comes twice"]);
    let entry = r#""w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    check(&format!("{{{entry},{entry}}}"), 0, &["`w` comes twice"]);
    let deep = format!(r#"{{"w":{}1{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
    check(&deep, 0, &["column"]);
    let bad_text = [&5u64.to_le_bytes()[..], b"{\"\xff\"}"].concat();
    check_error(parse(&bad_text), &["`bad.safetensors`"]);
}

#[test]
fn tensors() {
    check_tensor("F32", "[2]", "[0,9]", &["`w`", "0 to 9", "8 bytes of data", "truncated"]);
    check_tensor("F32", "[2]", "[8,0]", &["`w`", "8 to 0"]);
    check_tensor("F32", "[2]", "[0,18446744073709551615]", &["`w`", "truncated"]);
    check_tensor("F32", "[2]", "[-8,0]", &["invalid value: integer `-8`"]);
    check_tensor("F32", "[3]", "[0,8]", &["`w`", "[3] values of type F32 take 12 bytes", "has 8"]);
    check_tensor("F32", "[4294967296,4294967296]", "[0,8]", &["`w`", "overflows"]);
    check_tensor("F32", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2]", "[0,8]", &["`w`", "17 dimensions"]);
    check_tensor("F4", "[2]", "[0,8]", &["`w`", "`F4` is not supported"]);
    check_tensor("Q4_0", "[32]", "[0,8]", &["`w`", "`Q4_0` is not supported"]);
    check_tensor("F32", "[1]", "[4,8]", &["`w`", "starts at 4", "ends at 0"]);
    check_tensor("F32", "[1]", "[0,4]", &["tensors end at byte", "the file has"]);
    let two = |second: &str| {
        let u8s = |offsets| format!(r#"{{"dtype":"U8","shape":[4],"data_offsets":{offsets}}}"#);
        format!(r#"{{"a":{},"b":{}}}"#, u8s("[0,4]"), u8s(second))
    };
    check(&two("[3,7]"), 7, &["`b`", "starts at 3", "ends at 4", "overlap"]);
    check(&two("[5,9]"), 9, &["`b`", "starts at 5", "gaps"]);
    check(&two("[0,4]"), 4, &["overlap"]);
}

#[track_caller]
fn check_index(index: &str, parts: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    fs::copy(golden("every.safetensors"), directory.path().join("every.safetensors")).unwrap();
    fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
    check_error(Checkpoint::open(directory.path()), parts);
}

#[test]
fn indexes() {
    const NAME: &str = "model.safetensors.index.json";
    check_index("", &[NAME, "is empty"]);
    check_index("version https://git-lfs", &[NAME, "git lfs pull"]);
    check_index("[]", &[NAME, "no safetensors index", "`[]`"]);
    check_index("{", &[NAME, "EOF"]);
    check_index("{}", &[NAME, "missing field `weight_map`"]);
    check_index(r#"{"weight_map":{}}"#, &[NAME, "no tensors"]);
    check_index(r#"{"weight_map":{"w":"no.safetensors"}}"#, &["no.safetensors", "no such file"]);
    check_index(r#"{"weight_map":{"w":"every.safetensors"}}"#, &[NAME, "`w`", "every.safetensors"]);
    for outside in ["../every.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""] {
        let index = format!(r#"{{"weight_map":{{"w":"{outside}"}}}}"#);
        check_index(&index, &[NAME, "`w`", "only files beside it"]);
    }
}

#[test]
fn what_safetensors_cannot_express() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let create = |tensors: &[_]| SafetensorsWriter::create(&path, &IndexMap::new(), tensors, None);
    let plain = |name| spec(name, DType::F32, [1]);
    check_error(create(&[spec("w", DType::Q4_K, [256])]), &["`w`", "no type Q4_K"]);
    check_error(create(&[plain("w"), plain("w")]), &["`w` comes twice"]);
    check_error(create(&[plain("__metadata__")]), &["reserved"]);
    check_error(create(&[spec("w", DType::F64, [usize::MAX])]), &["`w`", "overflows"]);
    assert_eq!(names_in(directory.path()), [""; 0]);
}
