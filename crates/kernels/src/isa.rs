use std::fmt;
use std::str::FromStr;

/// An instruction set that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Portable code: the specification of every kernel.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// [`Isa::Avx2`] with the byte products of VNNI on registers of 256 bits: AVX-VNNI, or AVX-512 VL
    /// and VNNI.
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// [`Isa::Avx512`] with BF16.
    Avx512Bf16,
    /// AArch64 with NEON, which all of them have.
    Neon,
    /// [`Isa::Neon`] with the dot products of bytes.
    NeonDot,
    /// [`Isa::NeonDot`] with the products of matrices of bytes.
    NeonI8mm,
}

impl Isa {
    /// What this processor has, slowest first. `Scalar` is always there.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut list = vec![Isa::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                list.push(Isa::Avx2);
                if has_vex_vnni()
                    || is_x86_feature_detected!("avx512vl")
                        && is_x86_feature_detected!("avx512vnni")
                {
                    list.push(Isa::AvxVnni);
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
                {
                    list.push(Isa::Avx512);
                    if is_x86_feature_detected!("avx512bf16") {
                        list.push(Isa::Avx512Bf16);
                    }
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            list.push(Isa::Neon);
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                list.push(Isa::NeonDot);
                if std::arch::is_aarch64_feature_detected!("i8mm") {
                    list.push(Isa::NeonI8mm);
                }
            }
        }
        list
    }

    /// True where products of bf16 numbers take less time than those of f32, see
    /// [`PackedMatrix::pack_bf16`](crate::PackedMatrix::pack_bf16). The first call measures it, for a
    /// millisecond: of the processors that have such instructions some run them at half the speed.
    pub fn has_bf16_products(self) -> bool {
        self == Isa::Avx512Bf16 && crate::limits::bf16_products_pay()
    }

    /// The fastest available set, or the one `BEVEL_ISA` names.
    ///
    /// # Errors
    /// A sentence where `BEVEL_ISA` names no set or one this processor lacks.
    pub fn detect() -> Result<Isa, String> {
        let available = Isa::available();
        let Ok(name) = std::env::var("BEVEL_ISA") else {
            return Ok(available[available.len() - 1]);
        };
        let isa: Isa = name.parse()?;
        if available.contains(&isa) {
            return Ok(isa);
        }
        let has: Vec<String> = available.iter().map(|isa| format!("`{isa}`")).collect();
        Err(format!("BEVEL_ISA is `{name}`, but this processor has only {}", has.join(", ")))
    }
}

/// True where the processor has AVX-VNNI, and not only the same products in AVX-512's encoding.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_vex_vnni() -> bool {
    is_x86_feature_detected!("avxvnni")
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Neon => "neon",
            Isa::NeonDot => "neondot",
            Isa::NeonI8mm => "neoni8mm",
        })
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        use Isa::{Avx2, Avx512, Avx512Bf16, AvxVnni, Neon, NeonDot, NeonI8mm, Scalar};
        [Scalar, Avx2, AvxVnni, Avx512, Avx512Bf16, Neon, NeonDot, NeonI8mm]
            .into_iter()
            .find(|isa| isa.to_string() == name)
            .ok_or_else(|| {
                let x86 = "`avx2`, `avxvnni`, `avx512` or `avx512bf16` (x86-64)";
                let arm = "`neon`, `neondot` or `neoni8mm` (AArch64)";
                format!("BEVEL_ISA is `{name}`; it takes `scalar`, {x86}, {arm}")
            })
    }
}
