//! How deeply a Parquet file's schema is nested, found without recursion. The parquet crate builds
//! the schema by recursion without a limit, so a hostile file could overflow the stack.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

/// Structures within structures that are followed when something is skipped.
const MAX_SKIP: usize = 64;

/// Compact protocol types of Apache Thrift.
const STOP: u8 = 0;
const LIST: u8 = 9;

/// Groups within groups in the schema that the footer holds; `None` where the footer is damaged.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn schema_depth(file: &mut File) -> std::io::Result<Option<usize>> {
    let size = file.seek(SeekFrom::End(0))?;
    if size < 12 {
        return Ok(None);
    }
    let mut tail = [0; 4];
    file.seek(SeekFrom::Start(size - 8))?;
    file.read_exact(&mut tail)?;
    let length = u64::from(u32::from_le_bytes(tail));
    let Some(start) = (size - 8).checked_sub(length) else {
        return Ok(None);
    };
    let mut footer = Vec::new();
    file.seek(SeekFrom::Start(start))?;
    file.take(length).read_to_end(&mut footer)?;
    Ok(depth_in(&footer))
}

/// The deepest nesting of the schema list (field 2 of FileMetaData), which is given in depth-first
/// order with the number of children of each element.
fn depth_in(footer: &[u8]) -> Option<usize> {
    let mut thrift = Thrift { bytes: footer };
    let mut id = 0;
    loop {
        match thrift.field(&mut id)? {
            LIST if id == 2 => break,
            STOP => return None,
            kind => thrift.skip(kind, MAX_SKIP)?,
        }
    }
    let (elements, _) = thrift.list()?;
    let (mut open, mut deepest) = (Vec::new(), 0);
    for _ in 0..elements {
        let children = thrift.children()?;
        if let Some(left) = open.last_mut() {
            // At least 1: groups without children left are closed below.
            *left -= 1;
        }
        if children > 0 {
            open.push(children);
            deepest = deepest.max(open.len());
        }
        while open.last() == Some(&0) {
            open.pop();
        }
    }
    Some(deepest)
}

struct Thrift<'a> {
    bytes: &'a [u8],
}

impl Thrift<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(first)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn advance(&mut self, bytes: u64) -> Option<()> {
        self.bytes = self.bytes.get(usize::try_from(bytes).ok()?..)?;
        Some(())
    }

    /// Reads a field's header: advances `id` to its number and returns its type.
    fn field(&mut self, id: &mut i64) -> Option<u8> {
        let header = self.byte()?;
        match header >> 4 {
            0 if header != STOP => *id = self.integer()?,
            step => *id = id.checked_add(step.into())?,
        }
        Some(header & 15)
    }

    /// A signed number in zigzag form.
    fn integer(&mut self) -> Option<i64> {
        let value = self.varint()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// Length and element type of a list.
    fn list(&mut self) -> Option<(u64, u8)> {
        let header = self.byte()?;
        let length = match header >> 4 {
            15 => self.varint()?,
            short => short.into(),
        };
        Some((length, header & 15))
    }

    /// Reads a SchemaElement; its field 5 is the number of children.
    fn children(&mut self) -> Option<u64> {
        let (mut id, mut children) = (0, 0);
        loop {
            match self.field(&mut id)? {
                STOP => return Some(children),
                5 if id == 5 => children = u64::try_from(self.integer()?).ok()?,
                kind => self.skip(kind, MAX_SKIP)?,
            }
        }
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match kind {
            // A boolean field has its value in its type.
            1 | 2 => Some(()),
            3 => self.advance(1),
            4..=6 => self.varint().map(drop),
            7 => self.advance(8),
            8 => {
                let length = self.varint()?;
                self.advance(length)
            }
            LIST | 10 => {
                let (length, kind) = self.list()?;
                for _ in 0..length {
                    match kind {
                        1 | 2 => self.advance(1)?,
                        _ => self.skip(kind, depth)?,
                    }
                }
                Some(())
            }
            12 => {
                let mut id = 0;
                loop {
                    match self.field(&mut id)? {
                        STOP => return Some(()),
                        kind => self.skip(kind, depth)?,
                    }
                }
            }
            _ => None,
        }
    }
}
