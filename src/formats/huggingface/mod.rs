//! Language models as Hugging Face's transformers stores them: a folder with `config.json` and
//! `model.safetensors`, or shards of it with `model.safetensors.index.json`.

mod checkpoint;
mod config;
mod copy;
mod load;
mod merge;
mod random;

pub use config::read_config;
pub(in crate::formats) use copy::TOKENIZER_FILES;
pub use copy::copy_tokenizer;
pub use load::{check, load};
pub use merge::{merge_into, save_merged};
pub use random::save_random;
