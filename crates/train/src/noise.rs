//! Random numbers that depend on their place and on nothing else, so that a layer that is computed again, or by other
//! threads, gets the same.

use bevel_kernels::Cpu;

/// Values that a task makes.
const CHUNK: usize = 4096;

/// A number of 64 bits for a place: SplitMix64's finalizer.
pub(crate) fn mix(seed: u64, place: u64) -> u64 {
    let mut z = seed.wrapping_add(place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number in [-1, 1).
fn signed_unit(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// Dropout: each value is zero with probability `p`, and divided by 1 - p otherwise.
pub(crate) fn dropout(cpu: &Cpu, values: &mut [f32], p: f32, seed: u64) {
    // Against the upper 24 bits.
    let threshold = (f64::from(p) * f64::from(1u32 << 24)) as u64;
    let kept = 1.0 / (1.0 - p);
    cpu.pool().run_chunks(values, CHUNK, |chunk, values| {
        for (i, value) in values.iter_mut().enumerate() {
            let lost = mix(seed, (chunk * CHUNK + i) as u64) >> 40 < threshold;
            *value = if lost { 0.0 } else { *value * kept };
        }
    });
}

/// Adds to each value a number that is uniform in ±`size`.
pub(crate) fn add_uniform(cpu: &Cpu, values: &mut [f32], size: f32, seed: u64) {
    cpu.pool().run_chunks(values, CHUNK, |chunk, values| {
        for (i, value) in values.iter_mut().enumerate() {
            *value += size * signed_unit(mix(seed, (chunk * CHUNK + i) as u64));
        }
    });
}
