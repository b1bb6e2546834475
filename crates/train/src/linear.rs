//! A linear layer: y = W x + b + s B A x.

use bevel_kernels::add_bias;
use bevel_kernels::linalg::Update;

use crate::Parameters;
use crate::lora::{Lora, Scaled};
use crate::room::{Input, Room, Step};
use crate::weight::{Matrix, Vector};

/// A linear layer.
#[derive(Debug)]
pub(crate) struct Linear<'c> {
    pub(crate) weight: Matrix<'c>,
    /// `[out]`
    pub(crate) bias: Option<Vector>,
    pub(crate) lora: Option<Lora>,
}

impl Linear<'_> {
    /// y, and what DoRA's backward pass needs.
    pub(crate) fn forward(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        x: Input<'_>,
        room: &mut Room,
    ) -> (Vec<f32>, Option<Scaled>) {
        let (n, rows) = (step.n, self.weight.rows());
        let mut y = room.take(n * rows);
        self.weight.forward(step, parameters, &mut y, x.packed, room);
        let mut scaled = None;
        if let Some(lora) = &self.lora {
            lora.forward(step, parameters, &mut y, x, room);
            scaled = lora.scale(step, parameters, &self.weight, &mut y, room);
        }
        if let Some(bias) = &self.bias {
            add_bias(step.cpu, &mut y, bias.get(parameters), n, rows);
        }
        (y, scaled)
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
        scaled: Option<&Scaled>,
        room: &mut Room,
    ) {
        if let Some(bias) = &self.bias {
            bias.bias_backward(parameters, d_y);
        }
        let before = match (&self.lora, scaled) {
            (Some(lora), Some(scaled)) => Some(lora.scale_backward(parameters, d_y, scaled, room)),
            _ => None,
        };
        let d_y = before.as_deref().unwrap_or(d_y);
        let packed = step.packed(d_y, step.n, room);
        let d_y = Input { values: d_y, packed: &packed };
        self.weight.backward(step, parameters, update, d_x, d_y, x, room);
        if let Some(lora) = &self.lora {
            lora.backward(step, parameters, d_x, d_y, x, room);
        }
        room.give_panels(packed);
        room.give(before);
    }
}
