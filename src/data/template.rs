//! The Jinja template that turns a record into the text a model is trained on.

use std::path::{Path, PathBuf};

use minijinja::{AutoEscape, Environment, UndefinedBehavior, context};

use super::Record;
use crate::{Error, Result};

const BUILTIN: &str = include_str!("default_template.jinja");
const NAME: &str = "template";

/// A training text and where its answer part starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Prompt and answer.
    pub text: String,
    /// Byte offset in `text`: what comes before is the prompt, what follows is for the model to
    /// write. White space between the two belongs to the answer part.
    pub answer_start: usize,
}

/// A compiled Jinja template with the variables `problem`, `question` (the same text) and
/// `answer`.
///
/// As in Jinja2's defaults a newline at the end of the template is dropped, `\r\n` counts as
/// `\n`, and nothing is escaped. An undefined variable is an error.
#[derive(Clone, Debug)]
pub struct Template {
    environment: Environment<'static>,
    source: String,
    path: PathBuf,
}

impl Template {
    /// The project's own template: a preamble, the problem, the answer as thought and as answer.
    pub fn builtin() -> Self {
        // Cannot fail: the text is part of the program and a test renders it.
        Self::parse("built-in template", BUILTIN).expect("the built-in template is valid")
    }

    /// Reads a template file.
    ///
    /// # Errors
    /// When the file cannot be read, is not UTF-8, or is not a valid Jinja template.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let text = String::from_utf8(bytes)
            .map_err(|e| Error::file(path, format!("not valid UTF-8: {}", e.utf8_error())))?;
        Self::parse(path, &text)
    }

    /// Compiles a template; `name` stands for the file in error messages.
    ///
    /// # Errors
    /// When the text is not a valid Jinja template.
    pub fn parse(name: impl AsRef<Path>, text: &str) -> Result<Self> {
        let path = name.as_ref().to_owned();
        let source = text.replace("\r\n", "\n").replace('\r', "\n");
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment
            .add_template_owned(NAME, source.clone())
            .map_err(|e| Error::file(&path, e.to_string()))?;
        Ok(Self {
            environment,
            source,
            path,
        })
    }

    /// The template's text, with `\n` line ends.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The training text of a record.
    ///
    /// # Errors
    /// When the template uses an undefined variable or fails otherwise.
    pub fn render(&self, record: &Record) -> Result<String> {
        self.fill(&record.problem, &record.answer)
    }

    /// What a model is given at evaluation: the text before the answer's first use, without
    /// trailing white space.
    ///
    /// # Errors
    /// When rendering fails or the template does not use the answer.
    pub fn prompt(&self, record: &Record) -> Result<String> {
        // A private-use character, repeated until it is nowhere else in the text.
        let mut sentinel = String::from("\u{f8ff}");
        while record.problem.contains(&sentinel) || self.source.contains(&sentinel) {
            sentinel.push('\u{f8ff}');
        }
        let text = self.fill(&record.problem, &sentinel)?;
        match text.find(&sentinel) {
            Some(at) => Ok(text[..at].trim_end().to_owned()),
            None => Err(Error::file(&self.path, "the text does not show the answer")),
        }
    }

    /// The training text together with the place where its answer part starts.
    ///
    /// # Errors
    /// As [`Template::prompt`], and when the text before the answer depends on the answer.
    pub fn render_text(&self, record: &Record) -> Result<Text> {
        let prompt = self.prompt(record)?;
        let text = self.render(record)?;
        if !text.starts_with(&prompt) {
            let what = "the text before the answer must not depend on the answer";
            return Err(Error::file(&self.path, what));
        }
        Ok(Text {
            text,
            answer_start: prompt.len(),
        })
    }

    fn fill(&self, problem: &str, answer: &str) -> Result<String> {
        self.environment
            .get_template(NAME)
            .and_then(|template| {
                template
                    .render(context! { problem => problem, question => problem, answer => answer })
            })
            .map_err(|e| Error::file(&self.path, e.to_string()))
    }
}
