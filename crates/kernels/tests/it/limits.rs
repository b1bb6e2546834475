//! What the machine could do: measured figures that other measurements are held against.

use std::time::Instant;

use bevel_kernels::{Cpu, limits};

#[test]
fn no_copy_reads_faster_than_memory_gives() {
    let cpu = Cpu::new(1).unwrap();
    let bandwidth = limits::read_bandwidth(&cpu);
    let (from, mut to) = (vec![1_u8; 256 << 20], vec![0_u8; 256 << 20]);
    to.copy_from_slice(&from);
    let start = Instant::now();
    to.copy_from_slice(&from);
    let copied = to.len() as f64 / start.elapsed().as_secs_f64();
    assert!(copied < bandwidth * 1.5, "{copied:.3e} of {bandwidth:.3e} bytes per second");
    assert!(bandwidth > 5e8, "{bandwidth:.3e} bytes per second");
}

#[test]
fn wider_registers_multiply_more() {
    let peaks = |isa| {
        let cpu = Cpu::with_isa(1, isa);
        (limits::byte_peak(&cpu), limits::float_peak(&cpu))
    };
    let all: Vec<_> =
        bevel_kernels::Isa::available().into_iter().map(|isa| (isa, peaks(isa))).collect();
    for (isa, (bytes, floats)) in &all {
        assert!(*bytes > 1e8 && *floats > 1e8, "{isa}: {bytes:.3e}, {floats:.3e}");
    }
    let (first, last) = (all[0].1, all[all.len() - 1].1);
    assert!(all.len() == 1 || last.0 > 2.0 * first.0, "{all:?}");
}
