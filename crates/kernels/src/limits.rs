//! What the machine could do at most, measured in a fraction of a second, to hold other figures against
//! (the roofline of Williams, Waterman and Patterson, 2009).

use std::hint::black_box;
use std::time::Instant;

use bevel_base::SlabBytes;

#[cfg(target_arch = "x86_64")]
use crate::isa::has_vex_vnni;
use crate::matmul::Factors;
#[cfg(target_arch = "x86_64")]
use crate::matmul::bytes::{Evex, Vex};
use crate::{Cpu, Isa, Wide, run_wide};

/// Steps of all chains: a millisecond or so.
const STEPS: u32 = 1 << 18;

/// Measurements, of which the fastest counts.
const RUNS: usize = 6;

/// Bytes that are read: more than a cache holds.
const MEMORY: usize = 256 << 20;

/// Bytes in a second that all threads together read from memory.
pub fn read_bandwidth(cpu: &Cpu) -> f64 {
    // Memory of the kind that weights lie in.
    let mut memory = SlabBytes::zeroed(MEMORY);
    memory.fill(1);
    let words: &[u64] = bytemuck::cast_slice(&memory);
    let threads = cpu.pool().threads();
    let part = words.len().div_ceil(threads);
    let seconds = fastest(|| {
        cpu.pool().run(threads, |thread| {
            let words = words.chunks(part).nth(thread).unwrap_or_default();
            black_box(run_wide(cpu.isa(), Sum(words)));
        });
    });
    MEMORY as f64 / seconds
}

struct Sum<'a>(&'a [u64]);

impl Wide for Sum<'_> {
    type Output = [u64; 64];

    #[inline(always)]
    fn run(self) -> [u64; 64] {
        let mut sums = [0_u64; 64];
        let (lines, _) = self.0.as_chunks::<64>();
        for line in lines {
            for (sum, word) in sums.iter_mut().zip(line) {
                *sum = sum.wrapping_add(*word);
            }
        }
        sums
    }
}

/// Multiplications and additions of single-precision numbers in a second on all threads, each being an
/// operation of its own, on numbers that stay in registers.
pub fn float_peak(cpu: &Cpu) -> f64 {
    match cpu.isa() {
        Isa::Avx512 | Isa::Avx512Bf16 => chains_peak::<{ 16 * REGISTERS }>(cpu),
        Isa::Avx2 | Isa::AvxVnni => chains_peak::<{ 8 * REGISTERS }>(cpu),
        _ => chains_peak::<{ 4 * REGISTERS }>(cpu),
    }
}

/// Multiplications and additions of some numbers in a second on all threads, by the instructions that the
/// kernels use for them.
pub fn peak(cpu: &Cpu, factors: Factors) -> f64 {
    match factors {
        Factors::Bytes => byte_peak(cpu),
        Factors::F32 => float_peak(cpu),
        Factors::Bf16 => bf16_peak(cpu),
    }
}

/// Those of bf16 numbers, of which a register holds twice as many; those of f32 where the processor has no
/// such products.
pub fn bf16_peak(cpu: &Cpu) -> f64 {
    match cpu.isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => {
            let threads = cpu.pool().threads();
            let seconds = fastest(|| {
                cpu.pool().run(threads, |_| {
                    // SAFETY: `Cpu` holds an instruction set only where the processor has it.
                    black_box(unsafe { x86::bf16(STEPS) });
                });
            });
            2.0 * (threads * 32 * REGISTERS) as f64 * f64::from(STEPS) / seconds
        }
        _ => float_peak(cpu),
    }
}

/// True where AVX-512's products of bf16 numbers are faster than those of f32, by a third at least so that one
/// machine always finds the same.
pub(crate) fn bf16_products_pay() -> bool {
    static PAY: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    #[cfg(target_arch = "x86_64")]
    let measure = || {
        const SOME: u32 = STEPS / 32;
        // SAFETY: asked only where the processor has both.
        let [f32, bf16] = [|| unsafe { x86::f32(SOME) }, || unsafe { x86::bf16(SOME) }]
            .map(|chains: fn() -> f32| fastest(|| _ = black_box(chains())));
        2.0 * f32 > 1.33 * bf16
    };
    #[cfg(not(target_arch = "x86_64"))]
    let measure = || false;
    *PAY.get_or_init(measure)
}

fn chains_peak<const N: usize>(cpu: &Cpu) -> f64 {
    let threads = cpu.pool().threads();
    let seconds = fastest(|| {
        cpu.pool().run(threads, |_| {
            black_box(run_wide(cpu.isa(), Chains::<N>));
        });
    });
    2.0 * (threads * N) as f64 * f64::from(STEPS) / seconds
}

/// `N` multiplications and additions in a row that do not wait for each other.
struct Chains<const N: usize>;

impl<const N: usize> Wide for Chains<N> {
    type Output = [f32; N];

    #[inline(always)]
    fn run(self) -> [f32; N] {
        let mut sums = [0.5f32; N];
        let (a, b) = (black_box(0.999f32), black_box(0.001f32));
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = sum.mul_add(a, b);
            }
        }
        sums
    }
}

/// The same of signed bytes with unsigned ones, added up in 32 bits, by the instructions that the
/// kernels multiply integer weights with.
pub fn byte_peak(cpu: &Cpu) -> f64 {
    let threads = cpu.pool().threads();
    let (products, chains): (usize, fn() -> i32) = match cpu.isa() {
        // SAFETY: `Cpu` holds an instruction set only where the processor has it.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => (64 * REGISTERS, || unsafe { x86::avx512() }),
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni if has_vex_vnni() => (32 * REGISTERS, || unsafe { x86::fours::<Vex>() }),
        // SAFETY: as above; where one encoding is missing the other is there.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => (32 * REGISTERS, || unsafe { x86::fours::<Evex>() }),
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => (32 * REGISTERS, || unsafe { x86::avx2() }),
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => (8 * REGISTERS, || unsafe { aarch64::widening() }),
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot => (16 * REGISTERS, || unsafe { aarch64::dot() }),
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm => (32 * REGISTERS, || unsafe { aarch64::i8mm() }),
        _ => (PORTABLE, scalar),
    };
    let seconds = fastest(|| {
        cpu.pool().run(threads, |_| {
            black_box(chains());
        });
    });
    2.0 * (threads * products) as f64 * f64::from(STEPS) / seconds
}

/// Registers of sums that do not wait for each other: they fit in the sixteen that the smallest set has.
const REGISTERS: usize = 12;

/// Products of a step in portable code, which compilers make short vectors of.
const PORTABLE: usize = 64;

fn scalar() -> i32 {
    let mut sums = [0_i32; PORTABLE];
    for _ in 0..STEPS {
        let (a, b) = black_box(([1_u8; PORTABLE], [2_i8; PORTABLE]));
        for (sum, (a, b)) in sums.iter_mut().zip(a.into_iter().zip(b)) {
            *sum = sum.wrapping_add(i32::from(a) * i32::from(b));
        }
    }
    sums.iter().fold(0, |all, sum| all ^ sum)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{REGISTERS, STEPS};
    use crate::matmul::bytes::Bytes;

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn avx512() -> i32 {
        let mut sums = [_mm512_setzero_si512(); REGISTERS];
        let (a, b) = black_box((_mm512_set1_epi8(1), _mm512_set1_epi8(2)));
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        let all = sums.into_iter().fold(a, |all, sum| _mm512_xor_si512(all, sum));
        _mm512_reduce_add_epi32(all)
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn f32(steps: u32) -> f32 {
        let mut sums = [_mm512_setzero_ps(); REGISTERS];
        let (a, b) = black_box((_mm512_set1_ps(0.5), _mm512_set1_ps(0.25)));
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        _mm512_reduce_add_ps(sums.into_iter().fold(a, |all, sum| _mm512_add_ps(all, sum)))
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn bf16(steps: u32) -> f32 {
        let mut sums = [_mm512_setzero_ps(); REGISTERS];
        let half = black_box(_mm512_set1_ps(0.5));
        let a = _mm512_cvtne2ps_pbh(half, half);
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, a);
            }
        }
        _mm512_reduce_add_ps(sums.into_iter().fold(half, |all, sum| _mm512_add_ps(all, sum)))
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn fours<B: Bytes>() -> i32 {
        let mut sums = [_mm256_setzero_si256(); REGISTERS];
        let (a, b) = black_box((_mm256_set1_epi8(1), _mm256_set1_epi8(2)));
        for _ in 0..STEPS {
            for sum in &mut sums {
                // SAFETY: as for the instruction set.
                *sum = unsafe { B::fours(*sum, a, b) };
            }
        }
        let all = sums.into_iter().fold(a, |all, sum| _mm256_xor_si256(all, sum));
        _mm256_extract_epi32::<0>(all)
    }

    /// Four products are added up in 16 bits before they are widened, as the kernels do it. Factors
    /// depend on sums, or the compiler would multiply once.
    #[target_feature(enable = "avx2")]
    pub(super) fn avx2() -> i32 {
        let mut sums = [_mm256_setzero_si256(); REGISTERS];
        let (a, b) = black_box((_mm256_set1_epi8(1), _mm256_set1_epi8(2)));
        for step in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(*sum, b));
            }
            if step % 4 == 0 {
                for sum in &mut sums {
                    *sum = _mm256_madd_epi16(*sum, a);
                }
            }
        }
        let all = sums.into_iter().fold(a, |all, sum| _mm256_xor_si256(all, sum));
        _mm256_extract_epi32::<0>(all)
    }
}

#[cfg(target_arch = "aarch64")]
mod aarch64 {
    use std::arch::aarch64::*;
    use std::hint::black_box;

    use super::{REGISTERS, STEPS};
    use crate::neon::{sdot, smmla};

    #[target_feature(enable = "neon,dotprod,i8mm")]
    pub(super) fn i8mm() -> i32 {
        let mut sums = [vdupq_n_s32(0); REGISTERS];
        let (a, b) = black_box((vdupq_n_s8(1), vdupq_n_s8(2)));
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = smmla(*sum, a, b);
            }
        }
        sums.into_iter().fold(0, |all, sum| all ^ vaddvq_s32(sum))
    }

    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn dot() -> i32 {
        let mut sums = [vdupq_n_s32(0); REGISTERS];
        let (a, b) = black_box((vdupq_n_s8(1), vdupq_n_s8(2)));
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = sdot::<0>(*sum, a, b);
            }
        }
        sums.into_iter().fold(0, |all, sum| all ^ vaddvq_s32(sum))
    }

    /// Four products are added up in 16 bits before they are widened, as the kernels do it. Factors
    /// depend on sums, or the compiler would multiply once.
    #[target_feature(enable = "neon")]
    pub(super) fn widening() -> i32 {
        let mut sums = [vdupq_n_s16(0); REGISTERS];
        let b = black_box(vdup_n_s8(2));
        for step in 0..STEPS {
            for sum in &mut sums {
                *sum = vmlal_s8(*sum, vreinterpret_s8_s16(vget_low_s16(*sum)), b);
            }
            if step % 4 == 0 {
                for sum in &mut sums {
                    let wide = vpadalq_s16(vreinterpretq_s32_s16(*sum), *sum);
                    *sum = vreinterpretq_s16_s32(wide);
                }
            }
        }
        sums.into_iter().fold(0, |all, sum| all ^ i32::from(vaddvq_s16(sum)))
    }
}

/// Seconds of the fastest of some runs.
fn fastest(mut run: impl FnMut()) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        run();
        least = least.min(start.elapsed().as_secs_f64());
    }
    least.max(1e-9)
}
