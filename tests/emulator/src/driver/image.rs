//! Module images: PTX text, fat binaries with raw, zstd- or LZ4-compressed PTX, and cubins, which
//! are refused as a GPU of another architecture refuses them.

use std::ffi::{CStr, c_char};
use std::io::Read;

use super::error::{CuResult, INVALID_IMAGE, NO_BINARY_FOR_GPU};
use super::lz4;

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const FATBIN_MAGIC: u32 = 0xba55_ed50;
/// The wrapper that `__cudaFatCudaBinary` objects carry around a fat binary.
const WRAPPER_MAGIC: u32 = 0x4662_43b1;
const KIND_PTX: u16 = 1;
const FLAG_ZSTD: u64 = 0x8000;
const FLAG_LZ4: u64 = 0x2000;
/// Largest fat binary, and largest PTX in one, that is accepted.
const MAX_BYTES: u64 = 1 << 28;

/// The PTX text of an image, the newest that a device of `capability` (80 for 8.0) can run.
///
/// # Errors
/// The driver's code and a message.
///
/// # Safety
/// `image` points to a NUL-terminated PTX text, a cubin, or a complete fat binary.
pub unsafe fn ptx_of(image: *const u8, capability: u32) -> Result<String, (CuResult, String)> {
    // SAFETY: every image is at least four bytes long.
    let magic: [u8; 4] = unsafe { image.cast::<[u8; 4]>().read_unaligned() };
    if magic == ELF_MAGIC {
        return Err((
            NO_BINARY_FOR_GPU,
            "a cubin holds no PTX; the emulator runs PTX only".into(),
        ));
    }
    match u32::from_le_bytes(magic) {
        WRAPPER_MAGIC => {
            // SAFETY: the wrapper is { u32 magic, u32 version, const void *data, ... }.
            let inner = unsafe { image.add(8).cast::<*const u8>().read_unaligned() };
            // SAFETY: the wrapper points to a complete fat binary.
            unsafe { fatbin(inner, capability) }
        }
        // SAFETY: the caller's promise.
        FATBIN_MAGIC => unsafe { fatbin(image, capability) },
        _ => {
            // SAFETY: neither of the binary formats, so a NUL-terminated text.
            let text = unsafe { CStr::from_ptr(image.cast::<c_char>()) };
            let text = text
                .to_str()
                .map_err(|e| (INVALID_IMAGE, format!("image is not PTX text: {e}")))?;
            Ok(text.to_string())
        }
    }
}

/// Bytes a fat binary says it has; None if these bytes do not start one.
pub fn fatbin_bytes(bytes: &[u8]) -> Option<u64> {
    if u32_at(bytes, 0)? != FATBIN_MAGIC {
        return None;
    }
    Some(u64::from(u16_at(bytes, 6)?).saturating_add(u64_at(bytes, 8)?))
}

/// # Safety
/// `image` points to a complete fat binary.
unsafe fn fatbin(image: *const u8, capability: u32) -> Result<String, (CuResult, String)> {
    let invalid = |what: &str| (INVALID_IMAGE, format!("fat binary: {what}"));
    // SAFETY: the header of a fat binary is 16 bytes.
    let header = unsafe { std::slice::from_raw_parts(image, 16) };
    let header_size = u64::from(u16_at(header, 6).ok_or_else(|| invalid("short header"))?);
    let payload = u64_at(header, 8).ok_or_else(|| invalid("short header"))?;
    if u32_at(header, 0) != Some(FATBIN_MAGIC) || header_size < 16 || payload > MAX_BYTES {
        return Err(invalid("malformed header"));
    }
    // SAFETY: the header says that this many bytes follow, and the caller that all are there.
    let bytes = unsafe { std::slice::from_raw_parts(image, (header_size + payload) as usize) };
    let mut best: Option<(u32, String)> = None;
    let mut at = header_size as usize;
    while at + 64 <= bytes.len() {
        let entry = &bytes[at..];
        let (Some(kind), Some(header_len), Some(padded)) =
            (u16_at(entry, 0), u32_at(entry, 4), u64_at(entry, 8))
        else {
            return Err(invalid("short entry"));
        };
        let (header_len, padded) = (header_len as usize, padded as usize);
        let body = header_len
            .checked_add(padded)
            .and_then(|end| entry.get(header_len..end));
        let body = body.ok_or_else(|| invalid("entry beyond its end"))?;
        let architecture = u32_at(entry, 28).unwrap_or(0);
        let better = best.as_ref().is_none_or(|b| architecture > b.0);
        if kind == KIND_PTX && architecture <= capability && better {
            best = Some((
                architecture,
                entry_text(entry, body).map_err(|m| invalid(&m))?,
            ));
        }
        if header_len + padded == 0 {
            break;
        }
        at += header_len + padded;
    }
    best.map(|b| b.1).ok_or_else(|| {
        (
            NO_BINARY_FOR_GPU,
            "fat binary without PTX for this device".into(),
        )
    })
}

fn entry_text(entry: &[u8], body: &[u8]) -> Result<String, String> {
    let flags = u64_at(entry, 40).unwrap_or(0);
    let compressed = u32_at(entry, 16).unwrap_or(0) as usize;
    let packed = if compressed > 0 {
        body.get(..compressed)
            .ok_or("compressed size beyond the entry")?
    } else {
        body
    };
    let mut text = Vec::new();
    if flags & FLAG_ZSTD != 0 {
        let decoder =
            ruzstd::decoding::StreamingDecoder::new(packed).map_err(|e| format!("zstd: {e}"))?;
        decoder
            .take(MAX_BYTES)
            .read_to_end(&mut text)
            .map_err(|e| format!("zstd: {e}"))?;
    } else if flags & FLAG_LZ4 != 0 {
        text = lz4::decompress(packed, MAX_BYTES as usize).map_err(|e| format!("LZ4: {e}"))?;
    } else {
        text = packed.to_vec();
    }
    let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
    text.truncate(end);
    String::from_utf8(text).map_err(|e| format!("PTX is not text: {e}"))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..at + 2)?
        .try_into()
        .ok()
        .map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + 4)?
        .try_into()
        .ok()
        .map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..at + 8)?
        .try_into()
        .ok()
        .map(u64::from_le_bytes)
}
