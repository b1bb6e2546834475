use bevel_eval::{BenchConfig, Error, Limits, Machine, peak_memory};
use bevel_kernels::KvType;

use crate::tiny_austen;

const CONFIG: BenchConfig = BenchConfig {
    prompt: 40,
    decode: 3,
    sequences: 1,
    repetitions: 2,
    depth: 5,
    context: None,
    kv_type: KvType::F16,
};

#[test]
fn as_many_samples_as_asked_for() {
    let (model, _, cpu) = tiny_austen();
    let mut steps = Vec::new();
    let bench = CONFIG
        .run(&model, &cpu, &mut |step| steps.push((step.what, step.done, step.total)))
        .unwrap();
    let (prefill, decode) = (bench.prefill.unwrap(), bench.decode.unwrap());
    assert_eq!((prefill.tokens, prefill.samples.len()), (40, 2));
    assert_eq!((decode.tokens, decode.samples.len()), (3, 2));
    assert!(prefill.spread.min > 0.0 && prefill.spread.min <= prefill.spread.max);
    // A warm-up and two measurements of each.
    assert_eq!(steps.len(), 6);
    assert_eq!((steps[2], steps[5]), (("prefill", 3, 6), ("decode", 6, 6)));
}

#[test]
fn one_kind_alone() {
    let (model, _, cpu) = tiny_austen();
    let config = BenchConfig { prompt: 0, ..CONFIG };
    let bench = config.run(&model, &cpu, &mut |_| ()).unwrap();
    assert!(bench.prefill.is_none() && bench.decode.is_some());
}

#[test]
fn sequences_are_decoded_together() {
    let (model, _, cpu) = tiny_austen();
    let config = BenchConfig { prompt: 0, sequences: 5, ..CONFIG };
    let bench = config.run(&model, &cpu, &mut |_| ()).unwrap();
    let decode = bench.decode.as_ref().unwrap();
    assert_eq!((bench.sequences, decode.tokens), (5, 5 * 3));
    // Weights are read once a step, keys and values once a sequence: depth 5 and half of 3 tokens.
    let limits = Limits::measure(&bench, &model, &cpu);
    let cached = 5.0 * 6.5 * bench.kv_bytes_per_token as f64;
    let read = model.weights().step_cost(model.config()).bytes + cached;
    assert_eq!(limits.decode_bytes, Some(decode.spread.median / 5.0 * read));
}

#[test]
fn speed_is_held_against_what_every_matrix_takes() {
    let (model, _, cpu) = tiny_austen();
    let (config, cost) = (model.config(), model.weights().step_cost(model.config()));
    let of_layer = |name: &str| name.starts_with("blk.") && !name.contains("norm");
    let matrices = model.checkpoint().tensors().iter().filter(|(name, _)| of_layer(name));
    let products = matrices.map(|(_, entry)| entry.shape.len()).sum::<usize>();
    let head = config.vocab_size * config.dim;
    assert_eq!(cost.bf16_products + cost.float_products, (products + head) as f64);
    assert_eq!(cost.byte_products, 0.0, "its weights are bf16");

    let bench = BenchConfig { depth: 0, ..CONFIG }.run(&model, &cpu, &mut |_| ()).unwrap();
    let limits = Limits::measure(&bench, &model, &cpu);
    let cached = 1.5 * bench.kv_bytes_per_token as f64;
    let read = bench.decode.unwrap().spread.median * (cost.bytes + cached);
    assert_eq!(limits.decode_bytes, Some(read));
    assert_eq!(limits.decode_part, Some(read / limits.read_bandwidth));
}

#[test]
fn a_context_that_is_too_small_is_refused() {
    let (model, _, cpu) = tiny_austen();
    let config = BenchConfig { context: Some(44), ..CONFIG };
    let error = config.run(&model, &cpu, &mut |_| ()).unwrap_err();
    assert!(matches!(&error, Error::Windows(text) if text.contains("45")), "{error}");
}

#[test]
fn the_machine_says_what_it_is() {
    let (_, _, cpu) = tiny_austen();
    let machine = Machine::new(&cpu);
    assert_eq!(machine.threads, 2);
    if cfg!(target_os = "linux") {
        assert!(peak_memory().unwrap() > 1 << 20);
        assert!(machine.memory.unwrap() > 1 << 20);
    }
}
