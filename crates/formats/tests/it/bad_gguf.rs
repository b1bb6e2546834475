//! Damaged, hostile and mistaken GGUF files: each is an error that names file and tensor or key.

use std::fs;
use std::path::Path;

use bevel_base::DType;
use bevel_formats::gguf::{GgufFile, GgufWriter, Header, Metadata, Value};
use bevel_formats::{Error, TensorSpec};

use crate::support::{check_error, golden, names_in, spec};

/// A GGUF file spelled out byte by byte.
#[derive(Clone)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn new(tensors: u64, pairs: u64) -> Self {
        Bytes(b"GGUF\x03\0\0\0".to_vec()).u64(tensors).u64(pairs)
    }

    fn u32(mut self, v: u32) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }

    fn u64(mut self, v: u64) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn string(self, text: &str) -> Self {
        self.u64(text.len() as u64).raw(text.as_bytes())
    }

    fn tensor(self, name: &str, dims: &[u64], type_id: u32, offset: u64) -> Self {
        let named = self.string(name).u32(dims.len() as u32);
        dims.iter().fold(named, |bytes, &dim| bytes.u64(dim)).u32(type_id).u64(offset)
    }

    /// Padding and `len` bytes of data.
    fn data(mut self, len: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + len, 0);
        self
    }
}

#[track_caller]
fn check(bytes: Bytes, parts: &[&str]) {
    let result = Header::parse(Path::new("bad.gguf"), &bytes.0);
    check_error(result, &[&["`bad.gguf`"], parts].concat());
}

#[track_caller]
fn check_file(name: &str, content: &[u8], parts: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::write(&path, content).unwrap();
    check_error(GgufFile::open(&path), &[&[name], parts].concat());
}

#[test]
fn good_bytes_are_good() {
    let bytes = Bytes::new(1, 0).tensor("t", &[2, 3], 0, 0).data(24).0;
    let header = Header::parse(Path::new("good.gguf"), &bytes).unwrap();
    assert_eq!(header.tensors["t"].shape, [3, 2].into());
}

#[test]
fn other_files() {
    check_file("empty.gguf", b"", &["is empty"]);
    check_file("lfs.gguf", b"version https://git-lfs.github.com/spec/v1\n", &["git lfs pull"]);
    check_file("page.gguf", b"\n <!DOCTYPE html><html>", &["web page"]);
    check_file("zip.gguf", b"PK\x03\x04abc", &["pickle", "can run any code", "safetensors"]);
    check_file("pickle.gguf", b"\x80\x02}q\x00.", &["pickle", "can run any code"]);
    check_file("old.gguf", b"tjgg\x03\0\0\0", &["before GGUF"]);
    check_file("noise.gguf", b"\x01noise", &["GGUF file", r"\x01noise"]);
    let safetensors = fs::read(golden("every.safetensors")).unwrap();
    check_file("st.gguf", &safetensors, &["safetensors file"]);
    check_error(GgufFile::open(Path::new("does/not/exist")), &["does/not/exist", "no such file"]);
    check_error(GgufFile::open(Path::new("/")), &["cannot open `/`", "is a directory"]);
}

#[test]
fn versions() {
    let version = |v: u32| Bytes(b"GGUF".to_vec()).u32(v).u64(0).u64(0);
    check(version(1), &["version 1"]);
    check(version(4), &["version 4", "reads 2 and 3"]);
    check(version(3u32.swap_bytes()), &["big-endian"]);
    check(Bytes(b"GGUF\x03".to_vec()), &["the version takes 4 bytes", "truncated"]);
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = fs::read(golden("every.gguf")).unwrap();
    let whole = Header::parse(Path::new("every.gguf"), &bytes).unwrap();
    let last = whole.tensors.values().map(|info| info.range().end).max().unwrap();
    for len in 0..last {
        let result = Header::parse(Path::new("every.gguf"), &bytes[..len]);
        check_error(result, &["`every.gguf`"]);
    }
    Header::parse(Path::new("every.gguf"), &bytes[..last]).unwrap();
}

#[test]
fn counts_and_lengths() {
    check(Bytes::new(u64::MAX, 0), &["tensor 0 of 18446744073709551615", "truncated"]);
    check(Bytes::new(0, u64::MAX), &["metadata key 0", "truncated"]);
    check(Bytes::new(0, 1).u64(u64::MAX), &["18446744073709551615 bytes", "only 0 follow"]);
    for element in [0, 3, 6, 8, 9, 12] {
        let array = |len| Bytes::new(0, 1).string("k").u32(9).u32(element).u64(len);
        check(array(u64::MAX), &["`k` claims 18446744073709551615 elements", "only 0 bytes"]);
        check(array(20).raw(&[0; 19]), &["`k` claims 20 elements"]);
    }
}

#[test]
fn metadata() {
    let pair = || Bytes::new(0, 1).string("k");
    check(pair().u32(13), &["`k`", "value type 13"]);
    check(pair().u32(9).u32(13).u64(0), &["`k`", "value type 13"]);
    check(pair().u32(7).raw(&[2]), &["`k`", "Boolean 2"]);
    check(pair().u32(9).u32(7).u64(2).raw(&[1, 255]), &["`k`", "Boolean 255"]);
    check(pair().u32(8).u64(3).raw(b"a\xffb"), &["the value of `k` is not UTF-8", "byte 1"]);
    check(
        pair().u32(9).u32(8).u64(2).string("a").u64(1).raw(b"\xff"),
        &["element 1 of `k` is not UTF-8"],
    );
    check(Bytes::new(0, 1).u64(1).raw(b"\xff"), &["metadata key 0 of 1 is not UTF-8"]);
    let twice = Bytes::new(0, 2).string("k").u32(0).raw(&[1]).string("k").u32(0).raw(&[1]);
    check(twice, &["`k` comes twice"]);
    let nested = (0..5).fold(pair().u32(9), |bytes, _| bytes.u32(9).u64(1));
    check(nested.u32(0).u64(1).raw(&[0; 100]), &["`k` nests arrays more than 4 deep"]);
    for alignment in [0, 48] {
        let bytes = Bytes::new(0, 1).string("general.alignment").u32(4).u32(alignment);
        check(bytes, &["general.alignment", "power of two"]);
    }
}

#[test]
fn tensors() {
    let one = |dims: &[u64], type_id, offset| {
        Bytes::new(1, 0).tensor("weight", dims, type_id, offset).data(64)
    };
    check(one(&[4], 0, 64), &["`weight`", "16 bytes at offset 64", "past the end", "truncated"]);
    check(one(&[4], 0, u64::MAX - 31), &["`weight`", "past the end"]);
    check(one(&[4], 0, 8), &["`weight`", "offset 8", "alignment 32"]);
    check(one(&[4, 0], 0, 0), &["`weight`", "zero"]);
    check(one(&[1 << 33, 1 << 33], 0, 0), &["`weight`", "overflows"]);
    check(one(&[u64::MAX], 0, 0), &["`weight`", "overflows"]);
    check(one(&[33], 8, 0), &["`weight`", "Q8_0", "33"]);
    check(one(&[1; 5], 0, 0), &["`weight`", "5 dimensions"]);
    check(one(&[4], 1000, 0), &["`weight`", "type id 1000 is unknown"]);
    check(one(&[4], 19, 0), &["`weight`", "IQ1_S (id 19) is not supported"]);
    check(one(&[4], 4, 0), &["`weight`", "Q4_2, removed"]);
    let two = |second, offset| {
        Bytes::new(2, 0).tensor("a", &[9], 0, 0).tensor(second, &[1], 0, offset).data(100)
    };
    check(two("a", 64), &["tensor `a` comes twice"]);
    check(two("b", 32), &["`b`", "overlap", "`a`"]);
    check(two("b", 0), &["overlap"]);
}

#[track_caller]
fn check_unwritable(metadata: &Metadata, tensors: &[TensorSpec], parts: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.gguf");
    let result = GgufWriter::create(&path, metadata, tensors, None);
    assert!(matches!(result, Err(Error::Unwritable { .. })), "{result:?}");
    check_error(result, &[&["out.gguf"], parts].concat());
    assert_eq!(names_in(directory.path()), [""; 0]);
}

#[test]
fn what_gguf_cannot_express() {
    let none = Metadata::new();
    check_unwritable(&none, &[spec("t", DType::F8_E4M3, [1])], &["`t`", "F8_E4M3"]);
    check_unwritable(&none, &[spec("t", DType::F32, [1; 5])], &["`t`", "4 dimensions"]);
    check_unwritable(&none, &[spec("t", DType::F32, [0])], &["`t`", "zero"]);
    check_unwritable(&none, &[spec("t", DType::Q4_K, [255])], &["`t`", "255"]);
    check_unwritable(&none, &[spec(&"t".repeat(64), DType::F32, [1])], &["63 bytes"]);
    let twice = [spec("t", DType::F32, [1]), spec("t", DType::F32, [1])];
    check_unwritable(&none, &twice, &["`t` comes twice"]);
    let alignment = Metadata::from_iter([("general.alignment".to_owned(), Value::U32(3))]);
    check_unwritable(&alignment, &[], &["general.alignment"]);
}

#[test]
fn data_in_the_wrong_order_or_amount() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.gguf");
    let tensors = [spec("a", DType::F32, [2]), spec("b", DType::F32, [1])];
    let create = || GgufWriter::create(&path, &Metadata::new(), &tensors, None).unwrap();

    check_error(create().write("b", &[0]), &["expected data of tensor `a`, got `b`"]);
    check_error(create().write("a", &[0; 9]), &["`a` has 8 bytes, got at least 9"]);
    check_error(create().finish(), &["tensor `a` got 0 of 8 bytes"]);
    let mut writer = create();
    writer.write("a", &[0; 8]).unwrap();
    writer.write("b", &[0; 4]).unwrap();
    check_error(writer.write("b", &[0]), &["no data of tensor `b` was expected"]);
    drop(writer);
    assert_eq!(names_in(directory.path()), [""; 0]);
}
