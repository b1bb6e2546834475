//! What the programs that define the formats packed, we unpack as they do.

use bevel_base::pack;

use super::{open, scheme};

/// Checks that a golden's module has the weights that its program unpacks, in that program's
/// type, `name` for a name, and that no tensor of it is forgotten.
#[track_caller]
fn check(format: &str, module: &str, name: &str) {
    let files = open(format);
    let scheme = scheme(&files, module);
    assert_eq!(scheme.name(), name);
    let expected = files.tensor(&format!("{module}.expected")).unwrap();
    let matrix = scheme.read(&files, module).unwrap();
    let shape = [matrix.rows, matrix.cols];
    assert_eq!(expected.shape().dims(), shape);
    assert_eq!(scheme.module_shape(&files, module).unwrap(), Some(shape));

    let mut found = vec![0; expected.data().len()];
    pack::quantize(expected.dtype(), &matrix.dequantize(), None, &mut found).unwrap();
    let found = bevel_base::TensorView::new(expected.dtype(), shape, &found).unwrap();
    let (found, expected) = (found.to_f32().unwrap(), expected.to_f32().unwrap());
    let differ = found.iter().zip(&expected).filter(|(found, expected)| found != expected).count();
    let first = found.iter().zip(&expected).find(|(found, expected)| found != expected);
    assert_eq!(differ, 0, "{format} {module}: of {}; first {first:?}", found.len());

    let mut stored: Vec<&String> = files.tensors().keys().collect();
    stored.retain(|name| {
        let part = name.strip_prefix(&format!("{module}."));
        part.is_some_and(|part| part != "expected" && part != "original")
    });
    let mut names = scheme.module_tensors(&files, module);
    names.sort();
    stored.sort();
    assert_eq!(names.iter().collect::<Vec<_>>(), stored);
    assert!(scheme.modules(&files).unwrap().iter().any(|found| found == module));
}

#[test]
fn gptq() {
    check("gptq", "four", "GPTQ, 4 bits, groups of 32");
    check("gptq", "asymmetric", "GPTQ, 4 bits, groups of 32");
    check("gptq", "act_order", "GPTQ, 4 bits, groups of 32");
    check("gptq", "second", "GPTQ, 4 bits, groups of 32");
    check("gptq", "two", "GPTQ, 2 bits, groups of 32");
    check("gptq", "three", "GPTQ, 4 bits, groups of 32");
    check("gptq", "three_second", "GPTQ, 3 bits, groups of 32");
    check("gptq", "eight", "GPTQ, 8 bits, groups of 32");
    check("gptq", "row", "GPTQ, 4 bits, a scale a row");
}

#[test]
fn awq() {
    check("awq", "groups", "AWQ, 4 bits, groups of 32");
    check("awq", "row", "AWQ, 4 bits, a scale a row");
}

#[test]
fn compressed_tensors() {
    for (module, name) in [
        ("symmetric", "4 bits, groups of 32"),
        ("asymmetric", "4 bits, groups of 32"),
        ("channel", "8 bits, a scale a row"),
        ("three", "3 bits, groups of 32"),
        ("five", "5 bits, groups of 32"),
        ("whole_words", "3 bits, a scale a row"),
        ("int8", "8 bits, a scale a row"),
        ("int8_asymmetric", "8 bits, a scale a row"),
        ("float8", "8-bit floats, a scale a row"),
        ("float8_tensor", "8-bit floats, a scale a row"),
        ("float8_block", "8-bit floats, blocks of [8, 64]"),
        ("nvfp4", "NVFP4, groups of 16"),
        ("mxfp4", "MXFP4, groups of 32"),
    ] {
        check("compressed_tensors", module, &format!("compressed-tensors, {name}"));
    }
}

#[test]
fn bitsandbytes() {
    for module in ["nf4", "across_rows", "fp4", "fp4_nested", "int8"] {
        check("bitsandbytes", module, "bitsandbytes");
    }
    check("bitsandbytes_nested", "nf4_nested", "bitsandbytes");
}

#[test]
fn fp8() {
    check("fp8", "blocks", "FP8 (E4M3)");
    check("fp8", "rows", "FP8 (E4M3)");
}

#[test]
fn mlx() {
    for module in ["two", "three", "four", "five", "six", "eight", "mxfp4", "nvfp4", "mxfp8"] {
        check("mlx", module, "MLX, 4 bits, groups of 64");
    }
}
