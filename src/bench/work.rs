//! What an operator does at a shape, and the least it can do it with: the table of FLOP and bytes
//! that measured times are held against.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An operator at a shape. `tokens` is the number of rows of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Rows of `width` out of a table of `vocab`.
    Embedding {
        tokens: usize,
        vocab: usize,
        width: usize,
    },
    /// Rows of `width`.
    RmsNorm { tokens: usize, width: usize },
    /// Queries or keys of `heads` heads.
    Rope {
        tokens: usize,
        heads: usize,
        head_dim: usize,
    },
    /// Two rows of `width` into one.
    SwiGlu { tokens: usize, width: usize },
    /// One causal sequence of `tokens`.
    FlashAttention {
        tokens: usize,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
    },
    /// Y = X Wᵀ, W \[out, inner\]; backward dX = dY W.
    Gemm {
        tokens: usize,
        inner: usize,
        out: usize,
    },
    /// Y = X Wᵀ + s (drop(X) Aᵀ) Bᵀ; backward dX, dA and dB.
    Lora {
        tokens: usize,
        inner: usize,
        out: usize,
        rank: usize,
    },
    /// The encoder of an SAE; backward to its weights and biases.
    TopK {
        tokens: usize,
        width: usize,
        latents: usize,
        k: usize,
    },
    /// The decoder of an SAE; backward to activations, weights and bias.
    SparseDecode {
        tokens: usize,
        width: usize,
        latents: usize,
        k: usize,
    },
    /// Rows of `width` against their targets.
    Fvu { tokens: usize, width: usize },
    /// Head, softmax and divergence of teacher and student.
    KlDiv {
        tokens: usize,
        width: usize,
        vocab: usize,
    },
    /// Head, softmax and negative logarithm of the target's share.
    CrossEntropy {
        tokens: usize,
        width: usize,
        vocab: usize,
    },
    /// X Wᵀ of the few rows that generation has, W \[out, inner\].
    DecodeLinear {
        batch: usize,
        inner: usize,
        out: usize,
    },
    /// One query of a sequence that has `tokens` keys then.
    DecodeAttention {
        tokens: usize,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
    },
    /// A token for each row of logits, nucleus and all.
    Sample { batch: usize, vocab: usize },
    /// One step over so many parameters.
    AdamW { values: usize },
    /// One step over a matrix with rows of `width`, their parallel component taken out.
    Signum { rows: usize, width: usize },
    /// Norm of so many gradients, and all of them scaled.
    Clip { values: usize },
}

/// Which part of an operator is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    /// Outputs from inputs, and what backward will need.
    Forward,
    /// Gradients of inputs from those of outputs.
    Backward,
    /// Forward and gradient in one sweep, for losses that are made so.
    Fused,
    /// A step of an optimizer.
    Step,
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Fused => "fused",
            Self::Step => "step",
        })
    }
}

/// Sizes of stored values in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes {
    /// Activations and their gradients.
    pub activation: usize,
    /// Frozen weights.
    pub weight: usize,
}

/// What has to be done at least.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Least {
    /// Floating-point operations, a multiply and an add as two.
    pub flop: f64,
    /// Bytes read and written, each operand once; gathered rows once for each time they are named.
    pub bytes: f64,
}

/// Bytes of what is trained, its gradients and optimizer state, and of indices.
const WORD: usize = 4;

impl Work {
    /// The operator's name.
    pub fn operator(&self) -> &'static str {
        match self {
            Self::Embedding { .. } => "embedding",
            Self::RmsNorm { .. } => "rmsnorm",
            Self::Rope { .. } => "rope",
            Self::SwiGlu { .. } => "swiglu",
            Self::FlashAttention { .. } => "flash_attention",
            Self::Gemm { .. } => "gemm",
            Self::Lora { .. } => "lora",
            Self::TopK { .. } => "topk",
            Self::SparseDecode { .. } => "sparse_decode",
            Self::Fvu { .. } => "fvu",
            Self::KlDiv { .. } => "kl_div",
            Self::CrossEntropy { .. } => "cross_entropy",
            Self::DecodeLinear { .. } | Self::DecodeAttention { .. } => "decode",
            Self::Sample { .. } => "sample",
            Self::AdamW { .. } => "adamw",
            Self::Signum { .. } => "signum",
            Self::Clip { .. } => "clip",
        }
    }

    /// The passes that are measured.
    pub fn passes(&self) -> &'static [Pass] {
        match self {
            Self::KlDiv { .. } | Self::CrossEntropy { .. } => &[Pass::Forward, Pass::Fused],
            Self::AdamW { .. } | Self::Signum { .. } | Self::Clip { .. } => &[Pass::Step],
            Self::DecodeLinear { .. } | Self::DecodeAttention { .. } | Self::Sample { .. } => {
                &[Pass::Forward]
            }
            _ => &[Pass::Forward, Pass::Backward],
        }
    }

    /// Whether it computes matrix products, which may be in f32 or in bf16.
    pub fn has_products(&self) -> bool {
        use Work::{CrossEntropy, DecodeLinear, FlashAttention, Gemm, KlDiv, Lora, TopK};
        let is_head = matches!(self, KlDiv { .. } | CrossEntropy { .. });
        let is_linear = matches!(self, Gemm { .. } | Lora { .. } | DecodeLinear { .. });
        is_head || is_linear || matches!(self, TopK { .. } | FlashAttention { .. })
    }

    /// The table: least FLOP and bytes of a pass, with stored values of these sizes. Elementwise
    /// work counts one FLOP for each operation of its formula, functions such as exp as one; its
    /// bytes decide.
    #[rustfmt::skip] // One row an operator.
    pub fn least(&self, pass: Pass, size: Bytes) -> Least {
        let Bytes { activation: a, weight: w } = size;
        let forward = pass == Pass::Forward;
        let [flop, bytes] = match *self {
            // A row in, a row out; backward adds each row to its own of an f32 table.
            Self::Embedding { tokens: t, vocab: v, width: d } => match forward {
                true => [0, 2 * t * d * a],
                false => [t * d, t * d * a + v * d * WORD],
            },
            Self::RmsNorm { tokens: t, width: d } => match forward {
                true => [4 * t * d, 2 * t * d * a],
                false => [8 * t * d, 3 * t * d * a],
            },
            Self::Rope { tokens: t, heads, head_dim } => {
                // A row of the table for each token.
                let n = heads * head_dim;
                [3 * t * n, 2 * t * n * a + t * head_dim * WORD]
            }
            Self::SwiGlu { tokens: t, width: d } => match forward {
                true => [5 * t * d, 3 * t * d * a],
                false => [10 * t * d, 5 * t * d * a],
            },
            // Q, K, V in and O out; backward Q, K, V, O, dO in and dQ, dK, dV out. Half of all scores.
            Self::FlashAttention { tokens: t, heads, kv_heads, head_dim } => {
                let (q, kv) = (heads * head_dim, kv_heads * head_dim);
                match forward {
                    true => [2 * t * t * q, 2 * t * (q + kv) * a],
                    false => [5 * t * t * q, 4 * t * (q + kv) * a],
                }
            }
            Self::Gemm { tokens: t, inner: i, out: o } => {
                [2 * t * i * o, t * (i + o) * a + i * o * w]
            }
            // Backward: dU, dA, dB and dU A beside dY W; X and dY in, dX out, A and B in, dA and dB out.
            Self::Lora { tokens: t, inner: i, out: o, rank: r } => match forward {
                true => [
                    2 * t * (i * o + r * (i + o)),
                    t * (i + o) * a + i * o * w + r * (i + o) * WORD,
                ],
                false => [
                    2 * t * (i * o + 2 * r * (i + o)),
                    t * (2 * i + o) * a + i * o * w + 2 * r * (i + o) * WORD,
                ],
            },
            // W_enc in, values and indices out. Backward: a row of X for each pair, the dense gradient
            // out, W_enc in for the gradient of b_dec.
            Self::TopK { tokens: t, width: d, latents: m, k } => match forward {
                true => [2 * t * d * m, t * d * a + m * d * WORD + 2 * t * k * WORD],
                false => [2 * t * k * d + 2 * m * d, t * k * d * a + 2 * m * d * WORD],
            },
            // A row of W_dec for each pair. Backward: a row of the upstream gradient for each pair
            // serves both gradients; W_dec in, its gradient out.
            Self::SparseDecode { tokens: t, width: d, latents: m, k } => match forward {
                true => [2 * t * k * d, t * k * d * WORD + t * d * a + 2 * t * k * WORD],
                false => [4 * t * k * d, t * k * d * a + 2 * m * d * WORD],
            },
            Self::Fvu { tokens: t, width: d } => match forward {
                true => [3 * t * d, 2 * t * d * a],
                false => [2 * t * d, 3 * t * d * a],
            },
            // A product with the head for teacher, student and gradient; logits stay in a workspace of
            // one chunk.
            Self::KlDiv { tokens: t, width: d, vocab: v } => {
                let products = if forward { 2 } else { 3 };
                [2 * t * d * v * products, t * d * a * products + d * v * w]
            }
            Self::CrossEntropy { tokens: t, width: d, vocab: v } => {
                let products = if forward { 1 } else { 2 };
                [2 * t * d * v * products, t * d * a * products + d * v * w]
            }
            Self::DecodeLinear { batch: b, inner: i, out: o } => {
                [2 * b * i * o, b * (i + o) * a + i * o * w]
            }
            // Keys and values once, the query in and its result out.
            Self::DecodeAttention { tokens: t, heads, kv_heads, head_dim } => {
                let (q, kv) = (heads * head_dim, kv_heads * head_dim);
                [4 * t * q, 2 * (t * kv + q) * a]
            }
            // Logits once: difference, scale, power and sum.
            Self::Sample { batch: b, vocab: v } => [4 * b * v, b * v * WORD],
            // Parameter and both moments in and out, the gradient in.
            Self::AdamW { values: n } => [14 * n, 7 * n * WORD],
            // y and z in and out, the gradient in.
            Self::Signum { rows, width } => [12 * rows * width, 5 * rows * width * WORD],
            // In for the norm, in and out for the scaling.
            Self::Clip { values: n } => [3 * n, 3 * n * WORD],
        };
        Least { flop: flop as f64, bytes: bytes as f64 }
    }
}

/// The most that one measurement may compute, move and hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// FLOP of a pass.
    pub flop: f64,
    /// Least bytes of a pass.
    pub bytes: f64,
}

/// Rows are not reduced below this: a few tiles of a matrix product.
const FEWEST_TOKENS: usize = 128;
/// What else is not reduced below this.
const SMALLEST: usize = 256;

impl Work {
    /// The work with sizes halved until it keeps the limits: first tokens, then what is widest of
    /// the rest (vocabulary, latents, features out, parameters). Below a few hundred it stops.
    pub fn within(mut self, limits: Limits, pass: Pass, size: Bytes) -> Self {
        let fits = |work: &Self| {
            let least = work.least(pass, size);
            least.flop <= limits.flop && least.bytes <= limits.bytes
        };
        while !fits(&self) && (self.halve_tokens() || self.halve_widest()) {}
        self
    }

    fn halve_tokens(&mut self) -> bool {
        match self {
            Self::Embedding { tokens, .. }
            | Self::RmsNorm { tokens, .. }
            | Self::Rope { tokens, .. }
            | Self::SwiGlu { tokens, .. }
            | Self::FlashAttention { tokens, .. }
            | Self::Gemm { tokens, .. }
            | Self::Lora { tokens, .. }
            | Self::TopK { tokens, .. }
            | Self::SparseDecode { tokens, .. }
            | Self::Fvu { tokens, .. }
            | Self::KlDiv { tokens, .. }
            | Self::CrossEntropy { tokens, .. }
            | Self::DecodeAttention { tokens, .. } => halve(tokens, FEWEST_TOKENS),
            Self::AdamW { .. }
            | Self::Signum { .. }
            | Self::Clip { .. }
            | Self::Sample { .. }
            | Self::DecodeLinear { .. } => false,
        }
    }

    fn halve_widest(&mut self) -> bool {
        match self {
            Self::Embedding { vocab, .. }
            | Self::Sample { vocab, .. }
            | Self::KlDiv { vocab, .. }
            | Self::CrossEntropy { vocab, .. } => halve(vocab, SMALLEST),
            Self::Gemm { inner, out, .. }
            | Self::Lora { inner, out, .. }
            | Self::DecodeLinear { inner, out, .. } => {
                halve(if *inner > *out { inner } else { out }, SMALLEST)
            }
            Self::TopK { latents, .. } | Self::SparseDecode { latents, .. } => {
                halve(latents, SMALLEST)
            }
            Self::AdamW { values } | Self::Clip { values } => halve(values, SMALLEST),
            Self::Signum { rows, .. } => halve(rows, SMALLEST),
            Self::RmsNorm { .. }
            | Self::Rope { .. }
            | Self::SwiGlu { .. }
            | Self::FlashAttention { .. }
            | Self::DecodeAttention { .. }
            | Self::Fvu { .. } => false,
        }
    }
}

/// Halves a size unless it would fall below `least`; whether it did.
fn halve(size: &mut usize, least: usize) -> bool {
    let can = *size / 2 >= least;
    if can {
        *size /= 2;
    }
    can
}

impl fmt::Display for Work {
    /// The sizes: what goes in x what comes out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Embedding {
                tokens,
                vocab,
                width,
            } => format!("{tokens} of {vocab} x {width}"),
            Self::RmsNorm { tokens, width }
            | Self::SwiGlu { tokens, width }
            | Self::Fvu { tokens, width } => format!("{tokens} x {width}"),
            Self::Rope {
                tokens,
                heads,
                head_dim,
            } => format!("{tokens} x {heads} x {head_dim}"),
            Self::FlashAttention {
                tokens,
                heads,
                kv_heads,
                head_dim,
            }
            | Self::DecodeAttention {
                tokens,
                heads,
                kv_heads,
                head_dim,
            } => format!("{tokens} x {heads}/{kv_heads} x {head_dim}"),
            Self::Gemm { tokens, inner, out } => format!("{tokens} x {inner} x {out}"),
            Self::DecodeLinear { batch, inner, out } => format!("{batch} x {inner} x {out}"),
            Self::Lora {
                tokens,
                inner,
                out,
                rank,
            } => format!("{tokens} x {inner} x {out}, rank {rank}"),
            Self::TopK {
                tokens,
                width,
                latents,
                k,
            }
            | Self::SparseDecode {
                tokens,
                width,
                latents,
                k,
            } => format!("{tokens} x {width}, {k} of {latents}"),
            Self::KlDiv {
                tokens,
                width,
                vocab,
            }
            | Self::CrossEntropy {
                tokens,
                width,
                vocab,
            } => format!("{tokens} x {width} x {vocab}"),
            Self::Sample { batch, vocab } => format!("{batch} x {vocab}"),
            Self::AdamW { values } | Self::Clip { values } => format!("{values}"),
            Self::Signum { rows, width } => format!("{rows} x {width}"),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests;
