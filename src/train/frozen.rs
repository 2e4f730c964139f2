//! The frozen model up to the hookpoints: the same computation for every batch of Stage I.

use super::inputs::batch;
use crate::data::Packed;
use crate::device::Device;
use crate::device::cuda::{Cut, Recorded};
use crate::error::Result;
use crate::model::{Layout, Qwen2};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Gives the outputs of a model's layers for rows of tokens. On a GPU the layers are recorded as
/// a CUDA graph with the first batch; batches of another size, as the last of an epoch may be,
/// go through them launch by launch, to the same bits.
pub(super) struct Frozen<'a> {
    device: &'a Device,
    model: &'a Qwen2,
    packed: &'a Packed,
    /// Ascending.
    layers: Vec<usize>,
    recorded: Option<Recorded>,
}

impl<'a> Frozen<'a> {
    /// Nothing is computed yet.
    pub(super) fn new(
        device: &'a Device,
        model: &'a Qwen2,
        packed: &'a Packed,
        layers: Vec<usize>,
    ) -> Self {
        Self {
            device,
            model,
            packed,
            layers,
            recorded: None,
        }
    }

    /// The outputs of the layers for rows of tokens, \[rows x seq_len, d\] each.
    pub(super) fn outputs(&mut self, rows: &[usize], layout: &Layout) -> Result<Vec<Tensor>> {
        let (ids, layout) = batch(self.packed, rows, layout)?;
        let x = self.model.embed(&mut Tape::new(self.device), ids)?;
        let x = x.into_value();
        let Device::Cuda(cuda) = self.device else {
            return through(self.device, self.model, &self.layers, x, &layout);
        };
        // Where each document begins is an input of the recording beside the embeddings.
        let layout = layout.on(self.device)?;
        let starts = layout.doc_starts.as_ref();
        let inputs: Vec<&Tensor> = [Some(&x), starts].into_iter().flatten().collect();
        let recorded = match &mut self.recorded {
            Some(recorded) => recorded,
            empty => {
                let (model, layers) = (self.model, &self.layers);
                let work = |device: &Device, inputs: &[Tensor], _: Cut| {
                    let layout = layout.with_batch(layout.batch, inputs.get(1).cloned());
                    through(device, model, layers, inputs[0].clone(), &layout)
                };
                empty.insert(cuda.record(&inputs, work)?)
            }
        };
        match recorded.fits(&inputs) {
            true => recorded.run(cuda, &inputs),
            false => through(self.device, self.model, &self.layers, x, &layout),
        }
    }
}

/// The outputs of `layers` for embeddings `x`, in one pass that ends at the last.
fn through(
    device: &Device,
    model: &Qwen2,
    layers: &[usize],
    x: Tensor,
    layout: &Layout,
) -> Result<Vec<Tensor>> {
    let mut tape = Tape::new(device);
    let (mut x, mut next, mut outputs) = (Var::constant(x), 0, Vec::new());
    for &layer in layers {
        x = model.decode(&mut tape, x, next..layer + 1, layout, None)?;
        next = layer + 1;
        outputs.push(x.value().clone());
    }
    Ok(outputs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::testing::model;

    const SEQ_LEN: usize = 24;

    /// Eight rows, with a second document from somewhere in the row on where there are documents.
    fn packed(documents: bool) -> Packed {
        let tokens = (0..8 * SEQ_LEN as u32).map(|i| i * i % 37);
        let starts = (0..8).flat_map(|row| {
            let begin = 3 + row;
            (0..SEQ_LEN).map(move |i| if i < begin { 0 } else { begin as u32 })
        });
        Packed {
            tokens: tokens.collect(),
            answer_mask: vec![true; 8 * SEQ_LEN],
            doc_starts: documents.then(|| starts.collect()),
            seq_len: SEQ_LEN,
        }
    }

    #[test]
    fn recorded_layers_give_the_bits_of_launches_one_by_one_and_allocate_nothing_in_the_long_run() {
        let Some(cuda) = crate::device::CudaDevice::for_tests(1) else {
            return;
        };
        let device = Device::Cuda(cuda.clone());
        let mut model = model();
        model.upload(&cuda, 0..3, false).unwrap();
        for documents in [false, true] {
            let packed = packed(documents);
            let layout = Layout::new(&model.config, 2, SEQ_LEN).unwrap();
            let mut frozen = Frozen::new(&device, &model, &packed, vec![0, 2]);
            let mut reserved = Vec::new();
            for rows in [[0, 1], [5, 2], [3, 3], [7, 6]] {
                // The last batch of an epoch is smaller.
                for rows in [&rows[..], &rows[..1]] {
                    let got = frozen.outputs(rows, &layout).unwrap();
                    let (ids, layout) = batch(&packed, rows, &layout).unwrap();
                    let x = model.embed(&mut Tape::new(&device), ids).unwrap();
                    let want = through(&device, &model, &[0, 2], x.into_value(), &layout).unwrap();
                    assert_eq!(got.len(), 2);
                    for (got, want) in got.iter().zip(&want) {
                        let [got, want] = [got, want].map(|t| t.to_f32().unwrap());
                        assert_eq!(got.f32s().unwrap(), want.f32s().unwrap(), "{rows:?}");
                    }
                }
                reserved.push(cuda.reserved_memory());
            }
            assert!(frozen.recorded.is_some());
            assert_eq!(reserved[1..3], reserved[2..4]);
        }
    }
}
