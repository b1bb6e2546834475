//! The choice of an instruction set.

use bevel_kernels::Isa;

#[test]
fn the_named_set_or_else_the_fastest_is_chosen() {
    let fastest = *Isa::available().last().unwrap();
    let expected = std::env::var("BEVEL_ISA").unwrap_or(fastest.to_string());
    assert_eq!(Isa::detect().unwrap().to_string(), expected);
}

#[test]
fn every_set_has_a_name_of_its_own() {
    for isa in Isa::available() {
        assert_eq!(isa.to_string().parse(), Ok(isa));
    }
    let error = "mmx".parse::<Isa>().unwrap_err();
    for name in ["mmx", "scalar", "avx512bf16", "neoni8mm"] {
        assert!(error.contains(&format!("`{name}`")), "{error}");
    }
}
