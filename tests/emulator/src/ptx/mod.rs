//! PTX: text to tokens, syntax tree and executable ops.

pub mod ast;
pub mod lexer;
pub mod lower;
pub mod ops;
pub mod parser;
pub mod program;

use std::fmt;

/// Why a module was not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// 1-based line of the PTX text.
    pub line: u32,
    pub message: String,
    /// Kernel or device function, when the fault is inside one.
    pub function: Option<String>,
}

impl ParseError {
    pub fn at(line: u32, message: impl Into<String>) -> Self {
        Self {
            line,
            message: message.into(),
            function: None,
        }
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PTX line {}", self.line)?;
        if let Some(function) = &self.function {
            write!(f, ", function {function}")?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for ParseError {}
