//! What operators on the CPU hand on to matrix products, or keep for backward: f32, or bf16 where
//! the products are in bf16 and would round it anyway. That halves its memory, and rounds once what
//! several products read.

use bytemuck::Pod;
use half::bf16;

use super::math;
use crate::error::{Error, Result};
use crate::tensor::{Buffer, Tensor};

/// f32 or bf16 in host memory. Conversions are `#[inline(always)]`, so that loops over them
/// vectorise inside [`vectorized!`](crate::device::simd::vectorized).
pub(crate) trait Stored: Pod + Send + Sync {
    /// The nearest that can be stored.
    fn of(value: f32) -> Self;

    /// The value.
    fn get(self) -> f32;

    /// A tensor's elements of this type; an error for any other.
    fn of_tensor(tensor: &Tensor) -> Result<&[Self]>;

    /// A tensor of them.
    fn into_tensor(data: Buffer<Self>, shape: &[usize]) -> Result<Tensor>;
}

impl Stored for f32 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn get(self) -> f32 {
        self
    }

    fn of_tensor(tensor: &Tensor) -> Result<&[Self]> {
        tensor.f32s()
    }

    fn into_tensor(data: Buffer<Self>, shape: &[usize]) -> Result<Tensor> {
        Tensor::from_buffer(data, shape)
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        Self::from_bits((math::rounded_to_bf16(value) >> 16) as u16)
    }

    // Not half's conversion, which branches on NaN.
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn of_tensor(tensor: &Tensor) -> Result<&[Self]> {
        let found = || Error::operand("tensor", "bf16 in host memory", tensor.found());
        tensor.bf16s().ok_or_else(found)
    }

    fn into_tensor(data: Buffer<Self>, shape: &[usize]) -> Result<Tensor> {
        Tensor::from_bf16(data, shape)
    }
}
