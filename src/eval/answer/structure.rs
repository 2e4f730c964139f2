//! What an answer is made of: lists, tuples and intervals, sets, unions, matrices, relations, and
//! in them expressions or text.

use super::normalise::{COLUMN, MATRIX, QUOTE, ROW, SET, UNQUOTE};
use super::parse::{Expr, parse};

/// Brackets within brackets that are looked into.
const MAX_DEPTH: usize = 16;

/// An answer by its parts.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    Expr(Expr),
    Text(String),
    /// In order, with its brackets: a tuple, an interval, a matrix or a row of it.
    Sequence(char, Vec<Self>, char),
    /// In any order: a set, or a list without brackets.
    Set(Vec<Self>),
    /// In any order: parts joined by ∪.
    Union(Vec<Self>),
    /// Two sides and the sign between.
    Relation(Box<Self>, char, Box<Self>),
}

/// The structure of a normalised answer.
pub(super) fn structure(text: &str) -> Answer {
    part(&without_thousands(text), 0)
}

fn part(text: &str, depth: usize) -> Answer {
    let text = text.trim();
    if depth > MAX_DEPTH || text.is_empty() {
        return Answer::Text(plain(text));
    }
    let parts = |pieces: Vec<&str>| -> Vec<Answer> {
        pieces
            .into_iter()
            .map(|piece| part(piece, depth + 1))
            .collect()
    };
    if let Some(whole) = enclosed(text, depth) {
        return whole;
    }
    for (separators, kind) in [("∪", true), (",;", false)] {
        let pieces = split(text, separators);
        if pieces.len() > 1 {
            if pieces.iter().any(|piece| piece.trim().is_empty()) {
                return Answer::Text(plain(text));
            }
            return match kind {
                true => Answer::Union(parts(pieces)),
                false => Answer::Set(parts(pieces)),
            };
        }
    }
    if let Some(relation) = relation(text, depth) {
        return relation;
    }
    if text.contains('±') {
        let sides = ["+", "-"].map(|sign| part(&text.replace('±', sign), depth + 1));
        return Answer::Set(sides.into());
    }
    if is_words(text) {
        return Answer::Text(plain(text));
    }
    match parse(text) {
        Some(expr) => Answer::Expr(expr),
        None => Answer::Text(plain(text)),
    }
}

/// A tuple, interval, set or matrix that is the whole text; `None` for brackets around one
/// expression.
fn enclosed(text: &str, depth: usize) -> Option<Answer> {
    let (open, close) = (text.chars().next()?, text.chars().next_back()?);
    let inner = text.get(open.len_utf8()..text.len().checked_sub(close.len_utf8())?)?;
    let closes_at_end = closing(text) == Some(text.len() - close.len_utf8());
    let row = |text: &str, separators: &str| -> Vec<Answer> {
        let pieces = split(text, separators).into_iter();
        pieces.map(|piece| part(piece, depth + 1)).collect()
    };
    match (open, close) {
        _ if !closes_at_end => None,
        ('(' | '[', ')' | ']') => {
            let items = row(inner, ",;");
            (items.len() > 1).then_some(Answer::Sequence(open, items, close))
        }
        (o, c) if [o, c] == SET => Some(Answer::Set(row(inner, ",;"))),
        (o, c) if [o, c] == MATRIX => {
            let rows = inner.trim_end_matches([ROW, ' ']).split(ROW);
            let rows =
                rows.map(|cells| Answer::Sequence('(', row(cells, &COLUMN.to_string()), ')'));
            Some(Answer::Sequence(o, rows.collect(), c))
        }
        _ => None,
    }
}

/// Where the bracket at the start of a text is closed, by any bracket that closes.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (i, c) in text.char_indices() {
        depth += step(c);
        if depth == 0 {
            return Some(i);
        }
    }
    None
}

/// How a character changes the depth of brackets.
fn step(c: char) -> i32 {
    match c {
        '(' | '[' | '{' => 1,
        ')' | ']' | '}' => -1,
        c if c == SET[0] || c == MATRIX[0] || c == QUOTE => 1,
        c if c == SET[1] || c == MATRIX[1] || c == UNQUOTE => -1,
        _ => 0,
    }
}

/// The pieces between separators outside all brackets.
fn split<'a>(text: &'a str, separators: &str) -> Vec<&'a str> {
    let (mut pieces, mut start, mut depth) = (Vec::new(), 0, 0);
    for (i, c) in text.char_indices() {
        depth += step(c);
        if depth == 0 && separators.contains(c) {
            pieces.push(&text[start..i]);
            start = i + c.len_utf8();
        }
    }
    pieces.push(&text[start..]);
    pieces
}

/// An equation or inequality; where one side of an equality is a name for what is sought, the
/// other side is the answer.
fn relation(text: &str, depth: usize) -> Option<Answer> {
    const SIGNS: &str = "=≈∈≠≤≥<>";
    let mut pieces = split(text, SIGNS);
    let right = pieces.pop()?;
    let left = text.get(..text.len() - right.len())?;
    let sign = left.chars().next_back()?;
    let left = &left[..left.len() - sign.len_utf8()];
    if left.trim().is_empty() || right.trim().is_empty() {
        return None;
    }
    if "=≈∈".contains(sign) && (is_name(left) || pieces.len() > 1) {
        return Some(part(right, depth + 1));
    }
    let (left, right) = (part(left, depth + 1), part(right, depth + 1));
    Some(match sign {
        // Inequalities are read from the smaller side.
        '>' => Answer::Relation(right.into(), '<', left.into()),
        '≥' => Answer::Relation(right.into(), '≤', left.into()),
        _ => Answer::Relation(left.into(), sign, right.into()),
    })
}

/// Letters alone with a word among them, which is no product: its letters could then stand in any
/// order. A word has a vowel or more than three letters; m g h and mgh are products.
fn is_words(text: &str) -> bool {
    let is_letter = |c: char| c.is_alphabetic() && !"π∞".contains(c);
    let mark = |c: char| " -'".contains(c) || c == QUOTE || c == UNQUOTE;
    let is_word = |word: &str| {
        let count = word.chars().count();
        count > 3 || count > 1 && word.contains(['a', 'e', 'i', 'o', 'u'])
    };
    text != "pi" && text.chars().all(|c| is_letter(c) || mark(c)) && text.split(mark).any(is_word)
}

/// A variable, a sum of some, a function of one, or words.
fn is_name(text: &str) -> bool {
    let text = text.trim();
    let head = text.split(['(', '_']).next().unwrap_or_default();
    let letters = head.chars().filter(|c| c.is_alphabetic()).count();
    let is_sum = head.contains('+');
    let plain = text
        .chars()
        .all(|c| c.is_alphanumeric() || "\\_(){} +".contains(c) || c == QUOTE || c == UNQUOTE);
    let is_word =
        letters == 1 || is_sum || head.starts_with('\\') || head.starts_with(QUOTE) || letters >= 3;
    plain && is_word && !head.chars().any(|c| c.is_ascii_digit())
}

/// Text for comparison: without quotes, white space only between words.
pub(super) fn plain(text: &str) -> String {
    let mut out = String::new();
    let unquoted: String = text
        .chars()
        .filter(|c| *c != QUOTE && *c != UNQUOTE)
        .collect();
    for word in unquoted.split_whitespace() {
        let joins = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        if joins(out.chars().next_back()) && joins(word.chars().next()) {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

/// The text without the commas that separate thousands, which stand outside all brackets between
/// one to three digits and groups of three.
fn without_thousands(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let (mut out, mut at, mut depth) = (String::new(), 0, 0);
    let digits = |from: usize| {
        chars[from..]
            .iter()
            .take_while(|c| c.is_ascii_digit())
            .count()
    };
    while at < chars.len() {
        let run = digits(at);
        if run == 0 {
            depth += step(chars[at]);
            out.push(chars[at]);
            at += 1;
            continue;
        }
        let mut end = at + run;
        let mut groups = Vec::new();
        while run <= 3 && chars.get(end) == Some(&',') && digits(end + 1) > 0 {
            groups.push(digits(end + 1));
            end += 1 + digits(end + 1);
        }
        let after_point = at > 0 && chars[at - 1] == '.';
        let joins = depth == 0 && !after_point && groups.iter().all(|n| *n == 3);
        out.extend(chars[at..end].iter().filter(|c| **c != ',' || !joins));
        at = end;
    }
    out
}
