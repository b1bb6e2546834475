//! The search for scales of layouts without a minimum: `x ≈ d q`, `q` from a set of levels.
//!
//! Given codes, the best scale is the least-squares one, `d = Σ w x q / Σ w q²`, and leaves the error
//! `Σ w x² - (Σ w x q)² / Σ w q²`; given a scale, the best codes are the nearest levels. Both steps are
//! taken from sixteen starting points at once, one a vector lane. The best scale's neighbours are then
//! compared by the error they leave as they will be stored.

use super::block::Half;
use super::lanes::{LANES, Lanes, each, inverse, least, range, total};
use super::levels::Levels;

/// Blocks whose values are all smaller than this are nothing but zeros in every layout with a
/// half-precision scale, whose least positive product of scale and code is 2⁻²⁴.
pub(super) const NOTHING: f32 = Half::MIN_POSITIVE * 0.5;

/// Starting points: the inverse scale maps the block's extreme value to the extreme level plus this
/// many steps. Positive numbers clip it, negative ones leave levels unused. From lane [`TURNED`] on
/// it is mapped to the other side, by a scale of the other sign.
///
/// Coarse sets gain by clipping, fine ones by trying every phase of the rounding.
const COARSE: Lanes =
    [-0.3, 0.0, 0.2, 0.4, 0.6, 0.9, 1.3, 1.8, 2.5, 3.5, 5.0, -0.2, 0.2, 0.6, 1.0, 1.8];
const MEDIUM: Lanes =
    [-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9, 1.3, 1.8, 2.5, 3.5, -0.8, -0.4, 0.0, 0.4, 0.8];
const FINE: Lanes =
    [-0.9, -0.75, -0.5, -0.3, -0.15, 0.0, 0.15, 0.3, 0.5, 0.7, 0.9, -0.4, -0.2, 0.0, 0.2, 0.5];
const TURNED: usize = 11;

/// Changes of a single scale that are tried last, in steps of the level set at its extreme.
const NUDGES: Lanes = [
    0.0, -0.64, -0.48, -0.32, -0.24, -0.16, -0.08, -0.04, 0.04, 0.08, 0.16, 0.24, 0.32, 0.48, 0.64,
    0.8,
];

/// The value of largest magnitude.
#[inline(always)]
fn extreme(x: &[f32]) -> f32 {
    let (low, high) = range(x);
    if -low > high { low } else { high }
}

/// Inverse scales to start from.
#[inline(always)]
fn starts<L: Levels>(extreme: f32) -> Lanes {
    each(|l| {
        let end = if l < TURNED { L::FAR } else { L::NEAR };
        let steps = if L::STEPS < 8.0 {
            COARSE[l]
        } else if L::STEPS < 16.0 {
            MEDIUM[l]
        } else {
            FINE[l]
        };
        (end + end / L::STEPS * steps) / extreme
    })
}

/// `Σ w x q` and `Σ w q²` for each inverse scale; an even number of values.
#[inline(always)]
fn sums<L: Levels>(x: &[f32], w: &[f32], inverse: &Lanes) -> (Lanes, Lanes) {
    let (mut xq, mut qq) = ([0f32; LANES], [0f32; LANES]);
    // In pairs, so that fewer additions wait for one another.
    for (x, w) in x.as_chunks::<2>().0.iter().zip(w.as_chunks::<2>().0) {
        for l in 0..LANES {
            let q = [L::snap(x[0] * inverse[l]), L::snap(x[1] * inverse[l])];
            let wq = [w[0] * q[0], w[1] * q[1]];
            xq[l] += wq[0] * x[0] + wq[1] * x[1];
            qq[l] += wq[0] * q[0] + wq[1] * q[1];
        }
    }
    (xq, qq)
}

/// `Σ w (x - d q)²` for each scale `d`, `q` the nearest levels; an even number of values.
#[inline(always)]
pub(super) fn scale_errors<L: Levels, const C: usize>(
    x: &[f32],
    w: &[f32],
    d: &[f32; C],
) -> [f32; C] {
    let inverse = each::<C>(|l| inverse(d[l]));
    let mut errors = [0f32; C];
    for (x, w) in x.as_chunks::<2>().0.iter().zip(w.as_chunks::<2>().0) {
        for l in 0..C {
            let e0 = x[0] - d[l] * L::snap(x[0] * inverse[l]);
            let e1 = x[1] - d[l] * L::snap(x[1] * inverse[l]);
            errors[l] += w[0] * e0 * e0 + w[1] * e1 * e1;
        }
    }
    errors
}

/// The least-squares scales of the starting points' codes, and what those think of each:
/// `(Σ w x q)² / Σ w q²`, the share of `Σ w x²` that is explained, and `Σ w q²`.
#[inline(always)]
fn candidates<L: Levels>(x: &[f32], w: &[f32], extreme: f32) -> (Lanes, Lanes, Lanes) {
    let (mut xq, mut qq) = sums::<L>(x, w, &starts::<L>(extreme));
    if L::UNEVEN {
        let inverse = each(|l| if xq[l] == 0.0 { 0.0 } else { qq[l] / xq[l] });
        (xq, qq) = sums::<L>(x, w, &inverse);
    }
    let d = each(|l| if qq[l] == 0.0 { 0.0 } else { xq[l] / qq[l] });
    let explained = each(|l| d[l] * xq[l]);
    (d, explained, qq)
}

/// The best scale in full precision, with the curvature `Σ w q²` of the error around it.
#[inline(always)]
pub(super) fn free_scale<L: Levels>(x: &[f32], w: &[f32]) -> (f32, f32) {
    let extreme = extreme(x);
    if extreme.abs() < NOTHING {
        return (0.0, w.iter().sum());
    }
    let (d, explained, qq) = candidates::<L>(x, w, extreme);
    let best = least(&each::<LANES>(|l| -explained[l]));
    (d[best], qq[best])
}

/// The best half-precision scale and the levels of a block with a single scale.
#[inline(always)]
pub(super) fn fit_scale<L: Levels, const N: usize>(x: &[f32; N], w: &[f32; N]) -> (f32, [f32; N]) {
    let extreme = extreme(x);
    let d = if extreme.abs() < NOTHING {
        0.0
    } else {
        let (d, explained, _) = candidates::<L>(x, w, extreme);
        let best = least(&each::<LANES>(|l| -explained[l]));
        let [energy] = total(N, |i| [w[i] * x[i] * x[i]]);
        let d = if energy - explained[best] > energy * 5e-4 {
            d[best]
        } else {
            // Much of what is left is the rounding of `d`: another one may round better.
            let d = each(|l| Half::round_scale(d[l]));
            d[least(&scale_errors::<L, LANES>(x, w, &d))]
        };
        let around = each(|l| Half::round_scale(d * (1.0 + NUDGES[l] / L::STEPS)));
        around[least(&scale_errors::<L, LANES>(x, w, &around))]
    };
    let inverse = inverse(d);
    (d, each(|i| L::snap(x[i] * inverse)))
}

/// A super-block of `GROUPS` groups: values are `d * scales[j] * levels[i]`.
pub(super) struct SuperBlock<const GROUPS: usize> {
    pub(super) d: f32,
    pub(super) scales: [f32; GROUPS],
    pub(super) levels: [f32; 256],
}

/// Fits a super-block whose groups of `SIZE` values have scales from the set `S`.
///
/// 1. Each group's best free scale.
/// 2. The super-block's scale: the free scales are themselves a vector to be quantized, each weighed
///    by how much its group minds.
/// 3. Each group's integer scale, by its true error among sixteen neighbours of the free one.
/// 4. The super-block's scale again, by least squares over all values, and the nearest levels again.
///
/// Where values fit the levels so well that the rounding of `d` is what is left, steps 3 and 4 follow
/// other scales too, for one that rounds well.
#[inline(always)]
pub(super) fn fit_super_block<L: Levels, S: Levels, const SIZE: usize, const GROUPS: usize>(
    x: &[f32; 256],
    w: &[f32; 256],
) -> SuperBlock<GROUPS> {
    let (xs, ws) = (x.as_chunks::<SIZE>().0, w.as_chunks::<SIZE>().0);
    // (1)
    let (mut free, mut curvature) = ([0f32; GROUPS], [0f32; GROUPS]);
    for j in 0..GROUPS {
        (free[j], curvature[j]) = free_scale::<L>(&xs[j], &ws[j]);
    }
    // (2)
    let extreme = extreme(&free);
    if extreme.abs() < NOTHING * 1e-5 {
        return SuperBlock { d: 0.0, scales: [0.0; GROUPS], levels: [L::snap(0.0); 256] };
    }
    let (starts, explained, _) = candidates::<S>(&free, &curvature, extreme);
    let start = Half::round_scale(starts[least(&each::<LANES>(|l| -explained[l]))]);
    let mut best = (f32::INFINITY, start, [0f32; GROUPS]);
    let [energy] = total(256, |i| [w[i] * x[i] * x[i]]);
    for trial in 0..LANES {
        if trial > 0 && (best.0 == 0.0 || best.0 > energy * NEARLY_EXACT) {
            break;
        }
        let d = if trial == 0 {
            start
        } else {
            Half::round_scale(extreme / (S::FAR - (trial as f32).copysign(S::FAR)))
        };
        // (3)
        let mut scales = [0f32; GROUPS];
        let mut error = 0f32;
        let middle = each::<GROUPS>(|j| (free[j] / d).clamp(-1024.0, 1024.0));
        for j in 0..GROUPS {
            let tried: Lanes = each(|l| S::snap(middle[j] + (l as f32 - 7.5)));
            let errors = scale_errors::<L, LANES>(&xs[j], &ws[j], &each(|l| d * tried[l]));
            let chosen = least(&errors);
            scales[j] = tried[chosen];
            error += errors[chosen];
        }
        if error < best.0 {
            best = (error, d, scales);
        }
        // (4)
        let inverses = each::<GROUPS>(|j| inverse(d * scales[j]));
        let [xq, qq] = total(256, |i| {
            let q = L::snap(x[i] * inverses[i / SIZE]) * scales[i / SIZE];
            [w[i] * x[i] * q, w[i] * q * q]
        });
        let again = Half::round_scale(if qq == 0.0 { d } else { xq / qq });
        let steps = each::<GROUPS>(|j| again * scales[j]);
        let inverses = each::<GROUPS>(|j| inverse(steps[j]));
        let [error] = total(256, |i| {
            let e = x[i] - steps[i / SIZE] * L::snap(x[i] * inverses[i / SIZE]);
            [w[i] * e * e]
        });
        if error < best.0 {
            best = (error, again, scales);
        }
    }
    let (_, d, scales) = best;
    let mut levels = [0f32; 256];
    for j in 0..GROUPS {
        let inverse = inverse(d * scales[j]);
        for i in SIZE * j..SIZE * (j + 1) {
            levels[i] = L::snap(x[i] * inverse);
        }
    }
    SuperBlock { d, scales, levels }
}

/// The error, as a share of `Σ w x²`, below which the rounding of a half-precision scale shows.
pub(super) const NEARLY_EXACT: f32 = 1e-5;
