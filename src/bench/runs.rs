//! What is run again and again to be measured.

use std::collections::VecDeque;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::Operator;
use crate::optim::{AdamW, AdamWConfig, Update, clip_grad_norm, signum::Signum};
use crate::tensor::Tensor;

use super::work::Pass;

/// Something that is prepared, untimed, then run, timed.
pub(super) trait Run: Send {
    /// Brings the next operands.
    fn prepare(&mut self, device: &Device) -> Result<()>;
    /// What is measured.
    fn run(&mut self, device: &Device) -> Result<()>;
}

/// Operands of one call of an operator.
pub(super) struct Set {
    /// What the operator holds: frozen weights, indices.
    pub fixed: Vec<Tensor>,
    /// What it is called with.
    pub inputs: Vec<Tensor>,
    /// Gradients of its outputs, as many as are differentiated.
    pub upstream: Vec<Tensor>,
}

/// Makes an operator of what it holds.
type Make<O> = Box<dyn Fn(&[Tensor]) -> Result<O> + Send>;

/// An operator over operands that take turns, and outputs that do too, so that none of them is in
/// the caches of the CPU when its turn comes.
pub(super) struct OperatorRun<O: Operator> {
    make: Make<O>,
    sets: Vec<Set>,
    pass: Pass,
    needed: Vec<bool>,
    /// The set whose forward pass is next.
    next: usize,
    /// Forward passes whose backward is to come: operator, what it saved, upstream gradients.
    saved: VecDeque<(O, O::Saved, Vec<Option<Tensor>>)>,
    /// Results, kept for a round.
    results: VecDeque<Vec<Tensor>>,
}

impl<O: Operator> OperatorRun<O> {
    /// `needed` says which inputs get gradients in training.
    pub(super) fn new(
        pass: Pass,
        needed: &[bool],
        sets: Vec<Set>,
        make: impl Fn(&[Tensor]) -> Result<O> + Send + 'static,
    ) -> Self {
        Self {
            make: Box::new(make),
            sets,
            pass,
            needed: match pass {
                Pass::Forward => vec![false; needed.len()],
                _ => needed.to_vec(),
            },
            next: 0,
            saved: VecDeque::new(),
            results: VecDeque::new(),
        }
    }

    fn forward(&mut self, device: &Device) -> Result<(O, Vec<Tensor>, O::Saved, usize)> {
        let index = self.next;
        self.next = (index + 1) % self.sets.len();
        let set = &self.sets[index];
        let op = (self.make)(&set.fixed)?;
        let inputs: Vec<&Tensor> = set.inputs.iter().collect();
        let (outputs, saved) = op.forward(device, &inputs, &self.needed)?;
        Ok((op, outputs, saved, index))
    }

    fn keep(&mut self, results: Vec<Tensor>) {
        self.results.push_back(results);
    }
}

impl<O: Operator> Run for OperatorRun<O> {
    fn prepare(&mut self, device: &Device) -> Result<()> {
        if let (Device::Cuda(cuda), false) = (device, O::CUDA) {
            return Err(cuda.no_kernel(O::NAME));
        }
        while self.results.len() >= self.sets.len() {
            self.results.pop_front();
        }
        while self.pass == Pass::Backward && self.saved.len() < self.sets.len() {
            let (op, outputs, saved, set) = self.forward(device)?;
            let given = self.sets[set].upstream.iter();
            let mut upstream = given
                .map(|grad| own(device, grad).map(Some))
                .collect::<Result<Vec<_>>>()?;
            upstream.resize(outputs.len(), None);
            self.saved.push_back((op, saved, upstream));
        }
        Ok(())
    }

    fn run(&mut self, device: &Device) -> Result<()> {
        let results = match self.pass {
            Pass::Backward => {
                let (op, saved, upstream) = self.saved.pop_front().ok_or_else(unprepared)?;
                let grads = op.backward(device, saved, upstream, &self.needed)?;
                grads.into_iter().flatten().collect()
            }
            _ => self.forward(device)?.1,
        };
        self.keep(results);
        Ok(())
    }
}

fn unprepared() -> Error {
    Error::operand("bench-kernels", "a prepared pass", "none")
}

/// A copy that its user may overwrite in place. On a GPU operators write elsewhere.
fn own(device: &Device, tensor: &Tensor) -> Result<Tensor> {
    match device {
        Device::Cuda(_) => Ok(tensor.clone()),
        Device::Cpu(_) => {
            let mut copy = device.buffer(tensor.len());
            copy.copy_from_slice(tensor.f32s()?);
            Tensor::from_buffer(copy, tensor.shape())
        }
    }
}

/// The optimizers, and clipping as the first part of their step.
pub(super) enum Optimizer {
    AdamW(Box<AdamW>),
    Signum(Signum),
    /// The largest norm that is let through.
    Clip(f64),
}

/// A step of an optimizer.
pub(super) struct OptimizerRun {
    optimizer: Optimizer,
    values: Vec<Tensor>,
    grads: Vec<Tensor>,
    /// A copy of the gradients that the next step of an optimizer may change.
    prepared: Vec<Tensor>,
}

impl OptimizerRun {
    pub(super) fn adamw(values: Vec<Tensor>, grads: Vec<Tensor>) -> Result<Self> {
        let adamw = AdamW::new(AdamWConfig::default(), &values)?;
        Ok(Self::new(Optimizer::AdamW(Box::new(adamw)), values, grads))
    }

    pub(super) fn new(optimizer: Optimizer, values: Vec<Tensor>, grads: Vec<Tensor>) -> Self {
        Self {
            optimizer,
            values,
            grads,
            prepared: Vec::new(),
        }
    }
}

impl Run for OptimizerRun {
    fn prepare(&mut self, device: &Device) -> Result<()> {
        if !matches!(self.optimizer, Optimizer::Clip(_)) {
            let grads = self.grads.iter().map(|grad| own(device, grad));
            self.prepared = grads.collect::<Result<_>>()?;
        }
        Ok(())
    }

    fn run(&mut self, device: &Device) -> Result<()> {
        let unit_rows = matches!(self.optimizer, Optimizer::Signum(_));
        if let Optimizer::Clip(limit) = &mut self.optimizer {
            // In place, as in training: gradients that somebody else holds would be copied first.
            let mut grads: Vec<_> = self.grads.iter_mut().collect();
            clip_grad_norm(device, &mut grads, *limit)?;
            // They are scaled in the next step too.
            *limit *= 0.999;
            return Ok(());
        }
        let grads = std::mem::take(&mut self.prepared);
        let updates = self.values.iter_mut().zip(grads);
        let updates = updates.map(|(value, grad)| Update {
            value,
            grad,
            unit_rows,
        });
        match &mut self.optimizer {
            Optimizer::AdamW(adamw) => adamw.step(device, 1e-4, updates.collect()),
            Optimizer::Signum(signum) => signum.step(device, updates.collect()),
            Optimizer::Clip(_) => Ok(()),
        }
    }
}

/// Something that computes a tensor.
type Call = Box<dyn FnMut(&Device) -> Result<Tensor> + Send>;

/// Calls that take turns, each with operands of its own, whose results are kept for a round.
pub(super) struct Calls {
    calls: Vec<Call>,
    next: usize,
    results: VecDeque<Tensor>,
}

impl Calls {
    pub(super) fn new(calls: Vec<Call>) -> Self {
        Self {
            calls,
            next: 0,
            results: VecDeque::new(),
        }
    }
}

impl Run for Calls {
    fn prepare(&mut self, _: &Device) -> Result<()> {
        self.next = (self.next + 1) % self.calls.len();
        while self.results.len() >= self.calls.len() {
            self.results.pop_front();
        }
        Ok(())
    }

    fn run(&mut self, device: &Device) -> Result<()> {
        let result = (self.calls[self.next])(device)?;
        self.results.push_back(result);
        Ok(())
    }
}

/// Runs that take turns, each with operands of its own.
pub(super) struct InTurn {
    runs: Vec<OptimizerRun>,
    next: usize,
}

impl InTurn {
    pub(super) fn new(runs: Vec<OptimizerRun>) -> Self {
        Self { runs, next: 0 }
    }
}

impl Run for InTurn {
    fn prepare(&mut self, device: &Device) -> Result<()> {
        self.next = (self.next + 1) % self.runs.len();
        self.runs[self.next].prepare(device)
    }

    fn run(&mut self, device: &Device) -> Result<()> {
        self.runs[self.next].run(device)
    }
}
