//! The pre-tokenizers that GGUF files name in `tokenizer.ggml.pre`.
//!
//! A pre-tokenizer cuts the text into words; merges never cross a cut. `tokenizer.json` spells it
//! out, GGUF only names it, so this table translates both ways. The names are llama.cpp's, the
//! regular expressions those of the models' `tokenizer.json`.

use serde_json::{Value, json};

/// One step of a pre-tokenizer: each cuts what the steps before it left whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Every match of the expression is a word, and so is what lies between matches.
    Split(&'static str),
    /// Every digit is a word.
    Digits,
    /// GPT-2's words: contractions, letters, digits, the rest, runs of spaces.
    Gpt2,
}

use Step::{Digits, Gpt2, Split};

/// A pre-tokenizer that GGUF has names for.
#[derive(Debug)]
pub(super) struct Named {
    /// The first is the one bevel writes.
    names: &'static [&'static str],
    steps: &'static [Step],
    /// Whether the models that use it normalize their text to NFC.
    nfc: bool,
    /// Whether a word that is a token stays whole even where no merge leads to it.
    pub(super) ignore_merges: bool,
    /// Whether a text begins with the beginning-of-sequence token where the file does not say.
    pub(super) add_bos: bool,
}

impl Named {
    /// As `tokenizer.json` writes it.
    pub(super) fn pre_tokenizer(&self) -> Value {
        let gpt2 = self.steps.last() == Some(&Gpt2);
        let last = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": gpt2
        });
        let mut steps: Vec<Value> = (self.steps.iter())
            .filter_map(|step| match step {
                Split(regex) => Some(json!({
                    "type": "Split", "pattern": {"Regex": regex},
                    "behavior": "Isolated", "invert": false
                })),
                Digits => Some(json!({"type": "Digits", "individual_digits": true})),
                Gpt2 => None,
            })
            .collect();
        if steps.is_empty() {
            return last;
        }
        steps.push(last);
        json!({"type": "Sequence", "pretokenizers": steps})
    }

    /// As `tokenizer.json` writes it.
    pub(super) fn normalizer(&self) -> Value {
        if self.nfc { json!({"type": "NFC"}) } else { Value::Null }
    }

    /// The name to write.
    pub(super) fn name(&self) -> &'static str {
        self.names[0]
    }
}

/// The pre-tokenizer that files call `name`.
pub(super) fn by_name(name: &str) -> Option<&'static Named> {
    TABLE.iter().find(|entry| entry.names.contains(&name))
}

/// The pre-tokenizer that cuts as `pre_tokenizer` of a `tokenizer.json` does.
///
/// Several names may cut alike; the one whose `ignore_merges` and normalizer fit best is taken.
/// `None` where nothing cuts alike, or only with another `ignore_merges`.
pub(super) fn by_behaviour(
    pre_tokenizer: &Value,
    normalizer: &Value,
    ignore_merges: bool,
) -> Option<&'static Named> {
    let wanted = steps_of(pre_tokenizer)?;
    let steps = |entry: &Named| entry.steps.iter().map(canonical_step).collect::<Vec<_>>();
    // `max_by_key` takes the last of equals, so the table is walked from its end.
    (TABLE.iter().rev())
        .filter(|entry| entry.ignore_merges == ignore_merges && steps(entry) == wanted)
        .max_by_key(|entry| entry.normalizer() == *normalizer)
}

/// The steps in one spelling, `None` where there is something GGUF has no word for.
fn steps_of(pre_tokenizer: &Value) -> Option<Vec<String>> {
    let mut steps = Vec::new();
    let flag = |value: &Value, key: &str, default| value[key].as_bool().unwrap_or(default);
    match pre_tokenizer["type"].as_str()? {
        "Sequence" => {
            for step in pre_tokenizer["pretokenizers"].as_array()? {
                steps.extend(steps_of(step)?);
            }
        }
        "Split" => {
            // With `invert` it is the words that match and what lies between that is removed:
            // the same cut, as these expressions match every character.
            let alike = match pre_tokenizer["behavior"].as_str()? {
                "Isolated" => true,
                "Removed" => flag(pre_tokenizer, "invert", false),
                _ => false,
            };
            let regex = pre_tokenizer["pattern"]["Regex"].as_str()?;
            steps.push(alike.then(|| canonical_regex(regex))?);
        }
        "Digits" => {
            let each = flag(pre_tokenizer, "individual_digits", false);
            steps.push(if each { r"\p{N}" } else { r"\p{N}+" }.to_owned());
        }
        "ByteLevel" if !flag(pre_tokenizer, "add_prefix_space", true) => {
            if flag(pre_tokenizer, "use_regex", true) {
                steps.push(canonical_step(&Gpt2));
            }
        }
        _ => return None,
    }
    Some(steps)
}

fn canonical_step(step: &Step) -> String {
    match step {
        Split(regex) => canonical_regex(regex),
        Digits => r"\p{N}".to_owned(),
        Gpt2 => canonical_regex(GPT2),
    }
}

/// Different spellings of one expression made equal.
fn canonical_regex(regex: &str) -> String {
    (regex.replace('\r', "\\r").replace('\n', "\\n"))
        .replace("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", CONTRACTIONS)
        .replace(r"|\s+(?!\S)|\s+", r"|\s+(?!\S)")
        .replace(r"\p{N}{1}", r"\p{N}")
}

const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";

const BLOOM: &str = " ?[^(\\s|.,!?…。，、।۔،)]+";

const PLAIN: Named =
    Named { names: &[], steps: &[], nfc: false, ignore_merges: false, add_bos: false };

static TABLE: &[Named] = &[
    Named {
        names: &["gpt-2", "phi-2", "mpt", "jais", "gigachat", "mellum", "exaone4", "a.x-4.0"],
        steps: &[Gpt2],
        ..PLAIN
    },
    Named { names: &["olmo"], steps: &[Gpt2], nfc: true, ..PLAIN },
    Named { names: &["trillion", "granite-docling"], steps: &[Gpt2], ..PLAIN },
    Named {
        names: &["smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"],
        steps: &[Digits, Gpt2],
        ..PLAIN
    },
    Named { names: &["command-r"], steps: &[Digits, Gpt2], nfc: true, ..PLAIN },
    Named {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
        ],
        steps: &[Split(LLAMA3)],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Named { names: &["glm4", "glm5"], steps: &[Split(LLAMA3)], ignore_merges: true, ..PLAIN },
    Named { names: &["dbrx", "smaug-bpe", "chatglm-bpe"], steps: &[Split(LLAMA3)], ..PLAIN },
    Named {
        names: &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan"],
        steps: &[Split(QWEN2)],
        nfc: true,
        ..PLAIN
    },
    Named { names: &["stablelm2", "solar-open", "grok-2"], steps: &[Split(QWEN2)], ..PLAIN },
    Named { names: &["qwen35"], steps: &[Split(QWEN35)], nfc: true, ..PLAIN },
    Named {
        names: &["tekken"],
        steps: &[Split(TEKKEN)],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Named {
        names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        steps: &[Split(GPT4O)],
        ..PLAIN
    },
    Named {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        steps: &[Split(r"\p{N}{1,3}"), Split("[一-龥\u{3040}-ゟ゠-ヿ]+"), Split(DEEPSEEK3)],
        ..PLAIN
    },
    Named {
        names: &["deepseek-llm"],
        steps: &[
            Split(r"[\r\n]"),
            Split(DEEPSEEK_LETTERS),
            Split(r"\s?[!-/:-~！-／：-～‘-‟\u{3000}-。]+"),
            Split(r"\s+$"),
            Split("[一-龥ࠀ-一가-\u{d7ff}]+"),
            Split(r"\p{N}+"),
        ],
        ..PLAIN
    },
    Named {
        names: &["deepseek-coder"],
        steps: &[
            Split(r"[\r\n]"),
            Split(r"\s?\p{L}+"),
            Split(r"\s?\p{P}+"),
            Split("[一-龥ࠀ-一가-\u{d7ff}]+"),
            Digits,
        ],
        ..PLAIN
    },
    Named {
        names: &["falcon"],
        steps: &[Split(r"[\p{P}\$\+<=>\^~\|`]+"), Split(GPT2), Split("[0-9][0-9][0-9]")],
        ..PLAIN
    },
    Named {
        names: &["default"],
        steps: &[
            Split(r"[\p{P}\$\+<=>\^~\|]+"),
            Split(GPT2),
            Split(r"\p{N}+"),
            Split("[0-9][0-9][0-9]"),
        ],
        ..PLAIN
    },
    Named { names: &["bloom", "poro-chat", "gpt3-finnish"], steps: &[Split(BLOOM)], ..PLAIN },
    Named { names: &["viking"], steps: &[Split(BLOOM), Digits], ..PLAIN },
    Named {
        names: &["bailingmoe", "bailingmoe2", "llada-moe"],
        steps: &[Split(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        )],
        ..PLAIN
    },
    Named {
        names: &["seed-coder"],
        steps: &[Split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
        )],
        ..PLAIN
    },
];
