//! Gradients of every tensor of every family against PyTorch's (`goldens/make_gradients.py`).

use std::path::Path;

use bevel_kernels::Cpu;
use bevel_model::{Checkpoint, Transform, source_row};
use bevel_train::{
    Batch, Network, NetworkConfig, Parameter, Parameters, Precision, Recompute, Trainable,
};
use serde_json::Value;

use crate::{FAMILIES, alone, expected, golden};

/// The numbers of a gradient in the file.
const SUMS: usize = 4;

/// SplitMix64's finalizer.
fn mix(place: u64) -> u64 {
    let mut z = place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Its norm, and sums over its values, each times a number that depends on its place.
fn summed(gradient: &[f32]) -> Vec<f64> {
    let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    let sum = |k: usize| {
        let term = |(place, &g): (usize, &f32)| {
            let bits = mix((place * SUMS + k) as u64) >> 40;
            f64::from(g) * (bits as f64 / (1u64 << 23) as f64 - 1.0)
        };
        gradient.iter().enumerate().map(term).sum()
    };
    std::iter::once(norm).chain((0..SUMS).map(sum)).collect()
}

#[test]
fn gradients_are_those_of_pytorch() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gradients.json");
    let goldens: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let cpu = Cpu::new(2).unwrap();
    for case in FAMILIES {
        let checkpoint = Checkpoint::open(&golden(case)).unwrap();
        let model = checkpoint.config();
        let tokens = expected(case).0;
        let n = tokens.len();
        let mut targets = tokens[1..].to_vec();
        targets.push(0);
        let mut weights = vec![1.0 / (n - 1) as f32; n];
        weights[n - 1] = 0.0;
        let sequences = alone(0..n);
        let batch =
            Batch { tokens: &tokens, sequences: &sequences, targets: &targets, weights: &weights };
        let config = NetworkConfig {
            context: n,
            precision: Precision::Single,
            recompute: Recompute::Nothing,
        };
        let mut parameters = Parameters::default();
        let all = Trainable::everything();
        let mut network = Network::new(&cpu, &checkpoint, &all, &config, &mut parameters).unwrap();
        let loss = network.loss_and_gradients(&cpu, &mut parameters, &batch, None).unwrap();
        let golden = &goldens[case];
        let expected = golden["loss"].as_f64().unwrap();
        assert!((loss - expected).abs() < 2e-5 * expected, "{case}: {loss}, expected {expected}");

        let gradients = golden["gradients"].as_object().unwrap();
        let is_up = |p: &&Parameter| p.name.contains("ffn_up_exps");
        let stacked = parameters.all().iter().filter(is_up).count();
        assert_eq!(parameters.all().len() - stacked, gradients.len(), "{case}");
        for parameter in parameters.all().iter().filter(|p| !is_up(p)) {
            let hf = model.hf_tensor(&parameter.name, "model.").unwrap();
            let mut gradient = parameters.gradients[parameter.range.clone()].to_vec();
            let mut name = hf.names[0].clone();
            if parameter.name.contains("_exps") {
                // transformers stacks experts, each one's gate before its up projection.
                let end = name.find(".mlp.").or(name.find(".block_sparse_moe"));
                let block = name[..end.unwrap()].to_owned();
                if parameter.name.contains("ffn_gate_exps") {
                    let up = parameter.name.replace("ffn_gate", "ffn_up");
                    let up = &parameters.all()[parameters.find(&up).unwrap()];
                    let up = &parameters.gradients[up.range.clone()];
                    let each = gradient.len() / model.experts.unwrap().count;
                    let both = gradient.chunks(each).zip(up.chunks(each));
                    gradient = both.flat_map(|(gate, up)| [gate, up].concat()).collect();
                    name = format!("{block}.mlp.experts.gate_up_proj");
                } else {
                    name = format!("{block}.mlp.experts.down_proj");
                }
            } else if parameter.name.contains("ffn_gate_inp") {
                name = name.replace("block_sparse_moe", "mlp");
            }
            if let Transform::InterleaveRows { heads } = hf.transform {
                // Rows as the checkpoint has them.
                let (rows, ours) = (heads * model.head_dim, gradient.clone());
                let cols = ours.len() / rows;
                for (row, values) in ours.chunks_exact(cols).enumerate() {
                    let place = source_row(row, model.head_dim, true);
                    gradient[place * cols..][..cols].copy_from_slice(values);
                }
            }
            let expected = &gradients[&name];
            let expected: Vec<f64> =
                expected.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            let found = summed(&gradient);
            for (found, value) in found.iter().zip(&expected) {
                assert!(
                    (found - value).abs() < 1e-4 * expected[0],
                    "{case}: {}: {found}, PyTorch has {value}, and the norm is {}",
                    parameter.name,
                    expected[0]
                );
            }
        }
    }
}
