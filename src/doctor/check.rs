//! One operator, once, held against float64.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::Operator;
use crate::rng::{Purpose, Stream};
use crate::tensor::Tensor;

/// Entries of a gradient that are compared with finite differences.
const ENTRIES: usize = 16;
/// Half the distance of a finite difference.
const STEP: f64 = 1e-4;

/// Multiples of 1/64 from −1 to 1, which bf16 represents, differences of two included: whatever
/// the precision, device and reference start from the same values.
pub(super) fn values(seed: u64, shape: &[usize]) -> Result<Tensor> {
    let stream = Stream::new(seed, Purpose::Init, 0, 0);
    let len: usize = shape.iter().product();
    let value = |i| (stream.uniform(i as u64) * 128.0 - 64.0).floor() / 64.0;
    Tensor::from_vec((0..len).map(value).collect(), shape)
}

/// The values of a tensor wherever it is.
pub(super) fn f64s(tensor: &Tensor) -> Result<Vec<f64>> {
    let wide = tensor.to_f32()?;
    Ok(wide.f32s()?.iter().map(|&v| v.into()).collect())
}

/// ‖found − right‖ / ‖right‖ (Frobenius norm); infinite where something found is not finite or
/// missing.
pub(super) fn relative_error(found: &[f64], right: &[f64]) -> f64 {
    let square = |sum: f64, v: f64| sum + v * v;
    let off = found.iter().zip(right).map(|(f, r)| f - r);
    let off = off.fold(0.0, square).sqrt();
    match found.len() == right.len() && off.is_finite() {
        true => off / right.iter().copied().fold(0.0, square).sqrt().max(1e-30),
        false => f64::INFINITY,
    }
}

/// The largest relative error of the first output and the gradients of all inputs. `reference`
/// maps the inputs to that output.
pub(super) fn check<O: Operator>(
    device: &Device,
    op: O,
    inputs: &[Tensor],
    reference: impl Fn(&[Vec<f64>]) -> Vec<f64>,
) -> Result<f64> {
    let exact = inputs.iter().map(f64s).collect::<Result<Vec<_>>>()?;
    let right = reference(&exact);
    // A loss is differentiated as it is, other outputs with random weights.
    let upstream = match right.len() {
        1 => Tensor::from_vec(vec![1.0], [1])?,
        n => values(77, &[n])?,
    };
    let weights = f64s(&upstream)?;
    let needed = vec![true; inputs.len()];
    let (output, grads) = device.run(move || {
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let (outputs, saved) = op.forward(device, &inputs, &needed)?;
        let first = outputs.first();
        let first = first.ok_or_else(|| Error::operand(O::NAME, "an output", "none"))?;
        let mut upstreams = vec![None; outputs.len()];
        upstreams[0] = Some(upstream.reshape(first.shape())?);
        let output = f64s(first)?;
        Ok::<_, Error>((output, op.backward(device, saved, upstreams, &needed)?))
    })?;
    let mut worst = relative_error(&output, &right);
    let loss = |inputs: &[Vec<f64>]| -> f64 {
        let products = reference(inputs).into_iter().zip(&weights);
        products.map(|(o, w)| o * w).sum()
    };
    for (i, input) in exact.iter().enumerate() {
        let grad = grads.get(i).and_then(Option::as_ref);
        let grad = grad.ok_or_else(|| Error::operand(O::NAME, "a gradient", "none"))?;
        let grad = f64s(grad)?;
        let mut moved = exact.clone();
        let (mut found, mut differences) = (Vec::new(), Vec::new());
        for entry in (0..input.len()).step_by(input.len().div_ceil(ENTRIES).max(1)) {
            let mut at = |offset: f64| {
                moved[i][entry] = input[entry] + offset;
                loss(&moved)
            };
            differences.push((at(STEP) - at(-STEP)) / (2.0 * STEP));
            at(0.0);
            found.push(grad.get(entry).copied().unwrap_or(f64::NAN));
        }
        worst = worst.max(relative_error(&found, &differences));
    }
    Ok(worst)
}
