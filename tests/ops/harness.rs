//! One test body for every operator and device: outputs against a float64 reference, gradients
//! against finite differences of that reference, equal bits on repetition.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::{Arc, OnceLock};

use cuda_emulator::{Backend, Counters};
use half::bf16;

use resa_engine::device::{CudaDevice, Device, Precision};
use resa_engine::error::Result;
use resa_engine::ops::Operator;
use resa_engine::rng::{Purpose, Stream};
use resa_engine::tape::{Tape, Var};
use resa_engine::tensor::{DType, MappedBytes, Tensor};

/// Operators and optimizers that have no CUDA kernel yet: tested on the CPU alone.
const WITHOUT_CUDA: [&str; 0] = [];

/// Every device that `stem` runs on: the CPU with different thread counts and, where the build
/// has kernels, a GPU or the emulator in its place. Says so where `stem` cannot use it.
pub fn devices(stem: &str) -> Vec<Device> {
    let mut devices: Vec<Device> = [1, 3].map(|n| Device::cpu(n).unwrap()).into();
    if !WITHOUT_CUDA.contains(&stem) {
        devices.extend(cuda().cloned());
    } else if cuda().is_some() {
        println!("{stem}: no CUDA kernel yet, not tested on the GPU");
    }
    devices
}

/// The GPU that the tests share; `None`, said once, in a build without kernels.
pub fn cuda() -> Option<&'static Device> {
    static CUDA: OnceLock<Option<Device>> = OnceLock::new();
    let device = CUDA.get_or_init(|| {
        cuda_emulator::install().unwrap();
        if CudaDevice::is_available() {
            return Some(Device::cuda(0, 2).unwrap());
        }
        println!("built without nvcc: CUDA is not tested");
        None
    });
    device.as_ref()
}

/// What this thread's last kernel did; `None` where a GPU ran it, which does not count.
pub fn last_counters() -> Option<Counters> {
    match cuda_emulator::install().unwrap() {
        Backend::Emulator => cuda_emulator::emulator().unwrap().last_counters(),
        Backend::Gpu => None,
    }
}

/// Fails where this thread's last kernel read and wrote over 1.1 times the `least` bytes of
/// global memory there are to move, or where lanes met in a bank of shared memory. What counts is the 32-byte sectors that memory moves: a value
/// that all threads of a warp read at once is moved once.
pub fn assert_least_traffic(least: usize) {
    let Some(c) = last_counters() else { return };
    let moved = 32 * (c.global_load_sectors + c.global_store_sectors);
    let ratio = moved as f64 / least as f64;
    println!("{moved} bytes moved, least {least}: {ratio:.3}");
    assert!(ratio <= 1.1, "{moved} bytes moved, the least is {least}");
    assert_eq!(c.shared_bank_conflicts, 0, "conflicts in shared memory");
}

/// What the last kernel that `run` launches from this thread did; `None` on a real GPU.
pub fn counters(run: impl FnOnce()) -> Option<Counters> {
    let on_emulator = cuda_emulator::install() == Ok(Backend::Emulator);
    let emulator = on_emulator.then(|| cuda_emulator::emulator().unwrap())?;
    emulator.reset();
    run();
    Some(emulator.last_counters().expect("no kernel was launched"))
}

/// Sums over the kernels that `run` launches from this thread; `None` on a real GPU.
pub fn counters_of_all(run: impl FnOnce()) -> Option<Counters> {
    let on_emulator = cuda_emulator::install() == Ok(Backend::Emulator);
    let emulator = on_emulator.then(|| cuda_emulator::emulator().unwrap());
    emulator.inspect(|emulator| emulator.reset());
    run();
    emulator.map(|emulator| emulator.thread_counters().expect("no kernel was launched"))
}

/// What `run`, called on this thread, may do at most.
pub struct Least<'a> {
    pub name: &'a str,
    /// Bytes of global memory.
    pub bytes: usize,
    /// FLOP of matrix products.
    pub flop: usize,
}

impl Least<'_> {
    /// Sums over all kernels that `run` launches; `None` on a real GPU. Fails where they move over
    /// 1.1 times the bytes in 32-byte sectors, multiply over 1.03 times the FLOP, or meet in a
    /// bank of shared memory.
    pub fn holds_for(&self, run: impl FnOnce()) -> Option<Counters> {
        let counted = counters_of_all(run)?;
        let moved = 32 * (counted.global_load_sectors + counted.global_store_sectors);
        let ratio = moved as f64 / self.bytes as f64;
        let products = counted.mma_flop as f64 / (self.flop as f64).max(1.0);
        println!(
            "{}: {moved} bytes, {ratio:.3} of the least; {} FLOP, {products:.3}; {} conflicts",
            self.name, counted.mma_flop, counted.shared_bank_conflicts
        );
        assert!(ratio <= 1.1, "{}: {ratio:.3} of the least bytes", self.name);
        assert!(products <= 1.03, "{}: {products:.3} of the FLOP", self.name);
        assert_eq!(counted.shared_bank_conflicts, 0, "{}: conflicts", self.name);
        Some(counted)
    }
}

/// The values rounded to bf16, as a GPU holds them.
pub fn round_bf16(tensor: &Tensor) -> Tensor {
    let rounded = tensor.f32s().unwrap().iter();
    let rounded = rounded.map(|&v| bf16::from_f32(v).to_f32()).collect();
    Tensor::from_vec(rounded, tensor.shape()).unwrap()
}

/// Values uniform in [-scale, scale), the same for the same seed.
pub fn random(seed: u64, shape: &[usize], scale: f32) -> Tensor {
    let stream = Stream::new(seed, Purpose::Init, 0, 0);
    let n: usize = shape.iter().product();
    let data = (0..n)
        .map(|i| (stream.uniform(i as u64) * 2.0 - 1.0) * scale)
        .collect();
    Tensor::from_vec(data, shape).unwrap()
}

/// The values in a memory-mapped tensor of a 16-bit type, as a model file holds them.
pub fn half_tensor(values: &Tensor, encode: impl Fn(f32) -> [u8; 2], dtype: DType) -> Tensor {
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = values
        .f32s()
        .unwrap()
        .iter()
        .flat_map(|&v| encode(v))
        .collect();
    file.write_all(&bytes).unwrap();
    // SAFETY: the file has no name and no other handle, so nothing changes it under the map.
    let map = unsafe { memmap2::Mmap::map(&file).unwrap() };
    // SAFETY: the map is of a file.
    let mapped = unsafe { MappedBytes::new(Arc::new(map), 0..bytes.len(), dtype) }.unwrap();
    Tensor::from_mapped(mapped, values.shape()).unwrap()
}

pub fn to_f64(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_f32().unwrap();
    tensor.f32s().unwrap().iter().map(|&v| v.into()).collect()
}

/// Takes out of `g` the component along each row of `w`, whose rows are unit vectors of length
/// `cols`.
pub fn remove_parallel(g: &mut [f64], w: &[f64], cols: usize) {
    for (g, w) in g.chunks_mut(cols).zip(w.chunks(cols)) {
        let parallel: f64 = g.iter().zip(w).map(|(g, w)| g * w).sum();
        g.iter_mut().zip(w).for_each(|(g, w)| *g -= parallel * w);
    }
}

/// A random matrix with rows of norm 1.
pub fn unit_rows(seed: u64, rows: usize, cols: usize) -> Tensor {
    let mut w = random(seed, &[rows, cols], 1.0);
    for row in w.f32s_mut().unwrap().chunks_mut(cols) {
        let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        row.iter_mut().for_each(|v| *v /= norm);
    }
    w
}

/// log softmax of one row.
pub fn log_softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + row.iter().map(|v| (v - max).exp()).sum::<f64>().ln();
    row.iter().map(|v| v - log_sum).collect()
}

/// ‖got − want‖ / ‖want‖ (Frobenius).
pub fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
    difference / norm(&mut want.iter().copied()).max(1e-30)
}

/// Runs `make()` on `inputs` on every device. `reference` maps the inputs, in float64, to the
/// outputs that carry gradients (outputs of other dtypes, such as indices, are not compared).
/// Outputs and gradients must be within `tolerance` of it in f32; in bf16, on the CPU and on a GPU,
/// within twice what rounding it to bf16 costs: less than any computation with a second rounding on
/// the way would need. They must have the same bits when run again and for every number of CPU
/// threads. The operator's fields must hold values that bf16 can represent where they go into
/// products.
pub fn check<O: Operator>(
    make: impl Fn() -> O,
    inputs: &[Tensor],
    reference: impl Fn(&[Vec<f64>]) -> Vec<Vec<f64>>,
    tolerance: f64,
) {
    check_all(make, inputs, &reference, tolerance, None);
}

/// As [`check`], for an operator that rounds to bf16 between its steps: a GPU may be off by twice
/// what `plain` is, the textbook's computation with each of its steps rounded to bf16.
pub fn check_in_steps<O: Operator>(
    make: impl Fn() -> O,
    inputs: &[Tensor],
    reference: impl Fn(&[Vec<f64>]) -> Vec<Vec<f64>>,
    tolerance: f64,
    plain: impl Fn(&[Vec<f64>], &[Vec<f64>]) -> Returned,
) {
    check_all(make, inputs, &reference, tolerance, Some(&plain));
}

type Reference<'a> = dyn Fn(&[Vec<f64>]) -> Vec<Vec<f64>> + 'a;

/// Maps inputs and the outputs' gradients to outputs and the inputs' gradients.
type Plain<'a> = dyn Fn(&[Vec<f64>], &[Vec<f64>]) -> Returned + 'a;

/// Outputs and gradients.
type Returned = (Vec<Vec<f64>>, Vec<Vec<f64>>);

fn check_all<O: Operator>(
    make: impl Fn() -> O,
    inputs: &[Tensor],
    reference: &Reference,
    tolerance: f64,
    plain: Option<&Plain>,
) {
    assert_eq!(
        O::CUDA,
        !WITHOUT_CUDA.contains(&O::NAME),
        "the list of operators without CUDA is not up to date for {}",
        O::NAME
    );
    let mut on_cpu: [Option<(Bits, Bits)>; 2] = [None, None];
    let mut expected: [Option<Expected>; 2] = [None, None];
    let in_bf16 = [1, 3].map(|n| Device::cpu(n).unwrap().with_precision(Precision::Bf16));
    for device in devices(O::NAME).into_iter().chain(in_bf16) {
        let narrow = device.precision() == Precision::Bf16;
        let label = format!(
            "{} on {} x{} in {:?}",
            O::NAME,
            device.name(),
            device.threads(),
            device.precision()
        );
        let expected = expected[usize::from(narrow)]
            .get_or_insert_with(|| Expected::new(inputs, reference, plain, narrow));
        let (inputs, upstream) = (&expected.inputs, &expected.upstream);
        let first = run(&device, make(), inputs, upstream);
        let again = run(&device, make(), inputs, upstream);
        assert_eq!(first, again, "{label}: two runs differ in bits");
        if device.name() == "cpu" {
            let other = on_cpu[usize::from(narrow)].get_or_insert_with(|| first.clone());
            assert_eq!(&first, other, "{label}: bits depend on the thread count");
        }
        let compare = |what: String, got: &[f64], want: &[f64], plain: Option<&Vec<f64>>| {
            let limit = match narrow {
                // Finite differences themselves are this far from the gradient.
                true => {
                    let plain = plain.map_or_else(|| rounded(want), Vec::clone);
                    2.0 * relative_error(&plain, want) + 1e-6
                }
                false => tolerance,
            };
            let error = relative_error(got, want);
            assert!(
                error < limit,
                "{label}: {what} is off by {error:e}, allowed is {limit:e}"
            );
        };
        let plain = expected.plain.as_ref();
        let (outputs, grads) = first;
        for (i, (got, want)) in outputs.iter().zip(&expected.outputs).enumerate() {
            let plain = plain.map(|(outputs, _)| &outputs[i]);
            compare(format!("output {i}"), &from_bits(got), want, plain);
        }
        for (i, (grad, want)) in grads.iter().zip(&expected.gradients).enumerate() {
            let plain = plain.map(|(_, gradients)| &gradients[i]);
            let got = sample(&from_bits(grad), inputs[i].shape());
            compare(format!("gradient of input {i}"), &got, want, plain);
        }
    }
}

/// What an operator is given and must return in one precision, the same for all devices.
struct Expected {
    inputs: Vec<Tensor>,
    /// The outputs' gradients.
    upstream: Vec<Tensor>,
    outputs: Vec<Vec<f64>>,
    /// A sample of each input's.
    gradients: Vec<Vec<f64>>,
    /// The same of [`Plain`], in bf16.
    plain: Option<Returned>,
}

impl Expected {
    fn new(inputs: &[Tensor], reference: &Reference, plain: Option<&Plain>, narrow: bool) -> Self {
        let held = |t: &Tensor| if narrow { round_bf16(t) } else { t.clone() };
        let inputs: Vec<Tensor> = inputs.iter().map(held).collect();
        let inputs64: Vec<Vec<f64>> = inputs.iter().map(to_f64).collect();
        let outputs = reference(&inputs64);
        let upstream: Vec<Tensor> = outputs
            .iter()
            .enumerate()
            .map(|(i, w)| held(&random(1000 + i as u64, &[w.len()], 1.0)))
            .collect();
        let upstream64: Vec<Vec<f64>> = upstream.iter().map(to_f64).collect();
        let gradients = inputs
            .iter()
            .enumerate()
            .map(|(i, input)| differences(i, input.shape(), &inputs64, &upstream64, reference))
            .collect();
        let plain = plain.filter(|_| narrow).map(|plain| {
            let (outputs, mut gradients) = plain(&inputs64, &upstream64);
            for (gradient, input) in gradients.iter_mut().zip(&inputs) {
                *gradient = sample(gradient, input.shape());
            }
            (outputs, gradients)
        });
        Self {
            inputs,
            upstream,
            outputs,
            gradients,
            plain,
        }
    }
}

/// The values rounded to bf16.
pub fn rounded(values: &[f64]) -> Vec<f64> {
    values.iter().map(|&v| bf16::from_f64(v).to_f64()).collect()
}

fn from_bits(bits: &[u32]) -> Vec<f64> {
    bits.iter().map(|&b| f32::from_bits(b).into()).collect()
}

/// Positions of at most 200 entries, spread over a tensor of that shape. Their stride has no factor
/// in common with a row's length, so that they lie in as many columns as there are, or as they are.
fn positions(shape: &[usize]) -> impl Iterator<Item = usize> {
    fn common_factor(a: usize, b: usize) -> usize {
        if b == 0 { a } else { common_factor(b, a % b) }
    }
    let len = shape.iter().product::<usize>();
    let fits = |&stride: &usize| shape.iter().all(|&n| common_factor(stride, n) <= 1);
    let stride = (len.div_ceil(200).max(1)..).find(fits);
    (0..len).step_by(stride.expect("a prime above the shape fits"))
}

fn sample(values: &[f64], shape: &[usize]) -> Vec<f64> {
    positions(shape).map(|i| values[i]).collect()
}

#[test]
fn gradients_are_compared_in_every_column() {
    for (shape, fewest) in [
        (&[7, 13][..], 91),
        (&[24, 40], 130),
        (&[40, 160], 190),
        (&[131, 160], 190),
        (&[3, 40, 512], 190),
        (&[6400], 190),
    ] {
        let cols = *shape.last().unwrap();
        let found: Vec<usize> = positions(shape).collect();
        assert!((fewest..=200).contains(&found.len()), "{shape:?}");
        let columns: BTreeSet<usize> = found.iter().map(|i| i % cols).collect();
        assert_eq!(columns.len(), cols.min(found.len()), "{shape:?}");
    }
}

/// Finite differences of the reference at a sample of the entries of input number `input`, which
/// has that shape.
fn differences(
    input: usize,
    shape: &[usize],
    inputs: &[Vec<f64>],
    upstream: &[Vec<f64>],
    reference: &Reference,
) -> Vec<f64> {
    let loss = |inputs: &[Vec<f64>]| -> f64 {
        let outputs = reference(inputs);
        let pairs = outputs.iter().zip(upstream);
        pairs
            .map(|(o, u)| o.iter().zip(u).map(|(o, u)| o * u).sum::<f64>())
            .sum()
    };
    let at = |i: usize| {
        let mut moved = inputs.to_vec();
        let h = 1e-5 * inputs[input][i].abs().max(1.0);
        moved[input][i] += h;
        let up = loss(&moved);
        moved[input][i] -= 2.0 * h;
        (up - loss(&moved)) / (2.0 * h)
    };
    positions(shape).map(at).collect()
}

pub type Bits = Vec<Vec<u32>>;

/// The bits of an operator's outputs, and of its inputs' gradients for these of the outputs.
pub fn run<O: Operator>(
    device: &Device,
    op: O,
    inputs: &[Tensor],
    upstream: &[Tensor],
) -> (Bits, Bits) {
    let bits = |t: &Tensor| {
        let values = t.to_f32().unwrap();
        values.f32s().unwrap().iter().map(|v| v.to_bits()).collect()
    };
    let upstream = upstream.to_vec();
    let inputs = inputs.to_vec();
    // Vars hold tape positions, so all of it happens on the device's threads.
    device.run(|| {
        let mut tape = Tape::new(device);
        let parameters: Vec<Var> = inputs.iter().map(|t| tape.parameter(t.clone())).collect();
        let outputs = tape
            .apply_all(op, &parameters.iter().collect::<Vec<_>>())
            .unwrap();
        let outputs: Vec<Var> = outputs.into_iter().take(upstream.len()).collect();
        let values = outputs.iter().map(|o| bits(o.value())).collect();
        let loss = tape
            .apply(Dot(upstream), &outputs.iter().collect::<Vec<_>>())
            .unwrap();
        let mut grads = tape.backward(&loss, 1.0).unwrap();
        let grads = parameters
            .iter()
            .map(|p| bits(&grads.take(p).expect("every input has a gradient")))
            .collect();
        (values, grads)
    })
}

/// Σ ⟨input_i, weights_i⟩: turns any outputs into a scalar.
pub struct Dot(pub Vec<Tensor>);

impl Operator for Dot {
    type Saved = Vec<Vec<usize>>;
    const NAME: &'static str = "dot";
    const CUDA: bool = true;

    fn forward(
        &self,
        _: &Device,
        inputs: &[&Tensor],
        _: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)> {
        let mut sum = 0.0;
        for (input, weights) in inputs.iter().zip(&self.0) {
            let input = input.to_f32()?;
            let products = input.f32s()?.iter().zip(weights.f32s()?);
            sum += products.map(|(a, b)| a * b).sum::<f32>();
        }
        let shapes = inputs.iter().map(|t| t.shape().to_vec()).collect();
        Ok((vec![Tensor::from_vec(vec![sum], [1])?], shapes))
    }

    fn backward(
        &self,
        _: &Device,
        shapes: Self::Saved,
        _: Vec<Option<Tensor>>,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let weights = self.0.iter().zip(shapes);
        weights
            .map(|(w, shape)| Ok(Some(w.reshape(shape)?)))
            .collect()
    }
}
