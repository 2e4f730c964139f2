//! Where the final answer of a completion is.

/// The final answer in a completion: the content of the last `\boxed{…}`, else of the last
/// `<answer>` tag (without a leading "Answer:"), else the last number. Blank ones do not count.
pub fn extract(completion: &str) -> Option<&str> {
    last_boxed(completion)
        .or_else(|| last_tag(completion))
        .or_else(|| last_number(completion))
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
