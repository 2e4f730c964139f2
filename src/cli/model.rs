//! A model as `eval` and `generate` use it: with adapter or SAE, and its tokenizer.

use std::path::{Path, PathBuf};

use resa_engine::data::{ChatTemplate, Tokenizer};
use resa_engine::eval::{GenerateOptions, Inference, Sampling};
use resa_engine::formats::hub::Want;
use resa_engine::formats::{huggingface, peft, sparsify};
use resa_engine::model::{Lora, Qwen2, Sae};
use resa_engine::report::Progress;
use resa_engine::train::{DtypeSetting, fetch, inputs};
use resa_engine::{Device, Error, Result};

use super::args::{ModelArgs, SamplingArgs};

/// What the options name, loaded.
pub struct Loaded {
    pub dir: PathBuf,
    pub device: Device,
    pub tokenizer: Tokenizer,
    model: Qwen2,
    lora: Option<Lora>,
    sae: Option<(Sae, usize)>,
}

impl Loaded {
    /// Loads the model that `given`, a folder or a hub id, names. Where text is written
    /// (`is_decoding`) weights stay as they are stored unless f32 is asked for: the fewer bytes,
    /// the faster a token comes.
    pub fn new(given: &str, with: &ModelArgs, is_decoding: bool) -> Result<Self> {
        let device = inputs::device(with.device, with.dtype, with.threads)?;
        let mut progress = Progress::stderr(1);
        let mut folder = |given: &Path, want| fetch::folder(given, want, &mut progress);
        let dir = folder(given.as_ref(), Want::Model)?;
        let adapter = with.adapter.as_deref();
        let adapter = adapter.map(|given| folder(given, Want::Adapter));
        let adapter = adapter.transpose()?;
        let sae = with.sae.as_deref().zip(with.layer);
        let sae = sae.map(|(given, layer)| Ok((folder(given, Want::Sae(Some(layer)))?, layer)));
        let sae: Option<(PathBuf, usize)> = sae.transpose()?;
        drop(progress);
        let mut model = huggingface::load(&dir)?;
        let layers = 0..model.layers.len();
        let dtype = match (with.dtype, is_decoding) {
            (DtypeSetting::Auto, true) => DtypeSetting::Bf16,
            (dtype, _) => dtype,
        };
        device.run(|| inputs::prepare(&device, &mut model, dtype, layers, true))?;
        let lora = adapter.map(|dir| peft::load(&dir, &model.config));
        let mut lora = lora.transpose()?;
        let sae = sae.map(|(root, layer)| {
            let mut sae = sparsify::load_at(&root, layer, &model.config)?;
            sae.move_to(&device)?;
            Ok::<_, Error>((sae, layer))
        });
        let sae = sae.transpose()?;
        if let (Device::Cuda(cuda), Some(lora)) = (&device, &mut lora) {
            lora.upload(cuda)?;
        }
        let tokenizer = Tokenizer::from_dir(&dir)?;
        Ok(Self {
            dir,
            device,
            tokenizer,
            model,
            lora,
            sae,
        })
    }

    pub fn model(&self) -> &Qwen2 {
        &self.model
    }

    /// What a forward pass goes through.
    pub fn inference(&self) -> Inference<'_> {
        Inference {
            model: &self.model,
            adapters: self.lora.as_ref(),
            sae: self.sae.as_ref().map(|(sae, layer)| (sae, *layer)),
        }
    }

    /// The model's chat template, where it has one.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        ChatTemplate::from_dir(&self.dir)
    }

    /// An error unless every token of a prompt is one of the model's.
    pub fn check_prompt(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.model.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab) {
            Some(id) => Err(Error::file(
                Path::new(&self.dir).join("tokenizer.json"),
                format!("expected token ids below the model's vocab_size {vocab}, found {id}"),
            )),
            None => Ok(()),
        }
    }
}

impl SamplingArgs {
    /// The options of a generator.
    pub fn options(&self, stop_tokens: Vec<u32>, stop_strings: Vec<String>) -> GenerateOptions {
        GenerateOptions {
            sampling: Sampling {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                seed: self.seed,
            },
            max_new_tokens: self.max_new_tokens,
            stop_tokens,
            stop_strings,
            batch: self.batch,
        }
    }
}
