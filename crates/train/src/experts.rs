//! A mixture of experts (arXiv 1701.06538, 2401.04088): y = Σ w MLP(x) over the experts that a router chooses for a token,
//! with w of the router's softmax. Which are chosen has no gradient; how much each counts has one.

use bevel_kernels::linalg::{Precision, Update};
use bevel_model::{Experts as Settings, Visit, route};

use crate::Parameters;
use crate::mlp::{Mlp, SavedMlp};
use crate::room::{Input, Room, Step};
use crate::weight::Matrix;

#[derive(Debug)]
pub(crate) struct Experts<'c> {
    pub(crate) settings: Settings,
    /// `[experts, dim]`
    pub(crate) router: Matrix<'c>,
    pub(crate) experts: Vec<Mlp<'c>>,
}

/// What the backward pass needs, beside the input.
#[derive(Debug, Default)]
pub(crate) struct SavedExperts {
    /// The router's softmax, `[n, experts]`.
    probabilities: Vec<f32>,
    /// By expert, and by token within one.
    visits: Vec<Visit>,
    /// Of each expert that is visited, with its outputs.
    each: Vec<(SavedMlp, Vec<f32>)>,
}

impl SavedExperts {
    /// Gives the buffers back.
    pub(crate) fn give(self, room: &mut Room) {
        room.give([self.probabilities]);
        for (saved, out) in self.each {
            saved.give(room);
            room.give([out]);
        }
    }
}

/// A router's products, of which a little less precision would choose other experts.
fn exact<'a>(step: &Step<'a>) -> Step<'a> {
    Step { precision: Precision::Single, ..*step }
}

/// Rows of the tokens that visit an expert.
fn gathered(x: &[f32], group: &[Visit], dim: usize, room: &mut Room) -> Vec<f32> {
    let mut rows = room.take(group.len() * dim);
    for (visit, row) in group.iter().zip(rows.chunks_exact_mut(dim)) {
        row.copy_from_slice(&x[visit.token * dim..][..dim]);
    }
    rows
}

fn groups(visits: &[Visit]) -> impl Iterator<Item = &[Visit]> {
    visits.chunk_by(|a, b| a.expert == b.expert)
}

impl Experts<'_> {
    /// The output, and what the backward pass needs.
    pub(crate) fn forward(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        x: &[f32],
        room: &mut Room,
    ) -> (Vec<f32>, SavedExperts) {
        let (n, dim) = (step.n, step.config.dim);
        let exact = exact(step);
        let packed = exact.packed(x, n, room);
        let mut probabilities = room.take(n * self.settings.count);
        self.router.forward(&exact, parameters, &mut probabilities, &packed, &[], room);
        room.give_panels(packed);
        let mut visits = Vec::new();
        route(step.cpu, &mut probabilities, self.settings, &mut visits);
        let (mut out, mut each) = (room.zeros(n * dim), Vec::new());
        for group in groups(&visits) {
            let of_group = Step { n: group.len(), ..*step };
            let expert = &self.experts[group[0].expert];
            let mut rows = gathered(x, group, dim, room);
            expert.round_inputs(&of_group, &mut rows);
            let (y, saved) = expert.forward(&of_group, parameters, &rows, true, room);
            let y = y.expect("it is wanted");
            for (visit, y) in group.iter().zip(y.chunks_exact(dim)) {
                let out = &mut out[visit.token * dim..][..dim];
                out.iter_mut().zip(y).for_each(|(out, y)| *out += visit.weight * y);
            }
            room.give([rows]);
            each.push((saved, y));
        }
        (out, SavedExperts { probabilities, visits, each })
    }

    /// The gradient of the input, in `d_x`, given that of the output; gradients of the parameters are added to theirs.
    pub(crate) fn backward(
        &self,
        step: &Step<'_>,
        parameters: &mut Parameters,
        d_x: &mut [f32],
        d_out: &[f32],
        x: &[f32],
        saved: &SavedExperts,
        room: &mut Room,
    ) {
        let (n, dim, count) = (step.n, step.config.dim, self.settings.count);
        let SavedExperts { probabilities, visits, each } = saved;
        d_x.fill(0.0);
        // By the weights of the experts, of those that are visited.
        let mut d_weights = Vec::with_capacity(visits.len());
        for (group, (saved, y)) in groups(visits).zip(each) {
            let of_group = Step { n: group.len(), ..*step };
            let expert = &self.experts[group[0].expert];
            let mut rows = gathered(x, group, dim, room);
            expert.round_inputs(&of_group, &mut rows);
            let mut d_y = gathered(d_out, group, dim, room);
            for ((visit, d_y), y) in
                group.iter().zip(d_y.chunks_exact_mut(dim)).zip(y.chunks_exact(dim))
            {
                let along = d_y.iter().zip(y).map(|(d, y)| f64::from(*d) * f64::from(*y));
                d_weights.push(along.sum::<f64>() as f32);
                d_y.iter_mut().for_each(|d| *d *= visit.weight);
            }
            let mut d_rows = room.take(rows.len());
            expert.backward(&of_group, parameters, &mut d_rows, &d_y, &rows, saved, room);
            for (visit, d_row) in group.iter().zip(d_rows.chunks_exact(dim)) {
                let d_x = &mut d_x[visit.token * dim..][..dim];
                d_x.iter_mut().zip(d_row).for_each(|(sum, d)| *sum += d);
            }
            room.give([rows, d_y, d_rows]);
        }
        let mut d_logits = room.zeros(n * count);
        self.softmax_backward(&mut d_logits, probabilities, visits, &d_weights);
        let exact = exact(step);
        let packed = exact.packed(&d_logits, n, room);
        let input = Input { values: &d_logits, packed: &packed };
        self.router.backward(&exact, parameters, Update::Add, d_x, input, x, &[], room);
        room.give_panels(packed);
        room.give([d_logits]);
    }

    /// The gradient of the router's logits, given that of the weights of the experts that are visited.
    ///
    /// Weights are w = p / Σ p over those of the token, or p itself; then ∂p = (∂w − Σ w ∂w) / Σ p, or ∂w. The softmax has
    /// ∂l = p (∂p − Σ p ∂p).
    fn softmax_backward(
        &self,
        d_logits: &mut [f32],
        probabilities: &[f32],
        visits: &[Visit],
        d_weights: &[f32],
    ) {
        let count = self.settings.count;
        let place = |visit: &Visit| visit.token * count + visit.expert;
        // Σ p and Σ w ∂w of each token.
        let mut sums = vec![[0.0f32; 2]; probabilities.len() / count];
        for (visit, d_weight) in visits.iter().zip(d_weights) {
            sums[visit.token][0] += probabilities[place(visit)];
            sums[visit.token][1] += visit.weight * d_weight;
        }
        for (visit, d_weight) in visits.iter().zip(d_weights) {
            let [total, along] = sums[visit.token];
            d_logits[place(visit)] = match self.settings.norm_topk {
                true => (d_weight - along) / total,
                false => *d_weight,
            };
        }
        let rows = d_logits.chunks_exact_mut(count).zip(probabilities.chunks_exact(count));
        for (d, p) in rows {
            let along: f32 = d.iter().zip(p).map(|(d, p)| d * p).sum();
            d.iter_mut().zip(p).for_each(|(d, p)| *d = p * (*d - along));
        }
    }
}
