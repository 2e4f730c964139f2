//! Products of bf16 values with sums in f32, over packed panels. P and dS are made tile by tile and
//! packed while they are in the L1 cache, which halves what goes through L2.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::super::softmax::{online_softmax, softmax_backward};
use super::arithmetic::{Arithmetic, Grads, KeysAndValues, Sums, Upstream};
use super::{Block, FlashAttention};
use crate::device::Device;
use crate::device::simd::vectorized;
use crate::ops::gemm::bf16::{COLS, Level, Multiplier, Operand, Panels, ROWS, Side, Tile, Values};
use crate::tensor::Buffer;

impl Arithmetic for bf16 {
    /// With a panel, or with a step.
    const KEY_STEP: usize = COLS;
    type Keys<'a> = Keys;
    type Rows = Panels;
    type Summed = Summed;
    type Scratch = Scratch;

    fn keys<'a>(
        device: &Device,
        op: &'a FlashAttention,
        values: &'a [f32],
        transposed: bool,
    ) -> Keys {
        let (d, cols) = (op.head_dim, op.kv_heads * op.head_dim);
        let heads = (0..op.batch * op.kv_heads).into_par_iter();
        let pack = |head| {
            let first = head / op.kv_heads * op.seq_len * cols + head % op.kv_heads * d;
            let values = Values::F32(&values[first..]);
            let (operand, outer, reduction) = match transposed {
                true => (Operand::rows(values, cols), op.seq_len, d),
                false => (Operand::columns(values, cols), d, op.seq_len),
            };
            let operand = (&operand, Side::Right);
            Panels::new(device, Level::best(), operand, 0..outer, 0..reduction)
        };
        Keys {
            kv_heads: op.kv_heads,
            panels: heads.map(pack).collect(),
        }
    }

    fn rows(device: &Device, values: Buffer, d: usize) -> Panels {
        let operand = (&Operand::rows(Values::F32(&values), d), Side::Left);
        Panels::new(device, Level::best(), operand, 0..values.len() / d, 0..d)
    }

    fn summed(device: &Device, values: Buffer, d: usize) -> Summed {
        let operand = (&Operand::columns(Values::F32(&values), d), Side::Left);
        Summed {
            columns: Panels::new(device, Level::best(), operand, 0..d, 0..values.len() / d),
            rows: Self::rows(device, values, d),
        }
    }

    fn scratch(device: &Device, [rows, keys]: [usize; 2]) -> Scratch {
        let panels =
            |[outer, reduction]: [usize; 2]| Panels::with_capacity(device, outer, reduction);
        Scratch {
            scores: device.buffer(ROWS * keys),
            width: keys,
            tiles: vec![Tile::ZERO; rows.div_ceil(ROWS)],
            left: panels([rows, keys]),
            rights: [[keys, rows]; 2].map(panels),
        }
    }

    fn attend(
        block: &Block<'_>,
        q: &Panels,
        [k_t, v]: [&Keys; 2],
        sums: &mut Sums<'_>,
        scratch: &mut Scratch,
    ) {
        let (level, d, width) = (Level::best(), block.x.op.head_dim, scratch.width);
        let rows = sums.max.chunks_mut(ROWS).zip(sums.sum.chunks_mut(ROWS));
        for (i, ((max, sum), o)) in rows.zip(sums.o.chunks_mut(ROWS * d)).enumerate() {
            let keys = &keys_of_panel(block, i);
            if keys.is_empty() {
                continue;
            }
            let scores = &mut scratch.scores[..max.len() * width];
            let out = (&mut *scores, [max.len(), keys.len(), width]);
            let right = k_t.of(block).part(keys, &(0..d));
            q.multiply(level, i..i + 1, right, out, false);
            vectorized!(online_softmax(
                (scores, width, block.x.scales.scores),
                &block.visible(i * ROWS, keys),
                max,
                sum,
                o,
            ));
            let p = (&Operand::rows(Values::F32(scores), width), Side::Left);
            scratch.left.pack(level, p, 0..max.len(), 0..keys.len());
            let right = v.of(block).part(&(0..d), keys);
            let out = (o, [max.len(), d, d]);
            scratch.left.multiply(level, 0..1, right, out, true);
        }
    }

    fn add_grads(
        block: &Block<'_>,
        tile: &Upstream<Summed>,
        keys: &KeysAndValues<Keys>,
        grads: Grads<'_>,
        scratch: &mut Scratch,
    ) {
        let (level, d) = (Level::best(), block.x.op.head_dim);
        let (rows, count) = (tile.delta.len(), block.keys.len());
        scratch.set_probabilities(block, tile, keys);
        let Scratch {
            left: ds_rows,
            rights: [p, ds],
            ..
        } = scratch;
        for (i, dq) in grads.dq.chunks_mut(ROWS * d).enumerate() {
            let seen = keys_of_panel(block, i);
            let k = keys.k.of(block).part(&(0..d), &seen);
            let dims = [dq.len() / d, d, d];
            ds_rows.multiply(level, i..i + 1, k, (dq, dims), true);
        }
        let stride = grads.dk.len() / d;
        for (out, left, right) in [(grads.dk, &tile.q, ds), (grads.dv, &tile.grad, p)] {
            let right = right.part(&(0..count), &(0..rows));
            let out = (out, [d, count, stride]);
            let all = 0..d.div_ceil(ROWS);
            left.columns.multiply(level, all, right, out, true);
        }
    }
}

/// Those of the block's keys that a panel of the tile's rows sees, whatever the documents.
fn keys_of_panel(block: &Block<'_>, panel: usize) -> Range<usize> {
    let last_row = (panel + 1) * ROWS - 1;
    let end = block.tile.queries.start + last_row / block.x.op.group() + 1;
    block.keys.start..block.keys.end.min(end).max(block.keys.start)
}

/// Keys or values, packed once for all tasks.
pub(in super::super) struct Keys {
    kv_heads: usize,
    /// Of each sequence and head.
    panels: Vec<Panels>,
}

impl Keys {
    fn of(&self, block: &Block<'_>) -> &Panels {
        &self.panels[block.tile.seq * self.kv_heads + block.tile.kv_head]
    }
}

/// \[rows, D\] packed for the left side, and the transpose.
pub(in super::super) struct Summed {
    rows: Panels,
    columns: Panels,
}

/// Memory for the scores of a tile and a block of keys.
pub(in super::super) struct Scratch {
    /// The scores of a panel of rows, rows `width` apart.
    scores: Buffer,
    width: usize,
    /// The scores of all panels of rows with one of keys.
    tiles: Vec<Tile>,
    /// \[rows, keys\] for the left side: P of a panel of rows, or dS.
    left: Panels,
    /// \[keys, rows\] for the right side: Pᵀ and dSᵀ.
    rights: [Panels; 2],
}

impl Scratch {
    /// Packs Pᵀ, dSᵀ and dS.
    fn set_probabilities(
        &mut self,
        block: &Block<'_>,
        tile: &Upstream<Summed>,
        keys: &KeysAndValues<Keys>,
    ) {
        let level = Level::best();
        let (rows, count) = (tile.delta.len(), block.keys.len());
        let (ds_rows, [p, ds]) = (&mut self.left, &mut self.rights);
        ds_rows.resize(rows, count);
        p.resize(count, rows);
        ds.resize(count, rows);
        let [k_t, v_t] = [&keys.k_t, &keys.v_t].map(|keys| keys.of(block));
        let mut multiplier = Multiplier::new(level);
        let mut grads = Tile::ZERO;
        for (j, first_key) in block.keys.clone().step_by(COLS).enumerate() {
            let panels = 0..rows.div_ceil(ROWS);
            let unseen = |&i: &usize| keys_of_panel(block, i).end <= first_key;
            let unseen = panels.clone().take_while(unseen).count();
            for i in 0..unseen {
                p.set(level, Side::Right, (j, i), &Tile::ZERO);
                ds.set(level, Side::Right, (j, i), &Tile::ZERO);
                ds_rows.set(level, Side::Left, (i, j), &Tile::ZERO);
            }
            let seen = unseen..panels.end;
            multiplier.set_right_panel(k_t, first_key / COLS);
            for i in seen.clone() {
                multiplier.tile(&tile.q.rows, i, &mut self.tiles[i]);
            }
            multiplier.set_right_panel(v_t, first_key / COLS);
            for i in seen {
                let scores = &mut self.tiles[i];
                multiplier.tile(&tile.grad.rows, i, &mut grads);
                let of_tile = i * ROWS..rows.min((i + 1) * ROWS);
                for tile in [&mut *scores, &mut grads] {
                    tile.0[of_tile.len()..].fill([0.0; COLS]);
                }
                // Keys beyond the block are beyond all queries.
                let keys = first_key..first_key + COLS;
                vectorized!(softmax_backward(
                    (
                        scores.0.as_flattened_mut(),
                        grads.0.as_flattened_mut(),
                        COLS
                    ),
                    block.x.scales.scores,
                    &block.visible(i * ROWS, &keys),
                    &tile.log_sum[of_tile.clone()],
                    &tile.delta[of_tile.clone()],
                ));
                p.set(level, Side::Right, (j, i), scores);
                ds.set(level, Side::Right, (j, i), &grads);
                ds_rows.set(level, Side::Left, (i, j), &grads);
            }
        }
    }
}
