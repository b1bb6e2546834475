//! The tensors of a model as training sees them: read from its file as they are, or trained themselves.

use std::ops::Range;
use std::sync::Arc;

use bevel_kernels::linalg::{Panels, Rows, Term, Update, View};
use bevel_kernels::{Cpu, rms_norm_backward};
use bevel_model::{Checkpoint, Result};
use rand_pcg::Pcg64Mcg;

use crate::frozen::Frozen;
use crate::room::{Input, Room, Step};
use crate::{Parameters, Rounding, Trainable, tiles};

/// A matrix `[out, in]` of the model.
#[derive(Debug)]
pub(crate) enum Matrix<'c> {
    /// As its file has it.
    Frozen(Frozen<'c>),
    /// Rows of a parameter.
    Trained {
        /// Its number.
        parameter: usize,
        /// Which of its rows.
        rows: Range<usize>,
        cols: usize,
        /// What products see of it.
        rounding: Option<Arc<dyn Rounding>>,
    },
}

/// A norm's weight, or a bias.
#[derive(Debug)]
pub(crate) enum Vector {
    Frozen(Vec<f32>),
    /// The number of a parameter, and which of its values.
    Trained(usize, Range<usize>),
}

/// Reads a model's tensors, and makes parameters of those that are trained.
pub(crate) struct Loader<'c, 'a> {
    pub(crate) cpu: &'a Cpu,
    pub(crate) checkpoint: &'c Checkpoint,
    pub(crate) trainable: &'a Trainable,
    pub(crate) random: Pcg64Mcg,
    pub(crate) parameters: &'a mut Parameters,
}

impl<'c> Loader<'c, '_> {
    /// A matrix, or some of its rows.
    pub(crate) fn matrix(&mut self, name: &str, rows: Option<Range<usize>>) -> Result<Matrix<'c>> {
        if !self.trainable.trains(name) {
            return Ok(Matrix::Frozen(Frozen::load(self.checkpoint, name, rows)?));
        }
        let dims = self.checkpoint.entry(name)?.shape.dims().to_vec();
        let (&cols, outer) = dims.split_last().expect("checked shapes have dimensions");
        let parameter = self.parameter(name, (outer.iter().product(), cols))?;
        let rows = rows.unwrap_or(0..self.parameters.all()[parameter].shape.0);
        let rounding = self.trainable.roundings.get(name).cloned();
        Ok(Matrix::Trained { parameter, rows, cols, rounding })
    }

    /// The matrices of a stack, as experts are.
    pub(crate) fn stack(&mut self, name: &str) -> Result<Vec<Matrix<'c>>> {
        if !self.trainable.trains(name) {
            let all = Frozen::stack(self.checkpoint, name)?;
            return Ok(all.into_iter().map(Matrix::Frozen).collect());
        }
        let dims = self.checkpoint.entry(name)?.shape.dims().to_vec();
        let (count, rows) = (dims[0], dims[1]);
        (0..count).map(|i| self.matrix(name, Some(i * rows..(i + 1) * rows))).collect()
    }

    /// A vector, or some of its values.
    pub(crate) fn vector(&mut self, name: &str, part: Option<Range<usize>>) -> Result<Vector> {
        if self.trainable.trains(name) {
            let parameter = match self.parameters.find(name) {
                Some(found) => found,
                None => {
                    self.parameters.add_vector(name.to_owned(), &self.checkpoint.read_f32(name)?)
                }
            };
            let len = self.parameters.get(parameter).len();
            return Ok(Vector::Trained(parameter, part.unwrap_or(0..len)));
        }
        let values = self.checkpoint.read_f32(name)?;
        Ok(Vector::Frozen(part.map_or(values.clone(), |part| values[part].to_vec())))
    }

    /// The parameter of this name, made of the checkpoint's values where there is none.
    fn parameter(&mut self, name: &str, shape: (usize, usize)) -> Result<usize> {
        if let Some(found) = self.parameters.find(name) {
            return Ok(found);
        }
        let values = self.checkpoint.read_f32(name)?;
        self.checkpoint.release(name);
        Ok(self.parameters.add(name.to_owned(), shape, &values))
    }
}

/// A matrix as products see it.
pub(crate) enum Seen<'a> {
    Frozen(&'a Frozen<'a>),
    /// Values of a parameter, and what they are rounded to.
    Trained {
        values: &'a [f32],
        cols: usize,
        rounded: Option<(&'a dyn Rounding, f32)>,
    },
}

impl Rows for Seen<'_> {
    fn rows(&self) -> usize {
        match self {
            Self::Frozen(frozen) => frozen.rows(),
            Self::Trained { values, cols, .. } => values.len() / cols,
        }
    }

    fn cols(&self) -> usize {
        match self {
            Self::Frozen(frozen) => frozen.cols(),
            Self::Trained { cols, .. } => *cols,
        }
    }

    fn read(&self, index: usize, out: &mut [f32]) {
        match self {
            Self::Frozen(frozen) => frozen.read(index, out),
            Self::Trained { values, cols, rounded } => {
                out.copy_from_slice(&values[index * cols..][..*cols]);
                if let Some((rounding, scale)) = rounded {
                    rounding.round(*scale, out);
                }
            }
        }
    }
}

impl<'c> Matrix<'c> {
    /// Outputs.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Frozen(frozen) => frozen.rows(),
            Self::Trained { rows, .. } => rows.len(),
        }
    }

    /// Inputs.
    pub(crate) fn cols(&self) -> usize {
        match self {
            Self::Frozen(frozen) => frozen.cols(),
            Self::Trained { cols, .. } => *cols,
        }
    }

    /// The matrix as products see it.
    pub(crate) fn seen<'a>(&'a self, parameters: &'a Parameters) -> Seen<'a> {
        match self {
            Self::Frozen(frozen) => Seen::Frozen(frozen),
            Self::Trained { parameter, .. } => self.seen_trained(parameters.get(*parameter)),
        }
    }

    /// The same of a trained matrix, given the values of its parameter.
    fn seen_trained<'a>(&'a self, all: &'a [f32]) -> Seen<'a> {
        let Self::Trained { rows, cols, rounding, .. } = self else {
            unreachable!("frozen matrices have no parameter")
        };
        let values = &all[rows.start * cols..rows.end * cols];
        // Rows that share a tensor with others share its scale.
        let rounded = rounding.as_deref().map(|rounding| (rounding, rounding.scale(all)));
        Seen::Trained { values, cols: *cols, rounded }
    }

    /// Bytes that are not trained.
    pub(crate) fn frozen_bytes(&self) -> usize {
        match self {
            Self::Frozen(frozen) => frozen.bytes(),
            Self::Trained { .. } => 0,
        }
    }

    /// Whether inputs of products with it are rounded.
    pub(crate) fn rounds_inputs(&self) -> bool {
        match self {
            Self::Frozen(_) => false,
            Self::Trained { rounding, .. } => {
                rounding.as_ref().is_some_and(|rounding| rounding.rounds_inputs())
            }
        }
    }

    /// Adds to the gradient of row `index`.
    pub(crate) fn row_backward(&self, parameters: &mut Parameters, index: usize, d_row: &[f32]) {
        if let Self::Trained { parameter, rows, cols, .. } = self {
            let (_, gradient) = parameters.with_gradient(*parameter);
            let row = &mut gradient[(rows.start + index) * cols..][..*cols];
            row.iter_mut().zip(d_row).for_each(|(sum, d)| *sum += d);
        }
    }

    /// `y = x Wᵀ`, and `more` terms, with `x` packed as the left factor.
    pub(crate) fn forward(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        y: &mut [f32],
        x: &Panels,
        more: &[Term<'_>],
        room: &mut Room,
    ) {
        let (precision, right) = (step.precision, &mut room.right);
        tiles::forward(step.cpu, precision, &self.seen(parameters), y, x, more, right);
    }

    /// `d_x = d_y W`, and `more` terms, or what `update` says, with `d_y` packed as the left factor as well; and where the
    /// matrix is trained `Ẇ += d_yᵀ x`.
    #[allow(clippy::too_many_arguments)] // Those of a product.
    pub(crate) fn backward(
        &self,
        step: &Step<'_>,
        parameters: &mut Parameters,
        update: Update,
        d_x: &mut [f32],
        d_y: Input<'_>,
        x: &[f32],
        more: &[Term<'_>],
        room: &mut Room,
    ) {
        let (cpu, precision, right) = (step.cpu, step.precision, &mut room.right);
        let mut through = |w: Seen<'_>| {
            tiles::backward(cpu, precision, &w, update, d_x, d_y.packed, more, right);
        };
        match self {
            Self::Frozen(frozen) => through(Seen::Frozen(frozen)),
            Self::Trained { parameter, rows, cols, .. } => {
                let (values, gradient) = parameters.with_gradient(*parameter);
                through(self.seen_trained(values));
                let n = x.len() / cols;
                let (d_y, x) = (View::new(d_y.values, n, rows.len()), View::new(x, n, *cols));
                let gradient = &mut gradient[rows.start * cols..rows.end * cols];
                step.product(Update::Add, d_y.transposed(), x, gradient);
            }
        }
    }

    /// Calls `work` with some rows after others.
    pub(crate) fn for_each_tile(
        &self,
        cpu: &Cpu,
        parameters: &Parameters,
        room: &mut Room,
        work: impl FnMut(Range<usize>, &[f32]),
    ) {
        tiles::for_each(cpu, &self.seen(parameters), &mut room.tile, work);
    }
}

impl Vector {
    pub(crate) fn get<'a>(&'a self, parameters: &'a Parameters) -> &'a [f32] {
        match self {
            Self::Frozen(values) => values,
            Self::Trained(parameter, part) => &parameters.get(*parameter)[part.clone()],
        }
    }

    /// Adds to the gradient of a bias that was added to `n` rows.
    pub(crate) fn bias_backward(&self, parameters: &mut Parameters, d_y: &[f32]) {
        let Self::Trained(parameter, part) = self else { return };
        let (_, gradient) = parameters.with_gradient(*parameter);
        for row in d_y.chunks_exact(part.len()) {
            gradient[part.clone()].iter_mut().zip(row).for_each(|(sum, d)| *sum += d);
        }
    }

    /// Adds the gradient of the input `x` of an RMSNorm with these weights to `d_x`, given that of its output, for
    /// `rows` rows; and to that of the weights, where they are trained.
    pub(crate) fn norm_backward(
        &self,
        step: &Step<'_>,
        parameters: &mut Parameters,
        d_x: &mut [f32],
        d_out: &[f32],
        x: &[f32],
        rows: usize,
    ) {
        let (cpu, eps) = (step.cpu, step.config.norm_eps);
        match self {
            Self::Frozen(weight) => {
                rms_norm_backward(cpu, d_x, None, d_out, x, weight, eps, rows, weight.len());
            }
            Self::Trained(parameter, part) => {
                let (values, gradient) = parameters.with_gradient(*parameter);
                let (weight, d_weight) = (&values[part.clone()], &mut gradient[part.clone()]);
                let width = weight.len();
                rms_norm_backward(cpu, d_x, Some(d_weight), d_out, x, weight, eps, rows, width);
            }
        }
    }
}
