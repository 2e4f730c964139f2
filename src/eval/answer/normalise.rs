//! One spelling for what can be written in several: LaTeX's commands, Unicode's signs, ASCII.

/// Begin and end of words that are set as text.
pub(super) const QUOTE: char = '\u{e000}';
pub(super) const UNQUOTE: char = '\u{e001}';
/// Braces of a set, which are not those of a group.
pub(super) const SET: [char; 2] = ['\u{2983}', '\u{2984}'];
/// A matrix, the end of its rows and of its columns.
pub(super) const MATRIX: [char; 2] = ['\u{27e6}', '\u{27e7}'];
pub(super) const ROW: char = '\u{e002}';
pub(super) const COLUMN: char = '\u{e003}';

/// Groups within groups that are looked into.
const MAX_DEPTH: usize = 32;

/// The answer in lower case with one sign for each meaning, without what changes its look alone.
pub(super) fn normalise(answer: &str) -> String {
    let private = |c: &char| !('\u{e000}'..='\u{e003}').contains(c);
    let chars: Vec<char> = answer.to_lowercase().chars().filter(private).collect();
    let mut out = String::new();
    rewrite(&chars, &mut out, 0);
    for degree in ["^{°}", "^ °", "^°", "°"] {
        out = out.replace(degree, "");
    }
    let out = out.replace("{,}", ",").replace("**", "^");
    let mut out = out.split_whitespace().collect::<Vec<_>>().join(" ");
    if out.chars().any(|c| c.is_ascii_digit() || c == '\\') {
        out = out.replace(" and ", ",").replace(" or ", ",");
    }
    out.trim_end_matches(['.', ',', ';', ' '])
        .trim_start()
        .to_owned()
}

fn rewrite(chars: &[char], out: &mut String, depth: usize) {
    let mut at = 0;
    while at < chars.len() {
        let c = chars[at];
        at += 1;
        match c {
            '\\' => at = command(chars, at, out, depth),
            '$' | '€' | '£' | '¥' => {}
            '&' => out.push(COLUMN),
            '~' => out.push(' '),
            other => match sign(other) {
                Some(text) => out.push_str(text),
                None => out.push(other),
            },
        }
    }
}

/// What a sign of Unicode stands for.
fn sign(c: char) -> Option<&'static str> {
    Some(match c {
        '−' | '–' => "-",
        '×' | '·' | '⋅' | '∗' => "*",
        '÷' => "/",
        '√' => "\\sqrt ",
        '²' => "^2",
        '³' => "^3",
        '½' => " 1/2",
        '¼' => " 1/4",
        '¾' => " 3/4",
        '，' => ",",
        '％' => "%",
        _ => return None,
    })
}

/// Rewrites the command whose name begins at `at`; where it ends.
fn command(chars: &[char], at: usize, out: &mut String, depth: usize) -> usize {
    let letters = chars[at..].iter().take_while(|c| c.is_ascii_alphabetic());
    let end = at + letters.count().max(1).min(chars.len() - at);
    let name: String = chars[at..end].iter().collect();
    if let Some(text) = simple(&name) {
        out.push_str(text);
        return end;
    }
    match name.as_str() {
        // A thin space between digits separates thousands.
        "," | "!" => {
            let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
            if name == "," && !(digit(out.chars().next_back()) && digit(chars.get(end).copied())) {
                out.push(' ');
            }
            end
        }
        "\\" => {
            out.push(ROW);
            end
        }
        "text" | "textbf" | "textit" | "textrm" | "textsf" | "texttt" | "mbox" | "emph"
        | "mathrm" | "mathbf" | "mathit" | "mathsf" | "boldsymbol" | "bm" | "operatorname"
        | "boxed" | "fbox" => match group(chars, end) {
            Some((inner, end)) if depth < MAX_DEPTH => {
                words(&name, inner, out, depth);
                end
            }
            _ => end,
        },
        "begin" | "end" => match group(chars, end) {
            Some(([.., 'm', 'a', 't', 'r', 'i', 'x'], end)) => {
                out.push(MATRIX[usize::from(name == "end")]);
                end
            }
            _ => {
                out.push_str("\\unknown ");
                end
            }
        },
        _ => {
            out.push('\\');
            out.push_str(&name);
            out.push(' ');
            end
        }
    }
}

/// The content of a command that sets it in another font or as text.
fn words(name: &str, inner: &[char], out: &mut String, depth: usize) {
    let mut text = String::new();
    rewrite(inner, &mut text, depth + 1);
    let word = text.trim();
    let has_letters = word.chars().any(char::is_alphabetic);
    let is_symbol = name.starts_with("math") || name.starts_with('b');
    match word {
        "and" | "or" => out.push(','),
        _ if name == "boxed" || name == "fbox" || !has_letters => out.push_str(&text),
        _ if is_symbol && word.chars().count() == 1 => out.push_str(word),
        _ if name == "operatorname" => {
            out.push('\\');
            out.push_str(word);
            out.push(' ');
        }
        _ => {
            out.push(QUOTE);
            out.extend(word.chars().filter(|&c| c != QUOTE && c != UNQUOTE));
            out.push(UNQUOTE);
        }
    }
}

/// What commands without arguments become.
fn simple(name: &str) -> Option<&'static str> {
    Some(match name {
        "left" | "right" | "middle" | "big" | "bigl" | "bigr" | "bigg" | "biggl" | "biggr"
        | "displaystyle" | "textstyle" | "limits" | "(" | ")" | "[" | "]" | "$" => "",
        ";" | ":" | " " | "quad" | "qquad" | "~" | ">" => " ",
        "dfrac" | "tfrac" | "cfrac" | "frac" => "\\frac ",
        "dbinom" | "tbinom" | "binom" => "\\binom ",
        "%" => "%",
        "{" | "lbrace" => "\u{2983}",
        "}" | "rbrace" => "\u{2984}",
        "circ" | "degree" => "°",
        "times" | "cdot" | "ast" => "*",
        "div" => "/",
        "pm" | "mp" => "±",
        "le" | "leq" | "leqslant" => "≤",
        "ge" | "geq" | "geqslant" => "≥",
        "ne" | "neq" => "≠",
        "lt" => "<",
        "gt" => ">",
        "in" => "∈",
        "cup" => "∪",
        "infty" => "∞",
        "pi" => "π",
        "approx" => "≈",
        "langle" => "(",
        "rangle" => ")",
        "mid" | "vert" | "lvert" | "rvert" => "|",
        "colon" => ":",
        _ => return None,
    })
}

/// The braces' content of an argument that begins at `at`, and where the argument ends.
fn group(chars: &[char], at: usize) -> Option<(&[char], usize)> {
    let spaces = chars[at..].iter().take_while(|c| **c == ' ').count();
    let start = at + spaces + 1;
    if chars.get(start - 1) != Some(&'{') {
        return None;
    }
    let mut depth = 1;
    for (i, c) in chars.iter().enumerate().skip(start) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some((&chars[start..i], i + 1));
        }
    }
    None
}
