//! Products with grouped weights against sums in double precision, for every kind of codes, many
//! group sizes and every instruction set of this processor.

use bevel_base::grouped::nf4::NF4_LEVELS;
use bevel_base::grouped::{Coding, GroupedMatrix, Zeros};
use bevel_kernels::matmul::sort_columns;
use bevel_kernels::{Cpu, Isa, PackedMatrix, Product, Scratch, matmul};

use crate::random::Random;

/// How products with a matrix are made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Activations are rounded to int8.
    Int8,
    /// Activations are rounded to int8, and levels to multiples of a unit.
    Levels,
    /// Codes are kept, activations are f32.
    Float,
    /// The weights are f32.
    Widened,
}

const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Levels of no pattern, as NF4's are.
fn uneven() -> [f32; 16] {
    std::array::from_fn(|i| ((i as f32 - 7.3) / 8.1).sin())
}

#[derive(Clone, Copy, Debug)]
enum Codes {
    Symmetric(u32),
    Zeros(u32),
    Affine(u32),
    Uneven,
    E2M1,
    Float8,
}

/// Codes of every value, scales of either sign and not of few bits.
fn matrix(
    codes: Codes,
    rows: usize,
    cols: usize,
    group_size: usize,
    random: &mut Random,
) -> GroupedMatrix {
    let groups = rows * cols.div_ceil(group_size);
    let bits = match codes {
        Codes::Symmetric(bits) | Codes::Zeros(bits) | Codes::Affine(bits) => bits,
        Codes::Uneven | Codes::E2M1 => 4,
        Codes::Float8 => 8,
    };
    let coding = match codes {
        Codes::Symmetric(bits) => Coding::Integer { bits, zeros: Zeros::Symmetric },
        Codes::Zeros(bits) => {
            let zeros = (0..groups).map(|_| random.below(1 << bits) as u8).collect();
            Coding::Integer { bits, zeros: Zeros::Each(zeros) }
        }
        Codes::Affine(bits) => Coding::Affine { bits, minima: random.values(groups, 1.0) },
        Codes::Uneven => Coding::Levels(uneven()),
        Codes::E2M1 => Coding::Levels(E2M1),
        Codes::Float8 => Coding::Float8,
    };
    let code = |random: &mut Random| match (random.below(1 << bits) as u8, codes) {
        // NaN is another test's.
        (0x7f | 0xff, Codes::Float8) => 0x7e,
        (code, _) => code,
    };
    let matrix = GroupedMatrix {
        rows,
        cols,
        group_size,
        coding,
        codes: (0..rows * cols).map(|_| code(random)).collect(),
        scales: random.values(groups, 0.1),
        group_of: None,
    };
    matrix.checked().unwrap()
}

/// Activations rounded to int8 in groups of 32, as the kernels' contract says.
fn rounded(x: &[f32]) -> Vec<f32> {
    let round = |group: &[f32]| {
        let largest = group.iter().fold(0f32, |m, v| m.max(v.abs()));
        let (factor, scale) = (127.0 / largest, largest / 127.0);
        group.iter().map(move |v| (v * factor).round_ties_even() * scale).collect::<Vec<_>>()
    };
    x.chunks(32).flat_map(round).collect()
}

fn dot(w: &[f32], x: &[f32]) -> f64 {
    w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum()
}

fn multiply(cpu: &Cpu, weight: &PackedMatrix, x: &[f32], n: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; n * weight.rows()];
    matmul(cpu, x, n, &mut [Product { weight, out: &mut out }], &mut Scratch::new());
    out
}

#[track_caller]
fn check(kind: Kind, matrix: &GroupedMatrix, n: usize, random: &mut Random) {
    let (rows, cols) = (matrix.rows, matrix.cols);
    let w = matrix.dequantize();
    let x = random.values(n * cols, 1.0);
    let used = match kind {
        Kind::Int8 | Kind::Levels => rounded(&x),
        Kind::Float | Kind::Widened => x.clone(),
    };
    let near = |out: &[f32], x: &[f32], most: f64, what: &str| {
        for token in 0..n {
            for row in 0..rows {
                let (w, x) = (&w[row * cols..][..cols], &x[token * cols..][..cols]);
                let found = f64::from(out[token * rows + row]);
                let size = (dot(w, w) * dot(x, x)).sqrt() + 1e-30;
                let error = (found - dot(w, x)).abs() / size;
                assert!(error <= most, "{what}, token {token}, row {row}: {error:e}");
            }
        }
    };
    let mut first: Option<[Vec<f32>; 2]> = None;
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        let packed = PackedMatrix::pack_grouped(&cpu, matrix, 0..rows);
        let what = format!("{packed:?} {isa}");
        assert_eq!(packed.is_widened(), kind == Kind::Widened, "{packed:?}");
        let out = multiply(&cpu, &packed, &x, n);
        // A level is off by half a unit at most, which is a 64th of the largest or less.
        near(&out, &used, if kind == Kind::Levels { 1e-2 } else { 4e-6 }, &what);

        let mut read = vec![0.0; cols];
        for row in [0, rows - 1] {
            packed.row(row, &mut read);
            let most = read.iter().fold(0f32, |most, v| most.max(v.abs()));
            for (found, expected) in read.iter().zip(&w[row * cols..]) {
                assert!((found - expected).abs() <= 1e-6 * most, "{packed:?}: {found}, {expected}");
            }
        }

        let exact = multiply(&cpu, &packed.with_exact_products(), &x, n);
        near(&exact, &x, 4e-6, &format!("{what}, exact"));
        let [other, other_exact] = first.get_or_insert_with(|| [out.clone(), exact.clone()]);
        for ((found, other), w) in out.iter().zip(other.iter()).zip(w.chunks_exact(cols).cycle()) {
            // The rounded levels are the same everywhere.
            let size = (dot(w, w) * cols as f64).sqrt();
            assert!(f64::from((found - other).abs()) <= 4e-6 * size, "{what}: {found}, {other}");
        }
        if matches!(kind, Kind::Int8 | Kind::Levels) {
            assert_eq!(exact, *other_exact, "{what}: exact products have the same bits everywhere");
        }
    }
}

#[test]
fn every_kind_of_codes_agrees_with_double_precision_on_every_instruction_set() {
    let mut random = Random::new(1);
    let integers =
        (1..=8).flat_map(|bits| [Codes::Symmetric(bits), Codes::Zeros(bits), Codes::Affine(bits)]);
    for codes in integers.chain([Codes::E2M1, Codes::Uneven]) {
        let kind = if matches!(codes, Codes::Uneven) { Kind::Levels } else { Kind::Int8 };
        // The last group is half of one, or spans are repeated or more than the row.
        for (cols, group_size) in
            [(96, 32), (320, 64), (320, 128), (288, 96), (160, 4096), (96, 48), (64, 16)]
        {
            let (rows, n) = (1 + random.below(40), 1 + random.below(17));
            check(kind, &matrix(codes, rows, cols, group_size, &mut random), n, &mut random);
        }
        for (cols, group_size) in [(96, 20), (100, 32), (33, 33), (7, 2)] {
            let (rows, n) = (1 + random.below(20), 1 + random.below(9));
            let matrix = matrix(codes, rows, cols, group_size, &mut random);
            check(Kind::Widened, &matrix, n, &mut random);
        }
    }
    for (cols, group_size) in
        [(64, 8), (320, 64), (200, 128), (160, 4096), (72, 24), (20, 4), (33, 33), (33, 2)]
    {
        let (rows, n) = (1 + random.below(40), 1 + random.below(17));
        let matrix = matrix(Codes::Float8, rows, cols, group_size, &mut random);
        check(Kind::Float, &matrix, n, &mut random);
    }
    for (cols, group_size) in [(33, 3), (64, 31)] {
        let matrix = matrix(Codes::Float8, 5, cols, group_size, &mut random);
        check(Kind::Widened, &matrix, 3, &mut random);
    }
}

/// Quantizing a normal weight to NF4 leaves an error of 0.0093 of its energy; integer levels add to that.
#[test]
fn levels_of_nf4_as_integers_cost_little_beside_the_rounding_of_weights() {
    let mut random = Random::new(8);
    let (rows, cols) = (16, 4096);
    let mut matrix = matrix(Codes::Uneven, rows, cols, 64, &mut random);
    matrix.coding = Coding::Levels(NF4_LEVELS);
    let cpu = Cpu::with_isa(1, Isa::Scalar);
    let packed = PackedMatrix::pack_grouped(&cpu, &matrix, 0..rows);
    // Columns of the product with unit vectors are the weights that products use; a unit vector survives
    // the rounding of activations.
    let w = matrix.dequantize();
    let (mut lost, mut whole) = (0.0, 0.0);
    for col in (0..cols).step_by(37) {
        let mut x = vec![0.0; cols];
        x[col] = 1.0;
        for (row, found) in multiply(&cpu, &packed, &x, 1).into_iter().enumerate() {
            let expected = f64::from(w[row * cols + col]);
            lost += (f64::from(found) - expected).powi(2);
            whole += expected.powi(2);
        }
    }
    assert!(lost / whole < 2e-5, "{:e} of the energy", lost / whole);
}

#[test]
fn codes_keep_their_bits_in_memory() {
    let cpu = Cpu::with_isa(1, Isa::Scalar);
    let mut random = Random::new(2);
    for (codes, bits) in [
        (Codes::Symmetric(4), 4.0 + 32.0 / 128.0),
        (Codes::Zeros(4), 4.0 + 64.0 / 128.0),
        (Codes::Affine(3), 3.0 + 64.0 / 128.0),
        (Codes::Symmetric(8), 8.0 + 32.0 / 128.0),
        (Codes::Uneven, 4.0 + 32.0 / 128.0),
        (Codes::Float8, 8.0 + 32.0 / 128.0),
    ] {
        let matrix = matrix(codes, 32, 256, 128, &mut random);
        let packed = PackedMatrix::pack_grouped(&cpu, &matrix, 0..32);
        assert_eq!(packed.bytes() as f64 * 8.0 / (32.0 * 256.0), bits, "{packed:?}");
    }
}

#[test]
fn extreme_codes_neither_overflow_nor_saturate() {
    for codes in (1..=8).flat_map(|bits| [Codes::Symmetric(bits), Codes::Affine(bits)]) {
        let mut matrix = matrix(codes, 17, 512, 128, &mut Random::new(3));
        let most = matrix.codes.iter().fold(0, |most, &code| code.max(most));
        let w = |matrix: &GroupedMatrix| matrix.dequantize();
        for code in [0, most] {
            matrix.codes.fill(code);
            let w = w(&matrix);
            // Every activation has the code 127, or every one -127.
            for x in [1.0, -3.0] {
                for isa in Isa::available() {
                    let cpu = Cpu::with_isa(1, isa);
                    let packed = PackedMatrix::pack_grouped(&cpu, &matrix, 0..17);
                    let out = multiply(&cpu, &packed, &[x; 9 * 512], 9);
                    for (row, w) in w.chunks_exact(512).enumerate() {
                        let (found, expected) = (f64::from(out[8 * 17 + row]), dot(w, &[x; 512]));
                        let size = dot(w, w).sqrt() * 512f64.sqrt() * 3.0;
                        assert!((found - expected).abs() <= 4e-6 * size, "{packed:?} {isa}");
                    }
                }
            }
        }
    }
}

#[test]
fn products_depend_on_neither_threads_nor_the_rest_of_the_batch() {
    for isa in Isa::available() {
        let (one, three) = (Cpu::with_isa(1, isa), Cpu::with_isa(3, isa));
        for codes in [Codes::Zeros(4), Codes::Uneven, Codes::Float8] {
            let mut random = Random::new(4);
            let (rows, cols, n) = (200, 512, 27);
            let matrix = matrix(codes, rows, cols, 128, &mut random);
            let x = random.values(n * cols, 1.0);
            let packed = PackedMatrix::pack_grouped(&three, &matrix, 0..rows);
            let all = multiply(&one, &packed, &x, n);
            assert_eq!(all, multiply(&three, &packed, &x, n), "{codes:?} {isa}: threads");
            for token in 0..n {
                let alone = multiply(&three, &packed, &x[token * cols..][..cols], 1);
                assert_eq!(alone, all[token * rows..][..rows], "{codes:?} {isa}: token {token}");
            }
        }
    }
}

#[test]
fn some_rows_are_packed_as_the_rows_of_all() {
    let cpu = Cpu::with_isa(1, Isa::Scalar);
    let matrix = matrix(Codes::Zeros(4), 50, 64, 32, &mut Random::new(5));
    let x: Vec<f32> = (0..64).map(|i| i as f32 - 30.0).collect();
    let all = multiply(&cpu, &PackedMatrix::pack_grouped(&cpu, &matrix, 0..50), &x, 1);
    let some = PackedMatrix::pack_grouped(&cpu, &matrix, 7..39);
    assert_eq!(multiply(&cpu, &some, &x, 1), all[7..39]);
    let none = PackedMatrix::pack_grouped(&cpu, &matrix, 9..9);
    assert_eq!(multiply(&cpu, &none, &x, 1), []);
}

#[test]
fn what_is_not_a_number_is_kept() {
    let mut matrix = matrix(Codes::Float8, 3, 64, 32, &mut Random::new(6));
    matrix.codes[64 + 5] = 0x7f;
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        let packed = PackedMatrix::pack_grouped(&cpu, &matrix, 0..3);
        let out = multiply(&cpu, &packed, &[1.0; 64], 1);
        assert_eq!([0, 1, 2].map(|row| out[row].is_nan()), [false, true, false], "{packed:?}");
    }
}

#[test]
fn columns_are_sorted_by_group_and_gathered_inputs_give_the_same_product() {
    let mut random = Random::new(7);
    for (cols, group_size) in [(128, 32), (160, 64)] {
        let mut shuffled = matrix(Codes::Zeros(4), 20, cols, group_size, &mut random);
        let mut group_of: Vec<u32> = (0..cols).map(|col| (col / group_size) as u32).collect();
        random.shuffle(&mut group_of);
        shuffled.group_of = Some(group_of.clone());
        // Unsorted columns are right, if large.
        check(Kind::Widened, &shuffled, 3, &mut random);
        let (sorted, order) = sort_columns(&shuffled).expect("regular groups");
        check(Kind::Int8, &sorted, 3, &mut random);
        let (original, sorted) = (shuffled.dequantize(), sorted.checked().unwrap().dequantize());
        for (row, sorted) in original.chunks(cols).zip(sorted.chunks(cols)) {
            let gathered: Vec<f32> = order.iter().map(|&col| row[col as usize]).collect();
            assert_eq!(gathered, sorted);
        }
        // Columns of a group keep their order: those of the same group share a run of activations.
        assert!(order.is_sorted_by_key(|&col| (group_of[col as usize], col)));
    }
    let mut irregular = matrix(Codes::Zeros(4), 20, 128, 32, &mut random);
    assert!(sort_columns(&irregular).is_none());
    irregular.group_of = Some((0..128).map(|col| u32::from(col > 40)).collect());
    assert!(sort_columns(&irregular).is_none());
    check(Kind::Widened, &irregular, 3, &mut random);
}
