//! Many f32 tensors in one launch, as `kernels/common/multi_tensor.cuh` takes them: a table says
//! which block works on which part of which tensor (as Apex's `multi_tensor_apply` does).

use super::update::Update;
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE_F32};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

const THREADS: u32 = 256;
/// Values of one block where a tensor is not updated row by row.
const SPAN: usize = 8192;
/// Values of a row that are kept in shared memory: with as many of its gradient they fit what
/// every launch may have, 48 KiB, less what the block itself needs.
const KEPT: usize = 6080;

/// One tensor of a launch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slot {
    /// Device addresses of the value, its gradient and two states; 0 where there is none.
    pub(super) pointers: [u64; 4],
    /// Number of values.
    pub(super) len: usize,
    /// The length of a row where each is a unit vector, else 0.
    pub(super) row: usize,
}

/// The table of a launch, uploaded again only where a tensor has moved since the last one.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    words: Vec<u64>,
    uploaded: Option<Tensor>,
}

impl Table {
    /// Launches `kernel` over the tensors with the table, their number and then `args`.
    ///
    /// # Safety
    /// Every address must lead to as many f32 of this device as the slot says, those that the
    /// kernel writes to nobody else's, and `args` must be the kernel's arguments from the third
    /// on (from the second, where `before` is the first).
    pub(super) unsafe fn launch(
        &mut self,
        cuda: &CudaDevice,
        kernel: Kernel,
        slots: &[Slot],
        before: Option<Arg>,
        args: &[Arg],
    ) -> Result<()> {
        let words = words(slots);
        let current = self.uploaded.take().filter(|t| cuda.holds(t));
        let table = match current.filter(|_| self.words == words) {
            Some(table) => table,
            None => {
                let halves = bytemuck::cast_slice::<u64, u32>(&words).to_vec();
                let len = halves.len();
                cuda.resident(&Tensor::from_u32(halves, [len])?, DType::U32)?
            }
        };
        self.words = words;
        let mut all: Vec<Arg> = before.into_iter().collect();
        all.extend([table.arg()?, Arg::size(kernel.stem, slots.len())?]);
        all.extend(args);
        let grid = Grid::of_blocks(blocks(slots), THREADS, 2 * kept(slots) * size_of::<f32>());
        // SAFETY: the table is laid out as the kernel expects it; the caller vouches for the
        // addresses and for what else the kernel takes.
        unsafe { cuda.launch(kernel, grid, &all) }?;
        self.uploaded = Some(table);
        Ok(())
    }

    /// One step of an optimizer whose kernel takes the table, the number of tensors, the values
    /// of a row kept in shared memory and then `args`. Values and states become f32 in memory of
    /// this device that nobody shares.
    pub(super) fn step<const STATES: usize>(
        &mut self,
        cuda: &CudaDevice,
        kernel: Kernel,
        updates: &mut [Update],
        mut states: [&mut [Tensor]; STATES],
        args: &[Arg],
    ) -> Result<()> {
        let mut slots = Vec::with_capacity(updates.len());
        for (i, update) in updates.iter_mut().enumerate() {
            update.grad = cuda.resident(&update.grad, DType::F32)?;
            cuda.own(update.value)?;
            let mut pointers = [address(update.value), address(&update.grad), 0, 0];
            for (states, pointer) in states.iter_mut().zip(&mut pointers[2..]) {
                cuda.own(&mut states[i])?;
                *pointer = address(&states[i]);
            }
            let row = update.value.matrix_dims().1;
            slots.push(Slot {
                pointers,
                len: update.value.len(),
                row: if update.unit_rows { row } else { 0 },
            });
        }
        let mut all = vec![Arg::size(kernel.stem, kept(&slots))?];
        all.extend(args);
        // SAFETY: value, gradient and states of a parameter are of one shape (checked by the
        // caller) and f32 on this device; those that are written belong to nobody else.
        unsafe { self.launch(cuda, kernel, &slots, None, &all) }
    }
}

/// The device address of a tensor; 0 for one that is not on a device.
pub(super) fn address(tensor: &Tensor) -> u64 {
    tensor.cuda().map_or(0, |buffer| buffer.address())
}

/// Blocks of a launch over these tensors.
pub(super) fn blocks(slots: &[Slot]) -> usize {
    slots.iter().map(Slot::blocks).sum()
}

/// Values of a row, rounded up to whole 16-byte accesses, that shared memory is to hold.
fn kept(slots: &[Slot]) -> usize {
    let longest = slots.iter().map(|slot| slot.row).max().unwrap_or(0);
    longest.next_multiple_of(WIDE_F32).min(KEPT)
}

impl Slot {
    fn blocks(&self) -> usize {
        let span = if self.row == 0 { SPAN } else { self.row };
        self.len.div_ceil(span)
    }

    fn words(&self) -> [u64; 6] {
        let [value, grad, first, second] = self.pointers;
        [value, grad, first, second, self.len as u64, self.row as u64]
    }
}

/// The number of each tensor's first block, the number of all blocks, and the tensors.
fn words(slots: &[Slot]) -> Vec<u64> {
    let mut first = 0;
    let mut words: Vec<u64> = Vec::with_capacity(7 * slots.len() + 1);
    for slot in slots {
        words.push(first);
        first += slot.blocks() as u64;
    }
    words.push(first);
    words.extend(slots.iter().flat_map(Slot::words));
    words
}
