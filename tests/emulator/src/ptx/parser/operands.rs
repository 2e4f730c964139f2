//! Instructions and their operands.

use super::super::ast::{Instruction, Operand};
use super::super::lexer::Token;
use super::{MAX_NESTING, Parser, Result};

impl Parser<'_> {
    pub(super) fn instruction(&mut self) -> Result<Instruction> {
        let guard = if self.accept('@') {
            let negated = self.accept('!');
            Some((self.ident()?.to_string(), negated))
        } else {
            None
        };
        let line = self.line();
        let mut parts = vec![self.ident()?.to_string()];
        while let Some(Token::Dot(modifier)) = self.peek() {
            parts.push(modifier.to_string());
            self.at += 1;
        }
        let mut operands = Vec::new();
        while !self.accept(';') {
            operands.push(self.operand()?);
            if !self.accept(',') {
                self.expect(';')?;
                break;
            }
        }
        Ok(Instruction {
            guard,
            parts,
            operands,
            line,
        })
    }

    fn operand(&mut self) -> Result<Operand> {
        let first = self.simple_operand()?;
        if self.accept('|') {
            let second = self.simple_operand()?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn simple_operand(&mut self) -> Result<Operand> {
        match self.next()? {
            Token::Punct('{') => Ok(Operand::List(self.operands_until('}')?)),
            Token::Punct('(') => Ok(Operand::Group(self.operands_until(')')?)),
            Token::Punct('[') => self.address(),
            Token::Punct('!') => Ok(Operand::Not(self.ident()?.to_string())),
            Token::Punct('-') => match self.next()? {
                Token::Int(v) => Ok(Operand::Int(v.wrapping_neg())),
                Token::Float64(v) => Ok(Operand::Float64(v ^ 1 << 63)),
                other => Err(self.error(format!("unexpected {other:?} after `-`"))),
            },
            Token::Int(v) => Ok(Operand::Int(v)),
            Token::Float32(v) => Ok(Operand::Float32(v)),
            Token::Float64(v) => Ok(Operand::Float64(v)),
            Token::Ident(name) => self.name(name),
            other => {
                self.at -= 1;
                Err(self.error(format!("unexpected {other:?} as an operand")))
            }
        }
    }

    /// A register, symbol, special register with its component, or symbol plus offset.
    fn name(&mut self, name: &str) -> Result<Operand> {
        if let Some(Token::Dot(component)) = self.peek() {
            self.at += 1;
            return Ok(Operand::Name(format!("{name}.{component}")));
        }
        if self.accept('+') {
            return Ok(Operand::Offset(name.to_string(), self.integer()?));
        }
        Ok(Operand::Name(name.to_string()))
    }

    pub(super) fn open(&mut self) -> Result<()> {
        self.depth += 1;
        if self.depth > MAX_NESTING {
            Err(self.error("too deeply nested"))
        } else {
            Ok(())
        }
    }

    fn operands_until(&mut self, close: char) -> Result<Vec<Operand>> {
        self.open()?;
        let mut out = Vec::new();
        while !self.accept(close) {
            out.push(self.operand()?);
            if !self.accept(',') {
                self.expect(close)?;
                break;
            }
        }
        self.depth -= 1;
        Ok(out)
    }

    fn address(&mut self) -> Result<Operand> {
        self.open()?;
        let (base, offset) = match self.simple_operand()? {
            Operand::Offset(name, offset) => (Operand::Name(name), offset),
            base => {
                let offset = if self.accept('+') { self.integer()? } else { 0 };
                (base, offset)
            }
        };
        let mut coordinates = Vec::new();
        if self.accept(',') {
            match self.simple_operand()? {
                Operand::List(list) => coordinates = list,
                other => return Err(self.error(format!("unexpected {other:?} in an address"))),
            }
        }
        self.expect(']')?;
        self.depth -= 1;
        Ok(Operand::Address {
            base: Box::new(base),
            offset,
            coordinates,
        })
    }
}
