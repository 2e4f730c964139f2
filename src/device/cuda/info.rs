//! What there is of CUDA in this build and on this machine.

use cudarc::driver::sys::{CUresult, culib};
use cudarc::driver::{CudaContext, DriverError};

use super::{CudaDevice, kernel};
use crate::error::{Error, Result};
use crate::tensor::cuda::error_name;

/// `CUresult cuDriverGetVersion(int *version)`
type GetVersion = unsafe extern "C" fn(*mut i32) -> CUresult;

impl CudaDevice {
    /// Compute capabilities that this build has machine code for, such as `90a`; `None` in a
    /// build without kernels. Later devices are served by PTX, which the driver compiles.
    pub fn built_for() -> Option<Vec<&'static str>> {
        let list = option_env!("RESA_BUILT_FOR").filter(|_| kernel::built())?;
        Some(list.split(',').filter(|a| !a.is_empty()).collect())
    }

    /// The newest CUDA version that the driver runs, such as (13, 0); `None` without a driver.
    pub fn driver_version() -> Option<(i32, i32)> {
        if !Self::driver_present() {
            return None;
        }
        // SAFETY: the driver is there, as was just seen.
        let driver = unsafe { culib() };
        // SAFETY: the driver's documentation gives this name this signature.
        let get = unsafe { driver.get::<GetVersion>(b"cuDriverGetVersion\0") }.ok()?;
        let mut version = 0;
        // SAFETY: it writes one int and may be called before anything else.
        let result = unsafe { get(&mut version) };
        (result == CUresult::CUDA_SUCCESS).then_some((version / 1000, version % 1000 / 10))
    }

    /// Number of the driver's devices.
    ///
    /// # Errors
    /// No driver, or one that does not start.
    pub fn count() -> Result<usize> {
        if !Self::driver_present() {
            return Err(Error::cuda(0, "no CUDA driver (libcuda) is installed"));
        }
        let failed =
            |e: DriverError| Error::cuda(0, format!("counting devices: {}", error_name(e)));
        cudarc::driver::result::init().map_err(failed)?;
        let count = CudaContext::device_count().map_err(failed)?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The device's compute capability, such as (9, 0).
    pub fn compute_capability(&self) -> Result<(i32, i32)> {
        let capability = self.stream.context().compute_capability();
        capability.map_err(|e| Error::cuda(self.ordinal(), error_name(e)))
    }

    /// The device's memory in bytes.
    pub fn total_memory(&self) -> Result<usize> {
        let bytes = self.stream.context().total_mem();
        bytes.map_err(|e| Error::cuda(self.ordinal(), error_name(e)))
    }
}
