//! Modules: images to programs with their variables in device memory.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use super::error::{
    CuResult, FILE_NOT_FOUND, INVALID_IMAGE, INVALID_PTX, INVALID_VALUE, NOT_FOUND,
};
use super::kernels::Kernel;
use super::{CuResultError, Handle, call, driver, image, put};
use crate::machine::memory::MemoryError;
use crate::ptx::ast::{self, Space};
use crate::ptx::lower::{function_address, lower};
use crate::ptx::parser;
use crate::ptx::program::{Program, initial_bytes};

/// `CU_JIT_ERROR_LOG_BUFFER` and its size option.
const ERROR_LOG: c_int = 5;
const ERROR_LOG_SIZE: c_int = 6;

/// A loaded module; its variables are freed with it.
pub struct Module {
    pub program: Arc<Program>,
    variables: Vec<u64>,
}

impl Drop for Module {
    fn drop(&mut self) {
        for &address in &self.variables {
            // Freed by the program against the rules: nothing is left to do.
            let _ = driver().memory.free(address);
        }
    }
}

/// A load error: code and message.
type Failure = (CuResult, String);

/// Loads PTX text.
fn load(text: &str) -> Result<Module, Failure> {
    let invalid = |message: String| (INVALID_PTX, message);
    let parsed = parser::parse(text).map_err(|e| invalid(e.to_string()))?;
    check_target(&parsed)?;
    let mut module = Module {
        program: Arc::default(),
        variables: Vec::new(),
    };
    let mut globals = HashMap::new();
    let stored =
        |v: &&ast::Variable| matches!(v.space, Space::Global | Space::Const) && !v.external;
    for variable in parsed.variables.iter().filter(stored) {
        let size = variable.size.max(1);
        let address = driver().memory.allocate(size).map_err(|e| match e {
            MemoryError::OutOfMemory => (
                super::error::OUT_OF_MEMORY,
                format!("variable {} needs {size} bytes", variable.name),
            ),
            MemoryError::InvalidAddress => (INVALID_VALUE, String::new()),
        })?;
        module.variables.push(address);
        globals.insert(variable.name.clone(), (address, size));
    }
    let address_of = |name: &str| {
        globals
            .get(name)
            .map(|g: &(u64, u64)| g.0)
            .or_else(|| function_address(&parsed, name))
    };
    for variable in parsed.variables.iter().filter(stored) {
        let mut bytes = initial_bytes(variable, &address_of).map_err(invalid)?;
        // Variables without an initialiser start as zeros.
        bytes.resize(variable.size as usize, 0);
        if let Some((address, _)) = globals.get(&variable.name) {
            // The variable was allocated with this size just above.
            let _ = driver().memory.write(*address, &bytes);
        }
    }
    module.program = Arc::new(lower(&parsed, globals, text).map_err(|e| invalid(e.to_string()))?);
    Ok(module)
}

/// PTX for a newer or another specific architecture does not load.
fn check_target(module: &ast::Module) -> Result<(), Failure> {
    let capability = driver().device.capability();
    let wrong = module.target > capability || module.target_specific && module.target != capability;
    if wrong {
        let suffix = if module.target_specific { "a" } else { "" };
        let message = format!(
            "PTX is for sm_{}{suffix}, the device is sm_{capability}",
            module.target
        );
        return Err((INVALID_PTX, message));
    }
    Ok(())
}

/// Loads an image and reports a failure to standard error and the log.
///
/// # Safety
/// As for [`image::ptx_of`].
unsafe fn load_image(image: *const c_void) -> Result<Handle, Failure> {
    if image.is_null() {
        return Err((INVALID_VALUE, "null image".into()));
    }
    // SAFETY: not null, and complete by the caller's promise.
    let text = unsafe { image::ptx_of(image.cast(), driver().device.capability()) };
    let loaded = text
        .and_then(|text| load(&text))
        .inspect_err(|(_, message)| {
            driver()
                .reports
                .message(format!("module not loaded: {message}"));
        })?;
    Ok(driver().modules.insert(loaded))
}

/// # Safety
/// `module` is null or writable; `image` is NUL-terminated PTX, a cubin or a fat binary.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut Handle, image: *const c_void) -> CuResult {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { put(module, load_image(image).map_err(|f| f.0)?) }
    })
}

/// # Safety
/// As for [`cuModuleLoadData`]; `options` and `values` hold `count` entries.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadDataEx(
    module: *mut Handle,
    image: *const c_void,
    count: c_uint,
    options: *const c_int,
    values: *const *mut c_void,
) -> CuResult {
    call(|| {
        // SAFETY: the caller's promise.
        let failure = match unsafe { load_image(image) } {
            // SAFETY: the caller's promise.
            Ok(handle) => return unsafe { put(module, handle) },
            Err(failure) => failure,
        };
        if count > 0 && !options.is_null() && !values.is_null() {
            // SAFETY: both hold `count` entries by the caller's promise.
            unsafe { write_log(&failure.1, count as usize, options, values) };
        }
        Err(failure.0.into())
    })
}

/// # Safety
/// `options` and `values` hold `count` entries; a log buffer has the size its option says.
unsafe fn write_log(
    message: &str,
    count: usize,
    options: *const c_int,
    values: *const *mut c_void,
) {
    // SAFETY: the caller's promise.
    let (options, values) = unsafe {
        (
            std::slice::from_raw_parts(options, count),
            std::slice::from_raw_parts(values, count),
        )
    };
    let find = |wanted: c_int| options.iter().position(|&o| o == wanted).map(|i| values[i]);
    let (Some(buffer), Some(size)) = (find(ERROR_LOG), find(ERROR_LOG_SIZE)) else {
        return;
    };
    let Some(room) = size.addr().checked_sub(1) else {
        return;
    };
    let len = message.len().min(room);
    if !buffer.is_null() {
        // SAFETY: the buffer has `room + 1` bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(message.as_ptr(), buffer.cast::<u8>(), len);
            buffer.cast::<u8>().add(len).write(0);
        }
    }
}

/// # Safety
/// As for [`cuModuleLoadData`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadFatBinary(
    module: *mut Handle,
    image: *const c_void,
) -> CuResult {
    // SAFETY: the caller's promise.
    unsafe { cuModuleLoadData(module, image) }
}

/// # Safety
/// `module` is null or writable; `path` is a NUL-terminated path.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoad(module: *mut Handle, path: *const c_char) -> CuResult {
    // SAFETY: the caller's promise.
    let path = unsafe { CStr::from_ptr(path) };
    let Ok(mut bytes) = std::fs::read(path.to_string_lossy().as_ref()) else {
        return FILE_NOT_FOUND;
    };
    let length = bytes.len() as u64;
    // Text needs its end; room for a truncated binary header does no harm.
    bytes.extend([0; 64]);
    if image::fatbin_bytes(&bytes).is_some_and(|needed| needed > length) {
        driver()
            .reports
            .message("module not loaded: truncated fat binary".into());
        return INVALID_IMAGE;
    }
    // SAFETY: the file's bytes with a terminator; a fat binary's header was written by its compiler.
    unsafe { cuModuleLoadData(module, bytes.as_ptr().cast()) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: Handle) -> CuResult {
    call(|| {
        let module = driver().modules.remove(module)?;
        driver()
            .functions
            .retain(|kernel| !kernel.belongs_to(&module));
        Ok(())
    })
}

/// # Safety
/// `text` is a NUL-terminated string.
unsafe fn name_of(text: *const c_char) -> Result<String, CuResultError> {
    if text.is_null() {
        return Err(INVALID_VALUE.into());
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned())
}

/// # Safety
/// `function` is null or writable; `name` is a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut Handle,
    module: Handle,
    name: *const c_char,
) -> CuResult {
    call(|| {
        let module = driver().modules.get(module)?;
        // SAFETY: the caller's promise.
        let name = unsafe { name_of(name)? };
        let index = *module.program.kernels.get(&name).ok_or(NOT_FOUND)?;
        // SAFETY: the caller's promise.
        unsafe {
            put(
                function,
                driver().functions.insert(Kernel::new(module, index)),
            )
        }
    })
}

/// # Safety
/// The pointers are null or writable; `name` is a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetGlobal_v2(
    address: *mut u64,
    bytes: *mut usize,
    module: Handle,
    name: *const c_char,
) -> CuResult {
    call(|| {
        let module = driver().modules.get(module)?;
        // SAFETY: the caller's promise.
        let name = unsafe { name_of(name)? };
        let &(at, size) = module.program.globals.get(&name).ok_or(NOT_FOUND)?;
        // SAFETY: not null, and writable by the caller's promise.
        unsafe {
            if !address.is_null() {
                put(address, at)?;
            }
            if !bytes.is_null() {
                put(bytes, size as usize)?;
            }
        }
        Ok(())
    })
}
