use std::ops::Range;

use bevel_base::{DType, pack};
use bevel_kernels::matmul::{Factors, Packing};
use bevel_kernels::{Cpu, PackedMatrix};

use crate::family::QkNorm;
use crate::head::Head;
use crate::linear::Linear;
use crate::{Checkpoint, Error, ModelConfig, Result};

/// A model's weights in the layouts the kernels run on.
#[derive(Debug)]
pub struct Weights {
    pub(crate) embedding: Embedding,
    pub(crate) layers: Vec<LayerWeights>,
    pub(crate) head: Head,
    warnings: Vec<String>,
}

/// What running one token through a model takes, attention left out: of a mixture's experts those that
/// a token goes to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepCost {
    /// Bytes of packed weights that are read.
    pub bytes: f64,
    /// Products of 8-bit integers; each is added to a sum.
    pub byte_products: f64,
    /// Products of bf16 numbers.
    pub bf16_products: f64,
    /// Products of single-precision numbers.
    pub float_products: f64,
}

/// One decoder block. A norm is `None` where the family has none there.
#[derive(Debug)]
pub(crate) struct LayerWeights {
    pub(crate) attn_norm: Option<Vec<f32>>,
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) o: Linear,
    pub(crate) q_norm: Option<Vec<f32>>,
    pub(crate) k_norm: Option<Vec<f32>>,
    pub(crate) post_attn_norm: Option<Vec<f32>>,
    pub(crate) ffn_norm: Option<Vec<f32>>,
    pub(crate) ffn: Ffn,
    pub(crate) post_ffn_norm: Option<Vec<f32>>,
    /// One tensor holds queries, keys and values, and one gate and up projections.
    pub(crate) fused: bool,
}

impl LayerWeights {
    fn with_exact_products(self) -> Self {
        let exact = Linear::with_exact_products;
        let mlp =
            |Mlp { gate, up, down }| Mlp { gate: exact(gate), up: exact(up), down: exact(down) };
        let ffn = match self.ffn {
            Ffn::Dense(dense) => Ffn::Dense(Box::new(mlp(*dense))),
            Ffn::Experts { router, experts } => Ffn::Experts {
                router: Box::new(exact(*router)),
                experts: experts.into_iter().map(mlp).collect(),
            },
        };
        let [q, k, v, o] = [self.q, self.k, self.v, self.o].map(exact);
        Self { q, k, v, o, ffn, ..self }
    }

    /// Its linear layers; true for those of experts.
    fn linears(&self) -> Vec<(&Linear, bool)> {
        let (router, mlps) = match &self.ffn {
            Ffn::Dense(mlp) => (None, std::slice::from_ref(&**mlp)),
            Ffn::Experts { router, experts } => (Some(&**router), &experts[..]),
        };
        let shared = [&self.q, &self.k, &self.v, &self.o].into_iter().chain(router);
        let mlps = mlps.iter().flat_map(|mlp| [&mlp.gate, &mlp.up, &mlp.down]);
        let is_expert = router.is_some();
        shared.map(|l| (l, false)).chain(mlps.map(|l| (l, is_expert))).collect()
    }
}

#[derive(Debug)]
pub(crate) enum Ffn {
    Dense(Box<Mlp>),
    /// `router` is `[experts, dim]`.
    Experts {
        router: Box<Linear>,
        experts: Vec<Mlp>,
    },
}

/// down(act(gate · x) ⊙ (up · x))
#[derive(Debug)]
pub(crate) struct Mlp {
    /// `[ffn, dim]`
    pub(crate) gate: Linear,
    /// `[ffn, dim]`
    pub(crate) up: Linear,
    /// `[dim, ffn]`
    pub(crate) down: Linear,
}

/// The token embedding, `[vocab, dim]`: a step looks up a few rows only.
#[derive(Debug)]
pub(crate) enum Embedding {
    /// As it is stored.
    Stored {
        dtype: DType,
        /// The bytes, unless they can be read in place from the checkpoint's mapping.
        owned: Option<Vec<u8>>,
    },
    /// Codes, as the kernels read them.
    Coded(Box<Linear>),
    /// The output head's codes.
    Tied,
}

const EMBEDDING: &str = "token_embd.weight";

impl Weights {
    /// Reads and repacks every tensor. `progress` is told the bytes read so far.
    ///
    /// # Errors
    /// Those of reading and packing a tensor.
    pub fn load(checkpoint: &Checkpoint, cpu: &Cpu, progress: &mut dyn FnMut(u64)) -> Result<Self> {
        Self::load_with(checkpoint, cpu, cpu.isa().has_bf16_products(), progress)
    }

    /// The same with products of activations as they are, see [`Weights::with_exact_products`]; those with BF16
    /// weights take no longer than they have to.
    ///
    /// # Errors
    /// Those of [`Weights::load`].
    pub fn load_exact(
        checkpoint: &Checkpoint,
        cpu: &Cpu,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        Ok(Self::load_with(checkpoint, cpu, false, progress)?.with_exact_products())
    }

    fn load_with(
        checkpoint: &Checkpoint,
        cpu: &Cpu,
        bf16: bool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        let mut loader = Loader { exact: false, bf16, ..Loader::exact(checkpoint, cpu, progress) };
        let tied = loader.config.tied;
        let embedding = match checkpoint.entry(EMBEDDING)?.is_coded() {
            true if tied => Embedding::Tied,
            true => Embedding::Coded(Box::new(loader.matrix(EMBEDDING, None, 0, false)?)),
            false => Embedding::Stored {
                dtype: checkpoint.entry(EMBEDDING)?.dtype,
                owned: match checkpoint.in_place(EMBEDDING) {
                    Some(_) => None,
                    None => Some(checkpoint.read(EMBEDDING)?.into_owned()),
                },
            },
        };
        let layers = (0..loader.config.layers).map(|i| loader.layer(i)).collect::<Result<_>>()?;
        let head = Head::load_with(&mut loader)?;
        let warnings = loader.warnings();
        Ok(Self { embedding, layers, head, warnings })
    }

    /// With products of activations as they are, see [`PackedMatrix::with_exact_products`]: those of a file
    /// of integer weights then differ from the dequantized model's by rounding in single precision alone.
    pub fn with_exact_products(self) -> Self {
        let layers = self.layers.into_iter().map(LayerWeights::with_exact_products).collect();
        Self { layers, head: self.head.with_exact_products(), ..self }
    }

    /// What takes more memory than it should, a sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Every linear layer, the output head last; true for those of a mixture's experts.
    fn linears(&self) -> impl Iterator<Item = (&Linear, bool)> {
        self.layers.iter().flat_map(LayerWeights::linears).chain([(&self.head.output, false)])
    }

    /// Bytes the packed matrices take in memory.
    pub fn bytes(&self) -> usize {
        let embedding = match &self.embedding {
            Embedding::Stored { owned, .. } => owned.as_ref().map_or(0, Vec::len),
            Embedding::Coded(matrix) => matrix.weight.bytes(),
            Embedding::Tied => 0,
        };
        self.linears().map(|(linear, _)| linear.weight.bytes()).sum::<usize>() + embedding
    }

    /// What a step of one token takes.
    pub fn step_cost(&self, config: &ModelConfig) -> StepCost {
        let used = config.experts.map_or(1.0, |e| e.used as f64 / e.count as f64);
        let mut cost = StepCost::default();
        for (Linear { weight, .. }, is_expert) in self.linears() {
            let share = if is_expert { used } else { 1.0 };
            let products = share * (weight.rows() * weight.cols()) as f64;
            cost.bytes += share * weight.bytes() as f64;
            match weight.factors() {
                Factors::Bytes => cost.byte_products += products,
                Factors::Bf16 => cost.bf16_products += products,
                Factors::F32 => cost.float_products += products,
            }
        }
        cost
    }

    /// Writes the embeddings of `tokens` into `out`, `[tokens, dim]`.
    pub(crate) fn embed(
        &self,
        checkpoint: &Checkpoint,
        tokens: &[u32],
        out: &mut [f32],
    ) -> Result<()> {
        let config = checkpoint.config();
        let bytes = match &self.embedding {
            Embedding::Stored { owned: Some(bytes), .. } => bytes,
            Embedding::Stored { owned: None, .. } => {
                checkpoint.in_place(EMBEDDING).expect("was there when the weights were loaded")
            }
            Embedding::Coded(_) | Embedding::Tied => &[],
        };
        let row_bytes = bytes.len() / config.vocab_size;
        for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(config.dim)) {
            let row = usize::try_from(token).ok().filter(|&row| row < config.vocab_size);
            let row = row.ok_or(Error::Token { token, vocab: config.vocab_size })?;
            match &self.embedding {
                Embedding::Coded(matrix) => matrix.row(row, out),
                Embedding::Tied => self.head.output.row(row, out),
                Embedding::Stored { dtype, .. } => {
                    pack::dequantize(*dtype, &bytes[row * row_bytes..][..row_bytes], out).map_err(
                        |source| Error::Tensor {
                            path: checkpoint.path().into(),
                            tensor: EMBEDDING.into(),
                            source,
                        },
                    )?;
                }
            }
        }
        Ok(())
    }
}

/// Reads tensors and repacks them.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    cpu: &'a Cpu,
    progress: &'a mut dyn FnMut(u64),
    bytes: u64,
    /// Packed types become floating point.
    exact: bool,
    /// Linear layers multiply in bf16: all where `exact`, else those whose weights fit.
    bf16: bool,
    /// Tensors whose codes became floating point because no layout fits their groups.
    widened: Vec<String>,
}

impl<'a> Loader<'a> {
    /// A loader that unpacks packed types, so that activations are not rounded to int8.
    pub(crate) fn exact(
        checkpoint: &'a Checkpoint,
        cpu: &'a Cpu,
        progress: &'a mut dyn FnMut(u64),
    ) -> Self {
        let config = checkpoint.config();
        Self {
            checkpoint,
            config,
            cpu,
            progress,
            bytes: 0,
            exact: true,
            bf16: false,
            widened: Vec::new(),
        }
    }

    /// As [`Loader::exact`], with linear layers that multiply in bf16.
    pub(crate) fn bf16(
        checkpoint: &'a Checkpoint,
        cpu: &'a Cpu,
        progress: &'a mut dyn FnMut(u64),
    ) -> Self {
        Self { bf16: true, ..Self::exact(checkpoint, cpu, progress) }
    }

    /// The output norm, and the head, which may be the embedding.
    pub(crate) fn head(&mut self) -> Result<(Vec<f32>, Linear)> {
        let norm = self.checkpoint.read_f32("output_norm.weight")?;
        let name = if self.config.tied { EMBEDDING } else { "output.weight" };
        Ok((norm, self.matrix(name, None, 0, self.bf16 && !self.exact)?))
    }

    pub(crate) fn layer(&mut self, layer: usize) -> Result<LayerWeights> {
        let family = self.config.family;
        let name = |stem: &str| format!("blk.{layer}.{stem}");
        let norm = |stem: &str| -> Result<Option<Vec<f32>>> {
            let exists = family.layer.iter().any(|t| t.gguf == stem);
            exists.then(|| self.checkpoint.read_f32(&name(&format!("{stem}.weight")))).transpose()
        };
        let attn_norm = norm("attn_norm")?;
        let ffn_norm = norm("ffn_norm")?;
        let post_attn_norm = norm("post_attention_norm")?;
        let post_ffn_norm = norm("post_ffw_norm")?;
        let (q_norm, k_norm) = match family.qk_norm {
            QkNorm::None => (None, None),
            QkNorm::PerHead | QkNorm::Full => (norm("attn_q_norm")?, norm("attn_k_norm")?),
        };
        let (q_dim, kv_dim) = (self.config.q_dim(), self.config.kv_dim());
        let fused = family.is_fused();
        let (q, k, v) = if fused {
            let qkv = name("attn_qkv");
            (
                self.linear(&qkv, Some(0..q_dim))?,
                self.linear(&qkv, Some(q_dim..q_dim + kv_dim))?,
                self.linear(&qkv, Some(q_dim + kv_dim..q_dim + 2 * kv_dim))?,
            )
        } else {
            (
                self.linear(&name("attn_q"), None)?,
                self.linear(&name("attn_k"), None)?,
                self.linear(&name("attn_v"), None)?,
            )
        };
        let ffn_dim = self.config.ffn_dim;
        let ffn = match self.config.experts {
            None if fused => {
                let both = name("ffn_up");
                Ffn::Dense(Box::new(Mlp {
                    gate: self.linear(&both, Some(0..ffn_dim))?,
                    up: self.linear(&both, Some(ffn_dim..2 * ffn_dim))?,
                    down: self.linear(&name("ffn_down"), None)?,
                }))
            }
            None => Ffn::Dense(Box::new(Mlp {
                gate: self.linear(&name("ffn_gate"), None)?,
                up: self.linear(&name("ffn_up"), None)?,
                down: self.linear(&name("ffn_down"), None)?,
            })),
            Some(experts) => Ffn::Experts {
                // A little less precision would choose other experts.
                router: Box::new(self.matrix(&name("ffn_gate_inp.weight"), None, 0, false)?),
                experts: (0..experts.count)
                    .map(|e| {
                        let mut linear = |stem: &str| {
                            self.matrix(&name(&format!("{stem}.weight")), None, e, self.bf16)
                        };
                        Ok(Mlp {
                            gate: linear("ffn_gate_exps")?,
                            up: linear("ffn_up_exps")?,
                            down: linear("ffn_down_exps")?,
                        })
                    })
                    .collect::<Result<_>>()?,
            },
        };
        let o = self.linear(&name("attn_output"), None)?;
        Ok(LayerWeights {
            attn_norm,
            q,
            k,
            v,
            o,
            q_norm,
            k_norm,
            post_attn_norm,
            ffn_norm,
            ffn,
            post_ffn_norm,
            fused,
        })
    }

    fn linear(&mut self, stem: &str, rows: Option<Range<usize>>) -> Result<Linear> {
        let bias_name = format!("{stem}.bias");
        let bias = match self.checkpoint.tensors().contains_key(&bias_name) {
            false => None,
            true => {
                let bias = self.checkpoint.read_f32(&bias_name)?;
                Some(rows.clone().map_or(bias.clone(), |rows| bias[rows].to_vec()))
            }
        };
        Ok(Linear { bias, ..self.matrix(&format!("{stem}.weight"), rows, 0, self.bf16)? })
    }

    /// One sentence for all tensors that take more memory than their codes.
    fn warnings(self) -> Vec<String> {
        let Some(first) = self.widened.first() else { return Vec::new() };
        vec![format!(
            "{} quantized tensors, the first is `{first}`, take 32 bits a weight in memory: no kernel fits the size or the order of their groups",
            self.widened.len()
        )]
    }

    /// Packs a matrix, some of its rows, or one matrix of a stack of experts.
    fn matrix(
        &mut self,
        name: &str,
        rows: Option<Range<usize>>,
        expert: usize,
        bf16: bool,
    ) -> Result<Linear> {
        let entry = self.checkpoint.entry(name)?;
        let dims = entry.shape.dims();
        let (&cols, outer) = dims.split_last().expect("checked shapes have dimensions");
        let &stored_rows = outer.last().expect("matrices have rows");
        let rows = rows.unwrap_or(0..stored_rows);
        let (first, total) = (expert * stored_rows + rows.start, entry.shape.rows());
        let linear = match self.checkpoint.read_grouped(name, expert)? {
            Some(matrix) if self.exact => {
                let mut values = vec![0f32; rows.len() * cols];
                for (row, values) in rows.clone().zip(values.chunks_exact_mut(cols)) {
                    matrix.dequantize_row(row, values);
                }
                Linear::new(pack_f32(self.cpu, rows.len(), cols, &values, bf16))
            }
            Some(matrix) => Linear::grouped(self.cpu, &matrix, rows.clone()),
            None => {
                let bytes = self.checkpoint.read(name)?;
                let row_bytes = bytes.len() / total;
                let part = &bytes[first * row_bytes..][..rows.len() * row_bytes];
                Linear::new(self.pack(name, rows.len(), cols, entry.dtype, part, bf16)?)
            }
        };
        if linear.weight.is_widened() {
            self.widened.push(self.checkpoint.shown_name(name));
        }
        self.bytes += entry.stored_len() * rows.len() as u64 / total as u64;
        (self.progress)(self.bytes);
        // The last user of the file's pages gives them back.
        if first + rows.len() == total {
            self.checkpoint.release(name);
        }
        Ok(linear)
    }

    /// Packs rows of a type.
    fn pack(
        &self,
        tensor: &str,
        rows: usize,
        cols: usize,
        dtype: DType,
        data: &[u8],
        bf16: bool,
    ) -> Result<PackedMatrix> {
        let (path, tensor) = (|| self.checkpoint.path().to_owned(), tensor.to_owned());
        if self.exact && (bf16 || dtype.is_packed()) {
            let mut values = vec![0f32; rows * cols];
            if let Err(source) = pack::dequantize(dtype, data, &mut values) {
                return Err(Error::Tensor { path: path(), tensor, source });
            }
            return Ok(pack_f32(self.cpu, rows, cols, &values, bf16));
        }
        let packing = Packing { bf16, release: &|bytes| self.checkpoint.release_bytes(bytes) };
        PackedMatrix::pack_with(self.cpu, dtype, rows, cols, data, &packing)
            .map_err(|source| Error::Kernel { path: path(), tensor, source })
    }
}

/// Packs weights of floating point, for products in bf16 or in f32.
///
/// # Panics
/// Where `values` are not `[rows, cols]`.
pub(crate) fn pack_f32(
    cpu: &Cpu,
    rows: usize,
    cols: usize,
    values: &[f32],
    bf16: bool,
) -> PackedMatrix {
    if bf16 {
        return PackedMatrix::pack_bf16(cpu, rows, cols, values);
    }
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    PackedMatrix::pack(cpu, DType::F32, rows, cols, &bytes).expect("values are a whole matrix")
}
