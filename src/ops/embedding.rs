//! Token embedding: row t of the output is row ids\[t\] of the table, as f32.
//!
//! ids: \[T\] u32; table: \[V, d\], any float type, possibly memory-mapped; output: \[T, d\] f32.
//! Saved: the table's shape. Backward adds each row's gradient to its table row in the order of
//! the tokens. Least traffic: T d values in, as many out.

use rayon::prelude::*;

use super::{Operator, expect_inputs, expect_shape, only_grad};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Looks up the rows of the token ids: one input, the table [V, d]; one output [T, d].
pub struct Embedding {
    /// \[T\] u32, each below V.
    pub ids: Tensor,
}

impl Operator for Embedding {
    /// Shape of the table.
    type Saved = [usize; 2];
    const NAME: &'static str = "embedding";

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        _: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)> {
        let [table] = expect_inputs(Self::NAME, inputs)?;
        let &[vocab, d] = table.shape() else {
            return Err(Error::operand(
                Self::NAME,
                "a table of shape [vocabulary, d]",
                format!("shape {:?}", table.shape()),
            ));
        };
        let ids = self.ids.u32s()?;
        if let Some((t, id)) = ids
            .iter()
            .enumerate()
            .find(|(_, id)| **id as usize >= vocab)
        {
            return Err(Error::operand(
                Self::NAME,
                format!("token ids below {vocab}"),
                format!("id {id} at position {t}"),
            ));
        }
        let mut rows = device.buffer(ids.len() * d);
        match device {
            Device::Cpu(_) => rows
                .par_chunks_mut(d.max(1))
                .zip(ids)
                .try_for_each(|(row, &id)| table.read_f32(id as usize * d, row))?,
        }
        let rows = Tensor::from_buffer(rows, [ids.len(), d])?;
        Ok((vec![rows], [vocab, d]))
    }

    fn backward(
        &self,
        device: &Device,
        [vocab, d]: Self::Saved,
        grads: Vec<Option<Tensor>>,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let grad = only_grad(Self::NAME, grads)?;
        let ids = self.ids.u32s()?;
        expect_shape(Self::NAME, &grad, &[ids.len(), d])?;
        let mut dtable = device.zeroed(vocab * d);
        match device {
            Device::Cpu(_) => {
                for (&id, grad) in ids.iter().zip(grad.f32s()?.chunks_exact(d.max(1))) {
                    let row = &mut dtable[id as usize * d..][..d];
                    row.iter_mut().zip(grad).for_each(|(r, g)| *r += g);
                }
            }
        }
        Ok(vec![Some(Tensor::from_buffer(dtable, [vocab, d])?)])
    }
}
