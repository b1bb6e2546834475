//! One body, compiled once for each instruction set.

/// Defines `fn name(isa, arguments)`: the body is compiled without special instructions (on AArch64 that
/// is with NEON), for AVX2 and for AVX-512, and `isa` picks the version.
///
/// The compiler may vectorise a body but neither reorders its additions nor fuses them with
/// multiplications, so every version gives the same bits. Sums are therefore written over
/// [`LANES`](crate::math::LANES) partial sums.
macro_rules! for_each_isa {
    ($($(#[$attribute:meta])* $visibility:vis fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $(-> $output:ty)? $body:block)*) => {$(
        $(#[$attribute])*
        #[allow(clippy::too_many_arguments)]
        $visibility fn $name(isa: $crate::Isa, $($argument: $kind),*) $(-> $output)? {
            #[inline(always)]
            fn body($($argument: $kind),*) $(-> $output)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($argument: $kind),*) $(-> $output)? {
                body($($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512($($argument: $kind),*) $(-> $output)? {
                body($($argument),*)
            }

            match isa {
                // SAFETY: a `Cpu` carries an instruction set only where the processor has it.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Avx2 | $crate::Isa::AvxVnni => unsafe { avx2($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Avx512 | $crate::Isa::Avx512Bf16 => unsafe { avx512($($argument),*) },
                _ => body($($argument),*),
            }
        }
    )*};
}
pub(crate) use for_each_isa;
