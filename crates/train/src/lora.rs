//! Low-rank adaptation (LoRA, arXiv 2106.09685): y = W x + b + s B A x, with W frozen, A `[r, in]`, B `[out, r]` and
//! s = α / r, or α / √r (rsLoRA, arXiv 2312.03732).
//!
//! DoRA (arXiv 2402.09353) learns lengths and directions apart: each row of V = W + s B A is scaled to the length m
//! that is learnt, y = m / ‖V‖ · V x + b, with ‖V‖ taken as a constant in the gradient.

use bevel_kernels::Cpu;
use bevel_kernels::linalg::{Panels, Region, Rows, Term, Update, View, gemm};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use crate::room::{Input, Room, Step};
use crate::svd::principal;
use crate::weight::Matrix;
use crate::{Parameters, noise};

/// A linear layer of a decoder block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Target {
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

impl Target {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// GGUF's name, relative to the block.
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "attn_q",
            Self::Key => "attn_k",
            Self::Value => "attn_v",
            Self::Output => "attn_output",
            Self::Gate => "ffn_gate",
            Self::Up => "ffn_up",
            Self::Down => "ffn_down",
        }
    }

    /// A pattern of [`LoraConfig::targets`]: this layer in every block.
    pub fn everywhere(self) -> String {
        format!("blk.*.{}", self.name())
    }
}

/// What adapters begin with. All but [`Start::LoftQ`] begin without effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// A uniform in ±1 / √in (Kaiming's with a = √5, PEFT's choice), B zero.
    #[default]
    Uniform,
    /// A normal with σ = 1 / r, B zero.
    Gaussian,
    /// The principal singular vectors of W, taken away from it (PiSSA, arXiv 2404.02948).
    Pissa,
    /// The principal singular vectors of what W lost when it was quantized (LoftQ, arXiv 2310.08659, with one round):
    /// those of the [original](crate::Trainable::original)'s matrix less W.
    LoftQ,
}

/// Which adapters there are.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// r
    pub rank: usize,
    /// α
    pub alpha: f32,
    /// s is α / √r and not α / r.
    pub rank_stabilized: bool,
    /// Patterns of names, as `blk.*.attn_q` or `blk.1?.ffn_*`: the layers that have one.
    pub targets: Vec<String>,
    /// Probability that an adapter does not see an input.
    pub dropout: f32,
    /// Lengths of rows are learnt as well (DoRA).
    pub dora: bool,
    /// What A and B begin with.
    pub start: Start,
    /// Start of the random numbers.
    pub seed: u64,
}

impl LoraConfig {
    /// Adapters of rank 8 with α = 16 on queries and values: PEFT's usual choice.
    pub fn new() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            rank_stabilized: false,
            targets: vec![Target::Query.everywhere(), Target::Value.everywhere()],
            dropout: 0.0,
            dora: false,
            start: Start::Uniform,
            seed: 0,
        }
    }

    /// On all linear layers of all blocks.
    pub fn all_linear() -> Self {
        Self { targets: vec!["blk.*".to_owned()], ..Self::new() }
    }

    /// s
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f32;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    /// Whether the layer of this name, as `blk.3.attn_q`, has an adapter.
    pub fn adapts(&self, name: &str) -> bool {
        self.targets.iter().any(|pattern| bevel_base::matches(pattern, name))
    }
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self::new()
    }
}

/// An adapter of one layer.
#[derive(Clone, Debug)]
pub(crate) struct Lora {
    /// Numbers of A and B among the parameters.
    a: usize,
    b: usize,
    /// m, and ‖W‖² of each row.
    magnitude: Option<(usize, Vec<f32>)>,
    /// A and B at the beginning, where they were taken away from W.
    taken: Option<[Vec<f32>; 2]>,
    rank: usize,
    scale: f32,
    dropout: f32,
}

/// An adapter's matrices, as others would add them to W.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// As `blk.3.attn_q`.
    pub name: String,
    /// r; twice that of the configuration where the first matrices were taken away from W.
    pub rank: usize,
    /// A, `[r, in]`.
    pub a: Vec<f32>,
    /// B, `[out, r]`.
    pub b: Vec<f32>,
    /// DoRA's m, `[out]`.
    pub magnitude: Option<Vec<f32>>,
}

/// Packed factors of terms that join the product with W.
#[derive(Debug, Default)]
pub(crate) struct Factors(Vec<[Panels; 2]>);

impl Factors {
    fn push(&mut self, step: &Step<'_>, left: &[f32], right: View<'_>, room: &mut Room) {
        let left = step.packed(left, step.n, room);
        self.0.push([left, step.packed_right(right, room)]);
    }

    pub(crate) fn terms(&self) -> Vec<Term<'_>> {
        self.0.iter().map(|[left, right]| Term::new(left, right)).collect()
    }

    pub(crate) fn give(self, room: &mut Room) {
        self.0.into_iter().flatten().for_each(|panels| room.give_panels(panels));
    }
}

/// What an adapter adds to a forward pass.
#[derive(Debug)]
pub(crate) struct Forward {
    /// `s x Aᵀ`, `[n, r]`: the backward pass needs it.
    pub(crate) inner: Vec<f32>,
    pub(crate) factors: Factors,
}

/// What an adapter adds to the gradient of its input.
#[derive(Debug)]
pub(crate) struct Backward {
    pub(crate) factors: Factors,
    /// What goes through dropout is a term of its own, `[n, in]`.
    pub(crate) through_noise: Option<Vec<f32>>,
}

/// Outputs before they were scaled to their lengths, and ‖V‖.
#[derive(Debug)]
pub(crate) struct Scaled {
    before: Vec<f32>,
    lengths: Vec<f32>,
}

impl Scaled {
    /// A buffer to be used again.
    pub(crate) fn into_buffer(self) -> Vec<f32> {
        self.before
    }
}

impl Lora {
    /// Adds an adapter to the parameters. `original` is W before it was quantized, for [`Start::LoftQ`].
    pub(crate) fn new(
        cpu: &Cpu,
        config: &LoraConfig,
        name: &str,
        weight: &Matrix<'_>,
        original: Option<&Matrix<'_>>,
        random: &mut Pcg64Mcg,
        parameters: &mut Parameters,
    ) -> Self {
        let (rows, cols, rank) = (weight.rows(), weight.cols(), config.rank);
        let scale = config.scale();
        let mut taken: Option<Vec<f32>> = None;
        let mut b = vec![0.0; rows * rank];
        let mut principal_of = |values: &[f32], random: &mut Pcg64Mcg| {
            let (left, right) = principal(cpu, values, (rows, cols), rank, random);
            let part = (1.0 / scale).sqrt();
            b = left.into_iter().map(|value| value * part).collect();
            right.into_iter().map(|value| value * part).collect::<Vec<f32>>()
        };
        let a: Vec<f32> = match config.start {
            Start::Uniform => {
                let bound = 1.0 / (cols as f32).sqrt();
                (0..rank * cols).map(|_| random.random_range(-bound..bound)).collect()
            }
            Start::Gaussian => (0..rank * cols).map(|_| normal(random) / rank as f32).collect(),
            Start::Pissa => {
                let a = principal_of(&unpacked(weight, parameters), random);
                taken = Some(a.clone());
                a
            }
            Start::LoftQ => {
                let original = original.expect("the network asks for an original");
                let mut lost = unpacked(original, parameters);
                let left = unpacked(weight, parameters);
                lost.iter_mut().zip(left).for_each(|(lost, w)| *lost -= w);
                principal_of(&lost, random)
            }
        };
        let magnitude = config.dora.then(|| {
            let squares_of = |w: &[f32]| -> Vec<f32> {
                let square = |row: &[f32]| row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
                w.chunks_exact(cols).map(|row| square(row) as f32).collect()
            };
            let mut values = unpacked(weight, parameters);
            let squares = squares_of(&values);
            if config.start == Start::LoftQ {
                // The lengths that rows have with the adapter.
                let (b, a) = (View::new(&b, rows, rank), View::new(&a, rank, cols));
                let mut added = vec![0.0; rows * cols];
                gemm(cpu, Update::Set, b, a, &mut added, cols, Region::Whole);
                values.iter_mut().zip(added).for_each(|(w, added)| *w += scale * added);
            }
            let lengths: Vec<f32> =
                squares_of(&values).iter().map(|square| square.sqrt()).collect();
            (parameters.add(format!("{name}.lora_m"), (rows, 1), &lengths), squares)
        });
        Self {
            a: parameters.add(format!("{name}.lora_a"), (rank, cols), &a),
            b: parameters.add(format!("{name}.lora_b"), (rows, rank), &b),
            magnitude,
            taken: taken.map(|a| [a, b.clone()]),
            rank,
            scale,
            dropout: config.dropout,
        }
    }

    /// The adapter as it is now, of the layer with this name.
    pub(crate) fn adapter(&self, name: String, parameters: &Parameters) -> Adapter {
        let (mut a, mut b) = (parameters.get(self.a).to_vec(), parameters.get(self.b).to_vec());
        let mut rank = self.rank;
        if let Some([first_a, first_b]) = &self.taken {
            // B A - B₀ A₀ = [B, -B₀] [A; A₀]
            a.extend(first_a);
            let both = b.chunks_exact(rank).zip(first_b.chunks_exact(rank));
            b = both.flat_map(|(b, b0)| b.iter().copied().chain(b0.iter().map(|b| -b))).collect();
            rank *= 2;
        }
        let magnitude = self.magnitude.as_ref().map(|(m, _)| parameters.get(*m).to_vec());
        Adapter { name, rank, a, b, magnitude }
    }

    /// The random numbers that adapters begin with.
    pub(crate) fn random(seed: u64) -> Pcg64Mcg {
        Pcg64Mcg::seed_from_u64(seed)
    }

    /// `s (x Aᵀ) Bᵀ`, which is to be added to W x.
    pub(crate) fn forward(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        x: Input<'_>,
        room: &mut Room,
    ) -> Forward {
        let dropped = self.dropped(step, x.values, room);
        let packed = dropped.as_ref().map(|dropped| step.packed(dropped, step.n, room));
        let x = packed.as_ref().unwrap_or(x.packed);
        let rank = self.rank;
        let mut factors = Factors::default();
        let mut add = |a: &[f32], b: &[f32], factor: f32| {
            let a = View::new(a, rank, a.len() / rank).transposed();
            let inner = step.scaled_product(factor, x, a, room);
            let b = View::new(b, b.len() / rank, rank).transposed();
            factors.push(step, &inner, b, room);
            inner
        };
        let inner = add(parameters.get(self.a), parameters.get(self.b), self.scale);
        let taken = self.taken.as_ref().map(|[a, b]| add(a, b, -self.scale));
        packed.into_iter().for_each(|packed| room.give_panels(packed));
        room.give([dropped, taken].into_iter().flatten());
        Forward { inner, factors }
    }

    /// `s (d_y B) A`, which is to be added to the gradient of x, and the gradients of A and B. `inner` is that of the
    /// forward pass.
    pub(crate) fn backward(
        &self,
        step: &Step<'_>,
        parameters: &mut Parameters,
        d_y: Input<'_>,
        x: &[f32],
        inner: &[f32],
        room: &mut Room,
    ) -> Backward {
        let (n, rank) = (step.n, self.rank);
        let dropped = self.dropped(step, x, room);
        let x = dropped.as_deref().unwrap_or(x);
        // Ḃᵀ = (s x Aᵀ)ᵀ ẏ: products of few rows waste less than products of few columns.
        let (b, d_b) = parameters.with_gradient(self.b);
        let rows = b.len() / rank;
        let mut d_b_turned = room.take(rank * rows);
        let inner = View::new(inner, n, rank).transposed();
        step.product(Update::Set, inner, View::new(d_y.values, n, rows), &mut d_b_turned);
        for (k, row) in d_b_turned.chunks_exact(rows).enumerate() {
            d_b.iter_mut().skip(k).step_by(rank).zip(row).for_each(|(sum, d)| *sum += d);
        }
        // Ȧ = s (ẏ B)ᵀ x
        let b = View::new(b, rows, rank);
        let d_inner = step.scaled_product(self.scale, d_y.packed, b, room);
        let (a, d_a) = parameters.with_gradient(self.a);
        let cols = a.len() / rank;
        let turned = View::new(&d_inner, n, rank).transposed();
        step.product(Update::Add, turned, View::new(x, n, cols), d_a);
        let (a, mut factors) = (View::new(a, rank, cols), Factors::default());
        let through_noise = dropped.as_ref().map(|_| {
            let mut d_dropped = room.take(n * cols);
            step.product(Update::Set, View::new(&d_inner, n, rank), a, &mut d_dropped);
            noise::dropout(step.cpu, &mut d_dropped, self.dropout, self.seed(step));
            d_dropped
        });
        if through_noise.is_none() {
            factors.push(step, &d_inner, a, room);
        }
        if let Some([a, b]) = &self.taken {
            let b = View::new(b, rows, rank);
            let d_inner = step.scaled_product(-self.scale, d_y.packed, b, room);
            factors.push(step, &d_inner, View::new(a, rank, cols), room);
            room.give([d_inner]);
        }
        room.give([d_b_turned, d_inner]);
        room.give(dropped);
        Backward { factors, through_noise }
    }

    /// What the adapter sees of an input, where that is not all.
    fn dropped(&self, step: &Step<'_>, x: &[f32], room: &mut Room) -> Option<Vec<f32>> {
        if self.dropout == 0.0 || step.noise.is_none() {
            return None;
        }
        let mut dropped = room.copy(x);
        noise::dropout(step.cpu, &mut dropped, self.dropout, self.seed(step));
        Some(dropped)
    }

    /// Of this adapter's random numbers in a step.
    fn seed(&self, step: &Step<'_>) -> u64 {
        noise::mix(step.noise.unwrap_or(0), self.a as u64)
    }

    /// r
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// Whether outputs are scaled (DoRA).
    pub(crate) fn scales(&self) -> bool {
        self.magnitude.is_some()
    }

    /// DoRA: scales outputs V x to m / ‖V‖ · V x.
    pub(crate) fn scale(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        weight: &Matrix<'_>,
        y: &mut [f32],
        room: &mut Room,
    ) -> Option<Scaled> {
        let (magnitude, squares) = self.magnitude.as_ref()?;
        let lengths = self.lengths(step.cpu, parameters, weight, squares, room);
        let before = room.copy(y);
        let m = parameters.get(*magnitude);
        let factors: Vec<f32> = m.iter().zip(&lengths).map(|(m, length)| m / length).collect();
        step.cpu.pool().run_chunks(y, factors.len(), |_, row| {
            row.iter_mut().zip(&factors).for_each(|(y, factor)| *y *= factor);
        });
        Some(Scaled { before, lengths })
    }

    /// The gradient of what [`Lora::scale`] was given, given that of its result; and that of m.
    pub(crate) fn scale_backward(
        &self,
        parameters: &mut Parameters,
        d_y: &[f32],
        scaled: &Scaled,
        room: &mut Room,
    ) -> Vec<f32> {
        let (magnitude, _) = self.magnitude.as_ref().expect("there were lengths");
        let (m, d_m) = parameters.with_gradient(*magnitude);
        let mut d_before = room.copy(d_y);
        let rows = m.len();
        let rows_of_both = d_before.chunks_exact_mut(rows).zip(scaled.before.chunks_exact(rows));
        for (d_row, row) in rows_of_both {
            for i in 0..rows {
                d_m[i] += d_row[i] * row[i] / scaled.lengths[i];
                d_row[i] *= m[i] / scaled.lengths[i];
            }
        }
        d_before
    }

    /// ‖W + s B A‖ of each row: the root of ‖w‖² + 2 s b·(A w) + s² b·(A Aᵀ b).
    fn lengths(
        &self,
        cpu: &Cpu,
        parameters: &Parameters,
        weight: &Matrix<'_>,
        squares: &[f32],
        room: &mut Room,
    ) -> Vec<f32> {
        // With what was taken from W, if anything was.
        let Adapter { a, b, rank, .. } = self.adapter(String::new(), parameters);
        let (rows, cols) = (weight.rows(), weight.cols());
        let a = View::new(&a, rank, cols);
        // In single precision: a length is a small difference of large numbers where B A takes from W.
        let mut own = vec![0.0; rank * rank];
        gemm(cpu, Update::Set, a, a.transposed(), &mut own, rank, Region::Whole);
        let mut cross = room.take(rank * rows);
        weight.for_each_tile(cpu, parameters, room, |tile_rows, tile| {
            let tile = View::new(tile, tile_rows.len(), cols).transposed();
            gemm(cpu, Update::Set, a, tile, &mut cross[tile_rows.start..], rows, Region::Whole);
        });
        let lengths = (0..rows).map(|row| {
            let b = &b[row * rank..][..rank];
            let mut square = f64::from(squares[row]);
            for i in 0..rank {
                let along: f64 =
                    (0..rank).map(|j| f64::from(own[i * rank + j]) * f64::from(b[j])).sum();
                let scale = f64::from(self.scale);
                let cross = f64::from(cross[i * rows + row]);
                square += scale * f64::from(b[i]) * (2.0 * cross + scale * along);
            }
            square.max(0.0).sqrt() as f32
        });
        let lengths = lengths.collect();
        room.give([cross]);
        lengths
    }
}

/// A normal random number, by Box and Muller.
fn normal(random: &mut Pcg64Mcg) -> f32 {
    let (radius, angle) = (1.0 - random.random::<f64>(), random.random::<f64>());
    ((-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()) as f32
}

/// All values of a matrix.
fn unpacked(weight: &Matrix<'_>, parameters: &Parameters) -> Vec<f32> {
    let mut values = vec![0.0; weight.rows() * weight.cols()];
    let weight = weight.seen(parameters);
    for (index, row) in values.chunks_exact_mut(weight.cols()).enumerate() {
        weight.read(index, row);
    }
    values
}
