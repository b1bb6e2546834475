//! Adapters beside the forward pass: `y += s (x Aᵀ) Bᵀ` for the rows of the sequences that have them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bevel_base::DType;
use bevel_kernels::{Cpu, PackedMatrix, Product, matmul, matmul_add};

use super::{AdapterFile, LowRank, common_type};
use crate::linear::LinearState;
use crate::{Error, ModelConfig, Part, Place, Result, Stage};

const STAGES: usize = Stage::ALL.len();

/// An adapter that is ready to run. Any number of sequences may have it.
#[derive(Debug)]
pub struct Adapter {
    id: u64,
    path: String,
    layers: Vec<[Option<Branches>; STAGES]>,
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

/// What is added to the outputs of linear layers that share an input.
#[derive(Debug)]
struct Branches {
    /// The A of all of them, one below the other: `[ranks, in]`.
    a: PackedMatrix,
    /// By the layers' places in their stage, as far as they have one.
    all: Vec<Branch>,
}

/// What is added to the output of one of them.
#[derive(Debug)]
struct Branch {
    /// Which one.
    place: usize,
    /// The rows of its A.
    rows: Range<usize>,
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
        let mut weights: Vec<[Vec<&str>; STAGES]> = (0..config.layers).map(|_| none()).collect();
        for weight in file.matrices().keys() {
            if let Place::Layer(layer, rest) = Place::of(weight)
                && let Some(stage) = Stage::of(rest)
            {
                weights[layer][stage as usize].push(weight);
            }
        }
        let (mut layers, mut bytes) = (Vec::with_capacity(config.layers), 0);
        for weights in weights {
            let mut layer: [Option<Branches>; STAGES] = std::array::from_fn(|_| None);
            for (branches, weights) in layer.iter_mut().zip(weights) {
                if !weights.is_empty() {
                    let new = Branches::new(cpu, file, config, &weights)?;
                    bytes += new.bytes();
                    *branches = Some(new);
                }
            }
            layers.push(layer);
        }
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

impl Branches {
    /// Packs what is added to the weights of a stage, at least one.
    fn new(cpu: &Cpu, file: &AdapterFile, config: &ModelConfig, weights: &[&str]) -> Result<Self> {
        let matrices: Vec<&LowRank> = weights.iter().map(|w| &file.matrices()[*w]).collect();
        let dtype = matrices.iter().map(|m| m.dtype).reduce(common_type).unwrap_or(DType::F32);
        let pack = |weight: &str, rows: usize, cols: usize, values: &[f32]| {
            let bytes = file.packed(weight, values, dtype)?;
            PackedMatrix::pack(cpu, dtype, rows, cols, &bytes).map_err(|source| Error::Kernel {
                path: file.path().to_owned(),
                tensor: weight.to_owned(),
                source,
            })
        };
        let (mut a, mut all, mut ranks) = (Vec::new(), Vec::new(), 0);
        for (weight, matrix) in weights.iter().zip(&matrices) {
            let (rank, scale) = (matrix.rank, matrix.scale());
            for (place, rows) in places(config, weight) {
                let values = &matrix.b[rows.start * rank..rows.end * rank];
                let b = pack(weight, rows.len(), rank, values)?;
                all.push(Branch { place, rows: ranks..ranks + rank, b, scale });
            }
            a.extend_from_slice(&matrix.a);
            ranks += rank;
        }
        Ok(Self { a: pack(weights[0], ranks, a.len() / ranks, &a)?, all })
    }

    fn bytes(&self) -> usize {
        self.a.bytes() + self.all.iter().map(|branch| branch.b.bytes()).sum::<usize>()
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

/// Which linear layers of its stage a weight holds, and their rows.
fn places(config: &ModelConfig, weight: &str) -> Vec<(usize, Range<usize>)> {
    let Place::Layer(_, name) = Place::of(weight) else { return Vec::new() };
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
                if let Some(branches) = &adapter.layers[layer][self.stage as usize] {
                    branches.add(cpu, *scale, x, n, rows.clone(), outs, state);
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

impl Branches {
    /// Adds what an adapter adds to some of the `n` rows.
    fn add<const LAYERS: usize>(
        &self,
        cpu: &Cpu,
        scale: f32,
        x: &[f32],
        n: usize,
        rows: Range<usize>,
        outs: &mut [&mut Vec<f32>; LAYERS],
        state: &mut LinearState,
    ) {
        let (count, cols, ranks) = (rows.len(), x.len() / n, self.a.rows());
        let LinearState { matmul: scratch, inner, columns, .. } = state;
        inner.resize(inner.len().max(count * ranks), 0.0);
        let inner = &mut inner[..count * ranks];
        let x = &x[rows.start * cols..rows.end * cols];
        matmul(cpu, x, count, &mut [Product { weight: &self.a, out: inner }], scratch);
        for branch in &self.all {
            columns.clear();
            for inner in inner.chunks_exact(ranks) {
                columns.extend_from_slice(&inner[branch.rows.clone()]);
            }
            let width = branch.b.rows();
            let out = &mut outs[branch.place][rows.start * width..rows.end * width];
            let product = Product { weight: &branch.b, out };
            matmul_add(cpu, columns, count, &mut [product], scale * branch.scale, scratch);
        }
    }
}
