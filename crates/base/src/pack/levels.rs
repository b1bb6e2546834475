//! The level sets of the symmetric layouts, and the fast way to the nearest level.

/// The values that codes of a layout stand for, before scaling.
pub(crate) trait Levels {
    /// The level of largest magnitude, where a block's largest value goes.
    const FAR: f32;
    /// The extreme level on the other side of zero.
    const NEAR: f32;
    /// How many steps of the scale lie between zero and [`Levels::FAR`]: the fineness of the set.
    const STEPS: f32;

    /// True where levels lie unevenly, so that one least-squares step from the starting points does
    /// not come near enough.
    const UNEVEN: bool = false;

    /// The level nearest to `t`.
    fn snap(t: f32) -> f32;
}

/// Rounds to the nearest integer, ties to even, where `|t| < 2^22`: the sum leaves no bits for the
/// fraction.
#[inline(always)]
pub(crate) fn round(t: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (t + MAGIC) - MAGIC
}

/// A whole number from 0 to 255 as a byte: its bits, once the sum leaves none for the fraction.
#[inline(always)]
pub(crate) fn code(number: f32) -> u8 {
    (number + 8_388_608.0).to_bits() as u8
}

/// All integers from `LOW` to `HIGH`.
pub(crate) struct Integers<const LOW: i32, const HIGH: i32>;

impl<const LOW: i32, const HIGH: i32> Levels for Integers<LOW, HIGH> {
    const FAR: f32 = if -LOW > HIGH { LOW as f32 } else { HIGH as f32 };
    const NEAR: f32 = if -LOW > HIGH { HIGH as f32 } else { LOW as f32 };
    const STEPS: f32 = Self::FAR.abs();

    #[inline(always)]
    fn snap(t: f32) -> f32 {
        round(t.clamp(LOW as f32, HIGH as f32))
    }
}

/// The levels of IQ4_NL and IQ4_XS.
pub const IQ4_LEVELS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The code of [`IQ4_LEVELS`] nearest to the index minus 127.
pub(crate) const IQ4_CODES: [u8; 256] = {
    let mut codes = [0; 256];
    let mut i = 0;
    while i < 256 {
        codes[i] = iq4_code(2 * (i as i32 - 127));
        i += 1;
    }
    codes
};

/// The code of the level nearest to `twice / 2`, the upper one halfway.
const fn iq4_code(twice: i32) -> u8 {
    let mut code = 0;
    while code < 15 && IQ4_LEVELS[code] as i32 + IQ4_LEVELS[code + 1] as i32 <= twice {
        code += 1;
    }
    code as u8
}

/// [`IQ4_LEVELS`].
pub(crate) struct Iq4;

/// The level nearest to every `t` with `floor(2t) = index - 254`: sums of two levels are integers,
/// so no boundary lies inside such an interval.
const IQ4_NEAREST: [f32; 512] = {
    let mut levels = [0.0; 512];
    let mut i = 0;
    while i < 512 {
        levels[i] = IQ4_LEVELS[iq4_code(i as i32 - 254) as usize] as f32;
        i += 1;
    }
    levels
};

impl Levels for Iq4 {
    const FAR: f32 = -127.0;
    const NEAR: f32 = 113.0;
    const STEPS: f32 = 8.0;
    const UNEVEN: bool = true;

    #[inline(always)]
    fn snap(t: f32) -> f32 {
        let twice = t.clamp(-127.0, 113.0) * 2.0 + 254.0;
        // SAFETY: between 0 and 480; callers keep `t` from being a NaN.
        let index: i32 = unsafe { twice.to_int_unchecked() };
        IQ4_NEAREST[index as usize & 511]
    }
}

/// The levels of MXFP4, doubled.
pub(crate) struct E2m1;

const E2M1_NEAREST: [f32; 32] = {
    let mut levels = [12.0; 32];
    let mut i = 0;
    while i < 20 {
        // `i` is `floor(2t)`.
        levels[i] = match i {
            0 => 0.0,
            1 | 2 => 1.0,
            3 | 4 => 2.0,
            5 | 6 => 3.0,
            7..=9 => 4.0,
            10..=13 => 6.0,
            _ => 8.0,
        };
        i += 1;
    }
    levels
};

impl Levels for E2m1 {
    const FAR: f32 = -12.0;
    const NEAR: f32 = 12.0;
    const STEPS: f32 = 8.0;

    #[inline(always)]
    fn snap(t: f32) -> f32 {
        let twice = t.clamp(-12.0, 12.0).abs() * 2.0;
        // SAFETY: between 0 and 24; callers keep `t` from being a NaN.
        let index: i32 = unsafe { twice.to_int_unchecked() };
        E2M1_NEAREST[index as usize & 31].copysign(t)
    }
}
