//! Shadow of a block's shared memory: definedness, copies in flight, and races between warps.
//!
//! A block runs on one thread, so its events are totally ordered by a clock. Each warp knows the
//! time up to which everything another warp did is ordered before what it does next itself;
//! barriers raise it. Two accesses race when neither is ordered before the other, as in
//! FastTrack (Flanagan and Freund, 2009), with the readers of a word, and the warps that did
//! atomics on it, kept as masks with the time of the first of them: a race may be missed among
//! named barriers of some warps, but none is invented.

/// Warps of a block.
pub const MAX_WARPS: usize = 32;

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
    /// Unordered with a write of this warp.
    WrittenBy(u32),
    /// Unordered with a read of one of these warps.
    ReadBy(u32),
    /// Unordered with an atomic of another warp.
    Atomic,
}

/// Shadow of four bytes.
#[derive(Clone, Copy, Debug)]
struct Word {
    readers: u32,
    atomics: u32,
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
#[derive(Debug)]
pub struct Shadow {
    words: Vec<Word>,
    known: [Known; MAX_WARPS],
    now: u32,
}

/// What a warp knows of the others.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// Time up to which each warp's accesses are ordered before this warp's next ones.
    synced: [u32; MAX_WARPS],
    /// The largest of them: accesses since then are ordered before nothing here.
    latest: u32,
}

const NOTHING: Known = Known {
    synced: [0; MAX_WARPS],
    latest: 0,
};

impl Default for Shadow {
    fn default() -> Self {
        Self {
            words: Vec::new(),
            known: [NOTHING; MAX_WARPS],
            now: 1,
        }
    }
}

impl Shadow {
    /// Starts a block with `bytes` of undefined shared memory.
    pub fn reset(&mut self, bytes: usize) {
        self.words.clear();
        self.words.resize(bytes.div_ceil(4), FRESH);
        self.known = [NOTHING; MAX_WARPS];
        self.now = 1;
    }

    /// Snapshot of what warp `w` knows, for release through an mbarrier.
    pub fn release(&mut self, warp: u32) -> [u32; MAX_WARPS] {
        let mut known = self.known[warp as usize].synced;
        known[warp as usize] = self.now;
        self.now += 1;
        known
    }

    /// Orders a released snapshot before what warp `w` does next.
    pub fn acquire(&mut self, warp: u32, known: &[u32; MAX_WARPS]) {
        let mine = &mut self.known[warp as usize];
        for (mine, theirs) in mine.synced.iter_mut().zip(known) {
            *mine = (*mine).max(*theirs);
        }
        let others = mine
            .synced
            .iter()
            .enumerate()
            .filter(|(v, _)| *v != warp as usize);
        mine.latest = others.map(|(_, &time)| time).max().unwrap_or(0);
    }

    /// Marks a copy into the bytes as in flight; they count as untouched until it lands.
    pub fn begin_copy(&mut self, start: u32, len: u32, warp: u32) -> Result<(), Conflict> {
        self.touch(start, len, Touch::Write, warp)?;
        self.each(start, len, |word, mask| word.state |= mask << 4);
        Ok(())
    }

    /// A copy has landed: a write of the warp that waited.
    pub fn land_copy(&mut self, start: u32, len: u32, warp: u32) -> Result<(), Conflict> {
        self.each(start, len, |word, mask| word.state &= !(mask << 4));
        self.touch(start, len, Touch::Write, warp)
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
    pub fn touch(&mut self, start: u32, len: u32, touch: Touch, warp: u32) -> Result<(), Conflict> {
        let (known, now) = (&self.known[warp as usize], self.now);
        if start.is_multiple_of(4) && len.is_multiple_of(4) {
            for word in &mut self.words[(start / 4) as usize..((start + len) / 4) as usize] {
                touch_word(word, 0xf, touch, warp, known, now)?;
            }
            return Ok(());
        }
        let (mut at, end) = (start, start + len);
        while at < end {
            let stop = end.min((at / 4 + 1) * 4);
            let mask = (((1u32 << (stop - at)) - 1) << (at % 4)) as u8;
            touch_word(
                &mut self.words[(at / 4) as usize],
                mask,
                touch,
                warp,
                known,
                now,
            )?;
            at = stop;
        }
        Ok(())
    }
}

/// Warps of `mask` other than `warp` whose accesses at `time` are not ordered before it.
#[inline(always)]
fn unordered(mask: u32, time: u32, warp: u32, known: &Known) -> u32 {
    let mut rest = mask & !(1 << warp);
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
fn touch_word(
    word: &mut Word,
    mask: u8,
    touch: Touch,
    warp: u32,
    known: &Known,
    now: u32,
) -> Result<(), Conflict> {
    if word.state >> 4 & mask != 0 {
        return Err(Conflict::InFlight);
    }
    if touch != Touch::Write && word.state & mask != mask {
        return Err(Conflict::Uninitialized);
    }
    let foreign_writer = word.writer != NOBODY && u32::from(word.writer) != warp;
    if word.written & mask != 0
        && foreign_writer
        && known.synced[usize::from(word.writer)] < word.write_time
    {
        return Err(Conflict::WrittenBy(u32::from(word.writer)));
    }
    if touch != Touch::Atomic
        && word.atomics != 0
        && unordered(word.atomics, word.first_atomic, warp, known) != 0
    {
        return Err(Conflict::Atomic);
    }
    match touch {
        Touch::Read => {
            // Readers known to lie before this read need not be remembered.
            if word.readers != 0 && unordered(word.readers, word.first_read, warp, known) == 0 {
                word.readers = 0;
            }
            if word.readers == 0 {
                (word.first_read, word.read) = (now, 0);
            }
            word.readers |= 1 << warp;
            word.read |= mask;
        }
        Touch::Write | Touch::Atomic => {
            let readers = if word.read & mask != 0 {
                word.readers
            } else {
                0
            };
            let racing = unordered(readers, word.first_read, warp, known);
            if racing != 0 {
                return Err(Conflict::ReadBy(racing));
            }
            word.state |= mask;
            if touch == Touch::Atomic {
                if unordered(word.atomics, word.first_atomic, warp, known) == 0 {
                    word.atomics = 0;
                }
                if word.atomics == 0 {
                    word.first_atomic = now;
                }
                word.atomics |= 1 << warp;
            } else {
                let same = u32::from(word.writer) == warp;
                word.written = if same { word.written | mask } else { mask };
                (word.writer, word.write_time) = (warp as u8, now);
                (word.atomics, word.readers) = (0, 0);
            }
        }
    }
    Ok(())
}
