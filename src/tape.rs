//! A minimal autograd tape: values, the operators that made them, and the reverse sweep. It
//! knows no operator by name.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::Operator;
use crate::tensor::Tensor;

/// A value on its way through a computation; it knows whether a gradient can reach it.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    slot: Option<Slot>,
}

/// Where a tape keeps a value's gradient.
#[derive(Clone, Copy, Debug)]
struct Slot {
    tape: u64,
    index: usize,
}

impl Var {
    /// A value that no gradient is wanted for: data, frozen weights, a detached result.
    pub fn constant(value: Tensor) -> Self {
        Self { value, slot: None }
    }

    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The value alone; the gradient's path ends here.
    pub fn into_value(self) -> Tensor {
        self.value
    }
}

type Backward = Box<dyn FnOnce(&Device, Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> + Send>;

struct Node {
    name: &'static str,
    inputs: Vec<Option<usize>>,
    outputs: std::ops::Range<usize>,
    backward: Backward,
}

/// Records operators whose inputs need gradients; everything else runs and is forgotten, so
/// that a forward pass without parameters keeps nothing.
pub struct Tape<'d> {
    device: &'d Device,
    /// A number that no other tape has.
    id: u64,
    nodes: Vec<Node>,
    slots: usize,
}

impl<'d> Tape<'d> {
    /// An empty tape.
    pub fn new(device: &'d Device) -> Self {
        static TAPES: AtomicU64 = AtomicU64::new(0);
        Self {
            device,
            id: TAPES.fetch_add(1, Ordering::Relaxed),
            nodes: Vec::new(),
            slots: 0,
        }
    }

    /// The device that operators run on.
    pub fn device(&self) -> &'d Device {
        self.device
    }

    /// A leaf whose gradient is wanted.
    pub fn parameter(&mut self, value: Tensor) -> Var {
        let index = self.new_slots(1).start;
        self.var(value, index)
    }

    fn var(&self, value: Tensor, index: usize) -> Var {
        let tape = self.id;
        Var {
            value,
            slot: Some(Slot { tape, index }),
        }
    }

    /// Where a value's gradient is kept, `None` for a constant.
    fn index_of(&self, op: &'static str, var: &Var) -> Result<Option<usize>> {
        match var.slot {
            Some(slot) if slot.tape != self.id => Err(Error::operand(
                op,
                "constants and values of one tape",
                "a value of another tape",
            )),
            slot => Ok(slot.map(|slot| slot.index)),
        }
    }

    /// Runs an operator with one output.
    pub fn apply<O: Operator>(&mut self, op: O, inputs: &[&Var]) -> Result<Var> {
        let mut outputs = self.apply_all(op, inputs)?;
        match (outputs.pop(), outputs.is_empty()) {
            (Some(output), true) => Ok(output),
            _ => Err(Error::operand(O::NAME, "one output", "another number")),
        }
    }

    /// Runs an operator; all its outputs.
    ///
    /// # Errors
    /// An input that another tape recorded, those of the operator.
    pub fn apply_all<O: Operator>(&mut self, op: O, inputs: &[&Var]) -> Result<Vec<Var>> {
        if let (Device::Cuda(cuda), false) = (self.device, O::CUDA) {
            return Err(cuda.no_kernel(O::NAME));
        }
        let recorded = inputs.iter().map(|v| self.index_of(O::NAME, v));
        let recorded = recorded.collect::<Result<Vec<_>>>()?;
        let values: Vec<&Tensor> = inputs.iter().map(|v| &v.value).collect();
        let needed: Vec<bool> = recorded.iter().map(Option::is_some).collect();
        let (outputs, saved) = op.forward(self.device, &values, &needed)?;
        if !needed.contains(&true) {
            return Ok(outputs.into_iter().map(Var::constant).collect());
        }
        let slots = self.new_slots(outputs.len());
        self.nodes.push(Node {
            name: O::NAME,
            inputs: recorded,
            outputs: slots.clone(),
            backward: Box::new(move |device, grads| op.backward(device, saved, grads, &needed)),
        });
        let outputs = outputs.into_iter().zip(slots);
        Ok(outputs.map(|(value, i)| self.var(value, i)).collect())
    }

    /// Sweeps back from the sum of `loss`'s elements with gradient `seed` (1, or the share of one
    /// micro-batch). Saved tensors are freed as the sweep passes them.
    pub fn backward(self, loss: &Var, seed: f32) -> Result<Gradients> {
        let seeds = vec![seed; loss.value.len()];
        self.backward_from(loss, Tensor::from_vec(seeds, loss.value.shape())?)
    }

    /// As [`Self::backward`] from an output whose gradient, of its shape, is known.
    ///
    /// # Errors
    /// An output that depends on no parameter or is of another tape, a gradient of another shape.
    pub fn backward_from(self, output: &Var, grad: Tensor) -> Result<Gradients> {
        let mut grads: Vec<Option<Tensor>> = vec![None; self.slots];
        match self.index_of("backward", output)? {
            Some(slot) if output.value.shape() == grad.shape() => grads[slot] = Some(grad),
            _ => {
                let expected = format!("an output of shape {:?} of a parameter", grad.shape());
                let found = format!("shape {:?}", output.value.shape());
                return Err(Error::operand("backward", expected, found));
            }
        }
        for node in self.nodes.into_iter().rev() {
            let output_grads: Vec<_> = node.outputs.map(|slot| grads[slot].take()).collect();
            if output_grads.iter().all(Option::is_none) {
                continue;
            }
            let input_grads = (node.backward)(self.device, output_grads)?;
            if input_grads.len() != node.inputs.len() {
                return Err(Error::operand(
                    node.name,
                    format!("{} input gradients", node.inputs.len()),
                    format!("{}", input_grads.len()),
                ));
            }
            for (slot, grad) in node.inputs.iter().zip(input_grads) {
                if let (&Some(slot), Some(grad)) = (slot, grad) {
                    accumulate(self.device, &mut grads[slot], grad)?;
                }
            }
        }
        let tape = self.id;
        Ok(Gradients { tape, grads })
    }

    fn new_slots(&mut self, n: usize) -> std::ops::Range<usize> {
        let start = self.slots;
        self.slots += n;
        start..self.slots
    }
}

fn accumulate(device: &Device, sum: &mut Option<Tensor>, grad: Tensor) -> Result<()> {
    match sum {
        Some(sum) => device.add_assign(sum, &grad),
        None => {
            *sum = Some(grad);
            Ok(())
        }
    }
}

/// What a reverse sweep leaves: the gradients of the parameters.
pub struct Gradients {
    tape: u64,
    grads: Vec<Option<Tensor>>,
}

impl Gradients {
    /// Takes the gradient of a parameter; `None` when the loss does not depend on it, as on one of
    /// another tape.
    pub fn take(&mut self, parameter: &Var) -> Option<Tensor> {
        let slot = parameter.slot.filter(|slot| slot.tape == self.tape)?;
        self.grads.get_mut(slot.index)?.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// z = x * y, element by element; returns z twice.
    struct Product;

    impl Operator for Product {
        type Saved = (Tensor, Tensor);
        const NAME: &'static str = "product";

        fn forward(
            &self,
            _: &Device,
            inputs: &[&Tensor],
            _: &[bool],
        ) -> Result<(Vec<Tensor>, Self::Saved)> {
            let (x, y) = (inputs[0].f32s()?, inputs[1].f32s()?);
            let z = x.iter().zip(y).map(|(x, y)| x * y).collect();
            let z = Tensor::from_vec(z, inputs[0].shape())?;
            Ok((vec![z.clone(), z], (inputs[0].clone(), inputs[1].clone())))
        }

        fn backward(
            &self,
            _: &Device,
            (x, y): Self::Saved,
            grads: Vec<Option<Tensor>>,
            needed: &[bool],
        ) -> Result<Vec<Option<Tensor>>> {
            let mut result = Vec::new();
            for (other, &needed) in [y, x].iter().zip(needed) {
                let mut sum = vec![0.0; other.len()];
                for grad in grads.iter().flatten() {
                    for ((s, g), o) in sum.iter_mut().zip(grad.f32s()?).zip(other.f32s()?) {
                        *s += g * o;
                    }
                }
                result.push(match needed {
                    true => Some(Tensor::from_vec(sum, other.shape())?),
                    false => None,
                });
            }
            Ok(result)
        }
    }

    fn scalar(v: f32) -> Tensor {
        Tensor::from_vec(vec![v], [1]).unwrap()
    }

    #[test]
    fn gradients_of_a_value_used_twice_add_up() {
        let device = Device::cpu(1).unwrap();
        let mut tape = Tape::new(&device);
        let x = tape.parameter(scalar(3.0));
        let c = Var::constant(scalar(5.0));
        // loss = (x c)(x c) = 25 x^2; the two outputs carry the same value.
        let outputs = tape.apply_all(Product, &[&x, &c]).unwrap();
        let loss = tape
            .apply_all(Product, &[&outputs[0], &outputs[1]])
            .unwrap();
        assert_eq!(loss[0].value().f32s().unwrap(), &[225.0]);
        let mut grads = tape.backward(&loss[0], 2.0).unwrap();
        assert_eq!(grads.take(&x).unwrap().f32s().unwrap(), &[2.0 * 50.0 * 3.0]);
        assert!(grads.take(&c).is_none());
    }

    #[test]
    fn nothing_is_recorded_where_no_gradient_is_wanted() {
        let device = Device::cpu(1).unwrap();
        let mut tape = Tape::new(&device);
        let c = Var::constant(scalar(5.0));
        tape.apply_all(Product, &[&c, &c]).unwrap();
        assert!(tape.nodes.is_empty());
        assert!(tape.backward(&c, 1.0).is_err());
    }

    #[test]
    fn a_value_of_another_tape_is_refused_and_has_no_gradient() {
        let device = Device::cpu(1).unwrap();
        let [mut tape, mut other] = [Tape::new(&device), Tape::new(&device)];
        let x = tape.parameter(scalar(3.0));
        let foreign = other.parameter(scalar(5.0));
        let error = tape.apply_all(Product, &[&x, &foreign]).unwrap_err();
        assert!(error.to_string().contains("another tape"), "{error}");
        let square = tape.apply_all(Product, &[&x, &x]).unwrap();
        let error = other.backward(&square[0], 1.0).err().unwrap();
        assert!(error.to_string().contains("another tape"), "{error}");
        let mut grads = tape.backward(&square[0], 1.0).unwrap();
        assert!(grads.take(&foreign).is_none());
        assert!(grads.take(&x).is_some());
    }
}
