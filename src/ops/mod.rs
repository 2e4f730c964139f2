//! The operators. Each file is one stem: signature and checks, the CPU version, backward. A
//! differentiable operator implements [`Operator`], whose one trait holds forward and backward,
//! so that an operator without a gradient does not compile.

pub mod cross_entropy;
pub mod decode;
pub mod embedding;
pub mod flash_attention;
pub mod fvu;
pub mod gemm;
pub(crate) mod head;
pub mod kl_div;
pub mod lora;
pub(crate) mod math;
pub mod rmsnorm;
pub mod rope;
pub mod sample;
pub mod sparse_decode;
pub(crate) mod stored;
pub mod swiglu;
pub mod topk;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// A differentiable function of tensors.
///
/// What does not change with training (frozen weights, sizes, indices) are fields of the
/// implementing struct; what a gradient may be wanted for comes in `inputs`.
pub trait Operator: Send + 'static {
    /// What forward keeps for backward.
    type Saved: Send + 'static;

    /// The stem's name, for messages.
    const NAME: &'static str;

    /// Whether the operator runs on a CUDA device; the tape refuses it there otherwise.
    const CUDA: bool = false;

    /// Computes the outputs. `needed[i]` says whether backward will be asked for the gradient
    /// of input i; where none is, what is saved is dropped at once.
    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        needed: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)>;

    /// The gradients of the inputs, given those of the outputs (`None` where an output did not
    /// contribute to the loss): one entry per input, `None` where not needed.
    fn backward(
        &self,
        device: &Device,
        saved: Self::Saved,
        grads: Vec<Option<Tensor>>,
        needed: &[bool],
    ) -> Result<Vec<Option<Tensor>>>;
}

/// An error unless `tensor` seen as a matrix has `cols` columns.
pub(crate) fn expect_cols(op: &'static str, tensor: &Tensor, cols: usize) -> Result<()> {
    if tensor.shape().last() == Some(&cols) {
        return Ok(());
    }
    Err(Error::operand(
        op,
        format!("a last extent of {cols}"),
        format!("shape {:?}", tensor.shape()),
    ))
}

/// An error unless `tensor` has exactly this shape.
pub(crate) fn expect_shape(op: &'static str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
    if tensor.shape() == shape {
        return Ok(());
    }
    Err(Error::operand(
        op,
        format!("shape {shape:?}"),
        format!("shape {:?}", tensor.shape()),
    ))
}

/// The inputs as an array of the number the operator takes.
pub(crate) fn expect_inputs<'a, const N: usize>(
    op: &'static str,
    inputs: &[&'a Tensor],
) -> Result<[&'a Tensor; N]> {
    inputs
        .try_into()
        .map_err(|_| Error::operand(op, format!("{N} inputs"), format!("{}", inputs.len())))
}

/// The only gradient of an operator with one output; an error when nothing flowed into it.
pub(crate) fn only_grad(op: &'static str, grads: Vec<Option<Tensor>>) -> Result<Tensor> {
    grads
        .into_iter()
        .next()
        .flatten()
        .ok_or_else(|| Error::operand(op, "a gradient of the output", "none"))
}
