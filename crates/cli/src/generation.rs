//! What a model's publisher says about generating text with it.

use anyhow::{Context, Result};
use bevel_model::{Checkpoint, SamplerConfig};
use serde::{Deserialize, Deserializer};

/// `generation_config.json`, or the `general.sampling.*` keys of a GGUF file. All of it is optional.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct GenerationConfig {
    #[serde(default)]
    eos_token_id: Option<OneOrMore>,
    #[serde(default)]
    pub(crate) temperature: Option<f32>,
    #[serde(default, deserialize_with = "count")]
    pub(crate) top_k: Option<usize>,
    #[serde(default)]
    pub(crate) top_p: Option<f32>,
    #[serde(default)]
    pub(crate) min_p: Option<f32>,
    #[serde(default)]
    pub(crate) repetition_penalty: Option<f32>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(u32),
    More(Vec<u32>),
}

impl GenerationConfig {
    /// Reads what comes with `checkpoint`.
    pub(crate) fn of(checkpoint: &Checkpoint) -> Result<Self> {
        if let Some(metadata) = checkpoint.gguf_metadata() {
            let number = |key: &str| metadata.get(&format!("general.sampling.{key}"))?.as_f64();
            let found = Self {
                eos_token_id: None,
                temperature: number("temp").map(|v| v as f32),
                top_k: number("top_k").map(|v| v.max(0.0) as usize),
                top_p: number("top_p").map(|v| v as f32),
                min_p: number("min_p").map(|v| v as f32),
                repetition_penalty: number("penalty_repeat").map(|v| v as f32),
            };
            return Ok(found.sensible());
        }
        let Some(dir) = checkpoint.hf_dir() else { return Ok(Self::default()) };
        let path = dir.join("generation_config.json");
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Self::sensible)
                .with_context(|| format!("`{}` is no generation config", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read `{}`", path.display())),
        }
    }

    /// Without the values that no flag would accept.
    fn sensible(mut self) -> Self {
        let is_probability = |p: &f32| (0.0..=1.0).contains(p);
        self.temperature = self.temperature.filter(|t| *t >= 0.0 && t.is_finite());
        self.top_p = self.top_p.filter(is_probability);
        self.min_p = self.min_p.filter(is_probability);
        self.repetition_penalty = self.repetition_penalty.filter(|p| *p > 0.0 && p.is_finite());
        self
    }

    /// How tokens are chosen where nobody says otherwise: as the publisher says, else as llama.cpp does.
    pub(crate) fn sampler(&self) -> SamplerConfig {
        SamplerConfig {
            temperature: self.temperature.unwrap_or(0.8),
            top_k: self.top_k.unwrap_or(40),
            top_p: self.top_p.unwrap_or(0.95),
            min_p: self.min_p.unwrap_or(0.05),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            ..SamplerConfig::default()
        }
    }

    /// Tokens that end an answer.
    pub(crate) fn eos(&self) -> &[u32] {
        match &self.eos_token_id {
            None => &[],
            Some(OneOrMore::One(id)) => std::slice::from_ref(id),
            Some(OneOrMore::More(ids)) => ids,
        }
    }
}

/// Some write -1 for what 0 means elsewhere: all tokens.
fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    let number = Option::<i64>::deserialize(deserializer)?;
    Ok(number.map(|n| usize::try_from(n).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_end_or_several() {
        let parse = |text: &str| serde_json::from_str::<GenerationConfig>(text).unwrap();
        assert!(parse("{}").eos().is_empty());
        assert_eq!(parse(r#"{"eos_token_id": 2}"#).eos(), [2u32]);
        let both = parse(r#"{"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": true}"#);
        assert_eq!((both.eos(), both.temperature), ([1u32, 2].as_slice(), Some(0.6)));
    }

    #[test]
    fn values_that_mean_nothing_are_left_out() {
        let parse = |text: &str| serde_json::from_str::<GenerationConfig>(text).unwrap().sensible();
        let found = parse(
            r#"{"temperature": -5, "top_k": -1, "top_p": 9, "min_p": 0.1, "repetition_penalty": 0}"#,
        );
        assert_eq!((found.temperature, found.top_k, found.top_p), (None, Some(0), None));
        assert_eq!((found.min_p, found.repetition_penalty), (Some(0.1), None));
        let found = GenerationConfig { temperature: Some(f32::NAN), ..Default::default() };
        assert_eq!(found.sensible().temperature, None);
    }
}
