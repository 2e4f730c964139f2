use super::*;
use half::bf16;
use proptest::prelude::*;

/// Values that bf16 can represent.
fn values(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        bf16::from_f32(state as f32 / u32::MAX as f32 - 0.5).to_f32()
    };
    (0..len).map(|_| next()).collect()
}

fn transposed(matrix: &[f32], cols: usize) -> Vec<f32> {
    let rows = matrix.len() / cols;
    (0..cols)
        .flat_map(|c| (0..rows).map(move |r| matrix[r * cols + c]))
        .collect()
}

/// a · bᵀ alone.
fn product<'a>(level: Level, (a, b): (Operand<'a>, Operand<'a>), dims: [usize; 3]) -> Product<'a> {
    Product {
        a,
        packed: None,
        b,
        packed_b: None,
        low_rank: None,
        dims,
        alpha: 1.0,
        start: Start::Zero,
        turned: false,
        level,
    }
}

/// A product and its transpose at every level of this machine, with each operand both ways round
/// and in both types, beside its value in float64.
fn check([m, n, k]: [usize; 3], alpha: f32, add: bool, threads: usize) {
    let device = Device::cpu(threads).unwrap();
    let (a, b, before) = (values(1, m * k), values(2, n * k), values(3, m * n));
    let (a_turned, b_turned) = (transposed(&a, k), transposed(&b, k));
    let narrow = |v: &[f32]| v.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
    let (a16, b16, b16_turned) = (narrow(&a), narrow(&b), narrow(&b_turned));
    let lefts = [
        Operand::rows(Values::F32(&a), k),
        Operand::columns(Values::F32(&a_turned), m),
        Operand::rows(Values::Bf16(&a16), k),
    ];
    let rights = [
        Operand::rows(Values::F32(&b), k),
        Operand::columns(Values::F32(&b_turned), n),
        Operand::rows(Values::Bf16(&b16), k),
        Operand::columns(Values::Bf16(&b16_turned), n),
    ];
    for level in Level::available() {
        let mut first: Option<Vec<f32>> = None;
        let operands = lefts
            .iter()
            .flat_map(|a| rights.iter().map(move |b| (a, b)));
        for ((&a_operand, &b_operand), turned) in
            operands.flat_map(|operands| [false, true].map(|turned| (operands, turned)))
        {
            // Rows further apart than they are long: what lies between must stay as it is.
            let stride = n + 3;
            let mut out = vec![7.0; m * stride];
            for (out, before) in out.chunks_mut(stride).zip(before.chunks(n)) {
                out[..n].copy_from_slice(before);
            }
            let product = Product {
                alpha,
                start: if add { Start::Output } else { Start::Zero },
                turned,
                ..product(level, (a_operand, b_operand), [m, n, k])
            };
            device.run(|| product.run(&device, &mut out, stride));
            for (i, row) in out.chunks(stride).enumerate() {
                assert_eq!(row[n..], [7.0; 3], "{level:?} wrote beyond a row");
                for (j, &got) in row[..n].iter().enumerate() {
                    let terms = a[i * k..][..k].iter().zip(&b[j * k..][..k]);
                    let sum: f64 = terms.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                    let start = if add {
                        f64::from(before[i * n + j])
                    } else {
                        0.0
                    };
                    let want = start + f64::from(alpha) * sum;
                    let error = (f64::from(got) - want).abs();
                    // Operands are exact in bf16: what is left is the rounding of sums in f32.
                    let limit = 1e-6 * (1.0 + (k as f64).sqrt());
                    assert!(
                        error < limit,
                        "{level:?} {m}x{n}x{k} at {i},{j}: {got}, not {want}"
                    );
                }
            }
            let first = first.get_or_insert_with(|| out.clone());
            assert_eq!(
                first, &out,
                "{level:?}: bits depend on how an operand is stored or read"
            );
        }
    }
}

#[test]
fn products_across_tiles_and_blocks_match_float64() {
    for dims in [
        [1, 1, 1],
        [12, 32, 64],
        [13, 33, 65],
        [25, 70, 1700],
        [200, 130, 31],
        // Whole panels and steps: rows of bf16 are not packed.
        [70, 96, 1600],
        [96, 70, 1600],
    ] {
        check(dims, 1.0, false, 2);
        check(dims, -1.5, true, 1);
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads_or_of_other_rows() {
    let (m, n, k) = (230, 300, 900);
    let (a, b) = (values(4, m * k), values(5, n * k));
    let run = |threads: usize, rows: usize| {
        let device = Device::cpu(threads).unwrap();
        let mut out = vec![0.0; rows * n];
        let operands = [&a, &b].map(|values| Operand::rows(Values::F32(values), k));
        let product = product(Level::best(), operands.into(), [rows, n, k]);
        device.run(|| product.run(&device, &mut out, n));
        out
    };
    let one = run(1, m);
    assert_eq!(one, run(3, m));
    assert_eq!(one, run(16, m));
    assert_eq!(one[..7 * n], run(2, 7));
}

#[test]
fn a_part_of_panels_multiplied_on_one_thread_has_the_bits_of_the_whole_product() {
    let device = Device::cpu(1).unwrap();
    let (m, n, k, stride) = (70, 33, 130, 40);
    // Values of the right operand before the part, which begins with a panel and a step.
    let (cols, depth) = (n + COLS, k + 4 * PAIRS);
    let (a, b, before) = (
        values(8, m * k),
        values(9, cols * depth),
        values(10, m * stride),
    );
    let part = &b[COLS * depth + 4 * PAIRS..];
    let (a, b) = (
        Operand::rows(Values::F32(&a), k),
        Operand::rows(Values::F32(&b), depth),
    );
    for level in Level::available() {
        let mut left = Panels::with_capacity(&device, 3 * m, k);
        let right = Panels::new(&device, level, (&b, Side::Right), 0..cols, 0..depth);
        for add in [false, true] {
            let mut want = before.clone();
            let part = Operand::rows(Values::F32(part), depth);
            let product = Product {
                start: if add { Start::Output } else { Start::Zero },
                ..product(level, (a, part), [m, n, k])
            };
            device.run(|| product.run(&device, &mut want, stride));
            let mut got = before.clone();
            left.pack(level, (&a, Side::Left), 0..m, 0..k);
            let right = right.part(&(COLS..cols), &(4 * PAIRS..depth));
            let all = 0..m.div_ceil(ROWS);
            left.multiply(level, all, right, (&mut got, [m, n, stride]), add);
            assert_eq!(got, want, "{level:?}");
        }
    }
}

#[test]
fn a_tile_is_packed_as_a_matrix_of_its_values_is() {
    let device = Device::cpu(1).unwrap();
    let sums: Vec<f32> = values(11, ROWS * COLS).iter().map(|v| v / 3.0).collect();
    let mut tile = Tile::ZERO;
    tile.0.as_flattened_mut().copy_from_slice(&sums);
    for level in Level::available() {
        for side in [Side::Left, Side::Right] {
            let operand = match side {
                Side::Left => Operand::rows(Values::F32(&sums), COLS),
                Side::Right => Operand::columns(Values::F32(&sums), COLS),
            };
            let want = Panels::new(&device, level, (&operand, side), 0..ROWS, 0..2 * PAIRS);
            let mut got = Panels::with_capacity(&device, 2 * ROWS, 6 * PAIRS);
            got.resize(2 * ROWS, 6 * PAIRS);
            got.set(level, side, (1, 2), &tile);
            assert_eq!(got.panel(1)[2], want.panel(0)[0], "{level:?} {side:?}");
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn the_lines_of_a_panel_are_where_its_rows_are_read_in_ascending_order() {
    let (rows, steps) = (2 * ROWS, 3);
    let k = steps * 2 * PAIRS;
    for stride in [k, k + 40] {
        let matrix = vec![bf16::ONE; rows * stride];
        let in_place = LeftPanels::in_place(&matrix, stride, rows, 0..k).unwrap();
        let packed = vec![[0; ROWS * PAIRS]; 2 * steps];
        for panels in [in_place, LeftPanels::packed(&packed, steps)] {
            for i in 0..2 {
                let panel = panels.panel(i);
                let [row, step] = panel.distances();
                let read = (0..ROWS).flat_map(|r| (0..steps).map(move |s| r * row + s * step));
                let mut read: Vec<_> = read.map(|i| panel.as_ptr().wrapping_add(i)).collect();
                read.sort();
                assert_eq!(Lines::new(panel, 1).collect::<Vec<_>>(), read);
            }
        }
    }
}

#[test]
fn a_scaled_transpose_has_every_value_at_its_place() {
    for [rows, cols, stride] in [[1, 1, 1], [64, 128, 64], [45, 67, 51], [64, 33, 192]] {
        let from = values(6, rows * cols);
        let mut to = vec![-1.0; cols * stride];
        copy_transposed(&from, [rows, cols], (&mut to, stride), 0.5);
        for (c, to) in to.chunks(stride).enumerate() {
            let (there, rest) = to.split_at(rows);
            assert!(
                there
                    .iter()
                    .enumerate()
                    .all(|(r, &v)| v == 0.5 * from[r * cols + c])
            );
            assert!(rest.iter().all(|&v| v == -1.0));
        }
    }
}

/// start + a · bᵀ + kept(u · vᵀ) with and without a mask, from each start, beside float64. Columns
/// are no whole bytes of the mask where n is odd.
fn check_low_rank([m, n, k, rank]: [usize; 4], masked: bool) {
    let device = Device::cpu(2).unwrap();
    let (a, b, u, v) = (
        values(11, m * k),
        values(12, n * k),
        values(13, m * rank),
        values(14, n * rank),
    );
    let (matrix, row) = (values(15, m * n), values(16, n));
    let mask: Vec<u8> = (0..(m * n).div_ceil(8))
        .map(|i| (i * 89 + 37) as u8)
        .collect();
    let kept = Kept {
        mask: &mask,
        scale: 1.25,
    };
    let factor = |i: usize| match (masked, mask[i / 8] >> (i % 8) & 1) {
        (false, _) => 1.0,
        (true, bit) => 1.25 * f64::from(bit),
    };
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(&a, &b)| f64::from(a) * f64::from(b))
            .sum()
    };
    let starts = [
        Start::Zero,
        Start::Output,
        Start::Matrix(&matrix),
        Start::Row(&row),
    ];
    let operand = |values, cols| Operand::rows(Values::F32(values), cols);
    let cases = Level::available().flat_map(|level| starts.map(|start| (level, start)));
    for ((level, start), turned) in
        cases.flat_map(|case| [false, true].map(|turned| (case, turned && !masked)))
    {
        let product = Product {
            start,
            turned,
            low_rank: Some(LowRank {
                a: operand(&u, rank),
                b: operand(&v, rank),
                rank,
                kept: masked.then_some(kept),
            }),
            ..product(level, (operand(&a, k), operand(&b, k)), [m, n, k])
        };
        let mut out = matrix.clone();
        device.run(|| product.run(&device, &mut out, n));
        for (i, got) in out.into_iter().enumerate() {
            let (r, c) = (i / n, i % n);
            let from = match start {
                Start::Zero => 0.0,
                Start::Output | Start::Matrix(_) => matrix[i],
                Start::Row(row) => row[c],
            };
            let low_rank = dot(&u[r * rank..][..rank], &v[c * rank..][..rank]);
            let full = dot(&a[r * k..][..k], &b[c * k..][..k]);
            let want = f64::from(from) + full + factor(i) * low_rank;
            let limit = 1e-6 * (1.0 + ((k + rank) as f64).sqrt());
            let error = (f64::from(got) - want).abs();
            assert!(error < limit, "{level:?} at {r},{c}: {got}, not {want}");
        }
    }
}

#[test]
fn a_low_rank_product_with_dropout_is_added_to_every_start() {
    for dims in [
        [1, 1, 1, 1],
        [33, 70, 40, 8],
        [70, 41, 1700, 33],
        [64, 64, 64, 32],
    ] {
        check_low_rank(dims, false);
        check_low_rank(dims, true);
    }
}

#[test]
fn a_packed_operand_gives_the_bits_of_one_that_is_not() {
    let device = Device::cpu(2).unwrap();
    let (m, n, k) = (70, 40, 1700);
    let (a, b) = (values(17, m * k), values(18, n * k));
    let operands = [&a, &b].map(|values| Operand::rows(Values::F32(values), k));
    for (side, turned) in [(Side::Left, false), (Side::Right, true)] {
        let packed = Packed::new(&device, (&operands[0], side), [m, k]).unwrap();
        let [with, without] = [Some(&packed), None].map(|packed| {
            let product = Product {
                packed,
                turned,
                ..product(Level::best(), operands.into(), [m, n, k])
            };
            let mut out = vec![0.0; m * n];
            device.run(|| product.run(&device, &mut out, n));
            out
        });
        assert_eq!(with, without);
    }
}

#[test]
fn rounding_to_bf16_is_to_nearest_with_ties_to_even() {
    let level = Level::Plain;
    let specials = [
        1.0f32,
        -1.0,
        0.0,
        -0.0,
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        3.4e38,
        f32::INFINITY,
        1e-40,
        0.1,
        -2.7e-5,
    ];
    for value in specials {
        let mut out = [[0u32; ROWS * PAIRS]];
        let operand = Operand::rows(Values::F32(std::slice::from_ref(&value)), 1);
        operand.pack(level, Side::Left, (&mut out, 1), (0, 1), (0, 1));
        assert_eq!(
            out[0][0],
            u32::from(bf16::from_f32(value).to_bits()),
            "{value}"
        );
    }
}

#[test]
fn a_value_that_is_not_a_number_reaches_its_row_alone() {
    for level in Level::available() {
        let device = Device::cpu(1).unwrap();
        let (m, n, k) = (14, 40, 70);
        let (mut a, b) = (values(6, m * k), values(7, n * k));
        a[3 * k + 5] = f32::NAN;
        let mut out = vec![0.0; m * n];
        let operands = [&a, &b].map(|values| Operand::rows(Values::F32(values), k));
        let product = product(level, operands.into(), [m, n, k]);
        device.run(|| product.run(&device, &mut out, n));
        for (i, row) in out.chunks(n).enumerate() {
            assert!(
                row.iter().all(|v| v.is_nan() == (i == 3)),
                "{level:?}, row {i}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn products_of_any_shape_match_float64(
        m in 1usize..60, n in 1usize..100, k in 1usize..150, add: bool,
    ) {
        check([m, n, k], 0.75, add, 2);
    }
}
