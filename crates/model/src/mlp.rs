//! The MLP of a block: dense, or a mixture of experts of which each token visits a few
//! (arXiv 1701.06538, 2401.04088).

use std::ops::ControlFlow;

use bevel_kernels::{Cpu, gelu_tanh_mul, silu_mul, softmax};

use crate::ModelConfig;
use crate::adapter::{LayerAdapters, StageAdapters};
use crate::config::Experts;
use crate::family::Activation;
use crate::linear::{LinearState, project};
use crate::tap::{Site, Stage, Tap};
use crate::weights::{Ffn, Mlp};

/// Buffers of the MLP.
#[derive(Debug, Default)]
pub(crate) struct MlpState {
    /// `[n, ffn]`
    gate: Vec<f32>,
    up: Vec<f32>,
    hidden: Vec<f32>,
    /// `[n, experts]`
    router: Vec<f32>,
    /// Which tokens go to which expert, by expert.
    visits: Vec<Visit>,
    /// One expert's inputs and outputs, `[visits, dim]`.
    gathered: Vec<f32>,
    /// `[n, dim]`
    sum: Vec<f32>,
}

/// A token that goes to an expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Visit {
    /// Which expert.
    pub expert: usize,
    /// Which row.
    pub token: usize,
    /// How much the expert's output counts.
    pub weight: f32,
}

impl Ffn {
    /// Replaces `h`, `[n, dim]`, by the MLP's output. Where `tap` breaks off a dense MLP or any
    /// expert, so does this: `h` is then of no use.
    pub(crate) fn forward(
        &self,
        cpu: &Cpu,
        config: &ModelConfig,
        h: &mut Vec<f32>,
        n: usize,
        state: &mut MlpState,
        linear: &mut LinearState,
        adapters: LayerAdapters<'_>,
        tap: &mut Tap<'_>,
    ) -> ControlFlow<()> {
        match self {
            Ffn::Dense(mlp) => mlp.forward(cpu, config, h, n, None, state, linear, adapters, tap),
            Ffn::Experts { router, experts } => {
                let settings = config.experts.expect("a mixture has settings");
                state.router.resize(n * settings.count, 0.0);
                let product = [(&**router, &mut state.router)];
                project(cpu, h, n, product, StageAdapters::NONE, linear);
                route(cpu, &mut state.router, settings, &mut state.visits);
                run_experts(cpu, config, experts, h, n, state, linear, tap)
            }
        }
    }
}

impl Mlp {
    /// h ← down(act(gate · h) ⊙ (up · h))
    fn forward(
        &self,
        cpu: &Cpu,
        config: &ModelConfig,
        h: &mut Vec<f32>,
        n: usize,
        expert: Option<usize>,
        state: &mut MlpState,
        linear: &mut LinearState,
        adapters: LayerAdapters<'_>,
        tap: &mut Tap<'_>,
    ) -> ControlFlow<()> {
        tap(Site { stage: Stage::GateUp, expert }, h, n)?;
        let len = n * config.ffn_dim;
        for buffer in [&mut state.gate, &mut state.up, &mut state.hidden] {
            buffer.resize(len, 0.0);
        }
        let pair = [(&self.gate, &mut state.gate), (&self.up, &mut state.up)];
        project(cpu, h, n, pair, adapters.at(Stage::GateUp), linear);
        let act_mul = match config.family.activation {
            Activation::Silu => silu_mul,
            Activation::GeluTanh => gelu_tanh_mul,
        };
        act_mul(cpu, &mut state.hidden, &state.gate, &state.up);
        tap(Site { stage: Stage::Down, expert }, &state.hidden, n)?;
        let product = [(&self.down, h)];
        project(cpu, &state.hidden, n, product, adapters.at(Stage::Down), linear);
        ControlFlow::Continue(())
    }
}

/// Chooses each token's experts: the `used` largest of the softmax of the router's logits, `[n, experts]`, which it leaves
/// in their place. Leaves the visits sorted by expert, and by token within one.
pub fn route(cpu: &Cpu, router: &mut [f32], experts: Experts, visits: &mut Vec<Visit>) {
    visits.clear();
    for (token, weights) in router.chunks_exact_mut(experts.count).enumerate() {
        softmax(cpu, weights);
        let first = visits.len();
        for _ in 0..experts.used {
            let chosen = &visits[first..];
            let best = (0..experts.count)
                .filter(|&e| chosen.iter().all(|v| v.expert != e))
                .max_by(|&a, &b| weights[a].total_cmp(&weights[b]).then(b.cmp(&a)))
                .expect("no more experts are used than exist");
            visits.push(Visit { expert: best, token, weight: weights[best] });
        }
        if experts.norm_topk {
            let sum: f32 = visits[first..].iter().map(|v| v.weight).sum();
            visits[first..].iter_mut().for_each(|v| v.weight /= sum);
        }
    }
    visits.sort_unstable_by_key(|v| (v.expert, v.token));
}

/// h ← Σ weight · expert(h) over each token's visits.
fn run_experts(
    cpu: &Cpu,
    config: &ModelConfig,
    experts: &[Mlp],
    h: &mut [f32],
    n: usize,
    state: &mut MlpState,
    linear: &mut LinearState,
    tap: &mut Tap<'_>,
) -> ControlFlow<()> {
    let dim = config.dim;
    let visits = std::mem::take(&mut state.visits);
    let mut gathered = std::mem::take(&mut state.gathered);
    let mut sum = std::mem::take(&mut state.sum);
    sum.clear();
    sum.resize(n * dim, 0.0);
    let mut outcome = ControlFlow::Continue(());
    for group in visits.chunk_by(|a, b| a.expert == b.expert) {
        gathered.clear();
        for visit in group {
            gathered.extend_from_slice(&h[visit.token * dim..][..dim]);
        }
        let (expert, count) = (group[0].expert, group.len());
        let mlp = &experts[expert];
        let (h, none) = (&mut gathered, LayerAdapters::NONE);
        let done = mlp.forward(cpu, config, h, count, Some(expert), state, linear, none, tap);
        if done.is_break() {
            outcome = done;
            continue;
        }
        for (visit, out) in group.iter().zip(gathered.chunks_exact(dim)) {
            let sum = &mut sum[visit.token * dim..][..dim];
            for (sum, out) in sum.iter_mut().zip(out) {
                *sum += visit.weight * out;
            }
        }
    }
    h.copy_from_slice(&sum);
    (state.visits, state.gathered, state.sum) = (visits, gathered, sum);
    outcome
}
