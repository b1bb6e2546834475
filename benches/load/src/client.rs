use std::io::{BufRead, BufReader};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::mix::Planned;

/// What a client saw; times in seconds.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) prompt_tokens: usize,
    pub(crate) answer_tokens: usize,
    pub(crate) first_token: f64,
    pub(crate) between_tokens: Vec<f64>,
    pub(crate) whole: f64,
}

/// Sends a request and reads the stream of its answer.
pub(crate) fn ask(url: &str, model: Option<&str>, planned: &Planned) -> Result<Outcome> {
    let mut body = json!({
        "prompt": planned.prompt,
        "max_tokens": planned.answer_tokens,
        "ignore_eos": true,
        "temperature": 0,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    if let Some(model) = model {
        body["model"] = model.into();
    }
    let start = Instant::now();
    let agent: ureq::Agent =
        ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let request = agent.post(format!("{url}/v1/completions"));
    let mut response = request.content_type("application/json").send(&body.to_string())?;
    if response.status() != 200 {
        bail!("{}: {}", response.status(), response.body_mut().read_to_string()?);
    }
    let (mut times, mut usage) = (Vec::new(), Value::Null);
    for line in BufReader::new(response.into_body().into_reader()).lines() {
        let line = line?;
        let Some(data) = line.strip_prefix("data: ").filter(|data| *data != "[DONE]") else {
            continue;
        };
        let chunk: Value = serde_json::from_str(data)?;
        if let Some(error) = chunk.get("error") {
            bail!("{error}");
        }
        if chunk["usage"].is_object() {
            usage = chunk["usage"].clone();
        }
        if chunk["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty()) {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let tokens = |name: &str| usage[name].as_u64().context("a stream ended without its usage");
    let first_token = *times.first().context("a stream without text")?;
    Ok(Outcome {
        prompt_tokens: tokens("prompt_tokens")? as usize,
        answer_tokens: tokens("completion_tokens")? as usize,
        first_token,
        between_tokens: times.windows(2).map(|pair| pair[1] - pair[0]).collect(),
        whole: start.elapsed().as_secs_f64(),
    })
}

/// A number of the server's `/metrics`, if it has it.
pub(crate) fn metric(url: &str, name: &str) -> Option<f64> {
    let mut response = ureq::get(format!("{url}/metrics")).call().ok()?;
    let text = response.body_mut().read_to_string().ok()?;
    text.lines().find(|line| line.starts_with(name))?.rsplit_once(' ')?.1.parse().ok()
}
