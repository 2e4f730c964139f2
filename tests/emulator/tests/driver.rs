//! The driver API: limits and error codes, module images, events, graphs, schedules.

mod common;

use common::{compile, compiled, config, context, emu, emulated, function, module, nvcc_compile};
use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaFunction, DriverError, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use std::sync::Arc;

/// PTX of kernels that do nothing but have limits.
const EMPTY: &str = ".version 8.0
.target sm_80
.address_size 64
.visible .entry empty() { ret; }
.visible .entry bounded() .maxntid 64, 1, 1 { ret; }
.visible .entry shared() { .shared .align 4 .b8 tile[1024]; ret; }
";

fn launch(kernel: &CudaFunction, config: LaunchConfig) -> Result<(), DriverError> {
    let stream = context().default_stream();
    // SAFETY: the kernels take no arguments.
    unsafe { stream.launch_builder(kernel).launch(config) }.map(|_| ())
}

#[track_caller]
fn fails<T>(result: Result<T, DriverError>, code: CUresult) {
    match result {
        Ok(_) => panic!("succeeded, expected {code:?}"),
        Err(error) => assert_eq!(error.0, code),
    }
}

#[test]
fn illegal_launches_fail_with_the_drivers_codes() {
    let module = module(&context(), EMPTY);
    let (empty, bounded, shared) = (
        function(&module, "empty"),
        function(&module, "bounded"),
        function(&module, "shared"),
    );
    launch(&empty, config(1, 1024)).unwrap();
    fails(
        launch(&empty, config(1, 1025)),
        CUresult::CUDA_ERROR_INVALID_VALUE,
    );
    fails(
        launch(&empty, config(0, 32)),
        CUresult::CUDA_ERROR_INVALID_VALUE,
    );
    fails(
        launch(&empty, config(1, 0)),
        CUresult::CUDA_ERROR_INVALID_VALUE,
    );
    let tall = LaunchConfig {
        grid_dim: (1, 65536, 1),
        ..config(1, 32)
    };
    fails(launch(&empty, tall), CUresult::CUDA_ERROR_INVALID_VALUE);
    let deep = LaunchConfig {
        block_dim: (1, 1, 65),
        ..config(1, 1)
    };
    fails(launch(&empty, deep), CUresult::CUDA_ERROR_INVALID_VALUE);
    if emulated() {
        fails(
            launch(&bounded, config(1, 96)),
            CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
        );
    }
    let with = |bytes: u32| LaunchConfig {
        shared_mem_bytes: bytes,
        ..config(1, 32)
    };
    launch(&shared, with(47 << 10)).unwrap();
    fails(
        launch(&shared, with((47 << 10) + 1)),
        CUresult::CUDA_ERROR_INVALID_VALUE,
    );
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    shared.set_attribute(attribute, 64 << 10).unwrap();
    launch(&shared, with(64 << 10)).unwrap();
    fails(
        shared.set_attribute(attribute, 1 << 20),
        CUresult::CUDA_ERROR_INVALID_VALUE,
    );
}

#[test]
fn null_function_is_an_invalid_handle() {
    let _context = context();
    if !emulated() {
        return;
    }
    let null = std::ptr::null_mut();
    // SAFETY: the call fails before anything is read.
    let code = unsafe {
        sys::cuLaunchKernel(
            null,
            1,
            1,
            1,
            1,
            1,
            1,
            0,
            null.cast(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
    assert_eq!(code, CUresult::CUDA_ERROR_INVALID_HANDLE);
}

#[test]
fn unknown_opcode_is_a_load_error_that_names_opcode_kernel_and_line() {
    if !emulated() {
        return;
    }
    for (instruction, opcode) in [
        ("frobnicate.sync.b32 %r, %r;", "frobnicate.sync.b32"),
        ("add.wrong.s32 %r, %r, %r;", "add.wrong.s32"),
        (
            "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%r}, {%r}, {%r}, {%r};",
            "mma.sync.aligned.m16n8k64",
        ),
        ("ld.global.strange.b32 %r, [0];", "ld.global.strange.b32"),
    ] {
        let ptx = format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry broken() {{\n.reg .b32 %r;\n{instruction}\nret;\n}}\n"
        );
        fails(
            context().load_module(Ptx::from_src(ptx)),
            CUresult::CUDA_ERROR_INVALID_PTX,
        );
        let text = emu().last_finding();
        assert!(
            text.contains(opcode) && text.contains("function broken") && text.contains("line 6"),
            "{text}"
        );
    }
}

#[test]
fn malformed_ptx_is_refused_without_a_crash() {
    if !emulated() {
        return;
    }
    let whole = compile("basics", "compute_80");
    let mut cases: Vec<String> = (0..whole.len())
        .step_by(211)
        .map(|end| whole[..end].to_string())
        .collect();
    cases.push("not PTX at all".into());
    cases.push(
        ".version 8.0 .target sm_80 .visible .entry k() { .reg .b32 %r<4000000000>; }".into(),
    );
    cases.push(".version 8.0 .target sm_80 .visible .entry k() { .shared .b8 s[4294967295]; .shared .b8 t[4294967295]; ret; }".into());
    cases.push(format!(
        ".version 8.0 .target sm_80 .visible .entry k() {{ add.u32 {}",
        "{".repeat(100_000)
    ));
    for text in cases {
        // Some prefixes are complete modules; none may crash.
        let _ = context().load_module(Ptx::from_src(text));
    }
}

#[test]
fn there_is_no_peer_to_copy_to() {
    let context = context();
    if !emulated() {
        return;
    }
    let (mut able, mut other) = (1, std::ptr::null_mut());
    let stream = context.default_stream();
    let memory = stream.alloc_zeros::<u8>(16).unwrap();
    let at = cudarc::driver::DevicePtr::device_ptr(&memory, &stream).0;
    // SAFETY: the pointers are valid; the other context is destroyed at the end.
    unsafe {
        assert_eq!(
            sys::cuDeviceCanAccessPeer(&mut able, 0, 1),
            CUresult::CUDA_ERROR_INVALID_DEVICE
        );
        assert_eq!(
            sys::cuDeviceCanAccessPeer(&mut able, 0, 0),
            CUresult::CUDA_SUCCESS
        );
        assert_eq!(able, 0);
        let mine = context.cu_ctx();
        let code = sys::cuCtxCreate_v4(&mut other, std::ptr::null_mut(), 0, 0);
        assert_eq!(code, CUresult::CUDA_SUCCESS);
        assert_eq!(
            sys::cuCtxEnablePeerAccess(mine, 0),
            CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED
        );
        let null = std::ptr::null_mut();
        assert_eq!(
            sys::cuMemcpyPeerAsync(at, mine, at + 8, other, 8, null),
            CUresult::CUDA_ERROR_PEER_ACCESS_NOT_ENABLED
        );
        assert_eq!(sys::cuCtxDestroy_v2(other), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuCtxSetCurrent(mine), CUresult::CUDA_SUCCESS);
    }
    assert_eq!(
        cudarc::driver::CudaContext::new(1).unwrap_err().0,
        CUresult::CUDA_ERROR_INVALID_DEVICE
    );
}

#[test]
fn occupancy_follows_threads_and_shared_memory() {
    if !emulated() {
        return;
    }
    let module = module(&context(), EMPTY);
    let (empty, shared) = (function(&module, "empty"), function(&module, "shared"));
    let blocks = |kernel: &CudaFunction, threads: u32, bytes: usize| {
        kernel
            .occupancy_max_active_blocks_per_multiprocessor(threads, bytes, None)
            .unwrap()
    };
    // An A100's SM takes 2048 threads in at most 32 blocks and has 164 KiB, of which each block
    // costs 1 KiB more than it asks for.
    assert_eq!(blocks(&empty, 256, 0), 8);
    assert_eq!(blocks(&empty, 32, 0), 32);
    assert_eq!(blocks(&shared, 32, 39 << 10), 4);
    let available = |blocks| {
        empty
            .occupancy_available_dynamic_smem_per_block(blocks, 256)
            .unwrap()
    };
    assert_eq!((available(1), available(2)), (163 << 10, 81 << 10));
    extern "C" fn none(_threads: i32) -> usize {
        0
    }
    let best = empty.occupancy_max_potential_block_size(none, 0, 0, None);
    assert_eq!(best.unwrap(), (2 * 108, 1024));
}

#[test]
fn functions_of_absent_features_say_so() {
    let _context = context();
    if !emulated() {
        return;
    }
    // SAFETY: the calls fail before anything is read.
    unsafe {
        assert_eq!(
            sys::cuMemPoolCreate(std::ptr::null_mut(), std::ptr::null()),
            CUresult::CUDA_ERROR_NOT_SUPPORTED
        );
        assert_eq!(
            sys::cuImportExternalMemory(std::ptr::null_mut(), std::ptr::null()),
            CUresult::CUDA_ERROR_NOT_SUPPORTED
        );
        let mut managed = 0;
        assert_eq!(
            sys::cuMemAllocManaged(&mut managed, 64, 1),
            CUresult::CUDA_ERROR_NOT_SUPPORTED
        );
    }
}

#[test]
fn missing_kernel_is_not_found() {
    let module = module(&context(), EMPTY);
    fails(
        module.load_function("absent"),
        CUresult::CUDA_ERROR_NOT_FOUND,
    );
}

#[test]
fn fat_binaries_load_in_every_compression_mode_of_nvcc() {
    let context = context();
    for mode in [
        "--no-compress",
        "--compress-mode=default",
        "--compress-mode=size",
        "--compress-mode=speed",
        "--compress-mode=balance",
        "--compress-mode=none",
    ] {
        let arguments = [
            "-gencode",
            "arch=compute_80,code=compute_80",
            "-gencode",
            "arch=compute_80,code=sm_80",
            mode,
        ];
        let image = nvcc_compile("basics", "fatbin", &arguments);
        let module = context
            .load_module(Ptx::from_binary(image))
            .unwrap_or_else(|e| panic!("{mode}: {e:?} {}", emu().last_finding()));
        module.load_function("vector_add").unwrap();
    }
}

#[test]
fn cubins_are_refused_as_by_a_gpu_of_another_architecture() {
    if !emulated() {
        return;
    }
    let cubin = nvcc_compile("basics", "cubin", &["-arch=sm_80"]);
    fails(
        context().load_module(Ptx::from_binary(cubin)),
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU,
    );
    let fatbin = nvcc_compile(
        "basics",
        "fatbin",
        &["-gencode", "arch=compute_80,code=sm_80"],
    );
    fails(
        context().load_module(Ptx::from_binary(fatbin)),
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU,
    );
}

#[test]
fn truncated_fat_binary_is_refused() {
    if !emulated() {
        return;
    }
    let arguments = ["-gencode", "arch=compute_80,code=compute_80"];
    let image = nvcc_compile("basics", "fatbin", &arguments);
    let path = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("truncated.fatbin");
    std::fs::write(&path, &image[..image.len() / 2]).unwrap();
    fails(
        context().load_module(Ptx::from_file(&path)),
        CUresult::CUDA_ERROR_INVALID_IMAGE,
    );
    std::fs::write(&path, &image).unwrap();
    context().load_module(Ptx::from_file(&path)).unwrap();
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn event_times_do_not_run_backwards() {
    let stream = context().default_stream();
    let start = stream
        .record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))
        .unwrap();
    let mut last = 0.0;
    for _ in 0..50 {
        let end = stream
            .record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))
            .unwrap();
        let elapsed = start.elapsed_ms(&end).unwrap();
        assert!(elapsed >= last, "{elapsed} after {last}");
        last = elapsed;
    }
}

#[test]
fn captured_work_runs_when_the_graph_is_launched() {
    let context = context();
    // SAFETY: all work is ordered by the one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let kernel = function(&compiled(&context, "basics"), "vector_add");
    let a = stream.clone_htod(&[1f32; 32]).unwrap();
    let mut sum = stream.alloc_zeros::<f32>(32).unwrap();
    let n = 32;
    stream
        .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .unwrap();
    for _ in 0..2 {
        let read = cudarc::driver::DevicePtr::device_ptr(&sum, &stream).0;
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(&a).arg(&read).arg(&mut sum).arg(&n);
        // SAFETY: the arguments match the kernel's parameters; each thread reads what it writes.
        unsafe { launch.launch(config(1, 32)) }.unwrap();
    }
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().expect("a graph");
    assert_eq!(stream.clone_dtoh(&sum).unwrap(), [0f32; 32]);
    graph.launch().unwrap();
    graph.launch().unwrap();
    assert_eq!(stream.clone_dtoh(&sum).unwrap(), [4f32; 32]);
}

#[test]
fn memory_is_accounted_and_runs_out() {
    let context = context();
    let stream = context.default_stream();
    if !emulated() {
        return;
    }
    let total = context.total_mem().unwrap();
    assert_eq!(total, 80 << 30);
    // SAFETY: the memory is never read.
    fails(
        unsafe { stream.alloc::<u8>(total + 1) },
        CUresult::CUDA_ERROR_OUT_OF_MEMORY,
    );
    let outside: u64 = 0x1234;
    let mut host = [0u8; 4];
    // SAFETY: the destination has room; the source is invalid on purpose.
    fails(
        unsafe { cudarc::driver::result::memcpy_dtoh_sync(&mut host, outside) },
        CUresult::CUDA_ERROR_INVALID_VALUE,
    );
}

#[test]
fn device_limits_follow_the_model() {
    const CHILD: &str = "CUDA_EMULATOR_TEST_DEVICE";
    if !emulated() {
        return;
    }
    if let Ok(expected) = std::env::var(CHILD) {
        let context = context();
        let get = |a| context.attribute(a).unwrap();
        use sys::CUdevice_attribute as A;
        let found = format!(
            "{:?} {} {}",
            context.compute_capability().unwrap(),
            get(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        );
        assert_eq!(found, expected);
        return;
    }
    for (device, expected) in [
        ("a100", "(8, 0) 108 166912"),
        ("h100", "(9, 0) 132 232448"),
        ("l40s", "(8, 9) 142 101376"),
    ] {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "device_limits_follow_the_model"])
            .env("CUDA_EMU_DEVICE", device)
            .env(CHILD, expected)
            .status();
        assert!(status.unwrap().success(), "{device}");
    }
}

#[test]
fn results_do_not_depend_on_the_warp_schedule() {
    if !emulated() {
        return;
    }
    for seed in ["1", "2", "3"] {
        let mut tests = std::process::Command::new(std::env::current_exe().unwrap());
        let folder = std::env::current_exe()
            .unwrap()
            .parent()
            .unwrap()
            .to_path_buf();
        let status = tests
            .args(["--exact", "random_schedules_compute_the_same"])
            .env("CUDA_EMU_SCHEDULE", seed)
            .current_dir(folder)
            .status();
        assert!(status.unwrap().success(), "seed {seed}");
    }
}

#[test]
fn random_schedules_compute_the_same() {
    let context = context();
    let stream = context.default_stream();
    let kernel = function(&compiled(&context, "topk"), "topk");
    let x: Vec<f32> = common::noise(5, 3000);
    let dx = stream.clone_htod(&x).unwrap();
    let mut values = stream.alloc_zeros::<f32>(20).unwrap();
    let mut indices = stream.alloc_zeros::<i32>(20).unwrap();
    let (n, k) = (3000, 20);
    let mut launch = stream.launch_builder(&kernel);
    launch
        .arg(&dx)
        .arg(&mut values)
        .arg(&mut indices)
        .arg(&n)
        .arg(&k);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(1, 512)) }.unwrap();
    let mut got = stream.clone_dtoh(&values).unwrap();
    got.sort_by(|a, b| b.total_cmp(a));
    let mut sorted = x;
    sorted.sort_by(|a, b| b.total_cmp(a));
    assert_eq!(got, sorted[..20]);
}

#[test]
fn wrong_arguments_are_refused() {
    let context = context();
    let stream = context.default_stream();
    let event = Arc::new(context.new_event(None).unwrap());
    stream.record_event(None).unwrap();
    // Never recorded: there is no time between.
    assert!(event.elapsed_ms(&event).is_err());
}
