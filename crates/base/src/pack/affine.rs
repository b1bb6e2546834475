//! The search for scales and minima: `x ≈ d q + m`, `q` an unsigned integer.
//!
//! Given codes, the best scale and minimum solve a 2×2 least-squares system; given those, the best
//! codes are the nearest ones. The two steps alternate from sixteen starting points at once, one a
//! vector lane. The last step measures the error with the numbers as they will be stored.

use super::block::Half;
use super::lanes::{LANES, Lanes, each, inverse, least, range, total};
use super::levels::{Integers, Levels, code, round};
use super::symmetric::{NEARLY_EXACT, NOTHING, free_scale};

/// Starting points: what is added to the top code before it is divided by the range (the scale
/// becomes smaller and the largest value is clipped), and the share of the range that is cut off at
/// the bottom.
const STARTS: [(f32, f32); LANES] = [
    (-0.7, 0.0),
    (-0.35, 0.0),
    (0.0, 0.0),
    (0.25, 0.0),
    (0.5, 0.0),
    (0.75, 0.0),
    (1.0, 0.0),
    (1.4, 0.0),
    (0.2, 0.03),
    (0.4, 0.06),
    (0.7, 0.03),
    (1.0, 0.08),
    (1.0, 0.15),
    (1.5, 0.12),
    (2.0, 0.0),
    (2.5, 0.2),
];

/// What least squares needs to know about the codes of one scale and minimum in each lane.
struct Sums {
    /// `Σ w q`, `Σ w q²`, `Σ w q y`.
    q: Lanes,
    qq: Lanes,
    qy: Lanes,
}

/// Codes are `round((y - m) / d)`, clamped to `0..=TOP`.
#[inline(always)]
fn sums<const TOP: i32>(y: &[f32], w: &[f32], inverse: &Lanes, m: &Lanes) -> Sums {
    let mut sums = Sums { q: [0.0; LANES], qq: [0.0; LANES], qy: [0.0; LANES] };
    for (&y, &w) in y.iter().zip(w) {
        for l in 0..LANES {
            let q = round(((y - m[l]) * inverse[l]).clamp(0.0, TOP as f32));
            let wq = w * q;
            sums.q[l] += wq;
            sums.qq[l] += wq * q;
            sums.qy[l] += wq * y;
        }
    }
    sums
}

/// `Σ w (y - d q - m)²` for each scale and minimum, `q` the nearest codes.
#[inline(always)]
fn errors<const TOP: i32>(y: &[f32], w: &[f32], d: &Lanes, m: &Lanes) -> Lanes {
    let inverse = each::<LANES>(|l| inverse(d[l]));
    let mut errors = [0f32; LANES];
    for (&y, &w) in y.iter().zip(w) {
        for l in 0..LANES {
            let t = y - m[l];
            let e = t - d[l] * round((t * inverse[l]).clamp(0.0, TOP as f32));
            errors[l] += w * e * e;
        }
    }
    errors
}

/// The totals of a group that do not depend on codes.
#[derive(Clone, Copy)]
struct Totals {
    /// `Σ w` and `Σ w y`.
    w: f32,
    y: f32,
}

/// Solves for scale and minimum in each lane; `m` at most `highest`.
#[inline(always)]
fn solve(sums: &Sums, totals: Totals, highest: f32) -> (Lanes, Lanes) {
    let (mut d, mut m) = ([0f32; LANES], [0f32; LANES]);
    for l in 0..LANES {
        let (q, qq, qy) = (sums.q[l], sums.qq[l], sums.qy[l]);
        let determinant = totals.w * qq - q * q;
        // All codes alike, up to rounding errors: the scale is arbitrary, the minimum the mean.
        let singular = determinant <= 1e-6 * totals.w * qq;
        let free = (qq * totals.y - q * qy) / determinant;
        let bound = if singular { totals.y / totals.w } else { free };
        m[l] = if bound > highest { highest } else { bound };
        d[l] = if singular && bound <= highest {
            0.0
        } else if bound > highest {
            if qq == 0.0 { 0.0 } else { (qy - q * highest) / qq }
        } else {
            (totals.w * qy - q * totals.y) / determinant
        };
    }
    (d, m)
}

/// Scales and minima after two alternations, relative to `low`, with the explained share of the
/// error and the last sums.
#[inline(always)]
fn candidates<const TOP: i32>(
    y: &[f32],
    w: &[f32],
    span: f32,
    highest: f32,
) -> (Lanes, Lanes, Lanes, Sums) {
    let [sum, wy] = total(y.len(), |i| [w[i], w[i] * y[i]]);
    let totals = Totals { w: sum, y: wy };
    let start = each(|l| (TOP as f32 + STARTS[l].0) / (span * (1.0 - STARTS[l].1)));
    let offset = each(|l| span * STARTS[l].1);
    let (d, m) = solve(&sums::<TOP>(y, w, &start, &offset), totals, highest);
    let sums = sums::<TOP>(y, w, &each(|l| inverse(d[l])), &m);
    let (d, m) = solve(&sums, totals, highest);
    // Σw(y - dq - m)² less Σwy².
    let error = each(|l| {
        let (q, qq, qy) = (sums.q[l], sums.qq[l], sums.qy[l]);
        let (d, m) = (d[l], m[l]);
        d * (d * qq + 2.0 * (m * q - qy)) + m * (m * totals.w - 2.0 * totals.y)
    });
    (d, m, error, sums)
}

/// The best half-precision scale and minimum of a block, and its codes.
#[inline(always)]
pub(super) fn fit_scale_and_minimum<const TOP: i32, const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
) -> (f32, f32, [u8; N]) {
    let (low, high) = range(x);
    let (mut d, mut m) = ([0f32; LANES], [low; LANES]);
    if high - low >= NOTHING {
        // Least squares runs on distances from the lowest value: sums of what differs, not of what
        // is common.
        let y = each::<N>(|i| x[i] - low);
        (d, m, ..) = candidates::<TOP>(&y, w, high - low, f32::INFINITY);
        m = each(|l| m[l] + low);
        // The last trial keeps the whole range: where halves are coarse, the others may cut it.
        m[LANES - 1] = low;
        d[LANES - 1] = (high - low) / TOP as f32;
    } else {
        // All alike: code 1 stores what the minimum's rounding leaves.
        d[0] = low - Half::round(low);
    }
    let d = each(|l| Half::round_scale(d[l]));
    let m = each(|l| Half::round(m[l]));
    let best = least(&errors::<TOP>(x, w, &d, &m));
    let (d, m) = (d[best], m[best]);
    let inverse = inverse(d);
    let mut codes = [0; N];
    for i in 0..N {
        codes[i] = nearest::<TOP>((x[i] - m) * inverse);
    }
    (d, m, codes)
}

#[inline(always)]
fn nearest<const TOP: i32>(t: f32) -> u8 {
    code(round(t.clamp(0.0, TOP as f32)))
}

/// A super-block of `GROUPS` groups: values are `d * scales[j] * codes[i] - dmin * minima[j]`.
pub(super) struct SuperBlock<const GROUPS: usize> {
    pub(super) d: f32,
    pub(super) dmin: f32,
    pub(super) scales: [u8; GROUPS],
    pub(super) minima: [u8; GROUPS],
    pub(super) codes: [u8; 256],
}

/// A group's best free scale and minimum, and what is known about the error around them.
#[derive(Clone, Copy, Default)]
struct Free {
    d: f32,
    /// At most zero: the minima of super-blocks cannot be positive.
    m: f32,
    /// `Σ w`, `Σ w q`, `Σ w q²`, `Σ w x`.
    w: f32,
    q: f32,
    qq: f32,
    x: f32,
}

#[inline(always)]
fn free<const TOP: i32>(x: &[f32], w: &[f32]) -> Free {
    let (low, high) = range(x);
    let low = if low > 0.0 { 0.0 } else { low };
    let [sum, wx] = total(x.len(), |i| [w[i], w[i] * x[i]]);
    if high - low < NOTHING {
        return Free { d: 0.0, m: low, w: sum, x: wx, ..Free::default() };
    }
    let mut y = [0f32; 32];
    let y = &mut y[..x.len()];
    for (y, x) in y.iter_mut().zip(x) {
        *y = x - low;
    }
    let (d, m, error, sums) = candidates::<TOP>(y, w, high - low, -low);
    let best = least(&error);
    Free { d: d[best], m: m[best] + low, w: sum, q: sums.q[best], qq: sums.qq[best], x: wx }
}

/// Fits a super-block whose groups of `SIZE` values have codes `0..=TOP` and scales and minima
/// `0..=STOP`.
///
/// 1. Each group's best free scale and minimum.
/// 2. The scale of the scales: the free scales are themselves a vector to be quantized, each weighed
///    by how much its group minds when the minimum can follow.
/// 3. The scale of the minima, likewise, after the minima followed the rounded scales.
/// 4. Each group's integers, by the true error of eight scales, each with the two minima around the
///    one that suits it.
/// 5. Both super-scales again, by least squares over all values. Back to 4 while it helps.
///
/// Where values fit so well that the rounding of the super-scales is what is left, steps 4 and 5
/// follow others too, for some that round well.
#[inline(always)]
pub(super) fn fit_super_block<
    const TOP: i32,
    const STOP: i32,
    const SIZE: usize,
    const GROUPS: usize,
>(
    x: &[f32; 256],
    w: &[f32; 256],
) -> SuperBlock<GROUPS> {
    let (xs, ws) = (x.as_chunks::<SIZE>().0, w.as_chunks::<SIZE>().0);
    let stop = STOP as f32;
    // (1)
    let mut groups = [Free::default(); GROUPS];
    for j in 0..GROUPS {
        groups[j] = free::<TOP>(&xs[j], &ws[j]);
    }
    // (2)
    let scales = each::<GROUPS>(|j| groups[j].d);
    let curvature = each::<GROUPS>(|j| {
        let g = &groups[j];
        if g.m < 0.0 { g.qq - g.q * g.q * inverse(g.w) } else { g.qq }
    });
    let start_d = Half::round_scale(free_unsigned::<STOP>(&scales, &curvature));
    // (3)
    let minima = each::<GROUPS>(|j| {
        let g = &groups[j];
        let scale = start_d * round((g.d * inverse(start_d)).clamp(0.0, stop));
        if g.w > 0.0 { ((scale * g.q - g.x) / g.w).max(0.0) } else { 0.0 }
    });
    let start_dmin =
        Half::round_scale(free_unsigned::<STOP>(&minima, &each::<GROUPS>(|j| groups[j].w)));

    let [energy] = total(256, |i| [w[i] * x[i] * x[i]]);
    let largest = (range(&scales).1, range(&minima).1);
    let mut best = (f32::INFINITY, start_d, start_dmin, [0f32; GROUPS], [0f32; GROUPS]);
    for trial in 0..64 {
        let (mut d, mut dmin) = (start_d, start_dmin);
        if trial > 0 {
            if best.0 == 0.0 || best.0 > energy * NEARLY_EXACT {
                break;
            }
            d = Half::round_scale(largest.0 / (stop - (trial / 8) as f32));
            dmin = Half::round_scale(largest.1 / (stop - (trial % 8) as f32));
        }
        let mut last = f32::INFINITY;
        for _ in 0..ROUNDS {
            // (4)
            let (mut scales, mut minima) = ([0f32; GROUPS], [0f32; GROUPS]);
            let mut error = 0f32;
            // The normal equations of x ≈ d a - dmin b with a = scale * code, b = minimum.
            let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0f32, 0f32, 0f32, 0f32, 0f32);
            let (inverse_d, inverse_dmin) = (inverse(d), inverse(dmin));
            for j in 0..GROUPS {
                let g = &groups[j];
                let middle = round((g.d * inverse_d).clamp(0.0, stop));
                let inverse_w = inverse(g.w);
                let (mut s, mut m) = ([0f32; LANES], [0f32; LANES]);
                for l in 0..LANES {
                    s[l] = (middle + (l / 2) as f32 - 3.0).clamp(0.0, stop);
                    let follows = (d * s[l] * g.q - g.x) * inverse_w * inverse_dmin;
                    let below = round(follows.clamp(0.0, stop) - 0.5);
                    m[l] = (below + (l % 2) as f32).clamp(0.0, stop);
                }
                let tried =
                    errors::<TOP>(&xs[j], &ws[j], &each(|l| d * s[l]), &each(|l| -dmin * m[l]));
                let chosen = least(&tried);
                error += tried[chosen];
                (scales[j], minima[j]) = (s[chosen], m[chosen]);
                let (scale, minimum) = (d * scales[j], dmin * minima[j]);
                let inverse = inverse(scale);
                let (x, w) = (&xs[j], &ws[j]);
                let [q, qq, qx] = total(SIZE, |i| {
                    let code = round(((x[i] + minimum) * inverse).clamp(0.0, TOP as f32));
                    [w[i] * code, w[i] * code * code, w[i] * code * x[i]]
                });
                aa += scales[j] * scales[j] * qq;
                ab += scales[j] * minima[j] * q;
                bb += minima[j] * minima[j] * g.w;
                ax += scales[j] * qx;
                bx += minima[j] * g.x;
            }
            if error < best.0 {
                best = (error, d, dmin, scales, minima);
            }
            if error >= last {
                break;
            }
            last = error;
            // (5)
            let determinant = aa * bb - ab * ab;
            let again = if determinant > 1e-6 * aa * bb {
                ((ax * bb - ab * bx) / determinant, (ab * ax - aa * bx) / determinant)
            } else {
                (if aa > 0.0 { (ax + dmin * ab) / aa } else { d }, dmin)
            };
            let again = (Half::round_scale(again.0), Half::round_scale(again.1));
            if again == (d, dmin) {
                break;
            }
            (d, dmin) = again;
        }
    }
    let (_, d, dmin, scales, minima) = best;
    let mut codes = [0; 256];
    for j in 0..GROUPS {
        let (inverse, minimum) = (inverse(d * scales[j]), dmin * minima[j]);
        for i in SIZE * j..SIZE * (j + 1) {
            codes[i] = nearest::<TOP>((x[i] + minimum) * inverse);
        }
    }
    SuperBlock { d, dmin, scales: scales.map(|s| s as u8), minima: minima.map(|m| m as u8), codes }
}

/// The best scale of non-negative numbers to be rounded to `0..=STOP`.
#[inline(always)]
fn free_unsigned<const STOP: i32>(x: &[f32], w: &[f32]) -> f32 {
    /// Integers from zero on.
    struct Unsigned<const STOP: i32>;
    impl<const STOP: i32> Levels for Unsigned<STOP> {
        const FAR: f32 = STOP as f32;
        const NEAR: f32 = STOP as f32;
        const STEPS: f32 = STOP as f32;
        #[inline(always)]
        fn snap(t: f32) -> f32 {
            Integers::<0, STOP>::snap(t)
        }
    }
    free_scale::<Unsigned<STOP>>(x, w).0
}

/// How often the super-scales are improved at most.
const ROUNDS: usize = 3;
