//! LZ4's block format, in which `nvcc --compress-mode=speed` stores PTX (described in
//! lz4_Block_format.md of the LZ4 project).

const SHORT: &str = "the block ends within a sequence";

/// Decompresses a block that grows to at most `limit` bytes.
///
/// # Errors
/// What is wrong with the block.
pub fn decompress(mut block: &[u8], limit: usize) -> Result<Vec<u8>, &'static str> {
    let mut out: Vec<u8> = Vec::new();
    loop {
        let token = byte(&mut block)?;
        let literals = length(token >> 4, &mut block)?;
        let (copied, rest) = block.split_at_checked(literals).ok_or(SHORT)?;
        out.extend_from_slice(copied);
        block = rest;
        // The last sequence has no match.
        if block.is_empty() {
            return Ok(out);
        }
        let offset = usize::from(byte(&mut block)?) | usize::from(byte(&mut block)?) << 8;
        let matched = 4 + length(token & 15, &mut block)?;
        let start = out.len().checked_sub(offset).filter(|_| offset > 0);
        let start = start.ok_or("a match lies before the start")?;
        if out.len() + matched > limit {
            return Err("the text is too long");
        }
        // A match may overlap what it writes: byte by byte.
        for i in start..start + matched {
            out.push(out[i]);
        }
    }
}

fn byte(block: &mut &[u8]) -> Result<u8, &'static str> {
    let (&first, rest) = block.split_first().ok_or(SHORT)?;
    *block = rest;
    Ok(first)
}

/// A length of four bits, continued in bytes while they are full.
fn length(nibble: u8, block: &mut &[u8]) -> Result<usize, &'static str> {
    let mut total = usize::from(nibble);
    let mut more = nibble == 15;
    while more {
        let next = byte(block)?;
        total += usize::from(next);
        more = next == 255;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_overlap_and_lengths_continue() {
        // Three letters, then nine bytes from three back, then an empty last sequence.
        let block = [0x35, b'a', b'b', b'c', 3, 0, 0x00];
        assert_eq!(decompress(&block, 100).unwrap(), b"abcabcabcabc");
        // 15 + 255 + 2 literals.
        let mut long = vec![0xf0, 255, 2];
        long.extend([7; 272]);
        assert_eq!(decompress(&long, 1000).unwrap(), [7; 272]);
    }

    #[test]
    fn malformed_blocks_are_errors() {
        assert_eq!(decompress(&[], 100), Err(SHORT));
        assert_eq!(decompress(&[0x20, b'a'], 100), Err(SHORT));
        assert_eq!(decompress(&[0x10, b'a', 1], 100), Err(SHORT));
        for offset in [0, 2] {
            let block = [0x10, b'a', offset, 0, 0x00];
            assert_eq!(
                decompress(&block, 100),
                Err("a match lies before the start")
            );
        }
        let bomb = [0x1f, b'a', 1, 0, 255, 255, 0, 0x00];
        assert_eq!(decompress(&bomb, 100), Err("the text is too long"));
    }
}
