//! What we write is what the programs that define the formats write, and we read it back.

use bevel_base::grouped::nf4::Levels;
use bevel_base::grouped::{Coding, Zeros, float4, float8, mlx, nf4};
use bevel_base::{DType, GroupedMatrix};
use bevel_formats::quantized::{Codes, GroupedFormat, ModuleSpec, Scheme};
use bevel_formats::safetensors::{Checkpoint, SafetensorsWriter};
use proptest::prelude::*;

use super::{open, scheme};
use crate::support::check_error;

const GPTQ: GroupedFormat = GroupedFormat::Gptq { v2: false };
const GPTQ_V2: GroupedFormat = GroupedFormat::Gptq { v2: true };
const NF4: GroupedFormat = GroupedFormat::BitsAndBytes { nested: false };
const NESTED: GroupedFormat = GroupedFormat::BitsAndBytes { nested: true };

/// The spec of a module that has this matrix. `zeros` and `order` say whether the checkpoint stores
/// zero points and the order of columns, whatever this matrix needs.
fn spec_of(matrix: &GroupedMatrix, scale_dtype: DType, zeros: bool, order: bool) -> ModuleSpec {
    let codes = match &matrix.coding {
        Coding::Integer { bits, .. } => {
            Codes::Integer { bits: *bits, symmetric: !zeros, act_order: order }
        }
        Coding::Affine { bits, .. } => Codes::Affine { bits: *bits },
        Coding::Levels(nf4::NF4_LEVELS) => Codes::Nf4,
        Coding::Levels(nf4::FP4_LEVELS) => Codes::Fp4,
        Coding::Levels(_) if matrix.group_size == float4::NVFP4_GROUP => Codes::Nvfp4,
        Coding::Levels(_) => Codes::Mxfp4,
        Coding::Float8 => Codes::Float8,
    };
    let group_size = Some(matrix.group_size).filter(|&size| size != matrix.cols);
    ModuleSpec { rows: matrix.rows, cols: matrix.cols, group_size, codes, scale_dtype }
}

/// Checks that a matrix is written with the bytes that a golden's module has.
#[track_caller]
fn check_bytes(
    files: &Checkpoint,
    module: &str,
    format: GroupedFormat,
    spec: &ModuleSpec,
    matrix: &GroupedMatrix,
) {
    let specs = format.specs(module, spec).unwrap();
    let tensors = format.encode(module, spec, matrix).unwrap();
    for (spec, (name, data)) in specs.iter().zip(&tensors) {
        assert_eq!(&spec.name, name);
        let expected = files.tensor(name).unwrap();
        if name.contains("quant_state") {
            let json = |data| serde_json::from_slice::<serde_json::Value>(data).unwrap();
            assert_eq!(json(data), json(expected.data()), "{name}");
            continue;
        }
        assert_eq!((spec.dtype, &spec.shape), (expected.dtype(), expected.shape()), "{name}");
        assert!(data == expected.data(), "the bytes of `{name}` differ");
    }
    assert_eq!(specs.len(), tensors.len());
}

/// Reads a golden's module and checks that it is written with the same bytes.
#[track_caller]
fn check_again(file: &str, module: &str, format: GroupedFormat, zeros: bool) {
    let files = open(file);
    let matrix = scheme(&files, module).read(&files, module).unwrap();
    let name = ["scales", "weight_scale"].map(|part| format!("{module}.{part}"));
    let scales = name.iter().find_map(|name| files.tensor(name).ok());
    let dtype = scales.map_or(DType::BF16, |scales| scales.dtype());
    let mut spec = spec_of(&matrix, dtype, zeros, matrix.group_of.is_some());
    if format == GroupedFormat::Mlx {
        spec.group_size = Some(matrix.group_size);
    } else if let GroupedFormat::BitsAndBytes { .. } = format {
        (spec.group_size, spec.scale_dtype) =
            (Some(nf4::BLOCK), files.tensor(&format!("{module}.original")).unwrap().dtype());
    }
    check_bytes(&files, module, format, &spec, &matrix);
}

#[test]
fn goldens_are_written_as_they_were() {
    for module in ["four", "asymmetric", "act_order", "two", "three", "eight", "row"] {
        check_again("gptq", module, GPTQ, true);
    }
    check_again("gptq", "second", GPTQ_V2, true);
    check_again("gptq", "three_second", GPTQ_V2, true);
    check_again("awq", "groups", GroupedFormat::Awq, true);
    check_again("awq", "row", GroupedFormat::Awq, true);
    for module in ["symmetric", "channel", "float8", "nvfp4", "mxfp4"] {
        check_again("compressed_tensors", module, GroupedFormat::CompressedTensors, false);
    }
    for module in ["asymmetric", "three", "five"] {
        check_again("compressed_tensors", module, GroupedFormat::CompressedTensors, true);
    }
    check_again("bitsandbytes", "nf4", NF4, false);
    check_again("bitsandbytes", "across_rows", NF4, false);
    check_again("bitsandbytes", "fp4", NF4, false);
    for module in ["two", "three", "four", "five", "six", "eight", "mxfp4"] {
        check_again("mlx", module, GroupedFormat::Mlx, false);
    }
}

/// A golden's unquantized weights.
fn original(files: &Checkpoint, module: &str) -> (Vec<f32>, usize, usize, DType) {
    let view = files.tensor(&format!("{module}.original")).unwrap();
    (view.to_f32().unwrap(), view.shape().rows(), view.shape().row_len(), view.dtype())
}

#[test]
fn nf4_and_fp4_are_those_of_bitsandbytes() {
    for (file, module, levels, format) in [
        ("bitsandbytes", "nf4", Levels::Nf4, NF4),
        ("bitsandbytes", "across_rows", Levels::Nf4, NF4),
        ("bitsandbytes", "fp4", Levels::Fp4, NF4),
        ("bitsandbytes", "fp4_nested", Levels::Fp4, NESTED),
        ("bitsandbytes_nested", "nf4_nested", Levels::Nf4, NESTED),
    ] {
        let files = open(file);
        let (values, rows, cols, dtype) = original(&files, module);
        let matrix = nf4::quantize(&values, rows, cols, levels, nf4::BLOCK).unwrap();
        let mut spec = spec_of(&matrix, dtype, false, false);
        spec.group_size = Some(nf4::BLOCK);
        check_bytes(&files, module, format, &spec, &matrix);
    }
}

#[test]
fn affine_codes_are_those_of_mlx() {
    let files = open("mlx");
    for module in ["two", "three", "four", "five", "six", "eight"] {
        let (values, rows, cols, dtype) = original(&files, module);
        let known = scheme(&files, module).read(&files, module).unwrap();
        let Coding::Affine { bits, .. } = known.coding else { unreachable!() };
        let matrix = mlx::quantize(&values, rows, cols, bits, known.group_size, dtype).unwrap();
        let mut spec = spec_of(&matrix, dtype, false, false);
        spec.group_size = Some(known.group_size);
        check_bytes(&files, module, GroupedFormat::Mlx, &spec, &matrix);
    }
}

#[test]
fn floats_of_4_and_8_bits_are_those_of_compressed_tensors() {
    let files = open("compressed_tensors");
    for module in ["nvfp4", "mxfp4", "float8"] {
        let (values, rows, cols, dtype) = original(&files, module);
        let matrix = match module {
            "nvfp4" => float4::quantize_nvfp4(&values, rows, cols),
            "mxfp4" => float4::quantize_mxfp4(&values, rows, cols),
            _ => float8::quantize(&values, rows, cols, dtype),
        }
        .unwrap();
        let spec = spec_of(&matrix, dtype, false, false);
        check_bytes(&files, module, GroupedFormat::CompressedTensors, &spec, &matrix);
    }
}

/// Numbers that look random, the same every time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    /// A number that every type of 16 bits holds.
    fn scale(&mut self) -> f32 {
        (1 + self.below(200)) as f32 / 4096.0
    }

    fn matrix(&mut self, spec: &ModuleSpec) -> GroupedMatrix {
        let (rows, cols, groups) = (spec.rows, spec.cols, spec.groups());
        let bits = spec.codes.bits();
        let mut each = |n: usize, f: &mut dyn FnMut(&mut Self) -> f32| -> Vec<f32> {
            (0..n).map(|_| f(self)).collect()
        };
        let mut scales = each(rows * groups, &mut Self::scale);
        let minima = each(rows * groups, &mut |random| random.scale() - 0.02);
        let minima = minima.iter().map(|m| (m * 4096.0).round() / 4096.0).collect();
        let mut codes: Vec<u8> = (0..rows * cols).map(|_| self.below(1 << bits) as u8).collect();
        let mut group_of = None;
        let coding = match spec.codes {
            Codes::Integer { symmetric, act_order, .. } => {
                if act_order && groups > 1 {
                    group_of = Some((0..cols).map(|_| self.below(groups) as u32).collect());
                }
                let zero = |_| 1 + self.below((1 << bits) - 1) as u8;
                let zeros = (0..rows * groups).map(zero).collect();
                let zeros = if symmetric { Zeros::Symmetric } else { Zeros::new(bits, zeros) };
                Coding::Integer { bits, zeros }
            }
            Codes::Affine { .. } => Coding::Affine { bits, minima },
            Codes::Nf4 => Coding::Levels(nf4::NF4_LEVELS),
            Codes::Fp4 => Coding::Levels(nf4::FP4_LEVELS),
            Codes::Nvfp4 => {
                float4::round_nvfp4(&mut scales).unwrap();
                Coding::Levels(float4::E2M1_LEVELS)
            }
            Codes::Mxfp4 => {
                scales.iter_mut().for_each(|scale| *scale = float4::mxfp4_scale(*scale));
                Coding::Levels(float4::E2M1_LEVELS)
            }
            Codes::Float8 => {
                codes.iter_mut().filter(|code| **code & 0x7f == 0x7f).for_each(|code| *code = 0);
                Coding::Float8
            }
        };
        let group_size = spec.group_size.unwrap_or(cols);
        let matrix = GroupedMatrix { rows, cols, group_size, coding, codes, scales, group_of };
        matrix.checked().unwrap()
    }
}

/// Writes modules into a checkpoint of their own and opens it.
fn write(
    format: GroupedFormat,
    modules: &[(&str, ModuleSpec, &GroupedMatrix)],
    directory: &std::path::Path,
) -> (Checkpoint, Scheme) {
    let path = directory.join("model.safetensors");
    let specs: Vec<_> =
        modules.iter().flat_map(|(name, spec, _)| format.specs(name, spec).unwrap()).collect();
    let mut writer = SafetensorsWriter::create(&path, &format.metadata(), &specs, None).unwrap();
    for (name, spec, matrix) in modules {
        for (name, data) in format.encode(name, spec, matrix).unwrap() {
            writer.write(&name, &data).unwrap();
        }
    }
    writer.finish().unwrap();
    let mut all: Vec<(String, Option<ModuleSpec>)> =
        modules.iter().map(|(name, spec, _)| ((*name).to_owned(), Some(*spec))).collect();
    all.push(("lm_head".to_owned(), None));
    let config = serde_json::Value::Object(format.config(&all).unwrap());
    let scheme = Scheme::from_config(&config, "config.json").unwrap().unwrap();
    (Checkpoint::open(&path).unwrap(), scheme)
}

/// Checks that matrices are the same after they were written and read.
#[track_caller]
fn check_round_trip(format: GroupedFormat, specs: &[ModuleSpec], seed: u64) {
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random(seed);
    let names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"];
    let matrices: Vec<GroupedMatrix> = specs.iter().map(|spec| random.matrix(spec)).collect();
    let modules: Vec<_> =
        names.iter().zip(specs).zip(&matrices).map(|((n, s), m)| (*n, *s, m)).collect();
    let (files, scheme) = write(format, &modules, directory.path());
    for (name, spec, matrix) in modules {
        assert_eq!(scheme.module_shape(&files, name).unwrap(), Some([spec.rows, spec.cols]));
        let found = scheme.read(&files, name).unwrap();
        if format == NESTED {
            let scales = nf4::DoubleQuantized::new(&matrix.scales).scales();
            assert!((&found.codes, &found.scales) == (&matrix.codes, &scales), "{spec:?}");
        } else {
            assert!(found == *matrix, "{format:?} {spec:?}");
        }
        assert_eq!(scheme.module_shape(&files, "lm_head").unwrap(), None);
    }
    assert!(scheme.warnings().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read(
        rows in 1usize..4, cols in 1usize..6, group in prop::sample::select(vec![16, 32, 64, 96]),
        whole in any::<bool>(), symmetric in any::<bool>(), act_order in any::<bool>(), seed in any::<u64>(),
    ) {
        let (rows, cols) = (32 * rows, 96 * cols);
        let group_size = Some(group).filter(|&size| !whole && cols % size == 0 && size < cols);
        let spec = |codes, group_size| ModuleSpec { rows, cols, group_size, codes, scale_dtype: DType::BF16 };
        for bits in [2, 3, 4, 8] {
            let codes = |act_order| Codes::Integer { bits, symmetric, act_order };
            check_round_trip(GPTQ, &[spec(codes(act_order), group_size)], seed);
            check_round_trip(GPTQ_V2, &[spec(codes(act_order), group_size)], seed);
        }
        for bits in 1..=8 {
            let codes = Codes::Integer { bits, symmetric, act_order: false };
            check_round_trip(GroupedFormat::CompressedTensors, &[spec(codes, group_size)], seed);
        }
        let four = Codes::Integer { bits: 4, symmetric, act_order: false };
        check_round_trip(GroupedFormat::Awq, &[spec(four, group_size)], seed);
        check_round_trip(GroupedFormat::CompressedTensors, &[spec(Codes::Float8, None)], seed);
        check_round_trip(GroupedFormat::CompressedTensors, &[spec(Codes::Nvfp4, Some(16))], seed);
        for format in [GroupedFormat::CompressedTensors, GroupedFormat::Mlx] {
            check_round_trip(format, &[spec(Codes::Mxfp4, Some(32))], seed);
        }
        for codes in [Codes::Nf4, Codes::Fp4] {
            check_round_trip(NF4, &[spec(codes, Some(32))], seed);
            check_round_trip(NESTED, &[spec(codes, Some(32))], seed);
        }
        for bits in [2, 3, 4, 5, 6, 8] {
            check_round_trip(GroupedFormat::Mlx, &[spec(Codes::Affine { bits }, Some(32))], seed);
        }
    }
}

#[test]
fn modules_that_differ_are_told_apart() {
    let spec = |codes, group_size| ModuleSpec {
        rows: 32,
        cols: 128,
        group_size,
        codes,
        scale_dtype: DType::F16,
    };
    let integer = |bits| Codes::Integer { bits, symmetric: true, act_order: false };
    let two = [spec(integer(4), Some(32)), spec(integer(8), Some(64))];
    check_round_trip(GPTQ, &two, 1);
    check_round_trip(GroupedFormat::CompressedTensors, &two, 2);
    let mixed = [two[0], spec(Codes::Float8, None)];
    check_round_trip(GroupedFormat::CompressedTensors, &mixed, 3);
    let two = [4, 6].map(|bits| spec(Codes::Affine { bits }, Some(64)));
    check_round_trip(GroupedFormat::Mlx, &two, 4);
}

#[test]
fn what_a_format_cannot_hold_is_refused() {
    let spec = |codes, rows, cols, group_size| ModuleSpec {
        rows,
        cols,
        group_size,
        codes,
        scale_dtype: DType::BF16,
    };
    let integer = |bits, act_order| Codes::Integer { bits, symmetric: false, act_order };
    let compressed = GroupedFormat::CompressedTensors;
    for (format, spec, reason) in [
        (GPTQ, spec(integer(5, false), 32, 64, None), "not of 5"),
        (GPTQ, spec(Codes::Nf4, 32, 64, None), "integers with zero points"),
        (GPTQ, spec(integer(4, false), 30, 64, None), "there are 30 rows"),
        (GPTQ, spec(integer(4, false), 32, 0, None), "empty"),
        (GroupedFormat::Awq, spec(integer(3, false), 32, 64, None), "4 bits only"),
        (GroupedFormat::Awq, spec(integer(4, true), 32, 64, None), "another order"),
        (GroupedFormat::Awq, spec(integer(4, false), 30, 64, None), "there are 30"),
        (GroupedFormat::Awq, spec(integer(4, false), 32, 64, Some(48)), "do not divide 64"),
        (compressed, spec(integer(4, true), 32, 64, None), "another order"),
        (compressed, spec(Codes::Affine { bits: 4 }, 32, 64, None), "FP8, NVFP4 and MXFP4"),
        (compressed, spec(Codes::Nvfp4, 32, 64, Some(32)), "are 16"),
        (compressed, spec(Codes::Float8, 32, 64, Some(32)), "the whole row"),
        (NF4, spec(integer(4, false), 32, 64, Some(64)), "NF4 and FP4"),
        (NF4, spec(Codes::Nf4, 32, 64, Some(48)), "powers of two"),
        (GroupedFormat::Mlx, spec(Codes::Affine { bits: 7 }, 32, 64, Some(64)), "7 bits"),
        (GroupedFormat::Mlx, spec(Codes::Affine { bits: 4 }, 32, 64, Some(16)), "32, 64 or 128"),
        (GroupedFormat::Mlx, spec(Codes::Affine { bits: 4 }, 32, 96, Some(64)), "do not divide 96"),
    ] {
        check_error(format.specs("layer", &spec), &["`layer`", format.name(), reason]);
    }
}

#[test]
fn readers_that_fail_are_named() {
    let spec = |codes, cols| ModuleSpec {
        rows: 32,
        cols,
        group_size: Some(64),
        codes,
        scale_dtype: DType::BF16,
    };
    let integer = |symmetric| Codes::Integer { bits: 4, symmetric, act_order: false };
    assert!(GPTQ.caveat(&spec(integer(false), 64)).unwrap().contains("`gptq_v2`"));
    assert_eq!(GPTQ.caveat(&spec(integer(true), 64)), None);
    assert_eq!(GPTQ_V2.caveat(&spec(integer(false), 64)), None);
    assert!(NF4.caveat(&spec(Codes::Nf4, 96)).unwrap().contains("CPU"));
    assert_eq!(NF4.caveat(&spec(Codes::Nf4, 128)), None);
}

#[test]
fn matrices_that_would_change_are_refused_until_they_fit() {
    let codes = Codes::Integer { bits: 4, symmetric: false, act_order: false };
    let spec =
        ModuleSpec { rows: 32, cols: 64, group_size: Some(32), codes, scale_dtype: DType::BF16 };
    let mut matrix = Random(5).matrix(&spec);
    let Coding::Integer { zeros: Zeros::Each(zeros), .. } = &mut matrix.coding else {
        unreachable!()
    };
    zeros[0] = 0;
    check_error(GPTQ.encode("layer", &spec, &matrix), &["`gptq_v2`"]);
    GPTQ_V2.encode("layer", &spec, &matrix).unwrap();

    matrix.scales[3] = 0.1;
    for format in [GPTQ_V2, GroupedFormat::Awq, GroupedFormat::CompressedTensors] {
        check_error(format.encode("layer", &spec, &matrix), &["0.1", "fit"]);
        let fitted = format.fit("layer", &spec, matrix.clone()).unwrap();
        format.encode("layer", &spec, &fitted).unwrap();
        assert!((fitted.scales[3] - 0.1).abs() < 0.0005 && fitted.scales[3] != 0.1);
    }
    let affine = ModuleSpec { codes: Codes::Affine { bits: 4 }, ..spec };
    check_error(GroupedFormat::Mlx.encode("layer", &affine, &matrix), &["the matrix is no"]);
    let fitted = GroupedFormat::Mlx.fit("layer", &affine, matrix.clone()).unwrap();
    GroupedFormat::Mlx.encode("layer", &affine, &fitted).unwrap();
    for (found, expected) in fitted.dequantize().iter().zip(matrix.dequantize()) {
        assert!((found - expected).abs() <= 0.01 * 15.0 * 0.1, "{found} for {expected}");
    }
    check_error(
        GPTQ_V2.encode("layer", &ModuleSpec { cols: 96, ..spec }, &matrix),
        &["the matrix is no"],
    );
}
