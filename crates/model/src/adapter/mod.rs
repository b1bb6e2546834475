//! Low-rank adapters (LoRA, arXiv 2106.09685) of a model's linear layers: y = W x + s B A x, with A `[r, in]` and
//! B `[out, r]`. An [`AdapterFile`] is what files say, by the names and in the order of rows that GGUF files
//! have; an [`Adapter`] is the same in the layouts that kernels run on.

mod gguf;
mod peft;
mod running;

use std::path::{Path, PathBuf};

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
}

/// What an adapter adds to a matrix: s B A.
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
}

impl LowRank {
    /// s
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f32;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    /// `weights += factor · s B A`, for `weights` `[out, in]`.
    ///
    /// # Panics
    /// Where `weights` has another shape.
    pub fn add_to(&self, weights: &mut [f32], factor: f32) {
        let (rows, cols) = (self.b.len() / self.rank, self.a.len() / self.rank);
        assert_eq!(weights.len(), rows * cols, "weights of a [{rows}, {cols}] matrix");
        let scale = factor * self.scale();
        for (row, b) in weights.chunks_exact_mut(cols).zip(self.b.chunks_exact(self.rank)) {
            for (&b, a) in b.iter().zip(self.a.chunks_exact(cols)) {
                let b = scale * b;
                row.iter_mut().zip(a).for_each(|(weight, a)| *weight += b * a);
            }
        }
    }
}

impl AdapterFile {
    /// One that adds nothing yet. `path` is what messages call it.
    pub fn new(path: impl Into<String>) -> Self {
        Self { path: path.into(), files: Vec::new(), matrices: IndexMap::new() }
    }

    /// Reads an adapter of a model: a directory as PEFT writes it, or a GGUF file as llama.cpp has it.
    ///
    /// # Errors
    /// [`Error::Adapter`] for what belongs to another model or is no plain LoRA, and those of reading.
    pub fn open(path: &Path, config: &ModelConfig) -> Result<Self> {
        let file = if path.is_dir() { peft::open(path, config) } else { gguf::open(path, config) }?;
        if file.matrices.is_empty() {
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
        let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        if !(matrix.scale().is_finite() && finite(&matrix.a) && finite(&matrix.b)) {
            return Err(self.refused(format!("`{stored}` holds values that are no numbers")));
        }
        self.matrices.insert(weight.to_owned(), matrix);
        Ok(())
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

    /// The same with values of another type of floating point.
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

/// The smallest type of both that holds the values of both.
fn common_type(a: DType, b: DType) -> DType {
    match a == b && matches!(a, DType::F16 | DType::BF16) {
        true => a,
        false => DType::F32,
    }
}
