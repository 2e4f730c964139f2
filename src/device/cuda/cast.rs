use super::{Arg, CudaDevice, Grid, Kernel, WIDE};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

impl CudaDevice {
    /// A tensor of this device in `dtype`, f32 or bf16: itself where it is that already, else a
    /// widened or rounded copy, made on the device.
    ///
    /// # Errors
    /// Another dtype, a tensor that is not on this device, out of memory.
    pub(crate) fn cast(&self, tensor: &Tensor, dtype: DType) -> Result<Tensor> {
        if self.holds(tensor) && tensor.dtype() == dtype {
            return Ok(tensor.clone());
        }
        let function = match (self.holds(tensor), tensor.dtype(), dtype) {
            (true, DType::F32, DType::Bf16) => "cast_f32_to_bf16",
            (true, DType::Bf16, DType::F32) => "cast_bf16_to_f32",
            _ => {
                let expected = "float32 or bfloat16 on this CUDA device, to become the other";
                return Err(Error::operand("cast", expected, tensor.found()));
            }
        };
        let kernel = Kernel {
            stem: "cast",
            function,
        };
        let out = self.alloc(dtype, tensor.len())?;
        let args = [
            Arg::from(&out),
            tensor.arg()?,
            Arg::U64(tensor.len() as u64),
        ];
        // SAFETY: two buffers of one length and of the kernel's two dtypes.
        unsafe { self.launch(kernel, Grid::over(tensor.len().div_ceil(WIDE)), &args) }?;
        Tensor::from_cuda(out, tensor.shape())
    }
}
