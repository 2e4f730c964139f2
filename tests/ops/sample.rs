use resa_engine::device::Device;
use resa_engine::ops::sample::{Filter, NONE, sample};
use resa_engine::rng::{Purpose, Stream};
use resa_engine::tensor::{DType, Tensor};

use super::harness::{Least, counters_of_all, cuda, devices, random};

/// How near to a boundary of the distribution function a draw may differ from float64's: what f32
/// logits and weights are rounded by, with room.
const NEAR: f64 = 1e-6;

const ALL: Filter = Filter {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
};

fn filter(temperature: f32, top_k: usize, top_p: f32) -> Filter {
    Filter {
        temperature,
        top_k,
        top_p,
    }
}

fn words(seed: u64, count: usize) -> Vec<u64> {
    let stream = Stream::new(seed, Purpose::Sampling, 0, 0);
    let word = |i| {
        let [high, low, ..] = stream.block(i as u32);
        u64::from(high) << 32 | u64::from(low)
    };
    (0..count).map(word).collect()
}

fn tokens(device: &Device, logits: &Tensor, filter: Filter, words: &[u64]) -> Vec<u32> {
    let ids = device.run(|| sample(device, logits, filter, words)?.to_u32());
    ids.unwrap().u32s().unwrap().to_vec()
}

/// Draws on every device, which must give the same tokens.
fn same_on_all(logits: &Tensor, filter: Filter, words: &[u64]) -> Vec<u32> {
    let devices = devices("sample");
    let found = tokens(&devices[0], logits, filter, words);
    for device in &devices[1..] {
        let others = tokens(device, logits, filter, words);
        let differs = found.iter().zip(&others).position(|(a, b)| a != b);
        if let Some(row) = differs {
            let (shape, device) = (logits.shape(), device.name());
            let (here, there) = (found[row], others[row]);
            panic!("row {row} of {shape:?}, {filter:?}: {here}, {there} on {device}");
        }
    }
    found
}

/// The token that the textbook draws in float64, and how far the draw is from another: from the
/// nearest boundary of the distribution function, and of the sum that ends the nucleus.
fn reference(logits: &[f32], filter: Filter, word: u64) -> (u32, f64) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.retain(|&i| logits[i] > f32::NEG_INFINITY);
    // Of equal logits the lower id comes first: the sort is stable.
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap());
    if filter.temperature == 0.0 {
        return (order.first().map_or(NONE, |&i| i as u32), 1.0);
    }
    let weight = |i: usize| match logits[i] == max {
        true => 1.0,
        false => ((f64::from(logits[i]) - f64::from(max)) / f64::from(filter.temperature)).exp(),
    };
    if filter.top_k > 0 {
        order.truncate(filter.top_k);
    }
    let total: f64 = order.iter().map(|&i| weight(i)).sum();
    let mut distance = 1.0f64;
    if filter.top_p < 1.0 {
        let (mut sum, mut kept) = (0.0, 0);
        while kept < order.len() && sum < f64::from(filter.top_p) * total {
            sum += weight(order[kept]);
            kept += 1;
            distance = distance.min((sum / total - f64::from(filter.top_p)).abs());
        }
        order.truncate(kept);
    }
    order.sort_unstable();
    let total: f64 = order.iter().map(|&i| weight(i)).sum();
    let share = word as f64 / (1u128 << 64) as f64;
    let (mut sum, mut drawn) = (0.0, None);
    for &i in &order {
        sum += weight(i) / total;
        distance = distance.min((sum - share).abs());
        if drawn.is_none() && sum > share {
            drawn = Some(i);
        }
    }
    let last = order.last().copied();
    (drawn.or(last).map_or(NONE, |i| i as u32), distance)
}

/// Draws that differ from the reference, each of which must be near a boundary.
fn differences(logits: &Tensor, filter: Filter, words: &[u64]) -> usize {
    let found = same_on_all(logits, filter, words);
    let (_, vocab) = logits.matrix_dims();
    let rows = logits.f32s().unwrap().chunks(vocab);
    let mut differ = 0;
    for ((row, &word), found) in rows.zip(words).zip(found) {
        let (want, distance) = reference(row, filter, word);
        if found != want {
            differ += 1;
            assert!(
                distance < NEAR,
                "{found} instead of {want} of {vocab}, {distance:e} from a boundary: {filter:?}"
            );
        }
    }
    differ
}

fn filters(vocab: usize) -> [Filter; 11] {
    [
        ALL,
        filter(0.0, 0, 1.0),
        filter(1.0, 1, 1.0),
        filter(0.7, 0, 0.9),
        filter(1.0, 5, 1.0),
        filter(1.5, 40, 0.8),
        filter(3.0, 0, 0.5),
        filter(0.1, 0, 0.95),
        filter(1.0, vocab + 3, 0.3),
        filter(2.0, vocab.saturating_sub(1), 0.999),
        filter(1.0, 0, 1e-6),
    ]
}

#[test]
fn tokens_are_those_of_float64_and_the_same_on_every_device() {
    let (mut draws, mut differ) = (0, 0);
    for (vocab, rows) in [
        (1, 3),
        (5, 30),
        (31, 30),
        (1000, 20),
        (4096, 4),
        (4097, 4),
        (49_153, 1),
        (49_152, 1),
    ] {
        for (i, filter) in filters(vocab).into_iter().enumerate() {
            let logits = random(i as u64, &[rows, vocab], 9.0);
            differ += differences(&logits, filter, &words(i as u64, rows));
            draws += rows;
        }
    }
    // Values of a few steps: ties everywhere, also where top-k and top-p cut.
    for (i, filter) in filters(700).into_iter().enumerate() {
        let logits = random(i as u64, &[15, 700], 4.0);
        let steps = logits.f32s().unwrap().iter().map(|v| v.round());
        let logits = Tensor::from_vec(steps.collect(), [15, 700]).unwrap();
        differ += differences(&logits, filter, &words(i as u64, 15));
        draws += 15;
    }
    println!("{differ} of {draws} draws differ, within {NEAR:e} of a boundary");
    assert!(differ * 200 < draws, "{differ} of {draws}");
}

/// Rows of 6 that have something odd about them.
fn odd_rows() -> Vec<[f32; 6]> {
    const INF: f32 = f32::INFINITY;
    const NAN: f32 = f32::NAN;
    vec![
        [0.5; 6],
        [-INF, -INF, 2.0, -INF, 2.0, -INF],
        [NAN, 1.0, NAN, 2.0, -NAN, 1.5],
        [NAN, -INF, NAN, -7.0, -INF, NAN],
        [0.0, -0.0, 0.0, -0.0, -0.0, 0.0],
        [3e38, -3e38, 1e38, -1e38, 0.0, 3e38],
        [INF, 1.0, INF, 2.0, -INF, NAN],
        [1e-40, -1e-40, 2e-40, 0.0, 1e-45, -1e-45],
        [-100.0, -101.0, -102.0, -3e38, -127.0, -130.0],
    ]
}

#[test]
fn infinities_nan_ties_and_extremes_are_drawn_as_by_float64() {
    let rows = odd_rows();
    for i in 0..8 {
        for filter in filters(6) {
            let logits = Tensor::from_vec(rows.concat(), [rows.len(), 6]).unwrap();
            differences(&logits, filter, &words(i, rows.len()));
        }
    }
}

#[test]
fn the_first_and_the_last_word_draw_the_first_and_the_last_token_kept() {
    let logits = Tensor::from_vec([0.0, 3.0, 1.0, 3.0, 2.0, -1.0].repeat(2), [2, 6]).unwrap();
    let ends = |filter| same_on_all(&logits, filter, &[0, u64::MAX]);
    assert_eq!(ends(ALL), [0, 5]);
    assert_eq!(ends(filter(1.0, 2, 1.0)), [1, 3]);
    assert_eq!(ends(filter(1.0, 3, 1.0)), [1, 4]);
    assert_eq!(ends(filter(1.0, 0, 0.01)), [1, 1]);
    assert_eq!(ends(filter(1.0, 2, 0.6)), [1, 3]);
    assert_eq!(ends(filter(0.01, 5, 0.6)), [1, 3]);
    assert_eq!(ends(filter(f32::MAX, 0, 1.0)), [0, 5]);
    assert_eq!(ends(filter(1e-45, 0, 1.0)), [1, 3]);
    // Of equals exactly so many, the lower ids.
    let equal = Tensor::from_vec(vec![-2.5; 2 * 5000], [2, 5000]).unwrap();
    let ends = |filter| same_on_all(&equal, filter, &[0, u64::MAX]);
    assert_eq!(ends(filter(1.0, 3000, 1.0)), [0, 2999]);
    assert_eq!(ends(filter(1.0, 0, 0.5)), [0, 2499]);
    assert_eq!(ends(filter(1.0, 4000, 0.5)), [0, 1999]);
    assert_eq!(ends(filter(0.0, 0, 1.0)), [0, 0]);
}

#[test]
fn rows_where_nothing_can_be_drawn_are_marked() {
    let (nan, inf) = (f32::NAN, f32::NEG_INFINITY);
    let rows = [[nan; 3], [1.0, nan, 0.0], [inf; 3], [inf, nan, -1.0]];
    let logits = Tensor::from_vec(rows.concat(), [4, 3]).unwrap();
    for filter in [filter(0.0, 0, 1.0), filter(0.1, 0, 0.5), ALL] {
        let found = same_on_all(&logits, filter, &[0; 4]);
        assert_eq!(found, [NONE, 0, NONE, 2], "{filter:?}");
    }
}

#[test]
fn tokens_come_with_their_probability() {
    let row = [0.4f32, 0.1, 0.2, 0.2, 0.1].map(f32::ln);
    let draws = 800;
    let logits = Tensor::from_vec(row.repeat(draws), [draws, 5]).unwrap();
    let squared = [16.0, 1.0, 4.0, 4.0, 1.0].map(|share| share / 26.0);
    let two = [2.0 / 3.0, 0.0, 1.0 / 3.0, 0.0, 0.0];
    let first = [1.0, 0.0, 0.0, 0.0, 0.0];
    for (i, (filter, want)) in [
        (ALL, [0.4, 0.1, 0.2, 0.2, 0.1]),
        // At temperature 1/2 probabilities are squared.
        (filter(0.5, 0, 1.0), squared),
        (filter(1.0, 2, 1.0), two),
        (filter(1.0, 0, 0.75), [0.5, 0.0, 0.25, 0.25, 0.0]),
        (filter(1.0, 0, 0.39), first),
        // Top-p counts within what top-k left: 4/6 is below 0.7, so the second is needed.
        (filter(1.0, 2, 0.7), two),
        (filter(1.0, 2, 0.65), first),
    ]
    .into_iter()
    .enumerate()
    {
        let found = same_on_all(&logits, filter, &words(100 + i as u64, draws));
        let count = |token| found.iter().filter(|&&t| t == token).count() as f64;
        let mut chi_square = 0.0;
        for (token, want) in want.into_iter().enumerate() {
            let (found, want) = (count(token as u32), want * draws as f64);
            assert!(want > 0.0 || found == 0.0, "{filter:?}: {token}");
            chi_square += (found - want).powi(2) / want.max(1.0);
        }
        // Four degrees of freedom at most: exceeded once in 10 000 times.
        assert!(chi_square < 23.5, "{filter:?}: {chi_square}");
    }
}

#[test]
fn a_row_draws_the_same_alone_beside_others_and_again() {
    let vocab = 5003;
    let logits = random(1, &[7, vocab], 6.0);
    let words = words(2, 7);
    for device in devices("sample") {
        for filter in [filter(0.0, 0, 1.0), ALL, filter(1.3, 900, 0.9)] {
            let together = tokens(&device, &logits, filter, &words);
            assert_eq!(together, tokens(&device, &logits, filter, &words));
            let rows = logits.f32s().unwrap().chunks(vocab);
            for ((row, word), token) in rows.zip(&words).zip(together) {
                let row = Tensor::from_vec(row.to_vec(), [1, vocab]).unwrap();
                assert_eq!(tokens(&device, &row, filter, &[*word]), [token]);
            }
        }
    }
}

#[test]
fn a_row_is_read_once_for_the_likeliest_and_three_times_at_most() {
    let Some(device) = cuda() else { return };
    let Device::Cuda(gpu) = device else { return };
    let (rows, vocab) = (2, 151_936);
    // Like a model's: most tokens are unlikely.
    let mut logits = random(1, &[rows, vocab], 1.0);
    let values = logits.f32s_mut().unwrap();
    values.iter_mut().for_each(|v| *v = 18.0 * *v * *v * *v);
    let logits = gpu.resident(&logits, DType::F32).unwrap();
    let words = words(3, rows);
    for (name, filter, reads) in [
        ("greedy", filter(0.0, 0, 1.0), 1),
        ("all", ALL, 2),
        ("top-p", filter(1.0, 0, 0.95), 3),
        ("top-k and top-p", filter(0.8, 50, 0.95), 3),
    ] {
        let run = || drop(sample(device, &logits, filter, &words).unwrap());
        let bytes = reads * 4 * rows * vocab;
        if reads < 3 {
            let flop = 0;
            Least { name, bytes, flop }.holds_for(run);
            continue;
        }
        let Some(counted) = counters_of_all(run) else {
            return;
        };
        // Every block reads what was counted by bins, and tokens meet in a bin's bank.
        let moved = 32 * (counted.global_load_sectors + counted.global_store_sectors);
        let ratio = moved as f64 / bytes as f64;
        println!("sample, {name}: {moved} bytes, {ratio:.3} of the least; {counted:?}");
        assert!(ratio <= 1.15, "{name}: {ratio:.3} of the least bytes");
    }
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    for device in devices("sample") {
        let logits = random(1, &[2, 6], 1.0);
        let error = |logits: &Tensor, filter, words: &[u64]| {
            let error = sample(&device, logits, filter, words).unwrap_err();
            error.to_string()
        };
        assert!(error(&logits, ALL, &[1]).contains("1 rows"));
        let empty = Tensor::from_vec(vec![], [2, 0]).unwrap();
        assert!(error(&empty, ALL, &[1, 2]).contains("[2, 0]"));
        for wrong in [
            filter(-1.0, 0, 1.0),
            filter(f32::NAN, 0, 1.0),
            filter(f32::INFINITY, 0, 1.0),
            filter(1.0, 0, 0.0),
            filter(1.0, 0, 1.5),
        ] {
            let error = error(&logits, wrong, &[1, 2]);
            assert!(error.contains("temperature"), "{error}");
        }
    }
}
