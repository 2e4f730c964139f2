//! Counters of kernels whose traffic and work are known by hand.

mod common;

use common::{compiled, config, context, counters, emulated, function};
use cuda_emulator::Counters;
use cuda_emulator::ptx::ops::Class;
use cudarc::driver::PushKernelArg;

/// Counters of a kernel with one output of `outputs` zeroed floats and, if `inputs` is not
/// zero, an input before it. None on a GPU.
fn count(name: &str, grid: u32, block: u32, inputs: usize, outputs: usize) -> Option<Counters> {
    if !emulated() {
        return None;
    }
    let context = context();
    let stream = context.default_stream();
    let kernel = function(&compiled(&context, "counted"), name);
    let x = stream.alloc_zeros::<f32>(inputs.max(1)).unwrap();
    let mut y = stream.alloc_zeros::<f32>(outputs).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    if inputs > 0 {
        launch.arg(&x);
    }
    launch.arg(&mut y);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(grid, block)) }.unwrap();
    Some(counters())
}

#[test]
fn coalesced_copy_takes_four_sectors_a_request() {
    let Some(c) = count("copy_coalesced", 4, 128, 512, 512) else {
        return;
    };
    assert_eq!((c.launches, c.blocks), (1, 4));
    assert_eq!(
        (
            c.global_load_requests,
            c.global_load_bytes,
            c.global_load_sectors
        ),
        (16, 2048, 64)
    );
    assert_eq!(
        (
            c.global_store_requests,
            c.global_store_bytes,
            c.global_store_sectors
        ),
        (16, 2048, 64)
    );
    assert_eq!(c.sectors_per_load(), 4.0);
    assert_eq!(
        (c.class(Class::LoadGlobal), c.class(Class::StoreGlobal)),
        (16, 16)
    );
}

#[test]
fn loads_32_bytes_apart_take_a_sector_each() {
    let Some(c) = count("copy_strided", 1, 64, 512, 64) else {
        return;
    };
    assert_eq!(
        (
            c.global_load_requests,
            c.global_load_bytes,
            c.global_load_sectors
        ),
        (2, 256, 64)
    );
}

#[test]
fn float4_copy_takes_sixteen_sectors_a_request() {
    let Some(c) = count("copy_float4", 1, 32, 128, 128) else {
        return;
    };
    assert_eq!(
        (
            c.global_load_requests,
            c.global_load_bytes,
            c.global_load_sectors
        ),
        (1, 512, 16)
    );
}

#[test]
fn shared_strides_conflict_by_their_common_divisor_with_32() {
    // Writes are free of conflicts: `stride` of them; the one read takes the conflicts.
    for (name, stride, wavefronts) in [
        ("shared_stride_1", 1, 1),
        ("shared_stride_2", 2, 2),
        ("shared_stride_32", 32, 32),
        ("shared_stride_33", 33, 1),
    ] {
        let Some(c) = count(name, 1, 32, 0, 32) else {
            return;
        };
        assert_eq!(c.shared_requests, stride + 1, "{name}");
        assert_eq!(c.shared_wavefronts, stride + wavefronts, "{name}");
        assert_eq!(c.shared_bank_conflicts, wavefronts - 1, "{name}");
    }
}

#[test]
fn sixteen_byte_accesses_go_in_phases_of_eight_lanes() {
    let Some(c) = count("shared_float4", 1, 32, 0, 128) else {
        return;
    };
    assert_eq!(
        (
            c.shared_requests,
            c.shared_wavefronts,
            c.shared_bank_conflicts
        ),
        (2, 8, 0)
    );
    let Some(c) = count("shared_float4_columns", 1, 32, 0, 128) else {
        return;
    };
    // Eight conflict-free writes of 4 phases; the read's 4 phases take 8 passes each.
    assert_eq!(
        (
            c.shared_requests,
            c.shared_wavefronts,
            c.shared_bank_conflicts
        ),
        (9, 32 + 32, 28)
    );
}

#[test]
fn atomics_count_lanes_and_barriers_count_warps() {
    let Some(c) = count("atomics_and_barriers", 2, 64, 0, 128) else {
        return;
    };
    // nvcc may reduce in the warp before the shared atomic; the exchange stays one a lane.
    assert_eq!(c.global_atomics, 128);
    assert!(
        c.shared_atomics == 128 || c.shared_atomics == 4,
        "{}",
        c.shared_atomics
    );
    assert_eq!(c.barriers, 2 * 2 * 2);
}

#[test]
fn fma_counts_two_operations_a_lane() {
    if !emulated() {
        return;
    }
    let context = context();
    let stream = context.default_stream();
    let kernel = function(&compiled(&context, "counted"), "fma_chain");
    let mut x = stream.alloc_zeros::<f32>(96).unwrap();
    let n = 10;
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&mut x).arg(&n);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(1, 96)) }.unwrap();
    assert_eq!(counters().flop, 10 * 2 * 96);
    assert_eq!(counters().class(Class::Float), 3 * 10);
}

#[test]
fn totals_are_json_with_one_line_a_kernel() {
    let Some(_) = count("copy_coalesced", 1, 32, 32, 32) else {
        return;
    };
    let totals = common::emu().totals();
    let line = totals
        .lines()
        .find(|l| l.starts_with("{\"kernel\":\"copy_coalesced\""))
        .expect(&totals);
    assert!(
        line.ends_with('}') && line.contains("\"global_load_sectors\":"),
        "{line}"
    );
}
