//! Keys and values that a sequence's tokens left behind in each layer.

use super::NAME;
use crate::device::{CudaDevice, Device};
use crate::error::{Error, Result};
use crate::ops::expect_shape;
use crate::tensor::{CudaBuffer, DType, Tensor};

/// Tokens that a cache on a GPU has room for at least.
const SMALLEST: usize = 64;

/// The keys (rotated) and values of one sequence's tokens: f32 in host memory, bf16 on a GPU.
/// A clone shares a GPU's memory until one of the two grows.
#[derive(Clone, Debug)]
pub struct KvCache {
    /// Tokens of each layer.
    tokens: Vec<usize>,
    /// kv_heads * D
    width: usize,
    held: Held,
}

#[derive(Clone, Debug)]
enum Held {
    /// For each layer keys and values, \[tokens, width\] each.
    Host(Vec<(Vec<f32>, Vec<f32>)>),
    Cuda(Paged),
}

/// Memory for so many tokens: \[layers, 2, capacity, width\] bf16, keys before values.
#[derive(Clone, Debug, Default)]
struct Paged {
    memory: Option<Tensor>,
    capacity: usize,
}

impl KvCache {
    /// An empty cache of `layers` layers whose keys have `width` values (all heads together).
    pub fn new(device: &Device, layers: usize, width: usize) -> Self {
        Self {
            tokens: vec![0; layers],
            width,
            held: match device {
                Device::Cpu(_) => Held::Host(vec![Default::default(); layers]),
                Device::Cuda(_) => Held::Cuda(Paged::default()),
            },
        }
    }

    /// Values of a key, all heads together.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Tokens that layer `layer` holds.
    pub fn tokens(&self, layer: usize) -> usize {
        self.tokens.get(layer).copied().unwrap_or(0)
    }

    /// Adds tokens to a layer: rotated keys, and values, \[tokens, width\] each.
    ///
    /// # Errors
    /// A layer that there is not, operands of another shape or on another device.
    pub fn extend(
        &mut self,
        device: &Device,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<()> {
        let (rows, _) = keys.matrix_dims();
        expect_shape(NAME, keys, &[rows, self.width])?;
        expect_shape(NAME, values, &[rows, self.width])?;
        let held = self.expect_layer(layer)?;
        match (&mut self.held, device) {
            (Held::Host(layers), Device::Cpu(_)) => {
                let (all_keys, all_values) = &mut layers[layer];
                all_keys.extend_from_slice(keys.f32s()?);
                all_values.extend_from_slice(values.f32s()?);
            }
            (Held::Cuda(_), Device::Cuda(cuda)) => {
                self.reserve(cuda, held + rows)?;
                let sides = [keys, values].map(|side| cuda.resident(side, DType::Bf16));
                for (i, side) in sides.into_iter().enumerate() {
                    self.write(layer, i, held, &side?)?;
                }
            }
            _ => return Err(self.elsewhere()),
        }
        self.tokens[layer] += rows;
        Ok(())
    }

    /// Forgets the tokens after the first `tokens` of every layer.
    pub fn truncate(&mut self, tokens: usize) {
        if let Held::Host(layers) = &mut self.held {
            for (keys, values) in layers {
                keys.truncate(tokens * self.width);
                values.truncate(tokens * self.width);
            }
        }
        for held in &mut self.tokens {
            *held = (*held).min(tokens);
        }
    }

    /// Adds one token's rotated key and value \[width\] to a layer in host memory.
    pub(super) fn push(&mut self, layer: usize, key: &[f32], value: &[f32]) -> Result<()> {
        self.expect_layer(layer)?;
        let Held::Host(layers) = &mut self.held else {
            return Err(self.elsewhere());
        };
        layers[layer].0.extend_from_slice(key);
        layers[layer].1.extend_from_slice(value);
        self.tokens[layer] += 1;
        Ok(())
    }

    /// The layer's keys and values in host memory.
    pub(super) fn on_host(&self, layer: usize) -> Result<(&[f32], &[f32])> {
        self.expect_layer(layer)?;
        match &self.held {
            Held::Host(layers) => Ok((&layers[layer].0, &layers[layer].1)),
            Held::Cuda(_) => Err(self.elsewhere()),
        }
    }

    /// Makes room for so many tokens in memory that nobody shares; its address and the number of
    /// tokens it has room for. The cache is as it was where that fails.
    pub(super) fn reserve(&mut self, cuda: &CudaDevice, tokens: usize) -> Result<(u64, usize)> {
        let (layers, width) = (self.tokens.len(), self.width);
        let Held::Cuda(paged) = &mut self.held else {
            return Err(self.elsewhere());
        };
        let fits = paged.capacity >= tokens;
        let owned = |memory: &mut Tensor| cuda.holds(memory) && !memory.is_shared();
        if !fits || !paged.memory.as_mut().is_some_and(owned) {
            let capacity = match fits {
                true => paged.capacity,
                false => tokens.next_power_of_two().max(SMALLEST),
            };
            let len = [2, capacity, width]
                .iter()
                .try_fold(layers, |n, &d| n.checked_mul(d));
            let len =
                len.ok_or_else(|| Error::operand(NAME, "fewer tokens", tokens.to_string()))?;
            let mut memory = cuda.alloc(DType::Bf16, len)?;
            if let Some(from) = paged.memory.as_ref().and_then(Tensor::cuda) {
                for side in 0..2 * layers {
                    let (start, values) =
                        (side * paged.capacity * width, self.tokens[side / 2] * width);
                    memory.copy_from(side * capacity * width, from, start..start + values)?;
                }
            }
            let memory = Some(Tensor::from_cuda(memory, [len])?);
            *paged = Paged { memory, capacity };
        }
        let address = paged.memory.as_ref().and_then(Tensor::cuda);
        Ok((address.map_or(0, CudaBuffer::address), paged.capacity))
    }

    /// Notes that a kernel has written one more token of a layer.
    pub(super) fn advance(&mut self, layer: usize) -> Result<()> {
        self.expect_layer(layer)?;
        self.tokens[layer] += 1;
        Ok(())
    }

    /// Writes rows \[n, width\] of keys (side 0) or values (side 1) from token `first` on.
    fn write(&mut self, layer: usize, side: usize, first: usize, rows: &Tensor) -> Result<()> {
        let Held::Cuda(paged) = &mut self.held else {
            return Err(self.elsewhere());
        };
        let start = ((layer * 2 + side) * paged.capacity + first) * self.width;
        let memory = paged.memory.as_mut().and_then(Tensor::cuda_mut);
        match memory.zip(rows.cuda()) {
            Some((memory, from)) => memory.copy_from(start, from, 0..from.len()),
            None => Err(self.elsewhere()),
        }
    }

    /// The tokens that a layer holds; an error where there is no such layer.
    pub(super) fn expect_layer(&self, layer: usize) -> Result<usize> {
        let layers = self.tokens.len();
        let held = self.tokens.get(layer).copied();
        let expected = || format!("a layer below {layers}");
        held.ok_or_else(|| Error::operand(NAME, expected(), layer.to_string()))
    }

    fn elsewhere(&self) -> Error {
        let found = match self.held {
            Held::Host(_) => "a cache in host memory",
            Held::Cuda(_) => "a cache in a GPU's memory",
        };
        Error::operand(NAME, "operands and caches on one device", found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_that_cannot_grow_keeps_its_tokens() {
        let Some(cuda) = CudaDevice::for_tests(1) else {
            return;
        };
        let device = Device::Cuda(cuda.clone());
        let mut cache = KvCache::new(&device, 1, 8);
        let rows = Tensor::from_vec(vec![1.5; 16], [2, 8]).unwrap();
        cache.extend(&device, 0, &rows, &rows).unwrap();
        let before = cache.reserve(&cuda, 2).unwrap();
        // More than a number of values can be, and more than the memory there is.
        for tokens in [1 << 60, 1 << 40] {
            assert!(cache.reserve(&cuda, tokens).is_err());
            assert_eq!(cache.reserve(&cuda, 2).unwrap(), before);
        }
    }
}
