//! Shadow of global memory: which bytes were ever written, and which blocks of the running
//! launch touched them.
//!
//! One word of shadow per four bytes. Blocks that touch different bytes of one word move it to
//! an exact side table, so that neighbours do not raise false alarms.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Mutex, PoisonError};

/// Launches told apart before shadows must be cleared.
pub const EPOCHS: u64 = 1 << 10;

const BLOCK_BITS: u32 = 20;
const BLOCK_MASK: u64 = (1 << BLOCK_BITS) - 1;
const TABLE_SHARDS: usize = 64;

/// How memory is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    Read,
    Write,
    /// Atomic or otherwise ordered access: conflicts with plain writes alone.
    Atomic,
    /// An ordered store (`st.release`, `st.volatile`): atomic, and defines the bytes.
    AtomicWrite,
}

impl Touch {
    fn reads(self) -> bool {
        matches!(self, Touch::Read | Touch::Atomic)
    }

    fn defines(self) -> bool {
        matches!(self, Touch::Write | Touch::AtomicWrite)
    }
}

/// What is wrong with a touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    Uninitialized,
    /// Another block wrote the byte.
    Written {
        by: u32,
    },
    /// Another block read the byte that is now written; None if several did.
    ReadBy {
        by: Option<u32>,
    },
}

/// Unpacked shadow word.
#[derive(Clone, Copy, Debug, Default)]
struct Word {
    defined: u64,
    written: u64,
    read: u64,
    many_readers: bool,
    mixed: bool,
    writer: u64,
    reader: u64,
    epoch: u64,
}

impl Word {
    #[inline(always)]
    fn unpack(bits: u64) -> Self {
        Self {
            defined: bits & 0xf,
            written: bits >> 4 & 0xf,
            read: bits >> 8 & 0xf,
            many_readers: bits >> 12 & 1 == 1,
            mixed: bits >> 13 & 1 == 1,
            writer: bits >> 14 & BLOCK_MASK,
            reader: bits >> (14 + BLOCK_BITS) & BLOCK_MASK,
            epoch: bits >> (14 + 2 * BLOCK_BITS),
        }
    }

    #[inline(always)]
    fn pack(self) -> u64 {
        self.defined
            | self.written << 4
            | self.read << 8
            | u64::from(self.many_readers) << 12
            | u64::from(self.mixed) << 13
            | self.writer << 14
            | self.reader << (14 + BLOCK_BITS)
            | self.epoch << (14 + 2 * BLOCK_BITS)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Byte {
    writer: Option<u64>,
    reader: Option<u64>,
    many_readers: bool,
}

/// State of one launch that race checks need.
#[derive(Debug)]
pub struct LaunchState {
    pub epoch: u64,
    grid: [u32; 3],
    cluster: [u32; 3],
    /// Per block (modulo 2^20): when it first published its writes, [`NEVER`] if it has not; and
    /// when any block first did.
    published: Vec<AtomicU64>,
    first: AtomicU64,
    clock: AtomicU64,
    /// Words that several blocks touch in parts.
    mixed: Vec<Mutex<HashMap<u64, [Byte; 4]>>>,
}

const NEVER: u64 = u64::MAX;

impl LaunchState {
    pub fn new(epoch: u64, grid: [u32; 3], cluster: [u32; 3]) -> Self {
        let blocks: u64 = grid.iter().map(|&n| u64::from(n)).product();
        let slots = blocks.min(1 << BLOCK_BITS) as usize;
        Self {
            epoch,
            grid,
            cluster,
            published: (0..slots).map(|_| AtomicU64::new(NEVER)).collect(),
            first: AtomicU64::new(NEVER),
            clock: AtomicU64::new(0),
            mixed: (0..TABLE_SHARDS)
                .map(|_| Mutex::new(HashMap::new()))
                .collect(),
        }
    }

    /// The block has executed a device-wide fence and is about to execute an atomic or an ordered
    /// store: who sees that sees the writes before the fence.
    pub fn publish(&self, block: u64) {
        let now = self.clock.fetch_add(1, SeqCst);
        if let Some(slot) = self.published.get((block & BLOCK_MASK) as usize) {
            slot.fetch_min(now, SeqCst);
        }
        self.first.fetch_min(now, SeqCst);
    }

    /// The time of an atomic or ordered load just executed; 0 before anything was published.
    pub fn acquire(&self) -> u64 {
        match self.first.load(SeqCst) {
            NEVER => 0,
            _ => self.clock.fetch_add(1, SeqCst),
        }
    }

    fn published(&self, block: u64) -> u64 {
        let slot = self.published.get(block as usize);
        slot.map_or(NEVER, |p| p.load(SeqCst))
    }

    /// The cluster of a block, by its coordinates.
    fn cluster_of(&self, block: u64) -> [u64; 3] {
        let [gx, gy, _] = self.grid.map(u64::from);
        let [cx, cy, cz] = self.cluster.map(u64::from);
        [block % gx / cx, block / gx % gy / cy, block / gx / gy / cz]
    }
}

/// Who touches memory.
#[derive(Clone, Copy, Debug)]
pub struct Toucher<'a> {
    pub launch: &'a LaunchState,
    pub block: u64,
    /// When the block last executed an atomic or an ordered load.
    pub acquired: u64,
    /// The block has passed a barrier of its cluster.
    pub in_step: bool,
}

impl Toucher<'_> {
    /// Whether a conflict is excused: the other block published its accesses and this one has read
    /// an atomic since, the pattern of "last block done" reductions; or a barrier of their cluster
    /// may lie between them. None stands for several blocks.
    fn excused(&self, other: Option<u64>) -> bool {
        let launch = self.launch;
        let same_cluster = |o| launch.cluster_of(o) == launch.cluster_of(self.block & BLOCK_MASK);
        let published = other.map_or_else(|| launch.first.load(SeqCst), |o| launch.published(o));
        published < self.acquired || self.in_step && other.is_none_or(same_cluster)
    }
}

/// The shadow of one allocation.
#[derive(Debug)]
pub struct Shadow {
    words: Box<[AtomicU64]>,
}

impl Shadow {
    /// Shadow of `bytes` bytes, none of them defined; untouched parts cost no memory.
    pub fn new(bytes: usize) -> Self {
        let words: Vec<u64> = vec![0; bytes.div_ceil(4)];
        let words = words.into_boxed_slice();
        // SAFETY: AtomicU64 has the size and alignment of u64, and the box is owned here;
        // keeping the zeroed allocation keeps its pages untouched.
        let words = unsafe { Box::from_raw(Box::into_raw(words) as *mut [AtomicU64]) };
        Self { words }
    }

    /// Marks bytes as written by the host.
    pub fn define(&self, start: u64, len: u64) {
        self.for_words(start, len, |word, mask| {
            if mask == 0xf {
                word.store(0xf, Relaxed);
            } else {
                word.fetch_or(mask, Relaxed);
            }
        });
    }

    /// Copies which bytes are defined (device to device copies).
    pub fn define_from(&self, to: u64, other: &Shadow, from: u64, len: u64) {
        for i in 0..len {
            let defined = other.is_defined(from + i, 1);
            let at = to + i;
            let bit = 1u64 << (at % 4);
            let word = &self.words[(at / 4) as usize];
            if defined {
                word.fetch_or(bit, Relaxed);
            } else {
                word.fetch_and(!bit, Relaxed);
            }
        }
    }

    /// Whether every byte of a range was written.
    pub fn is_defined(&self, start: u64, len: u64) -> bool {
        let mut all = true;
        self.for_words(start, len, |word, mask| {
            all &= word.load(Relaxed) & mask == mask
        });
        all
    }

    /// Forgets who touched what; definedness stays. Needed when epochs wrap around.
    pub fn clear_epochs(&self) {
        for word in &self.words {
            let bits = word.load(Relaxed);
            if bits & !0xf != 0 {
                word.store(bits & 0xf, Relaxed);
            }
        }
    }

    fn for_words(&self, start: u64, len: u64, mut f: impl FnMut(&AtomicU64, u64)) {
        let end = start + len;
        let mut at = start;
        while at < end {
            let word_end = (at / 4 + 1) * 4;
            let stop = end.min(word_end);
            let mask = ((1u64 << (stop - at)) - 1) << (at % 4);
            f(&self.words[(at / 4) as usize], mask);
            at = stop;
        }
    }

    /// Records an access of `len` bytes at `start` (in bounds) and reports what is wrong with it.
    #[inline]
    pub fn touch(
        &self,
        start: u64,
        len: u64,
        touch: Touch,
        by: &Toucher<'_>,
    ) -> Result<(), Conflict> {
        if start.is_multiple_of(4) && len.is_multiple_of(4) {
            let recorded = recorded(touch, by);
            for word in &self.words[(start / 4) as usize..((start + len) / 4) as usize] {
                if word.load(Relaxed) != recorded {
                    touch_word(word, 0xf, touch, by)?;
                }
            }
            return Ok(());
        }
        let mut result = Ok(());
        self.for_words(start, len, |word, mask| {
            if result.is_ok() {
                result = touch_word(word, mask, touch, by);
            }
        });
        result
    }
}

/// A word that the block alone has touched, in this way and whole: touching it so again changes
/// nothing. For touches that are not plain, a word that does not exist.
#[inline(always)]
fn recorded(touch: Touch, by: &Toucher<'_>) -> u64 {
    let me = by.block & BLOCK_MASK;
    let word = Word {
        defined: 0xf,
        epoch: by.launch.epoch,
        ..Word::default()
    };
    match touch {
        Touch::Read => Word {
            read: 0xf,
            reader: me,
            ..word
        }
        .pack(),
        Touch::Write => Word {
            written: 0xf,
            writer: me,
            ..word
        }
        .pack(),
        Touch::Atomic | Touch::AtomicWrite => u64::MAX,
    }
}

#[inline(always)]
fn touch_word(word: &AtomicU64, mask: u64, touch: Touch, by: &Toucher<'_>) -> Result<(), Conflict> {
    let old = word.load(Relaxed);
    let w = Word::unpack(old);
    let me = by.block & BLOCK_MASK;
    let current = w.epoch == by.launch.epoch && !w.mixed;
    // Nothing to record when the same block repeats what it did.
    let known_reader = w.reader == me || w.many_readers;
    if current && touch == Touch::Read && known_reader && w.read & mask == mask && w.written == 0 {
        return if w.defined & mask == mask {
            Ok(())
        } else {
            Err(Conflict::Uninitialized)
        };
    }
    if current && touch == Touch::Write && w.writer == me && w.written & mask == mask && w.read == 0
    {
        return Ok(());
    }
    record(word, old, mask, touch, by)
}

#[inline(never)]
fn record(
    word: &AtomicU64,
    mut old: u64,
    mask: u64,
    touch: Touch,
    by: &Toucher<'_>,
) -> Result<(), Conflict> {
    loop {
        let mut w = Word::unpack(old);
        if touch.reads() && w.defined & mask != mask {
            return Err(Conflict::Uninitialized);
        }
        if w.epoch != by.launch.epoch {
            w = Word {
                defined: w.defined,
                epoch: by.launch.epoch,
                ..Word::default()
            };
        }
        if w.mixed || !update(&mut w, mask, touch, by)? {
            return record_mixed(word, mask, touch, by);
        }
        match word.compare_exchange_weak(old, w.pack(), Relaxed, Relaxed) {
            Ok(_) => return Ok(()),
            Err(now) => old = now,
        }
    }
}

/// Applies a touch to a word; false if one word cannot express the result.
fn update(w: &mut Word, mask: u64, touch: Touch, by: &Toucher<'_>) -> Result<bool, Conflict> {
    let me = by.block & BLOCK_MASK;
    if w.written & mask != 0 && w.writer != me {
        if !by.excused(Some(w.writer)) {
            return Err(Conflict::Written {
                by: w.writer as u32,
            });
        }
        w.written &= !mask;
    }
    if touch.defines() {
        w.defined |= mask;
    }
    if touch == Touch::Write {
        let foreign = w.many_readers || w.reader != me;
        if w.read & mask != 0 && foreign {
            let other = (!w.many_readers).then_some(w.reader);
            if !by.excused(other) {
                return Err(Conflict::ReadBy {
                    by: other.map(|o| o as u32),
                });
            }
            w.read &= !mask;
        }
        if w.written != 0 && w.writer != me {
            return Ok(false);
        }
        w.writer = me;
        w.written |= mask;
        return Ok(true);
    }
    if w.read == 0 {
        (w.reader, w.read, w.many_readers) = (me, mask, false);
    } else if w.reader == me && !w.many_readers {
        w.read |= mask;
    } else if w.read == mask {
        w.many_readers = true;
    } else if !(w.many_readers && w.read & mask == mask) {
        return Ok(false);
    }
    Ok(true)
}

/// The byte-exact path.
fn record_mixed(
    word: &AtomicU64,
    mask: u64,
    touch: Touch,
    by: &Toucher<'_>,
) -> Result<(), Conflict> {
    let key = word as *const AtomicU64 as u64;
    let shard = &by.launch.mixed[(key / 8) as usize % TABLE_SHARDS];
    let mut table = shard.lock().unwrap_or_else(PoisonError::into_inner);
    let bytes = loop {
        let old = word.load(Relaxed);
        let w = Word::unpack(old);
        if w.mixed && w.epoch == by.launch.epoch {
            break table.entry(key).or_default();
        }
        let kept = if w.epoch == by.launch.epoch {
            w
        } else {
            Word::default()
        };
        let marked = Word {
            defined: w.defined,
            mixed: true,
            epoch: by.launch.epoch,
            ..Word::default()
        };
        if word
            .compare_exchange(old, marked.pack(), Relaxed, Relaxed)
            .is_ok()
        {
            break table.entry(key).insert_entry(expand(kept)).into_mut();
        }
    };
    let me = by.block & BLOCK_MASK;
    for byte in (0..4).filter(|b| mask >> b & 1 == 1).map(|b: usize| b) {
        touch_byte(&mut bytes[byte], me, touch, by)?;
    }
    if touch.defines() {
        word.fetch_or(mask, Relaxed);
    }
    Ok(())
}

fn expand(w: Word) -> [Byte; 4] {
    std::array::from_fn(|b| Byte {
        writer: (w.written >> b & 1 == 1).then_some(w.writer),
        reader: (w.read >> b & 1 == 1).then_some(w.reader),
        many_readers: w.many_readers && w.read >> b & 1 == 1,
    })
}

fn touch_byte(byte: &mut Byte, me: u64, touch: Touch, by: &Toucher<'_>) -> Result<(), Conflict> {
    if let Some(writer) = byte.writer.filter(|&w| w != me)
        && !by.excused(Some(writer))
    {
        return Err(Conflict::Written { by: writer as u32 });
    }
    if touch == Touch::Write {
        if let Some(reader) = byte.reader.filter(|&r| r != me || byte.many_readers) {
            let other = (!byte.many_readers).then_some(reader);
            if !by.excused(other) {
                return Err(Conflict::ReadBy {
                    by: other.map(|o| o as u32),
                });
            }
        }
        *byte = Byte {
            writer: Some(me),
            ..Byte::default()
        };
    } else {
        byte.many_readers |= byte.reader.is_some_and(|r| r != me);
        byte.reader = Some(me);
    }
    Ok(())
}
