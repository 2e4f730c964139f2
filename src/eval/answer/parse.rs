//! Expressions: a recursive descent over the normalised text.

use num::bigint::BigInt;
use num::{BigRational, One, pow};

use super::normalise::{QUOTE, UNQUOTE};

/// Nesting after which an expression is taken for text.
const MAX_DEPTH: usize = 64;
/// Largest power of ten of a number in scientific notation.
const MAX_EXPONENT: usize = 4096;

/// An expression.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Expr {
    Number(BigRational),
    Symbol(String),
    Neg(Box<Self>),
    Add(Box<Self>, Box<Self>),
    Mul(Box<Self>, Box<Self>),
    Div(Box<Self>, Box<Self>),
    Pow(Box<Self>, Box<Self>),
    /// A function of one or two arguments by its name.
    Call(&'static str, Vec<Self>),
}

/// Functions of one argument.
const FUNCTIONS: [&str; 16] = [
    "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc",
    "log", "ln", "exp", "lg",
];

/// The expression that the whole text is.
pub(super) fn parse(text: &str) -> Option<Expr> {
    let chars: Vec<char> = text.chars().collect();
    let mut parser = Parser {
        chars: &chars,
        at: 0,
        depth: 0,
    };
    let expr = parser.sum()?;
    parser.spaces();
    (parser.at == chars.len()).then_some(expr)
}

struct Parser<'a> {
    chars: &'a [char],
    at: usize,
    depth: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn spaces(&mut self) {
        while self.peek() == Some(' ') {
            self.at += 1;
        }
    }

    /// Goes past `c` if it comes next.
    fn take(&mut self, c: char) -> bool {
        self.spaces();
        let is_next = self.peek() == Some(c);
        self.at += usize::from(is_next);
        is_next
    }

    fn nested<T>(&mut self, read: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
        self.depth += 1;
        let result = (self.depth <= MAX_DEPTH).then(|| read(self)).flatten();
        self.depth -= 1;
        result
    }

    fn sum(&mut self) -> Option<Expr> {
        self.nested(|parser| {
            let mut left = parser.product()?;
            loop {
                if parser.take('+') {
                    left = Expr::Add(left.into(), parser.product()?.into());
                } else if parser.take('-') {
                    let right = Expr::Neg(parser.product()?.into());
                    left = Expr::Add(left.into(), right.into());
                } else {
                    return Some(left);
                }
            }
        })
    }

    fn product(&mut self) -> Option<Expr> {
        let mut left = self.signed()?;
        loop {
            if self.take('*') {
                left = Expr::Mul(left.into(), self.signed()?.into());
            } else if self.take('/') {
                left = Expr::Div(left.into(), self.signed()?.into());
            } else if self.begins_factor() {
                left = Expr::Mul(left.into(), self.power()?.into());
            } else {
                return Some(left);
            }
        }
    }

    /// Whether a factor follows without a sign between: anything but a number.
    fn begins_factor(&mut self) -> bool {
        self.spaces();
        let starts = |c: char| c.is_alphabetic() || "\\({[∞".contains(c) || c == QUOTE;
        self.peek().is_some_and(starts)
    }

    fn signed(&mut self) -> Option<Expr> {
        match self.take('-') {
            true => Some(Expr::Neg(self.power()?.into())),
            false => {
                self.take('+');
                self.power()
            }
        }
    }

    fn power(&mut self) -> Option<Expr> {
        let mut base = self.primary()?;
        loop {
            if self.take('!') {
                base = Expr::Call("!", vec![base]);
            } else if self.take('%') {
                base = Expr::Div(base.into(), integer(100).into());
            } else if self.take('^') {
                let exponent = self.exponent()?;
                base = Expr::Pow(base.into(), exponent.into());
            } else {
                return Some(base);
            }
        }
    }

    fn exponent(&mut self) -> Option<Expr> {
        self.nested(|parser| match parser.take('-') {
            true => Some(Expr::Neg(parser.primary()?.into())),
            false => parser.primary(),
        })
    }

    fn primary(&mut self) -> Option<Expr> {
        self.spaces();
        match self.peek()? {
            c if c.is_ascii_digit() || c == '.' => self.number(),
            '(' => self.enclosed('(', ')'),
            '[' => self.enclosed('[', ']'),
            '{' => self.enclosed('{', '}'),
            '|' => Some(Expr::Call("abs", vec![self.enclosed('|', '|')?])),
            '\\' => self.command(),
            '∞' => {
                self.at += 1;
                Some(Expr::Symbol("∞".to_owned()))
            }
            QUOTE => self.quoted(),
            c if c.is_alphabetic() => self.letters(),
            _ => None,
        }
    }

    fn enclosed(&mut self, open: char, close: char) -> Option<Expr> {
        let inner = self.take(open).then(|| self.sum())??;
        self.take(close).then_some(inner)
    }

    /// Digits, decimal places, a power of ten; the base of a number system is passed over. An
    /// integer before a fraction of integers is a mixed number.
    fn number(&mut self) -> Option<Expr> {
        let whole = self.digits();
        let mut places = String::new();
        if self.peek() == Some('.') {
            self.at += 1;
            places = self.digits();
        }
        let digits = format!("{whole}{places}");
        let mantissa: BigInt = digits.parse().ok()?;
        let mut value = BigRational::new(mantissa, power_of_ten(places.len())?);
        if let Some(exponent) = self.scientific() {
            let factor = power_of_ten(usize::try_from(exponent.unsigned_abs()).ok()?)?;
            value = match exponent < 0 {
                true => value / factor,
                false => value * factor,
            };
        }
        if self.take('_') {
            self.argument()?;
        }
        match self.fraction_behind() {
            Some(part) if value.is_integer() && places.is_empty() => {
                Some(Expr::Number(value + part))
            }
            Some(_) => None,
            None => Some(Expr::Number(value)),
        }
    }

    fn digits(&mut self) -> String {
        let start = self.at;
        while self.peek().is_some_and(|c| c.is_ascii_digit()) {
            self.at += 1;
        }
        self.chars[start..self.at].iter().collect()
    }

    /// The exponent in 1.5e-3, if there is one.
    fn scientific(&mut self) -> Option<i64> {
        let before = self.at;
        if self.peek() == Some('e') {
            self.at += 1;
            let negative = self.peek() == Some('-');
            self.at += usize::from(negative || self.peek() == Some('+'));
            if let Ok(exponent) = self.digits().parse::<i64>()
                && !self.peek().is_some_and(char::is_alphabetic)
            {
                return Some(if negative { -exponent } else { exponent });
            }
        }
        self.at = before;
        None
    }

    /// The fraction of integers that follows an integer, as in 3 1/2 or 3\frac{1}{2}.
    fn fraction_behind(&mut self) -> Option<BigRational> {
        let before = self.at;
        let fraction = self.integers_of_fraction();
        let fraction = fraction.filter(|(_, bottom)| *bottom != BigInt::ZERO);
        if fraction.is_none() {
            self.at = before;
        }
        fraction.map(|(top, bottom)| BigRational::new(top, bottom))
    }

    fn integers_of_fraction(&mut self) -> Option<(BigInt, BigInt)> {
        self.spaces();
        if self.name("\\frac") {
            let (top, bottom) = (self.argument()?, self.argument()?);
            return match (top, bottom) {
                (Expr::Number(top), Expr::Number(bottom))
                    if top.is_integer() && bottom.is_integer() =>
                {
                    Some((top.to_integer(), bottom.to_integer()))
                }
                _ => None,
            };
        }
        let top = self.digits().parse().ok()?;
        self.take('/').then_some(())?;
        self.spaces();
        Some((top, self.digits().parse().ok()?))
    }

    /// Goes past `name` if it comes next and no letter follows it.
    fn name(&mut self, name: &str) -> bool {
        let end = self.at + name.chars().count();
        let is_next = self
            .chars
            .get(self.at..end)
            .is_some_and(|c| c.iter().copied().eq(name.chars()))
            && !self.chars.get(end).is_some_and(|c| c.is_alphabetic());
        if is_next {
            self.at = end;
        }
        is_next
    }

    /// A command's argument: a group, else one digit, letter or command.
    fn argument(&mut self) -> Option<Expr> {
        self.nested(|parser| {
            parser.spaces();
            match parser.peek()? {
                '{' => parser.enclosed('{', '}'),
                c if c.is_ascii_digit() => {
                    parser.at += 1;
                    Some(integer(i64::from(c.to_digit(10)?)))
                }
                c if c.is_alphabetic() => {
                    parser.at += 1;
                    Some(Expr::Symbol(c.to_string()))
                }
                '\\' => parser.command(),
                _ => None,
            }
        })
    }

    fn command(&mut self) -> Option<Expr> {
        self.at += 1;
        let start = self.at;
        while self.peek().is_some_and(|c| c.is_ascii_alphabetic()) {
            self.at += 1;
        }
        let name: String = self.chars[start..self.at].iter().collect();
        match name.as_str() {
            "frac" => Some(Expr::Div(self.argument()?.into(), self.argument()?.into())),
            "binom" => Some(Expr::Call(
                "binom",
                vec![self.argument()?, self.argument()?],
            )),
            "sqrt" => self.root(),
            "" => None,
            _ => match FUNCTIONS.iter().find(|f| **f == name) {
                Some(function) => self.call(function),
                None => Some(Expr::Symbol(format!("\\{name}{}", self.subscript()?))),
            },
        }
    }

    fn root(&mut self) -> Option<Expr> {
        let degree = match self.take('[') {
            true => {
                let degree = self.sum()?;
                self.take(']').then_some(degree)?
            }
            false => integer(2),
        };
        self.spaces();
        let radicand = match self.peek()? {
            '(' => self.enclosed('(', ')')?,
            // √12 and sqrt 12 in plain text; LaTeX's \sqrt12 is written so by nobody.
            c if c.is_ascii_digit() => Expr::Number(self.digits().parse().ok()?),
            _ => self.argument()?,
        };
        let exponent = Expr::Div(integer(1).into(), degree.into());
        Some(Expr::Pow(radicand.into(), exponent.into()))
    }

    /// A function with its power, its base (of a logarithm) and its argument.
    fn call(&mut self, function: &'static str) -> Option<Expr> {
        self.nested(|parser| {
            let base = match parser.take('_') {
                true => Some(parser.argument()?),
                false => None,
            };
            let power = match parser.take('^') {
                true => Some(parser.exponent()?),
                false => None,
            };
            let argument = parser.power()?;
            let mut call = Expr::Call(function, vec![argument]);
            if let Some(base) = base {
                call = Expr::Div(call.into(), Expr::Call(function, vec![base]).into());
            }
            Some(match power {
                Some(power) => Expr::Pow(call.into(), power.into()),
                None => call,
            })
        })
    }

    /// Letters in a row: a function, a constant, a word of four or more, else single variables.
    fn letters(&mut self) -> Option<Expr> {
        let rest = &self.chars[self.at..];
        let word: String = rest.iter().take_while(|c| c.is_alphabetic()).collect();
        let length = word.chars().count();
        if let Some(function) = FUNCTIONS.iter().find(|f| word == **f) {
            self.at += length;
            return self.call(function);
        }
        match word.as_str() {
            "sqrt" => {
                self.at += length;
                self.root()
            }
            "pi" | "inf" | "infinity" => {
                self.at += length;
                Some(Expr::Symbol(
                    if word == "pi" { "π" } else { "∞" }.to_owned(),
                ))
            }
            _ => {
                let taken = if length >= 4 { length } else { 1 };
                let name: String = rest[..taken].iter().collect();
                self.at += taken;
                Some(Expr::Symbol(name + &self.subscript()?))
            }
        }
    }

    /// The subscript of a variable as a part of its name.
    fn subscript(&mut self) -> Option<String> {
        if self.peek() != Some('_') {
            return Some(String::new());
        }
        self.at += 1;
        let start = self.at;
        self.argument()?;
        let text = self.chars[start..self.at].iter();
        Some(text.filter(|c| !"{} ".contains(**c)).collect())
    }

    fn quoted(&mut self) -> Option<Expr> {
        let rest = &self.chars[self.at + 1..];
        let length = rest.iter().position(|c| *c == UNQUOTE)?;
        let name: String = rest[..length].iter().collect();
        self.at += length + 2;
        Some(Expr::Symbol(name.trim().to_owned()))
    }
}

/// 10^n, for n up to a limit.
fn power_of_ten(n: usize) -> Option<BigInt> {
    (n <= MAX_EXPONENT).then(|| pow(BigInt::from(10), n))
}

fn integer(n: i64) -> Expr {
    Expr::Number(BigRational::new(n.into(), BigInt::one()))
}
