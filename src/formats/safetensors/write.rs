use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::Path;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::formats::{atomic, check_shape};
use crate::tensor::{DType, Tensor};

/// A tensor to be written. Its values are asked for only when their turn comes, so that a file
/// larger than memory can be written.
pub struct Entry<'a> {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    values: Box<dyn FnOnce() -> Result<Tensor> + 'a>,
}

impl<'a> Entry<'a> {
    /// A tensor that exists, in its own dtype.
    pub fn new(name: impl Into<String>, tensor: &Tensor) -> Self {
        let shared = tensor.clone();
        Self::computed(name, tensor.dtype(), tensor.shape(), move || Ok(shared))
    }

    /// A tensor that `values` will give, of that shape; stored as `dtype`, to which floats are
    /// rounded to nearest, ties to even.
    pub fn computed(
        name: impl Into<String>,
        dtype: DType,
        shape: impl Into<Vec<usize>>,
        values: impl FnOnce() -> Result<Tensor> + 'a,
    ) -> Self {
        Self {
            name: name.into(),
            dtype,
            shape: shape.into(),
            values: Box::new(values),
        }
    }

    /// The same tensor stored as another float type.
    pub fn stored_as(mut self, dtype: DType) -> Self {
        self.dtype = dtype;
        self
    }

    /// Bytes the tensor takes in the file; `None` on overflow.
    fn bytes(&self) -> Option<usize> {
        let count = self.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        count?.checked_mul(self.dtype.size())
    }
}

impl fmt::Debug for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self {
            name, dtype, shape, ..
        } = self;
        write!(f, "{name}: {} {shape:?}", dtype.name())
    }
}

/// Writes a safetensors file atomically.
///
/// # Errors
/// The operating system's; those of the entries' values; a value too large for the dtype it is
/// stored as. The old file stays.
pub fn write(path: &Path, entries: Vec<Entry>, metadata: &BTreeMap<String, String>) -> Result<()> {
    atomic::write(path, |out| write_to(out, path, entries, metadata))
}

/// Writes the content of a safetensors file to `out`; `path` is for messages.
///
/// # Errors
/// As [`write`](fn@write).
pub fn write_to(
    out: &mut impl Write,
    path: &Path,
    mut entries: Vec<Entry>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    // Wider types first, so that each tensor is aligned in a mapped file.
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.dtype.size()));
    let header = header(path, &entries, metadata)?;
    put(out, path, &(header.len() as u64).to_le_bytes())?;
    put(out, path, &header)?;
    for entry in entries {
        write_values(out, path, entry)?;
    }
    Ok(())
}

fn header(path: &Path, entries: &[Entry], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut map = Map::new();
    if !metadata.is_empty() {
        map.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut start = 0usize;
    for entry in entries {
        let end = entry
            .bytes()
            .and_then(|n| start.checked_add(n))
            .ok_or_else(|| {
                Error::tensor(
                    path,
                    &entry.name,
                    format!("shape {:?} is too large", entry.shape),
                )
            })?;
        let dtype = match entry.dtype {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::Bf16 => "BF16",
            DType::U32 => "U32",
        };
        let info = json!({"dtype": dtype, "shape": entry.shape, "data_offsets": [start, end]});
        if map.insert(entry.name.clone(), info).is_some() {
            return Err(Error::tensor(path, &entry.name, "given twice"));
        }
        start = end;
    }
    let mut header = Value::Object(map).to_string().into_bytes();
    // Padded with spaces, so that the data begin at a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

/// Elements converted at a time.
const CHUNK: usize = 1 << 16;

fn write_values(out: &mut impl Write, path: &Path, entry: Entry) -> Result<()> {
    let Entry { name, dtype, .. } = entry;
    let tensor = (entry.values)()?;
    check_shape(path, &name, &tensor, &entry.shape)?;
    let wrong_dtype = |e: Error| Error::tensor(path, &name, e.to_string());
    if dtype == DType::U32 {
        let words = tensor.u32s().map_err(wrong_dtype)?;
        return put(out, path, bytemuck::cast_slice(words));
    }
    let mut values = vec![0.0f32; CHUNK.min(tensor.len())];
    let mut halves = vec![0u16; values.len()];
    for start in (0..tensor.len()).step_by(CHUNK) {
        let count = CHUNK.min(tensor.len() - start);
        let (values, halves) = (&mut values[..count], &mut halves[..count]);
        tensor.read_f32(start, values).map_err(wrong_dtype)?;
        if dtype == DType::F32 {
            put(out, path, bytemuck::cast_slice(values))?;
            continue;
        }
        if let Some(value) = round_to(dtype, values, halves) {
            let what = format!("expected values within {}, found {value}", dtype.name());
            return Err(Error::tensor(path, name, what));
        }
        put(out, path, bytemuck::cast_slice(halves))?;
    }
    Ok(())
}

/// Rounds to f16 or bf16; returns a finite value that became infinite, if there is one.
fn round_to(dtype: DType, values: &[f32], halves: &mut [u16]) -> Option<f32> {
    const F16_INFINITY: u16 = 0x7c00;
    const BF16_INFINITY: u16 = 0x7f80;
    let infinity = if dtype == DType::F16 {
        bytemuck::cast_slice_mut::<u16, f16>(halves).convert_from_f32_slice(values);
        F16_INFINITY
    } else {
        bytemuck::cast_slice_mut::<u16, bf16>(halves).convert_from_f32_slice(values);
        BF16_INFINITY
    };
    let overflowed = |(value, half): &(&f32, &u16)| value.is_finite() && *half & 0x7fff == infinity;
    let first = values.iter().zip(halves.iter()).find(overflowed);
    first.map(|(&value, _)| value)
}

fn put(out: &mut impl Write, path: &Path, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).map_err(|e| Error::io(path, e))
}
