//! `bevel inspect`.

use anyhow::{Result, bail};
use bevel_base::Pool;
use bevel_compress::{BrokenTensor, Error, Inspection, Memory};
use serde::Serialize;

use super::quantize::with_progress;
use crate::args::Global;
use crate::model;
use crate::sampling::Kv;
use crate::ui::interrupt::{self, Interrupted};
use crate::ui::table::Table;
use crate::ui::units::{bytes, count};
use crate::ui::{plain, print_json, print_text};

/// Options of `bevel inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen`
    model: String,

    /// Tokens of context to tell the memory for; by default the model's own
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    ctx: Option<usize>,

    #[command(flatten)]
    kv: Kv,

    /// List every tensor
    #[arg(long)]
    tensors: bool,

    /// List the metadata
    #[arg(long)]
    metadata: bool,

    /// Read all weights and name the tensors with values that are no numbers
    #[arg(long)]
    check: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    inspection: &'a Inspection,
    memory: Option<Memory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    broken: Option<&'a [BrokenTensor]>,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let path = model::resolve(&args.model, global)?;
    let inspection = bevel_compress::inspect(&path)?;
    let memory = inspection.memory(args.ctx, args.kv.kv.into());
    let broken = if args.check {
        let _handler = interrupt::handle();
        let pool = Pool::new(global.threads);
        let found = with_progress(global, "checking", |on_progress| {
            bevel_compress::check(&path, &pool, on_progress)
        });
        match found {
            Err(Error::Stopped) => return Err(Interrupted.into()),
            found => Some(found?),
        }
    } else {
        None
    };
    if global.json {
        print_json(&Output { inspection: &inspection, memory, broken: broken.as_deref() })?;
    } else {
        print_text(&shown(&inspection, memory, args))?;
    }
    match broken.as_deref() {
        Some([]) => {
            global.note("checked: every value is a finite number");
            Ok(())
        }
        Some(broken) => {
            for t in broken {
                global.warn(format!(
                    "tensor `{}` ({}): {} of its values {} finite, the first is value {}",
                    t.name,
                    t.dtype,
                    t.values,
                    if t.values == 1 { "is not" } else { "are not" },
                    t.first
                ));
            }
            let tensors = match broken {
                [_] => "1 tensor is".to_owned(),
                _ => format!("{} tensors are", broken.len()),
            };
            bail!("{tensors} damaged; download or convert the model again");
        }
        None => Ok(()),
    }
}

fn shown(i: &Inspection, memory: Option<Memory>, args: &Args) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        text += &format!("{label:<14}{}\n", plain(&value));
    };
    line("model", i.name.clone().unwrap_or_else(|| i.path.display().to_string()));
    if let Some(architecture) = &i.architecture {
        line("architecture", architecture.clone());
    }
    let active = i.active_parameters.map(|n| format!(", {} active", count(n)));
    line("parameters", format!("{}{}", count(i.parameters), active.unwrap_or_default()));
    let files = if i.files == 1 { String::new() } else { format!(" in {} files", i.files) };
    line("size", format!("{}{files}, {:.2} bits/weight", bytes(i.file_bytes), i.bits_per_weight));
    if let Some(quantization) = &i.quantization {
        line("quantization", quantization.clone());
    }
    if let Some(d) = &i.dimensions {
        let window = d.window.map(|w| format!(", window {w}")).unwrap_or_default();
        line("context", format!("{} tokens{window}", d.context));
        line(
            "shape",
            format!(
                "{} layers, width {}, {} heads of {} ({} for keys and values), MLP {}",
                d.layers, d.dim, d.heads, d.head_dim, d.kv_heads, d.ffn_dim
            ),
        );
        if let (Some(experts), Some(used)) = (d.experts, d.experts_used) {
            line("experts", format!("{experts}, {used} for each token"));
        }
        let head = if d.tied { ", shared by embedding and output head" } else { "" };
        line("vocabulary", format!("{} tokens{head}", d.vocabulary));
    }
    match &i.tokenizer {
        Some(t) => {
            let template = if t.chat_template { "with" } else { "without" };
            line("tokenizer", format!("{}, {template} chat template", t.kind));
        }
        None => line("tokenizer", "none".to_owned()),
    }
    if let Some(p) = &i.provenance {
        let recipe = p.recipe.trim().replace('\n', "; ");
        line("made by", format!("bevel {}: {recipe}", p.version));
        line("from", format!("sha256 {}", p.source_sha256));
    }
    if let Some(m) = memory {
        line(
            "memory",
            format!(
                "{} at {} tokens: weights {}, keys and values {}, buffers {}",
                bytes(m.total),
                m.context,
                bytes(m.weights),
                bytes(m.kv),
                bytes(m.buffers)
            ),
        );
    }
    if let Some(note) = &i.note {
        line("note", note.clone());
    }

    let mut types = Table::new(&["<type", "tensors", "parameters", "size", "bits/weight"]);
    for t in &i.types {
        types.row([
            t.dtype.to_string(),
            t.tensors.to_string(),
            count(t.parameters),
            bytes(t.bytes),
            format!("{:.2}", t.bits_per_weight),
        ]);
    }
    text += &format!("\n{types}");
    if args.tensors {
        let mut table = Table::new(&["<tensor", "<type", "<shape", "size"]);
        for t in &i.tensors {
            table.row([t.name.clone(), t.dtype.to_string(), t.shape.to_string(), bytes(t.bytes)]);
        }
        text += &format!("\n{table}");
    }
    if args.metadata {
        let mut table = Table::new(&["<key", "<value"]);
        for (key, value) in &i.metadata {
            table.row([key.clone(), value.clone()]);
        }
        text += &format!("\n{table}");
    }
    text
}
