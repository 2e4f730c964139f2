//! The tokenizer of a Hugging Face model folder.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessorWrapper};

use super::guard::guarded;
use crate::{Error, Result};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";

/// The keys under which `tokenizer_config.json` names special tokens.
const NAMED_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// A tokenizer that gives the ids transformers' `PreTrainedTokenizerFast` gives on the same
/// folder. (transformers 5's `AutoTokenizer` replaces the pre-tokenizer of qwen2 folders
/// whatever the file says, so its ids can differ.)
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    eos_id: u32,
    eos_token: String,
    bos: Option<u32>,
    vocab_size: usize,
    eos_separates: bool,
}

/// A token and the byte range of the text it came from.
pub(crate) type Located = (u32, (usize, usize));

impl Tokenizer {
    /// Reads `tokenizer.json`, with `tokenizer_config.json` for the special tokens. Where the
    /// latter names no EOS token it is taken from `eos_token_id` in `config.json` or
    /// `generation_config.json` (the first, where there are several).
    ///
    /// # Errors
    /// Names the file and key when one is missing, malformed, or names an unknown token.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join(TOKENIZER);
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let mut inner = attempt(&path, "not a valid tokenizer", || {
            tokenizers::Tokenizer::from_bytes(&bytes)
        })?;
        inner
            .with_truncation(None)
            .map_err(|e| Error::file(&path, e.to_string()))?
            .with_padding(None);

        let config = Config::read(&dir.join(CONFIG))?;
        config.add_special_tokens(&mut inner)?;
        let eos_token = match config.named_token("eos_token")? {
            Some(token) => token.content,
            None => eos_from_model(dir, &inner)?,
        };
        let eos_id = inner.token_to_id(&eos_token).ok_or_else(|| {
            let what = format!("eos_token {eos_token:?} is not in the vocabulary of {TOKENIZER}");
            Error::file(&config.path, what)
        })?;
        config.apply_add_bos(&mut inner)?;
        let vocabulary = inner.get_vocab(true);
        let mut tokenizer = Self {
            eos_separates: separates(&inner, &eos_token),
            vocab_size: vocabulary.values().max().map_or(0, |&id| id as usize + 1),
            bos: None,
            inner,
            path,
            eos_id,
            eos_token,
        };
        tokenizer.bos = tokenizer.leading_token(&config)?;
        Ok(tokenizer)
    }

    /// Token ids of a text. With `add_special`, also what the tokenizer puts around a text (BOS).
    ///
    /// # Errors
    /// When the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encode = || self.inner.encode_fast(text, add_special);
        let encoding = attempt(&self.path, "cannot encode a text", encode)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids, each with the byte range of `text` it stands for; nothing is put around.
    pub(crate) fn encode_located(&self, text: &str) -> Result<Vec<Located>> {
        let encode = || self.inner.encode(text, false);
        let encoding = attempt(&self.path, "cannot encode a text", encode)?;
        let offsets = encoding.get_offsets().iter().copied();
        Ok(encoding.get_ids().iter().copied().zip(offsets).collect())
    }

    /// The text of token ids, without special tokens if `skip_special`. Unknown ids are left out.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        attempt(&self.path, "cannot decode tokens", || {
            self.inner.decode(ids, skip_special)
        })
    }

    /// The id of the token that ends a text.
    pub fn eos_id(&self) -> u32 {
        self.eos_id
    }

    /// All tokens that end what the model in folder `dir` writes: the tokenizer's EOS token and
    /// `eos_token_id`, one or several, of `generation_config.json`.
    ///
    /// # Errors
    /// When the file cannot be read or the key holds something else.
    pub fn end_ids(&self, dir: &Path) -> Result<Vec<u32>> {
        let config = Config::read(&dir.join("generation_config.json"))?;
        let value = &config.values["eos_token_id"];
        let more = match value {
            Value::Null => Vec::new(),
            Value::Array(ids) => ids.iter().collect(),
            id => vec![id],
        };
        let mut ids = vec![self.eos_id];
        for id in more {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            ids.push(id.ok_or_else(|| {
                let what = format!("eos_token_id: expected token ids, found {value}");
                Error::file(&config.path, what)
            })?);
        }
        Ok(ids)
    }

    /// The token that ends a text, as it is written.
    pub fn eos_token(&self) -> &str {
        &self.eos_token
    }

    /// The token every sequence starts with, where the tokenizer has one: by the post-processor
    /// of `tokenizer.json`, else by `add_bos_token` of `tokenizer_config.json`.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// One more than the highest id: the rows an embedding needs.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Whether text before and after an EOS token is tokenised as if each stood alone.
    pub(super) fn eos_separates(&self) -> bool {
        self.eos_separates
    }

    /// The `bos_token` if a text encoded with special tokens starts with it.
    fn leading_token(&self, config: &Config) -> Result<Option<u32>> {
        let Some(bos) = config.named_token("bos_token")? else {
            return Ok(None);
        };
        let id = self.inner.token_to_id(&bos.content);
        let first = self.encode("", true)?.first().copied();
        Ok(id.filter(|_| id == first))
    }
}

/// Runs a step of the tokenizers crate, which has assertions that a damaged file can break.
fn attempt<T>(path: &Path, what: &str, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    guarded(work)
        .unwrap_or_else(|| Err("damaged tokenizer".into()))
        .map_err(|e| Error::file(path, format!("{what}: {e}")))
}

/// Whether `eos` cuts a text into parts that do not influence each other: it is found before
/// anything is normalised, takes no white space from what precedes it, and no added token
/// overlaps it or looks at what stands beside it.
fn separates(tokenizer: &tokenizers::Tokenizer, eos: &str) -> bool {
    let added = tokenizer.get_added_tokens_decoder();
    let overlaps = |other: &str| {
        other.char_indices().skip(1).any(|(i, _)| {
            let tail = &other[i..];
            eos.starts_with(tail) || tail.starts_with(eos)
        })
    };
    let found = |t: &AddedToken| t.content == eos && !t.normalized && !t.lstrip;
    added.values().any(found)
        && added
            .values()
            .all(|t| !t.single_word && !overlaps(&t.content))
}

/// The EOS token by the id that the model's own configuration gives.
fn eos_from_model(dir: &Path, tokenizer: &tokenizers::Tokenizer) -> Result<String> {
    for name in ["config.json", "generation_config.json"] {
        let config = Config::read(&dir.join(name))?;
        let id = match &config.values["eos_token_id"] {
            Value::Null => continue,
            Value::Array(ids) => ids.first().and_then(Value::as_u64),
            id => id.as_u64(),
        };
        return id
            .and_then(|id| tokenizer.id_to_token(u32::try_from(id).ok()?))
            .ok_or_else(|| {
                let what = format!("eos_token_id names no token of {TOKENIZER}");
                Error::file(&config.path, what)
            });
    }
    let what = format!(
        "no EOS token: expected eos_token in {CONFIG}, or eos_token_id in config.json or generation_config.json"
    );
    Err(Error::file(dir, what))
}

/// A JSON object in a file; without entries where there is no such file.
pub(super) struct Config {
    pub(super) path: PathBuf,
    pub(super) values: Value,
}

impl Config {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let values = match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::file(path, format!("not valid JSON: {e}")))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => serde_json::json!({}),
            Err(e) => return Err(Error::io(path, e)),
        };
        if !values.is_object() {
            return Err(Error::file(path, "expected a JSON object"));
        }
        Ok(Self {
            path: path.to_owned(),
            values,
        })
    }

    /// A token given as a string or as an object with `content`; `None` where it is null or absent.
    fn named_token(&self, key: &str) -> Result<Option<AddedToken>> {
        match &self.values[key] {
            Value::Null => Ok(None),
            value => added_token(value).map(Some).ok_or_else(|| {
                let what = format!("{key}: expected a string or an object with content");
                Error::file(&self.path, what)
            }),
        }
    }

    /// The text of each named token that there is, by its key.
    pub(super) fn token_texts(&self) -> Result<serde_json::Map<String, Value>> {
        let mut texts = serde_json::Map::new();
        for key in NAMED_TOKENS {
            if let Some(token) = self.named_token(key)? {
                texts.insert(key.to_owned(), token.content.into());
            }
        }
        Ok(texts)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match &self.values[key] {
            Value::Null => Ok(None),
            Value::Bool(flag) => Ok(Some(*flag)),
            other => {
                let what = format!("{key}: expected true or false, found {other}");
                Err(Error::file(&self.path, what))
            }
        }
    }

    /// Adds the special tokens that `tokenizer.json` lacks, and takes over how the entries of
    /// `added_tokens_decoder` treat white space, as transformers does.
    fn add_special_tokens(&self, tokenizer: &mut tokenizers::Tokenizer) -> Result<()> {
        let mut tokens = Vec::new();
        if let Value::Object(added) = &self.values["added_tokens_decoder"] {
            let mut added: Vec<_> = added.iter().collect();
            added.sort_by_key(|(id, _)| id.parse::<u64>().unwrap_or(u64::MAX));
            tokens.extend(
                added
                    .into_iter()
                    .filter_map(|(_, token)| added_token(token)),
            );
        }
        let mut named = Vec::new();
        for key in NAMED_TOKENS {
            named.extend(self.named_token(key)?.map(|token| token.special(true)));
        }
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            if let Value::Array(more) = &self.values[key] {
                named.extend(more.iter().filter_map(added_token));
            }
        }
        let added = tokenizer.get_added_tokens_decoder();
        let mut known: HashSet<&str> = added.values().map(|token| token.content.as_str()).collect();
        known.extend(tokens.iter().map(|token| token.content.as_str()));
        named.retain(|token| !known.contains(token.content.as_str()));
        tokens.extend(named);
        attempt(&self.path, "cannot add its special tokens", || {
            tokenizer.add_tokens(tokens)
        })?;
        Ok(())
    }

    /// Lets every text start with BOS where `add_bos_token` asks for it and `tokenizer.json` does
    /// not say what to put around a text. Where it does, it decides, as in transformers.
    fn apply_add_bos(&self, tokenizer: &mut tokenizers::Tokenizer) -> Result<()> {
        let wanted = self.flag("add_bos_token")? == Some(true);
        if !wanted || tokenizer.get_post_processor().is_some() {
            return Ok(());
        }
        let known = |token: &AddedToken| tokenizer.token_to_id(&token.content);
        let bos = self.named_token("bos_token")?;
        let Some((bos, id)) = bos.and_then(|bos| known(&bos).map(|id| (bos.content, id))) else {
            let what = "add_bos_token is true, but bos_token names no token of the vocabulary";
            return Err(Error::file(&self.path, what));
        };
        let processor = TemplateProcessing::builder()
            .try_single(vec![bos.as_str(), "$A"])
            .map_err(|e| Error::file(&self.path, e))?
            .special_tokens(vec![(bos, id)])
            .build()
            .map_err(|e| Error::file(&self.path, e.to_string()))?;
        tokenizer.with_post_processor(Some(PostProcessorWrapper::Template(processor)));
        Ok(())
    }
}

fn added_token(value: &Value) -> Option<AddedToken> {
    if let Value::String(content) = value {
        return Some(AddedToken::from(content.as_str(), true));
    }
    let flag = |key: &str, default| value[key].as_bool().unwrap_or(default);
    Some(AddedToken {
        content: value["content"].as_str()?.to_owned(),
        single_word: flag("single_word", false),
        lstrip: flag("lstrip", false),
        rstrip: flag("rstrip", false),
        normalized: flag("normalized", false),
        special: flag("special", true),
    })
}
