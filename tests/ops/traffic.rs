//! What the kernels move, multiply and meet in shared memory at the shapes of a 1.5B model, against
//! the least: counters of the emulator. Stems that are not here have such a test beside their
//! others.
//!
//! The least bytes of a kernel that memory bounds are its operands once. Those of a tiled product
//! are what its tiles take from the L2 cache: for each tile of the result the rows and columns of
//! the operands that it multiplies, once, and the result once. Which of these come from memory
//! depends on the cache, which the emulator does not have; at least, each operand once does.

use resa_engine::device::{CudaDevice, Device};
use resa_engine::ops::Operator;
use resa_engine::ops::fvu::Fvu;
use resa_engine::ops::gemm::Linear;
use resa_engine::ops::lora::{Dropout, Frozen, LoraLinear};
use resa_engine::ops::rmsnorm::RmsNorm;
use resa_engine::ops::rope::{Rope, RopeTable};
use resa_engine::ops::swiglu::SwiGlu;
use resa_engine::rng::{Purpose, Stream};
use resa_engine::tensor::{DType, Tensor};

use crate::harness::{Least, counters_of_all, cuda, random};

/// The model: hidden, query, key/value and inner widths.
const WIDTH: usize = 1536;
const KV_WIDTH: usize = 256;
const INNER: usize = 8960;
const HEAD: usize = 128;

fn gpu() -> Option<(&'static Device, &'static CudaDevice)> {
    let device = cuda()?;
    match device {
        Device::Cuda(gpu) => Some((device, gpu)),
        Device::Cpu(_) => None,
    }
}

fn on(gpu: &CudaDevice, seed: u64, shape: &[usize]) -> Tensor {
    let values = random(seed, shape, 1.0);
    gpu.resident(&values, DType::Bf16).unwrap()
}

/// Forward and backward, both within `bytes` (forward, backward) and `flop` each.
fn both<O: Operator>(
    device: &Device,
    op: O,
    name: &str,
    inputs: &[&Tensor],
    upstream: Tensor,
    bytes: [usize; 2],
    flop: usize,
) {
    let least = |pass: usize| Least {
        name,
        bytes: bytes[pass],
        flop,
    };
    let needed = vec![true; inputs.len()];
    let mut saved = None;
    least(0).holds_for(|| saved = Some(op.forward(device, inputs, &needed).unwrap().1));
    let Some(saved) = saved else { return };
    least(1).holds_for(|| {
        drop(
            op.backward(device, saved, vec![Some(upstream)], &needed)
                .unwrap(),
        )
    });
}

#[test]
fn rmsnorm_reads_and_writes_each_row_once() {
    let Some((device, gpu)) = gpu() else { return };
    let t = 256;
    let op = RmsNorm {
        weight: on(gpu, 1, &[WIDTH]),
        eps: 1e-6,
    };
    let [x, dy] = [2, 3].map(|seed| on(gpu, seed, &[t, WIDTH]));
    let bytes = [4 * t * WIDTH, 6 * t * WIDTH];
    both(device, op, "rmsnorm", &[&x], dy, bytes, 0);
}

#[test]
fn rope_reads_and_writes_each_head_once_and_its_table_once_a_token() {
    let Some((device, gpu)) = gpu() else { return };
    let t = 256;
    let table = RopeTable::new(t, HEAD, 10_000.0).unwrap();
    for (name, width) in [("rope of queries", WIDTH), ("rope of keys", KV_WIDTH)] {
        let op = Rope {
            seq_len: t,
            start: 0,
            heads: width / HEAD,
            table: table.clone(),
        };
        let [x, dy] = [2, 3].map(|seed| on(gpu, seed, &[t, width]));
        let bytes = 4 * t * width + 4 * t * HEAD;
        both(device, op, name, &[&x], dy, [bytes; 2], 0);
    }
}

#[test]
fn swiglu_reads_and_writes_each_value_once() {
    let Some((device, gpu)) = gpu() else { return };
    let t = 32;
    let [gate, up, dy] = [1, 2, 3].map(|seed| on(gpu, seed, &[t, INNER]));
    let bytes = [6 * t * INNER, 10 * t * INNER];
    both(device, SwiGlu, "swiglu", &[&gate, &up], dy, bytes, 0);
}

#[test]
fn fvu_reads_target_and_reconstruction_once_in_each_direction() {
    let Some((device, gpu)) = gpu() else { return };
    let t = 256;
    let [x, x_hat] = [1, 2].map(|seed| on(gpu, seed, &[t, WIDTH]));
    let op = Fvu::with_variance(x, 1.0).unwrap();
    let upstream = Tensor::from_vec(vec![1.0], [1]).unwrap();
    let bytes = [4 * t * WIDTH, 6 * t * WIDTH];
    both(device, op, "fvu", &[&x_hat], upstream, bytes, 0);
}

/// Bytes that tiles of 128 rows and `cols` columns take for a product [m, n] of depth k, and its
/// result in bf16.
fn tiled_by(cols: usize, m: usize, n: usize, k: usize) -> usize {
    2 * k * (m * n.div_ceil(cols) + n * m.div_ceil(128)) + 2 * m * n
}

/// Those of square tiles.
fn tiled(m: usize, n: usize, k: usize) -> usize {
    tiled_by(128, m, n, k)
}

#[test]
fn gemm_moves_and_multiplies_what_its_tiles_need() {
    let Some((device, gpu)) = gpu() else { return };
    for (name, t, k, n) in [
        ("gemm q", 256, WIDTH, WIDTH),
        ("gemm k", 256, WIDTH, KV_WIDTH),
        ("gemm gate", 128, WIDTH, INNER),
        ("gemm down", 128, INNER, WIDTH),
    ] {
        let op = Linear {
            weight: on(gpu, 1, &[n, k]),
            bias: None,
        };
        let (x, dy) = (on(gpu, 2, &[t, k]), on(gpu, 3, &[t, n]));
        let bytes = [tiled(t, n, k), tiled(t, k, n)];
        both(device, op, name, &[&x], dy, bytes, 2 * t * k * n);
    }
}

#[test]
fn products_move_what_their_tiles_take_to_the_byte() {
    let Some((device, gpu)) = gpu() else { return };
    let (t, depth) = (384, 128);
    let linear = |shape: [usize; 2]| Linear {
        weight: on(gpu, 1, &shape),
        bias: None,
    };
    let operand = on(gpu, 2, &[t, depth]);
    for (n, cols) in [(WIDTH, 128), (INNER, 256)] {
        let (up, down) = (linear([n, depth]), linear([depth, n]));
        let forward = counters_of_all(|| {
            drop(up.forward(device, &[&operand], &[true]).unwrap());
        });
        let backward = counters_of_all(|| {
            let upstream = vec![Some(operand.clone())];
            drop(down.backward(device, (), upstream, &[true]).unwrap());
        });
        for counted in [forward, backward].into_iter().flatten() {
            let moved = 32 * (counted.global_load_sectors + counted.global_store_sectors);
            assert_eq!(moved, tiled_by(cols, t, n, depth) as u64, "{n}");
        }
    }
}

/// Forward and backward of all modules of a layer for a sequence, with dropout, those that read the
/// same input together; the products alone include the sum of their gradients. What these move is
/// computed, as the test above allows. With half as many tokens the sums of the adapters' shares,
/// which hardly depend on them, would exceed the bound.
#[test]
fn lora_costs_under_a_tenth_more_than_the_frozen_products() {
    let Some((device, gpu)) = gpu() else { return };
    let (t, r) = (1280, 32);
    let groups: [(&str, usize, &[usize]); 4] = [
        ("q, k, v", WIDTH, &[WIDTH, KV_WIDTH, KV_WIDTH]),
        ("o", WIDTH, &[WIDTH]),
        ("gate, up", WIDTH, &[INNER, INNER]),
        ("down", INNER, &[WIDTH]),
    ];
    // The tiles of the widest results are twice as wide.
    let product = |n: usize, k: usize| tiled_by(if n == INNER { 256 } else { 128 }, t, n, k);
    // Bytes, and FLOP.
    let mut alone = [0; 2];
    let mut adapted = [0; 2];
    let mut needed_flop = 0;
    for (name, inner, outs) in groups {
        let x = on(gpu, 1, &[t, inner]);
        let weights: Vec<_> = outs.iter().map(|&out| on(gpu, 2, &[out, inner])).collect();
        let dy: Vec<_> = outs.iter().map(|&out| on(gpu, 3, &[t, out])).collect();
        let master = |seed, shape: [usize; 2]| {
            let values = random(seed, &shape, 0.1);
            gpu.resident(&values, DType::F32).unwrap()
        };
        let adapters: Vec<_> = outs
            .iter()
            .flat_map(|&out| [master(4, [r, inner]), master(5, [out, r])])
            .collect();
        let counted = counters_of_all(|| {
            let frozen = |(index, weight): (usize, &Tensor)| Frozen {
                weight: weight.clone(),
                bias: None,
                dropout: Some(Dropout {
                    p: 0.05,
                    stream: Stream::new(9, Purpose::Dropout, 2, index as u32),
                    step: None,
                }),
            };
            let op = LoraLinear {
                modules: weights.iter().enumerate().map(frozen).collect(),
                scale: 4.0,
            };
            let inputs: Vec<&Tensor> = std::iter::once(&x).chain(&adapters).collect();
            let needed = vec![true; inputs.len()];
            let (_, saved) = op.forward(device, &inputs, &needed).unwrap();
            let grads = dy.iter().cloned().map(Some).collect();
            drop(op.backward(device, saved, grads, &needed).unwrap());
        });
        let Some(counted) = counted else { return };
        assert_eq!(counted.shared_bank_conflicts, 0, "{name}");
        let all: usize = outs.iter().sum();
        let products: usize = outs
            .iter()
            .map(|&out| product(out, inner) + product(inner, out))
            .sum();
        // A gradient is read, the sum of the others read and written.
        let sums = 3 * 2 * t * inner * (outs.len() - 1);
        let frozen = 4 * t * inner * all;
        let moved = 32 * (counted.global_load_sectors + counted.global_store_sectors);
        let group = [(moved, products + sums), (counted.mma_flop, frozen)];
        for (i, (found, least)) in group.into_iter().enumerate() {
            adapted[i] += found;
            alone[i] += least as u64;
        }
        needed_flop += frozen + 6 * t * r * (inner * outs.len() + all);
        let [bytes, flop] = group.map(|(found, least)| found as f64 / least as f64);
        println!("{name}: {bytes:.3} of the bytes and {flop:.3} of the FLOP of the products alone");
    }
    let ratios = [0, 1].map(|i| adapted[i] as f64 / alone[i] as f64);
    let wasted = adapted[1] as f64 / needed_flop as f64;
    println!("a layer: {ratios:.3?}; {wasted:.3} of the FLOP it needs");
    assert!(ratios.iter().all(|&ratio| ratio < 1.1), "{ratios:?}");
    assert!(wasted <= 1.03, "{wasted}");
}
