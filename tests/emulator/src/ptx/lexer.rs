//! Splits PTX text into tokens (PTX ISA, "Syntax").

use super::ParseError;

/// One lexical token, borrowing from the source text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Token<'a> {
    /// An identifier: opcode root, register, label or symbol.
    Ident(&'a str),
    /// A dotted part without its dot: a directive or an opcode modifier, `shared::cta` included.
    Dot(&'a str),
    /// An integer literal, two's complement when it was wider than 63 bits.
    Int(u64),
    /// A single-precision literal's bits (`0f3F800000`).
    Float32(u32),
    /// A double-precision literal's bits (`0d...`, or a decimal fraction).
    Float64(u64),
    /// A string literal without its quotes.
    Str(&'a str),
    /// Any other single character.
    Punct(char),
}

/// A token and the 1-based line it starts on.
#[derive(Clone, Copy, Debug)]
pub struct Lexeme<'a> {
    pub token: Token<'a>,
    pub line: u32,
}

/// Tokenises a whole module; comments are dropped.
///
/// # Errors
/// An unterminated comment or string, or a malformed number, named with its line.
pub fn tokenize(text: &str) -> Result<Vec<Lexeme<'_>>, ParseError> {
    Lexer {
        text,
        at: 0,
        line: 1,
    }
    .run()
}

struct Lexer<'a> {
    text: &'a str,
    at: usize,
    line: u32,
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$'
}

impl<'a> Lexer<'a> {
    fn run(mut self) -> Result<Vec<Lexeme<'a>>, ParseError> {
        let mut out = Vec::with_capacity(self.text.len() / 4);
        while let Some(byte) = self.skip_blank()? {
            let line = self.line;
            out.push(Lexeme {
                token: self.token(byte)?,
                line,
            });
        }
        Ok(out)
    }

    fn peek(&self, ahead: usize) -> Option<u8> {
        self.text.as_bytes().get(self.at + ahead).copied()
    }

    fn error(&self, message: impl Into<String>) -> ParseError {
        ParseError::at(self.line, message)
    }

    /// Skips white space and comments; returns the next byte.
    fn skip_blank(&mut self) -> Result<Option<u8>, ParseError> {
        loop {
            match (self.peek(0), self.peek(1)) {
                (Some(b'\n'), _) => {
                    self.line += 1;
                    self.at += 1;
                }
                (Some(b), _) if b.is_ascii_whitespace() => self.at += 1,
                (Some(b'/'), Some(b'/')) => {
                    while self.peek(0).is_some_and(|b| b != b'\n') {
                        self.at += 1;
                    }
                }
                (Some(b'/'), Some(b'*')) => {
                    let rest = &self.text[self.at..];
                    let end = rest
                        .find("*/")
                        .ok_or_else(|| self.error("unterminated comment"))?;
                    self.line += rest[..end].bytes().filter(|&b| b == b'\n').count() as u32;
                    self.at += end + 2;
                }
                (next, _) => return Ok(next),
            }
        }
    }

    fn token(&mut self, first: u8) -> Result<Token<'a>, ParseError> {
        match first {
            b'0'..=b'9' => self.number(),
            b'"' => {
                let rest = &self.text[self.at + 1..];
                let end = rest
                    .find('"')
                    .ok_or_else(|| self.error("unterminated string"))?;
                self.at += end + 2;
                Ok(Token::Str(&rest[..end]))
            }
            b'.' if self.peek(1).is_some_and(is_word) => {
                self.at += 1;
                Ok(Token::Dot(self.dotted()))
            }
            b'%' => {
                let start = self.at;
                self.at += 1;
                self.word();
                Ok(Token::Ident(&self.text[start..self.at]))
            }
            b if is_word(b) => Ok(Token::Ident(self.word())),
            _ => {
                let c = self.text[self.at..].chars().next().unwrap_or('\u{fffd}');
                self.at += c.len_utf8();
                Ok(Token::Punct(c))
            }
        }
    }

    fn word(&mut self) -> &'a str {
        let start = self.at;
        while self.peek(0).is_some_and(is_word) {
            self.at += 1;
        }
        &self.text[start..self.at]
    }

    /// A modifier; `::` joins its halves (`mbarrier::complete_tx::bytes`).
    fn dotted(&mut self) -> &'a str {
        let start = self.at;
        loop {
            self.word();
            let joined = self.peek(0) == Some(b':') && self.peek(1) == Some(b':');
            if !(joined && self.peek(2).is_some_and(is_word)) {
                return &self.text[start..self.at];
            }
            self.at += 2;
        }
    }

    fn number(&mut self) -> Result<Token<'a>, ParseError> {
        let word = self.word();
        let fraction =
            self.peek(0) == Some(b'.') && self.peek(1).is_some_and(|b| b.is_ascii_digit());
        if fraction {
            let start = self.at - word.len();
            self.at += 1;
            self.word();
            let text = &self.text[start..self.at];
            let value: f64 = text
                .parse()
                .map_err(|_| self.error(format!("malformed number `{text}`")))?;
            return Ok(Token::Float64(value.to_bits()));
        }
        parse_literal(word).ok_or_else(|| self.error(format!("malformed number `{word}`")))
    }
}

fn parse_literal(word: &str) -> Option<Token<'static>> {
    let lower = word.to_ascii_lowercase();
    if let Some(hex) = lower.strip_prefix("0f") {
        return u32::from_str_radix(hex, 16).ok().map(Token::Float32);
    }
    if let Some(hex) = lower.strip_prefix("0d") {
        return u64::from_str_radix(hex, 16).ok().map(Token::Float64);
    }
    let digits = lower.strip_suffix('u').unwrap_or(&lower);
    let value = if let Some(hex) = digits.strip_prefix("0x") {
        u64::from_str_radix(hex, 16)
    } else if let Some(binary) = digits.strip_prefix("0b") {
        u64::from_str_radix(binary, 2)
    } else if digits.len() > 1 && digits.starts_with('0') {
        u64::from_str_radix(&digits[1..], 8)
    } else {
        digits.parse()
    };
    value.ok().map(Token::Int)
}
