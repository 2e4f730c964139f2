//! What a run reads: models, tokenizer, texts.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::memory::total_memory;
use super::{Observer, TrainConfig, example, fetch};
use crate::data::records::{self, Record};
use crate::data::{Packed, Template, Tokenizer, pack};
use crate::device::{Device, Precision};
use crate::error::{Error, Result};
use crate::formats::hub::Want;
use crate::formats::{huggingface, peft};
use crate::model::{Layout, Qwen2, Qwen2Config};
use crate::tensor::Tensor;
use crate::train::{DeviceSetting, DtypeSetting};

/// Where a run's files are on this machine, the embedded example's included.
#[derive(Clone, Debug, PartialEq)]
pub struct Sources {
    /// Folder of the model to tune.
    pub target: PathBuf,
    /// Folder of the model whose activations the SAE learns, where it is another one.
    pub source: Option<PathBuf>,
    /// PEFT adapter to merge into the source model.
    pub source_adapter: Option<PathBuf>,
    /// Files of the trigger data, which Stage I trains on.
    pub data: Vec<PathBuf>,
    /// Files of the elicitation data of Stage II, where they are others.
    pub elicitation_data: Option<Vec<PathBuf>>,
    /// Folder of the SAE to start from, where one is given.
    pub sae: Option<PathBuf>,
    /// Folder of the adapter that Stage II starts from, where one is given.
    pub adapter: Option<PathBuf>,
    /// File of the template, where it is not the built-in one.
    pub template: Option<PathBuf>,
}

impl Sources {
    /// The files that `config` names, hub ids downloaded; for the embedded example, written below
    /// `run`.
    ///
    /// # Errors
    /// What is neither here nor on the hub; the operating system's.
    pub fn resolve(config: &TrainConfig, run: &Path, observer: &mut dyn Observer) -> Result<Self> {
        let mut folder = |given: Option<&Path>, want: Want| {
            given
                .map(|given| fetch::folder(given, want, &mut *observer))
                .transpose()
        };
        let layer = match config.hookpoints.as_slice() {
            [layer] => Some(*layer),
            _ => None,
        };
        let sae = folder(config.sae.as_deref(), Want::Sae(layer))?;
        let adapter = config.adapter.as_deref().filter(|_| config.runs_sft());
        let adapter = folder(adapter, Want::Adapter)?;
        let Some(target) = config.target.as_ref().or(config.source.as_ref()) else {
            let example = example::unpack(&run.join(example::DIR))?;
            return Ok(Self {
                sae,
                adapter,
                ..example
            });
        };
        // What the stages that run do not read is not fetched.
        let runs_sae = config.runs_sae();
        let source = config.source.as_ref().filter(|s| runs_sae && *s != target);
        let source = folder(source.map(Path::new), Want::Model)?;
        let source_adapter = config.source_adapter.as_deref().filter(|_| runs_sae);
        let source_adapter = source_adapter.map(Path::new);
        let source_adapter = folder(source_adapter, Want::Adapter)?;
        let data = config.data.as_ref().ok_or_else(|| {
            Error::setting(
                "--data",
                "expected a file of problems and answers, found none",
            )
        })?;
        Ok(Self {
            target: fetch::folder(target.as_ref(), Want::Model, observer)?,
            source,
            source_adapter,
            data: fetch::data(data.as_ref(), observer)?,
            elicitation_data: config
                .elicitation_data
                .as_ref()
                .filter(|e| config.runs_sft() && *e != data)
                .map(|given| fetch::data(given.as_ref(), observer))
                .transpose()?,
            template: config.template.clone(),
            sae,
            adapter,
        })
    }

    /// Whether Stage I looks at the very model that Stage II tunes.
    pub fn source_is_target(&self) -> bool {
        self.source.is_none() && self.source_adapter.is_none()
    }

    /// The template of the texts.
    pub fn template(&self) -> Result<Template> {
        match &self.template {
            Some(path) => Template::from_file(path),
            None => Ok(Template::builtin()),
        }
    }

    /// The model whose activations the SAE learns, its adapter merged in; layers after `last`
    /// are not read.
    pub fn load_source(&self, device: &Device, dtype: DtypeSetting, last: usize) -> Result<Qwen2> {
        let dir = self.source.as_ref().unwrap_or(&self.target);
        let mut model = huggingface::load(dir)?;
        if let Some(adapter) = &self.source_adapter {
            let lora = peft::load(adapter, &model.config)?;
            huggingface::merge_into(&mut model, &lora)?;
        }
        prepare(device, &mut model, dtype, 0..last + 1, false)?;
        Ok(model)
    }
}

/// Brings the weights of `layers`, and those of the output head where asked, to where products
/// will use them. On a GPU that is its memory, in bf16. On the CPU they get the dtype of the
/// setting; where that is left to the engine and products are in f32, they are widened once if
/// they then take at most a third of the machine's memory (all of it, not what is free, so that
/// a resumed run decides alike), else at each use.
pub fn prepare(
    device: &Device,
    model: &mut Qwen2,
    dtype: DtypeSetting,
    layers: Range<usize>,
    head: bool,
) -> Result<()> {
    if let Device::Cuda(cuda) = device {
        return model.upload(cuda, layers, head);
    }
    let wide = match dtype {
        DtypeSetting::F32 => true,
        _ if dtype.precision() == Precision::Bf16 => return model.narrow(layers, head),
        _ => {
            let config = &model.config;
            let layer: usize = crate::model::Module::ALL
                .iter()
                .map(|&m| config.module_dims(m))
                .map(|(out, cols)| out * cols)
                .sum();
            let head = if head {
                config.vocab_size * config.hidden_size
            } else {
                0
            };
            let bytes = 4 * (layers.len() * layer + head) as u64;
            bytes <= total_memory().unwrap_or(8 << 30) / 3
        }
    };
    if wide {
        model.widen(layers, head)
    } else {
        Ok(())
    }
}

/// The device of the settings. `auto` is the CPU: one model of GPU alone, an H100, has run the
/// kernels.
///
/// # Errors
/// A device that is not there, or a dtype that it does not compute in.
pub fn device(setting: DeviceSetting, dtype: DtypeSetting, threads: usize) -> Result<Device> {
    match setting {
        DeviceSetting::Auto | DeviceSetting::Cpu => {
            Ok(Device::cpu(threads)?.with_precision(dtype.precision()))
        }
        DeviceSetting::Cuda(_) if dtype == DtypeSetting::F32 => Err(Error::setting(
            "--dtype",
            "expected bf16 or auto on a GPU, found f32",
        )),
        DeviceSetting::Cuda(ordinal) => {
            Device::cuda(ordinal, threads).map_err(|e| Error::setting("--device", e.to_string()))
        }
    }
}

/// Reads problems, makes texts of them and packs these into rows.
pub fn read_texts(
    data: &[impl AsRef<Path>],
    template: &Template,
    tokenizer: &Tokenizer,
    seq_len: usize,
    document_mask: bool,
) -> Result<(Vec<Record>, Packed)> {
    use rayon::prelude::*;
    let records = records::read_all(data)?;
    let texts = records
        .par_iter()
        .map(|r| template.render_text(r))
        .collect::<Result<Vec<_>>>()?;
    let packed = pack(&texts, tokenizer, seq_len, document_mask)?;
    Ok((records, packed))
}

/// An error unless every token id is one of the model's.
pub fn check_vocabulary(model: &Qwen2Config, packed: &Packed, tokenizer: &Path) -> Result<()> {
    let vocab = model.vocab_size;
    match packed.tokens.iter().find(|&&id| id as usize >= vocab) {
        Some(id) => Err(Error::file(
            tokenizer.join("tokenizer.json"),
            format!("expected token ids below the model's vocab_size {vocab}, found {id}"),
        )),
        None => Ok(()),
    }
}

/// The token ids of rows \[rows x seq_len\] and how they lie.
pub fn batch(packed: &Packed, rows: &[usize], layout: &Layout) -> Result<(Tensor, Layout)> {
    let shape = [rows.len() * packed.seq_len];
    let ids = rows.iter().flat_map(|&r| packed.row(r)).copied().collect();
    let doc_starts = match packed.doc_starts {
        Some(_) => {
            let starts = rows
                .iter()
                .filter_map(|&r| packed.row_doc_starts(r))
                .flatten();
            Some(Tensor::from_u32(starts.copied().collect(), shape)?)
        }
        None => None,
    };
    Ok((
        Tensor::from_u32(ids, shape)?,
        layout.with_batch(rows.len(), doc_starts),
    ))
}
