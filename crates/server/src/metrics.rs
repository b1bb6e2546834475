//! `GET /metrics`: Prometheus' text format, under vLLM's names where they fit, so that its dashboards work.

use std::fmt::Write;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use crate::api::App;
use crate::api::error::ApiError;
use crate::histogram::Histogram;
use crate::models::Slot;
use crate::worker::Observations;

pub(crate) async fn handle(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let mut seen = Vec::new();
    for model in app.models.slots().iter().filter_map(Slot::loaded) {
        let labels = format!("model_name=\"{}\"", escape(&model.name));
        seen.push((labels, model.worker.observe().await?));
    }
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, content_type)], text(&seen)).into_response())
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

type Number = (&'static str, &'static str, &'static str, fn(&Observations) -> f64);

/// Name, kind, what it is, and where it comes from.
const NUMBERS: [Number; 16] = [
    ("vllm:num_requests_running", "gauge", "Answers being generated.", |o| o.engine.running as f64),
    ("vllm:num_requests_waiting", "gauge", "Answers that wait.", |o| o.engine.waiting as f64),
    ("vllm:kv_cache_usage_perc", "gauge", "Part of the key-value blocks in use, 0 to 1.", |o| {
        o.engine.blocks_used as f64 / o.engine.blocks.max(1) as f64
    }),
    ("vllm:prefix_cache_queries_total", "counter", "Tokens looked up in the prefix cache.", |o| {
        o.engine.block_stats.looked_up as f64
    }),
    ("vllm:prefix_cache_hits_total", "counter", "Tokens found in the prefix cache.", |o| {
        o.engine.block_stats.found as f64
    }),
    ("vllm:num_preemptions_total", "counter", "Times an answer gave up its blocks.", |o| {
        o.engine.preemptions as f64
    }),
    ("vllm:prompt_tokens_total", "counter", "Tokens of prompts that were computed.", |o| {
        o.engine.prompt_tokens as f64
    }),
    ("vllm:generation_tokens_total", "counter", "Tokens generated.", |o| {
        o.engine.generated_tokens as f64
    }),
    ("bevel:steps_total", "counter", "Steps of the engine.", |o| o.engine.steps as f64),
    ("bevel:kv_blocks", "gauge", "Key-value blocks in all.", |o| o.engine.blocks as f64),
    ("bevel:kv_blocks_used", "gauge", "Key-value blocks that answers use.", |o| {
        o.engine.blocks_used as f64
    }),
    ("bevel:kv_waste", "gauge", "Part of the places in used blocks that are empty.", |o| {
        let places = o.engine.tokens_of_used_blocks;
        (places - o.engine.tokens_used) as f64 / places.max(1) as f64
    }),
    ("bevel:kv_blocks_swapped", "gauge", "Blocks in the swap file.", |o| {
        o.engine.blocks_swapped as f64
    }),
    ("bevel:kv_blocks_evicted_total", "counter", "Cached blocks that made way.", |o| {
        o.engine.block_stats.evicted as f64
    }),
    ("bevel:kv_blocks_copied_total", "counter", "Blocks copied because they were shared.", |o| {
        o.engine.block_stats.copied as f64
    }),
    ("bevel:swap_failures_total", "counter", "Times the swap file failed.", |o| {
        o.engine.swap_failures as f64
    }),
];

type Durations = (&'static str, &'static str, fn(&Observations) -> &Histogram);

const DURATIONS: [Durations; 3] = [
    ("vllm:time_to_first_token_seconds", "From arrival to the first token.", |o| &o.first_token),
    ("vllm:inter_token_latency_seconds", "Between two tokens.", |o| &o.between_tokens),
    ("vllm:e2e_request_latency_seconds", "From arrival to an answer's end.", |o| &o.whole_request),
];

fn text(seen: &[(String, Observations)]) -> String {
    let mut out = String::new();
    for (name, kind, help, value) in NUMBERS {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, observations) in seen {
            let _ = writeln!(out, "{name}{{{labels}}} {}", value(observations));
        }
    }
    for (name, help, histogram) in DURATIONS {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        for (labels, observations) in seen {
            histogram(observations).write(&mut out, name, labels);
        }
    }
    let name = "vllm:request_success_total";
    let _ = writeln!(out, "# HELP {name} Answers that ended, by how.\n# TYPE {name} counter");
    for (labels, observations) in seen {
        let mut ended: Vec<_> = observations.ended.iter().collect();
        ended.sort();
        for (reason, count) in ended {
            let _ = writeln!(out, "{name}{{{labels},finished_reason=\"{reason}\"}} {count}");
        }
    }
    out
}
