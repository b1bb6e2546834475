use bevel_base::GroupedMatrix;
use bevel_kernels::matmul::sort_columns;
use bevel_kernels::{Cpu, PackedMatrix, Product, Scratch, add_bias, matmul};

use crate::adapter::StageAdapters;

/// W · x + b
#[derive(Debug)]
pub(crate) struct Linear {
    /// `[out, in]`
    pub(crate) weight: PackedMatrix,
    /// The input that each column of the weight is for, where columns were sorted by their group
    /// (act-order).
    pub(crate) order: Option<Vec<u32>>,
    /// `[out]`
    pub(crate) bias: Option<Vec<f32>>,
}

impl Linear {
    /// W · x
    pub(crate) fn new(weight: PackedMatrix) -> Self {
        Self { weight, order: None, bias: None }
    }

    /// W · x with some rows of a matrix of codes, which are kept.
    pub(crate) fn grouped(cpu: &Cpu, matrix: &GroupedMatrix, rows: std::ops::Range<usize>) -> Self {
        let Some((sorted, order)) = sort_columns(matrix) else {
            return Self::new(PackedMatrix::pack_grouped(cpu, matrix, rows));
        };
        let weight = PackedMatrix::pack_grouped(cpu, &sorted, rows);
        Self { order: Some(order), ..Self::new(weight) }
    }

    /// With [`PackedMatrix::with_exact_products`].
    pub(crate) fn with_exact_products(self) -> Self {
        Self { weight: self.weight.with_exact_products(), ..self }
    }

    /// Writes row `index` of the weight into `out`, `[in]`.
    pub(crate) fn row(&self, index: usize, out: &mut [f32]) {
        self.weight.row(index, out);
        if let Some(order) = &self.order {
            let sorted = out.to_vec();
            for (&col, value) in order.iter().zip(sorted) {
                out[col as usize] = value;
            }
        }
    }
}

/// Buffers of [`project`].
#[derive(Debug, Default)]
pub(crate) struct LinearState {
    pub(crate) matmul: Scratch,
    /// The input in a layer's order, `[n, in]`.
    gathered: Vec<f32>,
    /// Inputs times the A of an adapter, `[n, ranks]`.
    pub(crate) inner: Vec<f32>,
    /// Those of one layer, `[n, r]`.
    pub(crate) columns: Vec<f32>,
}

/// Linear layers that share their input `x`, `[n, in]`, each with its output, `[n, out]`, and what adapters add to
/// them.
pub(crate) fn project<const LAYERS: usize>(
    cpu: &Cpu,
    x: &[f32],
    n: usize,
    mut layers: [(&Linear, &mut Vec<f32>); LAYERS],
    adapters: StageAdapters<'_>,
    state: &mut LinearState,
) {
    let LinearState { matmul: scratch, gathered, .. } = state;
    let order = layers.first().and_then(|(layer, _)| layer.order.as_ref());
    if layers.iter().all(|(layer, _)| layer.order.as_ref() == order) {
        let x = in_order(x, n, order, gathered);
        let mut products = layers
            .each_mut()
            .map(|(layer, out)| Product { weight: &layer.weight, out: &mut out[..] });
        matmul(cpu, x, n, &mut products, scratch);
    } else {
        for (layer, out) in &mut layers {
            let x = in_order(x, n, layer.order.as_ref(), gathered);
            matmul(cpu, x, n, &mut [Product { weight: &layer.weight, out }], scratch);
        }
    }
    adapters.stretch(&mut layers.each_mut().map(|(_, out)| &mut **out), n);
    for (layer, out) in &mut layers {
        if let Some(bias) = &layer.bias {
            add_bias(cpu, out, bias, n, bias.len());
        }
    }
    adapters.add(cpu, x, n, &mut layers.map(|(_, out)| out), state);
}

/// The columns of `x`, `[n, in]`, in an order.
fn in_order<'a>(
    x: &'a [f32],
    n: usize,
    order: Option<&Vec<u32>>,
    gathered: &'a mut Vec<f32>,
) -> &'a [f32] {
    let Some(order) = order else { return x };
    gathered.clear();
    for row in x.chunks_exact(x.len() / n.max(1)) {
        gathered.extend(order.iter().map(|&col| row[col as usize]));
    }
    gathered
}
