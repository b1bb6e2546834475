use std::ops::ControlFlow;

use bevel_base::{DType, Pool};
use bevel_compress::{Container, check, inspect};
use bevel_formats::TensorSpec;
use bevel_formats::gguf::{GgufFile, GgufWriter, Metadata};
use bevel_kernels::KvType;
use bevel_model::ModelConfig;

use crate::support::{convert, hf_config, recipe, tiny_austen, write_gguf, write_llama};

#[test]
fn a_directory_and_the_file_made_from_it() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("a.gguf");
    convert(&tiny_austen(), &recipe("type = \"Q8_0\""), &out).unwrap();
    let (hf, gguf) = (inspect(&tiny_austen()).unwrap(), inspect(&out).unwrap());
    assert_eq!((hf.container, gguf.container), (Container::HuggingFace, Container::Gguf));
    for found in [&hf, &gguf] {
        assert_eq!(found.architecture.as_deref(), Some("llama"));
        assert_eq!(found.note, None);
        assert_eq!(found.active_parameters, None);
        let d = found.dimensions.as_ref().unwrap();
        assert_eq!((d.layers, d.dim, d.heads, d.kv_heads, d.vocabulary), (4, 256, 4, 2, 4096));
        // 2 · 4 layers · 2 heads · 64 wide · 2 bytes, for 1024 tokens.
        let memory = found.memory(None, KvType::F16).unwrap();
        assert_eq!((memory.context, memory.kv), (1024, 2 * 4 * 2 * 64 * 2 * 1024));
        assert_eq!(found.memory(Some(100), KvType::F32).unwrap().kv, 2 * 4 * 2 * 64 * 4 * 112);
        assert!(found.memory(Some(usize::MAX), KvType::F32).is_none());
    }
    assert_eq!(hf.parameters, gguf.parameters);
    assert_eq!(hf.bits_per_weight, 16.0);
    assert!((8.5..8.6).contains(&gguf.bits_per_weight), "{}", gguf.bits_per_weight);
    assert_eq!(gguf.provenance.unwrap().recipe.trim(), "type = \"Q8_0\"");
    assert_eq!(gguf.types[0].dtype, DType::Q8_0);
    assert_eq!(gguf.tokenizer.unwrap().tokens, Some(4096));
}

#[test]
fn experts_that_rest_are_not_active() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.gguf");
    let config = ModelConfig::from_hf(&hf_config("mixtral"), "test").unwrap();
    write_gguf(&path, &config, DType::Q4_0, |_, len| vec![0.0; len]);
    let found = inspect(&path).unwrap();
    let resting = 2 * 3 * 2 * 256 * 256; // layers, matrices, experts
    assert_eq!(found.active_parameters, Some(found.parameters - resting));
}

#[test]
fn an_unknown_architecture_is_listed_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.gguf");
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture".to_owned(), "abacus".into());
    let specs = [TensorSpec::new("beads", DType::F32, [3, 4])];
    let mut writer = GgufWriter::create(&path, &metadata, &specs, None).unwrap();
    writer.write("beads", &[0; 48]).unwrap();
    writer.finish().unwrap();
    let found = inspect(&path).unwrap();
    assert_eq!(found.architecture.as_deref(), Some("abacus"));
    assert_eq!((found.parameters, found.tensors.len()), (12, 1));
    assert!(found.note.is_some() && found.dimensions.is_none());
    assert_eq!(found.memory(None, KvType::F16), None);
}

#[test]
fn check_names_damaged_tensors() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.gguf");
    write_llama(&path, DType::Q8_0);
    let go_on = &mut |_: bevel_compress::Progress<'_>| ControlFlow::Continue(());
    let pool = Pool::new(2);
    assert_eq!(check(&path, &pool, go_on).unwrap(), []);
    // The scale of block 1500 becomes a NaN.
    let range = GgufFile::open(&path).unwrap().tensors()["blk.1.ffn_up.weight"].range();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[range.start + 34 * 1500..][..2].copy_from_slice(&[0xff, 0x7f]);
    std::fs::write(&path, bytes).unwrap();
    let broken = check(&path, &pool, go_on).unwrap();
    assert_eq!(broken.len(), 1);
    assert_eq!(broken[0].name, "blk.1.ffn_up.weight");
    assert_eq!((broken[0].values, broken[0].first), (32, 48_000));
}
