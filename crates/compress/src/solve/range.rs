//! The search for a group's scale, and for its zero point or minimum.

use bevel_kernels::{Isa, Wide, run_wide};
use half::{bf16, f16};

use super::grid::Levels;
use super::scales::{Parameters, inverse, nearest_integer};
use super::{Codes, GroupSpec, Range, ScaleType};

/// Candidates at once: the lanes of the widest vectors.
pub(super) const LANES: usize = 16;

/// A number for each candidate.
pub(super) type Lanes = [f32; LANES];

/// The step, the shift and the offset of a group of values, weighted by `importance` where it is
/// given. `unit` is what scales of [`ScaleType::E4m3`] are multiples of.
pub(super) fn fit(
    isa: Isa,
    spec: &GroupSpec,
    levels: &Levels,
    unit: f32,
    rounds: usize,
    x: &[f32],
    importance: Option<&[f32]>,
) -> Parameters {
    run_wide(isa, Fit { spec, levels, unit, rounds, x, importance })
}

/// A group of values whose parameters are searched.
#[derive(Clone, Copy)]
pub(super) struct Fit<'a> {
    pub(super) spec: &'a GroupSpec,
    pub(super) levels: &'a Levels,
    pub(super) unit: f32,
    /// How often codes and scales follow each other, [`ROUNDS`] but for estimates.
    pub(super) rounds: usize,
    pub(super) x: &'a [f32],
    pub(super) importance: Option<&'a [f32]>,
}

/// Parameters to choose from.
#[derive(Clone, Copy)]
pub(super) struct Candidates {
    pub(super) steps: Lanes,
    pub(super) shifts: Lanes,
    pub(super) offsets: Lanes,
}

impl Candidates {
    #[inline(always)]
    pub(super) fn at(&self, lane: usize) -> Parameters {
        [self.steps[lane], self.shifts[lane], self.offsets[lane]]
    }

    /// The same in all lanes.
    #[inline(always)]
    fn all([step, shift, offset]: Parameters) -> Self {
        Self { steps: [step; LANES], shifts: [shift; LANES], offsets: [offset; LANES] }
    }
}

impl Wide for Fit<'_> {
    type Output = Parameters;

    #[inline(always)]
    fn run(self) -> Parameters {
        let [low, high] = range(self.x);
        if low == 0.0 && high == 0.0 {
            return self.nothing();
        }
        match (&self.spec.codes, self.spec.range) {
            // A float's scale hardly matters: its levels are as fine everywhere.
            (Codes::Float8, _) => {
                [self.rounded(high.max(-low) / self.levels.largest()), 0.0, NO_OFFSET]
            }
            (_, Range::MinMax) => self.span(low, high),
            (_, Range::Shrink { steps, max_shrink, norm }) => {
                self.shrink(low, high, steps, max_shrink, norm)
            }
            (_, Range::Search) => {
                let found = self.search(low, high);
                let sums = self.sums(&found.steps, &found.shifts, &found.offsets);
                found.at(least_lane(&sums.error))
            }
        }
    }
}

/// What is added where there is no offset. Unlike `+0`, it leaves `-0` as it is.
const NO_OFFSET: f32 = -0.0;

/// Range factors from which the search for a scale starts, each with both signs: the coarser the
/// levels, the more it pays to clip.
const FACTORS: [[f32; 8]; 3] = [
    [0.30, 0.42, 0.52, 0.62, 0.72, 0.82, 0.92, 1.05],
    [0.48, 0.58, 0.67, 0.75, 0.83, 0.91, 0.99, 1.08],
    [0.70, 0.76, 0.82, 0.87, 0.92, 0.96, 1.00, 1.05],
];

/// Parts of the range that are cut off at the bottom and at the top, for two bits; less for more.
const CUTS: [(f32, f32); LANES] = [
    (0.0, 0.0),
    (0.08, 0.08),
    (0.16, 0.16),
    (0.24, 0.24),
    (0.32, 0.32),
    (0.0, 0.15),
    (0.0, 0.3),
    (0.1, 0.25),
    (0.2, 0.35),
    (0.15, 0.0),
    (0.3, 0.0),
    (0.25, 0.1),
    (0.35, 0.2),
    (0.12, 0.12),
    (0.2, 0.2),
    (-0.08, -0.08),
];

/// Neighbours of a step and a zero point: a factor, and codes by which the zero point moves where each
/// group has its own.
const NEIGHBOURS: [(f32, f32); LANES - 1] = [
    (0.99, 0.0),
    (1.01, 0.0),
    (0.98, 0.0),
    (1.02, 0.0),
    (0.96, 0.0),
    (1.04, 0.0),
    (0.93, 0.0),
    (1.07, 0.0),
    (0.9, 0.0),
    (0.995, 1.0),
    (0.995, -1.0),
    (0.97, 1.0),
    (0.97, -1.0),
    (1.03, 1.0),
    (1.03, -1.0),
];

/// How often codes and scales follow each other.
pub(super) const ROUNDS: usize = 2;

/// Sums over a group for each candidate: with `l` the level and shift of a value's code, `Σ w l`,
/// `Σ w l²`, `Σ w l x` and `Σ w (x − step l − offset)²`.
struct Sums {
    l: Lanes,
    ll: Lanes,
    lx: Lanes,
    error: Lanes,
}

impl Fit<'_> {
    #[inline(always)]
    fn weight(&self, i: usize) -> f32 {
        match self.importance {
            Some(importance) => importance[i],
            None => 1.0,
        }
    }

    /// Parameters that are each the best of their neighbourhood, or several parts of the range where
    /// it is not searched.
    #[inline(always)]
    pub(super) fn candidates(&self) -> Candidates {
        let [low, high] = range(self.x);
        if low == 0.0 && high == 0.0 {
            return Candidates::all(self.nothing());
        }
        match (&self.spec.codes, self.spec.range) {
            (Codes::Float8, _) => Candidates::all(self.run()),
            (_, Range::Search) => self.search(low, high),
            (_, Range::MinMax | Range::Shrink { .. }) => {
                let mut candidates = Candidates::all(self.span(low, high));
                let most = high.max(-low);
                for k in 1..LANES {
                    let bound = most * (1.0 - k as f32 * (0.5 / LANES as f32));
                    let [step, shift, offset] = self.span(low.max(-bound), high.min(bound));
                    candidates.steps[k] = step;
                    candidates.shifts[k] = shift;
                    candidates.offsets[k] = offset;
                }
                candidates
            }
        }
    }

    /// Parameters near those given, which come first.
    #[inline(always)]
    pub(super) fn around(&self, [step, shift, offset]: Parameters) -> Candidates {
        let mut candidates = Candidates::all([step, shift, offset]);
        if step == 0.0 || matches!(self.spec.codes, Codes::Float8) {
            return candidates;
        }
        for (k, (factor, moved)) in NEIGHBOURS.into_iter().enumerate() {
            candidates.steps[k + 1] = self.rounded(step * factor);
            match (&self.spec.codes, self.levels) {
                (Codes::Integer { symmetric: false, .. }, Levels::Integers { high, .. }) => {
                    candidates.shifts[k + 1] = (shift + moved).min(0.0).max(-high);
                }
                (Codes::Affine { .. }, _) => {
                    candidates.offsets[k + 1] = self.rounded_minimum(offset + moved * step * 0.5);
                }
                _ => {}
            }
        }
        candidates
    }

    /// The best of several neighbourhoods.
    #[inline(always)]
    fn search(&self, low: f32, high: f32) -> Candidates {
        match &self.spec.codes {
            Codes::Integer { bits, symmetric: true } => {
                self.search_scale(low, high, -((1 << (bits - 1)) as f32))
            }
            Codes::Integer { symmetric: false, .. } => {
                self.search_scale_and_minimum(low, high, true)
            }
            Codes::Affine { .. } => self.search_scale_and_minimum(low, high, false),
            Codes::Levels(_) | Codes::Float8 => self.search_scale(low, high, 0.0),
        }
    }

    /// Parameters of a group of zeros.
    #[inline(always)]
    fn nothing(&self) -> Parameters {
        match &self.spec.codes {
            Codes::Integer { bits, .. } => {
                [self.rounded(1.0).min(1.0), -((1u32 << (bits - 1)) as f32), NO_OFFSET]
            }
            Codes::Affine { .. } => [self.rounded(1.0), 0.0, 0.0],
            _ => [self.rounded(self.unit), 0.0, NO_OFFSET],
        }
    }

    #[inline(always)]
    fn rounded(&self, scale: f32) -> f32 {
        stored(self.spec, self.unit, scale)
    }

    #[inline(always)]
    fn rounded_minimum(&self, minimum: f32) -> f32 {
        stored_minimum(self.spec, minimum)
    }

    /// Parameters that map the range onto all levels.
    #[inline(always)]
    fn span(&self, low: f32, high: f32) -> Parameters {
        match &self.spec.codes {
            Codes::Integer { bits, symmetric } => {
                let top = ((1u32 << bits) - 1) as f32;
                let (low, high) = (low.min(0.0), high.max(0.0));
                if *symmetric {
                    let scale = self.rounded(high.max(-low) * 2.0 / top);
                    [scale, -((1u32 << (bits - 1)) as f32), NO_OFFSET]
                } else {
                    let scale = self.rounded((high - low) / top);
                    [scale, -nearest_integer(-low * inverse(scale), 0.0, top), NO_OFFSET]
                }
            }
            Codes::Affine { bits } => {
                let top = ((1u32 << bits) - 1) as f32;
                // The end of larger magnitude is met exactly, and zero where it is inside.
                let (edge, sign) = if -low > high { (low, 1.0) } else { (high, -1.0) };
                let scale = sign * ((high - low) / top).max(1e-7);
                let steps = (edge / scale).round_ties_even();
                let (scale, minimum) =
                    if steps == 0.0 { (scale, 0.0) } else { (edge / steps, edge) };
                [self.rounded(scale), 0.0, self.rounded_minimum(minimum)]
            }
            _ => [self.rounded(high.max(-low) / self.levels.largest()), 0.0, NO_OFFSET],
        }
    }

    #[inline(always)]
    fn shrink(&self, low: f32, high: f32, steps: usize, max_shrink: f32, norm: f32) -> Parameters {
        let mut best = (f32::INFINITY, self.span(low, high));
        for i in 0..(max_shrink * steps as f32) as usize {
            let factor = 1.0 - i as f32 / steps as f32;
            let parameters = self.span(low * factor, high * factor);
            let error = self.distance(parameters, norm);
            if error < best.0 {
                best = (error, parameters);
            }
        }
        best.1
    }

    /// `Σ w |x − x̂|^norm`.
    #[inline(always)]
    fn distance(&self, [step, shift, offset]: Parameters, norm: f32) -> f32 {
        let inverse = inverse(step);
        let mut sums = [0f32; LANES];
        for (k, x) in self.x.chunks(LANES).enumerate() {
            for (l, &x) in x.iter().enumerate() {
                let level = self.nearest((x - offset) * inverse - shift);
                let error = (x - (step * (level + shift) + offset)).abs();
                sums[l] += self.weight(k * LANES + l) * power(error, norm);
            }
        }
        sums.iter().sum()
    }

    /// The level nearest to `t`.
    #[inline(always)]
    pub(super) fn nearest(&self, t: f32) -> f32 {
        match self.levels {
            Levels::Integers { low, high } => nearest_integer(t, *low, *high),
            Levels::Table { levels, middles, .. } => {
                let mut level = levels[0];
                for (middle, next) in middles.iter().zip(&levels[1..]) {
                    level = if t > *middle { *next } else { level };
                }
                level
            }
            Levels::Float8 => bevel_base::pack::e4m3(bevel_base::pack::to_e4m3(t)),
        }
    }

    /// Each kind of levels has a loop of its own: with the choice inside, the compiler would take the
    /// candidates one after another.
    #[inline(always)]
    fn sums(&self, steps: &Lanes, shifts: &Lanes, offsets: &Lanes) -> Sums {
        match self.levels {
            Levels::Integers { low, high } => self.sums_with(steps, shifts, offsets, |t| {
                let mut nearest = [0f32; LANES];
                for k in 0..LANES {
                    nearest[k] = nearest_integer(t[k], *low, *high);
                }
                nearest
            }),
            Levels::Table { levels, middles, .. } => self.sums_with(steps, shifts, offsets, |t| {
                let mut nearest = [levels[0]; LANES];
                for (middle, next) in middles.iter().zip(&levels[1..]) {
                    for k in 0..LANES {
                        nearest[k] = if t[k] > *middle { *next } else { nearest[k] };
                    }
                }
                nearest
            }),
            Levels::Float8 => {
                self.sums_with(steps, shifts, offsets, |t| t.map(|t| self.nearest(t)))
            }
        }
    }

    #[inline(always)]
    fn sums_with(
        &self,
        steps: &Lanes,
        shifts: &Lanes,
        offsets: &Lanes,
        nearest: impl Fn(&Lanes) -> Lanes,
    ) -> Sums {
        let none = [0f32; LANES];
        let mut sums = Sums { l: none, ll: none, lx: none, error: none };
        let mut inverses = none;
        for k in 0..LANES {
            inverses[k] = inverse(steps[k]);
        }
        for (i, &x) in self.x.iter().enumerate() {
            let w = self.weight(i);
            // Short loops, each of which becomes a few instructions.
            let (mut y, mut t) = (none, none);
            for k in 0..LANES {
                y[k] = x - offsets[k];
                t[k] = y[k] * inverses[k] - shifts[k];
            }
            let mut l = nearest(&t);
            for k in 0..LANES {
                l[k] += shifts[k];
            }
            for k in 0..LANES {
                let wl = w * l[k];
                sums.l[k] += wl;
                sums.ll[k] += wl * l[k];
                sums.lx[k] += wl * x;
            }
            for k in 0..LANES {
                let error = y[k] - steps[k] * l[k];
                sums.error[k] += w * error * error;
            }
        }
        sums
    }

    /// The best step where there is nothing else to choose; of both signs where the levels are not
    /// the same on both sides of zero.
    #[inline(always)]
    fn search_scale(&self, low: f32, high: f32, shift: f32) -> Candidates {
        let extreme = if -low > high { low } else { high };
        let (least, most) = match self.levels {
            Levels::Table { levels, .. } => (levels[0], levels[levels.len() - 1]),
            Levels::Integers { low, high } => (low + shift, high + shift),
            Levels::Float8 => (-448.0, 448.0),
        };
        let signed = self.spec.scale != ScaleType::PowerOfTwo && self.spec.scale != ScaleType::E4m3;
        let fineness = if most <= 1.5 {
            0
        } else if most <= 3.5 {
            1
        } else {
            2
        };
        let mut steps = [0f32; LANES];
        for k in 0..8 {
            let factor = FACTORS[fineness][k] * extreme;
            steps[k] = factor / least;
            steps[k + 8] = factor / most;
            if !signed || least == -most {
                // The second eight lie between the first.
                steps[k] = factor.abs() / most;
                steps[k + 8] = steps[k] * 1.04;
            }
        }
        let (shifts, offsets) = ([shift; LANES], [NO_OFFSET; LANES]);
        for _ in 0..self.rounds {
            let sums = self.sums(&steps, &shifts, &offsets);
            for k in 0..LANES {
                steps[k] = if sums.ll[k] > 0.0 { sums.lx[k] / sums.ll[k] } else { steps[k] };
            }
        }
        for step in &mut steps {
            *step = self.rounded(*step);
        }
        Candidates { steps, shifts, offsets }
    }

    /// The best step and zero point (`integral`) or minimum.
    #[inline(always)]
    fn search_scale_and_minimum(&self, low: f32, high: f32, integral: bool) -> Candidates {
        let Levels::Integers { high: top, .. } = self.levels else {
            return Candidates::all(self.span(low, high));
        };
        let (low, high) = if integral { (low.min(0.0), high.max(0.0)) } else { (low, high) };
        if high == low {
            return Candidates::all(self.span(low, high));
        }
        let cut = if *top <= 3.0 {
            1.0
        } else if *top <= 7.0 {
            0.6
        } else {
            0.3
        };
        let (mut steps, mut offsets, none) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
        for k in 0..LANES {
            let (bottom, peak) = (CUTS[k].0 * cut, CUTS[k].1 * cut);
            offsets[k] = low + (high - low) * bottom;
            steps[k] = (high - low) * (1.0 - bottom - peak) / top;
        }
        let (mut w, mut wx) = (0f32, 0f32);
        for (i, &x) in self.x.iter().enumerate() {
            w += self.weight(i);
            wx += self.weight(i) * x;
        }
        for _ in 0..self.rounds {
            let sums = self.sums(&steps, &none, &offsets);
            for k in 0..LANES {
                let determinant = w * sums.ll[k] - sums.l[k] * sums.l[k];
                if determinant > 1e-6 * w * sums.ll[k] {
                    steps[k] = (w * sums.lx[k] - sums.l[k] * wx) / determinant;
                    offsets[k] = (sums.ll[k] * wx - sums.l[k] * sums.lx[k]) / determinant;
                }
            }
        }
        if !integral {
            for k in 0..LANES {
                steps[k] = self.rounded(steps[k]);
                offsets[k] = self.rounded_minimum(offsets[k]);
            }
            return Candidates { steps, shifts: none, offsets };
        }
        // The zero point is what the minimum rounds to; then the scale follows.
        let mut shifts = none;
        for k in 0..LANES {
            shifts[k] = -nearest_integer(-offsets[k] * inverse(steps[k]), 0.0, *top);
        }
        let offsets = [NO_OFFSET; LANES];
        for _ in 0..self.rounds {
            let sums = self.sums(&steps, &shifts, &offsets);
            for k in 0..LANES {
                steps[k] = if sums.ll[k] > 0.0 { sums.lx[k] / sums.ll[k] } else { steps[k] };
            }
        }
        for step in &mut steps {
            *step = self.rounded(*step);
        }
        Candidates { steps, shifts, offsets }
    }
}

/// A scale as it will be stored, never zero where it was not.
#[inline(always)]
pub(super) fn stored(spec: &GroupSpec, unit: f32, scale: f32) -> f32 {
    match spec.scale {
        ScaleType::F32 => scale,
        ScaleType::F16 => {
            let size = scale.abs().clamp(f16::MIN_POSITIVE_SUBNORMAL.to_f32(), 65504.0);
            half(size).copysign(scale)
        }
        ScaleType::Bf16 => bf16::from_f32(scale).to_f32(),
        ScaleType::PowerOfTwo => {
            // The nearest in the logarithm: √2 is the middle of an octave.
            let bits = (scale.abs() * std::f32::consts::SQRT_2).to_bits() & 0x7f80_0000;
            f32::from_bits(bits).max(f32::MIN_POSITIVE)
        }
        ScaleType::E4m3 => {
            let code = bevel_base::pack::to_e4m3(scale.abs() / unit).max(1);
            bevel_base::pack::e4m3(code) * unit
        }
    }
}

/// The half-precision number nearest to `size`, which is one of their positive range. Unlike the
/// conversion there and back, which is a call, this is done for all candidates at once.
#[inline(always)]
fn half(size: f32) -> f32 {
    let bits = size.to_bits();
    let normal = f32::from_bits((bits + 0xfff + ((bits >> 13) & 1)) & !0x1fff);
    // Singles around 0.75 are 2⁻²⁴ apart, as subnormal halves are.
    let subnormal = (size + 0.75) - 0.75;
    if size < f16::MIN_POSITIVE.to_f32() { subnormal } else { normal }
}

/// A minimum as it will be stored.
#[inline(always)]
pub(super) fn stored_minimum(spec: &GroupSpec, minimum: f32) -> f32 {
    match spec.scale {
        ScaleType::F16 => f16::from_f32(minimum.clamp(-65504.0, 65504.0)).to_f32(),
        ScaleType::Bf16 => bf16::from_f32(minimum).to_f32(),
        _ => minimum,
    }
}

/// The smallest and the largest value.
#[inline(always)]
fn range(x: &[f32]) -> [f32; 2] {
    let (mut low, mut high) = ([x[0]; LANES], [x[0]; LANES]);
    for x in x.chunks(LANES) {
        for (k, &x) in x.iter().enumerate() {
            low[k] = if x < low[k] { x } else { low[k] };
            high[k] = if x > high[k] { x } else { high[k] };
        }
    }
    let least = low.iter().fold(x[0], |a, &b| if b < a { b } else { a });
    [least, high.iter().fold(x[0], |a, &b| if b > a { b } else { a })]
}

/// The first lane with the least number.
#[inline(always)]
pub(super) fn least_lane(numbers: &Lanes) -> usize {
    let mut best = 0;
    for k in 1..LANES {
        // Also where the first is not a number.
        if numbers[k] < numbers[best] || numbers[best].is_nan() {
            best = k;
        }
    }
    best
}

/// `x^exponent` for x ≥ 0 within 1e-5 of itself, without branches or tables.
#[inline(always)]
fn power(x: f32, exponent: f32) -> f32 {
    let bits = x.to_bits();
    let octave = (bits >> 23) as i32 - 127;
    // log₂ m = 2 / ln 2 · artanh((m − 1) / (m + 1)) for 1 ≤ m < 2.
    let m = f32::from_bits(bits & 0x007f_ffff | 0x3f80_0000);
    let s = (m - 1.0) / (m + 1.0);
    let ss = s * s;
    let series = 1.0 + ss * (1.0 / 3.0 + ss * (0.2 + ss * (1.0 / 7.0 + ss * (1.0 / 9.0))));
    let y = exponent * (octave as f32 + 2.0 * std::f32::consts::LOG2_E * s * series);
    let y = if y > -126.0 { y } else { -126.0 };
    let y = if y < 127.0 { y } else { 127.0 };
    let n = nearest_integer(y, -126.0, 127.0);
    // 2^f for |f| ≤ 1/2 by the series of eˣ.
    let f = (y - n) * std::f32::consts::LN_2;
    let e = 1.0 + f * (1.0 + f * (0.5 + f * (1.0 / 6.0 + f * (1.0 / 24.0 + f / 120.0))));
    let power = e * f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x == 0.0 { 0.0 } else { power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_those_of_the_conversion() {
        let largest = 65504f32.to_bits();
        let smallest = f16::MIN_POSITIVE_SUBNORMAL.to_f32().to_bits();
        // Every rounding position, between and on the numbers.
        for bits in (smallest..=largest).step_by(0x3ff) {
            for bits in [bits, bits & !0x1fff, bits & !0x1fff | 0x1000] {
                let size = f32::from_bits(bits.clamp(smallest, largest));
                assert_eq!(half(size), f16::from_f32(size).to_f32(), "{size:e}");
            }
        }
    }

    #[test]
    fn powers_are_close() {
        for exponent in [0.5f32, 1.0, 2.0, 2.4] {
            assert_eq!(power(0.0, exponent), 0.0);
            for i in 1..2000 {
                let x = (i as f32 * 0.013).exp2() * 1e-5;
                let exact = f64::from(x).powf(f64::from(exponent));
                let error = (f64::from(power(x, exponent)) / exact - 1.0).abs();
                assert!(error < 1e-5, "{x}^{exponent}: {error}");
            }
        }
    }
}
