//! Packs rows of a file and says how long it took: `benches/encode.py`'s side of a comparison.
//!
//! ```text
//! encode TYPE COLUMNS ROWS.f32 WEIGHTS.f32 OUT
//! ```
//!
//! `WEIGHTS.f32` holds the importance of each column, or of each value, or is `-`. Prints the processor
//! time of this thread in seconds.

use std::{env, error::Error, fs};

use bevel_base::{DType, pack};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [dtype, columns, rows, weights, out] = &args[..] else {
        return Err("expected TYPE COLUMNS ROWS.f32 WEIGHTS.f32 OUT".into());
    };
    let (dtype, columns): (DType, usize) = (dtype.parse()?, columns.parse()?);
    let rows = floats(rows)?;
    let weights = if weights == "-" { None } else { Some(floats(weights)?) };
    let row_bytes = dtype.row_bytes(columns)?;
    let mut packed = vec![0; rows.len() / columns * row_bytes];
    let importance = |row: usize| {
        weights.as_deref().map(|weights| &weights[row * columns % weights.len()..][..columns])
    };
    // The first row once more than the clock sees: what is made at first use is made here.
    pack::quantize(dtype, &rows[..columns], importance(0), &mut packed[..row_bytes])?;
    let start = processor_time();
    for (i, packed) in packed.chunks_exact_mut(row_bytes).enumerate() {
        pack::quantize(dtype, &rows[i * columns..][..columns], importance(i), packed)?;
    }
    println!("{}", processor_time() - start);
    fs::write(out, packed)?;
    Ok(())
}

fn floats(path: &str) -> Result<Vec<f32>, Box<dyn Error>> {
    Ok(fs::read(path)?.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

/// Seconds this thread has run.
fn processor_time() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
