//! Quantization with calibration data: the walk, with every layer's matrices solved on the inputs
//! that the already quantized part of the model gives them.

use std::path::Path;

use bevel_kernels::Cpu;
use bevel_model::{Checkpoint, Stage as BlockStage};

use crate::calibration::Calibration;
use crate::output::Options;
use crate::progress::{Meter, OnProgress, Stage};
use crate::provenance::hexadecimal;
use crate::solve::{self, Rtn, SolveReport, Solved, Target, solve};
use crate::walk::{Fingerprint, Limits, Linear, Outcome, Unfinished, Walk, read_rows};
use crate::{Error, Needs, Provenance, Result, Stats};

/// What a matrix becomes. `None` where it is to be left alone.
pub(crate) type TargetOf<'a> = dyn Fn(&str) -> Option<Target> + 'a;

/// Everything a walk that quantizes needs to know.
pub(crate) struct Run<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) cpu: &'a Cpu,
    pub(crate) calibration: &'a Calibration,
    /// What the solver works with.
    pub(crate) needs: Needs,
    pub(crate) solver: &'a solve::Method,
    pub(crate) target_of: &'a TargetOf<'a>,
    pub(crate) limits: Limits,
}

impl Run<'_> {
    /// Solves every matrix that has a target. What became of them lies in the directory returned;
    /// an unfinished run for the same output is taken up.
    ///
    /// # Errors
    /// [`Error::OtherRun`], [`Error::Stopped`], and those of reading, solving and writing. The
    /// directory is then kept, for a run that goes on.
    pub(crate) fn run(
        &self,
        out: &Path,
        provenance: &Provenance,
        options: &Options,
        on_progress: &mut OnProgress<'_>,
    ) -> Result<Unfinished> {
        let fingerprint = Fingerprint {
            version: provenance.version.clone(),
            source_sha256: provenance.source_sha256.clone(),
            recipe: provenance.recipe.clone(),
            calibration_sha256: hexadecimal(&self.calibration.fingerprint),
        };
        let mut unfinished = Unfinished::open(out, &fingerprint, options.restart)?;
        let layers = self.checkpoint.config().layers;
        if unfinished.done() > layers {
            return Ok(unfinished);
        }
        let sequences = &self.calibration.sequences;
        let dir = unfinished.dir().to_owned();
        let (checkpoint, cpu) = (self.checkpoint, self.cpu);
        let mut walk =
            Walk::begin(checkpoint, cpu, sequences, self.needs.cross, &self.limits, &dir)?;
        // A layer is four stages and the way out.
        let steps = sequences.len() as u64 * (BlockStage::ALL.len() as u64 + 1);
        let total = steps * layers as u64 + sequences.len() as u64;
        let done = steps * unfinished.done() as u64;
        let mut meter = Meter { stage: Stage::Calibrate, done, total, on_progress };
        if unfinished.done() > 0 {
            unfinished.resume(&mut walk)?;
        }
        for index in unfinished.done()..layers {
            let outcomes = self.layer(&mut walk, index, &mut meter)?;
            meter.done = steps * (index as u64 + 1);
            unfinished.commit(&mut walk, &outcomes)?;
        }
        let outcomes = self.head(&mut walk, &mut meter)?;
        unfinished.commit(&mut walk, &outcomes)?;
        Ok(unfinished)
    }

    /// One layer: stage by stage, each on the inputs that the stages before give once quantized.
    fn layer(
        &self,
        walk: &mut Walk<'_>,
        index: usize,
        meter: &mut Meter<'_, '_>,
    ) -> Result<Vec<Outcome>> {
        let mut layer = walk.enter(index)?;
        let mut outcomes = Vec::new();
        for stage in BlockStage::ALL {
            let wanted = |l: &Linear| (self.target_of)(&l.name).is_some();
            if !layer.linears(stage, None).iter().any(wanted) {
                continue;
            }
            for experts in layer.expert_batches(stage, self.needs, &self.limits) {
                let all = layer.stats(stage, self.needs, experts.clone(), meter)?;
                let parts = experts.map_or(vec![None], |range| range.map(Some).collect());
                for part in parts {
                    for linear in layer.linears(stage, part) {
                        let Some(target) = (self.target_of)(&linear.name) else { continue };
                        let weight = layer.weight(&linear)?;
                        let solved = self.solve(&linear, &weight, all.get(&part), &target)?;
                        layer.replace(&linear, &solved.weights)?;
                        outcomes.push(Outcome { linear, form: solved.form, report: solved.report });
                        meter.advance(&outcomes[outcomes.len() - 1].linear.name, 0)?;
                    }
                }
            }
        }
        layer.leave(meter)?;
        Ok(outcomes)
    }

    /// The output head, if it is to be quantized.
    fn head(&self, walk: &mut Walk<'_>, meter: &mut Meter<'_, '_>) -> Result<Vec<Outcome>> {
        let parts = walk.head();
        let Some(target) = (self.target_of)(&parts[0].1.name) else { return Ok(Vec::new()) };
        let stats = walk.head_stats(self.needs, meter)?;
        let mut outcomes = Vec::new();
        for (first, linear) in parts {
            let weight = read_rows(self.checkpoint, &linear.name, first, linear.rows)?;
            let solved = self.solve(&linear, &weight, Some(&stats), &target)?;
            outcomes.push(Outcome { linear, form: solved.form, report: solved.report });
            meter.advance("output", 0)?;
        }
        Ok(outcomes)
    }

    fn solve(
        &self,
        linear: &Linear,
        weight: &[f32],
        stats: Option<&Stats>,
        target: &Target,
    ) -> Result<Solved> {
        let Linear { name, rows, cols, .. } = linear;
        if let Some((index, value)) = crate::transcode::first_not_finite(weight) {
            return Err(Error::NotFinite { tensor: name.clone(), index, value });
        }
        let wrap = |source| Error::Solve { tensor: name.clone(), source };
        let Some(stats) = stats else {
            // No token came to this expert.
            let (nothing, rounding) =
                (Stats::new(*cols, Needs::default()), solve::Method::Rtn(Rtn { weighted: false }));
            let solved =
                solve(self.cpu, weight, *rows, *cols, &nothing, target, &rounding).map_err(wrap)?;
            let report = SolveReport { fell_back: true, ..solved.report };
            return Ok(Solved { report, ..solved });
        };
        solve(self.cpu, weight, *rows, *cols, stats, target, self.solver).map_err(wrap)
    }
}
