//! Adapters beside the forward pass: `y += s (x Aᵀ) Bᵀ` for the rows of the sequences that have them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bevel_base::DType;
use bevel_kernels::{Cpu, PackedMatrix, Product, matmul, matmul_add};

use super::{AdapterFile, LowRank, common_type};
use crate::linear::LinearState;
use crate::{Checkpoint, Error, ModelConfig, Part, Place, Result, Stage};

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

/// What becomes of the output of one of them.
#[derive(Debug)]
struct Branch {
    /// Which one.
    place: usize,
    /// The rows of its A.
    rows: Range<usize>,
    /// `[out, r]`
    b: PackedMatrix,
    scale: f32,
    /// What every output of W grows by, `[out]`: its factor less 1 (DoRA). That of B is in its rows.
    growth: Option<Vec<f32>>,
}

impl Adapter {
    /// Reads an adapter of a model.
    ///
    /// # Errors
    /// Those of [`AdapterFile::open`].
    pub fn open(path: &std::path::Path, model: &Checkpoint, cpu: &Cpu) -> Result<Self> {
        Self::new(&AdapterFile::open(path, model.config())?, model, cpu)
    }

    /// Packs what files have, in the types they have it in. Of the model's weights only those are read whose rows get
    /// other lengths (DoRA).
    ///
    /// # Errors
    /// [`Error::Adapter`] for one with whole tensors that are not the model's, and those of reading and packing.
    pub fn new(file: &AdapterFile, model: &Checkpoint, cpu: &Cpu) -> Result<Self> {
        let config = model.config();
        let is_there = |(name, values): (&String, &Arc<[f32]>)| {
            let mut merged = model.adapters().iter();
            merged.any(|(file, _)| file.tensors().get(name).is_some_and(|v| Arc::ptr_eq(v, values)))
        };
        if let Some((name, _)) = file.tensors().iter().find(|tensor| !is_there(*tensor)) {
            return Err(file.refused(format!(
                "it has whole tensors (`{name}`), which sequences beside each other cannot have of their own; merge it into the model"
            )));
        }
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
                    let new = Branches::new(cpu, file, model, &weights)?;
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
    fn new(cpu: &Cpu, file: &AdapterFile, model: &Checkpoint, weights: &[&str]) -> Result<Self> {
        let config = model.config();
        let matrices: Vec<&LowRank> = weights.iter().map(|w| &file.matrices()[*w]).collect();
        let mut dtype = matrices.iter().map(|m| m.dtype).reduce(common_type).unwrap_or(DType::F32);
        if matrices.iter().any(|matrix| matrix.magnitude.is_some()) {
            dtype = DType::F32;
        }
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
            let grown = matrix.grown(cpu, weight, model)?;
            for (place, rows) in places(config, weight) {
                let mut values = matrix.b[rows.start * rank..rows.end * rank].to_vec();
                let growth = grown.as_ref().map(|grown| &grown[rows.clone()]);
                for (row, growth) in values.chunks_exact_mut(rank).zip(growth.into_iter().flatten())
                {
                    row.iter_mut().for_each(|b| *b *= growth);
                }
                let b = pack(weight, rows.len(), rank, &values)?;
                let growth =
                    growth.map(|growth| growth.iter().map(|factor| factor - 1.0).collect());
                all.push(Branch { place, rows: ranks..ranks + rank, b, scale, growth });
            }
            a.extend_from_slice(&matrix.a);
            ranks += rank;
        }
        Ok(Self { a: pack(weights[0], ranks, a.len() / ranks, &a)?, all })
    }

    fn bytes(&self) -> usize {
        let branch =
            |branch: &Branch| branch.b.bytes() + 4 * branch.growth.as_ref().map_or(0, Vec::len);
        self.a.bytes() + self.all.iter().map(branch).sum::<usize>()
    }

    /// What the outputs of a layer grow by, where they do.
    fn growth(&self, place: usize) -> Option<&[f32]> {
        self.all.iter().find(|branch| branch.place == place)?.growth.as_deref()
    }
}

impl LowRank {
    /// What each row of W + s B A is multiplied with to have its length; `None` where rows keep theirs.
    fn grown(&self, cpu: &Cpu, weight: &str, model: &Checkpoint) -> Result<Option<Vec<f32>>> {
        if self.magnitude.is_none() {
            return Ok(None);
        }
        let (w, cols) = (model.read_f32(weight)?, self.cols());
        let mut grown = vec![0.0; w.len() / cols];
        cpu.pool().run_chunks(&mut grown, 1, |index, grown| {
            let mut row = w[index * cols..][..cols].to_vec();
            self.add_row(index, &mut row, 1.0);
            grown[0] = self.growth(index, &row);
        });
        Ok(Some(grown))
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

    /// Scales every layer's output W x, `[n, out]`, as DoRA's adapters scale the rows of W: it becomes W x + Σ s (g − 1) W x,
    /// with g what an adapter lets a row grow by, and s how much it counts.
    pub(crate) fn stretch<const LAYERS: usize>(self, outs: &mut [&mut Vec<f32>; LAYERS], n: usize) {
        let LayerAdapters { common, parts, .. } = self.of_layer;
        if parts.is_empty() {
            return self.stretch_rows([common, &[]], 0..n, outs);
        }
        let mut start = 0;
        for part in parts {
            let rows = start..start + part.tokens;
            self.stretch_rows([common, part.adapters], rows.clone(), outs);
            start = rows.end;
        }
    }

    fn stretch_rows<const LAYERS: usize>(
        self,
        adapters: [&[ScaledAdapter]; 2],
        rows: Range<usize>,
        outs: &mut [&mut Vec<f32>; LAYERS],
    ) {
        for (place, out) in outs.iter_mut().enumerate() {
            let growing = || {
                let all = adapters.into_iter().flatten();
                all.filter_map(move |one| Some((one.scale, self.growth(one, place)?)))
            };
            let Some((scale, first)) = growing().next() else { continue };
            let (width, is_alone) = (first.len(), growing().nth(1).is_none());
            for y in out[rows.start * width..rows.end * width].chunks_exact_mut(width) {
                if is_alone {
                    y.iter_mut().zip(first).for_each(|(y, growth)| *y *= 1.0 + scale * growth);
                    continue;
                }
                for (i, y) in y.iter_mut().enumerate() {
                    *y *= 1.0 + growing().map(|(scale, growth)| scale * growth[i]).sum::<f32>();
                }
            }
        }
    }

    /// What an adapter lets the outputs of a layer grow by.
    fn growth(self, one: &ScaledAdapter, place: usize) -> Option<&[f32]> {
        one.adapter.layers[self.of_layer.layer][self.stage as usize].as_ref()?.growth(place)
    }

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
