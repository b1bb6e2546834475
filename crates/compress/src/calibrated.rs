//! Quantization with calibration data: the walk, with every layer's matrices solved on the inputs
//! that the already quantized part of the model gives them.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use bevel_base::DType;
use bevel_kernels::Cpu;
use bevel_model::{Checkpoint, Stage as BlockStage};

use crate::calibration::Calibration;
use crate::output::Options;
use crate::progress::{Meter, OnProgress, Stage};
use crate::solve::{
    self, Form, Rtn, SolveReport, Solved, Target, awq_scales, rounding_error, solve,
};
use crate::walk::{Fingerprint, Layer, Limits, Linear, Outcome, Unfinished, Walk, read_rows};
use crate::{Error, GptqSettings, Method, Needs, Provenance, Recipe, Result, Stats, Times};

/// What a matrix becomes. `None` where it is to be left alone.
pub(crate) type TargetOf<'a> = dyn Fn(&str) -> Option<Target> + 'a;

/// Everything a walk that quantizes needs to know.
pub(crate) struct Run<'a> {
    checkpoint: &'a Checkpoint,
    cpu: &'a Cpu,
    calibration: &'a Calibration,
    /// What the solver works with.
    needs: Needs,
    solver: Solver<'a>,
    target_of: &'a TargetOf<'a>,
    /// Input channels are scaled first, as AWQ does it.
    fold: bool,
    /// Each matrix is also rounded to nearest, for the report.
    compare: bool,
    limits: Limits,
}

/// How a matrix is solved once its inputs are known.
pub(crate) struct Solver<'a> {
    cpu: &'a Cpu,
    method: solve::Method,
}

impl<'a> Run<'a> {
    /// What a recipe asks for. `None` where it asks for no walk.
    ///
    /// # Errors
    /// [`Error::NoCalibration`] where it asks for data that is not given.
    pub(crate) fn of(
        recipe: &Recipe,
        checkpoint: &'a Checkpoint,
        cpu: &'a Cpu,
        calibration: Option<&'a Calibration>,
        target_of: &'a TargetOf<'a>,
        options: &Options,
    ) -> Result<Option<Self>> {
        if !recipe.is_calibrated() {
            return Ok(None);
        }
        Ok(Some(Self {
            checkpoint,
            cpu,
            calibration: calibration.ok_or(Error::NoCalibration)?,
            needs: recipe.method.needs(),
            solver: Solver { cpu, method: recipe.method.solver(&recipe.gptq) },
            target_of,
            fold: recipe.scales(),
            compare: options.compare,
            limits: Limits::default(),
        }))
    }

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
        times: &mut Times,
        on_progress: &mut OnProgress<'_>,
    ) -> Result<Unfinished> {
        let (start, others) = (Instant::now(), times.total());
        let fingerprint = Fingerprint::new(provenance, self.calibration, self.cpu);
        let mut unfinished = Unfinished::open(out, &fingerprint, options.restart)?;
        let layers = self.checkpoint.config().layers;
        times.taken_up = unfinished.done();
        if unfinished.done() > layers {
            return Ok(unfinished);
        }
        let sequences = &self.calibration.sequences;
        let dir = unfinished.dir().to_owned();
        let (checkpoint, cpu) = (self.checkpoint, self.cpu);
        let mut walk =
            Walk::begin(checkpoint, cpu, sequences, self.needs.cross, &self.limits, &dir)?.fast();
        // A layer is four stages and the way out, and a look at it before where scales are folded.
        let passes = BlockStage::ALL.len() as u64 + 1 + u64::from(self.fold);
        let steps = sequences.len() as u64 * passes;
        let total = steps * layers as u64 + sequences.len() as u64;
        let done = steps * unfinished.done() as u64;
        let mut meter = Meter { stage: Stage::Calibrate, done, total, on_progress };
        if unfinished.done() > 0 {
            unfinished.resume(&mut walk)?;
        }
        for index in unfinished.done()..layers {
            let outcomes = self.layer(&mut walk, index, &mut meter)?;
            meter.done = steps * (index as u64 + 1);
            times.time("keep", || unfinished.commit(&mut walk, &outcomes))?;
        }
        let outcomes = self.head(&mut walk, &mut meter)?;
        times.time("keep", || unfinished.commit(&mut walk, &outcomes))?;
        for (step, seconds) in &walk.times.steps {
            times.add(step, *seconds);
        }
        times.statistics_operations += walk.times.statistics_operations;
        let known = times.total() - others;
        times.add("forward", (start.elapsed().as_secs_f64() - known).max(0.0));
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
        let rounding = if self.fold { self.fold(&mut layer, meter)? } else { HashMap::new() };
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
                        let stats = all.get(&part);
                        let before = rounding.get(&linear.name).copied();
                        let solved =
                            self.solve(&linear, &weight, stats, &target, before, layer.times())?;
                        layer.replace(&linear, &solved.weights)?;
                        outcomes.push(Outcome { linear, form: solved.form, report: solved.report });
                        meter.advance(&outcomes[outcomes.len() - 1].linear.name, 0)?;
                    }
                }
            }
        }
        // What folding changed and nothing quantized: norms, biases, what the recipe keeps.
        for (linear, values) in layer.changed() {
            if !outcomes
                .iter()
                .any(|o| o.linear.name == linear.name && o.linear.part == linear.part)
            {
                let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                let form = Form::Packed { dtype: DType::F32, bytes };
                outcomes.push(Outcome { linear, form, report: SolveReport::default() });
            }
        }
        layer.leave(meter)?;
        Ok(outcomes)
    }

    /// Scales the input channels of a layer's stages, each for all matrices that share the input. Gives
    /// the error of rounding them to nearest as they were, where that is asked for.
    fn fold(
        &self,
        layer: &mut Layer<'_, '_>,
        meter: &mut Meter<'_, '_>,
    ) -> Result<HashMap<String, f64>> {
        let mut rounding = HashMap::new();
        let all = layer.survey(Needs { gram: true, cross: false }, meter)?;
        for (stage, stats) in all {
            // What the matrices' own errors are going to be measured with.
            let diagonal = (!self.needs.gram).then(|| stats.without_gram());
            let measure = diagonal.as_ref().unwrap_or(&stats);
            let linears = layer.linears(stage, None);
            let target = linears.iter().find_map(|l| (self.target_of)(&l.name));
            let Some(target) = target.filter(|_| layer.can_fold(stage)) else { continue };
            let weights = linears.iter().map(|l| layer.weight(l)).collect::<Result<Vec<_>>>()?;
            for (linear, weight) in linears.iter().zip(&weights).filter(|_| self.compare) {
                let Some(target) = (self.target_of)(&linear.name) else { continue };
                let error = layer.times().time("compare", || {
                    rounding_error(self.cpu, weight, linear.rows, measure, &target, None)
                });
                let wrap = |source| Error::Solve { tensor: linear.name.clone(), source };
                rounding.insert(linear.name.clone(), error.map_err(wrap)?);
            }
            let weights: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
            let ties = layer.ties(stage);
            let search =
                || awq_scales(self.cpu, &weights, stats.cols(), &stats, &target, ties.as_deref());
            let found = layer
                .times()
                .time("scales", search)
                .map_err(|source| Error::Solve { tensor: linears[0].name.clone(), source })?;
            layer.fold(stage, &found.scales)?;
        }
        Ok(rounding)
    }

    /// The output head, if it is to be quantized.
    fn head(&self, walk: &mut Walk<'_>, meter: &mut Meter<'_, '_>) -> Result<Vec<Outcome>> {
        let parts = walk.head();
        let Some(target) = (self.target_of)(&parts[0].1.name) else { return Ok(Vec::new()) };
        let stats = walk.head_stats(self.needs, meter)?;
        let mut outcomes = Vec::new();
        for (first, linear) in parts {
            let weight = read_rows(self.checkpoint, &linear.name, first, linear.rows)?;
            let solved =
                self.solve(&linear, &weight, Some(&stats), &target, None, &mut walk.times)?;
            outcomes.push(Outcome { linear, form: solved.form, report: solved.report });
            meter.advance("output", 0)?;
        }
        Ok(outcomes)
    }

    /// Solves a matrix, on the clock. `before` is the error of rounding it to nearest, where that is
    /// known because the matrix is another one by now.
    fn solve(
        &self,
        linear: &Linear,
        weight: &[f32],
        stats: Option<&Stats>,
        target: &Target,
        before: Option<f64>,
        times: &mut Times,
    ) -> Result<Solved> {
        let solve = || self.solver.solve(linear, weight, stats, target);
        let mut solved = times.time("solve", solve)?;
        if before.is_some() {
            solved.report.rtn_error = before;
        } else if let (true, None, Some(stats)) = (self.compare, solved.report.rtn_error, stats) {
            let compare =
                || rounding_error(self.cpu, weight, linear.rows, stats, target, Some(&solved));
            let wrap = |source| Error::Solve { tensor: linear.name.clone(), source };
            solved.report.rtn_error = Some(times.time("compare", compare).map_err(wrap)?);
        }
        Ok(solved)
    }
}

impl<'a> Solver<'a> {
    /// The solver that a recipe's types are chosen by: what is tried many times makes do without the
    /// last improvements.
    pub(crate) fn measuring(recipe: &Recipe, cpu: &'a Cpu) -> Self {
        let settings = GptqSettings { drift: 0.0, refine: Some(0), ..recipe.gptq };
        let method = match recipe.method {
            Method::Gptaq => Method::Gptq,
            Method::Awq => Method::Importance,
            other => other,
        };
        Self { cpu, method: method.solver(&settings) }
    }

    /// Solves a matrix for a target; without statistics, as no token came to it, by rounding.
    pub(crate) fn solve(
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
        // Experts see other tokens in the full model: there is no drift to make up for.
        let method = match self.method {
            solve::Method::Gptq(gptq) if !stats.needs().cross => {
                solve::Method::Gptq(solve::Gptq { drift: 0.0, ..gptq })
            }
            method => method,
        };
        let mut solved =
            solve(self.cpu, weight, *rows, *cols, stats, target, &method).map_err(wrap)?;
        solved.report.tokens = stats.tokens();
        Ok(solved)
    }
}
