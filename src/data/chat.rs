//! The chat template of a model folder: what turns messages into the text a chat model was
//! trained to answer.

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{AutoEscape, Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::Value;

use super::tokenizer::Config;
use crate::{Error, Result};

const NAME: &str = "chat_template";
const FILE: &str = "chat_template.jinja";
/// Steps after which a template is taken for one that never ends.
const FUEL: u64 = 10_000_000;
/// Most spaces a level that a template may ask JSON to be indented by.
const MAX_INDENT: usize = 64;

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// What a user says.
    pub fn user(content: &str) -> Self {
        Self {
            role: "user".to_owned(),
            content: content.to_owned(),
        }
    }

    /// What the model is told beforehand.
    pub fn system(content: &str) -> Self {
        Self {
            role: "system".to_owned(),
            content: content.to_owned(),
        }
    }
}

/// A compiled chat template, as transformers renders it: Jinja with `trim_blocks`,
/// `lstrip_blocks`, loop controls, `tojson`, `raise_exception`, and Python's methods of strings,
/// lists and dictionaries.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and the like.
    tokens: serde_json::Map<String, Value>,
    path: PathBuf,
}

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja`, else `chat_template` of
    /// `tokenizer_config.json` (of several the one named `default`); `None` where there is none.
    ///
    /// # Errors
    /// When a file cannot be read, or what it holds is no valid template.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        let dir = dir.as_ref();
        let config = Config::read(&dir.join("tokenizer_config.json"))?;
        let file = dir.join(FILE);
        let (path, source) = match std::fs::read_to_string(&file) {
            Ok(source) => (file, source),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                match inline(&config.path, &config.values[NAME])? {
                    Some(source) => (config.path.clone(), source),
                    None => return Ok(None),
                }
            }
            Err(e) => return Err(Error::io(&file, e)),
        };
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|e| Error::file(&path, e.to_string()))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, source)
            .map_err(|e| Error::file(&path, format!("{NAME}: {e}")))?;
        Ok(Some(Self {
            environment,
            tokens: config.token_texts()?,
            path,
        }))
    }

    /// The text of a conversation; with `add_generation_prompt`, also how the answer begins.
    ///
    /// # Errors
    /// What the template does not accept, in its own words.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let conversation = context! { messages => Serde(messages), add_generation_prompt };
        let values = context! { ..conversation, ..Jinja::from(Serde(&self.tokens)) };
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(values))
            .map_err(|e| Error::file(&self.path, format!("{NAME}: {e}")))
    }
}

/// The template in `tokenizer_config.json`: a text, or a list of named ones.
fn inline(path: &Path, value: &Value) -> Result<Option<String>> {
    let text = match value {
        Value::Null => return Ok(None),
        Value::Array(named) => {
            let default = named.iter().find(|one| one["name"] == "default");
            default.map_or(&Value::Null, |one| &one["template"])
        }
        other => other,
    };
    match text {
        Value::String(text) => Ok(Some(text.clone())),
        _ => {
            let what = format!("{NAME}: expected a text, or a list with one named \"default\"");
            Err(Error::file(path, what))
        }
    }
}

fn raise_exception(message: String) -> std::result::Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// JSON as Python's `json.dumps(ensure_ascii=False)` writes it, with a space after `,` and `:`.
fn to_json(value: Jinja, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    if let Some(indent) = indent.filter(|indent| *indent > MAX_INDENT) {
        let what = format!("tojson: expected an indent of at most {MAX_INDENT}, found {indent}");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, what));
    }
    let wrong =
        |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let value = serde_json::to_value(value).map_err(wrong)?;
    Ok(python_json(&value, indent, 0))
}

fn python_json(value: &Value, indent: Option<usize>, depth: usize) -> String {
    let inside = |open: char, close: char, parts: Vec<String>| {
        let pad = |depth: usize| indent.map(|n| format!("\n{}", " ".repeat(n * depth)));
        let between = indent.map_or(", ".to_owned(), |_| {
            format!(",{}", pad(depth + 1).unwrap_or_default())
        });
        match parts.is_empty() {
            true => format!("{open}{close}"),
            false => format!(
                "{open}{}{}{}{close}",
                pad(depth + 1).unwrap_or_default(),
                parts.join(&between),
                pad(depth).unwrap_or_default()
            ),
        }
    };
    match value {
        Value::Array(items) => {
            let parts = items.iter().map(|v| python_json(v, indent, depth + 1));
            inside('[', ']', parts.collect())
        }
        Value::Object(entries) => {
            let parts = entries.iter().map(|(key, v)| {
                let key = Value::String(key.clone());
                format!("{key}: {}", python_json(v, indent, depth + 1))
            });
            inside('{', '}', parts.collect())
        }
        other => other.to_string(),
    }
}
