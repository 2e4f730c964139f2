//! Clusters: places of blocks, distributed shared memory, barriers across blocks and multicast. Run
//! as the tests of Hopper's instructions are.

mod common;

use std::ffi::c_void;
use std::sync::Arc;

use common::clusters::{gemm, kernel};
use common::hopper::on_hopper;
use common::{compile, config, counters, emulated, function, module};
use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaStream, DevicePtr, PushKernelArg};

/// The driver's own handle of a kernel, for calls that cudarc does not wrap.
fn raw_kernel(name: &str) -> sys::CUfunction {
    let image = std::ffi::CString::new(compile("clusters", "compute_90a")).unwrap();
    let name = std::ffi::CString::new(name).unwrap();
    let mut module = std::ptr::null_mut();
    let mut function = std::ptr::null_mut();
    // SAFETY: the image and the name are strings with a final NUL.
    unsafe {
        let code = sys::cuModuleLoadData(&mut module, image.as_ptr().cast());
        assert_eq!(code, CUresult::CUDA_SUCCESS);
        let code = sys::cuModuleGetFunction(&mut function, module, name.as_ptr());
        assert_eq!(code, CUresult::CUDA_SUCCESS);
    }
    function
}

/// A launch of `grid` blocks in clusters, with no arguments but `params`.
fn with_cluster<T>(
    (grid, block, cluster): ([u32; 3], u32, [u32; 3]),
    run: impl FnOnce(&sys::CUlaunchConfig) -> T,
) -> T {
    // SAFETY: zeros are valid for a launch attribute.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim.x = cluster[0];
    attribute.value.clusterDim.y = cluster[1];
    attribute.value.clusterDim.z = cluster[2];
    // SAFETY: as above.
    let mut config: sys::CUlaunchConfig = unsafe { std::mem::zeroed() };
    [config.gridDimX, config.gridDimY, config.gridDimZ] = grid;
    [config.blockDimX, config.blockDimY, config.blockDimZ] = [block, 1, 1];
    config.attrs = &mut attribute;
    config.numAttrs = 1;
    run(&config)
}

fn launch(
    function: sys::CUfunction,
    shape: ([u32; 3], u32, [u32; 3]),
    params: &mut [*mut c_void],
) -> CUresult {
    with_cluster(shape, |config| {
        // SAFETY: the parameters match the kernel's.
        unsafe {
            sys::cuLaunchKernelEx(config, function, params.as_mut_ptr(), std::ptr::null_mut())
        }
    })
}

#[test]
fn special_registers_tell_where_a_block_is_in_its_cluster() {
    on_hopper(
        "special_registers_tell_where_a_block_is_in_its_cluster",
        |stream| {
            let out = stream.alloc_zeros::<u32>(24 * 32 * 12).unwrap();
            let mut pointer = out.device_ptr(stream).0;
            let code = launch(
                raw_kernel("places"),
                ([6, 4, 1], 32, [3, 2, 1]),
                &mut [(&raw mut pointer).cast()],
            );
            assert_eq!(code, CUresult::CUDA_SUCCESS);
            let out = stream.clone_dtoh(&out).unwrap();
            for block in 0..24u32 {
                let (x, y) = (block % 6, block / 6);
                let rank = x % 3 + 3 * (y % 2);
                let expected = [
                    x % 3,
                    y % 2,
                    3,
                    2,
                    x / 3,
                    y / 2,
                    2,
                    2,
                    rank,
                    6,
                    rank,
                    6 * 32,
                ];
                for thread in 0..32 {
                    let at = (block as usize * 32 + thread) * 12;
                    assert_eq!(out[at..at + 12], expected, "block ({x}, {y})");
                }
            }
        },
    );
}

#[test]
fn blocks_of_a_cluster_read_each_others_shared_memory() {
    on_hopper(
        "blocks_of_a_cluster_read_each_others_shared_memory",
        |stream| {
            let x: Vec<f32> = (0..512).map(|i| i as f32).collect();
            let dx = stream.clone_htod(&x).unwrap();
            let mut sums = stream.alloc_zeros::<f32>(512).unwrap();
            let exchange = kernel(stream, "exchange");
            let mut launch = stream.launch_builder(&exchange);
            launch.arg(&dx).arg(&mut sums);
            // SAFETY: the arguments match the kernel's parameters.
            unsafe { launch.launch(config(8, 64)) }
                .unwrap_or_else(|e| panic!("{e:?}: {}", common::emu().last_finding()));
            let sums = stream.clone_dtoh(&sums).unwrap();
            for (i, &got) in sums.iter().enumerate() {
                let (first, column) = (i / 256 * 4, i % 64);
                let expected: f32 = (0..4)
                    .map(|r| (r + 1) as f32 * x[(first + r) * 64 + column])
                    .sum();
                assert_eq!(got, expected, "{i}");
            }
            if emulated() {
                // Each of 8 blocks' 2 warps reads the rows of 3 other blocks.
                assert_eq!(counters().cluster_requests, 8 * 2 * 3);
                assert_eq!(counters().cluster_bytes, 8 * 2 * 3 * 128);
            }
        },
    );
}

#[test]
fn atomics_reach_the_shared_memory_of_other_blocks() {
    on_hopper(
        "atomics_reach_the_shared_memory_of_other_blocks",
        |stream| {
            let values: Vec<i32> = (0..5000).map(|i| (i * i + 7 * i) % 128).collect();
            let data = stream.clone_htod(&values).unwrap();
            let bins = stream.alloc_zeros::<i32>(128).unwrap();
            let (mut data, mut n, mut out) = (
                data.device_ptr(stream).0,
                values.len() as i32,
                bins.device_ptr(stream).0,
            );
            let mut params = [
                (&raw mut data).cast(),
                (&raw mut n).cast(),
                (&raw mut out).cast(),
            ];
            let code = launch_named("histogram", ([4, 1, 1], 128, [4, 1, 1]), &mut params);
            assert_eq!(code, CUresult::CUDA_SUCCESS);
            let mut expected = vec![0; 128];
            values.iter().for_each(|&v| expected[v as usize] += 1);
            assert_eq!(stream.clone_dtoh(&bins).unwrap(), expected);
        },
    );
}

fn launch_named(
    name: &str,
    shape: ([u32; 3], u32, [u32; 3]),
    params: &mut [*mut c_void],
) -> CUresult {
    launch(raw_kernel(name), shape, params)
}

#[test]
fn cluster_barrier_orders_global_memory_too() {
    on_hopper("cluster_barrier_orders_global_memory_too", |stream| {
        let mut x = stream.alloc_zeros::<i32>(4 * 32).unwrap();
        let mut y = stream.alloc_zeros::<i32>(4 * 32).unwrap();
        let exchange = kernel(stream, "exchange_through_global_memory");
        let mut launch = stream.launch_builder(&exchange);
        launch.arg(&mut x).arg(&mut y);
        // SAFETY: the arguments match the kernel's parameters.
        unsafe { launch.launch(config(4, 32)) }
            .unwrap_or_else(|e| panic!("{e:?}: {}", common::emu().last_finding()));
        let expected: Vec<i32> = (0..128).map(|i| i ^ 32).collect();
        assert_eq!(stream.clone_dtoh(&y).unwrap(), expected);
    });
}

/// Runs a kernel in which each of two clusters of three blocks hands `words` of each block to the
/// next.
fn pass_on(stream: &Arc<CudaStream>, name: &str, words: usize) {
    let x: Vec<i32> = (0..6 * words as i32).collect();
    let dx = stream.clone_htod(&x).unwrap();
    let y = stream.alloc_zeros::<i32>(x.len()).unwrap();
    let (mut from, mut to) = (dx.device_ptr(stream).0, y.device_ptr(stream).0);
    let mut params = [(&raw mut from).cast(), (&raw mut to).cast()];
    let code = launch_named(name, ([6, 1, 1], 64, [3, 1, 1]), &mut params);
    let finding = || common::emu().last_finding();
    assert_eq!(code, CUresult::CUDA_SUCCESS, "{}", finding());
    let y = stream.clone_dtoh(&y).unwrap();
    for block in 0..6 {
        let sender = block / 3 * 3 + (block + 2) % 3;
        let (got, sent) = (&y[block * words..], &x[sender * words..]);
        assert_eq!(got[..words], sent[..words], "{block}");
    }
}

#[test]
fn bulk_copies_between_blocks_report_to_the_receivers_barrier() {
    on_hopper(
        "bulk_copies_between_blocks_report_to_the_receivers_barrier",
        |stream| pass_on(stream, "ring", 64),
    );
}

#[test]
fn asynchronous_stores_report_to_the_receivers_barrier() {
    on_hopper(
        "asynchronous_stores_report_to_the_receivers_barrier",
        |stream| pass_on(stream, "send_pairs", 128),
    );
}

#[test]
fn multicast_gemm_of_two_blocks_agrees_with_a_plain_product() {
    on_hopper(
        "multicast_gemm_of_two_blocks_agrees_with_a_plain_product",
        |stream| {
            gemm(stream, "gemm_multicast")
                .unwrap_or_else(|e| panic!("{e:?}: {}", common::emu().last_finding()));
            if emulated() {
                // Each half tile of A comes from memory once per cluster, each tile of B once per block.
                let (a, b) = (256 * 448 * 2, 256 * 448 * 2);
                assert_eq!(counters().global_load_bytes, a + 2 * b);
                assert_eq!(counters().mma_flop, 2 * 256 * 256 * 448);
            }
        },
    );
}

#[test]
fn illegal_clusters_get_the_drivers_codes() {
    on_hopper("illegal_clusters_get_the_drivers_codes", |stream| {
        let out = stream.alloc_zeros::<u32>(16 * 32 * 12).unwrap();
        let mut pointer = out.device_ptr(stream).0;
        let places = raw_kernel("places");
        let mut run = |grid: u32, cluster: [u32; 3]| {
            let mut params = [(&raw mut pointer).cast()];
            launch(places, ([grid, 1, 1], 32, cluster), &mut params)
        };
        assert_eq!(run(4, [3, 1, 1]), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(
            run(16, [16, 1, 1]),
            CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE
        );
        assert_eq!(
            run(32, [32, 1, 1]),
            CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE
        );
        let allowed =
            sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
        // SAFETY: the handle is valid.
        let code = unsafe { sys::cuFuncSetAttribute(places, allowed, 1) };
        assert_eq!(code, CUresult::CUDA_SUCCESS);
        assert_eq!(run(16, [16, 1, 1]), CUresult::CUDA_SUCCESS);
        assert_eq!(run(8, [8, 1, 1]), CUresult::CUDA_SUCCESS);
        // Compiled for clusters of four: another size is not what the kernel was made for.
        let mut params = [(&raw mut pointer).cast(), (&raw mut pointer).cast()];
        assert_eq!(
            launch(
                raw_kernel("exchange"),
                ([4, 1, 1], 64, [2, 1, 1]),
                &mut params
            ),
            CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE
        );
    });
}

#[test]
fn occupancy_counts_clusters() {
    on_hopper("occupancy_counts_clusters", |_| {
        let places = raw_kernel("places");
        let (mut active, mut largest) = (0, 0);
        with_cluster(([8, 1, 1], 1024, [4, 1, 1]), |config| {
            // SAFETY: the pointers are valid.
            unsafe {
                let code = sys::cuOccupancyMaxActiveClusters(&mut active, places, config);
                assert_eq!(code, CUresult::CUDA_SUCCESS);
                let code = sys::cuOccupancyMaxPotentialClusterSize(&mut largest, places, config);
                assert_eq!(code, CUresult::CUDA_SUCCESS);
            }
        });
        // Two blocks of 1024 threads on each SM; GPUs of this kind have at most 132 SMs.
        assert!((1..=66).contains(&active), "{active}");
        assert_eq!(largest, 8);
    });
}

#[test]
fn clusters_need_a_hopper_device() {
    if emulated() {
        common::context();
        let ptx = compile("clusters", "compute_90a").replace("sm_90a", "sm_80");
        let context = common::context();
        let places = function(&module(&context, &ptx), "exchange");
        let stream = context.default_stream();
        let (x, mut y) = (
            stream.alloc_zeros::<f32>(256).unwrap(),
            stream.alloc_zeros::<f32>(256).unwrap(),
        );
        let mut launch = stream.launch_builder(&places);
        launch.arg(&x).arg(&mut y);
        // SAFETY: the arguments match the kernel's parameters.
        let result = unsafe { launch.launch(config(4, 64)) };
        assert_eq!(
            result.unwrap_err().0,
            CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE
        );
    }
}

#[test]
fn random_schedules_give_equal_bits() {
    if !emulated() {
        return;
    }
    let tests = ["multicast_gemm_of_two_blocks_agrees_with_a_plain_product"];
    let fixed = common::digests_under(None, &tests);
    assert_eq!(fixed.len(), 1, "{fixed:?}");
    for seed in 1..=3 {
        assert_eq!(
            common::digests_under(Some(seed), &tests),
            fixed,
            "seed {seed}"
        );
    }
}
