//! The answer of a completion, and when two answers are the same.

use proptest::prelude::*;
use resa_engine::eval::answer::{equal, extract};

#[test]
fn the_answer_is_the_last_box_else_the_last_tag_else_the_last_number() {
    let table: [(&str, Option<&str>); 34] = [
        (r"so \boxed{5} then \boxed{7}.", Some("7")),
        (r"\boxed{\frac{1}{2}} = 3", Some(r"\frac{1}{2}")),
        (r"\boxed{\{1, 2\}}", Some(r"\{1, 2\}")),
        (r"\boxed{ 42 } <answer>7</answer>", Some("42")),
        (r"\boxed{3} and \boxed{unclosed", Some("3")),
        (r"\boxed{3} and \boxed{ }", Some("3")),
        (r"\boxed{ } <answer>8</answer>", Some("8")),
        (r"\boxed{a \} b}", Some(r"a \} b")),
        (r"\boxed{x^{2^{3}}}", Some("x^{2^{3}}")),
        (" 5 </think>\n<answer> Answer: 5</answer>", Some("5")),
        (
            "<answer>3</answer> no, <answer> answer:  4 </answer> 9",
            Some("4"),
        ),
        ("<answer>\nx + 1\n</answer>", Some("x + 1")),
        ("<answer> Answer: 6", Some("6")),
        ("5 <answer> Answer: </answer>", Some("5")),
        (
            "1 <answer>\u{4f60}\u{597d}</answer>",
            Some("\u{4f60}\u{597d}"),
        ),
        ("The total is 12.", Some("12")),
        ("It costs $1,234.50 today", Some("1,234.50")),
        ("first 3, then 4", Some("4")),
        ("values 1,2,3", Some("3")),
        ("x = -7", Some("-7")),
        ("10-3", Some("3")),
        ("(4)-2", Some("2")),
        ("pages 3-4", Some("4")),
        ("about 50% of them", Some("50%")),
        ("it is 3/4 of it", Some("3/4")),
        ("it is 3/ of it", Some("3")),
        (".5 is half", Some(".5")),
        ("0.25.", Some("0.25")),
        ("12,345,678 people", Some("12,345,678")),
        ("a 1,2345", Some("2345")),
        ("no number - none.", None),
        ("", None),
        ("caf\u{e9} \u{4f60}7\u{597d}", Some("7")),
        (r"\boxed{}", None),
    ];
    for (completion, answer) in table {
        assert_eq!(extract(completion), answer, "{completion:?}");
    }
}

#[test]
fn equal_answers_are_recognised() {
    let pairs = [
        ("5", "5"),
        ("5", "5.0"),
        ("5", " 5 "),
        ("5", "+5"),
        ("5", "05"),
        ("5", "5."),
        ("-5", "-5.00"),
        ("-5", "\u{2212}5"),
        ("0", "-0"),
        ("0.5", ".5"),
        ("0.5", "1/2"),
        ("0.5", "50%"),
        ("0.5", r"50\%"),
        ("0.5", "50 %"),
        ("1/2", "2/4"),
        ("-1/2", "1/-2"),
        ("-0.5", "-1/2"),
        ("1/3", "2/6"),
        ("3", "6/2"),
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac{3}{4}", r"\frac{6}{8}"),
        (r"-\tfrac{1}{4}", "-0.25"),
        (r"\frac{-1}{4}", "-0.25"),
        (r"\frac{1}{-4}", "-25%"),
        ("1,234", "1234"),
        ("1,234,567.5", "1234567.50"),
        ("1{,}000", "1000"),
        ("$5", "5"),
        (r"\$5", "5.00"),
        ("$5$", "5"),
        (r"\(5\)", "5"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\text{5}", "5"),
        (r"\boxed{5}", "5"),
        (r"1\,000", "1000"),
        (r"2\!3", "23"),
        ("Yes", "yes"),
        ("YES.", "yes"),
        (r"\text{Yes}", "yes"),
        (r"\textbf{(B)}", "(b)"),
        ("x + 1", "x+1"),
        ("( 1, 2 )", "(1,2)"),
        (r"\left(1, 2\right)", "(1,2)"),
        ("a  b", "a b"),
        (r"\mathrm{ cat }", "cat"),
        (
            "123456789012345678901234567890123456789012",
            "123456789012345678901234567890123456789012",
        ),
        ("0.1", "0.10000000000000000000"),
        ("12345678901234567890.1", "12345678901234567890.10"),
        ("100%", "1"),
        ("5%", "5"),
        ("5", "5 apples"),
        ("1e3", "1000"),
    ];
    for (a, b) in pairs {
        assert!(equal(a, b) && equal(b, a), "{a:?} {b:?}");
    }
}

#[test]
fn different_answers_are_told_apart() {
    let pairs = [
        ("5", "6"),
        ("5", "-5"),
        ("0.1", "0.10000000000000000001"),
        ("1/3", "0.333"),
        ("1,23", "123"),
        ("1,2345", "12345"),
        (",123", "123"),
        ("12 34", "1234"),
        ("1/0", "2/0"),
        ("1/0", "0"),
        ("x+1", "x-1"),
        ("yes", "no"),
        ("", "0"),
        ("(1,2)", "(1,3)"),
        (r"\frac{1}{23}", r"\frac{12}{3}"),
        ("1.2.3", "1.23"),
        ("--5", "5"),
        ("12345678901234567890.1", "12345678901234567890.2"),
        (
            "123456789012345678901234567890123456789012",
            "123456789012345678901234567890123456789013",
        ),
        ("\u{0663}", "3"),
        ("%", "0"),
        ("/", "0"),
        (".", "0"),
        ("-", "0"),
        (r"\frac{1}{2}3", "0.5"),
        ("a b", "ab"),
    ];
    for (a, b) in pairs {
        assert!(!equal(a, b) && !equal(b, a), "{a:?} {b:?}");
    }
}

#[test]
fn the_largest_numbers_do_not_overflow() {
    let max = i128::MAX.to_string();
    let table = [
        format!("{max}/-{max}"),
        format!("-{max}%"),
        format!("{max}.{max}"),
        format!("1/{max}"),
    ];
    for a in &table {
        assert!(equal(a, a));
        assert!(!equal(a, "7"));
    }
    assert!(equal(&table[0], "-1"));
    // -2^127 as a numerator that a sign change cannot hold.
    assert!(!equal(
        r"\frac{17014118346046923173168730371588410572.8}{-0.1}",
        "1"
    ));
}

/// Right answer, given answer, verdict, and why math-verify's verdict is another.
fn table() -> Vec<[String; 4]> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/grading.tsv");
    let text = std::fs::read_to_string(path).unwrap();
    let rows = text.lines().skip(1).map(|line| {
        let columns: Vec<String> = line.split('\t').map(str::to_owned).collect();
        columns.try_into().unwrap()
    });
    rows.collect()
}

#[test]
fn answers_in_the_formats_of_aime_amc_math_minerva_and_gpqa_are_graded_as_the_table_says() {
    let table = table();
    assert!(table.len() >= 200);
    let mut wrong = Vec::new();
    for [right, given, verdict, _] in &table {
        let expected = verdict == "same";
        assert!(expected || verdict == "different", "{verdict}");
        for (a, b) in [(right, given), (given, right)] {
            if equal(a, b) != expected {
                wrong.push(format!("{a}   {b}   expected {verdict}"));
            }
        }
        assert!(
            equal(right, right) && equal(given, given),
            "{right} {given}"
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn answers_that_would_take_long_to_compute_are_compared_as_text() {
    let long = [
        "9".repeat(1_000_000),
        "(".repeat(1900),
        "\\frac{".repeat(300),
        "{".repeat(1000) + &"}".repeat(1000),
        "-".repeat(1900),
        "2^{2^{2^{2^{2^{2}}}}}".to_owned(),
        "9^9^9^9^9".to_owned(),
        "1e999999999999999999999".to_owned(),
        "1e-99999".to_owned(),
        "999999999!".to_owned(),
        "((1000!)!)!".to_owned(),
        "\\binom{1000}{500}^{1000}".to_owned(),
        "\\sqrt[99999999999999999999]{2}".to_owned(),
        "1,".repeat(900) + "1",
        "\\{".repeat(600) + &"\\}".repeat(600),
        "\\pm".repeat(300) + "1",
        "1=".repeat(500) + "1",
        "\\text{".repeat(250) + &"}".repeat(250),
    ];
    for answer in &long {
        assert!(!equal(answer, "7"), "{}", &answer[..20.min(answer.len())]);
        assert!(equal(answer, answer));
    }
}

/// Pieces that answers are made of, to come upon each branch of the grader.
const PIECES: [&str; 40] = [
    "1",
    "2",
    "37",
    "0",
    ".",
    ",",
    "-",
    "+",
    "/",
    "*",
    "^",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "|",
    "!",
    "%",
    "x",
    "e",
    "i",
    " ",
    "_",
    "=",
    "<",
    "\\frac",
    "\\sqrt",
    "\\pi",
    "\\text{",
    "\\{",
    "\\}",
    "\\pm",
    "\\cup",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
    "\\\\",
    "\u{e000}",
    "cm",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_answer_makes_the_grader_panic(
        a in proptest::collection::vec(proptest::sample::select(&PIECES[..]), 0..14),
        b in proptest::collection::vec(proptest::sample::select(&PIECES[..]), 0..14),
    ) {
        let (a, b) = (a.concat(), b.concat());
        prop_assert_eq!(equal(&a, &b), equal(&b, &a), "{} and {}", a, b);
        let _ = extract(&a);
    }

    #[test]
    fn no_text_makes_the_grader_panic(a in any::<String>(), b in any::<String>()) {
        let _ = (equal(&a, &b), equal(&a, &a), extract(&a));
        let _ = extract(&format!("\\boxed{{{a}}}"));
    }

    #[test]
    fn a_fraction_is_its_decimal_and_its_percentage(n in -9999i64..9999, places in 0usize..6) {
        let ten = 10i64.pow(places as u32);
        let sign = if n < 0 { "-" } else { "" };
        let decimal = format!("{sign}{}.{:0places$}", n.abs() / ten, n.abs() % ten);
        let fraction = format!("\\frac{{{n}}}{{{ten}}}");
        prop_assert!(equal(&fraction, &decimal), "{}", decimal);
        let (multiple, next) = (format!("{}/{}", 3 * n, 3 * ten), format!("{}/{ten}", n + 1));
        prop_assert!(equal(&multiple, &decimal), "{}", decimal);
        prop_assert!(!equal(&next, &decimal), "{}", decimal);
        let (percentage, hundredths) = (format!("{n}\\%"), format!("{n}/100"));
        prop_assert!(equal(&percentage, &hundredths), "{}", percentage);
    }
}

#[test]
fn fractions_that_grow_without_end_are_compared_in_no_time() {
    let start = std::time::Instant::now();
    for (term, operator, times) in [("3^8000", "*", 280), ("1/3^500", "/", 240)] {
        assert!(!equal("1", &vec![term; times].join(operator)), "{term}");
    }
    let sum: Vec<_> = (0..200).map(|i| format!("1/{}^900", 3 + 2 * i)).collect();
    assert!(!equal("1", &sum[..150].join("+")));
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    // What stays of moderate size is exact, however large its parts are.
    assert!(equal("1", "3^{8000}*3^{-8000}"));
    assert!(equal("4", r"\frac{2^{8000}}{2^{7998}}"));
    assert!(!equal("2^{8000}", "2^{8000}+1"));
}
