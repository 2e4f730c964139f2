use resa_engine::data::ActivationCache;
use tempfile::TempDir;

fn row(i: usize, len: usize) -> Vec<u8> {
    (0..len).map(|j| (i * 31 + j * 7) as u8).collect()
}

fn caches(rows: usize, len: usize, dir: &TempDir) -> [ActivationCache; 2] {
    let bytes = (rows * len) as u64;
    let memory = ActivationCache::new(rows, len, bytes, dir.path(), 0).unwrap();
    let disk = ActivationCache::new(rows, len, bytes - 1, dir.path(), 0).unwrap();
    assert!(!memory.is_on_disk() && disk.is_on_disk());
    [memory, disk]
}

#[test]
fn rows_come_back_to_the_bit_from_memory_and_from_disk() {
    let dir = TempDir::new().unwrap();
    for mut cache in caches(10, 1000, &dir) {
        assert_eq!(cache.get(3), None);
        for i in [9, 0, 3] {
            cache.put(i, row(i, 1000)).unwrap();
        }
        cache.put(9, row(4, 1000)).unwrap();
        for (i, same_as) in [(0, 0), (3, 3), (9, 4)] {
            assert_eq!(cache.get(i), Some(&row(same_as, 1000)[..]));
        }
        assert!(cache.get(1).is_none() && cache.get(10).is_none());
    }
}

#[test]
fn the_spill_file_leaves_nothing_behind() {
    let dir = TempDir::new().unwrap();
    let [_, mut disk] = caches(4, 100, &dir);
    disk.put(0, row(0, 100)).unwrap();
    drop(disk);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[cfg(unix)]
#[test]
fn a_cache_larger_than_the_disk_keeps_what_fits_and_misses_the_rest() {
    let dir = TempDir::new().unwrap();
    // Four rows of an exabyte each: no disk has room for one.
    let len = 1 << 60;
    let cache = ActivationCache::new(4, len, 1 << 20, dir.path(), 0).unwrap();
    assert!(cache.is_on_disk() && cache.get(0).is_none());
    // 4 TiB: more than most disks, but one row fits.
    let len = 1 << 22;
    let mut cache = ActivationCache::new(1 << 20, len, 1 << 20, dir.path(), 0).unwrap();
    cache.put(1_000_000, row(5, len)).unwrap();
    assert_eq!(cache.get(1_000_000), Some(&row(5, len)[..]));
}

#[cfg(unix)]
#[test]
fn what_is_reserved_of_the_disk_is_left_to_others() {
    let dir = TempDir::new().unwrap();
    let taken_of_a_disk = |reserve| {
        let mut cache = ActivationCache::new(4, 10, 0, dir.path(), reserve).unwrap();
        let before = cache.will_take();
        cache.put(2, row(2, 10)).unwrap();
        [before, cache.will_take()]
    };
    assert_eq!(taken_of_a_disk(0), [[0, 40], [0, 30]]);
    // More than any disk has.
    assert_eq!(taken_of_a_disk(u64::MAX), [[0, 0]; 2]);
    let in_memory = ActivationCache::new(4, 10, 40, dir.path(), 0).unwrap();
    assert_eq!(in_memory.will_take(), [40, 0]);
}

#[test]
fn wrong_rows_lengths_and_places_are_refused() {
    let dir = TempDir::new().unwrap();
    for mut cache in caches(4, 10, &dir) {
        assert!(cache.put(4, row(0, 10)).is_err());
        let message = cache.put(0, row(0, 9)).unwrap_err().to_string();
        assert!(message.contains("10") && message.contains('9'), "{message}");
        cache.put(0, row(0, 10)).unwrap();
    }
    assert!(ActivationCache::new(usize::MAX, 2, 0, dir.path(), 0).is_err());
    let message = ActivationCache::new(4, 4, 0, &dir.path().join("none"), 0).unwrap_err();
    assert!(message.to_string().contains("none"), "{message}");
}
