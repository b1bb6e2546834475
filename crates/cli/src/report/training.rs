//! The page of a run of `bevel finetune`.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use bevel_eval::Machine;
use bevel_train::{OptimizerKind, Schedule, StepReport, TrainConfig};

use super::curves::{Curves, Series, smoothed};
use super::{escape, page};
use crate::ui::units::{bytes, duration, rate};

/// What a run did.
#[derive(Debug)]
pub(crate) struct TrainingReport {
    pub(crate) model: String,
    /// Names and values, as they were used.
    pub(crate) settings: Vec<(&'static str, String)>,
    /// Steps that were asked for.
    pub(crate) wanted: usize,
    /// Those that were done.
    pub(crate) steps: Vec<StepReport>,
    /// The loss of the held-out examples before the first step.
    pub(crate) before: Option<f64>,
    pub(crate) command: String,
    pub(crate) machine: Machine,
    pub(crate) version: &'static str,
    pub(crate) seconds: f64,
    pub(crate) peak_memory_bytes: Option<u64>,
}

impl TrainingReport {
    fn title(&self) -> String {
        let name = Path::new(&self.model).file_name();
        let name = name.map_or(self.model.as_str().into(), |name| name.to_string_lossy());
        format!("{name}, fine-tuned")
    }

    /// The held-out loss by step, where it was measured.
    fn held_out(&self) -> Vec<(usize, f64)> {
        let measured = self.steps.iter().filter_map(|s| Some((s.step, s.held_out?)));
        self.before.map(|loss| (0, loss)).into_iter().chain(measured).collect()
    }

    fn series(&self, value: impl Fn(&StepReport) -> f64) -> Vec<(usize, f64)> {
        self.steps.iter().map(|step| (step.step, value(step))).collect()
    }

    /// Tokens and the time that they took.
    fn total(&self) -> (usize, f64) {
        let time: Duration = self.steps.iter().map(|step| step.time).sum();
        (self.steps.iter().map(|step| step.tokens).sum(), time.as_secs_f64())
    }
}

/// The settings of a run, of which the data have been read: `counts` are the examples to be learnt and those held
/// out, and the most tokens of one; `goal` is what is trained.
pub(crate) fn settings(
    data: &str,
    counts: [usize; 3],
    goal: Vec<(&'static str, String)>,
    config: &TrainConfig,
) -> Vec<(&'static str, String)> {
    let [learnt, held_out, context] = counts;
    let data = [
        ("data", data.to_owned()),
        ("examples", format!("{learnt}, and {held_out} held out; up to {context} tokens of each")),
    ];
    let training = [
        ("steps", format!("{}, of {} examples", config.steps, config.batch)),
        (
            "learning rate",
            format!(
                "rises to {} in {} % of the steps, then {}",
                config.learning_rate,
                100.0 * config.warmup,
                match config.schedule {
                    Schedule::Cosine => "falls along half a cosine",
                    Schedule::Linear => "falls in a line",
                    Schedule::Constant => "stays",
                }
            ),
        ),
        (
            "optimizer",
            format!(
                "{}, weight decay {}",
                match config.optimizer.kind {
                    OptimizerKind::AdamW => "AdamW",
                    OptimizerKind::AdamW8bit => "AdamW with 8-bit moments",
                    OptimizerKind::Lion => "Lion",
                },
                config.optimizer.weight_decay
            ),
        ),
        ("gradients", format!("clipped to norm {}", config.clip)),
        ("seed", config.seed.to_string()),
    ];
    data.into_iter().chain(goal).chain(training).collect()
}

/// The page.
pub(crate) fn html(report: &TrainingReport) -> String {
    let body = [heading(report), figures(report), numbers(report), conditions(report)];
    page(&format!("bevel: {}", report.title()), &body.concat())
}

fn heading(report: &TrainingReport) -> String {
    let held_out = report.held_out();
    // The loss of pairs is of no text, and no perplexity follows from it.
    let pairs = report.steps.iter().any(|step| step.preferred.is_some());
    let lead = match (report.before, held_out.last(), report.steps.last()) {
        (Some(before), Some((_, now)), _) if pairs => format!(
            "The loss on pairs that were held out went from {before:.3} to {now:.3}; where both answers are as likely as before, it is {:.3}.",
            std::f64::consts::LN_2
        ),
        (Some(before), Some((_, now)), _) => format!(
            "The loss on examples that were held out went from {before:.3} to {now:.3}: perplexity {:.2} instead of {:.2}.",
            now.exp(),
            before.exp()
        ),
        (_, _, Some(last)) => format!(
            "The loss went from {:.3} to {:.3}. No examples were held out, so that nothing says how well others are predicted.",
            report.steps[0].loss, last.loss
        ),
        _ => "No step was done.".to_owned(),
    };
    let title = escape(&report.title());
    let mut out = format!("<header>\n<h1>{title}</h1>\n<p class=\"lead\">{lead}</p>\n");
    let done = report.steps.len();
    if done < report.wanted {
        let _ = writeln!(
            out,
            "<p class=\"note\">The run was stopped after {done} of {} steps.</p>",
            report.wanted
        );
    }
    out + "</header>\n"
}

fn figures(report: &TrainingReport) -> String {
    let loss = report.series(|step| step.loss);
    let line = |class, points| Series { class, dots: false, points };
    let held_out = Series { class: "held-out", dots: true, points: report.held_out() };
    let smooth = smoothed(&loss);
    let curves = [
        Curves {
            title: "Loss",
            y_label: "nats a token, lower is better",
            from_zero: false,
            series: vec![line("raw", loss), line("after", smooth), held_out],
        },
        Curves {
            title: "Learning rate",
            y_label: "of the step, in millionths",
            from_zero: true,
            series: vec![line("after", report.series(|step| 1e6 * step.learning_rate))],
        },
        Curves {
            title: "Gradient",
            y_label: "norm before clipping",
            from_zero: true,
            series: vec![line("after", report.series(|step| step.gradient_norm))],
        },
        Curves {
            title: "Speed",
            y_label: "tokens/s, without what measures the held-out loss",
            from_zero: true,
            series: vec![line("after", report.series(StepReport::tokens_per_second))],
        },
    ];
    let svgs: Vec<String> = curves.iter().map(Curves::svg).collect();
    let held_out = match report.before {
        Some(_) => "<span><i class=\"held-out\"></i>loss of what is held out</span>",
        None => "",
    };
    format!(
        "<section>\n<p class=\"legend\"><span><i class=\"raw\"></i>loss of each step</span><span><i class=\"after\"></i>its mean over the last ones</span>{held_out}</p>\n\
         <div class=\"figures\">\n{}</div>\n</section>\n",
        svgs.concat()
    )
}

fn numbers(report: &TrainingReport) -> String {
    let (tokens, seconds) = report.total();
    let mut rows = vec![("steps", format!("{} of {}", report.steps.len(), report.wanted))];
    let loss = report.series(|step| step.loss);
    if let (Some((_, first)), Some((_, mean))) = (loss.first(), smoothed(&loss).last()) {
        rows.push(("loss", format!("{first:.4} at the first step, {mean:.4} on the last ones")));
    }
    let held_out = report.held_out();
    let least = held_out.iter().min_by(|a, b| a.1.total_cmp(&b.1));
    if let (Some((step, least)), Some((_, last))) = (least, held_out.last()) {
        rows.push((
            "held-out loss",
            format!("{last:.4} at the end; the least was {least:.4} after step {step}"),
        ));
    }
    rows.push((
        "tokens",
        format!("{tokens}, {} tokens/s", rate(tokens as f64 / seconds.max(1e-9))),
    ));
    rows.push(("took", duration(Duration::from_secs_f64(report.seconds))));
    rows.push(("peak memory", report.peak_memory_bytes.map_or("unknown".to_owned(), bytes)));
    table("Figures", &rows)
}

fn conditions(report: &TrainingReport) -> String {
    let machine = &report.machine;
    let mut rows = report.settings.clone();
    rows.push(("machine", machine.cpu.clone()));
    rows.push(("threads", format!("{}, {} kernels", machine.threads, machine.isa)));
    rows.push(("version", format!("bevel {}", report.version)));
    rows.push(("command", report.command.clone()));
    table("Settings", &rows)
}

fn table(title: &str, rows: &[(&str, String)]) -> String {
    let mut out = format!("<section>\n<h2>{title}</h2>\n<table class=\"plain\">\n");
    for (name, value) in rows {
        let _ = writeln!(out, "<tr><th scope=\"row\">{name}</th><td>{}</td></tr>", escape(value));
    }
    out + "</table>\n</section>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(done: usize, before: Option<f64>) -> TrainingReport {
        let step = |step| StepReport {
            step,
            loss: if step == 2 { f64::NAN } else { 4.0 / step as f64 },
            gradient_norm: 1.0,
            learning_rate: 1e-4,
            tokens: 10,
            time: Duration::from_secs(1),
            held_out: before.filter(|_| step == done),
            preferred: None,
        };
        TrainingReport {
            model: "dir/a<b>.gguf".to_owned(),
            settings: vec![("data", "x & y".to_owned())],
            wanted: 5,
            steps: (1..=done).map(step).collect(),
            before,
            command: "bevel".to_owned(),
            machine: Machine {
                cpu: String::new(),
                threads: 1,
                isa: String::new(),
                memory: None,
                system: String::new(),
            },
            version: "1",
            seconds: 3.0,
            peak_memory_bytes: None,
        }
    }

    #[track_caller]
    fn check(report: &TrainingReport, parts: &[&str], absent: &[&str]) {
        let page = html(report);
        for part in parts {
            assert!(page.contains(part), "no `{part}` in {page}");
        }
        for part in ["NaN", "inf", "<b>"].iter().chain(absent) {
            assert!(!page.contains(part), "`{part}` in {page}");
        }
    }

    #[test]
    fn a_page_is_written_of_any_run() {
        let stopped = ["stopped after 3 of 5 steps", "<h1>a&lt;b&gt;.gguf", "x &amp; y"];
        check(&report(3, Some(3.5)), &stopped, &["No examples were held out"]);
        check(&report(3, None), &["No examples were held out"], &["held-out\"></i>"]);
        check(&report(5, None), &["5 of 5"], &["stopped"]);
        check(&report(1, Some(3.5)), &["<circle class=\"after\""], &[]);
        check(&report(0, None), &["No step was done", "stopped after 0"], &[]);
    }
}
