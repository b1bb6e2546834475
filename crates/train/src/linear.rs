//! A linear layer: y = W x + b + s B A x.

use bevel_kernels::linalg::Update;
use bevel_kernels::{add, add_bias};

use crate::Parameters;
use crate::lora::{Lora, Scaled};
use crate::room::{Input, Room, Step};
use crate::rounding::round_inputs;
use crate::weight::{Matrix, Vector};

/// A linear layer.
#[derive(Debug)]
pub(crate) struct Linear<'c> {
    pub(crate) weight: Matrix<'c>,
    /// `[out]`
    pub(crate) bias: Option<Vector>,
    pub(crate) lora: Option<Lora>,
}

/// What the backward pass needs of a linear layer's forward pass, beside its input.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// `s x Aᵀ` of its adapter.
    inner: Option<Vec<f32>>,
    /// What DoRA scaled.
    scaled: Option<Scaled>,
}

impl Kept {
    /// Buffers to be used again.
    pub(crate) fn give(self, room: &mut Room) {
        room.give(self.inner.into_iter().chain(self.scaled.map(Scaled::into_buffer)));
    }
}

impl Linear<'_> {
    /// Rounds inputs as the layer sees them. Their gradient is taken for that of the inputs themselves.
    pub(crate) fn round_inputs(&self, step: &Step<'_>, x: &mut [f32]) {
        if self.weight.rounds_inputs() {
            round_inputs(step.cpu, x, self.weight.cols());
        }
    }

    /// The same of a copy, where the inputs are needed as they are; `None` where they are not rounded.
    pub(crate) fn rounded_inputs(
        &self,
        step: &Step<'_>,
        x: &[f32],
        room: &mut Room,
    ) -> Option<Vec<f32>> {
        let mut copy = self.weight.rounds_inputs().then(|| room.copy(x))?;
        self.round_inputs(step, &mut copy);
        Some(copy)
    }

    /// y, and what its backward pass needs.
    pub(crate) fn forward(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        x: Input<'_>,
        room: &mut Room,
    ) -> (Vec<f32>, Kept) {
        let (n, rows) = (step.n, self.weight.rows());
        let mut y = room.take(n * rows);
        let added = self.lora.as_ref().map(|lora| lora.forward(step, parameters, x, room));
        let terms = added.as_ref().map(|added| added.factors.terms()).unwrap_or_default();
        self.weight.forward(step, parameters, &mut y, x.packed, &terms, room);
        let mut kept = Kept::default();
        if let Some((lora, added)) = self.lora.as_ref().zip(added) {
            added.factors.give(room);
            kept.inner = Some(added.inner);
            kept.scaled = lora.scale(step, parameters, &self.weight, &mut y, room);
        }
        if let Some(bias) = &self.bias {
            add_bias(step.cpu, &mut y, bias.get(parameters), n, rows);
        }
        (y, kept)
    }

    /// What the backward pass needs, of a layer whose output nothing depends on.
    pub(crate) fn kept(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        x: Input<'_>,
        room: &mut Room,
    ) -> Kept {
        let added = self.lora.as_ref().map(|lora| lora.forward(step, parameters, x, room));
        let inner = added.map(|added| {
            added.factors.give(room);
            added.inner
        });
        Kept { inner, scaled: None }
    }

    /// The gradient of the input `x`, or what `update` says, given that of the output.
    #[allow(clippy::too_many_arguments)] // Those of a product.
    pub(crate) fn backward(
        &self,
        step: &Step<'_>,
        parameters: &mut Parameters,
        update: Update,
        d_x: &mut [f32],
        d_y: &[f32],
        x: &[f32],
        kept: &Kept,
        room: &mut Room,
    ) {
        if let Some(bias) = &self.bias {
            bias.bias_backward(parameters, d_y);
        }
        let before = match (&self.lora, &kept.scaled) {
            (Some(lora), Some(scaled)) => Some(lora.scale_backward(parameters, d_y, scaled, room)),
            _ => None,
        };
        let d_y = before.as_deref().unwrap_or(d_y);
        let packed = step.packed(d_y, step.n, room);
        let d_y = Input { values: d_y, packed: &packed };
        let added = self.lora.as_ref().map(|lora| {
            let inner = kept.inner.as_deref().expect("the forward pass keeps it");
            lora.backward(step, parameters, d_y, x, inner, room)
        });
        let terms = added.as_ref().map(|added| added.factors.terms()).unwrap_or_default();
        self.weight.backward(step, parameters, update, d_x, d_y, x, &terms, room);
        if let Some(added) = added {
            if let Some(d_dropped) = added.through_noise {
                add(step.cpu, d_x, &d_dropped);
                room.give([d_dropped]);
            }
            added.factors.give(room);
        }
        room.give_panels(packed);
        room.give(before);
    }
}
