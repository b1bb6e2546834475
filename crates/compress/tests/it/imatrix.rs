//! Importance matrices: put to use, and gathered.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bevel_base::{DType, pack};
use bevel_compress::{
    Calibration, Error, Options, Preview, Progress, Recipe, Report, gather_imatrix,
};
use bevel_formats::gguf::GgufFile;
use bevel_formats::imatrix::{Imatrix, ImatrixEntry};
use bevel_kernels::Cpu;
use bevel_model::{Checkpoint, ModelConfig};

use crate::support::{
    Values, contents, convert_with, hf_config, listing, recipe, tiny_austen, write_gguf,
    write_llama,
};

/// Quantizes on two threads.
fn quantize(
    from: &Path,
    recipe: &Recipe,
    out: &Path,
    strict: bool,
) -> bevel_compress::Result<Report> {
    let options = Options { strict, force: true, ..Options::default() };
    convert_with(from, recipe, out, &options)
}

fn with_imatrix(dtype: &str, file: &Path) -> String {
    format!(
        "type = \"{dtype}\"\nmethod = \"importance\"\nimatrix = {{ file = '{}' }}",
        file.display()
    )
}

/// Mean squares that differ from column to column by a factor of up to 500.
fn sums(values: &mut Values, len: usize) -> Vec<f32> {
    values.take(len).iter().map(|v| (1.001 + v).powi(3) * 8.0).collect()
}

/// A matrix for the blocks of a model, 4 tokens each.
fn imatrix_of(model: &Path) -> Imatrix {
    let mut values = Values::new(77);
    let mut imatrix = Imatrix { chunks: 2, chunk_size: 2, ..Imatrix::default() };
    imatrix.datasets.push("some.txt".to_owned());
    for (name, entry) in Checkpoint::open(model).unwrap().tensors() {
        let dims = entry.shape.dims();
        if dims.len() < 2 || !name.starts_with("blk.") || name.contains("gate_inp") {
            continue;
        }
        let matrices: usize = dims[..dims.len() - 2].iter().product();
        let sums = sums(&mut values, matrices * entry.shape.row_len());
        let counts = vec![4; matrices];
        imatrix.entries.insert(name.clone(), ImatrixEntry { sums, counts });
    }
    imatrix
}

/// What packing a tensor with an entry's mean squares gives, block by block.
fn packed(model: &Path, name: &str, dtype: DType, entry: Option<&ImatrixEntry>) -> Vec<u8> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let shape = checkpoint.entry(name).unwrap().shape.clone();
    let values = checkpoint.read_f32(name).unwrap();
    let columns = shape.row_len();
    let rows = shape.dims()[shape.dims().len() - 2];
    let importance: Option<Vec<f32>> = entry.map(|entry| {
        let per_matrix = entry.sums.chunks(columns).zip(&entry.counts);
        let mean = |(sums, count): (&[f32], &u64)| -> Vec<f32> {
            let of = |sum: &f32| if *count == 0 { 1.0 } else { sum / *count as f32 };
            sums.iter().map(of).collect()
        };
        per_matrix.flat_map(|pair| mean(pair).repeat(rows)).collect()
    });
    let mut bytes = vec![0; dtype.row_bytes(values.len()).unwrap()];
    pack::quantize(dtype, &values, importance.as_deref(), &mut bytes).unwrap();
    bytes
}

fn check_bytes(model: &Path, out: &Path, imatrix: &Imatrix) -> usize {
    let mut weighed = 0;
    for (name, dtype, _, bytes) in contents(out) {
        if dtype.is_packed() {
            let entry = imatrix.entries.get(&name);
            assert!(bytes == packed(model, &name, dtype, entry), "{name}");
            weighed += usize::from(bytes != packed(model, &name, dtype, None));
        }
    }
    weighed
}

#[test]
fn errors_are_weighed_by_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (model, file, out) = (path("a.gguf"), path("m.gguf"), path("b.gguf"));
    write_llama(&model, DType::F32);
    let imatrix = imatrix_of(&model);
    imatrix.write(&file).unwrap();
    for (dtype, types) in [("Q4_K_S", 3), ("Q3_K_M", 4), ("IQ4_XS", 2), ("Q5_0", 2)] {
        let report = quantize(&model, &recipe(&with_imatrix(dtype, &file)), &out, true).unwrap();
        // All seven matrices of both layers.
        assert_eq!(check_bytes(&model, &out, &imatrix), 14, "{dtype}");
        assert!(report.tensors.iter().all(|t| t.solved.is_empty()));
        let mut found: Vec<DType> = contents(&out).iter().map(|t| t.1).collect();
        found.sort_by_key(|t| t.name());
        found.dedup();
        assert_eq!(found.len(), types + 1, "{dtype}: {found:?}");
    }
}

/// A mixture of 4 experts.
fn write_mixture(path: &Path) {
    let config = ModelConfig::from_hf(&hf_config("mixtral"), "test").unwrap();
    let mut values = Values::new(6);
    write_gguf(path, &config, DType::F32, |_, len| {
        values.take(len).iter().map(|v| (v * 1.7).sin()).collect()
    });
}

#[test]
fn each_expert_has_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (model, file, out) = (path("a.gguf"), path("m.gguf"), path("b.gguf"));
    write_mixture(&model);
    let mut imatrix = imatrix_of(&model);
    // An expert that no token came to, and one count for all experts, as the older format has it.
    imatrix.entries["blk.1.ffn_up_exps.weight"].counts[2] = 0;
    imatrix.entries["blk.0.ffn_up_exps.weight"].counts = vec![5];
    imatrix.write(&file).unwrap();
    let recipe = recipe(&with_imatrix("Q4_0", &file));
    let report = quantize(&model, &recipe, &out, false).unwrap();
    let warning = &report.warnings[0];
    assert!(
        warning.starts_with("1 tensors, the first is `blk.1.ffn_up_exps.weight`, have experts (1"),
        "{warning}"
    );
    imatrix.entries["blk.0.ffn_up_exps.weight"].counts = vec![5; 4];
    assert_eq!(check_bytes(&model, &out, &imatrix), 14);
    let strict = quantize(&model, &recipe, &out, true);
    assert!(matches!(strict, Err(Error::Strict(_))));
}

#[test]
fn the_recipe_says_which_file_and_repeats_the_run() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (model, file, out) = (path("a.gguf"), path("m.gguf"), path("b.gguf"));
    write_llama(&model, DType::F32);
    let mut imatrix = imatrix_of(&model);
    imatrix.write(&file).unwrap();
    let asked = recipe(&with_imatrix("Q4_0", &file));
    let report = quantize(&model, &asked, &out, true).unwrap();
    let written = GgufFile::open(&out).unwrap();
    let text = |key: &str| written.metadata()[key].as_str().unwrap().to_owned();
    let number = |key: &str| written.metadata()[key].as_usize().unwrap();
    assert_eq!(text("quantize.imatrix.file"), file.display().to_string());
    assert_eq!(text("quantize.imatrix.dataset"), "some.txt");
    assert_eq!(number("quantize.imatrix.entries_count"), 14);
    assert_eq!(number("quantize.imatrix.chunks_count"), 2);

    let carried: Recipe = text("bevel.recipe").parse().unwrap();
    assert_eq!(carried, report.recipe);
    assert_eq!(carried.imatrix.as_ref().unwrap().sha256.as_ref().unwrap().len(), 64);
    quantize(&model, &carried, &path("c.gguf"), true).unwrap();
    assert!(std::fs::read(&out).unwrap() == std::fs::read(path("c.gguf")).unwrap());

    imatrix.entries[0].sums[0] += 1.0;
    imatrix.write(&file).unwrap();
    let error = quantize(&model, &carried, &out, true).unwrap_err().to_string();
    assert!(error.contains("its SHA-256 is") && error.contains("leave `sha256` out"), "{error}");
    quantize(&model, &asked, &out, true).unwrap();
}

/// Changes a matrix that fits, and expects the run to be refused with `expected`.
#[track_caller]
fn check_refused(change: impl FnOnce(&mut Imatrix), expected: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    write_llama(&path("a.gguf"), DType::F16);
    let mut imatrix = imatrix_of(&path("a.gguf"));
    change(&mut imatrix);
    imatrix.write(&path("m.gguf")).unwrap();
    let recipe = recipe(&with_imatrix("Q4_0", &path("m.gguf")));
    let error = quantize(&path("a.gguf"), &recipe, &path("b.gguf"), false).unwrap_err().to_string();
    for part in expected {
        assert!(error.contains(part), "no `{part}` in: {error}");
    }
    let checkpoint = Checkpoint::open(&path("a.gguf")).unwrap();
    assert_eq!(Preview::new(&checkpoint, &recipe).unwrap_err().to_string(), error);
    assert_eq!(listing(directory.path()), ["a.gguf", "m.gguf"]);
}

#[test]
fn matrices_of_other_models_are_refused() {
    let entry = || ImatrixEntry::dense(vec![1.0; 256], 1);
    check_refused(
        |m| drop(m.entries.insert("blk.2.attn_q.weight".to_owned(), entry())),
        &["m.gguf`", "`blk.2.attn_q.weight`", "the model has 2 layers", "bevel imatrix MODEL"],
    );
    check_refused(
        |m| m.entries["blk.1.ffn_down.weight"].sums.truncate(128),
        &["`blk.1.ffn_down.weight`", "128 columns", "1 × 256", "another model", "bevel imatrix"],
    );
    check_refused(
        |m| m.entries = [("blk.0.in_proj.weight".to_owned(), entry())].into_iter().collect(),
        &["none of its 1 tensors", "`blk.0.in_proj.weight`", "bevel imatrix"],
    );
}

#[test]
fn what_the_file_lacks_is_counted() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (model, file, out) = (path("a.gguf"), path("m.gguf"), path("b.gguf"));
    write_llama(&model, DType::F32);
    let mut imatrix = imatrix_of(&model);
    imatrix.entries.shift_remove("blk.1.attn_k.weight");
    imatrix.entries.shift_remove("blk.1.ffn_up.weight");
    imatrix.entries.insert("blk.1.other.weight".to_owned(), ImatrixEntry::dense(vec![1.0], 1));
    imatrix.write(&file).unwrap();
    let recipe = recipe(&with_imatrix("Q4_0", &file));
    let report = quantize(&model, &recipe, &out, false).unwrap();
    let expected = [
        "2 tensors, the first is `blk.1.attn_k.weight`, are not in the importance matrix",
        "1 tensors of the importance matrix",
    ];
    assert_eq!(report.warnings.len(), 2, "{:?}", report.warnings);
    for (warning, expected) in report.warnings.iter().zip(expected) {
        assert!(warning.starts_with(expected), "{warning}");
    }
    assert_eq!(check_bytes(&model, &out, &imatrix), 12);
    let strict = quantize(&model, &recipe, &out, true);
    assert!(matches!(strict, Err(Error::Strict(all)) if all.len() == 2));
}

#[test]
fn what_an_importance_matrix_cannot_be_joined_with() {
    let toml = |more: &str| format!("{more}\nimatrix = {{ file = 'm.gguf' }}");
    for (more, reason) in [
        ("type = 'Q4_0'", "not with `rtn`"),
        ("type = 'Q4_0'\nmethod = 'gptq'", "not with `gptq`, which needs calibration data"),
        ("type = 'Q4_0'\nmethod = 'importance'\nfold = true", "use calibration data"),
        ("type = 'Q4_0'\nmethod = 'importance'\nrotate = 3", "scaled or rotated first"),
        (
            "type = 'Q4_0'\nmethod = 'importance'\ncalibration = { source = 'self' }",
            "exclude each other",
        ),
        (
            "type = 'keep'\nmethod = 'importance'\nbudget = { bits_per_weight = 3.0 }",
            "which a budget asks for",
        ),
        ("type = 'W4'\nmethod = 'importance'", "for W4 use calibration data"),
    ] {
        let error = toml(more).parse::<Recipe>().unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains("`m.gguf`"), "{more}: {error}");
    }
}

/// A file that `llama-imatrix` made of `assets/tour.txt`: three chunks of 64 tokens.
fn by_llama_cpp() -> Imatrix {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../formats/tests/goldens");
    Imatrix::read(&goldens.join("imatrix/austen.gguf")).unwrap()
}

fn gather(model: &Path, sequences: Vec<Vec<u32>>, with_head: bool) -> Imatrix {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("m.gguf");
    let description = "some text".to_owned();
    let data = Calibration { sequences, fingerprint: [0; 32], description, warnings: Vec::new() };
    let checkpoint = Checkpoint::open(model).unwrap();
    let cpu = Cpu::new(2).unwrap();
    let go_on = &mut |_: Progress<'_>| ControlFlow::Continue(());
    let found = gather_imatrix(&checkpoint, &data, with_head, &out, &cpu, go_on).unwrap();
    assert!(listing(directory.path()).is_empty(), "nothing is left behind");
    found
}

#[test]
fn what_is_gathered_is_what_llama_imatrix_gathers() {
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tour.txt");
    let text = std::fs::read_to_string(text).unwrap();
    let tokenizer = Checkpoint::open(&tiny_austen()).unwrap().tokenizer().unwrap();
    let tokens = tokenizer.encode(&text, true, false).unwrap();
    // llama-imatrix puts the mark of beginning in the place of a chunk's first token.
    let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    let mut chunks: Vec<Vec<u32>> = tokens.chunks(64).take(3).map(<[u32]>::to_vec).collect();
    chunks.iter_mut().for_each(|chunk| chunk[0] = bos.unwrap_or(chunk[0]));
    let (found, expected) = (gather(&tiny_austen(), chunks, false), by_llama_cpp());
    assert_eq!((found.chunks, found.chunk_size), (3, 64));
    assert_eq!(found.entries.len(), expected.entries.len());
    for (name, expected) in &expected.entries {
        let found = &found.entries[name];
        assert_eq!(found.counts, expected.counts, "{name}");
        for (i, (a, b)) in found.sums.iter().zip(&expected.sums).enumerate() {
            // The attention of llama.cpp keeps keys and values in halves.
            assert!((a - b).abs() <= 5e-3 * b.abs().max(1e-6), "{name}, column {i}: {a}, {b}");
        }
    }
}

#[test]
fn experts_and_the_output_head_are_looked_at() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("a.gguf");
    write_mixture(&model);
    let sequences = vec![(0..48).collect(), (40..88).collect()];
    let found = gather(&model, sequences.clone(), true);
    // In each layer queries, keys, values, the attention's output, and three stacks of experts.
    assert_eq!(found.entries.len(), 2 * 7 + 1);
    assert_eq!(found.entries["output.weight"].counts, [96]);
    assert_eq!(found.entries["blk.1.attn_output.weight"].counts, [96]);
    for name in ["gate", "up", "down"] {
        let entry = &found.entries[&format!("blk.1.ffn_{name}_exps.weight")];
        assert_eq!(entry.counts.len(), 4);
        // Two experts a token.
        assert_eq!(entry.counts.iter().sum::<u64>(), 2 * 96, "{name}");
        for (sums, count) in entry.sums.chunks(256).zip(&entry.counts) {
            assert_eq!(*count == 0, sums.iter().all(|sum| *sum == 0.0), "{name}");
        }
    }
    let [gate, up] = ["gate", "up"].map(|n| &found.entries[&format!("blk.1.ffn_{n}_exps.weight")]);
    assert_eq!(gate, up);
    let without = gather(&model, sequences, false);
    assert_eq!(without.entries.len(), 14);
    assert_eq!(
        without.entries["blk.1.ffn_down_exps.weight"],
        found.entries["blk.1.ffn_down_exps.weight"]
    );

    // It is accepted for the model that it was made with, and changes what is written.
    let file = directory.path().join("m.gguf");
    found.write(&file).unwrap();
    let out = directory.path().join("b.gguf");
    quantize(&model, &recipe(&with_imatrix("Q4_0", &file)), &out, true).unwrap();
    assert_eq!(check_bytes(&model, &out, &found), 15);
}

#[test]
fn threads_do_not_matter_to_what_is_gathered() {
    let model: PathBuf = tiny_austen();
    let sequences = vec![(5..37).collect(), (100..132).collect()];
    let data = Calibration {
        sequences,
        fingerprint: [0; 32],
        description: String::new(),
        warnings: Vec::new(),
    };
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("m.gguf");
    let checkpoint = Checkpoint::open(&model).unwrap();
    let [one, three] = [1, 3].map(|threads| {
        let go_on = &mut |_: Progress<'_>| ControlFlow::Continue(());
        gather_imatrix(&checkpoint, &data, true, &out, &Cpu::new(threads).unwrap(), go_on).unwrap()
    });
    assert_eq!(one, three);
    assert!(
        one.entries.contains_key("token_embd.weight"),
        "the head of this model is its embedding"
    );
}
