//! A gated MLP: down(act(gate x) ⊙ up x); the whole branch of a block, or one of a mixture's experts.

use bevel_kernels::linalg::Update;
use bevel_kernels::{gelu_tanh_mul, gelu_tanh_mul_backward, silu_mul, silu_mul_backward};
use bevel_model::Activation;

use crate::Parameters;
use crate::linear::{Kept, Linear};
use crate::lora::Lora;
use crate::room::{Input, Room, Step};

#[derive(Debug)]
pub(crate) struct Mlp<'c> {
    pub(crate) gate: Linear<'c>,
    pub(crate) up: Linear<'c>,
    pub(crate) down: Linear<'c>,
}

/// What the backward pass needs, beside the input.
#[derive(Debug, Default)]
pub(crate) struct SavedMlp {
    gate: Vec<f32>,
    up: Vec<f32>,
    linear: [Kept; 3],
}

impl SavedMlp {
    /// Gives the buffers back.
    pub(crate) fn give(self, room: &mut Room) {
        room.give([self.gate, self.up]);
        self.linear.into_iter().for_each(|kept| kept.give(room));
    }
}

impl Mlp<'_> {
    /// Rounds inputs as the first layers see them.
    pub(crate) fn round_inputs(&self, step: &Step<'_>, x: &mut [f32]) {
        self.gate.round_inputs(step, x);
    }

    /// The output, where it is `wanted` or the gradient depends on it, and what the backward pass needs. `x` is rounded.
    pub(crate) fn forward(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        x: &[f32],
        wanted: bool,
        room: &mut Room,
    ) -> (Option<Vec<f32>>, SavedMlp) {
        let packed = step.packed(x, step.n, room);
        let input = Input { values: x, packed: &packed };
        let (gate, kept_gate) = self.gate.forward(step, parameters, input, room);
        let (up, kept_up) = self.up.forward(step, parameters, input, room);
        room.give_panels(packed);
        let gated = self.gated(step, &gate, &up, room);
        let packed = step.packed(&gated, step.n, room);
        let input = Input { values: &gated, packed: &packed };
        let (out, kept_down) = if wanted || self.down.lora.as_ref().is_some_and(Lora::scales) {
            let (out, kept) = self.down.forward(step, parameters, input, room);
            (Some(out), kept)
        } else {
            (None, self.down.kept(step, parameters, input, room))
        };
        room.give_panels(packed);
        room.give([gated]);
        (out, SavedMlp { gate, up, linear: [kept_gate, kept_up, kept_down] })
    }

    /// The input of the last projection.
    fn gated(&self, step: &Step<'_>, gate: &[f32], up: &[f32], room: &mut Room) -> Vec<f32> {
        let mut gated = room.take(gate.len());
        match step.config.family.activation {
            Activation::Silu => silu_mul(step.cpu, &mut gated, gate, up),
            Activation::GeluTanh => gelu_tanh_mul(step.cpu, &mut gated, gate, up),
        }
        self.down.round_inputs(step, &mut gated);
        gated
    }

    /// The gradient of the input, in `d_x`, given that of the output; gradients of the parameters are added to theirs.
    pub(crate) fn backward(
        &self,
        step: &Step<'_>,
        parameters: &mut Parameters,
        d_x: &mut [f32],
        d_out: &[f32],
        x: &[f32],
        saved: &SavedMlp,
        room: &mut Room,
    ) {
        let SavedMlp { gate, up, linear: [kept_gate, kept_up, kept_down] } = saved;
        let (set, add) = (Update::Set, Update::Add);
        let gated = self.gated(step, gate, up, room);
        let mut d_gated = room.take(gated.len());
        self.down.backward(step, parameters, set, &mut d_gated, d_out, &gated, kept_down, room);
        let (mut d_gate, mut d_up) = (room.take(d_gated.len()), room.take(d_gated.len()));
        let backward = match step.config.family.activation {
            Activation::Silu => silu_mul_backward,
            Activation::GeluTanh => gelu_tanh_mul_backward,
        };
        backward(step.cpu, &mut d_gate, &mut d_up, &d_gated, gate, up);
        self.gate.backward(step, parameters, set, d_x, &d_gate, x, kept_gate, room);
        self.up.backward(step, parameters, add, d_x, &d_up, x, kept_up, room);
        room.give([gated, d_gated, d_gate, d_up]);
    }
}
