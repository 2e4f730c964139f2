//! Counters of a launch: what a profiler would count, without time.

use crate::machine::checks::is_row;
use crate::ptx::ops::Class;

/// Counters of one launch, or sums over launches. The layout is C's, for other languages.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub launches: u64,
    pub blocks: u64,
    /// Warp instructions executed, and the lanes active in them.
    pub warp_instructions: u64,
    pub lane_instructions: u64,
    /// Warp instructions by class, indexed by [`Class`].
    pub by_class: [u64; Class::COUNT],
    /// Branches that split a warp.
    pub divergent_branches: u64,
    /// Warp-level global loads, the bytes their lanes asked for, the 32-byte sectors touched.
    pub global_load_requests: u64,
    pub global_load_bytes: u64,
    pub global_load_sectors: u64,
    pub global_store_requests: u64,
    pub global_store_bytes: u64,
    pub global_store_sectors: u64,
    /// Warp-level shared accesses (ldmatrix, stmatrix and the writes of cp.async included).
    pub shared_requests: u64,
    /// Passes over the 32 banks they took, and how many of those bank conflicts added.
    pub shared_wavefronts: u64,
    pub shared_bank_conflicts: u64,
    /// Lane-level atomic operations.
    pub global_atomics: u64,
    pub shared_atomics: u64,
    /// Barrier instructions executed by warps.
    pub barriers: u64,
    /// Floating-point operations of matrix instructions, two per multiply-add.
    pub mma_flop: u64,
    /// Floating-point operations of fma, add and mul lanes.
    pub flop: u64,
    /// Warp-level accesses to shared memory of the cluster through `shared::cluster` addresses
    /// (bulk copies apart), and the bytes their lanes asked for.
    pub cluster_requests: u64,
    pub cluster_bytes: u64,
}

impl Counters {
    /// Adds another launch's or block's counts.
    pub fn add(&mut self, other: &Self) {
        self.launches += other.launches;
        self.blocks += other.blocks;
        self.warp_instructions += other.warp_instructions;
        self.lane_instructions += other.lane_instructions;
        for (mine, theirs) in self.by_class.iter_mut().zip(other.by_class) {
            *mine += theirs;
        }
        self.divergent_branches += other.divergent_branches;
        self.global_load_requests += other.global_load_requests;
        self.global_load_bytes += other.global_load_bytes;
        self.global_load_sectors += other.global_load_sectors;
        self.global_store_requests += other.global_store_requests;
        self.global_store_bytes += other.global_store_bytes;
        self.global_store_sectors += other.global_store_sectors;
        self.shared_requests += other.shared_requests;
        self.shared_wavefronts += other.shared_wavefronts;
        self.shared_bank_conflicts += other.shared_bank_conflicts;
        self.global_atomics += other.global_atomics;
        self.shared_atomics += other.shared_atomics;
        self.barriers += other.barriers;
        self.mma_flop += other.mma_flop;
        self.flop += other.flop;
        self.cluster_requests += other.cluster_requests;
        self.cluster_bytes += other.cluster_bytes;
    }

    /// Warp instructions of one class.
    pub fn class(&self, class: Class) -> u64 {
        self.by_class[class as usize]
    }

    /// Mean 32-byte sectors per global load request; 0 without requests.
    pub fn sectors_per_load(&self) -> f64 {
        if self.global_load_requests == 0 {
            return 0.0;
        }
        self.global_load_sectors as f64 / self.global_load_requests as f64
    }

    /// One line of JSON.
    pub fn to_json(&self, kernel: &str) -> String {
        let classes: Vec<String> = self.by_class.iter().map(u64::to_string).collect();
        let name: String = kernel
            .chars()
            .filter(|c| !matches!(c, '"' | '\\') && !c.is_control())
            .collect();
        format!(
            "{{\"kernel\":\"{name}\",\"launches\":{},\"blocks\":{},\"warp_instructions\":{},\"lane_instructions\":{},\
             \"by_class\":[{}],\"divergent_branches\":{},\"global_load_requests\":{},\"global_load_bytes\":{},\
             \"global_load_sectors\":{},\"global_store_requests\":{},\"global_store_bytes\":{},\
             \"global_store_sectors\":{},\"shared_requests\":{},\"shared_wavefronts\":{},\
             \"shared_bank_conflicts\":{},\"global_atomics\":{},\"shared_atomics\":{},\"barriers\":{},\
             \"mma_flop\":{},\"flop\":{},\"cluster_requests\":{},\"cluster_bytes\":{}}}",
            self.launches,
            self.blocks,
            self.warp_instructions,
            self.lane_instructions,
            classes.join(","),
            self.divergent_branches,
            self.global_load_requests,
            self.global_load_bytes,
            self.global_load_sectors,
            self.global_store_requests,
            self.global_store_bytes,
            self.global_store_sectors,
            self.shared_requests,
            self.shared_wavefronts,
            self.shared_bank_conflicts,
            self.global_atomics,
            self.shared_atomics,
            self.barriers,
            self.mma_flop,
            self.flop,
            self.cluster_requests,
            self.cluster_bytes,
        )
    }

    /// Notes a global load or store of `len` bytes per lane at these addresses.
    pub fn global_access(&mut self, load: bool, addresses: &[u64; 32], len: u64, exec: u32) {
        let sectors = sectors(addresses, len, exec);
        let bytes = u64::from(exec.count_ones()) * len;
        if load {
            self.global_load_requests += 1;
            self.global_load_bytes += bytes;
            self.global_load_sectors += sectors;
        } else {
            self.global_store_requests += 1;
            self.global_store_bytes += bytes;
            self.global_store_sectors += sectors;
        }
    }

    /// Notes an access of `len` bytes per lane through `shared::cluster` addresses.
    pub fn remote_access(&mut self, len: u64, exec: u32) {
        self.cluster_requests += 1;
        self.cluster_bytes += u64::from(exec.count_ones()) * len;
    }

    /// Notes a shared access of `len` bytes per lane.
    pub fn shared_access(&mut self, offsets: &[u64; 32], len: u64, exec: u32) {
        let (wavefronts, least) = wavefronts(offsets, len, exec);
        self.shared_requests += 1;
        self.shared_wavefronts += wavefronts;
        self.shared_bank_conflicts += wavefronts - least;
    }
}

/// Distinct 32-byte sectors that a warp touches.
fn sectors(addresses: &[u64; 32], len: u64, exec: u32) -> u64 {
    if is_row(addresses, len, exec) {
        return addresses[31].saturating_add(len - 1) / 32 - addresses[0] / 32 + 1;
    }
    let mut list = [0u64; 64];
    let mut count = 0;
    let mut sorted = true;
    for lane in (0..32).filter(|lane| exec >> lane & 1 == 1) {
        let (first, last) = (
            addresses[lane] / 32,
            addresses[lane].saturating_add(len - 1) / 32,
        );
        for sector in first..=last {
            if count > 0 && list[count - 1] == sector {
                continue;
            }
            sorted &= count == 0 || list[count - 1] < sector;
            if count < list.len() {
                list[count] = sector;
                count += 1;
            }
        }
    }
    if sorted {
        return count as u64;
    }
    list[..count].sort_unstable();
    1 + list[..count].windows(2).filter(|w| w[0] != w[1]).count() as u64
}

/// Passes over the 32 four-byte banks that an access takes, and the least it could take:
/// lanes go together by 32 for up to 4 bytes, by 16 for 8 and by 8 for 16 bytes; within such a
/// phase, each distinct word of a bank costs a pass.
fn wavefronts(offsets: &[u64; 32], len: u64, exec: u32) -> (u64, u64) {
    if len >= 4 && is_row(offsets, len, exec) {
        return (len / 4, len / 4);
    }
    let lanes_per_phase = match len {
        0..=4 => 32,
        8 => 16,
        _ => 8,
    };
    let (mut total, mut least) = (0, 0);
    for phase in 0..32 / lanes_per_phase {
        let mut words = [0u64; 32];
        let mut count = 0;
        for lane in (phase * lanes_per_phase..).take(lanes_per_phase) {
            if exec >> lane & 1 == 0 {
                continue;
            }
            for word in offsets[lane] / 4..offsets[lane].saturating_add(len).div_ceil(4) {
                if count < words.len() {
                    words[count] = word;
                    count += 1;
                }
            }
        }
        if count == 0 {
            continue;
        }
        least += 1;
        total += distinct_words_per_bank(&mut words[..count]);
    }
    (total, least)
}

fn distinct_words_per_bank(words: &mut [u64]) -> u64 {
    // Conflict-free rows are the rule: all banks different.
    let banks = words.iter().fold(0u32, |m, w| m | 1 << (w % 32));
    if banks.count_ones() as usize == words.len() {
        return 1;
    }
    words.sort_unstable();
    let mut load = [0u64; 32];
    let mut previous = None;
    for &word in words.iter() {
        if previous != Some(word) {
            load[(word % 32) as usize] += 1;
        }
        previous = Some(word);
    }
    load.into_iter().max().unwrap_or(1)
}
