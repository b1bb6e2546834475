use std::ops::ControlFlow;

/// Linear layers of a block that share an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Queries, keys and values; the input is the residual stream, normalised.
    Qkv,
    /// The projection of what was attended to.
    AttentionOutput,
    /// The MLP's gate and up projections; the input is the residual stream, normalised.
    GateUp,
    /// The MLP's down projection.
    Down,
}

impl Stage {
    /// In the order of computation.
    pub const ALL: [Stage; 4] = [Stage::Qkv, Stage::AttentionOutput, Stage::GateUp, Stage::Down];

    /// The stage that a tensor of a block belongs to, by its GGUF name without `blk.N.`, if it is a
    /// linear layer's weight. A router is none: it is not quantized.
    pub fn of(name: &str) -> Option<Stage> {
        Some(match name.strip_suffix(".weight")? {
            "attn_q" | "attn_k" | "attn_v" | "attn_qkv" => Stage::Qkv,
            "attn_output" => Stage::AttentionOutput,
            "ffn_gate" | "ffn_up" | "ffn_gate_exps" | "ffn_up_exps" => Stage::GateUp,
            "ffn_down" | "ffn_down_exps" => Stage::Down,
            _ => return None,
        })
    }
}

/// Where an input was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    /// The linear layers it goes to.
    pub stage: Stage,
    /// The expert they belong to, in a mixture's MLP.
    pub expert: Option<usize>,
}

/// Is told the inputs of linear layers as they are computed: where, the values `[n, in]`, and `n`.
/// `Break` ends the pass there, and nothing that comes after is computed. In a mixture, it ends the
/// expert's pass.
pub type Tap<'a> = dyn FnMut(Site, &[f32], usize) -> ControlFlow<()> + 'a;

/// Lets everything pass.
pub(crate) fn untapped(_: Site, _: &[f32], _: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}
