//! What a run would do, told before it begins.

use anyhow::Result;
use bevel_train::{Memory, TrainConfig};
use serde_json::json;

use super::data::Data;
use crate::args::Global;
use crate::ui::table::Table;
use crate::ui::units::bytes;
use crate::ui::{print_json, print_text};

/// What a run would do, and what it would take.
pub(super) fn show(
    data: &Data,
    config: &TrainConfig,
    trained: usize,
    memory: &Memory,
    global: &Global,
) -> Result<()> {
    let Memory { weights, trained: values, optimizer, best, activations, working, process } =
        *memory;
    let parts = [
        ("weights", "frozen weights, as their file has them", weights),
        ("trained", "what is trained, and its gradient", values),
        ("optimizer", "the optimizer's state", optimizer),
        ("best", "the parameters of the lowest loss", best),
        ("activations", "what is kept for the backward pass", activations),
        ("working", "logits and other buffers", working),
        ("process", "the process, tokenizer and data", process),
    ];
    if global.json {
        let memory: serde_json::Map<String, serde_json::Value> =
            parts.iter().map(|(key, _, value)| ((*key).to_owned(), json!(value))).collect();
        return print_json(&json!({
            "examples": data.learnt(),
            "held_out": data.held_out(),
            "steps": config.steps,
            "trained_numbers": trained,
            "expected_memory_bytes": parts.iter().map(|(_, _, value)| value).sum::<usize>(),
            "memory": memory,
        }));
    }
    let mut table = Table::new(&["<", "memory"]);
    for (_, label, value) in parts.iter().filter(|(_, _, value)| *value > 0) {
        table.row([(*label).to_owned(), bytes(*value as u64)]);
    }
    table.row(["all".to_owned(), bytes(memory.total() as u64)]);
    print_text(&format!(
        "{} examples, {} held out; {} steps of {}; {trained} numbers to train\n\n{table}",
        data.learnt(),
        data.held_out(),
        config.steps,
        config.batch,
    ))
}
