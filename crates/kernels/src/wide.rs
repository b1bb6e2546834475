use crate::Isa;

/// A loop that is worth compiling for wider vectors than every processor has: what
/// [`run_wide`] runs.
///
/// Implementations mark `run` `#[inline(always)]`, and so everything it calls: what is inlined into
/// a function with a target feature is compiled for it. The compiler neither reorders additions nor
/// fuses what is not written as [`f32::mul_add`], so results do not depend on the instruction set.
pub trait Wide {
    /// What the loop results in.
    type Output;

    /// The loop.
    fn run(self) -> Self::Output;
}

/// Runs `work`, compiled for `isa`. `isa` is that of a [`Cpu`](crate::Cpu).
///
/// # Panics
/// Where this processor lacks `isa`.
pub fn run_wide<W: Wide>(isa: Isa, work: W) -> W::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => {
            assert!(is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512dq"));
            assert!(is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("fma"));
            // SAFETY: the processor has the features, checked just above; those with them have
            // AVX-512 F, AVX2 and F16C.
            unsafe { avx512(work) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => {
            assert!(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"));
            assert!(is_x86_feature_detected!("f16c"));
            // SAFETY: the processor has the features, checked just above.
            unsafe { avx2(work) }
        }
        _ => work.run(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<W: Wide>(work: W) -> W::Output {
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<W: Wide>(work: W) -> W::Output {
    work.run()
}
