//! Functions that cudarc can call and a device without their feature answers with
//! `CUDA_ERROR_NOT_SUPPORTED`: pools besides the device's own, memory of other drivers, prefetching
//! of managed memory.

use super::error::{CuResult, NOT_SUPPORTED};

macro_rules! unsupported {
    ($($name:ident)*) => {$(
        // Arguments are the caller's to remove in C's convention; none is looked at.
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> CuResult {
            NOT_SUPPORTED
        }
    )*};
}

unsupported! {
    cuDestroyExternalMemory
    cuDeviceSetMemPool
    cuExternalMemoryGetMappedBuffer
    cuImportExternalMemory
    cuMemPoolCreate
    cuMemPoolDestroy
    cuMemPoolGetAttribute
    cuMemPrefetchAsync_v2
}
