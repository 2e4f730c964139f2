//! The forward pass of [`Qwen2`] on a tape, in pieces that the two stages put together: up to
//! the hookpoint, from it on, with adapters or without.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::{DecoderLayer, Linear, Lora, LoraPair, Module, Qwen2, Qwen2Config};
use crate::ops;
use crate::ops::decode::KvCache;
use crate::ops::embedding::Embedding;
use crate::ops::flash_attention::{FlashAttention, check_documents};
use crate::ops::lora::{Dropout, Frozen, LoraLinear};
use crate::ops::rmsnorm::RmsNorm;
use crate::ops::rope::{Rope, RopeTable};
use crate::ops::swiglu::SwiGlu;
use crate::rng::{Purpose, Stream};
use crate::tape::{Tape, Var};
use crate::tensor::{DType, Tensor};

/// How the tokens of a step lie: `batch` sequences of `seq_len`, one after another.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Sequences.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// \[batch x seq_len\] u32: for each token the index within its sequence where its document
    /// begins; attention does not look further back.
    pub doc_starts: Option<Tensor>,
    rope: Arc<RopeTable>,
}

impl Layout {
    /// Sequences of `seq_len` tokens for a model of this shape.
    pub fn new(config: &Qwen2Config, batch: usize, seq_len: usize) -> Result<Self> {
        let rope = RopeTable::new(seq_len, config.head_dim, config.rope_theta)?;
        Ok(Self {
            batch,
            seq_len,
            doc_starts: None,
            rope,
        })
    }

    /// Another number of sequences, with their documents.
    pub fn with_batch(&self, batch: usize, doc_starts: Option<Tensor>) -> Self {
        Self {
            batch,
            doc_starts,
            ..self.clone()
        }
    }

    /// With the documents in the memory of `device`, once for all layers.
    ///
    /// # Errors
    /// Documents that do not lie so, out of memory.
    pub fn on(mut self, device: &Device) -> Result<Self> {
        if let (Device::Cuda(cuda), Some(starts)) = (device, &self.doc_starts) {
            // On the device nobody can look at them again.
            check_documents(starts, self.tokens(), self.seq_len)?;
            self.doc_starts = Some(cuda.resident(starts, DType::U32)?);
        }
        Ok(self)
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.batch * self.seq_len
    }

    /// Whether both are of one size and made of one another, whatever their documents.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let sizes = |layout: &Self| (layout.batch, layout.seq_len);
        sizes(self) == sizes(other) && Arc::ptr_eq(&self.rope, &other.rope)
    }
}

/// Dropout of the adapters' inputs in one step.
#[derive(Clone, Debug)]
pub struct StepDropout {
    /// Probability of a zero.
    pub p: f32,
    /// Seed of the run.
    pub seed: u64,
    /// A number that no other micro-batch of the run has.
    pub step: u64,
    /// On a GPU, where its low and its high word are read instead, \[2\] u32.
    pub in_memory: Option<Tensor>,
}

/// Adapters on a tape: as parameters where they are trained, as constants where they only act.
pub struct Adapters {
    pairs: BTreeMap<(usize, Module), (Var, Var)>,
    /// The layers whose adapters are parameters.
    trained: Range<usize>,
    scale: f32,
    dropout: Option<StepDropout>,
}

impl Adapters {
    /// All adapters as constants.
    pub fn frozen(lora: &Lora) -> Self {
        Self::new(lora, 0..0, None, Var::constant)
    }

    /// The adapters of `layers` as parameters of `tape`, with dropout; those of other layers as
    /// constants, without.
    pub fn trained(
        tape: &mut Tape,
        lora: &Lora,
        layers: Range<usize>,
        dropout: Option<StepDropout>,
    ) -> Self {
        let dropout = dropout.filter(|d| d.p > 0.0);
        Self::new(lora, layers, dropout, |factor| tape.parameter(factor))
    }

    fn new(
        lora: &Lora,
        trained: Range<usize>,
        dropout: Option<StepDropout>,
        mut parameter: impl FnMut(Tensor) -> Var,
    ) -> Self {
        let pairs = lora.pairs.iter().map(|(&key, LoraPair { a, b })| {
            let mut var = |factor: &Tensor| match trained.contains(&key.0) {
                true => parameter(factor.clone()),
                false => Var::constant(factor.clone()),
            };
            (key, (var(a), var(b)))
        });
        Self {
            pairs: pairs.collect(),
            trained,
            scale: lora.config.scale(),
            dropout,
        }
    }

    /// Dropout of a layer's adapters.
    fn dropout_of(&self, layer: usize) -> Option<&StepDropout> {
        let dropout = self.dropout.as_ref();
        dropout.filter(|_| self.trained.contains(&layer))
    }

    fn has_all(&self, layer: usize, modules: &[Module]) -> bool {
        let mut modules = modules.iter();
        modules.all(|&module| self.pairs.contains_key(&(layer, module)))
    }

    /// The factors A and B of each adapter that is trained, in the order of layer and module.
    pub fn parameters(&self) -> impl Iterator<Item = (&(usize, Module), &(Var, Var))> {
        let pairs = self.pairs.iter();
        pairs.filter(|((layer, _), _)| self.trained.contains(layer))
    }
}

impl Qwen2 {
    /// The embeddings of token ids \[T\] u32: \[T, d\].
    pub fn embed(&self, tape: &mut Tape, ids: Tensor) -> Result<Var> {
        tape.apply(
            Embedding { ids },
            &[&Var::constant(self.embed_tokens.clone())],
        )
    }

    /// Runs decoder layers `layers` on hidden states \[T, d\].
    ///
    /// # Errors
    /// When a layer does not exist or the hidden states do not fit the layout.
    pub fn decode(
        &self,
        tape: &mut Tape,
        mut x: Var,
        layers: Range<usize>,
        layout: &Layout,
        adapters: Option<&Adapters>,
    ) -> Result<Var> {
        for index in layers {
            x = self.pass(index, layout, adapters)?.run(tape, x, None)?;
        }
        Ok(x)
    }

    /// As [`Self::decode`] for the first tokens of one sequence, whose keys and values `cache`
    /// keeps, so that [`Self::decode_next`] can go on from there.
    ///
    /// # Errors
    /// As for [`Self::decode`]; several sequences, layers of which the cache holds tokens already.
    pub fn prefill(
        &self,
        tape: &mut Tape,
        mut x: Var,
        layers: Range<usize>,
        layout: &Layout,
        adapters: Option<&Adapters>,
        cache: &mut KvCache,
    ) -> Result<Var> {
        let (batch, held) = (
            layout.batch,
            layers.clone().map(|layer| cache.tokens(layer)),
        );
        let tokens = held.max().unwrap_or(0);
        if batch != 1 || tokens > 0 {
            return Err(Error::operand(
                "prefill",
                "one sequence and a cache without tokens in its layers",
                format!("{batch} and a cache of {tokens}"),
            ));
        }
        for index in layers {
            let pass = self.pass(index, layout, adapters)?;
            x = pass.run(tape, x, Some(cache))?;
        }
        Ok(x)
    }

    fn pass<'a>(
        &'a self,
        index: usize,
        layout: &'a Layout,
        adapters: Option<&'a Adapters>,
    ) -> Result<LayerPass<'a>> {
        let layer = self.layer(index)?;
        Ok(LayerPass {
            config: &self.config,
            layer,
            index,
            layout,
            adapters,
        })
    }

    /// Decoder layer number `index`.
    ///
    /// # Errors
    /// When there is no such layer.
    pub(super) fn layer(&self, index: usize) -> Result<&DecoderLayer> {
        self.layers.get(index).ok_or_else(|| {
            Error::operand(
                "decode",
                format!("a layer below {}", self.layers.len()),
                index.to_string(),
            )
        })
    }

    /// The norm before the output head.
    pub fn final_norm(&self, tape: &mut Tape, x: &Var) -> Result<Var> {
        tape.apply(
            RmsNorm {
                weight: self.norm.clone(),
                eps: self.config.rms_norm_eps,
            },
            &[x],
        )
    }
}

/// One decoder layer on one step's tokens.
struct LayerPass<'a> {
    config: &'a Qwen2Config,
    layer: &'a DecoderLayer,
    index: usize,
    layout: &'a Layout,
    adapters: Option<&'a Adapters>,
}

impl LayerPass<'_> {
    fn run(&self, tape: &mut Tape, x: Var, cache: Option<&mut KvCache>) -> Result<Var> {
        // What is not used again goes out of scope: a value is as large as a layer's activations.
        let x = self.attended(tape, x, cache)?;
        let activated = self.activated(tape, &x)?;
        self.linear(tape, Module::Down, &activated, Some(&x))
    }

    /// x and what attention adds to it.
    fn attended(&self, tape: &mut Tape, x: Var, cache: Option<&mut KvCache>) -> Result<Var> {
        let normed = self.norm(tape, &self.layer.input_norm, &x)?;
        let heads = self.attention(tape, normed, cache)?;
        self.linear(tape, Module::O, &heads, Some(&x))
    }

    fn activated(&self, tape: &mut Tape, x: &Var) -> Result<Var> {
        let normed = self.norm(tape, &self.layer.post_attention_norm, x)?;
        let [gate, up] = self.linears(tape, [Module::Gate, Module::Up], &normed)?;
        drop(normed);
        tape.apply(SwiGlu, &[&gate, &up])
    }

    fn attention(&self, tape: &mut Tape, x: Var, cache: Option<&mut KvCache>) -> Result<Var> {
        let config = self.config;
        let [q, k, v] = self.linears(tape, [Module::Q, Module::K, Module::V], &x)?;
        drop(x);
        let q = self.rotated(tape, q, config.num_attention_heads)?;
        let k = self.rotated(tape, k, config.num_key_value_heads)?;
        if let Some(cache) = cache {
            cache.extend(tape.device(), self.index, k.value(), v.value())?;
        }
        let attention = FlashAttention {
            batch: self.layout.batch,
            seq_len: self.layout.seq_len,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            doc_starts: self.layout.doc_starts.clone(),
        };
        tape.apply(attention, &[&q, &k, &v])
    }

    fn norm(&self, tape: &mut Tape, weight: &Tensor, x: &Var) -> Result<Var> {
        tape.apply(
            RmsNorm {
                weight: weight.clone(),
                eps: self.config.rms_norm_eps,
            },
            &[x],
        )
    }

    fn rotated(&self, tape: &mut Tape, x: Var, heads: usize) -> Result<Var> {
        let rope = Rope {
            seq_len: self.layout.seq_len,
            start: 0,
            heads,
            table: self.layout.rope.clone(),
        };
        tape.apply(rope, &[&x])
    }

    /// Modules that read the same input: one operator where all of them have an adapter.
    fn linears<const N: usize>(
        &self,
        tape: &mut Tape,
        modules: [Module; N],
        x: &Var,
    ) -> Result<[Var; N]> {
        let outputs = match self.adapters.filter(|a| a.has_all(self.index, &modules)) {
            Some(adapters) => self.adapted(tape, adapters, &modules, x, None)?,
            None => modules
                .iter()
                .map(|&module| self.linear(tape, module, x, None))
                .collect::<Result<_>>()?,
        };
        let wrong = |found: Vec<Var>| {
            Error::operand("decode", format!("{N} outputs"), found.len().to_string())
        };
        outputs.try_into().map_err(wrong)
    }

    fn linear(
        &self,
        tape: &mut Tape,
        module: Module,
        x: &Var,
        residual: Option<&Var>,
    ) -> Result<Var> {
        if let Some(adapters) = self.adapters.filter(|a| a.has_all(self.index, &[module])) {
            let outputs = self.adapted(tape, adapters, &[module], x, residual)?;
            let output = outputs.into_iter().next();
            return output.ok_or_else(|| Error::operand("decode", "one output", "none"));
        }
        let Linear { weight, bias } = self.layer.module(module).clone();
        let mut inputs = vec![x];
        inputs.extend(residual);
        tape.apply(ops::gemm::Linear { weight, bias }, &inputs)
    }

    /// The outputs of modules that all have an adapter.
    fn adapted(
        &self,
        tape: &mut Tape,
        adapters: &Adapters,
        modules: &[Module],
        x: &Var,
        residual: Option<&Var>,
    ) -> Result<Vec<Var>> {
        let (mut inputs, mut frozen) = (vec![x], Vec::new());
        let dropout = adapters.dropout_of(self.index);
        for &module in modules {
            if let Some((a, b)) = adapters.pairs.get(&(self.index, module)) {
                inputs.extend([a, b]);
            }
            let Linear { weight, bias } = self.layer.module(module).clone();
            frozen.push(Frozen {
                weight,
                bias,
                dropout: dropout.map(|d| self.dropout(d, module)),
            });
        }
        inputs.extend(residual);
        let op = LoraLinear {
            modules: frozen,
            scale: adapters.scale,
        };
        tape.apply_all(op, &inputs)
    }

    fn dropout(&self, dropout: &StepDropout, module: Module) -> Dropout {
        let index = self.index as u32 * Module::ALL.len() as u32 + module as u32;
        let stream = Stream::new(dropout.seed, Purpose::Dropout, dropout.step, index);
        Dropout {
            p: dropout.p,
            stream,
            step: dropout.in_memory.clone(),
        }
    }
}
