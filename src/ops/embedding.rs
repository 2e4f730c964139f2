//! Token embedding: row t of the output is row ids\[t\] of the table, as f32.
//!
//! ids: \[T\] u32; table: \[V, d\], any float type, possibly memory-mapped; output: \[T, d\] f32,
//! bf16 on CUDA, where the table's gradient is f32.
//! Saved: the table's shape. Backward adds each row's gradient to its table row in the order of
//! the tokens; for a GPU the host sorts the tokens by id before. Least traffic: T d values in, as many out.

use rayon::prelude::*;

use super::{Operator, expect_inputs, expect_shape, only_grad};
use crate::device::cuda::{Arg, Grid, Kernel};
use crate::device::{CudaDevice, Device};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Looks up the rows of the token ids: one input, the table [V, d]; one output [T, d].
pub struct Embedding {
    /// \[T\] u32, each below V.
    pub ids: Tensor,
}

impl Operator for Embedding {
    /// Shape of the table.
    type Saved = [usize; 2];
    const NAME: &'static str = "embedding";
    const CUDA: bool = true;

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
        let rows = match device {
            Device::Cpu(_) => {
                let mut rows = device.buffer(ids.len() * d);
                rows.par_chunks_mut(d.max(1))
                    .zip(ids)
                    .try_for_each(|(row, &id)| table.read_f32(id as usize * d, row))?;
                Tensor::from_buffer(rows, [ids.len(), d])?
            }
            Device::Cuda(cuda) => self.forward_cuda(cuda, table, d)?,
        };
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
        let dtable = match device {
            Device::Cpu(_) => {
                let mut dtable = device.zeroed(vocab * d);
                for (&id, grad) in ids.iter().zip(grad.f32s()?.chunks_exact(d.max(1))) {
                    let row = &mut dtable[id as usize * d..][..d];
                    row.iter_mut().zip(grad).for_each(|(r, g)| *r += g);
                }
                Tensor::from_buffer(dtable, [vocab, d])?
            }
            Device::Cuda(cuda) => self.backward_cuda(cuda, &grad, [vocab, d])?,
        };
        Ok(vec![Some(dtable)])
    }
}

const FORWARD: Kernel = Kernel {
    stem: "embedding",
    function: "embedding_forward_bf16",
};
const BACKWARD: Kernel = Kernel {
    stem: "embedding",
    function: "embedding_backward_bf16",
};
const THREADS: u32 = 256;

impl Embedding {
    fn forward_cuda(&self, cuda: &CudaDevice, table: &Tensor, d: usize) -> Result<Tensor> {
        let tokens = self.ids.len();
        let table = cuda.resident(table, DType::Bf16)?;
        let ids = cuda.resident(&self.ids, DType::U32)?;
        let rows = cuda.alloc(DType::Bf16, tokens * d)?;
        let args = [
            Arg::from(&rows),
            table.arg()?,
            ids.arg()?,
            Arg::size(Self::NAME, d)?,
        ];
        // SAFETY: one block a token writes its row of the [tokens, d] bf16 output from the bf16
        // table, whose rows the caller has checked every id to be one of.
        unsafe { cuda.launch(FORWARD, Grid::of_blocks(tokens, THREADS, 0), &args) }?;
        Tensor::from_cuda(rows, [tokens, d])
    }

    /// The gradient of the table, in f32.
    fn backward_cuda(
        &self,
        cuda: &CudaDevice,
        grad: &Tensor,
        [vocab, d]: [usize; 2],
    ) -> Result<Tensor> {
        let [groups, tokens] = grouped(self.ids.u32s()?)?;
        let grad = cuda.resident(grad, DType::Bf16)?;
        let blocks = groups.len() - 1;
        let ids = cuda.resident(&self.ids, DType::U32)?;
        let groups = cuda.resident(&groups, DType::U32)?;
        let tokens = cuda.resident(&tokens, DType::U32)?;
        let mut dtable = cuda.alloc(DType::F32, vocab * d)?;
        dtable.clear()?;
        let args = [
            Arg::from(&dtable),
            grad.arg()?,
            ids.arg()?,
            groups.arg()?,
            tokens.arg()?,
            Arg::size(Self::NAME, d)?,
        ];
        let grid = Grid::of_blocks(blocks, THREADS, 0);
        // SAFETY: the gradient is [tokens, d] bf16 (checked by the caller), the table [vocab, d]
        // f32, and the forward pass has checked every id to be below vocab; `groups` lie in
        // `tokens`, which are those of the gradient's rows.
        unsafe { cuda.launch(BACKWARD, grid, &args) }?;
        Tensor::from_cuda(dtable, [vocab, d])
    }
}

/// The positions of the ids sorted by id, equal ones in their order, and before them where the
/// positions of each id that occurs begin, ended by the number of all.
fn grouped(ids: &[u32]) -> Result<[Tensor; 2]> {
    let len = u32::try_from(ids.len())
        .map_err(|_| Error::operand(Embedding::NAME, "below 2^32 ids", format!("{}", ids.len())))?;
    let mut positions: Vec<u32> = (0..len).collect();
    positions.sort_by_key(|&t| ids[t as usize]);
    let mut starts: Vec<u32> = Vec::new();
    let mut last = None;
    for (start, &t) in (0..).zip(&positions) {
        let id = ids[t as usize];
        if last.replace(id) != Some(id) {
            starts.push(start);
        }
    }
    starts.push(len);
    let vector = |v: Vec<u32>| {
        let len = v.len();
        Tensor::from_u32(v, [len])
    };
    Ok([vector(starts)?, vector(positions)?])
}
