//! The fields that say how an answer is chosen, which all APIs share.

use std::collections::{BTreeMap, HashMap};

use bevel_engine::{Beams, Grammar, Request, Stopping};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Dry, SamplerConfig, TokenLogprobs};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use crate::served::Served;

/// Everything about an answer but its prompt.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) request: Request,
    pub(crate) grammar: Option<Grammar>,
    /// The field that the grammar comes from.
    pub(crate) grammar_field: &'static str,
}

impl Options {
    /// Takes the fields. The names of limits and probabilities differ between APIs and are the caller's.
    pub(crate) fn take(fields: &mut Fields, model: &Served) -> Result<Self, ApiError> {
        let defaults = &model.defaults;
        let answers = fields.number("n", |n: u32| n > 0, "1 or more")?.unwrap_or(1);
        let beams = beams(fields, answers)?;
        let seed: Option<i64> = fields.take("seed")?;
        let sampler = SamplerConfig {
            logit_bias: logit_bias(fields, model.tokenizer.vocab_size())?,
            repetition_penalty: positive(fields, "repetition_penalty")?
                .unwrap_or(defaults.repetition_penalty),
            repetition_window: usize::MAX,
            presence_penalty: penalty(fields, "presence_penalty")?.unwrap_or(0.0),
            frequency_penalty: penalty(fields, "frequency_penalty")?.unwrap_or(0.0),
            dry: dry(fields, &model.tokenizer)?,
            top_k: match fields.number("top_k", |k: i64| k >= -1, "-1 or 0 for all, or more")? {
                None => defaults.top_k,
                Some(k) => usize::try_from(k).unwrap_or(0),
            },
            typical_p: probability(fields, "typical_p")?.unwrap_or(1.0),
            top_p: probability(fields, "top_p")?.unwrap_or(defaults.top_p),
            min_p: probability(fields, "min_p")?.unwrap_or(defaults.min_p),
            temperature: fields
                .number("temperature", |t: f32| t >= 0.0 && t.is_finite(), "a number from 0 up")?
                .unwrap_or(defaults.temperature),
            seed: seed.map_or_else(rand::random, |seed| seed as u64),
        };
        let request = Request {
            answers,
            beams,
            sampler,
            stop: stop(fields, "stop")?,
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            prompt_logprobs: logprobs(fields, "prompt_logprobs")?,
            priority: fields.take("priority")?.unwrap_or(0),
            deadline: model.deadline(),
            ..Request::new(Vec::new())
        };
        let (grammar, grammar_field) = grammar(fields)?;
        Ok(Self { request, grammar, grammar_field })
    }
}

/// Takes a number of likeliest tokens to tell.
pub(crate) fn logprobs(fields: &mut Fields, name: &str) -> Result<Option<usize>, ApiError> {
    fields.number(name, |n: usize| n <= 20, "0 to 20")
}

/// Fields that leave something to chance, and where they do not.
const CHANCE: [(&str, &[f64]); 5] = [
    ("temperature", &[0.0]),
    ("top_k", &[0.0, -1.0]),
    ("top_p", &[1.0]),
    ("min_p", &[0.0]),
    ("typical_p", &[1.0]),
];

/// `false`, `true` or `"never"`, as Hugging Face has it.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected true, false or \"never\"")]
enum EarlyStopping {
    Bool(bool),
    Word(Never),
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Never {
    Never,
}

fn beams(fields: &mut Fields, answers: u32) -> Result<Option<Beams>, ApiError> {
    let wanted = fields.take("use_beam_search")?.unwrap_or(false);
    let best_of: Option<u32> = fields.take("best_of")?;
    if !wanted {
        for name in ["length_penalty", "early_stopping"] {
            fields.only_with(name, "use_beam_search")?;
        }
        return match best_of {
            Some(best_of) if best_of != answers => {
                let problem = "it is `n`, unless there is `use_beam_search`";
                Err(ApiError::field("best_of", problem))
            }
            _ => Ok(None),
        };
    }
    for (name, none) in CHANCE {
        if fields.get(name).is_some_and(|value| !none.iter().any(|n| value.as_f64() == Some(*n))) {
            let problem = "beam search leaves nothing to chance: leave this out";
            return Err(ApiError::field(name, problem));
        }
    }
    let stopping = match fields.take("early_stopping")?.unwrap_or(EarlyStopping::Bool(false)) {
        EarlyStopping::Bool(true) => Stopping::AtOnce,
        EarlyStopping::Bool(false) => Stopping::Likely,
        EarlyStopping::Word(Never::Never) => Stopping::Certain,
    };
    let length_penalty = penalty(fields, "length_penalty")?.unwrap_or(1.0);
    Ok(Some(Beams { width: best_of.unwrap_or(answers), length_penalty, stopping }))
}

fn penalty(fields: &mut Fields, name: &str) -> Result<Option<f32>, ApiError> {
    fields.number(name, |v: f32| v.abs() <= 100.0, "a number from -100 to 100")
}

fn positive(fields: &mut Fields, name: &str) -> Result<Option<f32>, ApiError> {
    fields.number(name, |v: f32| v > 0.0 && v <= 100.0, "a number above 0, up to 100")
}

fn probability(fields: &mut Fields, name: &str) -> Result<Option<f32>, ApiError> {
    fields.number(name, |p: f32| (0.0..=1.0).contains(&p), "a number from 0 to 1")
}

fn logit_bias(fields: &mut Fields, vocabulary: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let given: Option<BTreeMap<String, f32>> = fields.take("logit_bias")?;
    let entry = |(token, bias): (String, f32)| {
        let id = token.parse().ok().filter(|&id: &u32| (id as usize) < vocabulary);
        match id {
            // `07` and `7` are the same token, which has one bias.
            Some(id) if bias.abs() <= 100.0 && token == id.to_string() => Ok((id, bias)),
            _ => {
                let problem = format!(
                    "expected a token's number below {vocabulary} and a bias from -100 to 100"
                );
                Err(ApiError::field(format!("logit_bias.{token}"), problem))
            }
        }
    };
    given.unwrap_or_default().into_iter().map(entry).collect()
}

/// Strings that end an answer.
const MOST_STOPS: usize = 64;

/// Bytes of each.
const MOST_STOP_BYTES: usize = 1024;

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected text or a list of texts")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// Takes the field of strings that end an answer.
pub(crate) fn stop(fields: &mut Fields, name: &str) -> Result<Vec<String>, ApiError> {
    let stop = match fields.take(name)? {
        None => Vec::new(),
        Some(OneOrMore::One(stop)) => vec![stop],
        Some(OneOrMore::More(stop)) => stop,
    };
    check_texts(name, &stop)?;
    Ok(stop)
}

/// Texts that an answer is searched for at every token are few and short.
fn check_texts(name: &str, texts: &[String]) -> Result<(), ApiError> {
    let fits = |text: &String| (1..=MOST_STOP_BYTES).contains(&text.len());
    if texts.len() > MOST_STOPS || !texts.iter().all(fits) {
        let problem =
            format!("expected up to {MOST_STOPS} strings of 1 to {MOST_STOP_BYTES} bytes");
        return Err(ApiError::field(name, problem));
    }
    Ok(())
}

fn dry(fields: &mut Fields, tokenizer: &Tokenizer) -> Result<Option<Dry>, ApiError> {
    let multiplier = penalty(fields, "dry_multiplier")?.unwrap_or(0.0);
    let base = positive(fields, "dry_base")?.unwrap_or(1.75);
    let allowed_length = fields.take("dry_allowed_length")?.unwrap_or(2);
    let window: i64 = fields.take("dry_penalty_last_n")?.unwrap_or(-1);
    let breakers: Option<Vec<String>> = fields.take("dry_sequence_breakers")?;
    check_texts("dry_sequence_breakers", breakers.as_deref().unwrap_or_default())?;
    if multiplier == 0.0 {
        return Ok(None);
    }
    let breakers = breakers.unwrap_or_else(|| ["\n", ":", "\"", "*"].map(str::to_owned).to_vec());
    let breaks = |token: &u32| {
        let bytes = tokenizer.token_bytes(*token).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        breakers.iter().any(|breaker| text.contains(breaker.as_str()))
    };
    let breakers = (0..tokenizer.vocab_size() as u32).filter(breaks).collect();
    let window = usize::try_from(window).unwrap_or(usize::MAX);
    Ok(Some(Dry { multiplier, base, allowed_length, window, breakers }))
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum ResponseFormat {
    // With braces further members are refused.
    Text {},
    JsonObject {},
    JsonSchema { json_schema: NamedSchema },
}

/// A schema, and what a client says of it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NamedSchema {
    pub(crate) schema: Value,
    // What follows names it for the client's own sake; answers always follow the schema.
    #[allow(dead_code)]
    name: Option<String>,
    #[allow(dead_code)]
    description: Option<String>,
    #[allow(dead_code)]
    strict: Option<bool>,
}

impl ResponseFormat {
    fn grammar(self) -> Option<Grammar> {
        match self {
            Self::Text {} => None,
            Self::JsonObject {} => Some(json_of(&any_object())),
            Self::JsonSchema { json_schema } => Some(json_of(&json_schema.schema)),
        }
    }
}

/// JSON after a schema.
pub(crate) fn json_of(schema: &Value) -> Grammar {
    // As people write it: a space, or a new line and what indents it.
    Grammar::JsonSchema(with_space(schema, r"( |\n[ \t]{0,16})"))
}

/// The schema, with white space between the parts of a text as `pattern` has it, unless the schema says
/// something itself. JSON allows any amount, and small models write it for ever.
pub(crate) fn with_space(schema: &Value, pattern: &str) -> Value {
    let mut schema = schema.clone();
    if let Some(fields) = schema.as_object_mut() {
        let space = json!({ "whitespace_pattern": pattern });
        fields.entry("x-guidance").or_insert(space);
    }
    schema
}

/// The schema of any object.
pub(crate) fn any_object() -> Value {
    json!({ "type": "object" })
}

/// As vLLM has it: one of the fields.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum StructuredOutputs {
    Json(Value),
    Regex(String),
    Choice(Vec<String>),
    Grammar(String),
    JsonObject(bool),
}

fn grammar(fields: &mut Fields) -> Result<(Option<Grammar>, &'static str), ApiError> {
    let format = fields.object("response_format")?.and_then(ResponseFormat::grammar);
    let structured = match fields.object("structured_outputs")? {
        None | Some(StructuredOutputs::JsonObject(false)) => None,
        Some(StructuredOutputs::JsonObject(true)) => Some(json_of(&any_object())),
        Some(StructuredOutputs::Json(schema)) => Some(json_of(&schema)),
        Some(StructuredOutputs::Regex(regex)) => Some(Grammar::Regex(regex)),
        Some(StructuredOutputs::Grammar(lark)) => Some(Grammar::Lark(lark)),
        Some(StructuredOutputs::Choice(choices)) => Some(one_of(&choices)?),
    };
    if format.is_some() && structured.is_some() {
        let problem = "an answer can follow `response_format` or this, not both";
        return Err(ApiError::field("structured_outputs", problem));
    }
    let field = if structured.is_some() { "structured_outputs" } else { "response_format" };
    Ok((format.or(structured), field))
}

/// A grammar of nothing but these texts: one expression, which is followed more easily than as many rules.
fn one_of(choices: &[String]) -> Result<Grammar, ApiError> {
    if choices.is_empty() {
        return Err(ApiError::field("structured_outputs.choice", "expected a choice"));
    }
    let mut regex = String::new();
    for (i, choice) in choices.iter().enumerate() {
        if i > 0 {
            regex.push('|');
        }
        for c in choice.chars() {
            if c.is_ascii_punctuation() {
                regex.push('\\');
            }
            regex.push(c);
        }
    }
    Ok(Grammar::Regex(regex))
}

/// How likely a prompt's tokens were, as vLLM tells it: of the first nothing is known.
pub(crate) fn prompt_logprobs(
    tokenizer: &Tokenizer,
    prompt: &[u32],
    logprobs: &[TokenLogprobs],
) -> Value {
    let entry = |token: u32, logprob: f32, rank: usize| {
        let bytes = tokenizer.token_bytes(token).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let entry = json!({ "logprob": logprob, "rank": rank, "decoded_token": text });
        (token.to_string(), entry)
    };
    let position = |(&token, here): (&u32, &TokenLogprobs)| {
        let top = (1..).zip(&here.top).map(|(rank, &(token, p))| entry(token, p, rank));
        let own = entry(token, here.logprob, here.rank as usize);
        Value::Object(top.chain([own]).collect())
    };
    let known = prompt.iter().skip(1).zip(logprobs).map(position);
    std::iter::once(Value::Null).chain(known).collect()
}

/// Adds up the tokens of a client's requests. The answers to one share its prompt.
#[derive(Clone, Debug, Default)]
pub(crate) struct Usage {
    /// Of each request: tokens of the prompt, and those that were cached.
    prompts: HashMap<usize, (usize, usize)>,
    answer_tokens: usize,
    /// Those of them that were thought before.
    pub(crate) thought_tokens: usize,
}

impl Usage {
    pub(crate) fn add(&mut self, tag: usize, end: &bevel_engine::End) {
        self.prompts.insert(tag, (end.prompt_tokens, end.cached_tokens));
        self.answer_tokens += end.answer_tokens;
    }

    /// As OpenAI has it.
    pub(crate) fn json(&self) -> Value {
        let prompts = self.prompts.values();
        let (tokens, cached) = prompts.fold((0, 0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
        let mut usage = json!({
            "prompt_tokens": tokens,
            "completion_tokens": self.answer_tokens,
            "total_tokens": tokens + self.answer_tokens,
            "prompt_tokens_details": { "cached_tokens": cached },
        });
        if self.thought_tokens > 0 {
            usage["completion_tokens_details"] = json!({ "reasoning_tokens": self.thought_tokens });
        }
        usage
    }
}
