use std::fs;

use bevel_base::DType;
use bevel_formats::TensorSpec;
use bevel_formats::safetensors::{Checkpoint, SafetensorsWriter};
use indexmap::IndexMap;

use crate::support::{check_error, golden, names_in, pattern, spec};

/// What `make_safetensors.py` puts into `every.safetensors`.
fn every_tensor() -> Vec<TensorSpec> {
    vec![
        spec("f64", DType::F64, [2]),
        spec("f32", DType::F32, [3, 5]),
        spec("f16", DType::F16, [7]),
        spec("bf16", DType::BF16, [2, 2]),
        spec("f8_e4m3", DType::F8_E4M3, [5]),
        spec("f8_e5m2", DType::F8_E5M2, [3]),
        spec("i64", DType::I64, [1]),
        spec("u64", DType::U64, [1]),
        spec("i32", DType::I32, [1, 2, 3]),
        spec("u32", DType::U32, [2]),
        spec("i16", DType::I16, [3]),
        spec("u16", DType::U16, [3]),
        spec("i8", DType::I8, [5]),
        spec("u8", DType::U8, [5]),
        spec("bool", DType::Bool, [4]),
        spec("empty", DType::F32, [0, 4]),
        spec("scalar", DType::F32, []),
    ]
}

fn every_metadata() -> IndexMap<String, String> {
    [("edge", "刃"), ("format", "pt")].map(|(k, v)| (k.to_owned(), v.to_owned())).into()
}

/// The goldens' bytes of tensor `t`.
fn data(t: usize, TensorSpec { dtype, shape, .. }: &TensorSpec) -> Vec<u8> {
    let len = shape.byte_len(*dtype).unwrap();
    match dtype {
        DType::Bool => (0..len).map(|i| (i % 2) as u8).collect(),
        _ => pattern(t, len),
    }
}

/// Checks that a checkpoint has exactly these tensors, in any order, with the goldens' bytes, and
/// that each starts at a multiple of its element size.
#[track_caller]
fn check_tensors(checkpoint: &Checkpoint, expected: &[TensorSpec]) {
    assert_eq!(checkpoint.tensors().len(), expected.len());
    for (t, spec) in expected.iter().enumerate() {
        let TensorSpec { name, dtype, shape } = spec;
        checkpoint.release(name);
        let view = checkpoint.tensor(name).unwrap();
        assert_eq!((view.dtype(), view.shape()), (*dtype, shape), "{name}");
        assert_eq!(view.data(), data(t, spec), "{name}");
        let start = checkpoint.tensors()[name].range().start;
        assert!(start.is_multiple_of(dtype.block_bytes()), "{name} starts at {start}");
    }
}

#[track_caller]
fn write(mut writer: SafetensorsWriter, tensors: &[TensorSpec], piece: usize) -> usize {
    for (t, spec) in tensors.iter().enumerate() {
        for data in data(t, spec).chunks(piece) {
            writer.write(&spec.name, data).unwrap();
        }
    }
    writer.finish().unwrap().len()
}

#[test]
fn reads_what_the_safetensors_package_wrote() {
    let checkpoint = Checkpoint::open(&golden("every.safetensors")).unwrap();
    check_tensors(&checkpoint, &every_tensor());
    assert_eq!(checkpoint.metadata(), &every_metadata());
    assert_eq!(checkpoint.paths(), [golden("every.safetensors")]);
}

#[test]
fn tensors_come_in_the_order_of_their_data() {
    let checkpoint = Checkpoint::open(&golden("every.safetensors")).unwrap();
    let starts: Vec<usize> = checkpoint.tensors().values().map(|info| info.range().start).collect();
    assert!(starts.is_sorted());
}

#[test]
fn round_trip_in_one_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let tensors = every_tensor();
    for piece in [1, 3, 1000] {
        let writer = SafetensorsWriter::create(&path, &every_metadata(), &tensors, None).unwrap();
        assert_eq!(write(writer, &tensors, piece), 1);
        for opened in [&path, directory.path()] {
            let checkpoint = Checkpoint::open(opened).unwrap();
            check_tensors(&checkpoint, &tensors);
            assert_eq!(checkpoint.metadata(), &every_metadata());
        }
    }
    assert_eq!(names_in(directory.path()), ["model.safetensors"]);
}

#[test]
fn round_trip_in_shards() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let tensors = every_tensor();
    let writer = SafetensorsWriter::create(&path, &every_metadata(), &tensors, Some(90)).unwrap();
    assert_eq!(write(writer, &tensors, 7), 3);
    let names = [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ];
    assert_eq!(names_in(directory.path()), names);
    for opened in [directory.path(), &directory.path().join(names[3])] {
        let checkpoint = Checkpoint::open(opened).unwrap();
        check_tensors(&checkpoint, &tensors);
        assert_eq!(checkpoint.metadata(), &every_metadata());
    }
    let index = fs::read(directory.path().join(names[3])).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], 184);
    assert_eq!(index["weight_map"]["f64"], names[0]);
    assert_eq!(index["weight_map"]["scalar"], names[2]);
}

#[test]
fn a_directory_with_one_file_of_another_name() {
    let directory = tempfile::tempdir().unwrap();
    fs::copy(golden("every.safetensors"), directory.path().join("adapter_model.safetensors"))
        .unwrap();
    check_tensors(&Checkpoint::open(directory.path()).unwrap(), &every_tensor());
    fs::copy(golden("every.safetensors"), directory.path().join("other.safetensors")).unwrap();
    check_error(Checkpoint::open(directory.path()), &["several `.safetensors` files"]);
}

#[test]
fn the_index_decides_where_shards_repeat_a_tensor() {
    let directory = tempfile::tempdir().unwrap();
    let one = [spec("w", DType::U8, [1])];
    for (file, value) in [("a.safetensors", 1), ("b.safetensors", 2)] {
        let path = directory.path().join(file);
        let mut writer = SafetensorsWriter::create(&path, &IndexMap::new(), &one, None).unwrap();
        writer.write("w", &[value]).unwrap();
        writer.finish().unwrap();
    }
    let extra = [spec("v", DType::U8, [1])];
    let path = directory.path().join("c.safetensors");
    write(SafetensorsWriter::create(&path, &IndexMap::new(), &extra, None).unwrap(), &extra, 1);
    let index = r#"{"weight_map": {"w": "b.safetensors", "v": "c.safetensors"}}"#;
    fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    assert_eq!(checkpoint.tensor("w").unwrap().data(), [2]);
    assert_eq!(checkpoint.tensors().len(), 2);
}

#[test]
fn a_missing_tensor_is_named() {
    let checkpoint = Checkpoint::open(&golden("every.safetensors")).unwrap();
    check_error(checkpoint.tensor("f23"), &["every.safetensors", "`f23`"]);
}
