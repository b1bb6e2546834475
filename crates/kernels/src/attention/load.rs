//! Cached keys and values as vectors of f32.

use half::{bf16, f16};

use super::lanes::Lanes;
use crate::BLOCK_TOKENS;
use crate::kv::{GROUP, Plain, Q4, Q4Group, Q8, Q8Group, Store};

/// A layout that vectors are loaded from. They hold what [`Store::keys`] and [`Store::values`] unpack,
/// bit for bit.
///
/// # Safety
/// Functions have the contract of [`Lanes`]; `tile` points to a whole tile of keys or of values, and
/// what is asked for lies inside.
pub(super) trait Load: Store {
    /// Keys of this many values share a vector of scales.
    const GROUP: usize;
    /// True where there is nothing to convert.
    const PLAIN: bool = false;
    /// Micro tiles of rows up to which a tile is converted as it is read, anew for each; more of them
    /// read a copy in f32.
    const DIRECT: usize;

    /// Scales of a group's keys at tokens from `token` on.
    unsafe fn key_scales<L: Lanes>(tile: *const u8, group: usize, token: usize) -> L::Vector;
    /// Value `i` of the keys of tokens from `token` on.
    unsafe fn key<L: Lanes>(
        tile: *const u8,
        i: usize,
        token: usize,
        scales: L::Vector,
    ) -> L::Vector;
    /// Values `i`, which is even, and `i` + 1.
    unsafe fn two_keys<L: Lanes>(
        tile: *const u8,
        i: usize,
        token: usize,
        scales: L::Vector,
    ) -> [L::Vector; 2];
    /// Scales of the 16 tokens' values in the group of `column`.
    unsafe fn value_scales<L: Lanes>(tile: *const u8, column: usize, to: &mut [f32; BLOCK_TOKENS]);
    /// A token's values from `column` on, of rows of `value_row`.
    unsafe fn value<L: Lanes>(
        tile: *const u8,
        token: usize,
        column: usize,
        value_row: usize,
        scale: f32,
    ) -> L::Vector;
}

/// An element of which vectors are loaded.
trait LoadElement {
    const PLAIN: bool = false;
    /// # Safety
    /// That of [`Lanes`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L::Vector;
}

impl LoadElement for f32 {
    const PLAIN: bool = true;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe { L::load(from) }
    }
}

impl LoadElement for f16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe { L::load_f16(from) }
    }
}

impl LoadElement for bf16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe { L::load_bf16(from) }
    }
}

impl<E: LoadElement> Load for Plain<E>
where
    Plain<E>: Store,
{
    const GROUP: usize = usize::MAX;
    const PLAIN: bool = E::PLAIN;
    const DIRECT: usize = 2;

    #[inline(always)]
    unsafe fn key_scales<L: Lanes>(_: *const u8, _: usize, _: usize) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe { L::splat(1.0) }
    }

    #[inline(always)]
    unsafe fn key<L: Lanes>(tile: *const u8, i: usize, token: usize, _: L::Vector) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe { E::load::<L>(tile.cast::<E>().add(i * BLOCK_TOKENS + token)) }
    }

    #[inline(always)]
    unsafe fn two_keys<L: Lanes>(
        tile: *const u8,
        i: usize,
        token: usize,
        scales: L::Vector,
    ) -> [L::Vector; 2] {
        // SAFETY: this function's contract.
        unsafe {
            [Self::key::<L>(tile, i, token, scales), Self::key::<L>(tile, i + 1, token, scales)]
        }
    }

    #[inline(always)]
    unsafe fn value_scales<L: Lanes>(_: *const u8, _: usize, _: &mut [f32; BLOCK_TOKENS]) {}

    #[inline(always)]
    unsafe fn value<L: Lanes>(
        tile: *const u8,
        token: usize,
        column: usize,
        value_row: usize,
        _: f32,
    ) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe { E::load::<L>(tile.cast::<E>().add(token * value_row + column)) }
    }
}

/// # Safety
/// That of [`Lanes`]; `scales` are of 16 tokens.
#[inline(always)]
unsafe fn all_scales<L: Lanes>(scales: *const f16, to: &mut [f32; BLOCK_TOKENS]) {
    for token in (0..BLOCK_TOKENS).step_by(L::COUNT) {
        // SAFETY: this function's contract.
        unsafe { L::store(to.as_mut_ptr().add(token), L::load_f16(scales.add(token))) };
    }
}

impl Load for Q8 {
    const GROUP: usize = GROUP;
    const DIRECT: usize = 1;

    #[inline(always)]
    unsafe fn key_scales<L: Lanes>(tile: *const u8, group: usize, token: usize) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe {
            let group = tile.cast::<Q8Group>().add(group);
            L::load_f16((&raw const (*group).scales).cast::<f16>().add(token))
        }
    }

    #[inline(always)]
    unsafe fn key<L: Lanes>(
        tile: *const u8,
        i: usize,
        token: usize,
        scales: L::Vector,
    ) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe {
            let group = tile.cast::<Q8Group>().add(i / GROUP);
            let codes = (&raw const (*group).codes).cast::<i8>();
            L::mul(L::load_i8(codes.add(i % GROUP * BLOCK_TOKENS + token)), scales)
        }
    }

    #[inline(always)]
    unsafe fn two_keys<L: Lanes>(
        tile: *const u8,
        i: usize,
        token: usize,
        scales: L::Vector,
    ) -> [L::Vector; 2] {
        // SAFETY: this function's contract.
        unsafe {
            [Self::key::<L>(tile, i, token, scales), Self::key::<L>(tile, i + 1, token, scales)]
        }
    }

    #[inline(always)]
    unsafe fn value_scales<L: Lanes>(tile: *const u8, column: usize, to: &mut [f32; BLOCK_TOKENS]) {
        // SAFETY: this function's contract.
        unsafe {
            let group = tile.cast::<Q8Group>().add(column / GROUP);
            all_scales::<L>((&raw const (*group).scales).cast(), to);
        }
    }

    #[inline(always)]
    unsafe fn value<L: Lanes>(
        tile: *const u8,
        token: usize,
        column: usize,
        _: usize,
        scale: f32,
    ) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe {
            let group = tile.cast::<Q8Group>().add(column / GROUP);
            let codes = (&raw const (*group).codes).cast::<i8>();
            L::mul(L::load_i8(codes.add(token * GROUP + column % GROUP)), L::splat(scale))
        }
    }
}

impl Load for Q4 {
    const GROUP: usize = GROUP;
    const DIRECT: usize = 1;

    #[inline(always)]
    unsafe fn key_scales<L: Lanes>(tile: *const u8, group: usize, token: usize) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe {
            let group = tile.cast::<Q4Group>().add(group);
            L::load_f16((&raw const (*group).scales).cast::<f16>().add(token))
        }
    }

    #[inline(always)]
    unsafe fn key<L: Lanes>(
        tile: *const u8,
        i: usize,
        token: usize,
        scales: L::Vector,
    ) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe { Self::two_keys::<L>(tile, i & !1, token, scales)[i & 1] }
    }

    #[inline(always)]
    unsafe fn two_keys<L: Lanes>(
        tile: *const u8,
        i: usize,
        token: usize,
        scales: L::Vector,
    ) -> [L::Vector; 2] {
        // SAFETY: this function's contract.
        unsafe {
            let group = tile.cast::<Q4Group>().add(i / GROUP);
            let codes = (&raw const (*group).codes).cast::<u8>();
            let row = codes.add(i % GROUP / 2 * BLOCK_TOKENS + token);
            [L::mul(L::load_low(row), scales), L::mul(L::load_high(row), scales)]
        }
    }

    #[inline(always)]
    unsafe fn value_scales<L: Lanes>(tile: *const u8, column: usize, to: &mut [f32; BLOCK_TOKENS]) {
        // SAFETY: this function's contract.
        unsafe {
            let group = tile.cast::<Q4Group>().add(column / GROUP);
            all_scales::<L>((&raw const (*group).scales).cast(), to);
        }
    }

    #[inline(always)]
    unsafe fn value<L: Lanes>(
        tile: *const u8,
        token: usize,
        column: usize,
        _: usize,
        scale: f32,
    ) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe {
            let group = tile.cast::<Q4Group>().add(column / GROUP);
            let codes = (&raw const (*group).codes).cast::<u8>();
            let at = codes.add(token * GROUP / 2 + column % (GROUP / 2));
            let high = column % GROUP >= GROUP / 2;
            let codes = if high { L::load_high(at) } else { L::load_low(at) };
            L::mul(codes, L::splat(scale))
        }
    }
}
