//! Which rows are measured.

use super::shapes::ModelShape;
use super::work::{Bytes, Limits, Pass, Work};
use crate::device::Precision;
use crate::model::Module;

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Name of the model whose shape it is.
    pub model: &'static str,
    /// What the weight is, where an operator has rows of several: `q_proj`.
    pub part: Option<&'static str>,
    /// The model's own size.
    pub whole: Work,
    /// What is measured, which may be smaller.
    pub work: Work,
    /// Forward, backward, or a step.
    pub pass: Pass,
    /// What matrix products compute with; frozen weights are stored so too.
    pub precision: Precision,
}

/// What rows are measured with.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Size of an activation in bytes.
    pub activation: usize,
    /// What matrix products compute with.
    pub precisions: &'static [Precision],
    /// The most that a row may compute and move.
    pub limits: Limits,
}

impl Setup {
    /// Sizes of stored values.
    pub fn bytes(&self, precision: Precision) -> Bytes {
        Bytes {
            activation: self.activation,
            weight: precision.dtype().size(),
        }
    }
}

impl Case {
    /// What is measured in words that a filter is looked for in: `gemm backward smollm2 q_proj`.
    pub fn name(&self) -> String {
        let operator = self.work.operator();
        let part = self.part.map_or(String::new(), |part| format!(" {part}"));
        let pass = self.pass;
        let weight = match self.work.has_products() {
            true => format!(" {}", self.precision.name()),
            false => String::new(),
        };
        format!("{operator} {pass} {}{part}{weight}", self.model)
    }

    /// What was made smaller: `2048 x 1536 x 151936`, the model's own size, if anything was.
    pub fn reduced_from(&self) -> Option<String> {
        (self.work != self.whole).then(|| self.whole.to_string())
    }
}

/// All rows of a model.
pub fn cases(model: &ModelShape, setup: &Setup) -> Vec<Case> {
    let mut cases = Vec::new();
    for (part, whole) in works(model) {
        let precisions = match whole.has_products() {
            true => setup.precisions,
            false => &setup.precisions[..1],
        };
        for &pass in whole.passes() {
            for &precision in precisions {
                cases.push(Case {
                    model: model.name,
                    part,
                    whole,
                    work: whole.within(setup.limits, pass, setup.bytes(precision)),
                    pass,
                    precision,
                });
            }
        }
    }
    cases
}

/// The linear modules of different shapes: o is q's transpose, v is k's twin, up is gate's.
const LINEAR: [Module; 4] = [Module::Q, Module::K, Module::Gate, Module::Down];

fn works(model: &ModelShape) -> Vec<(Option<&'static str>, Work)> {
    let (config, tokens) = (&model.config, model.tokens);
    let (width, vocab) = (config.hidden_size, config.vocab_size);
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let (latents, k, head_dim) = (model.latents, model.k, config.head_dim);
    let inner = config.intermediate_size;
    let values = model.adapter_values();
    let mut works = vec![
        (
            None,
            Work::Embedding {
                tokens,
                vocab,
                width,
            },
        ),
        (None, Work::RmsNorm { tokens, width }),
        (
            None,
            Work::Rope {
                tokens,
                heads,
                head_dim,
            },
        ),
        (
            None,
            Work::SwiGlu {
                tokens,
                width: inner,
            },
        ),
        (
            None,
            Work::FlashAttention {
                tokens,
                heads,
                kv_heads,
                head_dim,
            },
        ),
    ];
    for module in LINEAR {
        let (out, inner) = config.module_dims(module);
        works.push((Some(module.name()), Work::Gemm { tokens, inner, out }));
    }
    for module in [Module::Q, Module::Gate] {
        let (out, inner) = config.module_dims(module);
        let rank = model.rank;
        works.push((
            Some(module.name()),
            Work::Lora {
                tokens,
                inner,
                out,
                rank,
            },
        ));
    }
    let (out, inner) = config.module_dims(Module::Gate);
    let batch = 1;
    works.push((
        Some(Module::Gate.name()),
        Work::DecodeLinear { batch, inner, out },
    ));
    works.push((
        Some("attention"),
        Work::DecodeAttention {
            tokens,
            heads,
            kv_heads,
            head_dim,
        },
    ));
    let rest = [
        Work::TopK {
            tokens,
            width,
            latents,
            k,
        },
        Work::SparseDecode {
            tokens,
            width,
            latents,
            k,
        },
        Work::Fvu { tokens, width },
        Work::KlDiv {
            tokens,
            width,
            vocab,
        },
        Work::CrossEntropy {
            tokens,
            width,
            vocab,
        },
        Work::Sample { batch, vocab },
        Work::AdamW { values },
        Work::Signum {
            rows: latents,
            width,
        },
        Work::Clip { values },
    ];
    works.extend(rest.map(|work| (None, work)));
    works
}
