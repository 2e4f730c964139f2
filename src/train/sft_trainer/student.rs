//! The student's pass of Stage II: forward, loss and backward of a micro-batch.

use std::ops::Range;

use crate::device::Device;
use crate::device::cuda::{Cut, Recorded};
use crate::error::{Error, Result};
use crate::model::{Adapters, Layout, Lora, Qwen2, Sae, StepDropout};
use crate::ops::cross_entropy::CrossEntropy;
use crate::ops::kl_div::KlDiv;
use crate::tape::{Tape, Var};
use crate::tensor::{DType, Tensor};

/// Where the student's forward pass begins.
pub enum Student<'a> {
    /// At the SAE's reconstruction \[T, d\] of layer `layer`'s output: no gradient passes the SAE.
    Reconstruction { x: Tensor, layer: usize },
    /// At the token ids, through an SAE that gradients pass.
    ThroughSae {
        ids: Tensor,
        sae: &'a Sae,
        layer: usize,
    },
    /// At the token ids, without an SAE.
    Plain { ids: Tensor },
}

/// What the student is to match.
pub enum Target {
    /// The teacher's hidden states \[T, d\] after the final norm; the KL divergence of the logits
    /// is summed over tokens and divided by `batch`.
    Teacher { hidden: Tensor, batch: f32 },
    /// The next tokens, where they count.
    Tokens(Vec<Option<u32>>),
}

/// A part of a step whose gradients are computed at once.
pub struct MicroBatch<'a> {
    /// How the tokens lie.
    pub layout: Layout,
    /// What is computed.
    pub student: Student<'a>,
    /// What it is compared with.
    pub target: Target,
}

/// Computes losses and the gradients of adapters. On a GPU the pass from a reconstruction to a
/// teacher's hidden states, which is the same launches each time, is recorded as a CUDA graph;
/// micro-batches with fewer tokens, as the last of an epoch may be, go launch by launch, to the
/// same bits.
pub(super) struct StudentPass<'a> {
    device: &'a Device,
    model: &'a Qwen2,
    /// The layers whose adapters are trained.
    layers: Range<usize>,
    /// Whether what can be recorded is.
    pub(super) records: bool,
    recording: Option<Recording>,
    /// Gradients of the last micro-batch, where it was not that of the recording.
    own: Vec<Tensor>,
}

/// A recorded pass. Its inputs are the reconstruction, the teacher's hidden states, the gradients
/// of the losses, the number for the dropout, and where each document begins; its outputs the
/// losses and the gradients.
struct Recording {
    graph: Recorded,
    /// The layer whose output is reconstructed.
    layer: usize,
    /// How the tokens lie; the launches read its table of angles.
    layout: Layout,
    /// Where the launches read A and B: the optimizer changes them in place.
    factors: Vec<u64>,
}

impl<'a> StudentPass<'a> {
    /// Nothing is computed yet. `layers` are those whose adapters are trained.
    pub(super) fn new(device: &'a Device, model: &'a Qwen2, layers: Range<usize>) -> Self {
        Self {
            device,
            model,
            layers,
            records: true,
            recording: None,
            own: Vec::new(),
        }
    }

    /// The loss of a micro-batch; the gradients of `share` times it are left in
    /// [`Self::gradients`], A's and B's of each trained adapter in the order of `lora`.
    ///
    /// # Errors
    /// Those of the operators; a loss that is not finite.
    pub(super) fn run(
        &mut self,
        lora: &Lora,
        micro: MicroBatch,
        dropout: StepDropout,
        share: f32,
    ) -> Result<f64> {
        self.own.clear();
        let (batch, losses, name) = match &micro.target {
            Target::Teacher { batch, .. } => (*batch, micro.layout.tokens(), "KL divergence"),
            Target::Tokens(_) => (1.0, 1, "cross-entropy"),
        };
        let seeds = Tensor::from_vec(vec![share / batch; losses], [losses])?;
        let losses = match self.run_recorded(lora, &micro, &dropout, &seeds)? {
            Some(losses) => losses,
            None => {
                let sweep = Sweep {
                    device: self.device,
                    model: self.model,
                    layers: self.layers.clone(),
                    lora,
                    dropout,
                };
                let (losses, grads) = sweep.run(micro, seeds, &|| Ok(()))?;
                self.own = grads;
                losses.to_f32()?
            }
        };
        let sum: f64 = losses.f32s()?.iter().map(|&v| f64::from(v)).sum();
        let loss = (sum / f64::from(batch)) as f32;
        match loss.is_finite() {
            true => Ok(loss.into()),
            false => Err(Error::NotFinite {
                what: format!("the {name} is {loss}"),
            }),
        }
    }

    /// The losses, where the micro-batch is one for the recording.
    fn run_recorded(
        &mut self,
        lora: &Lora,
        micro: &MicroBatch,
        dropout: &StepDropout,
        seeds: &Tensor,
    ) -> Result<Option<Tensor>> {
        let (
            Device::Cuda(cuda),
            &Student::Reconstruction { ref x, layer },
            Target::Teacher { hidden, batch },
        ) = (self.device, &micro.student, &micro.target)
        else {
            return Ok(None);
        };
        if !self.records {
            return Ok(None);
        }
        let layout = micro.layout.clone().on(self.device)?;
        let tokens = layout.tokens();
        let x = cuda.resident(x, DType::Bf16)?;
        let hidden = cuda.resident(hidden, DType::Bf16)?;
        let number = [dropout.step as u32, (dropout.step >> 32) as u32];
        let number = Tensor::from_u32(number.to_vec(), [2])?;
        let inputs = [&x, &hidden, seeds, &number];
        let inputs: Vec<&Tensor> = inputs.into_iter().chain(&layout.doc_starts).collect();
        let factors = self.addresses(lora);
        if let Some(recording) = &self.recording {
            // A recording of fewer tokens was of an epoch's last micro-batch.
            let is_small = recording.layout.tokens() < tokens;
            if is_small || recording.factors != factors {
                self.recording = None;
            }
        }
        let recording = match &mut self.recording {
            Some(recording) => recording,
            empty => {
                let work = |device: &Device, inputs: &[Tensor], cut: Cut| {
                    let sweep = Sweep {
                        device,
                        model: self.model,
                        layers: self.layers.clone(),
                        lora,
                        dropout: StepDropout {
                            in_memory: inputs.get(3).cloned(),
                            ..dropout.clone()
                        },
                    };
                    let micro = MicroBatch {
                        layout: layout.with_batch(layout.batch, inputs.get(4).cloned()),
                        student: Student::Reconstruction {
                            x: inputs[0].clone(),
                            layer,
                        },
                        target: Target::Teacher {
                            hidden: inputs[1].clone(),
                            batch: *batch,
                        },
                    };
                    let (losses, grads) = sweep.run(micro, inputs[2].clone(), cut)?;
                    Ok([vec![losses], grads].concat())
                };
                empty.insert(Recording {
                    graph: cuda.record(&inputs, work)?,
                    layer,
                    layout: layout.clone(),
                    factors,
                })
            }
        };
        let fits = recording.layer == layer
            && recording.layout.is_like(&layout)
            && recording.graph.fits(&inputs);
        match fits {
            true => Ok(Some(recording.graph.launch(&inputs)?[0].to_f32()?)),
            false => Ok(None),
        }
    }

    /// Where A and B of each adapter are.
    fn addresses(&self, lora: &Lora) -> Vec<u64> {
        let pairs = lora.pairs.values().flat_map(|pair| [&pair.a, &pair.b]);
        let address = |t: &Tensor| t.cuda().map_or(0, |buffer| buffer.address());
        pairs.map(address).collect()
    }

    /// The gradients of the last micro-batch, to be written to at will until the next.
    pub(super) fn gradients(&mut self) -> &mut [Tensor] {
        match &mut self.recording {
            Some(recording) if self.own.is_empty() => {
                let outputs = recording.graph.outputs();
                outputs.get_mut(1..).unwrap_or_default()
            }
            _ => &mut self.own,
        }
    }

    /// The same to be read, where they are shared until the next micro-batch.
    pub(super) fn take_gradients(&mut self) -> Vec<Tensor> {
        match self.own.is_empty() {
            true => self.gradients().to_vec(),
            false => std::mem::take(&mut self.own),
        }
    }

    /// Adds the gradients of the last micro-batch to `sums`; they are the first where that is
    /// empty.
    pub(super) fn add_gradients(&mut self, sums: &mut Vec<Tensor>) -> Result<()> {
        let device = self.device;
        match (sums.is_empty(), device) {
            (true, Device::Cuda(cuda)) if self.own.is_empty() => {
                let grads = self.gradients().iter();
                *sums = grads.map(|t| cuda.copied(t)).collect::<Result<_>>()?;
            }
            (true, _) => *sums = self.take_gradients(),
            (false, _) => {
                for (sum, grad) in sums.iter_mut().zip(self.gradients()) {
                    device.add_assign(sum, grad)?;
                }
            }
        }
        Ok(())
    }
}

/// What a pass needs besides a micro-batch.
struct Sweep<'s> {
    device: &'s Device,
    model: &'s Qwen2,
    layers: Range<usize>,
    lora: &'s Lora,
    dropout: StepDropout,
}

impl Sweep<'_> {
    /// The losses, and the gradients of A and B of each adapter where `seeds` are theirs. `cut` is
    /// called where a GPU has work for as long as the launch of the rest takes.
    fn run(self, micro: MicroBatch, seeds: Tensor, cut: Cut) -> Result<(Tensor, Vec<Tensor>)> {
        let mut tape = Tape::new(self.device);
        let adapters = Adapters::trained(&mut tape, self.lora, self.layers, Some(self.dropout));
        let hidden = forward(
            &mut tape,
            self.model,
            &micro.layout,
            micro.student,
            &adapters,
            cut,
        )?;
        let hidden = self.model.final_norm(&mut tape, &hidden)?;
        let head = self.model.lm_head.clone();
        let loss = match micro.target {
            Target::Teacher {
                hidden: teacher, ..
            } => tape.apply(KlDiv { teacher, head }, &[&hidden])?,
            Target::Tokens(targets) => tape
                .apply_all(CrossEntropy { targets, head }, &[&hidden])?
                .swap_remove(0),
        };
        drop(hidden);
        let losses = loss.value().clone();
        let mut grads = tape.backward_from(&loss, seeds)?;
        let mut factors = Vec::new();
        for ((layer, module), (a, b)) in adapters.parameters() {
            for factor in [a, b] {
                factors.push(grads.take(factor).ok_or_else(|| {
                    let name = format!("a gradient of layer {layer}'s {}", module.name());
                    Error::operand("lora", name, "none")
                })?);
            }
        }
        Ok((losses, factors))
    }
}

/// The student's hidden states before the final norm.
fn forward(
    tape: &mut Tape,
    model: &Qwen2,
    layout: &Layout,
    student: Student,
    adapters: &Adapters,
    cut: Cut,
) -> Result<Var> {
    /// Layers before the cut.
    const FIRST: usize = 2;
    let layers = model.layers.len();
    match student {
        Student::Reconstruction { x, layer } => {
            let (first, adapters) = (layer + 1, Some(adapters));
            let rest = (first + FIRST).min(layers);
            let x = model.decode(tape, Var::constant(x), first..rest, layout, adapters)?;
            cut()?;
            model.decode(tape, x, rest..layers, layout, adapters)
        }
        Student::ThroughSae { ids, sae, layer } => {
            let x = model.embed(tape, ids)?;
            let x = model.decode(tape, x, 0..layer + 1, layout, Some(adapters))?;
            let x = sae.pass_through(tape, &x)?;
            model.decode(tape, x, layer + 1..layers, layout, Some(adapters))
        }
        Student::Plain { ids } => {
            let x = model.embed(tape, ids)?;
            model.decode(tape, x, 0..layers, layout, Some(adapters))
        }
    }
}
