//! Importance matrices made by watching a model at work: one pass of the calibration sequences through
//! the model as it is, layer by layer.

use std::path::Path;

use bevel_formats::imatrix::{Imatrix, ImatrixEntry};
use bevel_kernels::Cpu;
use bevel_model::{Checkpoint, Site, Stage as BlockStage};

use crate::calibration::Calibration;
use crate::output::AtomicDirectory;
use crate::progress::{Meter, OnProgress, Stage};
use crate::walk::{Limits, Walk};
use crate::{Needs, Result, Stats};

/// Gathers what `llama-imatrix` does: `Σ x²` of the input columns of every matrix that a layer has,
/// over all tokens of `calibration`; with the output head's where `with_head`. Nothing is quantized
/// on the way, so that the result belongs to the model and to no recipe.
///
/// What does not fit in memory lies beside `out`, where the matrix is going to be
/// [written](Imatrix::write), until this returns.
///
/// # Errors
/// [`Error::Stopped`](crate::Error::Stopped), and those of reading the model.
pub fn gather_imatrix(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    with_head: bool,
    out: &Path,
    cpu: &Cpu,
    on_progress: &mut OnProgress<'_>,
) -> Result<Imatrix> {
    let config = checkpoint.config();
    let sequences = &calibration.sequences;
    let passes = config.layers + usize::from(with_head);
    let total = (sequences.len() * passes) as u64;
    let mut meter = Meter { stage: Stage::Calibrate, done: 0, total, on_progress };
    let scratch = AtomicDirectory::create(out)?;
    let (limits, needs) = (Limits::default(), Needs::default());
    let mut walk = Walk::begin(checkpoint, cpu, sequences, false, &limits, scratch.workspace())?;
    let mut imatrix = Imatrix {
        datasets: vec![calibration.description.clone()],
        chunks: sequences.len() as u32,
        chunk_size: sequences.first().map_or(0, |s| s.len() as u32),
        ..Imatrix::default()
    };
    for index in 0..config.layers {
        let layer = walk.enter(index)?;
        let linears = BlockStage::ALL.map(|stage| (stage, layer.linears(stage, None)));
        let seen = layer.observe(needs, &mut meter)?;
        for (stage, linears) in linears {
            for linear in linears {
                let is_stacked = checkpoint.entry(&linear.name)?.shape.dims().len() > 2;
                let experts = config.experts.filter(|_| is_stacked).map_or(0, |e| e.count);
                let sites: Vec<Option<usize>> = match experts {
                    0 => vec![None],
                    count => (0..count).map(Some).collect(),
                };
                let stats = sites.into_iter().map(|expert| seen.get(&Site { stage, expert }));
                imatrix.entries.insert(linear.name, entry(stats, linear.cols));
            }
        }
    }
    if with_head {
        let (_, head) = walk.head().swap_remove(0);
        let stats = walk.head_stats(needs, &mut meter)?;
        imatrix.entries.insert(head.name, entry([Some(&stats)], head.cols));
    }
    Ok(imatrix)
}

/// The sums of a tensor's matrices; those of an expert that no token came to are 0.
fn entry<'a>(stats: impl IntoIterator<Item = Option<&'a Stats>>, columns: usize) -> ImatrixEntry {
    let mut entry = ImatrixEntry { sums: Vec::new(), counts: Vec::new() };
    for stats in stats {
        match stats {
            Some(stats) => entry.sums.extend(stats.square_sum().iter().map(|&sum| sum as f32)),
            None => entry.sums.resize(entry.sums.len() + columns, 0.0),
        }
        entry.counts.push(stats.map_or(0, Stats::tokens));
    }
    entry
}
