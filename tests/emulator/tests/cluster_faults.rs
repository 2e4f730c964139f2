//! Faults that clusters make possible, each caught with its place. Run as the tests of Hopper's
//! instructions are.

mod common;

use std::sync::Arc;

use common::clusters::{gemm, kernel};
use common::hopper::on_hopper;
use common::{config, emulated, finding};
use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaStream, PushKernelArg};

#[test]
fn exit_before_other_blocks_have_arrived_is_caught() {
    on_hopper(
        "exit_before_other_blocks_have_arrived_is_caught",
        |stream| {
            if emulated() {
                let text = finding(
                    gemm(stream, "gemm_without_tail"),
                    CUresult::CUDA_ERROR_LAUNCH_FAILED,
                );
                assert!(
                    text.starts_with("shared memory of an exited block"),
                    "{text}"
                );
            }
        },
    );
}

#[test]
fn multicast_into_a_stage_the_other_block_still_reads_is_caught() {
    on_hopper(
        "multicast_into_a_stage_the_other_block_still_reads_is_caught",
        |stream| {
            if emulated() {
                let result = gemm(stream, "gemm_with_own_readers_only");
                let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_FAILED);
                let expected = text.starts_with("shared-memory race")
                    || text.starts_with("asynchronous copy not waited for")
                    || text.starts_with("shared memory of an exited block");
                assert!(expected, "{text}");
            }
        },
    );
}

/// Launches a faulty kernel with one pointer, of two blocks of 32 threads.
fn faulty(stream: &Arc<CudaStream>, name: &str) -> String {
    let mut y = stream.alloc_zeros::<i32>(64).unwrap();
    let kernel = kernel(stream, name);
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&mut y);
    // SAFETY: the kernels have at most this parameter.
    let result = unsafe { launch.launch(config(2, 32)) };
    match result {
        Ok(_) => panic!("{name} ended without a finding"),
        Err(_) => common::emu().last_finding(),
    }
}

const SOURCE: (&str, &str) = ("clusters.cu", include_str!("kernels/clusters.cu"));

fn assert_place(text: &str, kernel: &str, tag: &str) {
    common::assert_place(text, SOURCE, kernel, tag);
}

#[test]
fn missing_cluster_barrier_is_caught() {
    on_hopper("missing_cluster_barrier_is_caught", |stream| {
        if emulated() {
            let text = faulty(stream, "missing_cluster_barrier");
            let expected =
                text.starts_with("shared-memory race") || text.starts_with("uninitialized read");
            assert!(expected, "{text}");
            assert_place(&text, "missing_cluster_barrier", "missing_cluster_barrier");
        }
    });
}

#[test]
fn relaxed_arrival_at_the_cluster_barrier_publishes_nothing() {
    on_hopper(
        "relaxed_arrival_at_the_cluster_barrier_publishes_nothing",
        |stream| {
            if emulated() {
                let text = faulty(stream, "relaxed_arrival");
                assert!(
                    text.contains("block 1 of the cluster wrote there")
                        || text.contains("warp 0 wrote there"),
                    "{text}"
                );
                assert_place(&text, "relaxed_arrival", "relaxed_arrival");
            }
        },
    );
}

#[test]
fn missing_cluster_barrier_before_exit_is_caught() {
    on_hopper("missing_cluster_barrier_before_exit_is_caught", |stream| {
        if emulated() {
            let text = faulty(stream, "missing_barrier_before_exit");
            assert!(
                text.starts_with("shared memory of an exited block"),
                "{text}"
            );
        }
    });
}

#[test]
fn remote_off_by_one_store_is_caught() {
    on_hopper("remote_off_by_one_store_is_caught", |stream| {
        if emulated() {
            let kernel = kernel(stream, "remote_off_by_one");
            let run = |n: i32| {
                let mut launch = stream.launch_builder(&kernel);
                launch.arg(&n);
                // SAFETY: the argument matches the kernel's parameter.
                unsafe { launch.launch(config(2, 32)) }
            };
            run(31).unwrap();
            let text = finding(run(32), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
            assert!(text.contains("at offset 128 of 128 of block 1"), "{text}");
            assert_place(&text, "remote_off_by_one", "remote_off_by_one");
        }
    });
}

#[test]
fn rank_outside_the_cluster_is_caught() {
    on_hopper("rank_outside_the_cluster_is_caught", |stream| {
        if emulated() {
            let text = faulty(stream, "rank_outside_the_cluster");
            assert!(
                text.contains("mapa to block 2 of a cluster of 2 blocks"),
                "{text}"
            );
            assert_place(&text, "rank_outside_the_cluster", "rank_outside");
        }
    });
}

#[test]
fn cluster_barrier_that_one_block_never_reaches_is_caught() {
    on_hopper(
        "cluster_barrier_that_one_block_never_reaches_is_caught",
        |stream| {
            if emulated() {
                let text = faulty(stream, "one_block_arrives");
                assert!(text.contains("the cluster's barrier waits for"), "{text}");
                assert_place(&text, "one_block_arrives", "one_block_arrives");
            }
        },
    );
}

#[test]
fn cluster_barrier_orders_nothing_between_clusters() {
    on_hopper(
        "cluster_barrier_orders_nothing_between_clusters",
        |stream| {
            if emulated() {
                let mut x = stream.alloc_zeros::<i32>(4 * 32).unwrap();
                let mut y = stream.alloc_zeros::<i32>(4 * 32).unwrap();
                let kernel = kernel(stream, "exchange_between_clusters");
                let mut launch = stream.launch_builder(&kernel);
                launch.arg(&mut x).arg(&mut y);
                // SAFETY: the arguments match the kernel's parameters.
                let result = unsafe { launch.launch(config(4, 32)) };
                let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_FAILED);
                assert!(text.starts_with("global-memory race"), "{text}");
            }
        },
    );
}

#[test]
fn waiting_at_the_cluster_barrier_without_arriving_is_caught() {
    on_hopper(
        "waiting_at_the_cluster_barrier_without_arriving_is_caught",
        |stream| {
            if emulated() {
                let text = faulty(stream, "wait_without_arrival");
                assert!(text.starts_with("barrier error"), "{text}");
                assert_place(&text, "wait_without_arrival", "wait_without_arrival");
            }
        },
    );
}

#[test]
fn arriving_at_a_remote_barrier_before_its_initialization_is_ordered_is_caught() {
    on_hopper(
        "arriving_at_a_remote_barrier_before_its_initialization_is_ordered_is_caught",
        |stream| {
            if emulated() {
                let text = faulty(stream, "arrive_before_initialization");
                assert!(
                    text.starts_with("shared-memory race")
                        || text.contains("no mbarrier was initialised"),
                    "{text}"
                );
                let tag = "arrive_before_initialization";
                assert_place(&text, tag, tag);
            }
        },
    );
}
