use bevel_kernels::{Cpu, PackedMatrix, Product, Scratch, add_bias, matmul};

/// W · x + b
#[derive(Debug)]
pub(crate) struct Linear {
    /// `[out, in]`
    pub(crate) weight: PackedMatrix,
    /// `[out]`
    pub(crate) bias: Option<Vec<f32>>,
}

/// Linear layers that share their input `x`, `[n, in]`, each with its output, `[n, out]`.
pub(crate) fn project<const LAYERS: usize>(
    cpu: &Cpu,
    x: &[f32],
    n: usize,
    mut layers: [(&Linear, &mut Vec<f32>); LAYERS],
    scratch: &mut Scratch,
) {
    let mut products =
        layers.each_mut().map(|(layer, out)| Product { weight: &layer.weight, out: &mut out[..] });
    matmul(cpu, x, n, &mut products, scratch);
    for (layer, out) in layers {
        if let Some(bias) = &layer.bias {
            add_bias(cpu, out, bias, n, bias.len());
        }
    }
}
