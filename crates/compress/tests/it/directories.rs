//! Directories whose linear layers are codes in groups: what is written is read, and means the model.

use bevel_base::DType;
use bevel_compress::{CodeType, Error, FormatName, Options, Preview, Recipe};
use bevel_model::Checkpoint;

use crate::support::{convert_with, recipe, tiny_austen};

/// Quantizes the small real model and compares every weight with the original's.
#[track_caller]
fn check(toml: &str, worst: f64) {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("coded");
    let report = convert_with(&tiny_austen(), &recipe(toml), &out, &Default::default()).unwrap();
    let (before, after) =
        (Checkpoint::open(&tiny_austen()).unwrap(), Checkpoint::open(&out).unwrap());
    assert!(after.scheme().is_some(), "{toml}: the configuration says nothing of it");
    let mut coded = 0;
    for (name, entry) in before.tensors() {
        let (a, b) = (before.read_f32(name).unwrap(), after.read_f32(name).unwrap());
        let sum = |it: &mut dyn Iterator<Item = f32>| it.map(|v| f64::from(v * v)).sum::<f64>();
        let moved = sum(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / sum(&mut a.iter().copied());
        let is_coded = after.entry(name).unwrap().is_coded();
        coded += usize::from(is_coded);
        let bound = if is_coded { worst } else { 1e-9 };
        assert!(moved.sqrt() < bound, "{toml}: {name} {} moved by {}", entry.shape, moved.sqrt());
        let reported = report.tensors.iter().find(|t| t.name == *name);
        if let Some(reported) = reported.filter(|_| is_coded) {
            assert!((reported.relative_error - moved.sqrt()).abs() < 2e-3, "{toml}: {name}");
        }
    }
    assert_eq!(coded, 4 * 7, "{toml}: linear layers of four layers");
    // Tokenizer and configuration come along.
    assert!(after.tokenizer().is_ok());
}

#[test]
fn every_format_holds_what_it_can() {
    check("type = \"W4\"", 0.15);
    check("type = \"W3\"\nformat = \"gptq\"\ngroup_size = 64", 0.25);
    check("type = \"W8\"\nformat = \"gptq_v2\"\nsymmetric = false", 0.02);
    check("type = \"W4\"\nformat = \"awq\"", 0.12);
    check("type = \"W4\"\nformat = \"compressed-tensors\"\ngroup_size = 0", 0.2);
    check("type = \"W6\"\nformat = \"compressed-tensors\"\nsymmetric = false", 0.04);
    check("type = \"W5\"\nformat = \"mlx\"", 0.06);
    check("type = \"NF4\"", 0.12);
    check("type = \"FP4\"\nformat = \"bitsandbytes-flat\"", 0.15);
    check("type = \"FP8\"", 0.04);
    check("type = \"NVFP4\"", 0.12);
    check("type = \"MXFP4-HF\"", 0.15);
    check("type = \"MXFP4-HF\"\nformat = \"mlx\"", 0.15);
}

/// The types of all plain tensors, and what the configuration calls the model's.
fn plain_types(toml: &str) -> (Vec<(String, DType)>, String, Vec<String>) {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("coded");
    let report = convert_with(&tiny_austen(), &recipe(toml), &out, &Default::default()).unwrap();
    let files = bevel_formats::safetensors::Checkpoint::open(&out).unwrap();
    let is_coded = |name: &str| {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        name.contains(".weight.")
            || files.tensors().contains_key(&format!("{module}.weight.absmax"))
    };
    let plain = files.tensors().iter().filter(|(name, _)| !is_coded(name));
    let types = plain.map(|(name, info)| (name.clone(), info.dtype)).collect();
    let config = std::fs::read(out.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let dtype = config.get("dtype").or(config.get("torch_dtype")).unwrap().as_str().unwrap();
    (types, dtype.to_owned(), report.warnings)
}

#[test]
fn plain_tensors_share_the_models_type() {
    // bevel reads norms as F32, whatever they are stored as.
    let (types, named, warnings) =
        plain_types("type = \"NF4\"\nformat = \"bitsandbytes-flat\"\ngroup_size = 64");
    assert!(types.iter().all(|(_, dtype)| *dtype == DType::BF16), "{types:?}");
    assert_eq!(named, "bfloat16");
    assert!(warnings.is_empty(), "{warnings:?}");
}

#[test]
fn a_type_that_is_asked_for_is_given() {
    let (types, _, warnings) = plain_types(
        "type = \"NF4\"\noutput_type = \"F32\"\ntensor = [{ pattern = \"blk.1.ffn_down.weight\", type = \"F16\" }, { pattern = \"blk.9.*\", type = \"F16\" }]",
    );
    let type_of = |name: &str| types.iter().find(|(n, _)| n == name).map(|(_, dtype)| *dtype);
    assert_eq!(type_of("model.embed_tokens.weight"), Some(DType::F32), "it is the head too");
    assert_eq!(type_of("model.layers.1.mlp.down_proj.weight"), Some(DType::F16));
    assert_eq!(type_of("model.layers.2.mlp.down_proj.weight"), None, "codes");
    assert!(warnings.iter().any(|w| w.contains("several types")), "{warnings:?}");
    assert!(warnings.iter().any(|w| w.contains("`blk.9.*` matches no tensor")), "{warnings:?}");
}

#[test]
fn a_preview_is_what_comes_out() {
    let directory = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    for (i, toml) in [
        "type = \"W4\"\nkeep = [\"blk.1.*\"]",
        "type = \"W3\"\ngroup_size = 64\nrotate = 3",
        "type = \"NF4\"",
        "type = \"W4\"\nformat = \"mlx\"",
        "type = \"Q3_K_M\"\nrotate = 3",
    ]
    .into_iter()
    .enumerate()
    {
        let recipe = recipe(toml);
        let name = if toml.contains("Q3_K_M") { format!("{i}.gguf") } else { i.to_string() };
        let preview = Preview::new(&checkpoint, &recipe).unwrap();
        let out = directory.path().join(name);
        let report = convert_with(&tiny_austen(), &recipe, &out, &Default::default()).unwrap();
        assert_eq!(preview.totals.bytes_after, report.totals.bytes_after, "{toml}");
        assert_eq!(preview.totals.bytes_before, report.totals.bytes_before, "{toml}");
        assert_eq!(preview.tensors.len(), report.tensors.len(), "{toml}");
        for (a, b) in preview.tensors.iter().zip(&report.tensors) {
            assert_eq!((&a.name, a.from, a.to), (&b.name, b.from, b.to), "{toml}");
            assert_eq!((&a.shape, a.bytes_after), (&b.shape, b.bytes_after), "{toml}");
        }
    }
}

#[test]
fn a_rotated_directory_keeps_the_models_own_type() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("r");
    let rotated = recipe("type = \"W4\"\nrotate = 1");
    convert_with(&tiny_austen(), &rotated, &out, &Default::default()).unwrap();
    let (before, after) =
        (Checkpoint::open(&tiny_austen()).unwrap(), Checkpoint::open(&out).unwrap());
    let dtype = |c: &Checkpoint| c.entry("token_embd.weight").unwrap().dtype;
    assert_eq!(dtype(&after), dtype(&before));
    assert_ne!(dtype(&after), DType::F32);
}

#[test]
fn what_does_not_fit_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let refuse = |toml: &str, name: &str, words: &str| {
        let out = directory.path().join(name);
        let outcome = convert_with(&tiny_austen(), &recipe(toml), &out, &Default::default());
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains(words), "{toml}: {error}");
        assert!(!out.exists());
    };
    refuse("type = \"W4\"", "a.gguf", "Hugging Face directories");
    refuse("type = \"W3\"\nformat = \"awq\"", "a", "4");
    refuse("type = \"W4\"\nsymmetric = false", "d", "gptq_v2");
    let ordered = "method = \"gptq\"\n[gptq]\norder = \"act-order\"";
    refuse(&format!("type = \"W4\"\nformat = \"awq\"\n{ordered}"), "e", "static-groups");
    refuse(&format!("type = \"NF4\"\n{ordered}"), "e", "integers");
    let packed = format!("type = \"Q4_0\"\n{ordered}").parse::<Recipe>().unwrap_err();
    assert!(packed.to_string().contains("a directory of integer codes"), "{packed}");
    refuse("type = \"NF4\"\nformat = \"gptq\"", "b", "gptq");
    refuse("type = \"W4\"\noutput_type = \"Q6_K\"", "b", "Q6_K");
    refuse("type = \"W4\"\nformat = \"bitsandbytes\"", "c", "NF4");
}

#[test]
fn only_models_are_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let options = Options { force: true, ..Options::default() };
    let refuse = |name: &str, words: &str| {
        let out = directory.path().join(name);
        let outcome = convert_with(&tiny_austen(), &recipe("type = \"W4\""), &out, &options);
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    let write = |name: &str| std::fs::write(directory.path().join(name), "precious").unwrap();
    std::fs::create_dir(directory.path().join("texts")).unwrap();
    write("texts/diary.md");
    refuse("texts", "`diary.md` and no model");
    write("file");
    refuse("file", "it is a file");
    let model = directory.path().join("model");
    for _ in 0..2 {
        convert_with(&tiny_austen(), &recipe("type = \"W4\""), &model, &options).unwrap();
    }
    write("model/notes.txt");
    refuse("model", "`notes.txt`, which is no part of a model");
    for name in ["texts/diary.md", "file", "model/notes.txt"] {
        assert_eq!(std::fs::read(directory.path().join(name)).unwrap(), b"precious");
    }
}

#[test]
fn names_of_codes_and_formats_are_read_back() {
    for code in CodeType::ALL {
        assert_eq!(CodeType::named(code.name()), Some(code));
    }
    for format in FormatName::ALL.map(FormatName) {
        assert_eq!(format.to_string().parse::<FormatName>().unwrap(), format);
    }
    assert!(matches!("gptq3".parse::<FormatName>(), Err(Error::Recipe(_))));
}

#[test]
fn a_rotated_model_is_another_file_and_the_same_function() {
    let directory = tempfile::tempdir().unwrap();
    let (file, dir) = (directory.path().join("r.gguf"), directory.path().join("r"));
    let toml = "type = \"F32\"\nrotate = 7";
    convert_with(&tiny_austen(), &recipe(toml), &file, &Default::default()).unwrap();
    convert_with(&tiny_austen(), &recipe(toml), &dir, &Default::default()).unwrap();
    let (file, dir) = (Checkpoint::open(&file).unwrap(), Checkpoint::open(&dir).unwrap());
    assert!(!file.config().tied && !dir.config().tied, "the head takes the last norm's gain");
    let expected = Checkpoint::open(&tiny_austen()).unwrap().rotated(7).unwrap();
    for name in expected.tensors().keys() {
        let values = expected.read_f32(name).unwrap();
        assert_eq!(file.read_f32(name).unwrap(), values, "{name}");
        assert_eq!(dir.read_f32(name).unwrap(), values, "{name}");
    }
    assert!(file.tokenizer().is_ok() && dir.tokenizer().is_ok());
}
