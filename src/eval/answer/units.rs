//! What an answer is counted in.

use super::normalise::{QUOTE, UNQUOTE};

/// Units by the words that stand for them; those on a line are the same.
const UNITS: [&[&str]; 36] = [
    &[
        "cm",
        "centimeter",
        "centimeters",
        "centimetre",
        "centimetres",
    ],
    &["mm", "millimeter", "millimeters"],
    &["m", "meter", "meters", "metre", "metres"],
    &["km", "kilometer", "kilometers", "kilometres"],
    &["in", "inch", "inches"],
    &["ft", "foot", "feet"],
    &["yd", "yard", "yards"],
    &["mi", "mile", "miles"],
    &["g", "gram", "grams"],
    &["kg", "kilogram", "kilograms"],
    &["lb", "lbs", "pound", "pounds"],
    &["oz", "ounce", "ounces"],
    &["l", "liter", "liters", "litre", "litres"],
    &["ml", "milliliter", "milliliters"],
    &["s", "sec", "second", "seconds"],
    &["min", "minute", "minutes"],
    &["h", "hr", "hrs", "hour", "hours"],
    &["day", "days"],
    &["week", "weeks"],
    &["month", "months"],
    &["year", "years", "yr", "yrs"],
    &["cent", "cents"],
    &["dollar", "dollars", "usd"],
    &["degree", "degrees", "deg"],
    &["rad", "radian", "radians"],
    &["mph"],
    &["km/h", "kmh", "kph"],
    &["m/s"],
    &["j", "joule", "joules"],
    &["n", "newton", "newtons"],
    &["w", "watt", "watts"],
    &["v", "volt", "volts"],
    &["k", "kelvin"],
    &["hz", "hertz"],
    &["unit", "units"],
    &["mol", "moles", "mole"],
];

/// The answer before its unit, and the unit: a word for it set as text or written behind a
/// number. `None` where there is no unit.
pub(super) fn split_unit(text: &str) -> Option<(&str, &'static str)> {
    let mut core = text.trim_end();
    let mut unit = None;
    while let Some((rest, found)) = last_unit(core) {
        unit = Some(found);
        core = rest;
    }
    let unit = unit.filter(|_| {
        core.chars()
            .any(|c| c.is_ascii_digit() || c == 'π' || c == '\\')
    })?;
    Some((core, unit))
}

/// Takes one word at the end away: an empty name stands for any other thing that is counted.
fn last_unit(text: &str) -> Option<(&str, &'static str)> {
    let text = without_power(text.trim_end());
    if let Some(quoted) = text.strip_suffix(UNQUOTE) {
        let start = quoted.rfind(QUOTE)?;
        let word = &quoted[start + QUOTE.len_utf8()..];
        let name = known(without_power(word)).unwrap_or_default();
        return Some((text[..start].trim_end(), name)).filter(|(rest, _)| !rest.is_empty());
    }
    let is_part = |c: char| c.is_alphabetic() && c != 'π' || c == '/' || c == '.';
    let start = text.len()
        - text
            .chars()
            .rev()
            .take_while(|c| is_part(*c))
            .map(char::len_utf8)
            .sum::<usize>();
    let (rest, word) = (&text[..start], text[start..].trim_end_matches('.'));
    let spaced = rest.ends_with(' ') || rest.ends_with(UNQUOTE);
    let rest = rest.trim_end();
    let before = rest.chars().next_back()?;
    if before == '\\' || word.is_empty() || word.starts_with(['/', '.']) {
        return None;
    }
    let name = known(word);
    let is_thing = spaced && word.chars().count() >= 3 && word.chars().all(char::is_alphabetic);
    match name {
        Some(name) if spaced || word.len() > 1 && before.is_ascii_digit() => Some((rest, name)),
        _ if is_thing => Some((rest, "")),
        _ => None,
    }
}

/// The text without a power at its end, as in cm^2.
fn without_power(text: &str) -> &str {
    let powers = ["^2", "^3", "^{2}", "^{3}"];
    let bare = powers.iter().find_map(|power| text.strip_suffix(power));
    // Only of a unit: that of a number or variable is a part of the answer.
    bare.filter(|bare| {
        bare.ends_with(UNQUOTE) || bare.ends_with(char::is_alphabetic) && known_at_end(bare)
    })
    .unwrap_or(text)
}

fn known_at_end(text: &str) -> bool {
    let word = text
        .rsplit(|c: char| !c.is_alphabetic())
        .next()
        .unwrap_or_default();
    word.len() > 1 && known(word).is_some()
}

fn known(word: &str) -> Option<&'static str> {
    let word = word.trim().trim_end_matches('.');
    let line = UNITS.iter().find(|line| line.contains(&word))?;
    line.first().copied()
}
