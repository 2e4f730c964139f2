//! Data: records, the template that makes texts of them, tokenising and packing, the activation cache.

pub mod cache;
pub mod chat;
mod guard;
pub mod pack;
mod parquet;
mod parquet_depth;
pub mod records;
pub mod template;
pub mod tokenizer;

pub use cache::ActivationCache;
pub use chat::{ChatTemplate, Message};
pub use pack::{Packed, order, pack};
pub use records::Record;
pub use template::{Template, Text};
pub use tokenizer::Tokenizer;
