//! Which type a tensor gets in the mixes that users know by name, as llama.cpp defines them.

use bevel_base::DType;
use bevel_base::DType::*;
use bevel_model::ModelConfig;

/// A named way of spreading types over a model: a base type, and rules for the tensors that get
/// another one. The first rule that applies wins.
#[derive(Debug)]
pub struct Mix {
    /// What users type: `Q4_K_M`.
    pub name: &'static str,
    /// The type of what no rule is about.
    pub base: DType,
    /// `general.file_type` of a GGUF file.
    pub file_type: u32,
    rules: &'static [Rule],
}

/// Tensors whose name contains one of `tensors` get `dtype`, in the layers that `layers` says.
#[derive(Debug)]
struct Rule {
    tensors: &'static [&'static str],
    layers: Layers,
    dtype: DType,
    /// Whether importance has to be known or unknown for the rule to hold; `None` for either.
    importance: Option<bool>,
}

#[derive(Clone, Copy, Debug)]
enum Layers {
    All,
    /// The first n.
    First(usize),
    /// The first n-th part.
    FirstPart(usize),
    /// All but the first and the last eighth.
    Middle,
    /// The first and the last eighth, and every third between them.
    MoreBits,
    /// All, where at least four query heads share a value head.
    SharedValues,
    /// All, where at least four query heads share a value head or there are four experts.
    SharedValuesOrExperts,
    /// All, in a model of eight experts.
    EightExperts,
    /// [`Layers::MoreBits`], in a model of eight experts.
    EightExpertsMoreBits,
    /// All, in any other model.
    NotEightExperts,
}
use Layers::*;

const fn rule(tensors: &'static [&'static str], layers: Layers, dtype: DType) -> Rule {
    Rule { tensors, layers, dtype, importance: None }
}

impl Rule {
    /// The rule where it is known how important each column is.
    const fn with_importance(self) -> Self {
        Self { importance: Some(true), ..self }
    }

    /// The rule where that is not known.
    const fn without_importance(self) -> Self {
        Self { importance: Some(false), ..self }
    }
}

const EMBEDDING: &[&str] = &["token_embd.weight"];
const QUERY: &[&str] = &["attn_q.weight"];
const KEY: &[&str] = &["attn_k.weight"];
/// Values, alone or in one matrix with queries and keys.
const VALUE: &[&str] = &["attn_v.weight", "attn_qkv.weight"];
const ATTENTION_OUTPUT: &[&str] = &["attn_output.weight"];
const GATE_UP: &[&str] = &["ffn_gate", "ffn_up"];
const DOWN: &[&str] = &["ffn_down"];
const EXPERTS: &[&str] = &["_exps.weight"];

const fn mix(name: &'static str, base: DType, file_type: u32, rules: &'static [Rule]) -> Mix {
    Mix { name, base, file_type, rules }
}

/// The smallest codebooks.
const CODEBOOK_2_BIT: &[Rule] = &[
    rule(EMBEDDING, All, Q2_K),
    rule(VALUE, SharedValuesOrExperts, Q4_K),
    rule(VALUE, All, Q2_K),
    rule(KEY, EightExperts, Q4_K),
    rule(DOWN, FirstPart(8), Q2_K),
    rule(ATTENTION_OUTPUT, EightExperts, Q5_K),
];
/// The same codebooks with what matters most in larger ones.
const CODEBOOK_2_BIT_AND_MORE: &[Rule] = &[
    rule(EMBEDDING, All, IQ3_S),
    rule(VALUE, SharedValuesOrExperts, Q4_K),
    rule(VALUE, All, IQ3_S),
    rule(KEY, EightExperts, Q4_K),
    rule(DOWN, FirstPart(8), IQ3_S),
    rule(ATTENTION_OUTPUT, EightExperts, Q5_K),
    rule(ATTENTION_OUTPUT, All, IQ3_S),
];
/// Four-bit tables.
const TABLE_4_BIT: &[Rule] = &[
    rule(VALUE, SharedValues, Q5_K),
    rule(DOWN, FirstPart(8), Q5_K).without_importance(),
    rule(ATTENTION_OUTPUT, EightExperts, Q5_K),
];

/// Every type and mix that can be written. Sources: `llama_tensor_get_type_impl` and
/// `enum llama_ftype` of llama.cpp. The rules for output head, experts and models of 70B parameters
/// hold for all mixes and are where a mix is applied.
pub static MIXES: [Mix; 32] = [
    mix("F32", F32, 0, &[]),
    mix("F16", F16, 1, &[]),
    mix("BF16", BF16, 32, &[]),
    mix("Q8_0", Q8_0, 7, &[]),
    mix("Q6_K", Q6_K, 18, &[]),
    mix("Q5_K_M", Q5_K, 17, &[rule(VALUE, MoreBits, Q6_K), rule(DOWN, MoreBits, Q6_K)]),
    mix("Q5_K_S", Q5_K, 16, &[]),
    mix("Q5_1", Q5_1, 9, &[]),
    mix("Q5_0", Q5_0, 8, &[rule(DOWN, FirstPart(8), Q5_1).with_importance()]),
    mix(
        "Q4_K_M",
        Q4_K,
        15,
        &[
            rule(VALUE, MoreBits, Q6_K),
            rule(DOWN, MoreBits, Q6_K),
            rule(ATTENTION_OUTPUT, EightExperts, Q5_K),
        ],
    ),
    mix(
        "Q4_K_S",
        Q4_K,
        14,
        &[
            rule(VALUE, First(4), Q5_K),
            rule(DOWN, FirstPart(8), Q5_K),
            rule(ATTENTION_OUTPUT, EightExperts, Q5_K),
        ],
    ),
    mix("IQ4_NL", IQ4_NL, 25, TABLE_4_BIT),
    mix("IQ4_XS", IQ4_XS, 30, TABLE_4_BIT),
    mix("Q4_1", Q4_1, 3, &[]),
    mix("Q4_0", Q4_0, 2, &[rule(DOWN, FirstPart(8), Q4_1).with_importance()]),
    mix("MXFP4", MXFP4, 38, &[]),
    mix("MXFP4_MOE", Q8_0, 38, &[rule(EXPERTS, All, MXFP4)]),
    mix(
        "Q3_K_L",
        Q3_K,
        13,
        &[
            rule(VALUE, All, Q5_K),
            rule(DOWN, All, Q5_K),
            rule(ATTENTION_OUTPUT, NotEightExperts, Q5_K),
        ],
    ),
    mix(
        "Q3_K_M",
        Q3_K,
        12,
        &[
            rule(VALUE, First(2), Q5_K),
            rule(VALUE, All, Q4_K),
            rule(DOWN, FirstPart(16), Q5_K),
            rule(DOWN, All, Q4_K),
            rule(ATTENTION_OUTPUT, EightExperts, Q5_K),
            rule(ATTENTION_OUTPUT, All, Q4_K),
        ],
    ),
    mix(
        "IQ3_M",
        IQ3_S,
        27,
        &[
            rule(VALUE, All, Q4_K),
            rule(DOWN, FirstPart(8), Q4_K),
            rule(DOWN, EightExpertsMoreBits, Q4_K),
            rule(ATTENTION_OUTPUT, EightExperts, Q5_K),
            rule(ATTENTION_OUTPUT, All, Q4_K),
        ],
    ),
    mix(
        "IQ3_S",
        IQ3_S,
        26,
        &[rule(VALUE, SharedValues, Q4_K), rule(ATTENTION_OUTPUT, EightExperts, Q5_K)],
    ),
    mix(
        "IQ3_XS",
        IQ3_S,
        22,
        &[
            rule(VALUE, SharedValues, Q4_K),
            rule(QUERY, All, IQ3_XXS),
            rule(KEY, All, IQ3_XXS),
            rule(GATE_UP, Middle, IQ3_XXS),
            rule(ATTENTION_OUTPUT, EightExperts, Q5_K),
        ],
    ),
    mix(
        "IQ3_XXS",
        IQ3_XXS,
        23,
        &[
            rule(EMBEDDING, All, IQ3_S),
            rule(VALUE, SharedValues, Q4_K),
            rule(VALUE, All, IQ3_S).without_importance(),
            rule(QUERY, All, IQ2_S),
            rule(KEY, All, IQ2_S),
            rule(DOWN, FirstPart(8), Q4_K).without_importance(),
            rule(DOWN, All, Q3_K).without_importance(),
            rule(ATTENTION_OUTPUT, EightExperts, Q5_K),
            rule(ATTENTION_OUTPUT, All, IQ3_S),
        ],
    ),
    mix("IQ2_M", IQ2_S, 29, CODEBOOK_2_BIT_AND_MORE),
    mix("IQ2_XS", IQ2_XS, 20, CODEBOOK_2_BIT),
    mix("IQ2_S", IQ2_XS, 28, CODEBOOK_2_BIT_AND_MORE),
    mix("IQ2_XXS", IQ2_XXS, 19, CODEBOOK_2_BIT),
    mix("Q3_K_S", Q3_K, 11, &[rule(ATTENTION_OUTPUT, EightExperts, Q5_K)]),
    mix(
        "Q2_K",
        Q2_K,
        10,
        &[
            rule(VALUE, SharedValues, Q4_K),
            rule(VALUE, All, Q3_K),
            rule(DOWN, All, Q3_K),
            rule(ATTENTION_OUTPUT, EightExperts, Q5_K),
            rule(ATTENTION_OUTPUT, All, Q3_K),
        ],
    ),
    mix("Q2_K_S", Q2_K, 21, &[rule(VALUE, SharedValues, Q4_K), rule(DOWN, FirstPart(8), Q4_K)]),
    mix("TQ2_0", TQ2_0, 37, &[rule(EMBEDDING, All, Q4_K)]),
    mix("TQ1_0", TQ1_0, 36, &[rule(EMBEDDING, All, Q4_K)]),
];

/// Short names, as in llama.cpp's tools.
const ALIASES: [(&str, &str); 3] = [("Q3_K", "Q3_K_M"), ("Q4_K", "Q4_K_M"), ("Q5_K", "Q5_K_M")];

/// What the choice of a type depends on besides the tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    layers: usize,
    /// Query heads that share a key and value head.
    group: usize,
    experts: usize,
    pub(crate) tied: bool,
    /// Llama 2 and 3 and Qwen 2 at 70 to 72 billion parameters.
    is_70b: bool,
    /// It is known how important the columns of each matrix are: the method is a calibrated one.
    importance: bool,
}

impl Facts {
    pub(crate) fn of(config: &ModelConfig, importance: bool) -> Self {
        let shares = config.heads != config.kv_heads;
        let family = config.family.gguf;
        Self {
            layers: config.layers,
            group: config.heads / config.kv_heads,
            experts: config.experts.map_or(0, |e| e.count),
            tied: config.tied,
            is_70b: config.layers == 80 && (family == "qwen2" || family == "llama" && shares),
            importance,
        }
    }
}

impl Mix {
    /// The mix or type of this name; upper and lower case are alike.
    pub fn named(name: &str) -> Option<&'static Mix> {
        let alias = ALIASES.iter().find(|(short, _)| short.eq_ignore_ascii_case(name));
        let name = alias.map_or(name, |(_, full)| full);
        MIXES.iter().find(|mix| mix.name.eq_ignore_ascii_case(name))
    }

    /// The type of a tensor of `row_len` values a row in layer `layer` (0 outside the layers).
    pub(crate) fn dtype_of(
        &self,
        facts: &Facts,
        name: &str,
        layer: usize,
        row_len: usize,
    ) -> DType {
        if !self.base.is_packed() {
            return self.base;
        }
        let is_one_of = |tensors: &[&str]| tensors.iter().any(|part| name.contains(part));
        let is_head = name == "output.weight" || facts.tied && is_one_of(EMBEDDING);
        if is_head {
            return match self.base {
                Q8_0 => Q8_0,
                base if !row_len.is_multiple_of(base.block_len()) => Q8_0,
                IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS => Q5_K,
                _ => Q6_K,
            };
        }
        let is_smallest = matches!(self.base, IQ2_XXS | IQ2_XS | IQ2_S);
        // Keys and values of an eight-expert model are small beside the experts.
        if facts.experts == 8 && !is_smallest && (is_one_of(KEY) || is_one_of(VALUE)) {
            return Q8_0;
        }
        let holds = |rule: &&Rule| {
            is_one_of(rule.tensors)
                && rule.layers.hold(facts, layer)
                && rule.importance.is_none_or(|known| known == facts.importance)
        };
        match self.rules.iter().find(holds).map_or(self.base, |rule| rule.dtype) {
            // Eight query heads share a value head there, so values are small.
            Q3_K | Q4_K if facts.is_70b && !is_smallest && is_one_of(VALUE) => Q5_K,
            dtype => dtype,
        }
    }
}

impl Layers {
    fn hold(self, facts: &Facts, layer: usize) -> bool {
        let n = facts.layers;
        match self {
            All => true,
            First(count) => layer < count,
            FirstPart(part) => layer < n / part,
            Middle => (n / 8..7 * n / 8).contains(&layer),
            MoreBits => layer < n / 8 || layer >= 7 * n / 8 || (layer - n / 8) % 3 == 2,
            SharedValues => facts.group >= 4,
            SharedValuesOrExperts => facts.group >= 4 || facts.experts >= 4,
            EightExperts => facts.experts == 8,
            EightExpertsMoreBits => facts.experts == 8 && MoreBits.hold(facts, layer),
            NotEightExperts => facts.experts != 8,
        }
    }
}

/// The type that stands in for `dtype` where its blocks do not divide a row of `row_len` values:
/// one of about as many bits with blocks of 32, else F16. `None` where `dtype` fits.
pub(crate) fn fallback(dtype: DType, row_len: usize) -> Option<DType> {
    if row_len.is_multiple_of(dtype.block_len()) {
        return None;
    }
    let smaller = match dtype {
        IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S | IQ4_XS => IQ4_NL,
        Q2_K | Q3_K | TQ1_0 | TQ2_0 => Q4_0,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        other => other,
    };
    Some(if row_len.is_multiple_of(smaller.block_len()) { smaller } else { F16 })
}
