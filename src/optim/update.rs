use crate::error::{Error, Result};
use crate::ops::math::{add_scaled, dot};
use crate::tensor::Tensor;

/// Elements of one task where a tensor is not updated row by row.
const CHUNK: usize = 1 << 14;

/// One parameter and its gradient, both f32 of one shape.
pub struct Update<'a> {
    /// What is moved.
    pub value: &'a mut Tensor,
    /// Its gradient; changed in place where `unit_rows` asks for it.
    pub grad: Tensor,
    /// The parameter's rows are directions of unit norm: the gradient's component along each
    /// row, which only changes the row's length, is taken out before the step.
    pub unit_rows: bool,
}

impl Update<'_> {
    /// Elements of one task, a whole number of rows, and the length of a row.
    pub(super) fn chunking(&self) -> (usize, usize) {
        let row = self.value.matrix_dims().1.max(1);
        ((CHUNK / row).max(1) * row, row)
    }
}

/// For each row g of `grad` and w of `value` (rows of `row` values): g −= ⟨g, w⟩ w.
#[inline(always)]
pub fn remove_parallel(grad: &mut [f32], value: &[f32], row: usize) {
    for (g, w) in grad.chunks_exact_mut(row).zip(value.chunks_exact(row)) {
        let parallel = dot(g, w);
        add_scaled(g, -parallel, w);
    }
}

/// Checks that gradients fit their parameters and the optimizer's state, where it has one yet.
pub(super) fn check(op: &'static str, updates: &[Update], state: Option<&[Tensor]>) -> Result<()> {
    if let Some(state) = state
        && state.len() != updates.len()
    {
        let expected = format!("{} parameters, as before", state.len());
        return Err(Error::operand(op, expected, format!("{}", updates.len())));
    }
    for (i, update) in updates.iter().enumerate() {
        let shape = update.value.shape();
        let state_shape = state.map_or(shape, |state| state[i].shape());
        if update.grad.shape() != shape || state_shape != shape {
            return Err(Error::operand(
                op,
                format!("gradient and state of parameter {i} of shape {shape:?}"),
                format!("{:?} and {state_shape:?}", update.grad.shape()),
            ));
        }
    }
    Ok(())
}
