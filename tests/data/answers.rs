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
        ("5%", "5"),
        ("1,23", "123"),
        ("1,2345", "12345"),
        (",123", "123"),
        ("12 34", "1234"),
        ("1/0", "2/0"),
        ("1/0", "0"),
        ("x+1", "x-1"),
        ("yes", "no"),
        ("", "0"),
        ("5", "5 apples"),
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
        ("1e3", "13"),
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
