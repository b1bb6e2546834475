use std::fs;

use bevel_base::DType;
use bevel_formats::gguf::{
    Array, GgufFile, GgufWriter, Header, Metadata, Value, ggml_type_id, ggml_type_of,
};
use bevel_formats::{Error, TensorSpec};

use crate::support::{check_error, golden, names_in, pattern, spec};

/// What `make_gguf.py` puts into `every.gguf`.
fn every_metadata() -> Metadata {
    let strings = |texts: &[&str]| Array::String(texts.iter().map(|&t| t.to_owned()).collect());
    Metadata::from_iter(
        [
            ("general.architecture", Value::String("test".to_owned())),
            ("general.alignment", Value::U32(64)),
            ("test.u8", Value::U8(u8::MAX)),
            ("test.i8", Value::I8(i8::MIN)),
            ("test.u16", Value::U16(u16::MAX)),
            ("test.i16", Value::I16(i16::MIN)),
            ("test.u32", Value::U32(u32::MAX)),
            ("test.i32", Value::I32(i32::MIN)),
            ("test.f32", Value::F32(1.5)),
            ("test.bool", Value::Bool(true)),
            ("test.string", Value::String("édge \n 刃 \u{1f52a}".to_owned())),
            ("test.u64", Value::U64(u64::MAX)),
            ("test.i64", Value::I64(i64::MIN)),
            ("test.f64", Value::F64(0.1)),
            ("test.u8s", Value::Array(Array::U8(vec![0, 1, u8::MAX]))),
            ("test.i8s", Value::Array(Array::I8(vec![i8::MIN, 0, i8::MAX]))),
            ("test.u16s", Value::Array(Array::U16(vec![0, u16::MAX]))),
            ("test.i16s", Value::Array(Array::I16(vec![i16::MIN, i16::MAX]))),
            ("test.u32s", Value::Array(Array::U32(vec![0, u32::MAX]))),
            ("test.i32s", Value::Array(Array::I32(vec![i32::MIN, i32::MAX]))),
            ("test.f32s", Value::Array(Array::F32(vec![0.0, -0.5, f32::INFINITY]))),
            ("test.bools", Value::Array(Array::Bool(vec![true, false, true]))),
            ("test.strings", Value::Array(strings(&["", "a", "刃"]))),
            ("test.u64s", Value::Array(Array::U64(vec![0, u64::MAX]))),
            ("test.i64s", Value::Array(Array::I64(vec![i64::MIN, i64::MAX]))),
            ("test.f64s", Value::Array(Array::F64(vec![0.1, -2.5]))),
            (
                "test.nested",
                Value::Array(Array::Array(vec![Array::I32(vec![1, 2]), Array::I32(vec![3])])),
            ),
            (
                "test.nested_strings",
                Value::Array(Array::Array(vec![strings(&["a"]), strings(&["b", "c"])])),
            ),
        ]
        .map(|(key, value)| (key.to_owned(), value)),
    )
}

fn every_tensor() -> Vec<TensorSpec> {
    vec![
        spec("plain.f32", DType::F32, [3, 5]),
        spec("plain.f16", DType::F16, [7]),
        spec("plain.bf16", DType::BF16, [2, 2]),
        spec("plain.f64", DType::F64, [2]),
        spec("plain.i8", DType::I8, [5]),
        spec("plain.i16", DType::I16, [3]),
        spec("plain.i32", DType::I32, [1, 2, 3, 4]),
        spec("plain.i64", DType::I64, [1]),
        spec("packed.q8_0", DType::Q8_0, [2, 64]),
        spec("packed.q4_k", DType::Q4_K, [2, 256]),
        spec("packed.mxfp4", DType::MXFP4, [1, 32]),
    ]
}

fn split_tensors() -> Vec<TensorSpec> {
    (0..5).map(|t| spec(&format!("tensor.{t}"), DType::F32, [t + 1, 3])).collect()
}

/// Checks that a file has exactly these tensors in this order, with the goldens' bytes.
#[track_caller]
fn check_tensors(file: &GgufFile, expected: &[TensorSpec]) {
    let found: Vec<TensorSpec> = file
        .tensors()
        .iter()
        .map(|(name, info)| TensorSpec::new(name, info.dtype, info.shape.clone()))
        .collect();
    assert_eq!(found, expected);
    for (t, TensorSpec { name, dtype, shape }) in expected.iter().enumerate() {
        file.release(name);
        let view = file.tensor(name).unwrap();
        assert_eq!(view.data(), pattern(t, shape.byte_len(*dtype).unwrap()), "{name}");
        assert_eq!(file.tensors()[name].byte_len(), view.data().len());
    }
}

/// Writes tensors with the goldens' bytes, `piece` bytes at a time.
#[track_caller]
fn write_tensors(writer: &mut GgufWriter, tensors: &[TensorSpec], piece: usize) {
    for (t, TensorSpec { name, dtype, shape }) in tensors.iter().enumerate() {
        for data in pattern(t, shape.byte_len(*dtype).unwrap()).chunks(piece) {
            writer.write(name, data).unwrap();
        }
    }
}

#[test]
fn reads_what_the_gguf_package_wrote() {
    let file = GgufFile::open(&golden("every.gguf")).unwrap();
    let found: Vec<_> = file.metadata().iter().collect();
    let expected = every_metadata();
    assert_eq!(found, expected.iter().collect::<Vec<_>>());
    check_tensors(&file, &every_tensor());
    assert_eq!(file.file_size(), fs::metadata(golden("every.gguf")).unwrap().len());
}

#[test]
fn writes_what_the_gguf_package_writes() {
    let directory = tempfile::tempdir().unwrap();
    for piece in [1, 3, 1000] {
        let path = directory.path().join("every.gguf");
        let tensors = every_tensor();
        let mut writer = GgufWriter::create(&path, &every_metadata(), &tensors, None).unwrap();
        write_tensors(&mut writer, &tensors, piece);
        assert_eq!(writer.finish().unwrap(), [path.as_path()]);
        assert!(fs::read(&path).unwrap() == fs::read(golden("every.gguf")).unwrap());
    }
}

#[test]
fn version_2_is_read() {
    let mut bytes = fs::read(golden("every.gguf")).unwrap();
    bytes[4] = 2;
    let header = Header::parse("every.gguf".as_ref(), &bytes).unwrap();
    assert_eq!(header.version, 2);
    assert_eq!(header.metadata, every_metadata());
}

#[test]
fn any_shard_opens_the_model() {
    for shard in 1..=3 {
        let path = golden(&format!("split-0000{shard}-of-00003.gguf"));
        let file = GgufFile::open(&path).unwrap();
        check_tensors(&file, &split_tensors());
        let metadata: Vec<_> = file.metadata().keys().map(String::as_str).collect();
        assert_eq!(metadata, ["general.architecture", "general.name"]);
        assert_eq!(file.paths().len(), 3);
        assert_eq!(file.file_size(), 352 + 352 + 224);
    }
}

#[test]
fn splits_by_size() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("small.gguf");
    // Byte counts are 12, 24, 36, 48 and 60; padded to 64 each.
    let tensors = split_tensors();
    let mut metadata = every_metadata();
    metadata.insert("split.no".to_owned(), Value::U16(7));
    let mut writer = GgufWriter::create(&path, &metadata, &tensors, Some(128)).unwrap();
    write_tensors(&mut writer, &tensors, 10);
    let paths = writer.finish().unwrap();
    let expected = [1, 2, 3].map(|n| format!("small-0000{n}-of-00003.gguf"));
    assert_eq!(names_in(directory.path()), expected);
    assert_eq!(paths, expected.map(|name| directory.path().join(name)));

    let file = GgufFile::open(&paths[1]).unwrap();
    check_tensors(&file, &tensors);
    assert_eq!(file.metadata(), &every_metadata());
    let second = Header::parse(&paths[1], &fs::read(&paths[1]).unwrap()).unwrap();
    let pairs = [
        ("general.alignment", Value::U32(64)),
        ("split.no", Value::U16(1)),
        ("split.count", Value::U16(3)),
        ("split.tensors.count", Value::I32(5)),
    ];
    let pairs = pairs.map(|(key, value)| (key.to_owned(), value));
    assert_eq!(second.metadata, Metadata::from_iter(pairs));
}

#[test]
fn shards_must_fit_together() {
    let directory = tempfile::tempdir().unwrap();
    let copy = |from: usize, to: &str| {
        let from = golden(&format!("split-0000{from}-of-00003.gguf"));
        fs::copy(from, directory.path().join(to)).unwrap();
    };
    copy(1, "split-00001-of-00003.gguf");
    copy(2, "split-00002-of-00003.gguf");
    let first = directory.path().join("split-00001-of-00003.gguf");
    check_error(GgufFile::open(&first), &["split-00003-of-00003.gguf", "no such file"]);

    copy(2, "split-00003-of-00003.gguf");
    check_error(GgufFile::open(&first), &["split-00003-of-00003.gguf", "number 2", "of 3"]);

    copy(1, "renamed.gguf");
    let renamed = directory.path().join("renamed.gguf");
    check_error(GgufFile::open(&renamed), &["one of 3", "model-00001-of-00003.gguf"]);
}

#[test]
fn empty_models_and_scalars() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.gguf");
    let writer = GgufWriter::create(&path, &Metadata::new(), &[], Some(10)).unwrap();
    writer.finish().unwrap();
    assert!(GgufFile::open(&path).unwrap().tensors().is_empty());

    let scalar = [spec("scalar", DType::F32, [])];
    let mut writer = GgufWriter::create(&path, &Metadata::new(), &scalar, None).unwrap();
    writer.write("scalar", &1f32.to_le_bytes()).unwrap();
    writer.finish().unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.tensor("scalar").unwrap().data(), 1f32.to_le_bytes());
}

#[test]
fn a_missing_tensor_is_named() {
    let file = GgufFile::open(&golden("every.gguf")).unwrap();
    check_error(file.tensor("plain.f23"), &["every.gguf", "plain.f23"]);
    assert!(matches!(file.tensor("x"), Err(Error::MissingTensor { .. })));
    file.release("plain.f23");
}

#[test]
fn type_ids_match_in_both_directions() {
    let with_id: Vec<(DType, u32)> =
        DType::all().filter_map(|dtype| Some((dtype, ggml_type_id(dtype)?))).collect();
    assert_eq!(with_id.len(), 28);
    for (dtype, id) in with_id {
        assert_eq!(ggml_type_of(id), Some(dtype));
    }
    assert_eq!(ggml_type_id(DType::F8_E4M3), None);
    assert_eq!((0..100).filter_map(ggml_type_of).count(), 28);
}

#[test]
fn opening_touches_only_the_header() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("huge.gguf");
    let small = [spec("huge", DType::F32, [1, 1])];
    let mut writer = GgufWriter::create(&path, &Metadata::new(), &small, None).unwrap();
    writer.write("huge", &[1; 4]).unwrap();
    writer.finish().unwrap();
    // Larger dimensions and a hole make it a file of 32 GiB.
    let mut bytes = fs::read(&path).unwrap();
    let dims = bytes.windows(4).position(|name| name == b"huge").unwrap() + 8;
    bytes[dims..][..8].copy_from_slice(&(1u64 << 14).to_le_bytes());
    bytes[dims + 8..][..8].copy_from_slice(&(1u64 << 19).to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    let file_len = bytes.len() as u64 - 32 + (1 << 35);
    fs::File::options().write(true).open(&path).unwrap().set_len(file_len).unwrap();

    let before = resident_bytes();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.tensors()["huge"].byte_len(), 1 << 35);
    assert!(resident_bytes() - before < 64 << 20);
}

/// Memory that this process occupies; other tests run beside this one.
fn resident_bytes() -> i64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<i64>().ok());
    pages.unwrap_or(0) * 4096
}
