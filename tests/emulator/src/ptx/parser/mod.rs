//! Recursive-descent parser from tokens to the syntax tree.

mod declarations;
mod operands;

use super::ParseError;
use super::ast::{Function, Module, SourceLocation, Space, Statement};
use super::lexer::{Lexeme, Token, tokenize};

type Result<T> = std::result::Result<T, ParseError>;

/// Parses the text of a PTX module.
///
/// # Errors
/// Text that is not PTX, with the line where it stops being so.
pub fn parse(text: &str) -> Result<Module> {
    let tokens = tokenize(text)?;
    let mut parser = Parser {
        tokens,
        at: 0,
        depth: 0,
        module: Module::default(),
    };
    while parser.peek().is_some() {
        parser.top_level()?;
    }
    if parser.module.version == 0 {
        return Err(ParseError::at(1, "not a PTX module: no .version directive"));
    }
    Ok(parser.module)
}

/// Nested braces or parentheses in an operand or initialiser; real code needs two.
const MAX_NESTING: u32 = 16;

struct Parser<'a> {
    tokens: Vec<Lexeme<'a>>,
    at: usize,
    /// Open braces and parentheses of the operand or initialiser being parsed.
    depth: u32,
    module: Module,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at).map(|l| l.token)
    }

    fn peek_at(&self, ahead: usize) -> Option<Token<'a>> {
        self.tokens.get(self.at + ahead).map(|l| l.token)
    }

    fn line(&self) -> u32 {
        let last = self.tokens.len().saturating_sub(1);
        self.tokens.get(self.at.min(last)).map_or(1, |l| l.line)
    }

    fn error(&self, message: impl Into<String>) -> ParseError {
        ParseError::at(self.line(), message)
    }

    fn next(&mut self) -> Result<Token<'a>> {
        let token = self
            .peek()
            .ok_or_else(|| self.error("unexpected end of the module"))?;
        self.at += 1;
        Ok(token)
    }

    fn accept(&mut self, c: char) -> bool {
        let found = self.peek() == Some(Token::Punct(c));
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, c: char) -> Result<()> {
        if self.accept(c) {
            return Ok(());
        }
        Err(self.error(format!("expected `{c}`, found {:?}", self.peek())))
    }

    fn ident(&mut self) -> Result<&'a str> {
        match self.next()? {
            Token::Ident(name) => Ok(name),
            other => {
                self.at -= 1;
                Err(self.error(format!("expected a name, found {other:?}")))
            }
        }
    }

    /// An optionally negated integer.
    fn integer(&mut self) -> Result<i64> {
        let negative = self.accept('-');
        match self.next()? {
            Token::Int(v) if negative => Ok((v as i64).wrapping_neg()),
            Token::Int(v) => Ok(v as i64),
            other => {
                self.at -= 1;
                Err(self.error(format!("expected an integer, found {other:?}")))
            }
        }
    }

    fn small(&mut self) -> Result<u32> {
        let value = self.integer()?;
        u32::try_from(value).map_err(|_| self.error(format!("{value} is out of range")))
    }

    fn top_level(&mut self) -> Result<()> {
        match self.next()? {
            Token::Dot("version") => self.version(),
            Token::Dot("target") => self.target(),
            Token::Dot("address_size") => match self.integer()? {
                64 => Ok(()),
                other => Err(self.error(format!("address size {other} is not supported, only 64"))),
            },
            Token::Dot("file") => self.file(),
            Token::Dot("section") => self.section(),
            Token::Dot("pragma") => self.skip_to_semicolon(),
            Token::Dot("visible" | "weak" | "common") => Ok(()),
            Token::Dot("extern") => self.external(),
            Token::Dot("alias") => self.skip_to_semicolon(),
            Token::Dot(d @ ("entry" | "func")) => self.function(d == "entry"),
            Token::Dot(d @ ("global" | "const" | "shared")) => {
                let space = Space::parse(d).unwrap_or(Space::Global);
                let variables = self.variables(space, false)?;
                self.module.variables.extend(variables);
                Ok(())
            }
            Token::Punct(';') => Ok(()),
            other => {
                self.at -= 1;
                Err(self.error(format!("unexpected {other:?} at module level")))
            }
        }
    }

    fn external(&mut self) -> Result<()> {
        match self.next()? {
            Token::Dot("func") => self.function(false),
            Token::Dot(d) if Space::parse(d).is_some() => {
                let space = Space::parse(d).unwrap_or(Space::Global);
                let variables = self.variables(space, true)?;
                self.module.variables.extend(variables);
                Ok(())
            }
            other => Err(self.error(format!("unexpected {other:?} after .extern"))),
        }
    }

    fn version(&mut self) -> Result<()> {
        // "9.0" is one decimal fraction to the lexer.
        self.module.version = match self.next()? {
            Token::Float64(bits) => (f64::from_bits(bits) * 10.0).round() as u32,
            other => return Err(self.error(format!("malformed .version: {other:?}"))),
        };
        Ok(())
    }

    fn target(&mut self) -> Result<()> {
        loop {
            let name = self.ident()?;
            if let Some(number) = name.strip_prefix("sm_") {
                let digits = number.trim_end_matches(|c: char| c.is_ascii_alphabetic());
                self.module.target_specific = digits.len() != number.len();
                self.module.target = digits
                    .parse()
                    .map_err(|_| self.error(format!("malformed target `{name}`")))?;
            }
            if !self.accept(',') {
                return Ok(());
            }
        }
    }

    fn file(&mut self) -> Result<()> {
        let index = self.small()?;
        if let Token::Str(name) = self.next()? {
            self.module.files.insert(index, name.to_string());
        }
        while self.accept(',') {
            self.integer()?;
        }
        Ok(())
    }

    /// Debug sections carry no code.
    fn section(&mut self) -> Result<()> {
        while self.next()? != Token::Punct('{') {}
        while self.next()? != Token::Punct('}') {}
        Ok(())
    }

    fn skip_to_semicolon(&mut self) -> Result<()> {
        while self.next()? != Token::Punct(';') {}
        Ok(())
    }

    fn function(&mut self, is_entry: bool) -> Result<()> {
        let mut function = Function {
            is_entry,
            line: self.line(),
            ..Function::default()
        };
        if self.peek() == Some(Token::Punct('(')) {
            function.returns = self.parameters()?;
        }
        function.name = self.ident()?.to_string();
        if self.peek() == Some(Token::Punct('(')) {
            function.params = self.parameters()?;
        }
        self.function_directives(&mut function)?;
        if !self.accept(';') {
            self.expect('{')?;
            function.body = Some(self.body()?);
        }
        // A definition replaces the forward declaration of the same name.
        self.module
            .functions
            .retain(|f| f.name != function.name || f.body.is_some());
        if function.body.is_some()
            || self
                .module
                .functions
                .iter()
                .all(|f| f.name != function.name)
        {
            self.module.functions.push(function);
        }
        Ok(())
    }

    fn function_directives(&mut self, function: &mut Function) -> Result<()> {
        while let Some(Token::Dot(directive)) = self.peek() {
            self.at += 1;
            match directive {
                "maxntid" | "reqntid" => {
                    function.max_threads = Some(self.triple()?);
                    function.required_threads = directive == "reqntid";
                }
                "reqnctapercluster" => function.cluster = Some(self.triple()?),
                "minnctapersm" | "maxnreg" | "maxclusterrank" => drop(self.triple()?),
                "noreturn" | "explicitcluster" | "blocksareclusters" => {}
                "pragma" => self.skip_to_semicolon()?,
                other => return Err(self.error(format!("unknown function directive `.{other}`"))),
            }
        }
        Ok(())
    }

    fn triple(&mut self) -> Result<[u32; 3]> {
        let mut out = [1; 3];
        for (i, slot) in out.iter_mut().enumerate() {
            if i > 0 && !self.accept(',') {
                break;
            }
            *slot = self.small()?;
        }
        Ok(out)
    }

    fn body(&mut self) -> Result<Vec<Statement>> {
        let mut out = Vec::new();
        let mut depth = 0;
        loop {
            match self.peek() {
                Some(Token::Punct('{')) => {
                    self.at += 1;
                    depth += 1;
                    out.push(Statement::OpenScope);
                }
                Some(Token::Punct('}')) => {
                    self.at += 1;
                    if depth == 0 {
                        return Ok(out);
                    }
                    depth -= 1;
                    out.push(Statement::CloseScope);
                }
                Some(Token::Punct(';')) => self.at += 1,
                Some(Token::Dot(directive)) => {
                    self.at += 1;
                    self.body_directive(directive, &mut out)?;
                }
                Some(Token::Ident(label)) if self.peek_at(1) == Some(Token::Punct(':')) => {
                    self.at += 2;
                    self.label(label, &mut out)?;
                }
                Some(_) => out.push(Statement::Instruction(self.instruction()?)),
                None => return Err(self.error("unexpected end of a function body")),
            }
        }
    }

    fn label(&mut self, label: &str, out: &mut Vec<Statement>) -> Result<()> {
        match self.peek() {
            Some(Token::Dot("branchtargets")) => {
                self.at += 1;
                let mut targets = vec![self.ident()?.to_string()];
                while self.accept(',') {
                    targets.push(self.ident()?.to_string());
                }
                out.push(Statement::BranchTargets(label.to_string(), targets));
                self.expect(';')
            }
            Some(Token::Dot("callprototype" | "calltargets")) => self.skip_to_semicolon(),
            _ => {
                out.push(Statement::Label(label.to_string()));
                Ok(())
            }
        }
    }

    fn body_directive(&mut self, directive: &str, out: &mut Vec<Statement>) -> Result<()> {
        match directive {
            "reg" => out.push(self.registers()?),
            "loc" => out.push(Statement::Location(self.location()?)),
            "pragma" => self.skip_to_semicolon()?,
            d if Space::parse(d).is_some() => {
                let space = Space::parse(d).unwrap_or(Space::Local);
                out.extend(
                    self.variables(space, false)?
                        .into_iter()
                        .map(Statement::Variable),
                );
            }
            other => return Err(self.error(format!("unknown directive `.{other}` in a function"))),
        }
        Ok(())
    }

    /// `.loc file line column [, function_name label[+n], inlined_at file line column]`
    fn location(&mut self) -> Result<SourceLocation> {
        let (file, line) = (self.small()?, self.small()?);
        self.integer()?;
        let mut inlined_at = None;
        while self.accept(',') {
            match self.ident()? {
                "function_name" => {
                    self.ident()?;
                    if self.accept('+') {
                        self.integer()?;
                    }
                }
                "inlined_at" => {
                    inlined_at = Some((self.small()?, self.small()?));
                    self.integer()?;
                }
                other => return Err(self.error(format!("unknown .loc attribute `{other}`"))),
            }
        }
        Ok(SourceLocation {
            file,
            line,
            inlined_at,
        })
    }
}
