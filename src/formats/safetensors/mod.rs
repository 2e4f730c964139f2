//! The safetensors format: an 8-byte little-endian header length, a JSON header, the tensors'
//! bytes. Files are memory-mapped; the header is checked in full before anything is read
//! through it.

mod write;

#[cfg(target_endian = "big")]
compile_error!("safetensors are mapped and used in place, which needs a little-endian machine");

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::safetensors::tensor::{Dtype, TensorInfo};
use memmap2::Mmap;
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

pub use write::{Entry, write, write_to};

use crate::error::{Error, Result};
use crate::tensor::{DType, MappedBytes, Tensor};

/// Length of the field that holds the header's length.
const PREFIX: usize = 8;
/// Longest header accepted, as in the reference implementation.
const MAX_HEADER: usize = 100_000_000;

/// A memory-mapped safetensors file whose header has been found consistent.
#[derive(Debug)]
pub struct SafeTensors {
    path: PathBuf,
    map: Arc<Mmap>,
    /// Where the tensors' bytes begin.
    data_start: usize,
    header: Header,
}

impl SafeTensors {
    /// Maps a file and checks its header: length, JSON, unique names, known dtypes, and that
    /// the tensors' bytes, as many as shape and dtype need, fill the file without overlap or gap.
    ///
    /// # Errors
    /// Where the file cannot be opened or a check fails.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let map = map_file(path)?;
        let prefix = map
            .first_chunk::<PREFIX>()
            .ok_or_else(|| Error::file(path, format!("{} bytes are no safetensors", map.len())))?;
        let length = u64::from_le_bytes(*prefix);
        let data_start = usize::try_from(length)
            .ok()
            .filter(|&length| length <= MAX_HEADER.min(map.len() - PREFIX))
            .map(|length| length + PREFIX)
            .ok_or_else(|| {
                Error::file(
                    path,
                    format!(
                        "the header is said to have {length} bytes, the file has {} (at most {MAX_HEADER} are read)",
                        map.len()
                    ),
                )
            })?;
        let header: Header = serde_json::from_slice(&map[PREFIX..data_start])
            .map_err(|e| Error::file(path, format!("safetensors header: {e}")))?;
        header.check(path, map.len() - data_start)?;
        Ok(Self {
            path: path.to_owned(),
            map: Arc::new(map),
            data_start,
            header,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.header.tensors.contains_key(name)
    }

    /// An entry of the free-form text metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata.get(key).map(String::as_str)
    }

    /// A tensor: f32, f16 and bf16 stay in the mapped file, u32 is copied.
    ///
    /// # Errors
    /// Where no tensor has that name or its dtype is another.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let info = self
            .header
            .tensors
            .get(name)
            .ok_or_else(|| Error::tensor(&self.path, name, "missing"))?;
        let (start, end) = info.data_offsets;
        // Checked on opening: the range lies within the file and fits shape and dtype.
        let range = self.data_start + start..self.data_start + end;
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            Dtype::U32 => {
                let (words, _) = self.map[range].as_chunks::<4>();
                let words = words.iter().map(|&word| u32::from_le_bytes(word));
                return Tensor::from_u32(words.collect(), &info.shape[..]);
            }
            other => {
                return Err(Error::tensor(
                    &self.path,
                    name,
                    format!("expected dtype F32, F16, BF16 or U32, found {other:?}"),
                ));
            }
        };
        // SAFETY: `map_file` made the map, of a file.
        let bytes = unsafe { MappedBytes::new(self.map.clone(), range, dtype) }
            .ok_or_else(|| Error::tensor(&self.path, name, "its bytes are not in the file"))?;
        let tensor = Tensor::from_mapped(bytes, &info.shape[..])?;
        // f32 at an odd offset cannot be used in place.
        if dtype == DType::F32 && tensor.f32s().is_err() {
            return tensor.to_f32();
        }
        Ok(tensor)
    }

    /// A float tensor widened to f32 in memory.
    ///
    /// # Errors
    /// As [`Self::tensor`], and for u32.
    pub fn tensor_f32(&self, name: &str) -> Result<Tensor> {
        self.tensor(name)?
            .to_f32()
            .map_err(|e| Error::tensor(&self.path, name, e.to_string()))
    }
}

fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let meta = file.metadata().map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        return Err(Error::file(path, "expected a file, found something else"));
    }
    if meta.len() == 0 {
        return Err(Error::file(
            path,
            "expected safetensors, found an empty file",
        ));
    }
    // SAFETY: the map is read-only. As with every reader of mapped files, another process that
    // truncates the file meanwhile makes reads fail with a signal, and one that writes to it
    // changes the numbers read; no reference into the map is used for more than plain numbers
    // and text that is copied out when parsed.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))
}

/// What the JSON header says.
#[derive(Debug)]
struct Header {
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl Header {
    /// An error unless the tensors fill `data_len` bytes exactly.
    fn check(&self, path: &Path, data_len: usize) -> Result<()> {
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        let mut filled = 0;
        for (name, info) in tensors {
            let (start, end) = info.data_offsets;
            let wrong = |what| Err(Error::tensor(path, name, what));
            if start != filled {
                return wrong(format!(
                    "its data begin at byte {start}, expected {filled} (no overlap, no gap)"
                ));
            }
            if end < start || end > data_len {
                return wrong(format!(
                    "its data go from byte {start} to {end}, the file holds {data_len}"
                ));
            }
            if bytes_of(info) != Some(end - start) {
                return wrong(format!(
                    "shape {:?} of {:?} does not fit {} bytes of data",
                    info.shape,
                    info.dtype,
                    end - start
                ));
            }
            filled = end;
        }
        if filled == data_len {
            return Ok(());
        }
        Err(Error::file(
            path,
            format!("the header describes {filled} bytes of data, the file holds {data_len}"),
        ))
    }
}

/// Bytes that a tensor's shape and dtype need; `None` where that is no whole number or too large.
fn bytes_of(info: &TensorInfo) -> Option<usize> {
    let count = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let bits = count?.checked_mul(info.dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// The reference implementation reads the header into a hash map, where the second of two
/// tensors of one name silently replaces the first; here that is an error.
impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
        let mut tensors = BTreeMap::new();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                let text: Option<BTreeMap<String, String>> = map.next_value()?;
                if metadata.replace(text.unwrap_or_default()).is_some() {
                    return Err(de::Error::custom("two entries __metadata__"));
                }
                continue;
            }
            let value: serde_json::Value = map.next_value()?;
            let info = TensorInfo::deserialize(value)
                .map_err(|e| de::Error::custom(format_args!("tensor {name}: {e}")))?;
            if let Some(_earlier) = tensors.insert(name.clone(), info) {
                return Err(de::Error::custom(format_args!(
                    "two tensors of the name {name}"
                )));
            }
        }
        Ok(Header {
            tensors,
            metadata: metadata.unwrap_or_default(),
        })
    }
}
