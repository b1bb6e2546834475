//! Low-rank adapters (LoRA, arXiv 2106.09685) of a model's linear layers: y = W x + s B A x, with A `[r, in]` and
//! B `[out, r]`. An [`AdapterFile`] is what files say, by the names and in the order of rows that GGUF files
//! have; an [`Adapter`] is the same in the layouts that kernels run on.

mod gguf;
mod peft;
mod running;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bevel_base::{DType, pack};
use indexmap::IndexMap;

use crate::{Error, ModelConfig, Place, Result, Stage};

pub use running::{Adapter, ScaledAdapter};
pub(crate) use running::{LayerAdapters, StageAdapters};

/// An adapter as its files have it.
#[derive(Clone, Debug)]
pub struct AdapterFile {
    path: String,
    files: Vec<PathBuf>,
    matrices: IndexMap<String, LowRank>,
    tensors: IndexMap<String, Arc<[f32]>>,
}

/// What an adapter adds to a matrix: s B A. With lengths (DoRA, arXiv 2402.09353) the rows of W + s B A are then scaled to
/// these.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// r
    pub rank: usize,
    /// α: s is α / r, or α / √r.
    pub alpha: f32,
    /// s is α / √r (rsLoRA, arXiv 2312.03732).
    pub rank_stabilized: bool,
    /// The smallest type that holds all values of both matrices.
    pub dtype: DType,
    /// A, `[r, in]`.
    pub a: Vec<f32>,
    /// B, `[out, r]`, its rows in the order that the weight's have in GGUF files.
    pub b: Vec<f32>,
    /// DoRA's lengths of rows, `[out]`.
    pub magnitude: Option<Vec<f32>>,
}

impl LowRank {
    /// s
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f32;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    /// Inputs of the matrix.
    fn cols(&self) -> usize {
        self.a.len() / self.rank
    }

    /// Adds `factor · s B A` of row `index` to `row`, `[in]`.
    fn add_row(&self, index: usize, row: &mut [f32], factor: f32) {
        let scale = factor * self.scale();
        let b = &self.b[index * self.rank..][..self.rank];
        for (&b, a) in b.iter().zip(self.a.chunks_exact(row.len())) {
            let b = scale * b;
            row.iter_mut().zip(a).for_each(|(weight, a)| *weight += b * a);
        }
    }

    /// What row `index` of W + s B A is multiplied with to have its length; `adapted` is that row.
    fn growth(&self, index: usize, adapted: &[f32]) -> f32 {
        let Some(magnitude) = &self.magnitude else { return 1.0 };
        let square: f64 = adapted.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        // A row of zeros has no direction, and stays one.
        if square == 0.0 { 1.0 } else { (f64::from(magnitude[index]) / square.sqrt()) as f32 }
    }

    /// `weights += factor · (W′ − W)`, with W′ what the adapter makes of `w`; both are `[out, in]`.
    ///
    /// # Panics
    /// Where they have another shape.
    pub fn add_to(&self, w: &[f32], weights: &mut [f32], factor: f32) {
        let (rows, cols) = (self.b.len() / self.rank, self.cols());
        assert_eq!([w.len(), weights.len()], [rows * cols; 2], "a [{rows}, {cols}] matrix");
        let mut adapted = vec![0.0; cols];
        let all = weights.chunks_exact_mut(cols).zip(w.chunks_exact(cols));
        for (index, (row, w)) in all.enumerate() {
            if self.magnitude.is_none() {
                self.add_row(index, row, factor);
                continue;
            }
            adapted.copy_from_slice(w);
            self.add_row(index, &mut adapted, 1.0);
            let growth = self.growth(index, &adapted);
            for ((row, adapted), w) in row.iter_mut().zip(&adapted).zip(w) {
                *row += factor * (growth * adapted - w);
            }
        }
    }
}

impl AdapterFile {
    /// One that adds nothing yet. `path` is what messages call it.
    pub fn new(path: impl Into<String>) -> Self {
        let path = path.into();
        Self { path, files: Vec::new(), matrices: IndexMap::new(), tensors: IndexMap::new() }
    }

    /// Reads an adapter of a model: a directory as PEFT writes it, or a GGUF file as llama.cpp has it.
    ///
    /// # Errors
    /// [`Error::Adapter`] for what belongs to another model or is no plain LoRA, and those of reading.
    pub fn open(path: &Path, config: &ModelConfig) -> Result<Self> {
        let file = if path.is_dir() { peft::open(path, config) } else { gguf::open(path, config) }?;
        if file.matrices.is_empty() && file.tensors.is_empty() {
            return Err(file.refused("it has no matrices of a low-rank adapter in it"));
        }
        Ok(file)
    }

    /// Adds what is added to a weight, by its GGUF name.
    ///
    /// # Errors
    /// [`Error::Adapter`] where the model has no such weight, or one of another shape.
    pub fn insert(&mut self, config: &ModelConfig, weight: &str, matrix: LowRank) -> Result<()> {
        self.insert_stored(config, weight, weight, matrix)
    }

    /// The same, where files call it `stored`.
    fn insert_stored(
        &mut self,
        config: &ModelConfig,
        weight: &str,
        stored: &str,
        matrix: LowRank,
    ) -> Result<()> {
        let is_linear = match Place::of(weight) {
            Place::Layer(_, rest) => Stage::of(rest).is_some() && !rest.contains("_exps"),
            Place::Global(_) => false,
        };
        let shape = config.tensor_shape(weight).filter(|_| is_linear);
        let Some(&[rows, cols]) = shape.as_deref() else {
            return Err(self.refused(format!(
                "`{stored}` adapts what is no linear layer of a block of this model; adapters of embeddings, output heads, norms, routers and experts are not run"
            )));
        };
        let (rank, a, b) = (matrix.rank, matrix.a.len(), matrix.b.len());
        let shape = |values: usize| values.checked_div(rank).unwrap_or(0);
        if rank == 0 || (a, b) != (rank * cols, rows * rank) {
            return Err(self.refused(format!(
                "the matrices of `{stored}` have the shapes [{rank}, {}] and [{}, {rank}], but the model's is [{rows}, {cols}]; the adapter belongs to another model",
                shape(a),
                shape(b)
            )));
        }
        let magnitude = matrix.magnitude.as_deref();
        if let Some(wrong) = magnitude.map(<[f32]>::len).filter(|&len| len != rows) {
            return Err(self.refused(format!(
                "the lengths (DoRA) of `{stored}` are {wrong}, but the matrix has {rows} rows; the adapter belongs to another model"
            )));
        }
        let lengths = magnitude.unwrap_or_default();
        if !(matrix.scale().is_finite()
            && [&matrix.a, &matrix.b, lengths].into_iter().all(is_finite))
        {
            return Err(self.not_finite(stored));
        }
        self.matrices.insert(weight.to_owned(), matrix);
        Ok(())
    }

    /// Adds a tensor that stands in the place of the model's, by its GGUF name (PEFT's `modules_to_save`).
    ///
    /// # Errors
    /// [`Error::Adapter`] where the model has no such tensor, or one of another size, and for those that are not
    /// [kept whole](is_saved_whole).
    pub fn insert_tensor(
        &mut self,
        config: &ModelConfig,
        name: &str,
        values: Vec<f32>,
    ) -> Result<()> {
        if !is_saved_whole(name) {
            return Err(self.refused(format!(
                "its tensor `{name}` is a bias or holds experts, which adapters do not keep whole; merge it into the model"
            )));
        }
        let shape = config.tensor_shape(name);
        let len = shape.map(|shape| shape.iter().product::<usize>());
        if len != Some(values.len()) {
            return Err(self.refused(format!(
                "its tensor `{name}` of {} values is none of this model; the adapter belongs to another one",
                values.len()
            )));
        }
        if !is_finite(&values) {
            return Err(self.not_finite(name));
        }
        self.tensors.insert(name.to_owned(), values.into());
        Ok(())
    }

    fn not_finite(&self, tensor: &str) -> Error {
        self.refused(format!("`{tensor}` holds values that are no numbers"))
    }

    /// The file or directory.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The files that were read.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// What is added to weights, by their GGUF names.
    pub fn matrices(&self) -> &IndexMap<String, LowRank> {
        &self.matrices
    }

    /// Tensors that stand in the place of the model's, by their GGUF names.
    pub fn tensors(&self) -> &IndexMap<String, Arc<[f32]>> {
        &self.tensors
    }

    /// The same with these tensors alone.
    pub fn without_matrices(&self) -> Self {
        Self { matrices: IndexMap::new(), ..self.clone() }
    }

    /// The same with the matrices of another type of floating point.
    ///
    /// # Errors
    /// Those of packing.
    pub fn rounded(mut self, dtype: DType) -> Result<Self> {
        let mut matrices = std::mem::take(&mut self.matrices);
        for (weight, matrix) in &mut matrices {
            for values in [&mut matrix.a, &mut matrix.b] {
                let bytes = self.packed(weight, values, dtype)?;
                pack::dequantize(dtype, &bytes, values)
                    .map_err(|source| self.failed(weight, source))?;
            }
            matrix.dtype = dtype;
        }
        Ok(Self { matrices, ..self })
    }

    /// Values in a type of floating point, as they are stored.
    fn packed(&self, tensor: &str, values: &[f32], dtype: DType) -> Result<Vec<u8>> {
        let wrap = |source| self.failed(tensor, source);
        let mut bytes = vec![0; dtype.row_bytes(values.len()).map_err(wrap)?];
        pack::quantize(dtype, values, None, &mut bytes).map_err(wrap)?;
        Ok(bytes)
    }

    /// What goes wrong with one of its tensors.
    fn failed(&self, tensor: &str, source: bevel_base::Error) -> Error {
        Error::Tensor { path: self.path.clone(), tensor: tensor.to_owned(), source }
    }

    fn refused(&self, problem: impl Into<String>) -> Error {
        Error::Adapter { path: self.path.clone(), problem: problem.into() }
    }
}

/// Whether adapters may hold the tensor of this name whole: weights of single modules, and no biases.
pub fn is_saved_whole(name: &str) -> bool {
    name.ends_with(".weight") && !name.contains("_exps")
}

fn is_finite(values: &[f32]) -> bool {
    values.iter().all(|value| value.is_finite())
}

/// The smallest type of both that holds the values of both.
fn common_type(a: DType, b: DType) -> DType {
    match a == b && matches!(a, DType::F16 | DType::BF16) {
        true => a,
        false => DType::F32,
    }
}
