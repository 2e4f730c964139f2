//! Planted faults, each caught with its place; and their repaired twins, which are not.

mod common;

use std::sync::Arc;

use common::{compiled, config, context, emulated, finding, function};
use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaModule, CudaStream, LaunchConfig, PushKernelArg};

struct Bench {
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
}

/// The faults' kernels, on the emulator alone: a GPU would not notice, or lose its context.
fn bench() -> Option<Bench> {
    if !emulated() {
        return None;
    }
    let context = context();
    Some(Bench {
        stream: context.default_stream(),
        module: compiled(&context, "faults"),
    })
}

/// Launches a kernel with arguments, giving the result.
macro_rules! launch {
    ($bench:expr, $name:literal, $config:expr $(, $argument:expr)*) => {{
        let kernel = function(&$bench.module, $name);
        let mut builder = $bench.stream.launch_builder(&kernel);
        $(builder.arg($argument);)*
        // SAFETY: the arguments match the kernel's parameters.
        unsafe { builder.launch($config) }.map(|_| ())
    }};
}

const SOURCE: (&str, &str) = ("faults.cu", include_str!("kernels/faults.cu"));

fn assert_place(text: &str, kernel: &str, tag: &str) {
    common::assert_place(text, SOURCE, kernel, tag);
}

#[test]
fn off_by_one_store_is_caught() {
    let Some(b) = bench() else { return };
    let mut x = b.stream.alloc_zeros::<f32>(100).unwrap();
    let n = 100;
    let text = finding(
        launch!(b, "off_by_one_store", config(2, 64), &mut x, &n),
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
    );
    assert_place(&text, "off_by_one_store", "off_by_one_store");
    assert!(
        text.contains("block (1, 0, 0), thread (36, 0, 0)"),
        "{text}"
    );
    assert!(
        text.contains("0 bytes past the end of the 400-byte allocation"),
        "{text}"
    );
}

#[test]
fn missing_syncthreads_is_caught() {
    let Some(b) = bench() else { return };
    let mut x = b.stream.clone_htod(&[7i32; 128]).unwrap();
    let text = finding(
        launch!(b, "missing_syncthreads", config(1, 128), &mut x),
        CUresult::CUDA_ERROR_LAUNCH_FAILED,
    );
    assert!(text.starts_with("shared-memory race"), "{text}");
    assert_place(&text, "missing_syncthreads", "missing_syncthreads");
    launch!(b, "with_syncthreads", config(1, 128), &mut x).unwrap();
}

#[test]
fn missing_wait_group_is_caught() {
    let Some(b) = bench() else { return };
    let x = b.stream.clone_htod(&[1f32; 256]).unwrap();
    let mut y = b.stream.alloc_zeros::<f32>(256).unwrap();
    let text = finding(
        launch!(b, "missing_wait_group", config(1, 64), &x, &mut y),
        CUresult::CUDA_ERROR_LAUNCH_FAILED,
    );
    assert!(
        text.starts_with("asynchronous copy not waited for"),
        "{text}"
    );
    assert_place(&text, "missing_wait_group", "missing_wait_group");
    launch!(b, "with_wait_group", config(1, 64), &x, &mut y).unwrap();
    assert_eq!(b.stream.clone_dtoh(&y).unwrap(), [1f32; 256]);
}

#[test]
fn waiting_for_the_wrong_group_is_caught() {
    let Some(b) = bench() else { return };
    let x = b.stream.clone_htod(&[1f32; 256]).unwrap();
    let mut y = b.stream.alloc_zeros::<f32>(256).unwrap();
    let result = launch!(b, "wait_for_the_wrong_group", config(1, 64), &x, &mut y);
    let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert_place(&text, "wait_for_the_wrong_group", "wrong_group");
}

#[test]
fn uninitialized_global_read_is_caught() {
    let Some(b) = bench() else { return };
    // SAFETY: the memory is left undefined on purpose.
    let x = unsafe { b.stream.alloc::<f32>(32) }.unwrap();
    let mut y = b.stream.alloc_zeros::<f32>(32).unwrap();
    let result = launch!(b, "uninitialized_global_read", config(1, 32), &x, &mut y);
    let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert!(text.starts_with("uninitialized read"), "{text}");
    assert_place(&text, "uninitialized_global_read", "uninitialized_global");
}

#[test]
fn uninitialized_shared_read_is_caught() {
    let Some(b) = bench() else { return };
    let mut y = b.stream.alloc_zeros::<f32>(32).unwrap();
    let result = launch!(b, "uninitialized_shared_read", config(1, 32), &mut y);
    let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert!(
        text.starts_with("uninitialized read") && text.contains("thread (31, 0, 0)"),
        "{text}"
    );
    assert_place(&text, "uninitialized_shared_read", "uninitialized_shared");
}

#[test]
fn misaligned_float4_is_caught() {
    let Some(b) = bench() else { return };
    let mut x = b.stream.alloc_zeros::<f32>(256).unwrap();
    let result = launch!(b, "misaligned_float4", config(1, 32), &mut x);
    let text = finding(result, CUresult::CUDA_ERROR_MISALIGNED_ADDRESS);
    assert_place(&text, "misaligned_float4", "misaligned");
}

#[test]
fn use_after_free_is_caught() {
    let Some(b) = bench() else { return };
    let x = b.stream.alloc_zeros::<f32>(64).unwrap();
    let mut y = b.stream.alloc_zeros::<f32>(64).unwrap();
    let address = cudarc::driver::DevicePtr::device_ptr(&x, &b.stream).0;
    drop(x);
    let result = launch!(b, "read_after_free", config(1, 32), &address, &mut y);
    let text = finding(result, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert!(text.starts_with("use after free"), "{text}");
    assert_place(&text, "read_after_free", "freed");
}

#[test]
fn blocks_that_write_one_word_are_caught() {
    let Some(b) = bench() else { return };
    let mut x = b.stream.alloc_zeros::<i32>(32).unwrap();
    let result = launch!(b, "blocks_write_one_word", config(2, 32), &mut x);
    let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert!(text.starts_with("global-memory race"), "{text}");
    assert_place(&text, "blocks_write_one_word", "block_race");
}

#[test]
fn block_that_reads_what_another_writes_is_caught() {
    let Some(b) = bench() else { return };
    let mut x = b.stream.alloc_zeros::<i32>(32).unwrap();
    let mut y = b.stream.alloc_zeros::<i32>(32).unwrap();
    let result = launch!(
        b,
        "block_reads_what_another_writes",
        config(2, 32),
        &mut x,
        &mut y
    );
    let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert!(text.starts_with("global-memory race"), "{text}");
    // Whichever block comes second is at fault.
    let tag = match text.contains("global read") {
        true => "reads_written",
        false => "writes_read",
    };
    assert_place(&text, "block_reads_what_another_writes", tag);
}

/// Runs a kernel in which each block publishes a word by a fence and a ticket, and the last one
/// adds them up; `order` says where the ticket is taken.
fn last_block_sums(b: &Bench, kernel: &str) -> Result<i32, cudarc::driver::DriverError> {
    let mut parts = b.stream.alloc_zeros::<i32>(8).unwrap();
    let mut ticket = b.stream.alloc_zeros::<i32>(1).unwrap();
    let mut sum = b.stream.alloc_zeros::<i32>(1).unwrap();
    let kernel = function(&b.module, kernel);
    let mut launch = b.stream.launch_builder(&kernel);
    launch.arg(&mut parts).arg(&mut ticket).arg(&mut sum);
    // SAFETY: the arguments match the kernels' parameters.
    unsafe { launch.launch(config(8, 32)) }?;
    Ok(b.stream.clone_dtoh(&sum)?[0])
}

#[test]
fn last_block_that_sums_what_the_others_published_raises_no_alarm() {
    let Some(b) = bench() else { return };
    let sum = last_block_sums(&b, "fence_then_ticket");
    assert_eq!(
        sum.unwrap_or_else(|e| panic!("{e:?}: {}", common::emu().last_finding())),
        36
    );
}

#[test]
fn ticket_taken_before_the_fence_is_caught() {
    let Some(b) = bench() else { return };
    let text = finding(
        last_block_sums(&b, "ticket_then_fence"),
        CUresult::CUDA_ERROR_LAUNCH_FAILED,
    );
    assert!(text.starts_with("global-memory race"), "{text}");
    assert_place(&text, "ticket_then_fence", "early_ticket");
}

#[test]
fn blocks_that_own_neighbouring_bytes_raise_no_alarm() {
    let Some(b) = bench() else { return };
    let mut x = b.stream.alloc_zeros::<u8>(500).unwrap();
    launch!(
        b,
        "blocks_write_neighbouring_bytes",
        config(100, 32),
        &mut x
    )
    .unwrap();
    let bytes = b.stream.clone_dtoh(&x).unwrap();
    assert!(
        bytes
            .iter()
            .enumerate()
            .all(|(i, &v)| usize::from(v) == i / 5)
    );
}

#[test]
fn barrier_that_some_warps_skip_is_caught() {
    let Some(b) = bench() else { return };
    let mut x = b.stream.alloc_zeros::<i32>(128).unwrap();
    let result = launch!(b, "barrier_half_the_warps_reach", config(1, 128), &mut x);
    let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert!(
        text.starts_with("barrier error") && text.contains("64 threads have exited"),
        "{text}"
    );
    assert_place(&text, "barrier_half_the_warps_reach", "barrier");
}

#[test]
fn barrier_in_a_diverged_warp_is_caught() {
    let Some(b) = bench() else { return };
    let mut x = b.stream.alloc_zeros::<i32>(32).unwrap();
    let result = launch!(b, "barrier_in_a_diverged_warp", config(1, 32), &mut x);
    let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert!(text.starts_with("barrier error"), "{text}");
    assert_place(&text, "barrier_in_a_diverged_warp", "diverged_barrier");
}

#[test]
fn shared_access_beyond_the_blocks_memory_is_caught() {
    let Some(b) = bench() else { return };
    let mut x = b.stream.alloc_zeros::<i32>(32).unwrap();
    let config = LaunchConfig {
        shared_mem_bytes: 128,
        ..config(1, 32)
    };
    let fits = 0;
    launch!(b, "shared_out_of_bounds", config, &mut x, &fits).unwrap();
    let beyond = 1;
    let result = launch!(b, "shared_out_of_bounds", config, &mut x, &beyond);
    let text = finding(result, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_place(&text, "shared_out_of_bounds", "shared_bounds");
    assert!(text.contains("thread (31, 0, 0)"), "{text}");
}

#[test]
fn shuffle_that_a_named_lane_does_not_reach_is_caught() {
    let Some(b) = bench() else { return };
    let mut x = b.stream.alloc_zeros::<i32>(32).unwrap();
    let result = launch!(b, "shuffle_without_a_named_lane", config(1, 32), &mut x);
    let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert!(text.starts_with("warp synchronisation error"), "{text}");
    assert_place(&text, "shuffle_without_a_named_lane", "absent_lane");
}

#[test]
fn failing_assertion_is_reported_with_its_text() {
    let Some(b) = bench() else { return };
    let n = 7;
    let result = launch!(b, "failing_assertion", config(1, 32), &n);
    let text = finding(result, CUresult::CUDA_ERROR_ASSERT);
    assert!(text.contains("`n < 5`"), "{text}");
    assert_place(&text, "failing_assertion", "assertion");
}

#[test]
fn trap_is_reported() {
    let Some(b) = bench() else { return };
    let result = launch!(b, "trapping", config(1, 32));
    let text = finding(result, CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION);
    assert_place(&text, "trapping", "trap");
}

#[test]
fn lanes_that_store_different_values_to_one_place_are_caught() {
    let Some(b) = bench() else { return };
    let mut x = b.stream.alloc_zeros::<i32>(32).unwrap();
    let result = launch!(b, "lanes_store_different_values", config(1, 32), &mut x);
    let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert_place(&text, "lanes_store_different_values", "lane_collision");
}

#[test]
fn arrival_that_an_mbarrier_waits_for_in_vain_is_caught() {
    let Some(b) = bench() else { return };
    let values: Vec<f32> = (0..64).map(|i| i as f32).collect();
    let x = b.stream.clone_htod(&values).unwrap();
    let mut y = b.stream.alloc_zeros::<f32>(64).unwrap();
    launch!(b, "with_all_arrivals", config(1, 64), &x, &mut y).unwrap();
    let reversed: Vec<f32> = values.iter().rev().copied().collect();
    assert_eq!(b.stream.clone_dtoh(&y).unwrap(), reversed);
    let result = launch!(b, "missing_arrival", config(1, 64), &x, &mut y);
    let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_TIMEOUT);
    assert_place(&text, "missing_arrival", "missing_arrival");
}

#[test]
fn memory_live_at_exit_is_reported_when_asked_for() {
    if !emulated() {
        return;
    }
    const CHILD: &str = "CUDA_EMULATOR_TEST_LEAK";
    if std::env::var_os(CHILD).is_some() {
        let leaked = context()
            .default_stream()
            .alloc_zeros::<u8>(123_457)
            .unwrap();
        std::mem::forget(leaked);
        return;
    }
    let errors = |asked: &str| {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "memory_live_at_exit_is_reported_when_asked_for"])
            .env(CHILD, "1")
            .env("CUDA_EMU_LEAKS", asked)
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let text = errors("1");
    assert!(
        text.contains("1 allocations of 123457 bytes are still live at exit"),
        "{text}"
    );
    assert!(!errors("0").contains("live at exit"));
}

#[test]
fn endless_kernel_ends_with_a_timeout() {
    const CHILD: &str = "CUDA_EMU_STEP_LIMIT";
    if !emulated() {
        return;
    }
    if std::env::var_os(CHILD).is_some() {
        let Some(b) = bench() else { return };
        let x = b.stream.alloc_zeros::<i32>(1).unwrap();
        let text = finding(
            launch!(b, "endless", config(1, 32), &x),
            CUresult::CUDA_ERROR_LAUNCH_TIMEOUT,
        );
        assert_place(&text, "endless", "endless");
        return;
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "endless_kernel_ends_with_a_timeout"])
        .env(CHILD, "1000000")
        .status();
    assert!(status.unwrap().success());
}
