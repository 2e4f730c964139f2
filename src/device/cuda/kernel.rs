use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use super::CudaDevice;
use crate::error::{Error, Result};
use crate::tensor::cuda::error_name;
use crate::tensor::{CudaBuffer, Tensor};

/// Stem and compiled image of every file of `kernels/`; empty in a CPU-only build.
const IMAGES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/kernel_images.rs"));

/// The largest extent of a grid along x.
const MAX_GRID: usize = i32::MAX as usize;

/// Dynamic shared memory in bytes that a launch may have without asking for more.
const GRANTED_SHARED: usize = 48 << 10;

/// Whether this build holds kernels.
pub(super) fn built() -> bool {
    !IMAGES.is_empty()
}

/// A kernel, named by its stem's file and its function.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    pub(crate) stem: &'static str,
    pub(crate) function: &'static str,
}

/// One argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    /// A device pointer, always 16-byte aligned.
    Pointer(u64),
    U32(u32),
    U64(u64),
    F32(f32),
    /// A struct that the kernel takes by value.
    Struct([u64; 16]),
}

impl From<&CudaBuffer> for Arg {
    fn from(buffer: &CudaBuffer) -> Self {
        Self::Pointer(buffer.address())
    }
}

impl Tensor {
    /// The tensor as a kernel's argument; an error unless it is on a CUDA device.
    pub(crate) fn arg(&self) -> Result<Arg> {
        let buffer = self.cuda().map(Arg::from);
        buffer.ok_or_else(|| Error::operand("kernel", "a tensor on a CUDA device", self.found()))
    }
}

impl Arg {
    /// A size that the kernel takes as `unsigned`; an error where it does not fit.
    pub(crate) fn size(op: &'static str, size: usize) -> Result<Self> {
        extent(op, size).map(Self::U32)
    }
}

/// A size as a field of a struct that a kernel takes; an error where it does not fit.
pub(crate) fn extent(op: &'static str, size: usize) -> Result<u32> {
    let fits = u32::try_from(size);
    fits.map_err(|_| Error::operand(op, "a size below 2^32", format!("{size}")))
}

impl fmt::Display for Arg {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Pointer(address) => write!(f, "{address:#x}"),
            Self::U32(value) => write!(f, "{value}"),
            Self::U64(value) => write!(f, "{value}"),
            Self::F32(value) => write!(f, "{value}"),
            Self::Struct(words) => write!(f, "{words:x?}"),
        }
    }
}

/// How a kernel is spread over the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) blocks: usize,
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block in bytes.
    pub(crate) shared: usize,
}

impl Grid {
    /// One thread for each of `threads`, in blocks of 256.
    pub(crate) fn over(threads: usize) -> Self {
        const BLOCK: u32 = 256;
        Self {
            blocks: threads.div_ceil(BLOCK as usize),
            threads: BLOCK,
            shared: 0,
        }
    }

    /// One block of `threads` for each of `blocks`, with `shared` bytes of shared memory each.
    pub(crate) fn of_blocks(blocks: usize, threads: u32, shared: usize) -> Self {
        Self {
            blocks,
            threads,
            shared,
        }
    }
}

/// The embedded modules, each loaded at its first use.
#[derive(Debug)]
pub(super) struct Kernels {
    context: Arc<CudaContext>,
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    functions: HashMap<&'static str, CudaFunction>,
}

impl Kernels {
    pub(super) fn new(context: Arc<CudaContext>) -> Self {
        Self {
            context,
            loaded: Mutex::default(),
        }
    }

    fn function(&self, kernel: Kernel) -> Result<CudaFunction> {
        // Entries are only ever added whole, so that a panic elsewhere leaves nothing half-made.
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = loaded.functions.get(kernel.function) {
            return Ok(function.clone());
        }
        let module = match loaded.modules.get(kernel.stem) {
            Some(module) => module.clone(),
            None => {
                let module = self.load(kernel.stem)?;
                loaded.modules.insert(kernel.stem, module.clone());
                module
            }
        };
        let function = module.load_function(kernel.function);
        let function = function.map_err(|e| self.failed(kernel.function, &error_name(e)))?;
        loaded.functions.insert(kernel.function, function.clone());
        Ok(function)
    }

    fn load(&self, stem: &str) -> Result<Arc<CudaModule>> {
        let image = IMAGES.iter().find(|(name, _)| *name == stem);
        let (_, image) = image.ok_or_else(|| self.failed(stem, "not part of this build"))?;
        let module = self.context.load_module(Ptx::from_binary(image.to_vec()));
        module.map_err(|e| self.failed(stem, &error_name(e)))
    }

    fn failed(&self, kernel: &str, what: &str) -> Error {
        Error::cuda(self.context.ordinal(), format!("loading {kernel}: {what}"))
    }
}

impl CudaDevice {
    /// Launches a kernel on the device's stream; a grid of no blocks does nothing.
    ///
    /// # Errors
    /// A grid or a block that the device does not allow, or a launch that the driver refuses;
    /// both name the kernel and its arguments. An error while the kernel runs shows at the next
    /// copy from the device.
    ///
    /// # Safety
    /// The arguments must be the kernel's, in number, order and type, and every pointer must
    /// lead to as many elements of this device as the kernel reads or writes through it.
    pub(crate) unsafe fn launch(&self, kernel: Kernel, grid: Grid, args: &[Arg]) -> Result<()> {
        if grid.blocks == 0 {
            return Ok(());
        }
        let failed = |what: &str| {
            let args: Vec<String> = args.iter().map(Arg::to_string).collect();
            let (name, args) = (kernel.function, args.join(", "));
            let Grid {
                blocks,
                threads,
                shared,
            } = grid;
            let shape = format!("{blocks} blocks of {threads} threads, {shared} bytes shared");
            Error::cuda(
                self.ordinal(),
                format!("launching {name}({args}), {shape}: {what}"),
            )
        };
        let (Ok(blocks), Ok(shared_mem_bytes)) =
            (u32::try_from(grid.blocks), grid.shared.try_into())
        else {
            return Err(failed("the grid is too large"));
        };
        if grid.blocks > MAX_GRID {
            return Err(failed("the grid is too large"));
        }
        let function = self.kernels.function(kernel)?;
        if grid.shared > GRANTED_SHARED {
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let shared = i32::try_from(grid.shared).unwrap_or(i32::MAX);
            let asked = function.set_attribute(most, shared);
            asked.map_err(|e| failed(&error_name(e)))?;
        }
        let mut launch = self.stream.launch_builder(&function);
        for arg in args {
            match arg {
                Arg::Pointer(value) | Arg::U64(value) => launch.arg(value),
                Arg::U32(value) => launch.arg(value),
                Arg::F32(value) => launch.arg(value),
                Arg::Struct(words) => launch.arg(words),
            };
        }
        let config = LaunchConfig {
            grid_dim: (blocks, 1, 1),
            block_dim: (grid.threads, 1, 1),
            shared_mem_bytes,
        };
        // SAFETY: the caller vouches for the arguments.
        let launched = unsafe { launch.launch(config) };
        launched.map(drop).map_err(|e| failed(&error_name(e)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_that_the_driver_refuses_names_kernel_arguments_and_grid() {
        let Some(cuda) = CudaDevice::for_tests(1) else {
            return;
        };
        let kernel = |function| Kernel {
            stem: "add",
            function,
        };
        let args = [Arg::Pointer(0x400), Arg::Pointer(0x800), Arg::U64(77)];
        for (grid, what) in [
            (Grid::of_blocks(1, 4096, 0), "1 blocks of 4096 threads"),
            (Grid::of_blocks(1, 32, 1 << 30), "1073741824 bytes shared"),
            (Grid::of_blocks(1 << 40, 32, 0), "the grid is too large"),
        ] {
            // SAFETY: the arguments are of the kernel's types; no launch takes place.
            let error = unsafe { cuda.launch(kernel("add_f32"), grid, &args) };
            let error = error.unwrap_err().to_string();
            for part in ["cuda:0", "launching add_f32(0x400, 0x800, 77)", what] {
                assert!(error.contains(part), "{error}");
            }
        }
        // SAFETY: there is no such kernel.
        let error = unsafe { cuda.launch(kernel("none"), Grid::over(1), &[]) };
        let error = error.unwrap_err().to_string();
        assert!(error.contains("loading none"), "{error}");
    }
}
