//! One new token for each of a few sequences (autoregressive decoding): linear maps of few rows,
//! and attention over the keys and values that a sequence has so far. Nothing is differentiated.
//!
//! Linear maps: Y = X Wᵀ + b. X \[B, in\] f32, W \[out, in\] f32, f16 or bf16, b \[out\] f32,
//! Y \[B, out\] f32. Every weight is read from memory once, whatever B is, and widened in
//! registers; at B = 1 that is all there is to it: the bytes of W, over the memory's bandwidth.
//!
//! Attention: for head h of a sequence with n tokens, o_h = softmax(q_h K_gᵀ / √D) V_g with
//! g = h / (heads / kv_heads). q, o \[B, heads * D\]; K, V \[n, kv_heads * D\], all f32. Keys and
//! values are read once for all heads of a group.
//!
//! A row of the result depends on its own row of X and on its own sequence alone, bit for bit:
//! not on B, nor on the number of threads.

mod product;

use rayon::prelude::*;

use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::{Error, Result};
use crate::ops::math::{add_scaled, dot, exp};
use crate::ops::{expect_cols, expect_shape};
use crate::tensor::Tensor;

const NAME: &str = "decode";

/// W and b of a linear map.
#[derive(Clone, Copy)]
pub struct Map<'a> {
    /// \[out, in\]
    pub weight: &'a Tensor,
    /// \[out\]
    pub bias: Option<&'a Tensor>,
}

/// X Wᵀ + b \[B, out\] for each of several maps of the same X \[B, in\], shared among the threads
/// as one piece of work.
///
/// # Errors
/// Operands on a GPU, or whose shapes do not fit.
pub fn linear(device: &Device, x: &Tensor, maps: &[Map]) -> Result<Vec<Tensor>> {
    let (rows, cols) = x.matrix_dims();
    for map in maps {
        let (out, _) = map.weight.matrix_dims();
        expect_cols(NAME, x, map.weight.matrix_dims().1)?;
        if let Some(bias) = map.bias {
            expect_shape(NAME, bias, &[out])?;
        }
    }
    host_only(device)?;
    if cols == 0 || rows == 0 {
        return Err(Error::operand(
            NAME,
            "an input of at least one value",
            format!("shape {:?}", x.shape()),
        ));
    }
    let outputs = product::products(device, x.f32s()?, cols, maps)?;
    let shaped = outputs.into_iter().zip(maps).map(|(mut y, map)| {
        let out = map.weight.matrix_dims().0;
        if let Some(bias) = map.bias {
            let bias = bias.f32s()?;
            for y in y.chunks_exact_mut(out.max(1)) {
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
        Tensor::from_buffer(y, [rows, out])
    });
    shaped.collect()
}

/// The heads of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads, a multiple of `kv`.
    pub queries: usize,
    /// Key/value heads.
    pub kv: usize,
    /// Columns of a head.
    pub dim: usize,
}

/// Attention of one query \[heads * D\] for each sequence over all keys and values \[n, kv_heads *
/// D\] of that sequence; the result is \[B, heads * D\].
///
/// # Errors
/// Operands on a GPU, or whose shapes do not fit; a sequence without keys.
pub fn attention(
    device: &Device,
    q: &Tensor,
    caches: &[(&[f32], &[f32])],
    heads: Heads,
) -> Result<Tensor> {
    let Heads { queries, kv, dim } = heads;
    if kv == 0 || dim == 0 || queries == 0 || !queries.is_multiple_of(kv) {
        return Err(Error::operand(
            NAME,
            "query heads in a multiple of the key/value heads, of a size above 0",
            format!("{queries} and {kv} heads of size {dim}"),
        ));
    }
    expect_shape(NAME, q, &[caches.len(), queries * dim])?;
    host_only(device)?;
    for (i, (keys, values)) in caches.iter().enumerate() {
        if keys.is_empty() || keys.len() != values.len() || !keys.len().is_multiple_of(kv * dim) {
            return Err(Error::operand(
                NAME,
                format!("as many keys as values, in rows of {}", kv * dim),
                format!("{} and {} in sequence {i}", keys.len(), values.len()),
            ));
        }
    }
    let group = queries / kv;
    let q = q.f32s()?;
    let mut out = device.buffer(q.len());
    out.par_chunks_mut(group * dim)
        .zip(q.par_chunks(group * dim))
        .enumerate()
        .for_each(|(i, (out, q))| {
            let (keys, values) = caches[i / kv];
            let rows = |data| Rows {
                data,
                stride: kv * dim,
                start: i % kv * dim,
                dim,
            };
            let mut scores = device.buffer(group * keys.len() / (kv * dim));
            vectorized!(attend(q, rows(keys), rows(values), &mut scores, out));
        });
    Tensor::from_buffer(out, [caches.len(), queries * dim])
}

/// The columns of one key/value head.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    start: usize,
    dim: usize,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn iter(self) -> impl Iterator<Item = &'a [f32]> {
        let rows = self.data.chunks_exact(self.stride);
        rows.map(move |row| &row[self.start..self.start + self.dim])
    }
}

/// The query heads of a group over the keys and values of their head; `scores` \[group, n\] is
/// where the softmax is made.
#[inline(always)]
fn attend(q: &[f32], keys: Rows, values: Rows, scores: &mut [f32], out: &mut [f32]) {
    let (dim, n) = (keys.dim, keys.data.len() / keys.stride);
    let scale = 1.0 / (dim as f32).sqrt();
    for (t, key) in keys.iter().enumerate() {
        for (h, q) in q.chunks_exact(dim).enumerate() {
            scores[h * n + t] = dot(q, key) * scale;
        }
    }
    for scores in scores.chunks_exact_mut(n) {
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        scores.iter_mut().for_each(|s| *s = exp(*s - max));
        let sum = scores.iter().map(|&s| f64::from(s)).sum::<f64>();
        let inverse = (1.0 / sum) as f32;
        scores.iter_mut().for_each(|s| *s *= inverse);
    }
    out.fill(0.0);
    for (t, value) in values.iter().enumerate() {
        for (h, out) in out.chunks_exact_mut(dim).enumerate() {
            add_scaled(out, scores[h * n + t], value);
        }
    }
}

fn host_only(device: &Device) -> Result<()> {
    match device {
        Device::Cpu(_) => Ok(()),
        Device::Cuda(cuda) => Err(cuda.no_kernel(NAME)),
    }
}
