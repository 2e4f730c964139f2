//! An NVIDIA GPU: one context and one stream, the embedded kernels, and memory that is kept for
//! reuse. All work runs in the order of the stream, so that memory handed from one operator to
//! the next needs no synchronisation; copies beside it, in a second one, wait for a mark
//! in it and are waited for.

mod cast;
mod graph;
mod info;
mod kernel;
mod tensor_map;

use std::sync::Arc;

use cudarc::driver::sys::{CUdevice_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaStream, DriverError};

pub(crate) use graph::{Cut, Recorded};
pub(crate) use kernel::{Arg, Grid, Kernel, extent};

use super::CpuDevice;
use crate::error::{Error, Result};
use crate::tensor::cuda::{Mark, Memory, error_name};
use crate::tensor::{CudaBuffer, DType, Tensor};
use kernel::Kernels;

/// The oldest compute capability that the kernels run on: Ampere.
const OLDEST: (i32, i32) = (8, 0);

/// bf16 values that a thread reads at a time: 16 bytes.
pub(crate) const WIDE: usize = 8;

/// f32 values that a thread reads at a time: 16 bytes.
pub(crate) const WIDE_F32: usize = 4;

/// One GPU, and the host's cores beside it for what a model does outside its operators.
#[derive(Clone, Debug)]
pub struct CudaDevice {
    stream: Arc<CudaStream>,
    /// For copies between host and device while the stream works on.
    beside: Arc<CudaStream>,
    memory: Arc<Memory>,
    kernels: Arc<Kernels>,
    capability: (i32, i32),
    multiprocessors: usize,
    host: CpuDevice,
    most_shared: usize,
}

impl CudaDevice {
    /// GPU number `ordinal`, with `threads` worker threads on the host (0: one for each core).
    ///
    /// # Errors
    /// A build without kernels, no driver, no such device, or one older than compute
    /// capability 8.0.
    pub fn new(ordinal: usize, threads: usize) -> Result<Self> {
        if !kernel::built() {
            return Err(Error::cuda(
                ordinal,
                "this build holds no CUDA kernels because nvcc was not found when it was made; \
                 install the CUDA toolkit 13 (or set NVCC to its nvcc), `touch build.rs` and build \
                 again",
            ));
        }
        if !Self::driver_present() {
            return Err(Error::cuda(
                ordinal,
                "no CUDA driver (libcuda) is installed; install NVIDIA's driver for CUDA 13",
            ));
        }
        let failed =
            |what: &str, e: DriverError| Error::cuda(ordinal, format!("{what}: {}", error_name(e)));
        cudarc::driver::result::init().map_err(|e| match e.0 {
            CUresult::CUDA_ERROR_NO_DEVICE => Error::cuda(
                ordinal,
                "the CUDA driver is installed but finds no GPU; see what nvidia-smi lists",
            ),
            _ => failed("the CUDA driver did not start", e),
        })?;
        let count = CudaContext::device_count().map_err(|e| failed("counting devices", e))?;
        if i64::try_from(ordinal).map_or(true, |n| n >= count.into()) {
            return Err(Error::cuda(
                ordinal,
                format!("the driver has {count} devices, numbered from 0"),
            ));
        }
        let context = CudaContext::new(ordinal).map_err(|e| failed("no context", e))?;
        let capability = context.compute_capability();
        let (major, minor) = capability.map_err(|e| failed("no compute capability", e))?;
        if (major, minor) < OLDEST {
            return Err(Error::cuda(
                ordinal,
                format!(
                    "expected compute capability {}.{} or later, found {major}.{minor}",
                    OLDEST.0, OLDEST.1
                ),
            ));
        }
        let attribute = |attribute, what| context.attribute(attribute).map_err(|e| failed(what, e));
        let count = attribute(
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            "no count of multiprocessors",
        )?;
        let most_shared = attribute(
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            "no limit of shared memory",
        )?;
        // SAFETY: this device's work is on its one stream, whose order is all the synchronisation
        // that memory needs. The second copies beside it only from and to memory whose work
        // `Mark::wait` has waited for and that nothing else changes before `Beside::finish`.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(|e| failed("no stream", e))?;
        let beside = context.new_stream().map_err(|e| failed("no stream", e))?;
        Ok(Self {
            memory: Arc::new(Memory::new(stream.clone())),
            kernels: Arc::new(Kernels::new(context)),
            stream,
            beside,
            capability: (major, minor),
            multiprocessors: usize::try_from(count).unwrap_or(0),
            host: CpuDevice::new(threads)?,
            most_shared: usize::try_from(most_shared).unwrap_or(0),
        })
    }

    /// The device of a test: a GPU where there is one, else the emulator; none where the build has
    /// no kernels, which the operators' tests say.
    #[cfg(test)]
    pub(crate) fn for_tests(threads: usize) -> Option<Self> {
        cuda_emulator::install().unwrap();
        Self::is_available().then(|| Self::new(0, threads).unwrap())
    }

    /// Whether this build has kernels and this machine a CUDA driver to run them with.
    pub fn is_available() -> bool {
        kernel::built() && Self::driver_present()
    }

    fn driver_present() -> bool {
        // SAFETY: loading the driver runs its initialisers, which every CUDA program does.
        unsafe { cudarc::driver::sys::is_culib_present() }
    }

    /// The GPU's number.
    pub fn ordinal(&self) -> usize {
        self.stream.context().ordinal()
    }

    /// What the device calls itself, such as `NVIDIA A100-SXM4-80GB`.
    pub fn name(&self) -> Result<String> {
        let name = self.stream.context().name();
        name.map_err(|e| Error::cuda(self.ordinal(), format!("no name: {}", error_name(e))))
    }

    /// The point that the stream's work has come to.
    pub(crate) fn mark(&self) -> Result<Mark> {
        Mark::new(&self.stream, self.beside.clone())
    }

    /// Bytes of shared memory that a block may have.
    pub(crate) fn most_shared(&self) -> usize {
        self.most_shared
    }

    /// Major and minor compute capability.
    pub(crate) fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// How many multiprocessors there are.
    pub(crate) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// The stream that everything runs in.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(super) fn host(&self) -> &CpuDevice {
        &self.host
    }

    /// The error of an operator that has no kernel.
    pub(crate) fn no_kernel(&self, op: &str) -> Error {
        Error::NoKernel {
            device: self.ordinal(),
            op: op.to_owned(),
        }
    }

    /// Memory for `len` elements, with unspecified contents.
    pub(crate) fn alloc(&self, dtype: DType, len: usize) -> Result<CudaBuffer> {
        CudaBuffer::new(&self.memory, len, dtype)
    }

    /// Bytes of device memory taken from the driver, in use or kept for reuse.
    pub fn reserved_memory(&self) -> usize {
        self.memory.reserved()
    }

    /// Whether the tensor is in this device's memory.
    pub(crate) fn holds(&self, tensor: &Tensor) -> bool {
        tensor
            .cuda()
            .is_some_and(|buffer| buffer.is_of(&self.stream))
    }

    /// The tensor on this device in `dtype` (bf16, f32, or u32 for u32): itself where it is that
    /// already, else a rounded or widened copy, also from another device.
    ///
    /// # Errors
    /// A dtype that the tensor cannot be brought into, out of memory.
    pub fn resident(&self, tensor: &Tensor, dtype: DType) -> Result<Tensor> {
        if self.holds(tensor) && tensor.dtype() == dtype {
            return Ok(tensor.clone());
        }
        if self.holds(tensor) && matches!(dtype, DType::F32 | DType::Bf16) {
            return self.cast(tensor, dtype);
        }
        let mut buffer = CudaBuffer::new(&self.memory, tensor.len(), dtype)?;
        match dtype {
            DType::U32 => buffer.write(0, bytemuck::cast_slice(tensor.u32s()?))?,
            DType::F32 => buffer.write(0, bytemuck::cast_slice(tensor.to_f32()?.f32s()?))?,
            DType::Bf16 => {
                let rounded = tensor.to_bf16()?;
                buffer.write(0, bytemuck::cast_slice(rounded.bf16s().unwrap_or(&[])))?;
                tensor.release_pages();
            }
            DType::F16 => {
                return Err(Error::operand(
                    "tensor",
                    "float32, bfloat16 or uint32 on a CUDA device",
                    dtype.name(),
                ));
            }
        }
        Tensor::from_cuda(buffer, tensor.shape())
    }

    /// a + b, element by element, rounded to bf16.
    pub(super) fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        const ADD: Kernel = Kernel {
            stem: "add",
            function: "add_bf16",
        };
        let (a, b) = (
            self.resident(a, DType::Bf16)?,
            self.resident(b, DType::Bf16)?,
        );
        let sum = self.alloc(DType::Bf16, a.len())?;
        let args = [
            Arg::from(&sum),
            a.arg()?,
            b.arg()?,
            Arg::U64(a.len() as u64),
        ];
        // SAFETY: three pointers to bf16 and their length; `add_assign` compared the lengths.
        unsafe { self.launch(ADD, Grid::over(a.len().div_ceil(WIDE)), &args) }?;
        Tensor::from_cuda(sum, a.shape())
    }

    /// sum += term in f32; the sum is on this device.
    pub(super) fn add_f32(&self, sum: &mut Tensor, term: &Tensor) -> Result<()> {
        const ADD: Kernel = Kernel {
            stem: "add",
            function: "add_f32",
        };
        let term = self.resident(term, DType::F32)?;
        self.own(sum)?;
        let args = [sum.arg()?, term.arg()?, Arg::U64(sum.len() as u64)];
        // SAFETY: two pointers to f32 and their length, which `add_assign` compared; `own` has
        // seen that nobody else reads the sum.
        unsafe { self.launch(ADD, Grid::over(sum.len().div_ceil(WIDE_F32)), &args) }
    }

    /// Brings a tensor into memory of this device that nobody shares, in f32, so that a kernel
    /// may write to it.
    pub(crate) fn own(&self, tensor: &mut Tensor) -> Result<()> {
        if !self.holds(tensor) || tensor.dtype() != DType::F32 {
            *tensor = self.resident(tensor, DType::F32)?;
        } else if let (true, Some(shared)) = (tensor.is_shared(), tensor.cuda()) {
            let mut copy = self.alloc(DType::F32, tensor.len())?;
            copy.copy_from(0, shared, 0..tensor.len())?;
            *tensor = Tensor::from_cuda(copy, tensor.shape())?;
        }
        Ok(())
    }

    pub(super) fn release_memory(&self) {
        self.memory.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_larger_than_the_page_locked_memory_go_and_come_back() {
        let Some(cuda) = CudaDevice::for_tests(1) else {
            return;
        };
        // Four parts, the last of one value; and what goes without page-locked memory.
        for len in [3 * (1 << 20) + 1, 1000, 0] {
            let values: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let host = Tensor::from_vec(values.clone(), [len]).unwrap();
            let tensor = cuda.resident(&host, DType::F32).unwrap();
            assert_eq!(tensor.to_f32().unwrap().f32s().unwrap(), &values[..]);
            let (start, count) = (len / 3, len / 2);
            let mut bytes = vec![1, 2, 3, 4];
            let beside = cuda.mark().unwrap().wait().unwrap();
            let buffer = tensor.cuda().unwrap();
            let read = buffer.read_beside(&beside, start, count, &mut bytes);
            read.unwrap();
            assert_eq!(&bytes[..4], [1, 2, 3, 4]);
            let right: &[u8] = bytemuck::cast_slice(&values[start..start + count]);
            assert_eq!(&bytes[4..], right);
            assert!(buffer.read(len, 1).is_err());
        }
    }
}
