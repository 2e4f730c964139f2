//! The final answer of a completion, and whether two answers are the same.

/// The final answer in a completion: the content of the last `\boxed{…}`, else of the last
/// `<answer>` tag (without a leading "Answer:"), else the last number. Blank ones do not count.
pub fn extract(completion: &str) -> Option<&str> {
    last_boxed(completion)
        .or_else(|| last_tag(completion))
        .or_else(|| last_number(completion))
}

/// Whether two answers say the same. Both are compared as exact rational numbers (integers,
/// decimals, percentages, simple fractions, with thousands separators) where they are such,
/// else as text without regard to case, spacing and LaTeX's typographic marks.
pub fn equal(a: &str, b: &str) -> bool {
    let (a, b) = (normalise(a), normalise(b));
    match (Rational::parse(&a), Rational::parse(&b)) {
        (Some(x), Some(y)) => x == y,
        _ => a == b,
    }
}

fn not_blank(text: &str) -> Option<&str> {
    Some(text.trim()).filter(|text| !text.is_empty())
}

fn last_boxed(text: &str) -> Option<&str> {
    const OPEN: &str = "\\boxed{";
    text.rmatch_indices(OPEN)
        .find_map(|(at, _)| until_brace(&text[at + OPEN.len()..]).and_then(not_blank))
}

/// The text before the brace that closes a group opened just before it.
fn until_brace(text: &str) -> Option<&str> {
    let mut depth = 1;
    let mut escaped = false;
    for (i, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'{' => depth += 1,
            b'}' => {
                depth -= 1;
                if depth == 0 {
                    return Some(&text[..i]);
                }
            }
            _ => {}
        }
    }
    None
}

fn last_tag(text: &str) -> Option<&str> {
    const OPEN: &str = "<answer>";
    const LABEL: &str = "answer:";
    let content = &text[text.rfind(OPEN)? + OPEN.len()..];
    let content = content.split("</answer>").next().unwrap_or(content).trim();
    let label = content.get(..LABEL.len()).unwrap_or_default();
    not_blank(if label.eq_ignore_ascii_case(LABEL) {
        &content[LABEL.len()..]
    } else {
        content
    })
}

fn last_number(text: &str) -> Option<&str> {
    let bytes = text.as_bytes();
    let mut last = None;
    let mut at = 0;
    while at < bytes.len() {
        match number_at(bytes, at) {
            Some(end) => {
                last = Some(&text[at..end]);
                at = end;
            }
            None => at += 1,
        }
    }
    last
}

/// Where the number that starts at `start` ends: sign, digits with thousands separators, decimal
/// places, a denominator, a percent sign.
fn number_at(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start;
    if bytes[at] == b'-' {
        // After a digit, letter or bracket it is a minus or a hyphen, not a sign.
        let joins = |&b: &u8| b.is_ascii_alphanumeric() || b == b')';
        if start > 0 && joins(&bytes[start - 1]) {
            return None;
        }
        at += 1;
    }
    at = digits_at(bytes, at)?;
    if bytes.get(at) == Some(&b'/') {
        at = digits_at(bytes, at + 1).unwrap_or(at);
    }
    if bytes.get(at) == Some(&b'%') {
        at += 1;
    }
    Some(at)
}

/// The end of an unsigned decimal number; at least one digit, no dot at its end.
fn digits_at(bytes: &[u8], start: usize) -> Option<usize> {
    let digit = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    let mut at = start;
    while digit(at) || is_separator(bytes, start, at) {
        at += 1;
    }
    if bytes.get(at) == Some(&b'.') && digit(at + 1) {
        at += 1;
        while digit(at) {
            at += 1;
        }
    }
    (at > start).then_some(at)
}

/// A comma between digits with exactly three of them behind it.
fn is_separator(bytes: &[u8], start: usize, at: usize) -> bool {
    let digit = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    at > start && bytes.get(at) == Some(&b',') && (1..=3).all(|i| digit(at + i)) && !digit(at + 4)
}

/// Marks that change how an answer looks and not what it says.
const MARKS: [(&str, &str); 17] = [
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("\\!", ""),
    ("\\,", ""),
    ("\\;", " "),
    ("\\ ", " "),
    ("\\(", ""),
    ("\\)", ""),
    ("\\$", ""),
    ("\\%", "%"),
    ("{,}", ","),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\u{2212}", "-"),
    ("$", ""),
];

/// One spelling of an answer: lower case, without marks, white space only between words.
fn normalise(answer: &str) -> String {
    let mut text = answer.to_lowercase();
    for (mark, plain) in MARKS {
        text = text.replace(mark, plain);
    }
    let mut text = text.trim().trim_end_matches('.');
    while let Some(inner) = unwrap_text(text) {
        text = inner.trim();
    }
    let mut out = String::new();
    for word in text.split_whitespace() {
        let joins = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        if joins(out.chars().next_back()) && joins(word.chars().next()) {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

/// The content of an answer that is wholly inside `\text{…}` or the like.
fn unwrap_text(text: &str) -> Option<&str> {
    let inner = ["\\text{", "\\textbf{", "\\mathrm{", "\\mathbf{", "\\boxed{"]
        .iter()
        .find_map(|open| text.strip_prefix(open))?;
    until_brace(inner).filter(|content| content.len() + 1 == inner.len())
}

/// A fraction in lowest terms, its denominator positive.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Rational {
    numerator: i128,
    denominator: i128,
}

impl Rational {
    /// `None` for what is not a number or too long to be held exactly.
    fn parse(text: &str) -> Option<Self> {
        if let Some(rest) = text.strip_suffix('%') {
            return Self::fraction(rest)?.divided_by(Self::reduced(100, 1)?);
        }
        Self::fraction(text)
    }

    fn fraction(text: &str) -> Option<Self> {
        let (negative, text) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let value = if let Some(rest) = text.strip_prefix("\\frac{") {
            let top = until_brace(rest)?;
            let rest = rest[top.len() + 1..].strip_prefix('{')?;
            let bottom = until_brace(rest)?;
            if bottom.len() + 1 != rest.len() {
                return None;
            }
            Self::signed(top)?.divided_by(Self::signed(bottom)?)?
        } else if let Some((top, bottom)) = text.split_once('/') {
            Self::decimal(top)?.divided_by(Self::signed(bottom)?)?
        } else {
            Self::decimal(text)?
        };
        let numerator = if negative {
            -value.numerator
        } else {
            value.numerator
        };
        Some(Self { numerator, ..value })
    }

    fn signed(text: &str) -> Option<Self> {
        match text.strip_prefix('-') {
            Some(rest) => {
                let value = Self::decimal(rest)?;
                Some(Self {
                    numerator: -value.numerator,
                    ..value
                })
            }
            None => Self::decimal(text),
        }
    }

    /// Unsigned: digits, with or without thousands separators, and decimal places.
    fn decimal(text: &str) -> Option<Self> {
        let (whole, places) = text.split_once('.').unwrap_or((text, ""));
        let groups: Vec<&str> = whole.split(',').collect();
        let grouped = groups[0].len() <= 3 && groups[1..].iter().all(|g| g.len() == 3);
        let digits = groups.concat() + places;
        let all_digits = digits.bytes().all(|b| b.is_ascii_digit());
        if digits.is_empty()
            || !all_digits
            || groups.len() > 1 && (groups[0].is_empty() || !grouped)
        {
            return None;
        }
        let places = u32::try_from(places.len()).ok()?;
        Self::reduced(digits.parse().ok()?, 10i128.checked_pow(places)?)
    }

    fn divided_by(self, other: Self) -> Option<Self> {
        Self::reduced(
            self.numerator.checked_mul(other.denominator)?,
            self.denominator.checked_mul(other.numerator)?,
        )
    }

    /// `None` where the denominator is 0.
    fn reduced(numerator: i128, denominator: i128) -> Option<Self> {
        let (mut a, mut b) = (numerator.unsigned_abs(), denominator.unsigned_abs());
        while b != 0 {
            (a, b) = (b, a % b);
        }
        let divisor = i128::try_from(a).ok()?.checked_mul(denominator.signum())?;
        Some(Self {
            numerator: numerator.checked_div(divisor)?,
            denominator: denominator.checked_div(divisor)?,
        })
    }
}
