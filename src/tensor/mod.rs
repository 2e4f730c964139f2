//! Dense row-major tensors: a shape over shared storage. No arithmetic lives here.

pub(crate) mod cuda;
mod dtype;
mod staging;
mod storage;

use std::sync::Arc;

use half::{bf16, slice::HalfFloatSliceExt};

pub use cuda::CudaBuffer;
pub use dtype::DType;
pub use storage::{Buffer, MappedBytes, Pool};

use crate::error::{Error, Result};
use storage::Storage;

/// A dense, contiguous, row-major tensor. Cloning shares the storage; writing to a shared
/// tensor copies it first.
#[derive(Clone, Debug)]
pub struct Tensor {
    shape: Vec<usize>,
    storage: Arc<Storage>,
}

impl Tensor {
    /// An f32 tensor over `data`; fails when the shape's product is not the data's length.
    pub fn from_vec(data: Vec<f32>, shape: impl Into<Vec<usize>>) -> Result<Self> {
        Self::from_buffer(Buffer::from(data), shape)
    }

    /// An f32 tensor over a device buffer.
    pub fn from_buffer(data: Buffer, shape: impl Into<Vec<usize>>) -> Result<Self> {
        Self::new(Storage::F32(data), shape.into())
    }

    /// A bf16 tensor over a device buffer.
    pub fn from_bf16(data: Buffer<bf16>, shape: impl Into<Vec<usize>>) -> Result<Self> {
        Self::new(Storage::Bf16(data), shape.into())
    }

    /// A u32 tensor: token ids or latent indices.
    pub fn from_u32(data: Vec<u32>, shape: impl Into<Vec<usize>>) -> Result<Self> {
        Self::new(Storage::U32(data), shape.into())
    }

    /// A tensor over a range of a memory-mapped file, in the file's own dtype (f32, f16 or bf16).
    pub fn from_mapped(data: MappedBytes, shape: impl Into<Vec<usize>>) -> Result<Self> {
        Self::new(Storage::Mapped(data), shape.into())
    }

    /// A tensor over memory of a CUDA device.
    pub(crate) fn from_cuda(data: CudaBuffer, shape: impl Into<Vec<usize>>) -> Result<Self> {
        Self::new(Storage::Cuda(data), shape.into())
    }

    fn new(storage: Storage, shape: Vec<usize>) -> Result<Self> {
        let wanted = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if wanted != Some(storage.len()) {
            return Err(Error::operand(
                "tensor",
                format!("{} elements for shape {shape:?}", storage.len()),
                format!("shape of {wanted:?} elements"),
            ));
        }
        Ok(Self {
            shape,
            storage: Arc::new(storage),
        })
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.storage.len()
    }

    /// Whether any extent is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.storage.dtype()
    }

    /// The elements where they are on a CUDA device.
    pub(crate) fn cuda(&self) -> Option<&CudaBuffer> {
        match &*self.storage {
            Storage::Cuda(buffer) => Some(buffer),
            _ => None,
        }
    }

    /// The elements on a CUDA device for writing, where nobody shares them.
    pub(crate) fn cuda_mut(&mut self) -> Option<&mut CudaBuffer> {
        match Arc::get_mut(&mut self.storage) {
            Some(Storage::Cuda(buffer)) => Some(buffer),
            _ => None,
        }
    }

    /// Whether another tensor has the same storage.
    pub(crate) fn is_shared(&mut self) -> bool {
        Arc::get_mut(&mut self.storage).is_none()
    }

    /// What the tensor is, for messages: its dtype and, on a GPU, which.
    pub(crate) fn found(&self) -> String {
        match self.cuda() {
            Some(buffer) => format!("{} on cuda:{}", self.dtype().name(), buffer.ordinal()),
            None => self.dtype().name().to_owned(),
        }
    }

    /// Whether both are views of the same memory.
    pub(crate) fn shares_storage(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.storage, &other.storage)
    }

    /// The tensor seen as a matrix: (product of all extents but the last, the last extent).
    pub fn matrix_dims(&self) -> (usize, usize) {
        match self.shape.split_last() {
            Some((&cols, rows)) => (rows.iter().product(), cols),
            None => (1, 1),
        }
    }

    /// The same elements under another shape; shares storage.
    pub fn reshape(&self, shape: impl Into<Vec<usize>>) -> Result<Self> {
        let shape = shape.into();
        if shape.iter().product::<usize>() != self.len() {
            return Err(Error::operand(
                "reshape",
                format!("a shape of {} elements", self.len()),
                format!("{shape:?}"),
            ));
        }
        Ok(Self {
            shape,
            storage: self.storage.clone(),
        })
    }

    /// The elements of an f32 tensor; an error for any other dtype.
    pub fn f32s(&self) -> Result<&[f32]> {
        self.storage
            .f32s()
            .ok_or_else(|| Error::operand("tensor", "f32 in host memory", self.found()))
    }

    /// The elements of an f32 tensor for writing; copies them first when the storage is shared or mapped.
    pub fn f32s_mut(&mut self) -> Result<&mut [f32]> {
        if Arc::get_mut(&mut self.storage).is_none_or(|s| !s.is_writable()) {
            let copy = self.storage.copied_f32().ok_or_else(|| {
                Error::operand("tensor", "an f32 tensor to write to", self.found())
            })?;
            self.storage = Arc::new(Storage::F32(copy));
        }
        match Arc::get_mut(&mut self.storage) {
            Some(Storage::F32(data)) => Ok(data),
            _ => Err(Error::operand("tensor", "f32", "another dtype")),
        }
    }

    /// The elements of a u32 tensor; an error for any other dtype.
    pub fn u32s(&self) -> Result<&[u32]> {
        match &*self.storage {
            Storage::U32(data) => Ok(data),
            _ => Err(Error::operand("tensor", "u32 in host memory", self.found())),
        }
    }

    /// The elements where they are bf16 in host memory (read in place from a mapped file).
    pub fn bf16s(&self) -> Option<&[bf16]> {
        self.storage.bf16s()
    }

    /// Elements `start..start + out.len()` as f32, whatever float type they are stored in.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<()> {
        let end = start.checked_add(out.len()).filter(|&e| e <= self.len());
        if end.is_none() {
            return Err(Error::operand(
                "tensor",
                format!("a range within {} elements", self.len()),
                format!("{start}..{start}+{}", out.len()),
            ));
        }
        self.storage.read_f32(start, out)
    }

    /// The tensor in f32: itself when it is f32 in memory, a widened copy otherwise.
    pub fn to_f32(&self) -> Result<Self> {
        if matches!(&*self.storage, Storage::F32(_)) {
            return Ok(self.clone());
        }
        let mut data = vec![0.0; self.len()];
        self.read_f32(0, &mut data)?;
        self.release_pages();
        Self::from_vec(data, self.shape.clone())
    }

    /// Lets the system take back the memory that holds a mapped tensor's pages of the file, as
    /// they have been read and will not be soon again. When they are, the system brings them back.
    pub(crate) fn release_pages(&self) {
        self.storage.release_pages();
    }

    /// The tensor of integers in host memory: itself where it is there, a copy otherwise.
    ///
    /// # Errors
    /// Another dtype, a device that cannot be read.
    pub fn to_u32(&self) -> Result<Self> {
        match self.cuda().filter(|buffer| buffer.dtype() == DType::U32) {
            Some(buffer) => {
                let bytes = buffer.read(0, buffer.len())?;
                let (words, _) = bytes.as_chunks::<4>();
                let data = words.iter().map(|&word| u32::from_ne_bytes(word)).collect();
                Self::from_u32(data, self.shape.clone())
            }
            None => self.u32s().map(|_| self.clone()),
        }
    }

    /// The tensor in bf16, rounded to nearest: itself where [`Self::bf16s`] can read it.
    pub fn to_bf16(&self) -> Result<Self> {
        const CHUNK: usize = 1 << 12;
        if self.bf16s().is_some() {
            return Ok(self.clone());
        }
        let mut data = Buffer::zeroed(self.len());
        let mut wide = [0.0; CHUNK];
        for (i, chunk) in data.chunks_mut(CHUNK).enumerate() {
            let wide = &mut wide[..chunk.len()];
            self.read_f32(i * CHUNK, wide)?;
            chunk.convert_from_f32_slice(wide);
        }
        Self::from_bf16(data, self.shape.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_must_hold_all_elements() {
        assert!(Tensor::from_vec(vec![0.0; 6], [2, 3]).is_ok());
        let error = Tensor::from_vec(vec![0.0; 6], [2, 4]).unwrap_err();
        assert!(error.to_string().contains("[2, 4]"), "{error}");
        assert!(Tensor::from_vec(vec![], [usize::MAX, 2]).is_err());
    }

    #[test]
    fn writing_to_a_shared_tensor_leaves_the_other_owner_alone() {
        let a = Tensor::from_vec(vec![1.0, 2.0], [2]).unwrap();
        let mut b = a.clone();
        b.f32s_mut().unwrap()[0] = 9.0;
        assert_eq!(a.f32s().unwrap(), &[1.0, 2.0]);
        assert_eq!(b.f32s().unwrap(), &[9.0, 2.0]);
    }

    #[test]
    fn a_pooled_buffer_comes_back_with_its_length() {
        let pool = Pool::new();
        let first: Buffer = pool.take(5);
        let address = first.as_ptr();
        drop(first);
        let again: Buffer = pool.take(5);
        assert_eq!(again.as_ptr(), address);
        assert_eq!(pool.take::<f32>(5).len(), 5);
    }

    #[test]
    fn values_of_other_types_share_a_pools_memory() {
        let pool = Pool::new();
        let mut odd = pool.take::<bf16>(5);
        odd.fill(bf16::ONE);
        assert_eq!(odd.len(), 5);
        let address = odd.as_ptr().cast::<f32>();
        drop(odd);
        assert_eq!(pool.take::<f32>(3).as_ptr(), address);
    }
}
