use std::thread::sleep;
use std::time::Duration;

use super::shape::lock;
use super::*;
use crate::error::Error;

/// Row r's parts hold r and r + 0.5; each call is counted.
fn results(rows: &[usize], calls: &mut Vec<Vec<usize>>) -> Result<Vec<Tensor>> {
    calls.push(rows.to_vec());
    let part = |add: f32| {
        let data = rows.iter().flat_map(|&r| [r as f32 + add; 6]).collect();
        Tensor::from_vec(data, [rows.len() * 2, 3])
    };
    Ok(vec![part(0.0)?, part(0.5)?])
}

fn cache(memory: u64, dir: &Path) -> RowCache {
    let space = CacheSpace {
        memory,
        dir,
        reserve: 0,
    };
    let device = Device::cpu(1).unwrap();
    RowCache::new(&device, &[2, 0, 4, 1, 3], 2, [2, 2, 3], Some(space)).unwrap()
}

#[test]
fn what_was_computed_once_is_not_computed_again() {
    let dir = tempfile::tempdir().unwrap();
    for memory in [0, 1 << 20] {
        let (mut cache, mut calls) = (cache(memory, dir.path()), Vec::new());
        for rows in [&[2, 0][..], &[4, 1], &[3]] {
            cache.get(rows, |r| results(r, &mut calls)).unwrap();
        }
        let parts = cache.get(&[1, 2, 3], |r| results(r, &mut calls)).unwrap();
        assert_eq!(calls, [vec![2, 0], vec![4, 1], vec![3]]);
        let first = parts[1].f32s().unwrap();
        assert_eq!((first[0], first[6], first[12]), (1.5, 2.5, 3.5));
    }
}

#[test]
fn it_is_complete_when_every_row_is_stored_in_whatever_order() {
    let dir = tempfile::tempdir().unwrap();
    let (mut cache, mut calls) = (cache(0, dir.path()), Vec::new());
    for (row, complete) in [(3, false), (0, false), (1, true)] {
        assert!(!cache.is_complete().unwrap());
        cache.get(&[row], |r| results(r, &mut calls)).unwrap();
        assert_eq!(cache.is_complete().unwrap(), complete, "{calls:?}");
    }
}

#[test]
fn a_cache_that_keeps_nothing_is_never_complete() {
    let device = Device::cpu(1).unwrap();
    let mut cache = RowCache::new(&device, &[0], 1, [2, 2, 3], None).unwrap();
    cache.get(&[0], |r| results(r, &mut Vec::new())).unwrap();
    assert!(!cache.is_complete().unwrap());
}

#[test]
fn two_caches_share_the_space() {
    let dir = tempfile::tempdir().unwrap();
    let space = CacheSpace {
        memory: 1000,
        dir: dir.path(),
        reserve: 7,
    };
    // Five rows of two parts of six values each.
    let beside = space.beside(&cache(1000, dir.path()));
    assert_eq!((beside.memory, beside.reserve), (1000 - 240, 7));
    let beside = space.beside(&cache(0, dir.path()));
    assert_eq!((beside.memory, beside.reserve), (1000, 7 + 240));
}

#[test]
fn a_missed_row_is_computed_with_the_rows_of_its_group() {
    let dir = tempfile::tempdir().unwrap();
    let (mut cache, mut calls) = (cache(1 << 20, dir.path()), Vec::new());
    let parts = cache.get(&[1], |r| results(r, &mut calls)).unwrap();
    assert_eq!(parts[0].f32s().unwrap(), &[1.0; 6]);
    assert_eq!(parts[0].shape(), &[2, 3]);
    cache.get(&[4], |r| results(r, &mut calls)).unwrap();
    assert_eq!(calls, [vec![4, 1]]);
}

/// Rows too large for one buffer of page-locked memory.
const WIDE: [usize; 3] = [2, 64, 40_000];

/// Groups [0, 1], [2, 3] and [4] on a GPU.
fn on_gpu(dir: &Path) -> Option<(CudaDevice, RowCache)> {
    let cuda = CudaDevice::for_tests(3)?;
    let space = CacheSpace {
        memory: 1 << 30,
        dir,
        reserve: 0,
    };
    let device = Device::Cuda(cuda.clone());
    let cache = RowCache::new(&device, &[0, 1, 2, 3, 4], 2, WIDE, Some(space));
    Some((cuda, cache.unwrap()))
}

/// Value i of a row's part.
fn value(row: usize, part: usize, i: usize) -> f32 {
    ((i * 7 + row * 31 + part * 13) % 255) as f32
}

/// What the GPU computes for rows.
fn computed(cuda: &CudaDevice, rows: &[usize]) -> Result<Vec<Tensor>> {
    let [parts, seq_len, width] = WIDE;
    let part = |part| {
        let values = rows.iter().flat_map(|&row| {
            let values = 0..seq_len * width;
            values.map(move |i| value(row, part, i))
        });
        let values = Tensor::from_vec(values.collect(), [rows.len() * seq_len, width])?;
        cuda.resident(&values, DType::Bf16)
    };
    (0..parts).map(part).collect()
}

fn assert_rows(parts: &[Tensor], rows: &[usize]) {
    let [count, seq_len, width] = WIDE;
    assert_eq!(parts.len(), count);
    for (number, part) in parts.iter().enumerate() {
        assert_eq!(part.shape(), [rows.len() * seq_len, width]);
        let part = part.to_f32().unwrap();
        let part = part.f32s().unwrap().chunks(seq_len * width);
        for (&row, values) in rows.iter().zip(part) {
            let mut right = values.iter().enumerate();
            assert!(right.all(|(i, &v)| v == value(row, number, i)), "row {row}");
        }
    }
}

fn none(_: &[usize]) -> Result<Vec<Tensor>> {
    panic!("nothing is to be computed again")
}

#[test]
fn what_a_gpu_computed_comes_back_bit_for_bit_with_and_without_notice() {
    let dir = tempfile::tempdir().unwrap();
    let Some((cuda, mut cache)) = on_gpu(dir.path()) else {
        return;
    };
    for rows in [&[0, 1][..], &[2, 3], &[4]] {
        let parts = cache.get(rows, |rows| computed(&cuda, rows)).unwrap();
        assert_rows(&parts, rows);
    }
    assert_rows(&cache.get(&[4, 1, 2], none).unwrap(), &[4, 1, 2]);
    for rows in [[3, 0], [1, 4], [2, 2]] {
        cache.prefetch(&rows).unwrap();
        assert!(cache.fetching.is_some());
        assert_rows(&cache.get(&rows, none).unwrap(), &rows);
    }
    // Others than were announced.
    cache.prefetch(&[3, 0]).unwrap();
    assert_rows(&cache.get(&[0, 3], none).unwrap(), &[0, 3]);
}

#[test]
fn a_group_is_computed_while_the_one_before_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let Some((cuda, mut cache)) = on_gpu(dir.path()) else {
        return;
    };
    let store = cache.store.clone().unwrap();
    // Nothing is stored while the store is held here.
    let mut held = Some(lock(&store));
    cache.get(&[0, 1], |rows| computed(&cuda, rows)).unwrap();
    let while_held = |rows: &[usize]| {
        held = None;
        computed(&cuda, rows)
    };
    let parts = cache.get(&[2, 3], while_held).unwrap();
    assert_rows(&parts, &[2, 3]);
    assert_rows(&cache.get(&[0, 3], none).unwrap(), &[0, 3]);
}

#[test]
fn a_row_that_is_being_stored_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let Some((cuda, mut cache)) = on_gpu(dir.path()) else {
        return;
    };
    let store = cache.store.clone().unwrap();
    thread::scope(|scope| {
        let held = lock(&store);
        cache.get(&[0, 1], |rows| computed(&cuda, rows)).unwrap();
        let reader = scope.spawn(|| cache.get(&[1], none));
        sleep(Duration::from_millis(50));
        assert!(!reader.is_finished());
        drop(held);
        assert_rows(&reader.join().unwrap().unwrap(), &[1]);
    });
}

#[test]
fn a_background_store_error_is_returned_by_a_later_call() {
    let dir = tempfile::tempdir().unwrap();
    let Some((cuda, mut cache)) = on_gpu(dir.path()) else {
        return;
    };
    let wrong = |rows: &[usize]| {
        let parts = computed(&cuda, rows)?.into_iter();
        parts.map(|part| cuda.resident(&part, DType::F32)).collect()
    };
    cache.get(&[0, 1], wrong).unwrap();
    let error = cache.get(&[2, 3], |rows| computed(&cuda, rows));
    assert!(matches!(error, Err(Error::Operand { .. })), "{error:?}");
}
