//! Models that open but cannot run, and requests that do not fit: errors, after which everything
//! else still works.

use bevel_base::{DType, pack};
use bevel_kernels::{Cpu, Isa, KvType};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{
    Checkpoint, Error, GenerateOptions, KvCache, Model, PREFILL_CHUNK, Session, generate,
};

use crate::hostile::{Tensors, file, gguf, golden};

fn cpu() -> Cpu {
    Cpu::new(1).unwrap()
}

fn llama(cpu: &Cpu) -> Model {
    Model::load(Checkpoint::open(&golden("llama")).unwrap(), cpu, &mut |_| {}).unwrap()
}

/// The model runs with `break_it` left out, and says with it that its output is no number: from
/// a single token, and with the broken value in the last of several.
#[track_caller]
fn not_finite(case: &str, pack_it: impl Fn(&mut Tensors), break_it: impl Fn(&mut Tensors)) {
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        for broken in [false, true] {
            let dir = gguf(case, |_, tensors| {
                pack_it(tensors);
                if broken {
                    break_it(tensors);
                }
            });
            let checkpoint = Checkpoint::open(&file(&dir)).unwrap();
            let model = Model::load(checkpoint, &cpu, &mut |_| {}).unwrap();
            for tokens in [&[5][..], &[1, 2, 3, 4, 6, 7, 8, 9, 5]] {
                let mut session = Session::new(&model, &cpu, 16, KvType::F32).unwrap();
                match session.feed(tokens).map(|logits| logits.len()) {
                    Ok(_) if !broken => {}
                    Err(error @ Error::NotFinite { .. }) if broken => {
                        let message = error.to_string();
                        assert!(message.contains("weights"), "{message}");
                        assert!(session.tokens().is_empty(), "a failed step leaves no trace");
                    }
                    result => panic!("{isa}, broken: {broken}, {tokens:?}: {result:?}"),
                }
            }
        }
    }
}

/// Packs a tensor of 32 columns.
fn quantize(tensors: &mut Tensors, name: &str, to: DType) {
    let (dtype, shape, data) = &mut tensors[name];
    let mut values = vec![0.0; shape.iter().product()];
    pack::dequantize(*dtype, data, &mut values).unwrap();
    let mut packed = vec![0; values.len() / to.block_len() * to.block_bytes()];
    pack::quantize(to, &values, None, &mut packed).unwrap();
    (*dtype, *data) = (to, packed);
}

/// Half-precision NaN and infinity.
const NAN: [u8; 2] = [0x00, 0x7e];
const INFINITY: [u8; 2] = [0x00, 0x7c];

#[test]
fn broken_weights_are_noticed() {
    let nan = f32::NAN.to_le_bytes();
    let put = |name: &'static str, at: usize, bytes: &'static [u8]| {
        move |tensors: &mut Tensors| tensors[name].2[at..at + bytes.len()].copy_from_slice(bytes)
    };
    let nothing = |_: &mut Tensors| {};
    // The golden's matrices are bf16: a NaN in one of them, and an infinity.
    not_finite("llama", nothing, put("blk.0.attn_q.weight", 10, &[0xc0, 0x7f]));
    not_finite("llama", nothing, put("output.weight", 200, &[0x80, 0x7f]));
    not_finite("llama", nothing, move |tensors| {
        tensors["blk.0.ffn_norm.weight"].2[4..8].copy_from_slice(&nan);
    });
    // Token 5's row of the embedding.
    not_finite("llama", nothing, put("token_embd.weight", 5 * 64 + 8, &[0xc0, 0x7f]));
    not_finite("mixtral", nothing, put("blk.1.ffn_gate_inp.weight", 0, &[0xc0, 0x7f]));
}

#[test]
fn broken_scales_are_noticed() {
    const NAMES: [&str; 3] = ["blk.0.attn_v.weight", "blk.0.ffn_up.weight", "output.weight"];
    for dtype in [DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::IQ4_NL] {
        for scale in [NAN, INFINITY] {
            for name in NAMES {
                let pack_it = |tensors: &mut Tensors| {
                    // The neighbours are packed too: what they read is rounded to integers.
                    for name in ["blk.0.attn_output.weight", "blk.1.attn_q.weight"] {
                        quantize(tensors, name, dtype);
                    }
                    NAMES.iter().for_each(|name| quantize(tensors, name, dtype));
                };
                not_finite("llama", pack_it, |tensors| {
                    tensors[name].2[..2].copy_from_slice(&scale);
                });
            }
        }
    }
}

#[test]
fn a_prompt_longer_than_the_context() {
    let cpu = cpu();
    let model = llama(&cpu);
    let mut session = Session::new(&model, &cpu, 600, KvType::F32).unwrap();
    let full = |result: Result<usize, Error>, needs, fits| match result {
        Err(Error::ContextFull { needed, available }) => {
            assert_eq!((needed, available), (needs, fits));
        }
        other => panic!("{other:?}"),
    };
    // Refused before the first of its chunks is run.
    const { assert!(PREFILL_CHUNK < 600) };
    full(session.feed(&[3; 601]).map(<[f32]>::len), 601, 600);
    assert!(session.tokens().is_empty());
    let alone = session.feed(&[3; 20]).unwrap().to_vec();
    full(session.feed(&[3; 581]).map(<[f32]>::len), 601, 600);
    assert_eq!(session.tokens(), [3; 20]);
    session.truncate(19);
    assert_eq!(session.feed(&[3]).unwrap(), alone, "as if nothing had happened");

    // An answer that fills the context ends there.
    let json = std::fs::read(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../assets/tiny-austen/tokenizer.json"
    ));
    let tokenizer = Tokenizer::from_json_bytes(&json.unwrap(), None).unwrap();
    let mut session = Session::new(&model, &cpu, 32, KvType::F32).unwrap();
    let options = GenerateOptions { ignore_eos: true, ..GenerateOptions::default() };
    let mut run = |prompt: &[u32]| {
        generate(&mut session, &tokenizer, prompt, &options, &mut |_| {
            std::ops::ControlFlow::Continue(())
        })
    };
    full(run(&[3; 33]).map(|answer| answer.tokens.len()), 33, 32);
    let answer = run(&[3; 30]).unwrap();
    assert_eq!(answer.finish, bevel_model::FinishReason::ContextFull);
    assert_eq!(answer.tokens.len(), 3, "the last one needs no room");
    assert!(matches!(run(&[]), Err(Error::EmptyPrompt)));
}

#[test]
fn a_context_larger_than_memory() {
    let cpu = cpu();
    let model = llama(&cpu);
    for tokens in [usize::MAX, usize::MAX / 2, 1 << 60, 1 << 45] {
        let message = KvCache::new(model.config(), KvType::F16, tokens).unwrap_err().to_string();
        assert!(message.contains(&tokens.to_string()) && message.contains("context"), "{message}");
        assert!(Session::new(&model, &cpu, tokens, KvType::F32).is_err());
    }
    assert!(KvCache::new(model.config(), KvType::F32, 0).is_ok());
}
