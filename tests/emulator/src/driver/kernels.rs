//! Kernels: attributes, launch checks and launches.

use std::ffi::{c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::Instant;

use super::context::require_context;
use super::device::{MAX_BLOCK, MAX_GRID, MAX_THREADS, SHARED_DEFAULT};
use super::error::{
    COOPERATIVE_LAUNCH_TOO_LARGE, CuResult, INVALID_CLUSTER_SIZE, INVALID_VALUE,
    LAUNCH_OUT_OF_RESOURCES, NOT_SUPPORTED, OUT_OF_MEMORY,
};
use super::functions::blocks_per_sm;
use super::graphs::Work;
use super::modules::Module;
use super::streams::submit;
use super::{CuResultError, Handle, Outcome, call, driver};
use crate::machine::launch::Launch;
use crate::ptx::program::Function;
use crate::sanitize::global::LaunchState;
use crate::sanitize::shared::MAX_CLUSTER;

/// Blocks that a cluster may have without `CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED`.
pub const PORTABLE_CLUSTER: u64 = 8;

/// Bytes through which the blocks of a cooperative grid synchronise.
const WORKSPACE: u64 = 64;

/// A kernel handle.
pub struct Kernel {
    /// Keeps the module's variables alive while launches are recorded in graphs.
    module: Arc<Module>,
    index: usize,
    /// Dynamic shared memory it may be launched with.
    pub max_dynamic_shared: AtomicU32,
    /// Clusters larger than every device of an architecture can run are allowed.
    pub any_cluster_size: AtomicBool,
}

impl Kernel {
    pub fn new(module: Arc<Module>, index: usize) -> Self {
        let fixed = module.program.functions[index].shared_size;
        let max_dynamic_shared = AtomicU32::new(SHARED_DEFAULT.saturating_sub(fixed));
        Self {
            module,
            index,
            max_dynamic_shared,
            any_cluster_size: AtomicBool::new(false),
        }
    }

    pub fn function(&self) -> &Function {
        &self.module.program.functions[self.index]
    }

    pub fn belongs_to(&self, module: &Arc<Module>) -> bool {
        Arc::ptr_eq(&self.module, module)
    }

    /// PTX ISA version of the module, and its target.
    pub fn versions(&self) -> (u32, u32) {
        (self.module.program.version, self.module.program.target)
    }

    /// Raises the limit of dynamic shared memory.
    pub fn set_dynamic_shared(&self, bytes: u32) -> Result<(), CuResult> {
        if bytes
            > driver()
                .device
                .shared_opt_in
                .saturating_sub(self.function().shared_size)
        {
            return Err(INVALID_VALUE);
        }
        self.max_dynamic_shared.store(bytes, Relaxed);
        Ok(())
    }
}

/// Dimensions of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub cluster: [u32; 3],
    pub dynamic_shared: u32,
    /// All blocks run at once and may wait for each other.
    pub cooperative: bool,
}

/// A checked launch with its parameters.
pub struct Prepared {
    kernel: Arc<Kernel>,
    shape: Shape,
    params: Vec<u8>,
}

/// Checks dimensions as the driver does.
pub fn check(kernel: &Kernel, shape: &Shape) -> Result<(), CuResult> {
    let inside =
        |size: [u32; 3], most: [u32; 3]| size.iter().zip(most).all(|(&s, m)| s >= 1 && s <= m);
    if !inside(shape.grid, MAX_GRID) || !inside(shape.block, MAX_BLOCK) {
        return Err(INVALID_VALUE);
    }
    let threads: u32 = shape.block.iter().product();
    if threads > MAX_THREADS || shape.dynamic_shared > kernel.max_dynamic_shared.load(Relaxed) {
        return Err(INVALID_VALUE);
    }
    let function = kernel.function();
    if let Some(most) = function.max_threads {
        let most_threads: u32 = most.iter().map(|&m| m.max(1)).product();
        if threads > most_threads || function.required_threads && shape.block != most {
            return Err(LAUNCH_OUT_OF_RESOURCES);
        }
    }
    check_cluster(kernel, shape)?;
    let blocks: u64 = shape.grid.iter().map(|&g| u64::from(g)).product();
    let per_sm = blocks_per_sm(kernel, threads, shape.dynamic_shared as usize);
    if shape.cooperative && blocks > u64::from(per_sm * driver().device.sm_count) {
        return Err(COOPERATIVE_LAUNCH_TOO_LARGE);
    }
    Ok(())
}

/// Checks the cluster of a launch; one block is always fine.
fn check_cluster(kernel: &Kernel, shape: &Shape) -> Result<(), CuResult> {
    let size = shape.cluster.iter().map(|&c| u64::from(c)).product::<u64>();
    if size == 1 {
        return Ok(());
    }
    let most = match kernel.any_cluster_size.load(Relaxed) {
        true => MAX_CLUSTER as u64,
        false => PORTABLE_CLUSTER,
    };
    let required = kernel.function().cluster;
    if driver().device.major < 9 || size > most || required.is_some_and(|r| r != shape.cluster) {
        return Err(INVALID_CLUSTER_SIZE);
    }
    let mut sizes = shape.grid.iter().zip(shape.cluster);
    if sizes.all(|(&grid, cluster)| grid.is_multiple_of(cluster)) {
        Ok(())
    } else {
        Err(INVALID_VALUE)
    }
}

/// Copies the parameters: each pointer leads to as many bytes as the kernel declares.
///
/// # Safety
/// `pointers` is null or holds a valid pointer per parameter of the kernel.
unsafe fn gather(
    function: &Function,
    pointers: *const *const c_void,
) -> Result<Vec<u8>, CuResultError> {
    let mut out = vec![0; function.param_bytes as usize];
    if function.params.is_empty() {
        return Ok(out);
    }
    if pointers.is_null() {
        return Err(INVALID_VALUE.into());
    }
    for (i, &(offset, size)) in function.params.iter().enumerate() {
        // SAFETY: the caller's promise.
        let from = unsafe { *pointers.add(i) };
        if from.is_null() {
            return Err(INVALID_VALUE.into());
        }
        let to = &mut out[offset as usize..(offset + size) as usize];
        // SAFETY: the caller's promise; the sizes are the kernel's own.
        unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.as_mut_ptr(), size as usize) };
    }
    Ok(out)
}

impl Prepared {
    /// Runs the launch.
    pub fn run(&self) -> Result<(), CuResult> {
        if !self.shape.cooperative {
            return self.run_with(0);
        }
        let memory = &driver().memory;
        let workspace = memory.allocate(WORKSPACE).map_err(|_| OUT_OF_MEMORY)?;
        let outcome = memory
            .fill(workspace, &[0], WORKSPACE)
            .map_err(|_| INVALID_VALUE)
            .and_then(|()| self.run_with(workspace));
        // The address is one that was just allocated, and nobody else knows it.
        let _ = memory.free(workspace);
        outcome
    }

    /// Runs the launch with a workspace for its blocks, 0 if they do not synchronise.
    fn run_with(&self, workspace: u64) -> Result<(), CuResult> {
        let driver = driver();
        let (view, epoch) = driver.memory.snapshot();
        let function = self.kernel.function();
        let launch = Launch {
            program: &self.kernel.module.program,
            function: self.kernel.index,
            grid: self.shape.grid,
            block_dim: self.shape.block,
            cluster: self.shape.cluster,
            dynamic_shared: self.shape.dynamic_shared,
            shared_bytes: function.shared_bytes(self.shape.dynamic_shared),
            params: self.params.clone(),
            view,
            races: LaunchState::new(epoch, self.shape.grid, self.shape.cluster),
            alu: driver.alu,
            sm_count: driver.device.sm_count,
            workspace,
            started: Instant::now(),
            schedule: driver.schedule,
            step_limit: driver.step_limit,
        };
        match launch.run() {
            Ok(counters) => {
                driver.reports.counted(&function.name, counters);
                Ok(())
            }
            Err(finding) => {
                driver.reports.found(&finding);
                Err(finding.kind.cuda_error())
            }
        }
    }
}

/// The shape with the cluster that the kernel was compiled for, if the launch gives none.
pub fn with_required_cluster(kernel: &Kernel, shape: Shape) -> Shape {
    match kernel.function().cluster {
        Some(cluster) if shape.cluster == [1; 3] => Shape { cluster, ..shape },
        _ => shape,
    }
}

/// Checks and submits a launch.
///
/// # Safety
/// As for [`gather`].
unsafe fn launch(
    function: Handle,
    shape: Shape,
    stream: Handle,
    params: *const *const c_void,
) -> Outcome {
    require_context()?;
    let kernel = driver().functions.get(function)?;
    let shape = with_required_cluster(&kernel, shape);
    check(&kernel, &shape)?;
    // SAFETY: the caller's promise.
    let params = unsafe { gather(kernel.function(), params)? };
    submit(
        stream,
        Work::Launch(Arc::new(Prepared {
            kernel,
            shape,
            params,
        })),
    )
}

/// # Safety
/// `params` is null or holds a valid pointer per parameter of the kernel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: Handle,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    dynamic_shared: c_uint,
    stream: Handle,
    params: *const *const c_void,
    extra: *const *const c_void,
) -> CuResult {
    call(|| {
        if !extra.is_null() {
            return Err(NOT_SUPPORTED.into());
        }
        let shape = Shape {
            grid: [grid_x, grid_y, grid_z],
            block: [block_x, block_y, block_z],
            cluster: [1; 3],
            dynamic_shared,
            cooperative: false,
        };
        // SAFETY: the caller's promise.
        unsafe { launch(function, shape, stream, params) }
    })
}

/// # Safety
/// As for [`cuLaunchKernel`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchCooperativeKernel(
    function: Handle,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    dynamic_shared: c_uint,
    stream: Handle,
    params: *const *const c_void,
) -> CuResult {
    call(|| {
        let shape = Shape {
            grid: [grid_x, grid_y, grid_z],
            block: [block_x, block_y, block_z],
            cluster: [1; 3],
            dynamic_shared,
            cooperative: true,
        };
        // SAFETY: the caller's promise.
        unsafe { launch(function, shape, stream, params) }
    })
}

/// One entry of `CUlaunchConfig`'s attributes.
#[repr(C)]
pub struct LaunchAttribute {
    id: i32,
    padding: [u8; 4],
    value: [u32; 16],
}

/// `CUlaunchConfig`.
#[repr(C)]
pub struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    dynamic_shared: c_uint,
    stream: Handle,
    attributes: *const LaunchAttribute,
    attribute_count: c_uint,
}

/// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION` and `_COOPERATIVE`.
const CLUSTER_DIMENSION: i32 = 4;
const COOPERATIVE: i32 = 2;

/// Dimensions and stream of a launch configuration; None if it is null.
///
/// # Safety
/// `config` is null or valid with its attributes.
pub unsafe fn shape_of(config: *const LaunchConfig) -> Option<(Shape, Handle)> {
    // SAFETY: the caller's promise.
    let config = unsafe { config.as_ref() }?;
    let (mut cluster, mut cooperative) = ([1; 3], false);
    for i in 0..config.attribute_count as usize {
        // SAFETY: the configuration says how many attributes there are.
        let attribute = unsafe { &*config.attributes.add(i) };
        match attribute.id {
            CLUSTER_DIMENSION => {
                cluster =
                    [attribute.value[0], attribute.value[1], attribute.value[2]].map(|c| c.max(1))
            }
            COOPERATIVE => cooperative = attribute.value[0] != 0,
            _ => {}
        }
    }
    let shape = Shape {
        grid: config.grid,
        block: config.block,
        cluster,
        dynamic_shared: config.dynamic_shared,
        cooperative,
    };
    Some((shape, config.stream))
}

/// # Safety
/// `config` is null or valid with its attributes; `params` as for [`cuLaunchKernel`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernelEx(
    config: *const LaunchConfig,
    function: Handle,
    params: *const *const c_void,
    extra: *const *const c_void,
) -> CuResult {
    call(|| {
        if !extra.is_null() {
            return Err(NOT_SUPPORTED.into());
        }
        // SAFETY: the caller's promise.
        let Some((shape, stream)) = (unsafe { shape_of(config) }) else {
            return Err(INVALID_VALUE.into());
        };
        // SAFETY: the caller's promise.
        unsafe { launch(function, shape, stream, params) }
    })
}
