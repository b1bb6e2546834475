//! Adapters beside the forward pass: `y += s (x Aᵀ) Bᵀ` for the rows of the sequences that have them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bevel_kernels::{Cpu, PackedMatrix, Product, matmul, matmul_add};

use super::{AdapterFile, LowRank};
use crate::linear::LinearState;
use crate::{Error, ModelConfig, Part, Place, Result, Stage};

/// An adapter that is ready to run. Any number of sequences may have it.
#[derive(Debug)]
pub struct Adapter {
    id: u64,
    path: String,
    layers: Vec<[Vec<Branch>; Stage::ALL.len()]>,
    bytes: usize,
}

/// An adapter, and how much it counts.
#[derive(Clone, Debug)]
pub struct ScaledAdapter {
    /// The adapter.
    pub adapter: Arc<Adapter>,
    /// A factor on what it adds; 1 is what it was trained for.
    pub scale: f32,
}

impl PartialEq for ScaledAdapter {
    fn eq(&self, other: &Self) -> bool {
        self.adapter.id == other.adapter.id && self.scale.to_bits() == other.scale.to_bits()
    }
}

/// What is added to one linear layer's output; nothing where the rank is 0.
#[derive(Debug)]
struct Branch {
    /// `[r, in]`
    a: PackedMatrix,
    /// `[out, r]`
    b: PackedMatrix,
    scale: f32,
}

impl Adapter {
    /// Reads an adapter of a model.
    ///
    /// # Errors
    /// Those of [`AdapterFile::open`].
    pub fn open(path: &std::path::Path, config: &ModelConfig, cpu: &Cpu) -> Result<Self> {
        Self::new(&AdapterFile::open(path, config)?, config, cpu)
    }

    /// Packs what files have, in the types they have it in.
    ///
    /// # Errors
    /// Those of packing.
    pub fn new(file: &AdapterFile, config: &ModelConfig, cpu: &Cpu) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let none = || std::array::from_fn(|_| Vec::new());
        let mut layers: Vec<[Vec<Branch>; _]> = (0..config.layers).map(|_| none()).collect();
        for (weight, matrix) in file.matrices() {
            let Place::Layer(layer, rest) = Place::of(weight) else { continue };
            let Some(stage) = Stage::of(rest) else { continue };
            let branches = &mut layers[layer][stage as usize];
            if branches.is_empty() {
                let cols = matrix.a.len() / matrix.rank;
                *branches = outputs(config, stage)
                    .into_iter()
                    .map(|rows| Branch::new(cpu, file, weight, matrix, 0, cols, 0..rows))
                    .collect::<Result<_>>()?;
            }
            for (place, rows) in places(config, rest) {
                let (rank, cols) = (matrix.rank, matrix.a.len() / matrix.rank);
                branches[place] = Branch::new(cpu, file, weight, matrix, rank, cols, rows)?;
            }
        }
        let all = layers.iter().flatten().flatten();
        let bytes = all.map(|branch| branch.a.bytes() + branch.b.bytes()).sum();
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Self { id, path: file.path().to_owned(), layers, bytes })
    }

    /// A number that no other adapter of this process has.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The file or directory that it came from.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Branch {
    /// Some rows of what is added to a matrix; nothing at all where `rank` is 0.
    fn new(
        cpu: &Cpu,
        file: &AdapterFile,
        weight: &str,
        matrix: &LowRank,
        rank: usize,
        cols: usize,
        rows: Range<usize>,
    ) -> Result<Self> {
        let pack = |rows: usize, cols: usize, values: &[f32]| {
            let bytes = file.packed(weight, values, matrix.dtype)?;
            PackedMatrix::pack(cpu, matrix.dtype, rows, cols, &bytes).map_err(|source| {
                Error::Kernel { path: file.path().to_owned(), tensor: weight.to_owned(), source }
            })
        };
        Ok(Self {
            a: pack(rank, cols, &matrix.a[..rank * cols])?,
            b: pack(rows.len(), rank, &matrix.b[rows.start * rank..rows.end * rank])?,
            scale: matrix.scale(),
        })
    }
}

/// Outputs of a stage's linear layers, in the order in which the forward pass has them.
fn outputs(config: &ModelConfig, stage: Stage) -> Vec<usize> {
    let (q, kv) = (config.q_dim(), config.kv_dim());
    match stage {
        Stage::Qkv => vec![q, kv, kv],
        Stage::GateUp => vec![config.ffn_dim; 2],
        Stage::AttentionOutput | Stage::Down => vec![config.dim],
    }
}

/// Which linear layers of its stage a tensor holds, by its name within the block, and their rows.
fn places(config: &ModelConfig, name: &str) -> Vec<(usize, Range<usize>)> {
    let stage = Stage::of(name).expect("adapters have names of linear layers");
    let outputs = outputs(config, stage);
    let one = |place: usize| vec![(place, 0..outputs[place])];
    match name.strip_suffix(".weight").unwrap_or(name) {
        "attn_k" => one(1),
        "attn_v" => one(2),
        "ffn_up" if !config.family.is_fused() => one(1),
        "attn_qkv" | "ffn_up" => {
            let mut start = 0;
            let next = |rows: &usize| {
                start += rows;
                start - rows..start
            };
            outputs.iter().map(next).enumerate().collect()
        }
        _ => one(0),
    }
}

/// The adapters of a step, seen from one decoder block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerAdapters<'a> {
    /// Those of all sequences.
    pub(crate) common: &'a [ScaledAdapter],
    /// The sequences with their own; empty where none has any.
    pub(crate) parts: &'a [Part<'a>],
    pub(crate) layer: usize,
}

impl<'a> LayerAdapters<'a> {
    /// Nobody has any.
    pub(crate) const NONE: Self = Self { common: &[], parts: &[], layer: 0 };

    /// Seen from the linear layers that share an input.
    pub(crate) fn at(self, stage: Stage) -> StageAdapters<'a> {
        StageAdapters { of_layer: self, stage }
    }
}

/// The adapters of a step, seen from linear layers that share an input.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StageAdapters<'a> {
    of_layer: LayerAdapters<'a>,
    stage: Stage,
}

impl StageAdapters<'_> {
    /// Nobody has any.
    pub(crate) const NONE: Self = Self { of_layer: LayerAdapters::NONE, stage: Stage::Qkv };

    /// `y += s (x Aᵀ) Bᵀ` for every layer's output `y`, `[n, out]`, given their input `x`, `[n, in]`.
    pub(crate) fn add<const LAYERS: usize>(
        self,
        cpu: &Cpu,
        x: &[f32],
        n: usize,
        outs: &mut [&mut Vec<f32>; LAYERS],
        state: &mut LinearState,
    ) {
        let LayerAdapters { common, parts, layer } = self.of_layer;
        let mut add = |adapters: &[ScaledAdapter], rows: Range<usize>| {
            for ScaledAdapter { adapter, scale } in adapters {
                let branches = &adapter.layers[layer][self.stage as usize];
                if let Ok(branches) = <&[Branch; LAYERS]>::try_from(branches.as_slice()) {
                    add_rows(cpu, branches, *scale, x, n, rows.clone(), outs, state);
                }
            }
        };
        add(common, 0..n);
        let mut start = 0;
        for alike in parts.chunk_by(|a, b| a.adapters == b.adapters) {
            let rows = start..start + alike.iter().map(|part| part.tokens).sum::<usize>();
            add(alike[0].adapters, rows.clone());
            start = rows.end;
        }
    }
}

/// Adds what one adapter adds to some of the `n` rows.
fn add_rows<const LAYERS: usize>(
    cpu: &Cpu,
    branches: &[Branch; LAYERS],
    scale: f32,
    x: &[f32],
    n: usize,
    rows: Range<usize>,
    outs: &mut [&mut Vec<f32>; LAYERS],
    state: &mut LinearState,
) {
    let (count, cols) = (rows.len(), x.len() / n);
    let LinearState { matmul: scratch, inner, .. } = state;
    let ranks: usize = branches.iter().map(|branch| branch.a.rows()).sum();
    inner.resize(inner.len().max(count * ranks), 0.0);
    let mut rest = &mut inner[..];
    let mut products = branches.each_ref().map(|branch| {
        let (out, after) = std::mem::take(&mut rest).split_at_mut(count * branch.a.rows());
        rest = after;
        Product { weight: &branch.a, out }
    });
    matmul(cpu, &x[rows.start * cols..rows.end * cols], count, &mut products, scratch);
    let mut first = 0;
    for (branch, out) in branches.iter().zip(outs) {
        let width = branch.b.rows();
        let inner = &inner[first..][..count * branch.b.cols()];
        first += inner.len();
        let out = &mut out[rows.start * width..rows.end * width];
        let product = Product { weight: &branch.b, out };
        matmul_add(cpu, inner, count, &mut [product], scale * branch.scale, scratch);
    }
}
