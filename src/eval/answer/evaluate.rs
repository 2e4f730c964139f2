//! The value of an expression: an exact fraction where it is one, else a complex float64.

use std::hash::{DefaultHasher, Hash, Hasher};

use num::bigint::{BigInt, BigUint};
use num::complex::Complex64;
use num::{BigRational, One, Signed, ToPrimitive, Zero, pow};

use super::parse::Expr;

/// Values that are not both exact are equal where they differ by less than this, relatively; two
/// powers of ten more would be within reach of rounding.
pub const TOLERANCE: f64 = 1e-10;

/// Points at which expressions with variables are compared.
const POINTS: u64 = 3;
/// Bits of the largest power, sum, product or quotient, and the largest factorial, that are computed
/// exactly.
const MAX_BITS: u64 = 1 << 14;
const MAX_FACTORIAL: u64 = 1000;

/// Whether two expressions have the same value; `None` where one of them has none.
pub(super) fn same_value(a: &Expr, b: &Expr) -> Option<bool> {
    for point in 0..POINTS {
        let (x, y) = (value(a, point)?, value(b, point)?);
        if !x.is_close(&y)? {
            return Some(false);
        }
    }
    Some(true)
}

/// A number.
#[derive(Clone, Debug)]
enum Value {
    Exact(BigRational),
    Close(Complex64),
}

impl Value {
    fn approximate(&self) -> Complex64 {
        match self {
            Self::Exact(value) => value.to_f64().unwrap_or(f64::NAN).into(),
            Self::Close(value) => *value,
        }
    }

    fn is_close(&self, other: &Self) -> Option<bool> {
        if let (Self::Exact(a), Self::Exact(b)) = (self, other) {
            return Some(a == b);
        }
        let (a, b) = (self.approximate(), other.approximate());
        let size = a.norm().max(b.norm());
        // The second term is what is left where terms cancel to 0.
        let allowed = TOLERANCE * size + 1e-14;
        (a.is_finite() && b.is_finite()).then(|| (a - b).norm() <= allowed)
    }
}

/// The value where the variables have fixed positive values, others at each `point`.
fn value(expr: &Expr, point: u64) -> Option<Value> {
    use Value::{Close, Exact};
    Some(match expr {
        Expr::Number(number) => Exact(number.clone()),
        Expr::Symbol(name) => Close(symbol(name, point)),
        Expr::Neg(a) => match value(a, point)? {
            Exact(a) => Exact(-a),
            Close(a) => Close(-a),
        },
        Expr::Add(a, b) => match (value(a, point)?, value(b, point)?) {
            (Exact(a), Exact(b))
                if are_moderate(&[
                    [a.numer(), b.denom()],
                    [b.numer(), a.denom()],
                    [a.denom(), b.denom()],
                ]) =>
            {
                Exact(a + b)
            }
            (a, b) => Close(a.approximate() + b.approximate()),
        },
        Expr::Mul(a, b) => match (value(a, point)?, value(b, point)?) {
            (Exact(a), Exact(b))
                if are_moderate(&[[a.numer(), b.numer()], [a.denom(), b.denom()]]) =>
            {
                Exact(a * b)
            }
            (a, b) => Close(a.approximate() * b.approximate()),
        },
        Expr::Div(a, b) => match (value(a, point)?, value(b, point)?) {
            (_, Exact(b)) if b.is_zero() => return None,
            (Exact(a), Exact(b))
                if are_moderate(&[[a.numer(), b.denom()], [a.denom(), b.numer()]]) =>
            {
                Exact(a / b)
            }
            (a, b) => Close(a.approximate() / b.approximate()),
        },
        Expr::Pow(a, b) => power(value(a, point)?, value(b, point)?)?,
        Expr::Call(name, arguments) => {
            let values = arguments.iter().map(|a| value(a, point));
            call(name, &values.collect::<Option<Vec<_>>>()?)?
        }
    })
}

/// Whether the products that an exact result is made of are of moderate size: fractions that grow
/// with every term would take hours to reduce.
fn are_moderate(products: &[[&BigInt; 2]]) -> bool {
    // One bit less than both factors have together is the least that a product has.
    let fits = |[a, b]: &[&BigInt; 2]| a.bits() + b.bits() <= MAX_BITS + 1;
    products.iter().all(fits)
}

/// The value of a constant, or of a variable at a point: a positive number of its own.
fn symbol(name: &str, point: u64) -> Complex64 {
    match name {
        "π" => std::f64::consts::PI.into(),
        "e" => std::f64::consts::E.into(),
        "i" => Complex64::i(),
        _ => {
            let mut hasher = DefaultHasher::new();
            (name, point).hash(&mut hasher);
            let unit = (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64;
            (0.5 + 2.0 * unit).into()
        }
    }
}

fn power(base: Value, exponent: Value) -> Option<Value> {
    if let (Value::Exact(base), Value::Exact(exponent)) = (&base, &exponent)
        && let Some(exact) = exact_power(base, exponent)
    {
        return exact.map(Value::Exact);
    }
    let (base, exponent) = (base.approximate(), exponent.approximate());
    let whole = exponent.re.round();
    let result = match exponent.im == 0.0 && exponent.re == whole && whole.abs() < 1e4 {
        true => base.powi(whole as i32),
        false => base.powc(exponent),
    };
    result.is_finite().then_some(Value::Close(result))
}

/// The power where it is a fraction of moderate size; `Some(None)` for 0 to a negative power.
fn exact_power(base: &BigRational, exponent: &BigRational) -> Option<Option<BigRational>> {
    let degree = exponent.denom().to_u32().filter(|d| *d <= 64)?;
    let times = exponent
        .numer()
        .to_i64()
        .filter(|n| n.unsigned_abs() <= MAX_BITS)?;
    if base.is_zero() && times < 0 {
        return Some(None);
    }
    let root = match degree {
        1 => base.clone(),
        // A negative radicand has complex roots; only the principal one is meant.
        _ if base.is_negative() => return None,
        _ => BigRational::new(
            exact_root(base.numer(), degree)?,
            exact_root(base.denom(), degree)?,
        ),
    };
    let bits = root.numer().bits().max(root.denom().bits());
    if bits.saturating_mul(times.unsigned_abs()) > MAX_BITS {
        return None;
    }
    Some(Some(root.pow(i32::try_from(times).ok()?)))
}

fn exact_root(number: &BigInt, degree: u32) -> Option<BigInt> {
    let root = number.nth_root(degree);
    (pow(root.clone(), degree as usize) == *number).then_some(root)
}

fn call(name: &str, arguments: &[Value]) -> Option<Value> {
    let exact = |i: usize| match arguments.get(i) {
        Some(Value::Exact(value)) => Some(value),
        _ => None,
    };
    match (name, arguments) {
        ("abs", [Value::Exact(x)]) => return Some(Value::Exact(x.abs())),
        ("!", _) => {
            let n = natural(exact(0)?)?;
            return Some(whole(
                (1..=n).fold(BigUint::one(), |product, i| product * i),
            ));
        }
        ("binom", _) => {
            let (n, k) = (natural(exact(0)?)?, natural(exact(1)?)?);
            let terms = if k > n { 0..=0 } else { 1..=k };
            let binomial = terms.fold(BigUint::one(), |b, i| match i {
                0 => BigUint::ZERO,
                _ => b * (n - k + i) / i,
            });
            return Some(whole(binomial));
        }
        _ => {}
    }
    let x = arguments.first()?.approximate();
    let one = Complex64::one();
    let result = match name {
        "abs" => x.norm().into(),
        "sin" => x.sin(),
        "cos" => x.cos(),
        "tan" => x.tan(),
        "cot" => one / x.tan(),
        "sec" => one / x.cos(),
        "csc" => one / x.sin(),
        "sinh" => x.sinh(),
        "cosh" => x.cosh(),
        "tanh" => x.tanh(),
        "arcsin" => x.asin(),
        "arccos" => x.acos(),
        "arctan" => x.atan(),
        "ln" => x.ln(),
        "log" | "lg" => x.ln() / 10f64.ln(),
        "exp" => x.exp(),
        _ => return None,
    };
    result.is_finite().then_some(Value::Close(result))
}

/// An integer from 0 to what a factorial is computed of.
fn natural(value: &BigRational) -> Option<u64> {
    let whole = value.is_integer().then(|| value.to_integer().to_u64())?;
    whole.filter(|n| *n <= MAX_FACTORIAL)
}

fn whole(n: BigUint) -> Value {
    Value::Exact(BigRational::from_integer(n.into()))
}
