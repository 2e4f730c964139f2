//! The settings that are one of a few words, and how lists of them are written.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::device::Precision;

/// Which stages of SAE-Tuning run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Stage I, then Stage II.
    All,
    /// Stage I: the sparse autoencoder.
    Sae,
    /// Stage II: the adapters.
    Sft,
}

/// What Stage II's loss compares with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// The model without the SAE (KL divergence).
    SaeTuning,
    /// The answer's text (cross-entropy), without any SAE: the paper's baseline.
    Sft,
}

/// How the SAE starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SaeInit {
    /// Random weights.
    Scratch,
    /// A trained SAE that is trained further.
    Finetune,
    /// A trained SAE that is used as it is.
    Pretrained,
}

/// Optimizer of Stage I.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SaeOptimizer {
    /// Sign descent under schedule-free averaging, constant learning rate.
    Signum,
    /// Adam; the learning rate rises linearly for 1000 steps (a fifth of all steps, where that
    /// is less) and falls linearly to zero at the last.
    Adam,
}

impl SaeOptimizer {
    /// The learning rate for an autoencoder of that number of latents: 5e-3 (signum) or 2e-4
    /// (Adam), divided by √(latents / 2^14).
    pub fn default_lr(self, latents: usize) -> f64 {
        let base = match self {
            Self::Signum => 5e-3,
            Self::Adam => 2e-4,
        };
        base / (latents as f64 / f64::from(1u32 << 14)).sqrt()
    }
}

/// What Stage II's gradient does at the SAE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SaeGrad {
    /// It stops: layers up to the hookpoint are constant, and computed once.
    Stop,
    /// It flows through the reconstruction: all layers are trained.
    Through,
}

/// Floating-point type of frozen weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DtypeSetting {
    /// What the device computes best.
    Auto,
    /// 32-bit.
    F32,
    /// bfloat16.
    Bf16,
}

impl DtypeSetting {
    /// What matrix products on the CPU compute with: bf16 where it is asked for, about 1.5 times
    /// as fast on machines with AVX-512 BF16 and more so with AMX, at losses that may differ by a
    /// few percent.
    pub fn precision(self) -> Precision {
        match self {
            Self::Auto | Self::F32 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
        }
    }
}

/// Where operators run: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceSetting {
    /// The CPU, as long as one model of GPU alone, an H100, has run the kernels.
    Auto,
    /// The host's cores.
    Cpu,
    /// The GPU of that number.
    Cuda(usize),
}

impl fmt::Display for DeviceSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl FromStr for DeviceSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_prefix("cuda:").map(str::parse);
        match (text, number) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(number))) => Ok(Self::Cuda(number)),
            _ => Err(format!(
                "expected auto, cpu, cuda or cuda:N, found {text:?}"
            )),
        }
    }
}

impl TryFrom<String> for DeviceSetting {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceSetting> for String {
    fn from(device: DeviceSetting) -> Self {
        device.to_string()
    }
}

/// The layer that a hookpoint names: `model.layers.12`, `layers.12` or `12`.
///
/// # Errors
/// A message that says what was expected and found.
pub fn parse_hookpoint(text: &str) -> Result<usize, String> {
    let name = text.strip_prefix("model.").unwrap_or(text);
    let layer = name.strip_prefix("layers.").unwrap_or(name);
    layer
        .parse()
        .map_err(|_| format!("expected model.layers.N, layers.N or N, found {text:?}"))
}

/// The name of a hookpoint: `model.layers.12`.
pub fn hookpoint_name(layer: usize) -> String {
    format!("model.layers.{layer}")
}

/// One value or a list of them, each a word or a number.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a value or a list of values")]
enum OneOrMany {
    One(Word),
    Many(Vec<Word>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a number")]
enum Word {
    Number(usize),
    Text(String),
}

impl OneOrMany {
    fn words(self) -> Vec<String> {
        let words = match self {
            Self::One(word) => vec![word],
            Self::Many(words) => words,
        };
        let text = words.into_iter().map(|word| match word {
            Word::Number(number) => number.to_string(),
            Word::Text(text) => text,
        });
        text.collect()
    }
}

/// Hookpoints as a list of names.
pub(super) mod hookpoints {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(layers: &[usize], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(layers.iter().map(|&layer| super::hookpoint_name(layer)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<usize>, D::Error> {
        let words = super::OneOrMany::deserialize(from)?.words();
        let layers = words.iter().map(|word| super::parse_hookpoint(word));
        layers.collect::<Result<_, _>>().map_err(D::Error::custom)
    }
}

/// Linear modules as a list of PEFT's names, also read as one text with commas.
pub(super) mod modules {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::model::Module;

    pub fn serialize<S: Serializer>(modules: &[Module], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(modules.iter().map(|module| module.name()))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Module>, D::Error> {
        let words = super::OneOrMany::deserialize(from)?.words();
        let names = words.iter().flat_map(|word| word.split(','));
        names
            .map(|name| parse(name.trim()).map_err(D::Error::custom))
            .collect()
    }

    fn parse(name: &str) -> Result<Module, String> {
        Module::from_name(name).ok_or_else(|| {
            let known = Module::ALL.map(Module::name).join(", ");
            format!("no such module {name:?}; expected some of {known}")
        })
    }
}
