//! The decoder families bevel knows, as data. One forward pass serves them all; what differs is
//! which norms exist, how a tensor is called in a Hugging Face checkpoint, and a few switches.

use bevel_kernels::RopeStyle;

/// Where the residual branch of a block is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and before the MLP (Llama and most others).
    Pre,
    /// After attention and after the MLP, on the branch (OLMo 2).
    Post,
    /// Both (Gemma 2 and 3).
    PreAndPost,
}

/// What the query and key norms run over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// There is none.
    None,
    /// Each head on its own (Qwen 3, Gemma 3).
    PerHead,
    /// The whole projection (OLMo 2, OLMoE).
    Full,
}

/// The MLP's gate activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · σ(x).
    Silu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// How a layer's tensors are called. Names are relative to `blk.N.` (GGUF) and `model.layers.N.`
/// (Hugging Face).
#[derive(Clone, Copy, Debug)]
pub struct TensorName {
    /// In GGUF files and throughout bevel.
    pub gguf: &'static str,
    /// In Hugging Face checkpoints; `{e}` stands for an expert's number.
    pub hf: &'static str,
}

const fn name(gguf: &'static str, hf: &'static str) -> TensorName {
    TensorName { gguf, hf }
}

/// A decoder family.
#[derive(Debug)]
pub struct Family {
    /// `general.architecture` of a GGUF file.
    pub gguf: &'static str,
    /// `model_type` values of `config.json` that belong to the family, its own first.
    pub hf: &'static [&'static str],
    /// The class in `config.json`'s `architectures`, for the first of `hf`.
    pub hf_class: &'static str,
    /// Which two values rope rotates together *in a GGUF file*. Where it is
    /// [`RopeStyle::Interleaved`], the rows of the query and key projections are permuted on the way
    /// from a Hugging Face checkpoint, whose rope always works on halves.
    pub rope: RopeStyle,
    /// Where norms are.
    pub norms: NormPlacement,
    /// Query and key norms.
    pub qk_norm: QkNorm,
    /// Norm weights are stored minus one in Hugging Face checkpoints (Gemma).
    pub norm_plus_one: bool,
    /// The embedding is multiplied by √d (Gemma).
    pub scaled_embedding: bool,
    /// The gate activation.
    pub activation: Activation,
    /// Where a window is set, one layer in so many is global (the last of each group); 0: the window
    /// holds in every layer.
    pub global_every: usize,
    /// A router's weights for the chosen experts are divided by their sum, where the configuration
    /// does not say.
    pub norm_topk: bool,
    /// The output head is the embedding, where the configuration does not say.
    pub tied_by_default: bool,
    /// Tensors of a layer.
    pub layer: &'static [TensorName],
}

const ATTENTION: [TensorName; 4] = [
    name("attn_q", "self_attn.q_proj"),
    name("attn_k", "self_attn.k_proj"),
    name("attn_v", "self_attn.v_proj"),
    name("attn_output", "self_attn.o_proj"),
];
const MLP: [TensorName; 3] = [
    name("ffn_gate", "mlp.gate_proj"),
    name("ffn_up", "mlp.up_proj"),
    name("ffn_down", "mlp.down_proj"),
];
const PRE_NORMS: [TensorName; 2] =
    [name("attn_norm", "input_layernorm"), name("ffn_norm", "post_attention_layernorm")];
const QK_NORMS: [TensorName; 2] =
    [name("attn_q_norm", "self_attn.q_norm"), name("attn_k_norm", "self_attn.k_norm")];
const EXPERTS: [TensorName; 4] = [
    name("ffn_gate_inp", "mlp.gate"),
    name("ffn_gate_exps", "mlp.experts.{e}.gate_proj"),
    name("ffn_up_exps", "mlp.experts.{e}.up_proj"),
    name("ffn_down_exps", "mlp.experts.{e}.down_proj"),
];
const GEMMA_NORMS: [TensorName; 4] = [
    name("attn_norm", "input_layernorm"),
    name("post_attention_norm", "post_attention_layernorm"),
    name("ffn_norm", "pre_feedforward_layernorm"),
    name("post_ffw_norm", "post_feedforward_layernorm"),
];
const POST_NORMS: [TensorName; 2] = [
    name("post_attention_norm", "post_attention_layernorm"),
    name("post_ffw_norm", "post_feedforward_layernorm"),
];
const MIXTRAL_EXPERTS: [TensorName; 4] = [
    name("ffn_gate_inp", "block_sparse_moe.gate"),
    name("ffn_gate_exps", "block_sparse_moe.experts.{e}.w1"),
    name("ffn_up_exps", "block_sparse_moe.experts.{e}.w3"),
    name("ffn_down_exps", "block_sparse_moe.experts.{e}.w2"),
];
/// Phi-3 keeps q, k, v in one matrix and gate, up in another, in both formats.
const FUSED: [TensorName; 4] = [
    name("attn_qkv", "self_attn.qkv_proj"),
    name("attn_output", "self_attn.o_proj"),
    name("ffn_up", "mlp.gate_up_proj"),
    name("ffn_down", "mlp.down_proj"),
];

const fn join<const A: usize, const B: usize, const N: usize>(
    a: [TensorName; A],
    b: [TensorName; B],
) -> [TensorName; N] {
    let mut all = [name("", ""); N];
    let mut i = 0;
    while i < N {
        all[i] = if i < A { a[i] } else { b[i - A] };
        i += 1;
    }
    all
}

const DENSE: [TensorName; 9] = join::<7, 2, 9>(join::<4, 3, 7>(ATTENTION, MLP), PRE_NORMS);
const DENSE_QK: [TensorName; 11] = join(DENSE, QK_NORMS);
const GEMMA2: [TensorName; 11] = join::<7, 4, 11>(join::<4, 3, 7>(ATTENTION, MLP), GEMMA_NORMS);
const GEMMA3: [TensorName; 13] = join(GEMMA2, QK_NORMS);
const OLMO2: [TensorName; 11] =
    join::<9, 2, 11>(join::<7, 2, 9>(join::<4, 3, 7>(ATTENTION, MLP), POST_NORMS), QK_NORMS);
const MOE_QK: [TensorName; 12] =
    join::<10, 2, 12>(join::<8, 2, 10>(join::<4, 4, 8>(ATTENTION, EXPERTS), PRE_NORMS), QK_NORMS);
const MIXTRAL: [TensorName; 10] =
    join::<8, 2, 10>(join::<4, 4, 8>(ATTENTION, MIXTRAL_EXPERTS), PRE_NORMS);
const PHI3: [TensorName; 6] = join(FUSED, PRE_NORMS);

/// What most families share.
const BASE: Family = Family {
    gguf: "",
    hf: &[],
    hf_class: "",
    rope: RopeStyle::Halves,
    norms: NormPlacement::Pre,
    qk_norm: QkNorm::None,
    norm_plus_one: false,
    scaled_embedding: false,
    activation: Activation::Silu,
    global_every: 0,
    norm_topk: true,
    tied_by_default: false,
    layer: &DENSE,
};

/// Every family. The first one that matches a name is it: a GGUF file of architecture `llama` is
/// Mixtral where it has experts, which [`Family::of_gguf`] decides.
pub static FAMILIES: [Family; 12] = [
    Family {
        gguf: "llama",
        hf: &["llama"],
        hf_class: "LlamaForCausalLM",
        rope: RopeStyle::Interleaved,
        ..BASE
    },
    Family {
        gguf: "llama",
        hf: &["mistral"],
        hf_class: "MistralForCausalLM",
        rope: RopeStyle::Interleaved,
        ..BASE
    },
    Family {
        gguf: "llama",
        hf: &["mixtral"],
        hf_class: "MixtralForCausalLM",
        rope: RopeStyle::Interleaved,
        layer: &MIXTRAL,
        ..BASE
    },
    Family { gguf: "qwen2", hf: &["qwen2"], hf_class: "Qwen2ForCausalLM", ..BASE },
    Family {
        gguf: "qwen3",
        hf: &["qwen3"],
        hf_class: "Qwen3ForCausalLM",
        qk_norm: QkNorm::PerHead,
        layer: &DENSE_QK,
        ..BASE
    },
    Family {
        gguf: "qwen3moe",
        hf: &["qwen3_moe"],
        hf_class: "Qwen3MoeForCausalLM",
        qk_norm: QkNorm::PerHead,
        norm_topk: false,
        layer: &MOE_QK,
        ..BASE
    },
    Family {
        gguf: "gemma2",
        hf: &["gemma2"],
        hf_class: "Gemma2ForCausalLM",
        norms: NormPlacement::PreAndPost,
        norm_plus_one: true,
        scaled_embedding: true,
        activation: Activation::GeluTanh,
        global_every: 2,
        tied_by_default: true,
        layer: &GEMMA2,
        ..BASE
    },
    Family {
        gguf: "gemma3",
        hf: &["gemma3_text"],
        hf_class: "Gemma3ForCausalLM",
        norms: NormPlacement::PreAndPost,
        qk_norm: QkNorm::PerHead,
        norm_plus_one: true,
        scaled_embedding: true,
        activation: Activation::GeluTanh,
        global_every: 6,
        tied_by_default: true,
        layer: &GEMMA3,
        ..BASE
    },
    Family { gguf: "phi3", hf: &["phi3"], hf_class: "Phi3ForCausalLM", layer: &PHI3, ..BASE },
    Family {
        gguf: "granite",
        hf: &["granite"],
        hf_class: "GraniteForCausalLM",
        rope: RopeStyle::Interleaved,
        ..BASE
    },
    Family {
        gguf: "olmo2",
        hf: &["olmo2"],
        hf_class: "Olmo2ForCausalLM",
        norms: NormPlacement::Post,
        qk_norm: QkNorm::Full,
        layer: &OLMO2,
        ..BASE
    },
    Family {
        gguf: "olmoe",
        hf: &["olmoe"],
        hf_class: "OlmoeForCausalLM",
        qk_norm: QkNorm::Full,
        norm_topk: false,
        layer: &MOE_QK,
        ..BASE
    },
];

impl Family {
    /// The family of a `config.json`'s `model_type`.
    pub fn of_hf(model_type: &str) -> Option<&'static Family> {
        FAMILIES.iter().find(|f| f.hf.contains(&model_type))
    }

    /// The family of a GGUF file's `general.architecture`.
    pub fn of_gguf(architecture: &str, has_experts: bool) -> Option<&'static Family> {
        FAMILIES.iter().find(|f| f.gguf == architecture && (f.has_experts() == has_experts))
    }

    /// Names of `general.architecture` bevel runs, for messages.
    pub fn names() -> Vec<&'static str> {
        let mut names: Vec<_> = FAMILIES.iter().flat_map(|f| f.hf.iter().copied()).collect();
        names.sort_unstable();
        names
    }

    /// True where the MLP is a mixture of experts.
    pub fn has_experts(&self) -> bool {
        self.layer.iter().any(|t| t.gguf == "ffn_gate_inp")
    }

    /// True where query, key and value are one matrix, and gate and up another.
    pub fn is_fused(&self) -> bool {
        self.layer.iter().any(|t| t.gguf == "attn_qkv")
    }
}
