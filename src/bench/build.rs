//! Operators with operands at a shape.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::Operator;
use crate::ops::cross_entropy::CrossEntropy;
use crate::ops::decode::{self, Batch, Heads, KvCache, Map};
use crate::ops::embedding::Embedding;
use crate::ops::flash_attention::FlashAttention;
use crate::ops::fvu::Fvu;
use crate::ops::gemm::Linear;
use crate::ops::kl_div::KlDiv;
use crate::ops::lora::{Dropout, Frozen, LoraLinear};
use crate::ops::rmsnorm::RmsNorm;
use crate::ops::rope::{Rope, RopeTable};
use crate::ops::sample::{Filter, sample};
use crate::ops::sparse_decode::{SharedGroups, SparseDecode};
use crate::ops::swiglu::SwiGlu;
use crate::ops::topk::TopK;
use crate::optim::signum::Signum;
use crate::rng::{Purpose, Stream};
use crate::tensor::Tensor;
use crate::train::TrainConfig;

use super::data::Data;
use super::runs::{Calls, InTurn, OperatorRun, Optimizer, OptimizerRun, Run, Set};
use super::work::{Pass, Work};

/// Values of a parameter of an optimizer's row: about a factor of an adapter.
const PARAMETER: usize = 1 << 16;

/// What runs `work`, over `count` sets of operands that take turns.
pub(super) fn build(work: Work, pass: Pass, data: &mut Data, count: usize) -> Result<Box<dyn Run>> {
    let mut builder = Builder { pass, data, count };
    match work {
        Work::Embedding {
            tokens,
            vocab,
            width,
        } => builder.embedding(tokens, vocab, width),
        Work::RmsNorm { tokens, width } => builder.rmsnorm(tokens, width),
        Work::Rope {
            tokens,
            heads,
            head_dim,
        } => builder.rope(tokens, heads, head_dim),
        Work::SwiGlu { tokens, width } => builder.swiglu(tokens, width),
        Work::FlashAttention {
            tokens,
            heads,
            kv_heads,
            head_dim,
        } => builder.flash_attention(tokens, [heads, kv_heads], head_dim),
        Work::Gemm { tokens, inner, out } => builder.gemm(tokens, inner, out),
        Work::Lora {
            tokens,
            inner,
            out,
            rank,
        } => builder.lora(tokens, [inner, out], rank),
        Work::TopK {
            tokens,
            width,
            latents,
            k,
        } => builder.topk(tokens, width, latents, k),
        Work::SparseDecode {
            tokens,
            width,
            latents,
            k,
        } => builder.sparse_decode(tokens, width, latents, k),
        Work::Fvu { tokens, width } => builder.fvu(tokens, width),
        Work::KlDiv {
            tokens,
            width,
            vocab,
        } => builder.kl_div(tokens, width, vocab),
        Work::CrossEntropy {
            tokens,
            width,
            vocab,
        } => builder.cross_entropy(tokens, width, vocab),
        Work::DecodeLinear { batch, inner, out } => builder.decode_linear(batch, inner, out),
        Work::DecodeAttention {
            tokens,
            heads: queries,
            kv_heads: kv,
            head_dim: dim,
        } => builder.decode_attention(tokens, Heads { queries, kv, dim }),
        Work::Sample { batch, vocab } => builder.sample(batch, vocab),
        Work::AdamW { values } => builder.optimizer(|builder| {
            let [values, grads] = builder.parameters(values)?;
            OptimizerRun::adamw(values, grads)
        }),
        Work::Clip { values } => builder.optimizer(|builder| {
            let [values, grads] = builder.parameters(values)?;
            Ok(OptimizerRun::new(Optimizer::Clip(1e-3), values, grads))
        }),
        Work::Signum { rows, width } => builder.optimizer(|builder| {
            let mut matrix = || builder.data.master(&[rows, width], 1.0);
            let (values, grads) = (vec![matrix()?], vec![matrix()?]);
            let signum = Optimizer::Signum(Signum::new(1e-4));
            Ok(OptimizerRun::new(signum, values, grads))
        }),
    }
}

struct Builder<'b, 'a> {
    pass: Pass,
    data: &'b mut Data<'a>,
    count: usize,
}

impl Builder<'_, '_> {
    /// `needed` says which inputs get gradients; `set` gives fixed operands, inputs and the
    /// gradients of outputs.
    fn operator<O: Operator>(
        &mut self,
        needed: &[bool],
        mut set: impl FnMut(&mut Data) -> Result<[Vec<Tensor>; 3]>,
        make: impl Fn(&[Tensor]) -> Result<O> + Send + 'static,
    ) -> Result<Box<dyn Run>> {
        let sets = (0..self.count).map(|_| {
            let [fixed, inputs, upstream] = set(self.data)?;
            Ok(Set {
                fixed,
                inputs,
                upstream,
            })
        });
        let sets = sets.collect::<Result<Vec<_>>>()?;
        Ok(Box::new(OperatorRun::new(self.pass, needed, sets, make)))
    }

    fn embedding(&mut self, tokens: usize, vocab: usize, width: usize) -> Result<Box<dyn Run>> {
        self.operator(
            &[true],
            |data| {
                Ok([
                    vec![data.indices(&[tokens], vocab)?],
                    vec![data.weight(&[vocab, width])?],
                    vec![data.activation(&[tokens, width], 1.0)?],
                ])
            },
            |fixed| {
                Ok(Embedding {
                    ids: fixed[0].clone(),
                })
            },
        )
    }

    fn rmsnorm(&mut self, tokens: usize, width: usize) -> Result<Box<dyn Run>> {
        self.operator(
            &[true],
            |data| {
                let weight = data.vector(width)?;
                let [x, dy] = data.activations([tokens, width], 1.0)?;
                Ok([vec![weight], vec![x], vec![dy]])
            },
            |fixed| {
                Ok(RmsNorm {
                    weight: fixed[0].clone(),
                    eps: 1e-6,
                })
            },
        )
    }

    fn rope(&mut self, tokens: usize, heads: usize, head_dim: usize) -> Result<Box<dyn Run>> {
        let table = RopeTable::new(tokens, head_dim, 10_000.0)?;
        self.operator(
            &[true],
            |data| {
                let [x, dy] = data.activations([tokens, heads * head_dim], 1.0)?;
                Ok([vec![], vec![x], vec![dy]])
            },
            move |_| {
                Ok(Rope {
                    seq_len: tokens,
                    start: 0,
                    heads,
                    table: table.clone(),
                })
            },
        )
    }

    fn swiglu(&mut self, tokens: usize, width: usize) -> Result<Box<dyn Run>> {
        self.operator(
            &[true; 2],
            |data| {
                let [gate, up, dy] = data.activations([tokens, width], 2.0)?;
                Ok([vec![], vec![gate, up], vec![dy]])
            },
            |_| Ok(SwiGlu),
        )
    }

    fn flash_attention(
        &mut self,
        tokens: usize,
        [heads, kv_heads]: [usize; 2],
        head_dim: usize,
    ) -> Result<Box<dyn Run>> {
        self.operator(
            &[true; 3],
            |data| {
                let [q, d_o] = data.activations([tokens, heads * head_dim], 2.0)?;
                let [k, v] = data.activations([tokens, kv_heads * head_dim], 2.0)?;
                Ok([vec![], vec![q, k, v], vec![d_o]])
            },
            move |_| {
                Ok(FlashAttention {
                    batch: 1,
                    seq_len: tokens,
                    heads,
                    kv_heads,
                    head_dim,
                    doc_starts: None,
                })
            },
        )
    }

    fn gemm(&mut self, tokens: usize, inner: usize, out: usize) -> Result<Box<dyn Run>> {
        self.operator(
            &[true],
            |data| {
                Ok([
                    vec![data.weight(&[out, inner])?],
                    vec![data.activation(&[tokens, inner], 1.0)?],
                    vec![data.activation(&[tokens, out], 1.0)?],
                ])
            },
            |fixed| {
                Ok(Linear {
                    weight: fixed[0].clone(),
                    bias: None,
                })
            },
        )
    }

    /// With the dropout that training has unless told otherwise.
    fn lora(
        &mut self,
        tokens: usize,
        [inner, out]: [usize; 2],
        rank: usize,
    ) -> Result<Box<dyn Run>> {
        let p = TrainConfig::default().lora_dropout as f32;
        self.operator(
            &[true; 3],
            |data| {
                let x = data.activation(&[tokens, inner], 1.0)?;
                let a = data.master(&[rank, inner], 0.02)?;
                let b = data.master(&[out, rank], 0.02)?;
                Ok([
                    vec![data.weight(&[out, inner])?],
                    vec![x, a, b],
                    vec![data.activation(&[tokens, out], 1.0)?],
                ])
            },
            move |fixed| {
                let module = Frozen {
                    weight: fixed[0].clone(),
                    bias: None,
                    dropout: Some(Dropout {
                        p,
                        stream: Stream::new(0, Purpose::Dropout, 0, 0),
                        step: None,
                    }),
                };
                Ok(LoraLinear {
                    modules: vec![module],
                    scale: 4.0,
                })
            },
        )
    }

    /// The pairs are sorted by latent in the backward pass, as for the decoder's; in training
    /// both share one sorting.
    fn topk(
        &mut self,
        tokens: usize,
        width: usize,
        latents: usize,
        k: usize,
    ) -> Result<Box<dyn Run>> {
        self.operator(
            &[false, true, true, true],
            |data| {
                let x = data.activation(&[tokens, width], 1.0)?;
                let w_enc = data.master(&[latents, width], 1.0 / (width as f32).sqrt())?;
                let (b_enc, b_dec) = (data.master(&[latents], 0.1)?, data.master(&[width], 0.1)?);
                let grad = data.master(&[tokens, k], 1.0)?;
                Ok([vec![], vec![x, w_enc, b_enc, b_dec], vec![grad]])
            },
            move |_| Ok(TopK::new(k, SharedGroups::default())),
        )
    }

    fn sparse_decode(
        &mut self,
        tokens: usize,
        width: usize,
        latents: usize,
        k: usize,
    ) -> Result<Box<dyn Run>> {
        self.operator(
            &[true; 3],
            |data| {
                let acts = data.master(&[tokens, k], 1.0)?;
                let w_dec = data.master(&[latents, width], 1.0)?;
                let b_dec = data.master(&[width], 1.0)?;
                let grad = data.activation(&[tokens, width], 1.0)?;
                let indices = data.indices(&[tokens, k], latents)?;
                Ok([vec![indices], vec![acts, w_dec, b_dec], vec![grad]])
            },
            |fixed| {
                Ok(SparseDecode {
                    indices: fixed[0].clone(),
                    groups: SharedGroups::default(),
                })
            },
        )
    }

    /// The squared error against a variance that is known.
    fn fvu(&mut self, tokens: usize, width: usize) -> Result<Box<dyn Run>> {
        self.operator(
            &[true],
            |data| {
                let [x, x_hat] = data.activations([tokens, width], 1.0)?;
                Ok([vec![x], vec![x_hat], vec![data.seed()?]])
            },
            |fixed| Fvu::with_variance(fixed[0].clone(), 1.0),
        )
    }

    fn decode_linear(&mut self, batch: usize, inner: usize, out: usize) -> Result<Box<dyn Run>> {
        let mut calls = Vec::with_capacity(self.count);
        for _ in 0..self.count {
            let weight = self.data.weight(&[out, inner])?;
            let x = self.data.activation(&[batch, inner], 1.0)?;
            calls.push(Box::new(move |device: &Device| {
                let map = Map {
                    weight: &weight,
                    bias: None,
                };
                let outputs = decode::linear(device, &x, &[map])?;
                let missing = || Error::operand("decode", "one output", "none");
                outputs.into_iter().next().ok_or_else(missing)
            }) as _);
        }
        Ok(Box::new(Calls::new(calls)))
    }

    fn decode_attention(&mut self, tokens: usize, heads: Heads) -> Result<Box<dyn Run>> {
        let width = heads.kv * heads.dim;
        let mut calls = Vec::with_capacity(self.count);
        for _ in 0..self.count {
            let held = tokens.saturating_sub(1);
            let [keys, values] = self.data.activations([held, width], 2.0)?;
            let q = self.data.activation(&[1, heads.queries * heads.dim], 2.0)?;
            let [k, v] = self.data.activations([1, width], 2.0)?;
            let mut cache = KvCache::new(self.data.device(), 1, width);
            cache.extend(self.data.device(), 0, &keys, &values)?;
            let rope = RopeTable::new(tokens, heads.dim, 10_000.0)?;
            calls.push(Box::new(move |device: &Device| {
                // What the last call added.
                cache.truncate(held);
                let mut caches = [&mut cache];
                let mut batch = Batch::new(device, heads, &rope, &mut caches, 0)?;
                batch.attention(0, q.clone(), k.clone(), &v)
            }) as _);
        }
        Ok(Box::new(Calls::new(calls)))
    }

    /// Logits like a model's, few of which are likely.
    fn sample(&mut self, batch: usize, vocab: usize) -> Result<Box<dyn Run>> {
        let mut calls = Vec::with_capacity(self.count);
        for seed in 0..self.count as u64 {
            let logits = self.data.logits(&[batch, vocab])?;
            let words: Vec<u64> = (0..batch as u64).map(|i| (seed + i) << 60).collect();
            calls.push(Box::new(move |device: &Device| {
                let filter = Filter {
                    temperature: 0.7,
                    top_k: 0,
                    top_p: 0.95,
                };
                sample(device, &logits, filter, &words)
            }) as _);
        }
        Ok(Box::new(Calls::new(calls)))
    }

    fn kl_div(&mut self, tokens: usize, width: usize, vocab: usize) -> Result<Box<dyn Run>> {
        self.operator(
            &[true],
            |data| {
                let head = data.weight(&[vocab, width])?;
                let [teacher, student] = data.activations([tokens, width], 1.0)?;
                Ok([vec![teacher, head], vec![student], vec![]])
            },
            |fixed| {
                Ok(KlDiv {
                    teacher: fixed[0].clone(),
                    head: fixed[1].clone(),
                })
            },
        )
    }

    fn cross_entropy(&mut self, tokens: usize, width: usize, vocab: usize) -> Result<Box<dyn Run>> {
        let targets: Vec<_> = (0..tokens)
            .map(|t| Some((t * 7919 % vocab) as u32))
            .collect();
        self.operator(
            &[true],
            |data| {
                let head = data.weight(&[vocab, width])?;
                let hidden = data.activation(&[tokens, width], 1.0)?;
                Ok([vec![head], vec![hidden], vec![]])
            },
            move |fixed| {
                Ok(CrossEntropy {
                    targets: targets.clone(),
                    head: fixed[0].clone(),
                })
            },
        )
    }

    fn optimizer(
        &mut self,
        mut make: impl FnMut(&mut Self) -> Result<OptimizerRun>,
    ) -> Result<Box<dyn Run>> {
        let runs = (0..self.count).map(|_| make(self)).collect::<Result<_>>()?;
        Ok(Box::new(InTurn::new(runs)))
    }

    /// Parameters of `count` values in all, and their gradients.
    fn parameters(&mut self, count: usize) -> Result<[Vec<Tensor>; 2]> {
        let mut result = [Vec::new(), Vec::new()];
        for start in (0..count).step_by(PARAMETER) {
            for tensors in &mut result {
                let len = PARAMETER.min(count - start);
                tensors.push(self.data.master(&[len], 0.1)?);
            }
        }
        Ok(result)
    }
}
