//! Encoding and decoding against `transformers`' tokenizers, from both file formats.

use std::path::{Path, PathBuf};

use bevel_formats::gguf::{Metadata, Value};
use bevel_model::tokenizer::{Alphabet, TokenKind, Tokenizer, TokenizerError};
use proptest::prelude::*;
use serde::Deserialize;

/// What `goldens/tokenizer/make_tokenizers.py` wrote for one line of its nasty text.
#[derive(Deserialize)]
struct Expected {
    /// With the tokens around a text, special tokens parsed.
    added: Vec<u32>,
    /// Special tokens parsed.
    ids: Vec<u32>,
    /// Special tokens taken for text.
    plain: Vec<u32>,
    decoded: String,
    skipped: String,
}

const NAMES: &[&str] =
    &["gpt2", "smollm", "llama3", "qwen2", "deepseek3", "tekken", "llama2", "gemma", "tiny-austen"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tokenizer").join(name)
}

fn read<T: serde::de::DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

fn hf_bytes(name: &str) -> Vec<u8> {
    let path = match name {
        "tiny-austen" => {
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen/tokenizer.json")
        }
        _ => golden(&format!("{name}.json")),
    };
    std::fs::read(path).unwrap()
}

fn hf(name: &str) -> Tokenizer {
    // The golden tokenizers have no `tokenizer_config.json`; GGUF needs to know what begins a text.
    let config: &[u8] = match name {
        "llama2" | "gemma" => br#"{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}"#,
        _ => br#"{"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}"#,
    };
    Tokenizer::from_json_bytes(&hf_bytes(name), Some(config)).unwrap()
}

fn gguf(tokenizer: &Tokenizer) -> Metadata {
    let mut metadata = Metadata::new();
    tokenizer.to_gguf(&mut metadata, tokenizer.vocab_size() + 7).unwrap();
    metadata
}

#[track_caller]
fn check(name: &str, tokenizer: &Tokenizer) {
    let texts: Vec<String> = read("nasty.json");
    let expected: Vec<Expected> = read(&format!("{name}.expected.json"));
    assert_eq!(texts.len(), expected.len());
    for (text, expected) in texts.iter().zip(&expected) {
        let ids = |special, parse| tokenizer.encode(text, special, parse).unwrap();
        assert_eq!(ids(false, true), expected.ids, "{name}: {text:?}");
        assert_eq!(ids(true, true), expected.added, "{name} with special tokens: {text:?}");
        assert_eq!(ids(false, false), expected.plain, "{name} as plain text: {text:?}");
        assert_eq!(tokenizer.decode(&expected.ids, false), expected.decoded, "{name}: {text:?}");
        assert_eq!(tokenizer.decode(&expected.ids, true), expected.skipped, "{name}: {text:?}");
    }
}

#[test]
fn from_tokenizer_json() {
    for name in NAMES {
        check(name, &hf(name));
    }
}

#[test]
fn from_gguf_metadata() {
    for name in NAMES {
        let tokenizer = Tokenizer::from_gguf(&gguf(&hf(name))).unwrap();
        assert_eq!(tokenizer.warnings(), [""; 0], "{name}");
        check(name, &tokenizer);
    }
}

#[test]
fn from_what_a_gguf_reader_writes_as_hugging_face_files() {
    for name in NAMES {
        let dir = tempfile::tempdir().unwrap();
        Tokenizer::from_gguf(&gguf(&hf(name))).unwrap().to_hf(dir.path()).unwrap();
        check(name, &Tokenizer::from_hf(dir.path()).unwrap());
        let left: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }
}

/// llama.cpp's converter writes SentencePiece's scores and no merges.
/// Readers that number added tokens themselves begin after the vocabulary: one that lies inside has to
/// be in it, as it is in the files that models are published with.
#[test]
fn written_vocabularies_have_no_holes() {
    let mut inside = 0;
    for name in NAMES {
        let dir = tempfile::tempdir().unwrap();
        Tokenizer::from_gguf(&gguf(&hf(name))).unwrap().to_hf(dir.path()).unwrap();
        let text = std::fs::read(dir.path().join("tokenizer.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let vocab = json["model"]["vocab"].as_object().unwrap();
        let last = vocab.values().filter_map(serde_json::Value::as_u64).max().unwrap();
        let added = json["added_tokens"].as_array().unwrap();
        for token in added.iter().filter(|t| t["id"].as_u64().unwrap() < last) {
            let content = token["content"].as_str().unwrap();
            assert_eq!(vocab.get(content), Some(&token["id"]), "{name}: `{content}`");
            inside += 1;
        }
    }
    assert!(inside > 0, "no tokenizer here has an added token inside its vocabulary");
}

#[test]
fn sentence_piece_from_scores_alone() {
    let scores: serde_json::Map<String, serde_json::Value> = read("scores.json");
    for name in ["llama2", "gemma"] {
        let mut metadata = gguf(&hf(name));
        metadata.shift_remove("tokenizer.ggml.merges").unwrap();
        let mut scores: Vec<f32> = serde_json::from_value(scores[name].clone()).unwrap();
        scores.resize(scores.len() + 7, 0.0);
        metadata.insert("tokenizer.ggml.scores".to_owned(), scores.into());
        check(name, &Tokenizer::from_gguf(&metadata).unwrap());
    }
}

/// The scores that are written in the place of SentencePiece's own lead to the same merges.
#[test]
fn scores_follow_the_merges() {
    for name in ["llama2", "gemma"] {
        let mut metadata = gguf(&hf(name));
        metadata.shift_remove("tokenizer.ggml.merges").unwrap();
        check(name, &Tokenizer::from_gguf(&metadata).unwrap());
    }
}

#[test]
fn gguf_names_the_pre_tokenizer_by_what_it_does() {
    let name = |name| gguf(&hf(name))["tokenizer.ggml.pre"].clone();
    assert_eq!(name("gpt2"), Value::from("gpt-2"));
    assert_eq!(name("tiny-austen"), Value::from("gpt-2"));
    assert_eq!(name("smollm"), Value::from("smollm"));
    assert_eq!(name("llama3"), Value::from("llama-bpe"));
    assert_eq!(name("qwen2"), Value::from("qwen2"));
    assert_eq!(name("deepseek3"), Value::from("deepseek-v3"));
    assert_eq!(name("tekken"), Value::from("tekken"));
    assert_eq!(name("llama2"), Value::from("default"));
}

#[test]
fn gguf_writes_what_llama_cpp_reads() {
    let metadata = gguf(&hf("llama2"));
    assert_eq!(metadata["tokenizer.ggml.model"], Value::from("llama"));
    assert_eq!(metadata["tokenizer.ggml.add_space_prefix"], Value::from(true));
    assert_eq!(metadata["tokenizer.ggml.add_bos_token"], Value::from(true));
    assert_eq!(metadata["tokenizer.ggml.bos_token_id"], Value::U32(1));
    assert_eq!(metadata["tokenizer.ggml.eos_token_id"], Value::U32(2));
    let tokens = metadata["tokenizer.ggml.tokens"].as_strings().unwrap();
    let kinds = metadata["tokenizer.ggml.token_type"].as_ints().unwrap();
    let size = hf("llama2").vocab_size();
    assert_eq!((tokens.len(), kinds.len()), (size + 7, size + 7));
    assert_eq!(metadata["tokenizer.ggml.scores"].as_f32s().unwrap().len(), size + 7);
    assert_eq!(tokens[size + 6], format!("[PAD{}]", size + 6));
    assert_eq!(kinds[..4], [2, 3, 3, 6]);
    assert_eq!(kinds[size + 6], 5);
    assert!(!metadata.keys().any(|key| key.starts_with("bevel.")), "llama.cpp's keys say it all");
}

#[test]
fn an_embedding_lower_than_the_vocabulary_is_an_error() {
    let tokenizer = hf("gpt2");
    let error = tokenizer.to_gguf(&mut Metadata::new(), 10).unwrap_err();
    assert!(error.to_string().contains("only 10 rows"), "{error}");
}

#[test]
fn the_embedded_model() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen");
    let tokenizer = Tokenizer::from_hf(&dir).unwrap();
    assert_eq!(tokenizer.alphabet(), Alphabet::ByteLevel);
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos(), tokenizer.padding()),
        (Some(0), Some(0), Some(3))
    );
    assert!(!tokenizer.adds_bos());
    assert_eq!(tokenizer.end_of_generation(), [0, 2]);
    assert_eq!(tokenizer.token(1), Some("<|im_start|>"));
    assert_eq!(tokenizer.id("<|im_start|>"), Some(1));
    assert_eq!(tokenizer.kind(1), Some(TokenKind::Control));
    assert!(tokenizer.is_special(1) && !tokenizer.is_special(4));
    let the = tokenizer.id("Ġthe").unwrap();
    assert_eq!(tokenizer.token_bytes(the).unwrap(), b" the");
    assert_eq!(tokenizer.token_bytes(tokenizer.vocab_size() as u32), None);
    let error = tokenizer.chat_template(false).unwrap_err();
    assert!(error.to_string().contains("no chat template"), "{error}");
}

#[test]
fn a_continuing_decoder_keeps_the_first_space() {
    let tokenizer = hf("llama2");
    let ids = tokenizer.encode("of it", false, true).unwrap();
    assert_eq!(tokenizer.decode(&ids, false), "of it");
    let mut decoder = tokenizer.decoder_continuing();
    let text: String = ids.iter().map(|&id| decoder.push(id)).collect();
    assert_eq!(text, " of it");
}

#[test]
fn broken_bytes_become_one_replacement_each() {
    let tokenizer = hf("gpt2");
    let byte = |character: &str| tokenizer.id(character).unwrap();
    // E2 98, cut short, then `a`, then a lone continuation byte.
    let ids = [byte("â"), byte("ĺ"), byte("a"), byte("ĥ")];
    let mut decoder = tokenizer.decoder();
    let pieces: Vec<String> = ids.iter().map(|&id| decoder.push(id)).collect();
    assert_eq!(pieces, ["", "", "\u{fffd}a", "\u{fffd}"]);
    assert_eq!(decoder.finish(), "");
}

proptest! {
    #[test]
    fn streamed_pieces_join_to_the_decoded_text(
        ids in prop::collection::vec(0_u32..760, 0..200),
        name in prop::sample::select(vec!["gpt2", "llama2", "gemma"]),
        skip in any::<bool>(),
    ) {
        let tokenizer = hf(name);
        // What all the bytes at once come to, by another road than the decoder's.
        let mut bytes = Vec::new();
        for &id in ids.iter().filter(|&&id| !(skip && tokenizer.is_special(id))) {
            bytes.extend(tokenizer.token_bytes(id).unwrap_or_default());
        }
        let text = String::from_utf8_lossy(&bytes);
        let text = if name == "llama2" { text.strip_prefix(' ').unwrap_or(&text) } else { &text };
        prop_assert_eq!(tokenizer.decode(&ids, skip), text);
        let mut decoder = tokenizer.decoder().skip_special(skip);
        let mut streamed: String = ids.iter().map(|&id| decoder.push(id)).collect();
        streamed.push_str(&decoder.finish());
        prop_assert_eq!(streamed, text);
    }
}

proptest! {
    /// A damaged file is read or refused; what was read can be used.
    #[test]
    fn damaged_tokenizer_json(
        name in prop::sample::select(vec!["llama2", "qwen2"]),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let mut json = hf_bytes(name);
        for (place, byte) in damage {
            let place = place.index(json.len());
            json[place] = byte;
        }
        if let Some(cut) = cut {
            json.truncate(cut.index(json.len()));
        }
        if let Ok(tokenizer) = Tokenizer::from_json_bytes(&json, None) {
            let ids = tokenizer.encode("it's <s> 42\u{1f600}<|im_end|>", true, true).unwrap();
            tokenizer.decode(&ids, false);
            let mut metadata = Metadata::new();
            if tokenizer.to_gguf(&mut metadata, tokenizer.vocab_size()).is_ok() {
                let again = Tokenizer::from_gguf(&metadata).unwrap();
                prop_assert_eq!(again.vocab_size(), tokenizer.vocab_size());
            }
        }
    }
}

#[track_caller]
fn check_refused(json: &str, part_of_the_message: &str) {
    let error = Tokenizer::from_json_bytes(json.as_bytes(), None).unwrap_err().to_string();
    assert!(error.contains(part_of_the_message), "{error}");
}

const BYTE_LEVEL: &str = r#""pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false}"#;

#[test]
fn hostile_tokenizer_json() {
    check_refused("", "EOF");
    check_refused("{}", "missing field `model`");
    check_refused(r#"{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}"#, "kind `Unigram`");
    check_refused(r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#, "neither");
    let model =
        |model: &str| format!("{{{BYTE_LEVEL}, \"model\": {{\"type\": \"BPE\", {model}}}}}");
    check_refused(&model(r#""vocab": {"a": 4000000000}, "merges": []"#), "has the id 4000000000");
    check_refused(&model(r#""vocab": {"a": -1}, "merges": []"#), "invalid value");
    check_refused(&model(r#""vocab": {"a": 0, "b": 0}, "merges": []"#), "token 0 is both");
    check_refused(&model(r#""vocab": {"a": 0, "a": 1}, "merges": []"#), "tokens 0 and 1 are both");
    check_refused(&model(r#""vocab": {"a": 0, "b": 1}, "merges": ["a b"]"#), "1 merges");
    check_refused(&model(r#""vocab": {"a": 0, "b": 1}, "merges": [["a"]]"#), "fewer than two");
    check_refused(&model(r#""vocab": {"a": 0}, "unk_token": "u""#), "unknown token `u`");
    check_refused(
        r#"{"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"},
            {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}]},
            "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#,
        "pre-tokenizer failed",
    );
    check_refused(
        &format!(
            r#"{{{BYTE_LEVEL}, "normalizer": {{"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
            "model": {{"type": "BPE", "vocab": {{"a": 0}}, "merges": []}}}}"#
        ),
        "Precompiled",
    );
    check_refused(
        &format!(
            r#"{{{BYTE_LEVEL}, "added_tokens": [{{"id": 0, "content": "x"}}],
            "model": {{"type": "BPE", "vocab": {{"a": 0}}, "merges": []}}}}"#
        ),
        "token 0 is both `a` and `x`",
    );
    // Text bombs: each step is harmless, all of them together are not.
    let bomb = |steps: &str, other: &str| {
        format!(
            r#"{{{BYTE_LEVEL}, "normalizer": {{"type": "Sequence", {other} "normalizers": [{steps}]}},
            "model": {{"type": "BPE", "vocab": {{"a": 0}}, "merges": []}}}}"#
        )
    };
    let doubles = r#"{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}"#;
    for step in [doubles, r#"{"type": "ByteLevel"}"#] {
        check_refused(&bomb(&[step; 40].join(","), ""), "times longer");
    }
    let hidden = bomb(&[doubles; 40].join(","), r#""pretokenizers": [],"#);
    check_refused(&hidden, "times longer");
    let long = "b".repeat(2000);
    let replace = |pattern: &str| {
        format!(r#"{{"type": "Replace", "pattern": {pattern}, "content": "{long}"}}"#)
    };
    check_refused(&bomb(&replace(r#"{"Regex": "x*"}"#), ""), "4002 times longer");
    check_refused(&bomb(&replace(r#"{"String": ""}"#), ""), "times longer");
}

fn small_gguf() -> Metadata {
    let texts = |list: &[&str]| Value::from(list.iter().map(|&t| t.to_owned()).collect::<Vec<_>>());
    Metadata::from_iter([
        ("tokenizer.ggml.model".to_owned(), "gpt2".into()),
        ("tokenizer.ggml.pre".to_owned(), "gpt-2".into()),
        ("tokenizer.ggml.tokens".to_owned(), texts(&["a", "b", "ab", "<eos>"])),
        ("tokenizer.ggml.token_type".to_owned(), vec![1, 1, 1, 3].into()),
        ("tokenizer.ggml.merges".to_owned(), texts(&["a b"])),
        ("tokenizer.ggml.eos_token_id".to_owned(), 3_u32.into()),
    ])
}

#[track_caller]
fn check_gguf(key: &str, value: Option<Value>) -> Result<Tokenizer, TokenizerError> {
    let mut metadata = small_gguf();
    match value {
        Some(value) => metadata.insert(key.to_owned(), value),
        None => metadata.shift_remove(key),
    };
    Tokenizer::from_gguf(&metadata)
}

#[test]
fn hostile_gguf_metadata() {
    let good = Tokenizer::from_gguf(&small_gguf()).unwrap();
    assert_eq!(good.encode("abba<eos>", false, true).unwrap(), [2, 1, 0, 3]);
    assert_eq!(good.end_of_generation(), [3]);

    let refused = |key: &str, value: Option<Value>, part: &str| {
        let error = check_gguf(key, value).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused("tokenizer.ggml.model", None, "no `tokenizer.ggml.model`");
    refused("tokenizer.ggml.model", Some("bert".into()), "kind `bert`");
    refused("tokenizer.ggml.model", Some(1_u32.into()), "should hold a string");
    refused("tokenizer.ggml.tokens", None, "no `tokenizer.ggml.tokens`");
    refused("tokenizer.ggml.tokens", Some("a".into()), "an array of strings");
    refused("tokenizer.ggml.token_type", Some(vec![1, 1].into()), "4 integers");
    refused("tokenizer.ggml.merges", Some(vec!["ab".to_owned()].into()), "not `ab`");
    refused("tokenizer.ggml.eos_token_id", Some("x".into()), "a token id");
    refused("bevel.tokenizer.added_tokens", Some("[1]".into()), "is not a tokenizer file");
    refused("bevel.tokenizer.pre_tokenizer", Some("{".into()), "should hold JSON");

    let warned = |key: &str, value: Option<Value>, part: &str| {
        let tokenizer = check_gguf(key, value).unwrap();
        assert!(tokenizer.warnings().concat().contains(part), "{:?}", tokenizer.warnings());
        tokenizer
    };
    warned("tokenizer.ggml.pre", None, "does not name its pre-tokenizer");
    warned("tokenizer.ggml.pre", Some("new-bpe".into()), "`new-bpe` is unknown");
    warned("tokenizer.ggml.merges", Some(vec!["a x".to_owned()].into()), "1 merges");
    let lost = warned("tokenizer.ggml.eos_token_id", Some(9_u32.into()), "only 4 tokens");
    assert_eq!(lost.eos(), None);
    let untyped = check_gguf("tokenizer.ggml.token_type", None).unwrap();
    assert!(untyped.is_special(3));
}

#[test]
fn phi_3_marks_swallow_the_space_after_them() {
    let mut metadata = gguf(&hf("llama2"));
    metadata.insert("general.architecture".to_owned(), "phi3".into());
    let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
    let ids = |text| tokenizer.encode(text, false, true).unwrap();
    assert_eq!(ids("</s>\n  it"), ids("</s>it"));
    assert_ne!(ids("<s>\n  it"), ids("<s>it"));
}

#[test]
fn added_tokens_of_odd_kinds_survive_gguf() {
    let mut json: serde_json::Value = serde_json::from_slice(&hf_bytes("qwen2")).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    added[1]["lstrip"] = true.into();
    added[3]["normalized"] = true.into();
    added[3]["single_word"] = true.into();
    let tokenizer = Tokenizer::from_json_bytes(json.to_string().as_bytes(), None).unwrap();
    let again = Tokenizer::from_gguf(&gguf(&tokenizer)).unwrap();
    let plain = hf("qwen2");
    for text in ["a  <|im_start|> b", "x<tool_call>y", "x <tool_call> y"] {
        let ids = |tokenizer: &Tokenizer| tokenizer.encode(text, false, true).unwrap();
        assert_eq!(ids(&tokenizer), ids(&again), "{text}");
    }
    let ids = |tokenizer: &Tokenizer| tokenizer.encode("x<tool_call>y", false, true).unwrap();
    assert_ne!(ids(&tokenizer), ids(&plain), "`single_word` has an effect");
}

#[test]
fn an_unnamed_pre_tokenizer_is_not_written() {
    let mut json: serde_json::Value = serde_json::from_slice(&hf_bytes("llama3")).unwrap();
    json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[a-z]+".into();
    let tokenizer = Tokenizer::from_json_bytes(json.to_string().as_bytes(), None).unwrap();
    let error = tokenizer.to_gguf(&mut Metadata::new(), 1000).unwrap_err().to_string();
    assert!(error.contains("[a-z]+") && error.contains("llama.cpp"), "{error}");
}
