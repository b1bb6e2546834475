//! What the targets of the model crate do with their input, for its tests and for libFuzzer. Each
//! tells whether the input was accepted, which the seeds must be.

use std::io::Write;
use std::path::Path;
use std::sync::LazyLock;

use bevel_base::DType;
use bevel_formats::TensorSpec;
use bevel_formats::gguf::{Header, Metadata};
use bevel_formats::safetensors::SafetensorsWriter;
use bevel_kernels::{Cpu, Isa, KvType};
use bevel_model::chat::{ChatTemplate, Message, SpecialTexts};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Checkpoint, Error, Model, ModelConfig, Session};
use indexmap::IndexMap;
use serde_json::{Map, json};

/// A `tokenizer.json`.
pub(crate) fn tokenizer_json(bytes: &[u8]) -> bool {
    Tokenizer::from_json_bytes(bytes, None).is_ok_and(|tokenizer| use_tokenizer(&tokenizer))
}

/// A `tokenizer_config.json` beside a good `tokenizer.json`.
pub(crate) fn tokenizer_config(bytes: &[u8]) -> bool {
    const TOKENIZER: &[u8] = include_bytes!("corpus/tokenizer_json/byte_level.json");
    Tokenizer::from_json_bytes(TOKENIZER, Some(bytes)).is_ok_and(|tokenizer| {
        let _ = (tokenizer.chat_template(false), tokenizer.chat_template(true));
        use_tokenizer(&tokenizer)
    })
}

/// The metadata of a GGUF file, as a tokenizer.
pub(crate) fn tokenizer_gguf(bytes: &[u8]) -> bool {
    Header::parse(Path::new("fuzz.gguf"), bytes).is_ok_and(|header| {
        Tokenizer::from_gguf(&header.metadata).is_ok_and(|tokenizer| use_tokenizer(&tokenizer))
    })
}

/// Encodes, decodes and describes; what a tokenizer makes of the text is its own affair.
fn use_tokenizer(tokenizer: &Tokenizer) -> bool {
    const TEXT: &str = "hello  the\n\n 123 it's<|end|> <x> é▁👍🏽\u{1}\r\n";
    let size = tokenizer.vocab_size() as u32;
    for special in [false, true] {
        match tokenizer.encode(TEXT, special, special) {
            Ok(ids) => assert!(ids.iter().all(|&id| id < size), "an id outside the vocabulary"),
            Err(_) => return false,
        }
        let ids: Vec<u32> = (0..size.min(64)).chain([size, u32::MAX]).collect();
        tokenizer.decode(&ids, special);
    }
    let _ = tokenizer.to_gguf(&mut Metadata::new(), tokenizer.vocab_size() + 1);
    true
}

/// A chat template.
pub(crate) fn chat_template(bytes: &[u8]) -> bool {
    let Ok(source) = std::str::from_utf8(bytes) else { return false };
    let special = SpecialTexts { bos_token: Some("<s>".to_owned()), ..SpecialTexts::default() };
    let Ok(template) = ChatTemplate::new(source, special) else { return false };
    let messages = [("system", "Be brief."), ("user", "Hi\n  there"), ("assistant", "<ok> é")]
        .map(|(role, text)| Message::new(role, text));
    let tools = json!([{"type": "function", "function": {"name": "get_x", "parameters": {}}}]);
    template.render(&messages, Some(&tools), true, Map::new()).is_ok()
}

/// A `config.json`, and the directory of small tensors that fits it.
pub(crate) fn config_json(bytes: &[u8]) -> bool {
    let Ok(value) = serde_json::from_slice(bytes) else { return false };
    let Ok(config) = ModelConfig::from_hf(&value, "config.json") else { return false };
    assert!(config.windowed.len() == config.layers && config.heads % config.kv_heads == 0);
    config.to_hf(DType::F32, &[]);
    config.to_gguf(&mut Metadata::new());

    let mut specs: Vec<TensorSpec> = Vec::new();
    let mut values = 0usize;
    for name in config.required_tensors() {
        let stored = config.hf_tensor(&name, "model.").expect("a required tensor is stored");
        let shape = config.tensor_shape(&name).expect("a required tensor has a shape");
        let skipped = usize::from(name.contains("_exps"));
        values = values.saturating_add(shape.iter().product());
        if values > 1 << 14 {
            return true;
        }
        let spec = |name| TensorSpec::new(name, DType::BF16, shape[skipped..].to_vec());
        specs.extend(stored.names.into_iter().map(spec));
    }
    let directory = tempfile::tempdir().expect("a writable temporary directory");
    let file = directory.path().join("model.safetensors");
    let mut writer = SafetensorsWriter::create(&file, &IndexMap::new(), &specs, None)
        .expect("a writable temporary directory");
    for spec in &specs {
        let len = spec.shape.byte_len(spec.dtype).expect("a small tensor");
        writer.write(&spec.name, &vec![0x3c; len]).expect("the declared tensors");
    }
    writer.finish().expect("a writable temporary directory");
    std::fs::write(directory.path().join("config.json"), bytes).expect("as above");
    let checkpoint =
        Checkpoint::open(directory.path()).expect("tensors that fit the configuration");
    run(checkpoint)
}

/// A whole GGUF file: its configuration, its tensors, and two steps of the model.
pub(crate) fn model_gguf(bytes: &[u8]) -> bool {
    let mut file = tempfile::NamedTempFile::new().expect("a writable temporary directory");
    file.write_all(bytes).expect("a writable temporary directory");
    let Ok(checkpoint) = Checkpoint::open(file.path()) else { return false };
    checkpoint.config().to_hf(DType::F32, &[]);
    run(checkpoint)
}

/// Two steps of a model, which may fail only where its weights are no numbers.
fn run(checkpoint: Checkpoint) -> bool {
    static CPU: LazyLock<Cpu> =
        LazyLock::new(|| Cpu::with_isa(1, Isa::detect().expect("`BEVEL_ISA` names one")));
    let Ok(model) = Model::load(checkpoint, &CPU, &mut |_| {}) else { return false };
    let Ok(mut session) = Session::new(&model, &CPU, 4, KvType::F32) else { return false };
    let steps = [&[0, 1, 0][..], &[1]].map(|tokens| session.feed(tokens).map(<[f32]>::to_vec));
    for step in &steps {
        match step {
            Ok(logits) => assert!(logits.iter().all(|logit| logit.is_finite())),
            Err(Error::NotFinite { .. } | Error::Token { .. }) => {}
            Err(error) => panic!("a checked model fails with: {error}"),
        }
    }
    steps.iter().all(Result::is_ok)
}
