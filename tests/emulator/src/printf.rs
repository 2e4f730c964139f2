//! Device-side `printf`: formats C conversions from the packed argument buffer.

/// Formats `format`; `next(size)` yields the next argument of 4 or 8 bytes, `string` the text at
/// a device address.
pub fn format(
    format: &str,
    next: &mut dyn FnMut(u64) -> u64,
    string: &dyn Fn(u64) -> String,
) -> String {
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let (mut flags, mut width, mut precision, mut long) =
            (String::new(), String::new(), None::<String>, false);
        while let Some(&c) = chars.peek() {
            match c {
                '-' | '+' | ' ' | '#' => flags.push(c),
                '0' if width.is_empty() && precision.is_none() => flags.push(c),
                '0'..='9' => precision.as_mut().unwrap_or(&mut width).push(c),
                '.' => precision = Some(String::new()),
                'l' | 'j' | 'z' | 't' => long = true,
                'h' => {}
                _ => break,
            }
            chars.next();
        }
        let digits = precision.map(|p| p.parse().unwrap_or(0).min(64usize));
        let body = conversion(
            chars.next().unwrap_or('%'),
            long,
            digits,
            &flags,
            next,
            string,
        );
        pad(
            &mut out,
            &body,
            &flags,
            width.parse().unwrap_or(0).min(1024),
        );
    }
    out
}

fn conversion(
    kind: char,
    long: bool,
    digits: Option<usize>,
    flags: &str,
    next: &mut dyn FnMut(u64) -> u64,
    string: &dyn Fn(u64) -> String,
) -> String {
    let size = if long { 8 } else { 4 };
    match kind {
        '%' => "%".into(),
        'd' | 'i' => {
            let raw = next(size);
            let value = if long {
                raw as i64
            } else {
                i64::from(raw as i32)
            };
            if flags.contains('+') {
                format!("{value:+}")
            } else {
                value.to_string()
            }
        }
        'u' => next(size).to_string(),
        'x' => format!("{:x}", next(size)),
        'X' => format!("{:X}", next(size)),
        'o' => format!("{:o}", next(size)),
        'c' => char::from(next(4) as u8).to_string(),
        'p' => format!("{:#x}", next(8)),
        's' => string(next(8)),
        'e' | 'E' => format!("{:.*e}", digits.unwrap_or(6), f64::from_bits(next(8))),
        'f' | 'F' => format!("{:.*}", digits.unwrap_or(6), f64::from_bits(next(8))),
        'g' | 'G' => f64::from_bits(next(8)).to_string(),
        other => format!("%{other}"),
    }
}

fn pad(out: &mut String, body: &str, flags: &str, width: usize) {
    let missing = width.saturating_sub(body.chars().count());
    if flags.contains('-') {
        out.push_str(body);
        out.extend(std::iter::repeat_n(' ', missing));
    } else {
        let fill = if flags.contains('0') { '0' } else { ' ' };
        out.extend(std::iter::repeat_n(fill, missing));
        out.push_str(body);
    }
}
