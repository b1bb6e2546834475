//! Products with packed weights against sums in double precision, for every weight type and every
//! instruction set of this processor.

use bevel_base::{DType, pack};
use bevel_kernels::matmul::Packing;
use bevel_kernels::{Cpu, Error, Isa, PackedMatrix, Product, Scratch, matmul, matmul_add};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed};

use crate::random::Random;

fn weight_types() -> impl Iterator<Item = DType> {
    DType::all().filter(|dtype| dtype.is_weight())
}

fn is_dense(dtype: DType) -> bool {
    !dtype.is_packed()
}

/// Offsets of a block's f16 scales.
fn scale_offsets(dtype: DType) -> &'static [usize] {
    use DType::*;
    match dtype {
        Q4_1 | Q5_1 | Q4_K | Q5_K => &[0, 2],
        Q2_K => &[80, 82],
        Q3_K => &[108],
        Q6_K => &[208],
        TQ1_0 => &[52],
        TQ2_0 => &[64],
        MXFP4 => &[],
        _ => &[0],
    }
}

/// Rows of a type: every bit of the codes at random, scales of moderate size and either sign.
fn file_rows(dtype: DType, rows: usize, cols: usize, random: &mut Random) -> Vec<u8> {
    let bytes = dtype.row_bytes(cols).unwrap() * rows;
    if is_dense(dtype) {
        let values: Vec<f32> = (0..rows * cols).map(|_| random.value()).collect();
        let mut data = vec![0; bytes];
        pack::quantize(dtype, &values, None, &mut data).unwrap();
        return data;
    }
    let mut data: Vec<u8> = (0..bytes).map(|_| random.below(256) as u8).collect();
    for block in data.chunks_exact_mut(dtype.block_bytes()) {
        for &offset in scale_offsets(dtype) {
            let scale = half::f16::from_f32(random.value() * 0.1);
            block[offset..offset + 2].copy_from_slice(&scale.to_le_bytes());
        }
        match dtype {
            DType::MXFP4 => block[0] = 120 + block[0] % 8,
            // Base 3: bytes that a quantizer writes.
            DType::TQ1_0 => {
                for byte in &mut block[..52] {
                    *byte = (u16::from(*byte % 243) * 256).div_ceil(243) as u8;
                }
            }
            _ => {}
        }
    }
    data
}

fn dequantized(dtype: DType, data: &[u8], len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    pack::dequantize(dtype, data, &mut values).unwrap();
    values
}

/// Activations rounded to int8 in groups of 32, as the kernels' contract says.
fn rounded(x: &[f32]) -> Vec<f32> {
    x.chunks(32)
        .flat_map(|group| {
            let largest = group.iter().fold(0f32, |m, v| m.max(v.abs()));
            let (factor, scale) =
                if largest < 1e-35 { (0.0, 0.0) } else { (127.0 / largest, largest / 127.0) };
            group.iter().map(move |v| (v * factor).round_ties_even() * scale)
        })
        .collect()
}

fn dot(w: &[f32], x: &[f32]) -> f64 {
    w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum()
}

fn norm(v: &[f32]) -> f64 {
    dot(v, v).sqrt()
}

fn multiply(cpu: &Cpu, weight: &PackedMatrix, x: &[f32], n: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; n * weight.rows()];
    matmul(cpu, x, n, &mut [Product { weight, out: &mut out }], &mut Scratch::new());
    out
}

/// Compares all instruction sets with sums in double precision: tightly with the numbers that the
/// kernels multiply, loosely with the activations before they were rounded to int8.
#[track_caller]
fn check(dtype: DType, rows: usize, blocks: usize, n: usize, seed: u64) {
    let mut random = Random::new(seed);
    let cols = blocks * dtype.block_len();
    let data = file_rows(dtype, rows, cols, &mut random);
    let x: Vec<f32> = (0..n * cols).map(|_| random.value()).collect();
    check_data(dtype, rows, cols, &data, &x, n);
}

#[track_caller]
fn check_data(dtype: DType, rows: usize, cols: usize, data: &[u8], x: &[f32], n: usize) {
    let w = dequantized(dtype, data, rows * cols);
    let used = if is_dense(dtype) { x.to_vec() } else { rounded(x) };
    let mut exact_elsewhere: Option<Vec<f32>> = None;
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        let weight = PackedMatrix::pack(&cpu, dtype, rows, cols, data).unwrap();
        let out = multiply(&cpu, &weight, x, n);
        let exact = multiply(&cpu, &weight.with_exact_products(), x, n);
        if !is_dense(dtype) {
            let elsewhere = exact_elsewhere.get_or_insert_with(|| exact.clone());
            assert_eq!(
                exact, *elsewhere,
                "{dtype} {isa}: exact products have the same bits everywhere"
            );
        }
        for token in 0..n {
            let x = &x[token * cols..][..cols];
            let used = &used[token * cols..][..cols];
            for row in 0..rows {
                let w = &w[row * cols..][..cols];
                let found = f64::from(out[token * rows + row]);
                let what =
                    format!("{dtype} [{rows}, {cols}] {isa}: token {token} of {n}, row {row}");
                let size = norm(w) * norm(used) + 1e-30;
                let error = (found - dot(w, used)).abs() / size;
                assert!(error <= 3e-6, "{what}: {error:e} of its size away from {}", dot(w, used));
                let error = (found - dot(w, x)).abs() / size;
                assert!(error <= 1e-2, "{what}: {error:e} of its size lost by rounding");
                let exact = f64::from(exact[token * rows + row]);
                let error = (exact - dot(w, x)).abs() / (norm(w) * norm(x) + 1e-30);
                assert!(
                    error <= 3e-6,
                    "{what}, exact: {error:e} of its size away from {}",
                    dot(w, x)
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(Config {
        cases: 12,
        rng_seed: RngSeed::Fixed(4),
        failure_persistence: None,
        ..Config::default()
    })]

    #[test]
    fn every_type_and_instruction_set_agrees_with_double_precision(
        rows in 1usize..70,
        blocks in 1usize..5,
        n in 1usize..=33,
        seed in any::<u64>(),
    ) {
        for dtype in weight_types() {
            // Plain types take rows of any length, packed ones whole blocks.
            let blocks = match dtype.block_len() {
                1 => blocks * 37 + rows % 3,
                256 => blocks.min(2),
                _ => blocks,
            };
            check(dtype, rows, blocks, n, seed);
        }
    }

    #[test]
    fn products_of_bf16_agree_with_double_precision(
        rows in 1usize..70,
        cols in 1usize..150,
        n in 1usize..=33,
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let mut values = |len: usize| (0..len).map(|_| random.value()).collect::<Vec<f32>>();
        let (w, x) = (values(rows * cols), values(n * cols));
        check_bf16(rows, cols, &w, &x, n);
    }
}

/// Files of BF16 and of 8-bit floats multiply as their numbers do, if asked to, and as they are where exact.
#[test]
fn files_of_short_floats_multiply_as_bf16() {
    let (rows, cols, n) = (37, 151, 13);
    let mut random = Random::new(14);
    let x = random.values(n * cols, 1.0);
    for dtype in [DType::BF16, DType::F8_E4M3, DType::F8_E5M2] {
        let data = file_rows(dtype, rows, cols, &mut random);
        let w = dequantized(dtype, &data, rows * cols);
        let mut exact_elsewhere: Option<Vec<f32>> = None;
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(2, isa);
            let packing = Packing { bf16: true, ..Packing::default() };
            let pack =
                || PackedMatrix::pack_with(&cpu, dtype, rows, cols, &data, &packing).unwrap();
            let values = PackedMatrix::pack_bf16(&cpu, rows, cols, &w);
            let found = multiply(&cpu, &pack(), &x, n);
            assert_eq!(found, multiply(&cpu, &values, &x, n), "{dtype} {isa}");

            let exact = multiply(&cpu, &pack().with_exact_products(), &x, n);
            for (out, x) in exact.chunks_exact(rows).zip(x.chunks_exact(cols)) {
                for (found, w) in out.iter().zip(w.chunks_exact(cols)) {
                    let error = (f64::from(*found) - dot(w, x)).abs() / (norm(w) * norm(x));
                    assert!(error <= 3e-6, "{dtype} {isa}, exact: {error:e} of its size");
                }
            }
            let elsewhere = exact_elsewhere.get_or_insert_with(|| exact.clone());
            assert_eq!(exact, *elsewhere, "{dtype} {isa}");
        }
    }
}

/// Compares all instruction sets with sums in double precision of numbers rounded to bf16.
#[track_caller]
fn check_bf16(rows: usize, cols: usize, w: &[f32], x: &[f32], n: usize) {
    let round = |v: &f32| half::bf16::from_f32(*v).to_f32();
    let rounded_w: Vec<f32> = w.iter().map(round).collect();
    let rounded_x: Vec<f32> = x.iter().map(round).collect();
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(2, isa);
        let weight = PackedMatrix::pack_bf16(&cpu, rows, cols, w);
        let out = multiply(&cpu, &weight, x, n);
        for (out, x) in out.chunks_exact(rows).zip(rounded_x.chunks_exact(cols)) {
            for (row, (found, w)) in out.iter().zip(rounded_w.chunks_exact(cols)).enumerate() {
                let error = (f64::from(*found) - dot(w, x)).abs() / (norm(w) * norm(x) + 1e-30);
                assert!(error <= 3e-6, "[{rows}, {cols}] {isa} row {row}: {error:e} of its size");
            }
        }
        let mut row = vec![0.0; cols];
        for (index, expected) in rounded_w.chunks_exact(cols).enumerate() {
            weight.row(index, &mut row);
            assert_eq!(row, expected, "{isa}");
        }
    }
}

#[test]
fn products_of_bf16_depend_on_neither_threads_nor_the_rest_of_the_batch() {
    let (rows, cols, n) = (200, 513, 27);
    let mut random = Random::new(12);
    let mut values = |len: usize| (0..len).map(|_| random.value()).collect::<Vec<f32>>();
    let (w, mut x) = (values(rows * cols), values(n * cols));
    // What is not finite stays with its token.
    x[3 * cols + 512] = f32::NAN;
    x[4 * cols + 7] = f32::INFINITY;
    for isa in Isa::available() {
        let (one, three) = (Cpu::with_isa(1, isa), Cpu::with_isa(3, isa));
        let weight = PackedMatrix::pack_bf16(&one, rows, cols, &w);
        let bits = |out: &[f32]| out.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        let all = multiply(&one, &weight, &x, n);
        assert_eq!(bits(&all), bits(&multiply(&three, &weight, &x, n)), "{isa}: threads");
        for token in 0..n {
            let alone = multiply(&three, &weight, &x[token * cols..][..cols], 1);
            let out = &all[token * rows..][..rows];
            assert_eq!(bits(&alone), bits(out), "{isa}: token {token} alone");
            assert_eq!(out.iter().all(|v| v.is_finite()), token != 3 && token != 4, "{isa}");
        }
    }
}

#[test]
fn long_rows_are_walked_through_in_panels_of_tokens() {
    check(DType::Q4_0, 17, 256, 33, 21);
    check(DType::Q6_K, 17, 32, 33, 22);
    check(DType::BF16, 17, 8191, 33, 23);
}

#[test]
fn a_row_is_read_back_as_it_is_dequantized() {
    let cpu = Cpu::with_isa(2, Isa::Scalar);
    for dtype in weight_types() {
        let (rows, cols) = (37, 512);
        let data = file_rows(dtype, rows, cols, &mut Random::new(7));
        let expected = dequantized(dtype, &data, rows * cols);
        let weight = PackedMatrix::pack(&cpu, dtype, rows, cols, &data).unwrap();
        let mut row = vec![0.0; cols];
        for index in 0..rows {
            weight.row(index, &mut row);
            for (column, (&found, &expected)) in
                row.iter().zip(&expected[index * cols..][..cols]).enumerate()
            {
                let near = (found - expected).abs() <= expected.abs() * 1e-6 + 1e-7;
                assert!(near, "{dtype} row {index} column {column}: {found}, not {expected}");
            }
        }
    }
}

#[test]
fn results_depend_on_neither_threads_nor_the_rest_of_the_batch() {
    for isa in Isa::available() {
        let (one, three) = (Cpu::with_isa(1, isa), Cpu::with_isa(3, isa));
        for dtype in [DType::Q4_0, DType::Q6_K, DType::Q8_0, DType::IQ4_NL, DType::BF16] {
            let (rows, cols, n) = (200, 512, 27);
            let mut random = Random::new(11);
            let data = file_rows(dtype, rows, cols, &mut random);
            let x: Vec<f32> = (0..n * cols).map(|_| random.value()).collect();
            let weight = PackedMatrix::pack(&one, dtype, rows, cols, &data).unwrap();
            let all = multiply(&one, &weight, &x, n);
            assert_eq!(all, multiply(&three, &weight, &x, n), "{dtype} {isa}: threads");
            for token in 0..n {
                let alone = multiply(&three, &weight, &x[token * cols..][..cols], 1);
                assert_eq!(
                    alone,
                    all[token * rows..][..rows],
                    "{dtype} {isa}: token {token} alone"
                );
            }
        }
    }
}

#[test]
fn products_that_share_an_input_equal_products_alone() {
    let cpu = Cpu::with_isa(2, *Isa::available().last().unwrap());
    let (cols, n) = (256, 5);
    let mut random = Random::new(3);
    let x: Vec<f32> = (0..n * cols).map(|_| random.value()).collect();
    let weights: Vec<PackedMatrix> = [(DType::Q4_K, 33), (DType::F16, 7), (DType::Q8_0, 64)]
        .into_iter()
        .map(|(dtype, rows)| {
            let data = file_rows(dtype, rows, cols, &mut random);
            PackedMatrix::pack(&cpu, dtype, rows, cols, &data).unwrap()
        })
        .collect();
    let mut scratch = Scratch::new();
    let mut outs: Vec<Vec<f32>> = weights.iter().map(|w| vec![0.0; n * w.rows()]).collect();
    let mut products: Vec<Product<'_>> =
        weights.iter().zip(&mut outs).map(|(weight, out)| Product { weight, out }).collect();
    matmul(&cpu, &x, n, &mut products, &mut scratch);
    for (weight, out) in weights.iter().zip(&outs) {
        assert_eq!(*out, multiply(&cpu, weight, &x, n), "{weight:?}");
    }
}

#[test]
fn packing_tells_which_bytes_it_is_done_with() {
    let (rows, cols) = (1000, 2048);
    let data = file_rows(DType::Q8_0, rows, cols, &mut Random::new(6));
    let done = std::sync::Mutex::new(Vec::new());
    let start = data.as_ptr().addr();
    let cpu = Cpu::with_isa(3, Isa::Scalar);
    let release = |part: &[u8]| {
        let first = part.as_ptr().addr() - start;
        done.lock().unwrap().push(first..first + part.len());
    };
    let packing = Packing { release: &release, ..Packing::default() };
    PackedMatrix::pack_with(&cpu, DType::Q8_0, rows, cols, &data, &packing).unwrap();
    let mut done = done.into_inner().unwrap();
    done.sort_by_key(|part| part.start);
    assert!(done.len() > 1 && done[0].start == 0 && done.last().unwrap().end == data.len());
    assert!(done.windows(2).all(|pair| pair[0].end == pair[1].start), "{done:?}");
}

#[test]
fn rows_gathered_from_pieces_are_the_rows_of_one_matrix() {
    let cpu = Cpu::with_isa(2, Isa::Scalar);
    let (rows, cols) = (50, 64);
    let data = file_rows(DType::Q5_1, rows, cols, &mut Random::new(5));
    let row_bytes = DType::Q5_1.row_bytes(cols).unwrap();
    let pieces = [&data[..20 * row_bytes], &[], &data[20 * row_bytes..]];
    let whole = PackedMatrix::pack(&cpu, DType::Q5_1, rows, cols, &data).unwrap();
    let gathered = PackedMatrix::pack_rows(&cpu, DType::Q5_1, cols, &pieces).unwrap();
    assert_eq!(gathered.rows(), rows);
    let x: Vec<f32> = (0..cols).map(|i| i as f32 - 30.0).collect();
    assert_eq!(multiply(&cpu, &whole, &x, 1), multiply(&cpu, &gathered, &x, 1));
}

#[test]
fn extreme_codes_neither_overflow_nor_saturate() {
    let (rows, cols, n) = (17, 512, 9);
    for dtype in weight_types().filter(|&dtype| !is_dense(dtype)) {
        for fill in [0x00, 0x80, 0xff] {
            let mut data = vec![fill; rows * dtype.row_bytes(cols).unwrap()];
            for block in data.chunks_exact_mut(dtype.block_bytes()) {
                for &offset in scale_offsets(dtype) {
                    block[offset..offset + 2]
                        .copy_from_slice(&half::f16::from_f32(0.5).to_le_bytes());
                }
                if dtype == DType::MXFP4 {
                    block[0] = 127;
                }
            }
            // Every activation has the code 127, or every one -127.
            for x in [1.0, -3.0] {
                check_data(dtype, rows, cols, &data, &vec![x; n * cols], n);
            }
        }
    }
}

#[test]
fn tiny_and_zero_values_stay_what_they_are() {
    let (rows, cols, n) = (16, 256, 3);
    for dtype in weight_types() {
        let data = file_rows(dtype, rows, cols, &mut Random::new(9));
        for x in [0.0, 1e-42, 1e-36, 1e-30] {
            for isa in Isa::available() {
                let cpu = Cpu::with_isa(1, isa);
                let weight = PackedMatrix::pack(&cpu, dtype, rows, cols, &data).unwrap();
                let out = multiply(&cpu, &weight, &vec![x; n * cols], n);
                assert!(
                    out.iter().all(|v| v.is_finite() && v.abs() <= 1e5 * x),
                    "{dtype} {isa} {x}"
                );
            }
        }
        let zeros = vec![0; data.len()];
        let x: Vec<f32> = (0..n * cols).map(|i| i as f32).collect();
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(1, isa);
            let weight = PackedMatrix::pack(&cpu, dtype, rows, cols, &zeros).unwrap();
            let out = multiply(&cpu, &weight, &x, n);
            let limit = if dtype == DType::MXFP4 { 1e-30 } else { 0.0 };
            assert!(out.iter().all(|v| v.abs() <= limit), "{dtype} {isa}: a matrix of zeros");
        }
    }
}

#[test]
fn what_is_not_finite_stays_visible() {
    let (rows, cols, n) = (16, 256, 3);
    for dtype in weight_types() {
        let data = file_rows(dtype, rows, cols, &mut Random::new(9));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for isa in Isa::available() {
                let cpu = Cpu::with_isa(1, isa);
                let weight = PackedMatrix::pack(&cpu, dtype, rows, cols, &data).unwrap();
                let mut x = vec![1.0; n * cols];
                x[cols + 100] = bad;
                let out = multiply(&cpu, &weight, &x, n);
                for (token, out) in out.chunks_exact(rows).enumerate() {
                    let finite = out.iter().all(|v| v.is_finite());
                    assert_eq!(finite, token != 1, "{dtype} {isa} {bad} token {token}: {out:?}");
                }
            }
        }
    }
}

#[test]
fn empty_products_are_zero() {
    let cpu = Cpu::with_isa(1, Isa::Scalar);
    let weight = PackedMatrix::pack(&cpu, DType::F32, 0, 4, &[]).unwrap();
    assert_eq!(multiply(&cpu, &weight, &[1.0; 8], 2), []);
    let weight = PackedMatrix::pack(&cpu, DType::F32, 3, 0, &[]).unwrap();
    assert_eq!(multiply(&cpu, &weight, &[], 2), [0.0; 6]);
    let weight = PackedMatrix::pack(&cpu, DType::F32, 1, 1, &2f32.to_le_bytes()).unwrap();
    assert_eq!(multiply(&cpu, &weight, &[], 0), []);
    assert_eq!(multiply(&cpu, &weight, &[3.0], 1), [6.0]);
    matmul(&cpu, &[], 0, &mut [], &mut Scratch::new());
}

#[test]
fn what_is_no_matrix_of_weights_is_refused() {
    let cpu = Cpu::with_isa(1, Isa::Scalar);
    let pack = |dtype, rows, cols, len| {
        PackedMatrix::pack(&cpu, dtype, rows, cols, &vec![0; len]).unwrap_err()
    };
    assert!(matches!(
        pack(DType::I32, 1, 4, 16),
        Error::Base(bevel_base::Error::NotWeight(DType::I32))
    ));
    assert!(matches!(
        pack(DType::Q4_0, 1, 33, 18),
        Error::Base(bevel_base::Error::RowLength { block: 32, len: 33, .. })
    ));
    assert!(matches!(
        pack(DType::Q4_0, 2, 32, 18),
        Error::Base(bevel_base::Error::ByteLength { expected: 36, found: 18, .. })
    ));
    assert!(matches!(
        pack(DType::F32, usize::MAX, 4, 16),
        Error::Base(bevel_base::Error::Overflow { .. })
    ));
    let pieces: [&[u8]; 2] = [&[0; 36], &[0; 19]];
    assert!(matches!(
        PackedMatrix::pack_rows(&cpu, DType::Q4_0, 32, &pieces).unwrap_err(),
        Error::Base(bevel_base::Error::ByteLength { found: 19, .. })
    ));
}

#[test]
fn products_are_added_to_what_there_is() {
    let mut random = Random::new(5);
    for (dtype, rows, cols, n) in [
        (DType::F32, 21, 40, 1),
        (DType::F32, 48, 5, 9),
        (DType::F16, 16, 7, 3),
        (DType::Q4_0, 33, 64, 2),
    ] {
        let data = file_rows(dtype, rows, cols, &mut random);
        let mut fill = |count: usize| (0..count).map(|_| random.value()).collect::<Vec<f32>>();
        let (x, before) = (fill(n * cols), fill(n * rows));
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(2, isa);
            let weight = PackedMatrix::pack(&cpu, dtype, rows, cols, &data).unwrap();
            let product = multiply(&cpu, &weight, &x, n);
            let mut out = before.clone();
            let products = &mut [Product { weight: &weight, out: &mut out }];
            matmul_add(&cpu, &x, n, products, -0.75, &mut Scratch::new());
            for ((found, before), product) in out.iter().zip(&before).zip(product) {
                assert_eq!(*found, before + -0.75 * product, "{dtype} on {isa}");
            }
            // A product over no columns is zero.
            let empty = PackedMatrix::pack(&cpu, DType::F32, rows, 0, &[]).unwrap();
            let products = &mut [Product { weight: &empty, out: &mut out }];
            let sums = products[0].out.to_vec();
            matmul_add(&cpu, &[], n, products, 2.0, &mut Scratch::new());
            assert_eq!(out, sums);
        }
    }
}
