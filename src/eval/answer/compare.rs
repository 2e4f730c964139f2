//! Whether two answers say the same.

use super::evaluate::same_value;
use super::normalise::{QUOTE, UNQUOTE, normalise};
use super::structure::{Answer, plain, structure};
use super::units::split_unit;

/// Longest answer, in bytes, that is looked into; longer ones are compared as text.
const MAX_LENGTH: usize = 2000;

/// Whether two answers say the same. Neither is the right one: the order has no part in it.
///
/// Units are left out where only one answer has them, and must be the same where both do; 50 % is
/// 50 and 0.5, a label such as (B) the letter B, x = 5 the number 5.
pub fn equal(a: &str, b: &str) -> bool {
    if a.len() > MAX_LENGTH || b.len() > MAX_LENGTH {
        return a.trim() == b.trim();
    }
    let (a, b) = (normalise(a), normalise(b));
    if plain(&a) == plain(&b) {
        return true;
    }
    if let Some(same) = same_choice(&a, &b) {
        return same;
    }
    if same(&structure(&a), &structure(&b)) {
        return true;
    }
    let (cut_a, cut_b) = (split_unit(&a), split_unit(&b));
    if cut_a.is_some() || cut_b.is_some() {
        let is_other = |(a, b): (&str, &str)| !a.is_empty() && !b.is_empty() && a != b;
        if cut_a
            .map(|cut| cut.1)
            .zip(cut_b.map(|cut| cut.1))
            .is_some_and(is_other)
        {
            return false;
        }
        let core =
            |cut: Option<(&str, &str)>, whole: &str| cut.map_or(whole, |cut| cut.0).to_owned();
        let (a, b) = (core(cut_a, &a), core(cut_b, &b));
        return same(&structure(&a), &structure(&b)) || same_percentage(&a, &b);
    }
    same_percentage(&a, &b)
}

/// Whether one answer is the other with a percent sign.
fn same_percentage(a: &str, b: &str) -> bool {
    let numbers = match (a.strip_suffix('%'), b.strip_suffix('%')) {
        (Some(a), None) => (a, b),
        (None, Some(b)) => (a, b),
        _ => return false,
    };
    same(&structure(numbers.0), &structure(numbers.1))
}

/// For a letter on one side and the label of a choice on the other, whether they are the same.
fn same_choice(a: &str, b: &str) -> Option<bool> {
    match (label(a)?, label(b)?) {
        ((x, true), (y, _)) | ((x, _), (y, true)) => Some(x == y),
        _ => None,
    }
}

/// The letter that an answer begins with as a choice, and whether there is nothing else.
fn label(text: &str) -> Option<(char, bool)> {
    let text: String = text
        .chars()
        .filter(|c| *c != QUOTE && *c != UNQUOTE)
        .collect();
    let text = text.trim();
    let inner = text.strip_prefix('(').unwrap_or(text).trim_start();
    let letter = inner.chars().next().filter(|c| ('a'..='j').contains(c))?;
    let rest = inner[letter.len_utf8()..].trim_start();
    let is_bracketed = text.starts_with('(');
    match rest.chars().next() {
        None if !is_bracketed => Some((letter, true)),
        Some(')') => Some((letter, rest[1..].trim_matches(['.', ':', ' ']).is_empty())),
        Some('.' | ':') if !is_bracketed => Some((letter, rest[1..].trim().is_empty())),
        _ => None,
    }
}

fn same(a: &Answer, b: &Answer) -> bool {
    match (a, b) {
        (Answer::Set(items), other) | (other, Answer::Set(items)) if items.len() == 1 => {
            same_or_set(&items[0], other)
        }
        (Answer::Expr(x), Answer::Expr(y)) => same_value(x, y).unwrap_or(false),
        (Answer::Text(x), Answer::Text(y)) => !x.is_empty() && x == y,
        (Answer::Sequence(o, x, c), Answer::Sequence(p, y, d)) => {
            let pairs = || x.iter().zip(y);
            (o, c) == (p, d) && x.len() == y.len() && pairs().all(|(x, y)| same(x, y))
        }
        (Answer::Set(x), Answer::Set(y)) | (Answer::Union(x), Answer::Union(y)) => same_set(x, y),
        (Answer::Relation(a, sign, b), Answer::Relation(c, other, d)) => {
            let turned = "=≈≠".contains(*sign) && same(a, d) && same(b, c);
            sign == other && (same(a, c) && same(b, d) || turned)
        }
        _ => false,
    }
}

/// A set of one is its only item.
fn same_or_set(item: &Answer, other: &Answer) -> bool {
    match other {
        Answer::Set(items) => matches!(&items[..], [only] if same(item, only)),
        other => same(item, other),
    }
}

/// Whether each item has one of its own among the others.
fn same_set(a: &[Answer], b: &[Answer]) -> bool {
    let mut free: Vec<&Answer> = b.iter().collect();
    a.len() == b.len()
        && a.iter()
            .all(|x| match free.iter().position(|y| same(x, y)) {
                Some(found) => {
                    free.swap_remove(found);
                    true
                }
                None => false,
            })
}
