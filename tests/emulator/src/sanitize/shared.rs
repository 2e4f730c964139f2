//! Shadow of a block's shared memory: definedness, copies in flight, and races between warps.
//!
//! A cluster runs on one thread, so its events are totally ordered by a clock. Each warp knows
//! the time up to which everything another warp did is ordered before what it does next itself;
//! barriers raise it. Two accesses race when neither is ordered before the other, as in
//! FastTrack (Flanagan and Freund, 2009), with the readers of a word, and the warps that did
//! atomics on it, kept as masks with the time of the first of them: a race may be missed among
//! named barriers of some warps, but none is invented.
//!
//! Who touches a block's memory is an actor: one of its own warps, or another block of the
//! cluster as a whole, whose warps count as one. What one of them knows, all of them know.

/// Warps of a block.
pub const MAX_WARPS: usize = 32;
/// Blocks of a cluster.
pub const MAX_CLUSTER: usize = 16;
/// Warps of a block, then blocks of its cluster.
pub const ACTORS: usize = MAX_WARPS + MAX_CLUSTER;

const NOBODY: u8 = 0xff;

/// How shared memory is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    Read,
    Write,
    Atomic,
}

/// What is wrong with a touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    Uninitialized,
    /// An asynchronous copy to the bytes is in flight.
    InFlight,
    /// Unordered with a write of this actor.
    WrittenBy(u32),
    /// Unordered with a read of this actor.
    ReadBy(u32),
    /// Unordered with an atomic of another actor.
    Atomic,
}

/// Shadow of four bytes.
#[derive(Clone, Copy, Debug)]
struct Word {
    readers: u64,
    atomics: u64,
    first_read: u32,
    write_time: u32,
    first_atomic: u32,
    writer: u8,
    written: u8,
    read: u8,
    /// Low half: defined bytes; high half: bytes with a copy in flight.
    state: u8,
}

const FRESH: Word = Word {
    readers: 0,
    atomics: 0,
    first_read: 0,
    write_time: 0,
    first_atomic: 0,
    writer: NOBODY,
    written: 0,
    read: 0,
    state: 0,
};

/// Shadow of the shared memory of one block.
#[derive(Debug, Default)]
pub struct Shadow {
    words: Vec<Word>,
}

/// Times up to which each actor's accesses are ordered before something.
pub type Times = [u32; ACTORS];

/// What an actor knows of the others.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// Time up to which each actor's accesses are ordered before this one's next ones.
    synced: Times,
    /// The largest of them: accesses since then are ordered before nothing here.
    latest: u32,
}

const NOTHING: Known = Known {
    synced: [0; ACTORS],
    latest: 0,
};

/// Who touches memory now.
#[derive(Clone, Copy, Debug)]
pub struct Accessor<'a> {
    actor: u32,
    now: u32,
    known: &'a Known,
}

/// A warp as it touches the memory of another block.
#[derive(Clone, Copy, Debug)]
pub struct Visitor {
    actor: u32,
    now: u32,
    known: Known,
}

impl Visitor {
    pub fn accessor(&self) -> Accessor<'_> {
        Accessor {
            actor: self.actor,
            now: self.now,
            known: &self.known,
        }
    }
}

/// The clock of a block, and what each of its warps knows.
#[derive(Debug)]
pub struct Clocks {
    /// Actor number of the block in other blocks' memory.
    me: usize,
    /// Time; the blocks of a cluster take turns and hand it on.
    pub now: u32,
    known: [Known; MAX_WARPS],
}

impl Default for Clocks {
    fn default() -> Self {
        Self {
            me: MAX_WARPS,
            now: 1,
            known: [NOTHING; MAX_WARPS],
        }
    }
}

impl Clocks {
    /// Starts the block with this rank in its cluster.
    pub fn reset(&mut self, rank: u32) {
        *self = Self {
            me: MAX_WARPS + rank as usize,
            ..Self::default()
        };
    }

    /// Snapshot of what a warp and its block know, for release through a barrier.
    pub fn release(&mut self, warp: u32) -> Times {
        let mut times = self.known[warp as usize].synced;
        times[warp as usize] = self.now;
        times[self.me] = self.now;
        self.now += 1;
        times
    }

    /// Orders a released snapshot before what a warp does next.
    pub fn acquire(&mut self, warp: u32, times: &Times) {
        let mine = &mut self.known[warp as usize];
        raise(&mut mine.synced, times);
        mine.latest = latest(&mine.synced, &[warp as usize, self.me]);
    }

    /// A snapshot of this block as the block with another rank understands it: what was known of
    /// that block as a whole holds for each of its warps.
    pub fn translate(&self, times: &Times, rank: u32) -> Times {
        let mut out = *times;
        out[..MAX_WARPS].fill(times[MAX_WARPS + rank as usize]);
        out
    }

    /// A warp of this block as it accesses the block's own memory.
    #[inline(always)]
    pub fn accessor(&self, warp: u32) -> Accessor<'_> {
        Accessor {
            actor: warp,
            now: self.now,
            known: &self.known[warp as usize],
        }
    }

    /// A warp of this block as it accesses the memory of another one.
    pub fn visitor(&self, warp: u32, rank: u32) -> Visitor {
        let synced = self.translate(&self.known[warp as usize].synced, rank);
        Visitor {
            actor: self.me as u32,
            now: self.now,
            known: Known {
                synced,
                latest: latest(&synced, &[self.me]),
            },
        }
    }

    /// Whether some warp knows what the block with this rank did at a time.
    pub fn knows(&self, rank: u32, time: u32) -> bool {
        let actor = MAX_WARPS + rank as usize;
        self.known.iter().any(|k| k.synced[actor] >= time)
    }
}

/// Raises times to those of another snapshot.
pub fn raise(times: &mut Times, other: &Times) {
    for (mine, theirs) in times.iter_mut().zip(other) {
        *mine = (*mine).max(*theirs);
    }
}

/// The latest time of actors other than `me`.
fn latest(times: &Times, me: &[usize]) -> u32 {
    let others = times.iter().enumerate().filter(|(a, _)| !me.contains(a));
    others.map(|(_, &time)| time).max().unwrap_or(0)
}

impl Shadow {
    /// Starts a block with `bytes` of undefined shared memory.
    pub fn reset(&mut self, bytes: usize) {
        self.words.clear();
        self.words.resize(bytes.div_ceil(4), FRESH);
    }

    /// Marks a copy into the bytes as in flight; they count as untouched until it lands.
    pub fn begin_copy(&mut self, start: u32, len: u32, by: &Accessor<'_>) -> Result<(), Conflict> {
        self.touch(start, len, Touch::Write, by)?;
        self.each(start, len, |word, mask| word.state |= mask << 4);
        Ok(())
    }

    /// A copy has landed: a write of the warp that waited.
    pub fn land_copy(&mut self, start: u32, len: u32, by: &Accessor<'_>) -> Result<(), Conflict> {
        self.each(start, len, |word, mask| word.state &= !(mask << 4));
        self.touch(start, len, Touch::Write, by)
    }

    /// Marks bytes as defined and leaves who touched them alone.
    pub fn mark_defined(&mut self, start: u32, len: u32) {
        self.each(start, len, |word, mask| word.state |= mask);
    }

    /// Marks bytes as defined without an owner (copies by other blocks or engines).
    pub fn define(&mut self, start: u32, len: u32) {
        self.each(start, len, |word, mask| {
            let kept = word.state | mask;
            *word = Word {
                state: kept & !(mask << 4),
                ..FRESH
            };
        });
    }

    fn each(&mut self, start: u32, len: u32, mut f: impl FnMut(&mut Word, u8)) {
        let (mut at, end) = (start, start + len);
        while at < end {
            let stop = end.min((at / 4 + 1) * 4);
            let mask = (((1u32 << (stop - at)) - 1) << (at % 4)) as u8;
            f(&mut self.words[(at / 4) as usize], mask);
            at = stop;
        }
    }

    /// Records an access (in bounds) and reports what is wrong with it.
    #[inline]
    pub fn touch(
        &mut self,
        start: u32,
        len: u32,
        touch: Touch,
        by: &Accessor<'_>,
    ) -> Result<(), Conflict> {
        if start.is_multiple_of(4) && len.is_multiple_of(4) {
            for word in &mut self.words[(start / 4) as usize..((start + len) / 4) as usize] {
                touch_word(word, 0xf, touch, by)?;
            }
            return Ok(());
        }
        let (mut at, end) = (start, start + len);
        while at < end {
            let stop = end.min((at / 4 + 1) * 4);
            let mask = (((1u32 << (stop - at)) - 1) << (at % 4)) as u8;
            touch_word(&mut self.words[(at / 4) as usize], mask, touch, by)?;
            at = stop;
        }
        Ok(())
    }
}

/// Actors of `mask` other than this one whose accesses at `time` are not ordered before it.
#[inline(always)]
fn unordered(mask: u64, time: u32, by: &Accessor<'_>) -> u64 {
    let known = by.known;
    let mut rest = mask & !(1 << by.actor);
    if time > known.latest {
        return rest;
    }
    let mut out = 0;
    while rest != 0 {
        let v = rest.trailing_zeros();
        rest &= rest - 1;
        if known.synced[v as usize] < time {
            out |= 1 << v;
        }
    }
    out
}

#[inline(always)]
fn touch_word(word: &mut Word, mask: u8, touch: Touch, by: &Accessor<'_>) -> Result<(), Conflict> {
    if word.state >> 4 & mask != 0 {
        return Err(Conflict::InFlight);
    }
    if touch != Touch::Write && word.state & mask != mask {
        return Err(Conflict::Uninitialized);
    }
    let foreign_writer = word.writer != NOBODY && u32::from(word.writer) != by.actor;
    if word.written & mask != 0
        && foreign_writer
        && by.known.synced[usize::from(word.writer)] < word.write_time
    {
        return Err(Conflict::WrittenBy(u32::from(word.writer)));
    }
    if touch != Touch::Atomic
        && word.atomics != 0
        && unordered(word.atomics, word.first_atomic, by) != 0
    {
        return Err(Conflict::Atomic);
    }
    match touch {
        Touch::Read => {
            // Readers known to lie before this read need not be remembered.
            if word.readers != 0 && unordered(word.readers, word.first_read, by) == 0 {
                word.readers = 0;
            }
            if word.readers == 0 {
                (word.first_read, word.read) = (by.now, 0);
            }
            word.readers |= 1 << by.actor;
            word.read |= mask;
        }
        Touch::Write | Touch::Atomic => {
            let readers = if word.read & mask != 0 {
                word.readers
            } else {
                0
            };
            let racing = unordered(readers, word.first_read, by);
            if racing != 0 {
                return Err(Conflict::ReadBy(racing.trailing_zeros()));
            }
            word.state |= mask;
            if touch == Touch::Atomic {
                if unordered(word.atomics, word.first_atomic, by) == 0 {
                    word.atomics = 0;
                }
                if word.atomics == 0 {
                    word.first_atomic = by.now;
                }
                word.atomics |= 1 << by.actor;
            } else {
                let same = u32::from(word.writer) == by.actor;
                word.written = if same { word.written | mask } else { mask };
                (word.writer, word.write_time) = (by.actor as u8, by.now);
                (word.atomics, word.readers) = (0, 0);
            }
        }
    }
    Ok(())
}
