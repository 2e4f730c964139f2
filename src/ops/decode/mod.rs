//! One new token for each of a few sequences (autoregressive decoding): linear maps of few rows,
//! and attention over the keys and values that a sequence has so far. Nothing is differentiated.
//!
//! Linear maps: Y = X Wᵀ + b. X \[B, in\] f32 or bf16, W \[out, in\] f32, f16 or bf16, b \[out\] f32,
//! Y \[B, out\] f32. Every weight is read from memory once, whatever B is, and widened in
//! registers; at B = 1 that is all there is to it: the bytes of W, over the memory's bandwidth.
//!
//! Attention: for head h of a sequence with n tokens, o_h = softmax(q_h K_gᵀ / √D) V_g with
//! g = h / (heads / kv_heads). q, o \[B, heads * D\]; K, V \[n, kv_heads * D\], all f32. Keys and
//! values are read once for all heads of a group.
//!
//! On CUDA all of it is bf16, with sums and softmax in f32; the logits alone are f32.
//!
//! A row of the result depends on its own row of X and on its own sequence alone, bit for bit:
//! not on B, nor on the number of threads.

mod cache;
mod cuda;
mod product;

use rayon::prelude::*;

pub use cache::KvCache;

use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::{Error, Result};
use crate::ops::math::{add_scaled, dot, exp_of_negative};
use crate::ops::rope::RopeTable;
use crate::ops::{expect_cols, expect_shape};
use crate::tensor::{DType, Tensor};

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
/// Operands whose shapes do not fit.
pub fn linear(device: &Device, x: &Tensor, maps: &[Map]) -> Result<Vec<Tensor>> {
    linear_in(device, x, maps, DType::Bf16)
}

/// The logits X Wᵀ \[B, V\] of hidden states X \[B, d\] with the output head W \[V, d\]: f32, on
/// the device.
///
/// # Errors
/// Operands whose shapes do not fit.
pub fn logits(device: &Device, x: &Tensor, head: &Tensor) -> Result<Tensor> {
    let map = Map {
        weight: head,
        bias: None,
    };
    only(linear_in(device, x, &[map], DType::F32)?)
}

/// Y += scale (X Aᵀ) Bᵀ: what an adapter adds. Y \[B, out\], A \[r, in\], B \[out, r\].
///
/// # Errors
/// Operands whose shapes do not fit.
pub fn add_low_rank(
    device: &Device,
    y: &mut Tensor,
    x: &Tensor,
    [a, b]: [&Tensor; 2],
    scale: f32,
) -> Result<()> {
    let map = |weight| Map { weight, bias: None };
    if let Device::Cuda(cuda) = device {
        expect_cols(NAME, x, a.matrix_dims().1)?;
        expect_cols(NAME, b, a.matrix_dims().0)?;
        expect_shape(NAME, y, &[x.matrix_dims().0, b.matrix_dims().0])?;
        if !cuda.holds(y) || y.is_shared() {
            return Err(Error::operand(
                NAME,
                "a sum on this device of its own",
                y.found(),
            ));
        }
        return cuda::add_low_rank(cuda, y, x, [a, b], scale);
    }
    let low = only(linear(device, x, &[map(a)])?)?;
    let mut delta = only(linear(device, &low, &[map(b)])?)?;
    delta.f32s_mut()?.iter_mut().for_each(|v| *v *= scale);
    device.add_assign(y, &delta)
}

/// The results on a GPU are of the dtype `on_gpu`.
fn linear_in(device: &Device, x: &Tensor, maps: &[Map], on_gpu: DType) -> Result<Vec<Tensor>> {
    let (rows, cols) = x.matrix_dims();
    for map in maps {
        let (out, _) = map.weight.matrix_dims();
        expect_cols(NAME, x, map.weight.matrix_dims().1)?;
        if let Some(bias) = map.bias {
            expect_shape(NAME, bias, &[out])?;
        }
    }
    if cols == 0 || rows == 0 {
        return Err(Error::operand(
            NAME,
            "an input of at least one value",
            format!("shape {:?}", x.shape()),
        ));
    }
    if let Device::Cuda(cuda) = device {
        return cuda::linear(cuda, x, maps, on_gpu);
    }
    let x = x.to_f32()?;
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

fn only(outputs: Vec<Tensor>) -> Result<Tensor> {
    let output = outputs.into_iter().next();
    output.ok_or_else(|| Error::operand(NAME, "one output", "none"))
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

/// The next token of each of a few sequences, on its way through some layers.
pub struct Batch<'b, 'c> {
    device: &'b Device,
    heads: Heads,
    rope: &'b RopeTable,
    caches: &'b mut [&'c mut KvCache],
    /// Of each sequence's token.
    positions: Vec<usize>,
    /// What a GPU's kernels know of the sequences.
    table: Option<Tensor>,
}

impl<'b, 'c> Batch<'b, 'c> {
    /// One more token for each cache, to go through layer `first` and others that hold as many.
    ///
    /// # Errors
    /// Heads that do not fit each other or the caches' keys, a position that `rope` does not hold, out
    /// of memory.
    pub fn new(
        device: &'b Device,
        heads: Heads,
        rope: &'b RopeTable,
        caches: &'b mut [&'c mut KvCache],
        first: usize,
    ) -> Result<Self> {
        let Heads { queries, kv, dim } = heads;
        if kv == 0 || dim == 0 || queries == 0 || !queries.is_multiple_of(kv) {
            return Err(Error::operand(
                NAME,
                "query heads in a multiple of the key/value heads, of a size above 0",
                format!("{queries} and {kv} heads of size {dim}"),
            ));
        }
        // The kernels write so many values a token.
        if let Some(other) = caches.iter().find(|cache| cache.width() != kv * dim) {
            let expected = format!("caches of keys of {} values", kv * dim);
            return Err(Error::operand(NAME, expected, other.width().to_string()));
        }
        let positions: Vec<usize> = caches.iter().map(|cache| cache.tokens(first)).collect();
        if let Some(beyond) = positions.iter().find(|&&p| p >= rope.positions()) {
            let expected = format!("positions below {}", rope.positions());
            return Err(Error::operand(NAME, expected, beyond.to_string()));
        }
        let table = match device {
            Device::Cpu(_) => None,
            Device::Cuda(cuda) => Some(cuda::table(cuda, caches, &positions)?),
        };
        Ok(Self {
            device,
            heads,
            rope,
            caches,
            positions,
            table,
        })
    }

    /// Rotates queries \[B, heads * D\] and keys \[B, kv_heads * D\], adds keys and values to layer
    /// `layer` of the caches and attends to all that it holds then: \[B, heads * D\].
    ///
    /// # Errors
    /// Operands whose shapes do not fit; a layer that there is not or that has other tokens.
    pub fn attention(&mut self, layer: usize, q: Tensor, k: Tensor, v: &Tensor) -> Result<Tensor> {
        let Heads { queries, kv, dim } = self.heads;
        let batch = self.positions.len();
        expect_shape(NAME, &q, &[batch, queries * dim])?;
        expect_shape(NAME, &k, &[batch, kv * dim])?;
        expect_shape(NAME, v, &[batch, kv * dim])?;
        for (cache, &position) in self.caches.iter().zip(&self.positions) {
            let held = cache.expect_layer(layer)?;
            if held != position {
                let expected = format!("{position} tokens in layer {layer}");
                return Err(Error::operand(NAME, expected, held.to_string()));
            }
        }
        match (self.device, &self.table) {
            (Device::Cuda(cuda), Some(table)) => {
                let sequences = cuda::Sequences {
                    table,
                    positions: &self.positions,
                    rope: self.rope,
                    heads: self.heads,
                };
                let out = sequences.attention(cuda, layer, [&q, &k, v])?;
                for cache in self.caches.iter_mut() {
                    cache.advance(layer)?;
                }
                Ok(out)
            }
            _ => self.attention_on_host(layer, q, k, v),
        }
    }

    fn attention_on_host(
        &mut self,
        layer: usize,
        mut q: Tensor,
        mut k: Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        let Heads { queries, kv, dim } = self.heads;
        let (group, width) = (queries / kv, kv * dim);
        let q_rows = q.f32s_mut()?.chunks_exact_mut(queries * dim);
        let kv_rows = k.f32s_mut()?.chunks_exact_mut(width);
        let kv_rows = kv_rows.zip(v.f32s()?.chunks_exact(width));
        let sequences = self.caches.iter_mut().zip(&self.positions);
        for ((cache, &position), (q, (k, v))) in sequences.zip(q_rows.zip(kv_rows)) {
            self.rope.rotate(position, q)?;
            self.rope.rotate(position, k)?;
            cache.push(layer, k, v)?;
        }
        let caches = self.caches.iter().map(|cache| cache.on_host(layer));
        let caches = caches.collect::<Result<Vec<_>>>()?;
        let q = q.f32s()?;
        let mut out = self.device.buffer(q.len());
        out.par_chunks_mut(group * dim)
            .zip(q.par_chunks(group * dim))
            .enumerate()
            .for_each(|(i, (out, q))| {
                let (keys, values) = caches[i / kv];
                let rows = |data| Rows {
                    data,
                    stride: width,
                    start: i % kv * dim,
                    dim,
                };
                let mut scores = self.device.buffer(group * keys.len() / width);
                vectorized!(attend(q, rows(keys), rows(values), &mut scores, out));
            });
        Tensor::from_buffer(out, [self.positions.len(), queries * dim])
    }
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
        scores
            .iter_mut()
            .for_each(|s| *s = exp_of_negative(*s - max));
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
