//! Direct preference optimization (DPO, arXiv 2305.18290): of two answers to a prompt, the one that was preferred becomes
//! more likely than the other, compared with the model as it was. With r = ln p − ln p₀ of an answer,
//!
//! ```text
//! loss = −ln σ(β (r_chosen − r_rejected))
//! ```

use bevel_kernels::Cpu;

use crate::data::{Example, Pair};
use crate::packed::Packed;
use crate::{Network, Noise, Parameters, Result};

/// What a step over pairs did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Preferred {
    /// Of all pairs.
    pub(crate) loss: f64,
    /// Pairs whose preferred answer gained more.
    pub(crate) right: usize,
    pub(crate) tokens: usize,
}

/// −ln p of both answers of each pair.
pub(crate) fn losses(
    network: &mut Network<'_>,
    parameters: &Parameters,
    cpu: &Cpu,
    pairs: &[&Pair],
    together: usize,
) -> Result<Vec<[f64; 2]>> {
    let groups: Vec<[&Example; 2]> = pairs.iter().map(|pair| both(pair)).collect();
    let groups: Vec<&[&Example]> = groups.iter().map(|group| &group[..]).collect();
    let mut all = Vec::with_capacity(pairs.len());
    for part in Packed::of(&groups, together, 1.0) {
        let losses = network.losses(cpu, parameters, &part.batch())?;
        all.extend(of_pairs(&part, &losses));
    }
    Ok(all)
}

/// The loss of pairs beside `reference`, what [`losses`] were before training.
pub(crate) fn loss(now: &[[f64; 2]], reference: &[[f64; 2]], beta: f64) -> Preferred {
    let mut found = Preferred::default();
    for (now, before) in now.iter().zip(reference) {
        let margin = beta * margin(*now, *before);
        found.loss += softplus(-margin);
        found.right += usize::from(margin > 0.0);
    }
    found
}

/// The mean loss of pairs; its gradients are added to those of the parameters.
#[allow(clippy::too_many_arguments)] // What a step needs.
pub(crate) fn gradients(
    network: &mut Network<'_>,
    parameters: &mut Parameters,
    cpu: &Cpu,
    pairs: &[&Pair],
    reference: &[[f64; 2]],
    beta: f64,
    together: usize,
    noise: &dyn Fn(usize) -> Option<Noise>,
) -> Result<Preferred> {
    let groups: Vec<[&Example; 2]> = pairs.iter().map(|pair| both(pair)).collect();
    let groups: Vec<&[&Example]> = groups.iter().map(|group| &group[..]).collect();
    let (mut all, mut done) = (Preferred::default(), 0);
    for (index, part) in Packed::of(&groups, together, 1.0).iter().enumerate() {
        let weigh = &mut |losses: &[f64]| {
            let now = of_pairs(part, losses);
            let before = &reference[done..done + now.len()];
            let found = loss(&now, before, beta);
            all.loss += found.loss;
            all.right += found.right;
            let mut weights = part.batch().weights.to_vec();
            for ((sequences, now), before) in part.sequences.chunks(2).zip(&now).zip(before) {
                // Both answers' tokens count alike, with opposite signs.
                let slope = beta / (1.0 + (beta * margin(*now, *before)).exp());
                let slope = slope / pairs.len() as f64;
                for (sequence, sign) in sequences.iter().zip([1.0, -1.0]) {
                    let weights = &mut weights[sequence.clone()];
                    weights.iter_mut().for_each(|weight| *weight *= (sign * slope) as f32);
                }
            }
            done += now.len();
            weights
        };
        network.gradients_of(cpu, parameters, &part.batch(), noise(index), weigh)?;
        all.tokens += part.tokens.len();
    }
    all.loss /= pairs.len() as f64;
    Ok(all)
}

fn both(pair: &Pair) -> [&Example; 2] {
    [&pair.chosen, &pair.rejected]
}

fn of_pairs(part: &Packed, losses: &[f64]) -> Vec<[f64; 2]> {
    let sum = |i: usize| losses[part.sequences[i].clone()].iter().sum();
    (0..part.sequences.len() / 2).map(|pair| [sum(2 * pair), sum(2 * pair + 1)]).collect()
}

/// r_chosen − r_rejected, of −ln p.
fn margin(now: [f64; 2], before: [f64; 2]) -> f64 {
    (before[0] - now[0]) - (before[1] - now[1])
}

/// ln (1 + eˣ)
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
