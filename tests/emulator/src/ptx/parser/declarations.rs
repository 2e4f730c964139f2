//! Declarations: parameters, variables with their initial values, registers.

use super::super::ast::{Initial, Space, Statement, Type, Variable};
use super::super::lexer::Token;
use super::{Parser, Result};

impl Parser<'_> {
    pub(super) fn parameters(&mut self) -> Result<Vec<Variable>> {
        self.expect('(')?;
        let mut out = Vec::new();
        while !self.accept(')') {
            match self.next()? {
                Token::Dot("param" | "reg") => out.push(self.variable(Space::Param, false)?),
                other => return Err(self.error(format!("expected .param, found {other:?}"))),
            }
            self.accept(',');
        }
        Ok(out)
    }

    /// Comma-separated declarations after the state space, up to the semicolon.
    pub(super) fn variables(&mut self, space: Space, external: bool) -> Result<Vec<Variable>> {
        let first = self.variable(space, external)?;
        let (ty, align) = (first.ty, first.align);
        let mut out = vec![first];
        while self.accept(',') {
            out.push(self.declarator(space, ty, align, external)?);
        }
        self.expect(';')?;
        Ok(out)
    }

    fn variable(&mut self, space: Space, external: bool) -> Result<Variable> {
        let (mut ty, mut align, mut lanes) = (None, None, 1);
        while let Some(Token::Dot(modifier)) = self.peek() {
            self.at += 1;
            match modifier {
                "align" => align = Some(self.small()?),
                "v2" => lanes = 2,
                "v4" => lanes = 4,
                "ptr" | "attribute" | "managed" => {}
                m if Type::parse(m).is_some() => ty = Type::parse(m),
                m if Space::parse(m).is_some() => {}
                other => return Err(self.error(format!("unknown variable attribute `.{other}`"))),
            }
        }
        let ty = ty.ok_or_else(|| self.error("a variable without a type"))?;
        let align = u64::from(align.unwrap_or(ty.bytes() * lanes)).max(1);
        let mut variable = self.declarator(space, ty, align, external)?;
        variable.size *= u64::from(lanes);
        Ok(variable)
    }

    fn declarator(
        &mut self,
        space: Space,
        ty: Type,
        align: u64,
        external: bool,
    ) -> Result<Variable> {
        let line = self.line();
        let name = self.ident()?.to_string();
        let mut count = 1u64;
        while self.accept('[') {
            let extent = if self.peek() == Some(Token::Punct(']')) {
                0
            } else {
                self.small()?
            };
            count = count.saturating_mul(u64::from(extent));
            self.expect(']')?;
        }
        let size = count.saturating_mul(u64::from(ty.bytes()));
        let initial = if self.accept('=') {
            self.initializer()?
        } else {
            Vec::new()
        };
        Ok(Variable {
            name,
            space,
            ty,
            size,
            align,
            external,
            initial,
            line,
        })
    }

    fn initializer(&mut self) -> Result<Vec<Initial>> {
        if !self.accept('{') {
            return Ok(vec![self.initial_value()?]);
        }
        self.open()?;
        let mut out = Vec::new();
        while !self.accept('}') {
            if self.peek() == Some(Token::Punct('{')) {
                out.extend(self.initializer()?);
            } else {
                out.push(self.initial_value()?);
            }
            self.accept(',');
        }
        self.depth -= 1;
        Ok(out)
    }

    fn initial_value(&mut self) -> Result<Initial> {
        match self.peek() {
            Some(Token::Float32(bits)) => {
                self.at += 1;
                Ok(Initial::Bits(bits.into()))
            }
            Some(Token::Float64(bits)) => {
                self.at += 1;
                Ok(Initial::Bits(bits))
            }
            Some(Token::Ident(name)) => {
                self.at += 1;
                // generic(symbol) and plain symbol name the same address here.
                let parenthesised = name == "generic" && self.accept('(');
                let name = if parenthesised { self.ident()? } else { name };
                if parenthesised {
                    self.expect(')')?;
                }
                let offset = if self.accept('+') { self.integer()? } else { 0 };
                Ok(Initial::Symbol(name.to_string(), offset))
            }
            _ => Ok(Initial::Bits(self.integer()? as u64)),
        }
    }

    pub(super) fn registers(&mut self) -> Result<Statement> {
        let ty = match self.next()? {
            Token::Dot(name) => Type::parse(name),
            _ => None,
        };
        let ty = ty.ok_or_else(|| self.error("a register without a known type"))?;
        let mut names = Vec::new();
        loop {
            let name = self.ident()?.to_string();
            let count = if self.accept('<') {
                let count = self.small()?;
                self.expect('>')?;
                Some(count)
            } else {
                None
            };
            names.push((name, count));
            if !self.accept(',') {
                break;
            }
        }
        self.expect(';')?;
        Ok(Statement::Registers(ty, names))
    }
}
