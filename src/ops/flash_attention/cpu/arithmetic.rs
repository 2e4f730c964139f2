//! What differs between products in f32 and in bf16.

use super::{Block, FlashAttention};
use crate::device::Device;
use crate::ops::stored::Stored;
use crate::tensor::Buffer;

/// The products of query tiles: in f32, or with operands rounded to bf16 and sums in f32.
pub(in super::super) trait Arithmetic: Stored {
    /// Blocks of keys begin at multiples of this.
    const KEY_STEP: usize;
    /// Keys or values of all sequences, \[keys, D\] of a sequence and head or the transpose, as they
    /// stand on the right of products.
    type Keys<'a>: Send + Sync;
    /// \[rows, D\] of a query tile, as they stand on the left of products.
    type Rows;
    /// The same, also where a product sums over the rows.
    type Summed: Send + Sync;
    /// Memory for the scores of a tile and a block of keys.
    type Scratch;

    fn keys<'a>(
        device: &Device,
        op: &'a FlashAttention,
        values: &'a [f32],
        transposed: bool,
    ) -> Self::Keys<'a>;

    /// Rows of `d` values.
    fn rows(device: &Device, values: Buffer, d: usize) -> Self::Rows;

    fn summed(device: &Device, values: Buffer, d: usize) -> Self::Summed;

    /// For so many rows and keys.
    fn scratch(device: &Device, rows_and_keys: [usize; 2]) -> Self::Scratch;

    /// One step of the online softmax: the tile meets the keys, given Kᵀ and V.
    fn attend(
        block: &Block<'_>,
        q: &Self::Rows,
        keys_and_values: [&Self::Keys<'_>; 2],
        sums: &mut Sums<'_>,
        scratch: &mut Self::Scratch,
    );

    /// Adds what the tile and the keys contribute to the gradients.
    fn add_grads(
        block: &Block<'_>,
        tile: &Upstream<Self::Summed>,
        keys: &KeysAndValues<Self::Keys<'_>>,
        grads: Grads<'_>,
        scratch: &mut Self::Scratch,
    );
}

/// What the online softmax has of a tile so far.
pub(in super::super) struct Sums<'s> {
    /// \[rows, D\]
    pub(super) o: &'s mut [f32],
    /// \[rows\]
    pub(super) max: &'s mut [f32],
    /// \[rows\]
    pub(super) sum: &'s mut [f32],
}

/// K and V as they stand in the products of backward.
pub(in super::super) struct KeysAndValues<K> {
    pub(super) k: K,
    pub(super) k_t: K,
    pub(super) v_t: K,
}

/// The queries of a tile in backward, and what flows into it.
pub(in super::super) struct Upstream<S> {
    /// \[rows, D\]: queries, scaled.
    pub(super) q: S,
    /// \[rows, D\]: dO.
    pub(super) grad: S,
    /// \[rows\], base 2.
    pub(super) log_sum: Buffer,
    /// \[rows\]: rowsum(dO O).
    pub(super) delta: Buffer,
}

/// What is added to.
pub(in super::super) struct Grads<'g> {
    /// \[rows, D\]: dQ of the tile.
    pub(super) dq: &'g mut [f32],
    /// \[D, keys\] of the block that the keys begin.
    pub(super) dk: &'g mut [f32],
    /// \[D, keys\]
    pub(super) dv: &'g mut [f32],
}
