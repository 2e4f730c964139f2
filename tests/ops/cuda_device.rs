//! The GPU itself: copies, memory, sums of gradients, errors. Without a driver only what a user
//! then sees is tested.

use half::bf16;
use resa_engine::device::{CudaDevice, Device};
use resa_engine::error::Result;
use resa_engine::ops::Operator;
use resa_engine::ops::embedding::Embedding;
use resa_engine::ops::rmsnorm::RmsNorm;
use resa_engine::ops::rope::{Rope, RopeTable};
use resa_engine::tape::{Tape, Var};
use resa_engine::tensor::{DType, Tensor};

use super::harness::{cuda, random, round_bf16};

/// The GPU, or `None` after saying that the test is skipped.
fn gpu() -> Option<&'static CudaDevice> {
    match cuda() {
        Some(Device::Cuda(gpu)) => Some(gpu),
        _ => {
            println!("skipped: no CUDA driver or no kernels in this build");
            None
        }
    }
}

#[test]
fn what_a_machine_lacks_for_cuda_is_named() {
    if CudaDevice::is_available() {
        let error = Device::cuda(4096, 1).unwrap_err().to_string();
        assert!(error.starts_with("cuda:4096: the driver has"), "{error}");
    } else {
        let error = Device::cuda(0, 1).unwrap_err().to_string();
        let helps = error.contains("install the CUDA toolkit") || error.contains("install NVIDIA");
        assert!(error.starts_with("cuda:0: ") && helps, "{error}");
    }
}

#[test]
fn copies_to_the_gpu_and_back_keep_every_value() {
    let Some(gpu) = gpu() else { return };
    for n in [0, 1, 7, 511, 4097] {
        let values = random(1, &[n], 3.0);
        let there = gpu.resident(&values, DType::F32).unwrap();
        assert_eq!(there.dtype(), DType::F32);
        assert_eq!(
            there.to_f32().unwrap().f32s().unwrap(),
            values.f32s().unwrap()
        );
        let narrow = gpu.resident(&there, DType::Bf16).unwrap();
        assert_eq!(narrow.dtype(), DType::Bf16);
        let (got, want) = (narrow.to_f32().unwrap(), round_bf16(&values));
        assert_eq!(got.f32s().unwrap(), want.f32s().unwrap());
    }
}

#[test]
fn large_copies_arrive_whole_whatever_becomes_of_the_hosts_memory() {
    let Some(gpu) = gpu() else { return };
    // Bytes: what the driver takes at once and one value more; a buffer of page-locked memory and
    // one value more; so much that both buffers are used again.
    let sizes = [
        64 << 10,
        (64 << 10) + 4,
        4 << 20,
        (4 << 20) + 4,
        (17 << 20) + 12,
    ];
    let there: Vec<Tensor> = sizes
        .iter()
        .map(|bytes| {
            let values = random(*bytes as u64, &[bytes / 4], 3.0);
            let there = gpu.resident(&values, DType::F32).unwrap();
            let mut values = values;
            values.f32s_mut().unwrap().fill(f32::NAN);
            there
        })
        .collect();
    for (bytes, there) in sizes.iter().zip(there) {
        let there = there.to_f32().unwrap();
        let want = random(*bytes as u64, &[bytes / 4], 3.0);
        assert!(
            there.f32s().unwrap() == want.f32s().unwrap(),
            "{bytes} bytes"
        );
    }
}

#[test]
fn part_of_a_tensor_is_read_and_a_range_beyond_it_is_an_error() {
    let Some(gpu) = gpu() else { return };
    let values = random(1, &[100], 3.0);
    let there = gpu.resident(&values, DType::F32).unwrap();
    let mut part = [0.0; 5];
    there.read_f32(95, &mut part).unwrap();
    assert_eq!(part, values.f32s().unwrap()[95..]);
    assert!(there.read_f32(96, &mut part).is_err());
}

#[test]
fn a_tensor_on_the_gpu_is_not_taken_for_host_memory() {
    let Some(gpu) = gpu() else { return };
    let there = gpu.resident(&random(1, &[3], 1.0), DType::Bf16).unwrap();
    let error = there.f32s().unwrap_err().to_string();
    assert!(error.contains("bfloat16 on cuda:0"), "{error}");
    assert!(there.u32s().is_err());
}

#[test]
fn more_memory_than_there_is_gives_the_sizes_and_the_options_that_help() {
    let Some(device) = cuda() else { return };
    // 2^20 rows of 2^19 values of 2 bytes: a terabyte.
    let ids = Tensor::from_u32(vec![0; 1 << 20], [1 << 20]).unwrap();
    let table = Var::constant(random(1, &[1, 1 << 19], 1.0));
    let rows = Tape::new(device).apply(Embedding { ids }, &[&table]);
    let error = rows.unwrap_err().to_string();
    assert!(
        error.contains("out of memory: asked for 1099511627776 bytes"),
        "{error}"
    );
    assert!(error.contains("--seq-len"), "{error}");
}

#[test]
fn memory_that_was_freed_serves_the_next_request_of_its_size() {
    let Some(gpu) = gpu() else { return };
    let device = Device::cuda(gpu.ordinal(), 1).unwrap();
    let Device::Cuda(own) = &device else {
        panic!("not a GPU");
    };
    assert_eq!(own.reserved_memory(), 0);
    let values = random(1, &[5000], 1.0);
    let kept = own.resident(&values, DType::F32).unwrap();
    for _ in 0..5 {
        drop(own.resident(&values, DType::F32).unwrap());
    }
    assert_eq!(own.reserved_memory(), 2 * 20_480);
    device.release_memory();
    assert_eq!(own.reserved_memory(), 20_480);
    assert_eq!(
        kept.to_f32().unwrap().f32s().unwrap(),
        values.f32s().unwrap()
    );
}

#[test]
fn gradients_that_meet_are_added() {
    let Some(device) = cuda() else { return };
    for n in [1, 8, 2051] {
        let [a, b] = [1, 2].map(|seed| round_bf16(&random(seed, &[n], 1.0)));
        let mut sum = a.clone();
        device.add_assign(&mut sum, &b).unwrap();
        let sum = sum.to_f32().unwrap();
        let pairs = a.f32s().unwrap().iter().zip(b.f32s().unwrap());
        let want: Vec<f32> = pairs.map(|(a, b)| bf16::from_f32(a + b).to_f32()).collect();
        assert_eq!(sum.f32s().unwrap(), want);
    }
}

#[test]
fn gradients_of_parameters_are_added_in_f32() {
    let Some(device) = cuda() else { return };
    let Device::Cuda(gpu) = device else { return };
    for n in [1, 4, 2051] {
        let [a, b] = [1, 2].map(|seed| random(seed, &[n], 1.0));
        let shared = gpu.resident(&a, DType::F32).unwrap();
        let mut sum = shared.clone();
        device.add_assign(&mut sum, &b).unwrap();
        assert_eq!(sum.dtype(), DType::F32);
        let pairs = a.f32s().unwrap().iter().zip(b.f32s().unwrap());
        let want: Vec<f32> = pairs.map(|(a, b)| a + b).collect();
        assert_eq!(sum.to_f32().unwrap().f32s().unwrap(), want);
        let kept = shared.to_f32().unwrap();
        assert_eq!(kept.f32s().unwrap(), a.f32s().unwrap());
    }
}

#[test]
fn one_table_serves_two_devices() {
    let Some(Device::Cuda(first)) = cuda() else {
        return;
    };
    let second = Device::cuda(first.ordinal(), 1).unwrap();
    let table = RopeTable::new(4, 8, 10_000.0).unwrap();
    let x = Var::constant(random(1, &[4, 8], 1.0));
    let rotated = |device: &Device| {
        let rope = Rope {
            seq_len: 4,
            start: 0,
            heads: 1,
            table: table.clone(),
        };
        let y: Tensor = Tape::new(device).apply(rope, &[&x]).unwrap().into_value();
        y.to_f32().unwrap().f32s().unwrap().to_vec()
    };
    assert_eq!(rotated(cuda().unwrap()), rotated(&second));
}

/// Returns its input.
struct OnHostOnly;

impl Operator for OnHostOnly {
    type Saved = ();
    const NAME: &'static str = "host_only";

    fn forward(&self, _: &Device, x: &[&Tensor], _: &[bool]) -> Result<(Vec<Tensor>, ())> {
        Ok((vec![x[0].clone()], ()))
    }

    fn backward(
        &self,
        _: &Device,
        (): (),
        grads: Vec<Option<Tensor>>,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        Ok(grads)
    }
}

#[test]
fn an_operator_without_a_kernel_is_refused_on_the_gpu() {
    let Some(device) = cuda() else { return };
    let x = Var::constant(random(2, &[4, 3], 1.0));
    let error = Tape::new(device).apply(OnHostOnly, &[&x]);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("host_only has no CUDA kernel"), "{error}");
}

#[test]
fn a_row_longer_than_shared_memory_is_an_error_that_names_the_limit() {
    let Some(device) = cuda() else { return };
    let op = RmsNorm {
        weight: random(1, &[12_001], 1.0),
        eps: 1e-6,
    };
    let x = Var::constant(random(2, &[1, 12_001], 1.0));
    let error = Tape::new(device).apply(op, &[&x]).unwrap_err().to_string();
    assert!(
        error.contains("at most 12000") && error.contains("12001"),
        "{error}"
    );
}
