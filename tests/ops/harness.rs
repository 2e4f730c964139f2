//! One test body for every operator and device: outputs against a float64 reference, gradients
//! against finite differences of that reference, equal bits on repetition.

use std::io::Write;
use std::sync::Arc;

use resa_engine::device::Device;
use resa_engine::error::Result;
use resa_engine::ops::Operator;
use resa_engine::rng::{Purpose, Stream};
use resa_engine::tape::{Tape, Var};
use resa_engine::tensor::{DType, MappedBytes, Tensor};

/// Every device that tests run on, with different thread counts where the device has threads.
pub fn devices() -> Vec<Device> {
    vec![Device::cpu(1).unwrap(), Device::cpu(3).unwrap()]
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
    let mapped = MappedBytes::new(Arc::new(map), 0..bytes.len(), dtype).unwrap();
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
/// Outputs and gradients must agree with it to `tolerance`, relative in the Frobenius norm, and
/// have the same bits for every number of CPU threads.
pub fn check<O: Operator>(
    make: impl Fn() -> O,
    inputs: &[Tensor],
    reference: impl Fn(&[Vec<f64>]) -> Vec<Vec<f64>>,
    tolerance: f64,
) {
    let inputs64: Vec<Vec<f64>> = inputs.iter().map(to_f64).collect();
    let want = reference(&inputs64);
    let upstream: Vec<Tensor> = want
        .iter()
        .enumerate()
        .map(|(i, w)| random(1000 + i as u64, &[w.len()], 1.0))
        .collect();
    let mut on_cpu = None;
    for device in devices() {
        let label = format!("{} on {} x{}", O::NAME, device.name(), device.threads());
        let first = run(&device, make(), inputs, &upstream);
        let again = run(&device, make(), inputs, &upstream);
        assert_eq!(first, again, "{label}: two runs differ in bits");
        if device.name() == "cpu" {
            let other = on_cpu.get_or_insert_with(|| first.clone());
            assert_eq!(&first, other, "{label}: bits depend on the thread count");
        }
        let (outputs, grads) = first;
        for (i, (got, want)) in outputs.iter().zip(&want).enumerate() {
            let got: Vec<f64> = got.iter().map(|&b| f32::from_bits(b).into()).collect();
            let error = relative_error(&got, want);
            assert!(error < tolerance, "{label}: output {i} is off by {error:e}");
        }
        for (i, grad) in grads.iter().enumerate() {
            let got: Vec<f64> = grad.iter().map(|&b| f32::from_bits(b).into()).collect();
            compare_gradient(&label, i, &got, &inputs64, &upstream, &reference, tolerance);
        }
    }
}

fn compare_gradient(
    label: &str,
    input: usize,
    got: &[f64],
    inputs: &[Vec<f64>],
    upstream: &[Tensor],
    reference: &impl Fn(&[Vec<f64>]) -> Vec<Vec<f64>>,
    tolerance: f64,
) {
    let loss = |inputs: &[Vec<f64>]| -> f64 {
        let outputs = reference(inputs);
        let pairs = outputs.iter().zip(upstream);
        pairs
            .map(|(o, u)| o.iter().zip(to_f64(u)).map(|(o, u)| o * u).sum::<f64>())
            .sum()
    };
    // At most 200 entries, spread over the tensor.
    let stride = got.len().div_ceil(200).max(1);
    let (mut sampled, mut want) = (Vec::new(), Vec::new());
    for i in (0..got.len()).step_by(stride) {
        let mut moved = inputs.to_vec();
        let h = 1e-5 * inputs[input][i].abs().max(1.0);
        moved[input][i] += h;
        let up = loss(&moved);
        moved[input][i] -= 2.0 * h;
        let down = loss(&moved);
        sampled.push(got[i]);
        want.push((up - down) / (2.0 * h));
    }
    let error = relative_error(&sampled, &want);
    assert!(
        error < tolerance,
        "{label}: gradient of input {input} is off by {error:e}"
    );
}

type Bits = Vec<Vec<u32>>;

fn run<O: Operator>(
    device: &Device,
    op: O,
    inputs: &[Tensor],
    upstream: &[Tensor],
) -> (Bits, Bits) {
    let bits = |t: &Tensor| t.f32s().unwrap().iter().map(|v| v.to_bits()).collect();
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
struct Dot(Vec<Tensor>);

impl Operator for Dot {
    type Saved = Vec<Vec<usize>>;
    const NAME: &'static str = "dot";

    fn forward(
        &self,
        _: &Device,
        inputs: &[&Tensor],
        _: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)> {
        let mut sum = 0.0;
        for (input, weights) in inputs.iter().zip(&self.0) {
            sum += input
                .f32s()?
                .iter()
                .zip(weights.f32s()?)
                .map(|(a, b)| a * b)
                .sum::<f32>();
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
