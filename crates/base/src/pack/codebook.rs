//! The search for codebook layouts: `±x ≈ u (2 s + 1) entry`, vectors of eight or four magnitudes at a
//! time from a codebook, `s` the integer scale of a group, `u` the super-block's unit.
//!
//! Given a scale, the best entry is the nearest one by weighted distance, and all entries are
//! compared. What each quarter of an entry may cost is worked out once; then half an entry is a sum of
//! two numbers and an entry a sum of two halves. Entries with the same first half are compared by
//! their second. 32 vectors are searched side by side, each in its lane.

use super::block::Half;
use super::lanes::{each, inverse, least, range, total};
use super::levels::{Levels, round};
use super::symmetric::{NEARLY_EXACT, NOTHING, free_scale};

/// A codebook of vectors of `N` magnitudes, and how a layout uses it.
pub(super) trait Codebook<const N: usize> {
    /// The entries' magnitudes.
    const ENTRIES: &'static [[u8; N]];
    /// The magnitudes that entries are made of: three of them for vectors of eight, eight for vectors
    /// of four.
    const LEVELS: &'static [u8];
    /// The entries, arranged for the search by [`runs`].
    const RUNS: &'static [Run];
    /// Values that share an integer scale.
    const GROUP: usize;
    /// `u = d * UNIT`, `d` the half that is stored.
    const UNIT: f32;
    /// True where the minus signs of eight values must be even in number.
    const EVEN: bool;
}

/// A super-block: a value of vector `k` in group `j` is `± d UNIT (2 scales[j] + 1)` times its
/// magnitude in entry `entries[k]`.
pub(super) struct SuperBlock<const VECTORS: usize> {
    pub(super) d: f32,
    /// 0 to 15, one a group.
    pub(super) scales: [u8; GROUPS],
    pub(super) entries: [u16; VECTORS],
    /// Bit `i` of byte `k`: value `8k + i` is negative.
    pub(super) signs: [u8; 32],
}

/// Groups of a super-block, at most. Where there are eight, the others remain zeros.
const GROUPS: usize = 16;

/// A number for each group.
type Groups = [f32; GROUPS];

/// Where the search for a group's scale starts: the largest magnitude goes to the top level by the
/// scale times these. The first one clips nothing, the last one clips nearly half.
const STARTS: [f32; 5] = [1.15, 0.95, 0.8, 0.67, 0.55];

/// Fits a super-block.
///
/// 1. Signs. Where their number must be even and is not, the value is turned whose loss weighs least.
/// 2. Each group's best free scale: from each start the nearest entries, and the least-squares scale
///    of those.
/// 3. The unit: the free scales are themselves a vector to be quantized, each weighed by how much its
///    group minds.
/// 4. Each group's integer scale, by its true error among the three around the free one.
/// 5. The unit again, by least squares over all values, and the nearest entries again.
/// 6. Turned signs again: now that entries are known, so is what turning costs.
///
/// Where values fit so well that the rounding of `d` is what is left, steps 4 and 5 follow other
/// units too, for one that rounds well.
#[inline(always)]
pub(super) fn fit_super_block<B: Codebook<N>, const N: usize, const VECTORS: usize>(
    x: &[f32; 256],
    w: &[f32; 256],
) -> SuperBlock<VECTORS> {
    // (1)
    let (mut y, mut signs) = (x.map(f32::abs), [0; 32]);
    for k in 0..32 {
        let at = 8 * k;
        signs[k] = (0..8).fold(0, |signs, i| signs | u8::from(x[at + i] < 0.0) << i);
        if B::EVEN && signs[k].count_ones() % 2 == 1 {
            let turned = least(&each::<8>(|i| w[at + i] * y[at + i]));
            signs[k] ^= 1 << turned;
            y[at + turned] = -y[at + turned];
        }
    }
    let mut best =
        Choice { error: f32::INFINITY, u: 0.0, factors: [1.0; GROUPS], entries: [0; VECTORS] };
    if range(&y).1 >= NOTHING {
        let mut problem = Problem::<N, VECTORS>::new(&y, w);
        // (2)
        let (free, curvature) = problem.free_scales::<B>(&y);
        // (3)
        let groups = 256 / B::GROUP;
        let start = free_scale::<Odd>(&free[..groups], &curvature[..groups]).0;
        let [energy] = total(256, |i| [w[i] * y[i] * y[i]]);
        for trial in 0..16 {
            if trial > 0 && (best.error == 0.0 || best.error > energy * NEARLY_EXACT) {
                break;
            }
            let start = if trial == 0 { start } else { range(&free).1 / (33 - 2 * trial) as f32 };
            // (4)
            let first = problem.choose_factors::<B>(&free, stored::<B, N>(start));
            // (5)
            let second = problem.improve::<B>(&first);
            for choice in [first, second] {
                if choice.error < best.error {
                    best = choice;
                }
            }
        }
    }
    // (6)
    if B::EVEN {
        for k in 0..32 {
            let magnitude = |i: usize| {
                let at = 8 * k + i;
                f32::from(B::ENTRIES[usize::from(best.entries[at / N])][at % N])
            };
            let at = 8 * k;
            let turned = (0..8).find(|&i| y[at + i] < 0.0);
            if let Some(turned) = turned {
                let cheaper = least(&each::<8>(|i| w[at + i] * x[at + i].abs() * magnitude(i)));
                signs[k] ^= 1 << turned ^ 1 << cheaper;
            }
        }
    }
    SuperBlock {
        d: best.u / B::UNIT,
        scales: best.factors.map(|factor| ((factor - 1.0) * 0.5) as u8),
        entries: best.entries,
        signs,
    }
}

/// The unit that is stored for `u`.
#[inline(always)]
fn stored<B: Codebook<N>, const N: usize>(u: f32) -> f32 {
    Half::round_scale(u / B::UNIT) * B::UNIT
}

/// Odd integers from 1 to 31: the factors that integer scales stand for.
struct Odd;

impl Levels for Odd {
    const FAR: f32 = 31.0;
    const NEAR: f32 = 1.0;
    const STEPS: f32 = 16.0;

    #[inline(always)]
    fn snap(t: f32) -> f32 {
        round((t * 0.5 - 0.5).clamp(0.0, 15.0)) * 2.0 + 1.0
    }
}

/// A super-block's unit, its groups' factors `2 s + 1` and its entries.
#[derive(Clone, Copy)]
struct Choice<const VECTORS: usize> {
    error: f32,
    u: f32,
    factors: Groups,
    entries: [u16; VECTORS],
}

/// Vectors side by side, one a lane.
const WIDE: usize = 32;

/// A number for each of some vectors.
type Wide = [f32; WIDE];

/// Values with settled signs, their weights, and what entries cost them. Aligned, so that no vector of
/// numbers is loaded from two cache lines.
#[repr(align(64))]
struct Problem<const N: usize, const VECTORS: usize> {
    /// `y[i][k]` is value `i` of vector `k`.
    y: [[f32; VECTORS]; N],
    w: [[f32; VECTORS]; N],
    /// `w y` and `w` in the order of values.
    wy: [f32; 256],
    ww: [f32; 256],
    /// The cost of the quarters of entries, and of second halves: the third quarter plus its number of
    /// levels times the fourth.
    quarters: [[Wide; 16]; 4],
    halves: [Wide; 128],
}

/// The nearest entries by given scales: each vector's, and each group's error.
struct Nearest<const VECTORS: usize> {
    entries: [u16; VECTORS],
    errors: Groups,
}

impl<const N: usize, const VECTORS: usize> Problem<N, VECTORS> {
    #[inline(always)]
    fn new(y: &[f32; 256], w: &[f32; 256]) -> Self {
        let mut problem = Self {
            y: [[0.0; VECTORS]; N],
            w: [[0.0; VECTORS]; N],
            wy: each(|i| w[i] * y[i]),
            ww: *w,
            quarters: [[[0.0; WIDE]; 16]; 4],
            halves: [[0.0; WIDE]; 128],
        };
        for k in 0..VECTORS {
            for i in 0..N {
                problem.y[i][k] = y[k * N + i];
                problem.w[i][k] = w[k * N + i];
            }
        }
        problem
    }

    /// Each group's best scale and the curvature `Σ w e²` of the error around it.
    #[inline(always)]
    fn free_scales<B: Codebook<N>>(&mut self, y: &[f32; 256]) -> (Groups, Groups) {
        let top = f32::from(B::LEVELS[B::LEVELS.len() - 1]);
        let mut start = [0f32; GROUPS];
        for j in 0..256 / B::GROUP {
            start[j] = range(&y[B::GROUP * j..][..B::GROUP]).1 / top;
        }
        let (mut free, mut curvature, mut explained) =
            ([0f32; GROUPS], [0f32; GROUPS], [0f32; GROUPS]);
        for share in STARTS {
            let nearest = self.nearest::<B>(&each(|j| start[j] * share));
            let (xe, ee) = self.sums::<B>(&nearest.entries);
            for j in 0..256 / B::GROUP {
                let scale = xe[j] / ee[j];
                if scale * xe[j] > explained[j] {
                    (free[j], curvature[j], explained[j]) = (scale, ee[j], scale * xe[j]);
                }
            }
        }
        (free, curvature)
    }

    /// The best factors near `free / u`.
    #[inline(always)]
    fn choose_factors<B: Codebook<N>>(&mut self, free: &Groups, u: f32) -> Choice<VECTORS> {
        let middle = each::<GROUPS>(|j| Odd::snap(free[j] * inverse(u)));
        let mut choice = Choice { error: 0.0, u, factors: [1.0; GROUPS], entries: [0; VECTORS] };
        let mut errors = [f32::INFINITY; GROUPS];
        for step in [-2.0, 0.0, 2.0] {
            let factors = each::<GROUPS>(|j| (middle[j] + step).clamp(1.0, 31.0));
            let nearest = self.nearest::<B>(&each(|j| u * factors[j]));
            for j in 0..256 / B::GROUP {
                if nearest.errors[j] < errors[j] {
                    (errors[j], choice.factors[j]) = (nearest.errors[j], factors[j]);
                    let vectors = j * B::GROUP / N..(j + 1) * B::GROUP / N;
                    choice.entries[vectors.clone()].copy_from_slice(&nearest.entries[vectors]);
                }
            }
        }
        choice.error = errors[..256 / B::GROUP].iter().sum();
        choice
    }

    /// The same factors with the unit that suits their entries, and the entries that suit that.
    #[inline(always)]
    fn improve<B: Codebook<N>>(&mut self, choice: &Choice<VECTORS>) -> Choice<VECTORS> {
        let (xe, ee) = self.sums::<B>(&choice.entries);
        let f = &choice.factors;
        let [xe, ee] = total(GROUPS, |j| [f[j] * xe[j], f[j] * f[j] * ee[j]]);
        let u = stored::<B, N>(xe / ee);
        let nearest = self.nearest::<B>(&each(|j| u * f[j]));
        let error = nearest.errors.iter().sum();
        Choice { error, u, factors: *f, entries: nearest.entries }
    }

    /// Each group's `Σ w y e` and `Σ w e²`.
    #[inline(always)]
    fn sums<B: Codebook<N>>(&self, entries: &[u16; VECTORS]) -> (Groups, Groups) {
        let mut e = [0f32; 256];
        for (e, &entry) in e.as_chunks_mut::<N>().0.iter_mut().zip(entries) {
            *e = B::ENTRIES[usize::from(entry)].map(f32::from);
        }
        let (mut xe, mut ee) = ([0f32; GROUPS], [0f32; GROUPS]);
        for j in 0..256 / B::GROUP {
            let at = B::GROUP * j;
            [xe[j], ee[j]] = total(B::GROUP, |i| {
                [self.wy[at + i] * e[at + i], self.ww[at + i] * e[at + i] * e[at + i]]
            });
        }
        (xe, ee)
    }

    /// The nearest entries, groups scaled by `scales`.
    #[inline(always)]
    fn nearest<B: Codebook<N>>(&mut self, scales: &Groups) -> Nearest<VECTORS> {
        let mut nearest = Nearest { entries: [0; VECTORS], errors: [0.0; GROUPS] };
        for first in (0..VECTORS).step_by(WIDE) {
            let group = |l: usize| (first + l) * N / B::GROUP;
            self.fill_costs::<B>(first, &each(|l| scales[group(l)]));
            let [a, b, ..] = &self.quarters;
            let half = |number: u8| &self.halves[usize::from(number) & 127];
            let (mut best, mut which) = ([f32::INFINITY; WIDE], [0u32; WIDE]);
            for (number, run) in B::RUNS.iter().enumerate() {
                let (a, b) =
                    (&a[usize::from(run.first[0]) & 15], &b[usize::from(run.first[1]) & 15]);
                let seconds = run.seconds.map(half);
                let mut next = (best, which);
                for l in 0..WIDE {
                    let mut cost = seconds[0][l];
                    for second in &seconds[1..] {
                        cost = if second[l] < cost { second[l] } else { cost };
                    }
                    let cost = (a[l] + b[l]) + cost;
                    let less = cost < best[l];
                    next.0[l] = if less { cost } else { best[l] };
                    next.1[l] = if less { number as u32 } else { which[l] };
                }
                (best, which) = next;
            }
            for l in 0..WIDE {
                let run = &B::RUNS[which[l] as usize % B::RUNS.len()];
                // Costs are not negative, so their bits compare as they do.
                let cheapest = (0..4).fold(u64::MAX, |least, n| {
                    let cost = half(run.seconds[n])[l];
                    least.min(u64::from(cost.to_bits()) << 16 | u64::from(run.entries[n]))
                });
                nearest.entries[first + l] = cheapest as u16;
                nearest.errors[group(l)] += best[l];
            }
        }
        nearest
    }

    /// Works out what entries cost vectors `first..first + WIDE`.
    #[inline(always)]
    fn fill_costs<B: Codebook<N>>(&mut self, first: usize, scale: &Wide) {
        let levels = B::LEVELS.len();
        let cost = |i: usize, level: usize| {
            let (y, w) = (&self.y[i][first..first + WIDE], &self.w[i][first..first + WIDE]);
            each::<WIDE>(|l| {
                let e = y[l] - scale[l] * f32::from(B::LEVELS[level]);
                w[l] * e * e
            })
        };
        for q in 0..4 {
            for level in 0..levels {
                if N == 4 {
                    self.quarters[q][level] = cost(q, level);
                } else {
                    let high = cost(2 * q + 1, level);
                    for other in 0..levels {
                        let low = cost(2 * q, other);
                        self.quarters[q][levels * level + other] = each(|l| low[l] + high[l]);
                    }
                }
            }
        }
        let count = if N == 4 { levels } else { levels * levels };
        let [_, _, third, fourth] = &self.quarters;
        for high in 0..count {
            for low in 0..count {
                self.halves[count * high + low] = each(|l| third[low][l] + fourth[high][l]);
            }
        }
    }
}

/// Four entries with the same first half. A quarter of an entry is one of eight levels, or two of
/// three: one of nine pairs.
#[derive(Clone, Copy)]
pub(super) struct Run {
    /// The first two quarters.
    first: [u8; 2],
    /// The second halves: the third quarter plus its number of levels times the fourth.
    seconds: [u8; 4],
    entries: [u16; 4],
}

/// Arranges entries written as `16 / bits` level numbers of `bits` bits in [`count_runs`] runs. One
/// that is not full repeats its last entry.
pub(super) const fn runs<const RUNS: usize>(codes: &[u16], bits: u32) -> [Run; RUNS] {
    let count: u8 = if bits == 4 { 8 } else { 9 };
    let mut runs = [Run { first: [0; 2], seconds: [0; 4], entries: [0; 4] }; RUNS];
    // For each first half, the run being filled and how full it is.
    let mut open = [(0, 4); 256];
    let (mut made, mut entry) = (0, 0);
    while entry < codes.len() {
        let [a, b, c, d] = quarters(codes[entry], bits);
        let open = &mut open[(a * 16 + b) as usize];
        if open.1 == 4 {
            *open = (made, 0);
            runs[made].first = [a, b];
            made += 1;
        }
        let run = &mut runs[open.0];
        let mut n = open.1;
        while n < 4 {
            run.seconds[n] = c + count * d;
            run.entries[n] = entry as u16;
            n += 1;
        }
        open.1 += 1;
        entry += 1;
    }
    runs
}

/// How many runs [`runs`] makes.
pub(super) const fn count_runs(codes: &[u16], bits: u32) -> usize {
    let mut sizes = [0usize; 256];
    let mut entry = 0;
    while entry < codes.len() {
        let [a, b, ..] = quarters(codes[entry], bits);
        sizes[(a * 16 + b) as usize] += 1;
        entry += 1;
    }
    let (mut runs, mut first) = (0, 0);
    while first < 256 {
        runs += sizes[first].div_ceil(4);
        first += 1;
    }
    runs
}

/// The quarters of an entry.
const fn quarters(code: u16, bits: u32) -> [u8; 4] {
    let mut quarters = [0; 4];
    let mut q = 0;
    while q < 4 {
        let nibble = (code >> (4 * q) & 15) as u8;
        quarters[q] = if bits == 4 { nibble } else { (nibble & 3) + 3 * (nibble >> 2) };
        q += 1;
    }
    quarters
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{iq2, iq3};

    /// The entries found are the nearest of all, one by one.
    #[track_caller]
    fn check<B: Codebook<N>, const N: usize, const VECTORS: usize>() {
        let noise = |i: usize| (i as u32).wrapping_mul(2_654_435_761) as f32 / 4_294_967_296.0;
        let y = each::<256>(|i| 60.0 * noise(i) - 6.0);
        let w = each::<256>(|i| 0.01 + noise(7 * i + 3));
        let scales = each::<GROUPS>(|j| 0.5 + 0.1 * j as f32);
        let nearest = Problem::<N, VECTORS>::new(&y, &w).nearest::<B>(&scales);
        let mut errors = [0f32; GROUPS];
        for k in 0..VECTORS {
            let group = k * N / B::GROUP;
            let cost = |entry: &[u8; N]| -> f32 {
                let distance = |i: usize| y[k * N + i] - scales[group] * f32::from(entry[i]);
                (0..N).map(|i| w[k * N + i] * distance(i) * distance(i)).sum()
            };
            let least = B::ENTRIES.iter().map(cost).fold(f32::INFINITY, f32::min);
            let found = cost(&B::ENTRIES[usize::from(nearest.entries[k])]);
            assert!(found <= least * 1.00001, "vector {k}: {found} where {least} is possible");
            errors[group] += found;
        }
        for j in 0..GROUPS {
            assert!((nearest.errors[j] - errors[j]).abs() <= 1e-4 * errors[j], "group {j}");
        }
    }

    #[test]
    fn no_entry_is_nearer() {
        check::<iq2::Xxs, 8, 32>();
        check::<iq2::Xs, 8, 32>();
        check::<iq2::S, 8, 32>();
        check::<iq3::Xxs, 4, 64>();
        check::<iq3::S, 4, 64>();
    }
}
