//! Random operands, where and in the type an operator takes them.

use rayon::prelude::*;

use crate::device::{Device, Precision};
use crate::error::{Error, Result};
use crate::rng::{Purpose, Stream};
use crate::tensor::{DType, Tensor};

/// Values that operands are copied from, at places that differ: drawing billions of random
/// numbers would take longer than what is measured.
const POOL: usize = (1 << 22) + 9;

/// Makes operands of random values.
pub(super) struct Data<'a> {
    device: &'a Device,
    /// Uniform in [-1, 1).
    pool: Vec<f32>,
    /// Where the next operand is copied from.
    place: usize,
    /// Type of frozen weights.
    weight: Precision,
}

impl<'a> Data<'a> {
    pub(super) fn new(device: &'a Device) -> Self {
        let stream = Stream::new(0, Purpose::Init, 0, 0);
        let mut pool = vec![0.0; POOL];
        device.run(|| {
            pool.par_chunks_mut(4).enumerate().for_each(|(block, out)| {
                for (v, word) in out.iter_mut().zip(stream.block(block as u32)) {
                    *v = (word >> 8) as f32 / (1 << 23) as f32 - 1.0;
                }
            });
        });
        Self {
            device,
            pool,
            place: 0,
            weight: Precision::F32,
        }
    }

    /// Where the operands are.
    pub(super) fn device(&self) -> &Device {
        self.device
    }

    /// Frozen weights are of this type from here on.
    pub(super) fn set_weight(&mut self, weight: Precision) {
        self.weight = weight;
    }

    /// Activations of a standard deviation near 0.6 · `scale`: f32, bf16 on CUDA.
    pub(super) fn activation(&mut self, shape: &[usize], scale: f32) -> Result<Tensor> {
        let values = Tensor::from_vec(self.values(shape, scale), shape)?;
        self.resident(values, DType::Bf16)
    }

    /// Activations of one shape.
    pub(super) fn activations<const N: usize>(
        &mut self,
        shape: [usize; 2],
        scale: f32,
    ) -> Result<[Tensor; N]> {
        let mut made = Vec::with_capacity(N);
        for _ in 0..N {
            made.push(self.activation(&shape, scale)?);
        }
        // As many as were pushed.
        made.try_into()
            .map_err(|_| Error::operand("bench-kernels", format!("{N} tensors"), "fewer"))
    }

    /// A frozen vector, such as the scale of a norm.
    pub(super) fn vector(&mut self, len: usize) -> Result<Tensor> {
        let values = Tensor::from_vec(self.values(&[len], 1.0), [len])?;
        self.resident(values, DType::Bf16)
    }

    /// The gradient of a loss with respect to itself, in host memory.
    pub(super) fn seed(&self) -> Result<Tensor> {
        Tensor::from_vec(vec![1.0], [1])
    }

    /// A frozen weight \[out, in\] that keeps the size of what it is multiplied with.
    pub(super) fn weight(&mut self, shape: &[usize]) -> Result<Tensor> {
        let scale = 1.0 / (shape.last().copied().unwrap_or(1).max(1) as f32).sqrt();
        let values = self.values(shape, scale);
        match (self.device, self.weight) {
            (Device::Cpu(_), Precision::Bf16) => Tensor::from_vec(values, shape)?.to_bf16(),
            _ => self.resident(Tensor::from_vec(values, shape)?, DType::Bf16),
        }
    }

    /// What is trained, or a gradient or state of it: f32 everywhere.
    pub(super) fn master(&mut self, shape: &[usize], scale: f32) -> Result<Tensor> {
        let values = Tensor::from_vec(self.values(shape, scale), shape)?;
        self.resident(values, DType::F32)
    }

    /// Logits like a model's, few of which are likely: f32 everywhere.
    pub(super) fn logits(&mut self, shape: &[usize]) -> Result<Tensor> {
        let mut values = self.values(shape, 1.0);
        values.iter_mut().for_each(|v| *v = 20.0 * v.powi(5));
        self.resident(Tensor::from_vec(values, shape)?, DType::F32)
    }

    /// Whole numbers below `end`, in host memory.
    pub(super) fn indices(&mut self, shape: &[usize], end: usize) -> Result<Tensor> {
        let values = self.values(shape, 0.5);
        let index = |v: f32| ((f64::from(v) + 0.5) * end as f64) as u32;
        let last = end.saturating_sub(1) as u32;
        let indices = values.into_iter().map(|v| index(v).min(last)).collect();
        Tensor::from_u32(indices, shape)
    }

    fn values(&mut self, shape: &[usize], scale: f32) -> Vec<f32> {
        let len = shape.iter().product();
        let start = self.place;
        self.place = (start + len + 7919) % POOL;
        let mut values = vec![0.0f32; len];
        let pool = &self.pool;
        const CHUNK: usize = 1 << 14;
        self.device.run(|| {
            let chunks = values.par_chunks_mut(CHUNK).enumerate();
            chunks.for_each(|(i, out)| {
                let from = (start + i * CHUNK) % POOL;
                for (v, from) in out.iter_mut().zip(pool[from..].iter().chain(pool)) {
                    *v = scale * from;
                }
            });
        });
        values
    }

    fn resident(&self, values: Tensor, dtype: DType) -> Result<Tensor> {
        match self.device {
            Device::Cpu(_) => Ok(values),
            Device::Cuda(cuda) => cuda.resident(&values, dtype),
        }
    }
}
