use resa_engine::data::Record;
use resa_engine::data::records::read;
use tempfile::TempDir;

use crate::fixture;

fn write(dir: &TempDir, name: &str, bytes: &[u8]) -> std::path::PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn record(problem: &str, answer: &str) -> Record {
    Record {
        problem: problem.into(),
        answer: answer.into(),
    }
}

#[test]
fn json_lines_arrays_and_every_parquet_codec_give_the_same_records() {
    let expected = read(fixture("records.jsonl")).unwrap();
    assert_eq!(expected.len(), 15);
    assert_eq!(expected[0], record("Calculate -9 + -6.", "-15"));

    let dir = TempDir::new().unwrap();
    let lines = std::fs::read_to_string(fixture("records.jsonl")).unwrap();
    let array = format!("[{}]", lines.lines().collect::<Vec<_>>().join(",\n"));
    let parquet = std::fs::read(fixture("snappy.parquet")).unwrap();
    for path in [
        write(&dir, "a.json", format!("\n {array}").as_bytes()),
        write(&dir, "lines.json", lines.as_bytes()),
        write(&dir, "no_extension", array.as_bytes()),
        write(
            &dir,
            "other.txt",
            lines.replace('\n', "\r\n\r\n").as_bytes(),
        ),
        write(&dir, "mark.jsonl", format!("\u{feff}{lines}").as_bytes()),
        write(&dir, "parquet.bin", &parquet),
    ] {
        assert_eq!(read(&path).unwrap(), expected, "{}", path.display());
    }
    for codec in ["snappy", "zstd", "gzip", "brotli", "lz4", "none"] {
        let path = fixture(&format!("{codec}.parquet"));
        assert_eq!(read(&path).unwrap(), expected, "{codec}");
    }
}

#[test]
fn the_first_known_key_that_is_not_null_gives_the_problem_and_numbers_become_text() {
    let dir = TempDir::new().unwrap();
    let lines = r#"{"prompt":"c","question":"b","problem":"a","answer":"1"}
{"prompt":"c","question":"b","problem":null,"answer":-2}
{"prompt":"c","answer":0.50}
{"prompt":"c","answer":18446744073709551615}"#;
    let expected = [
        record("a", "1"),
        record("b", "-2"),
        record("c", "0.5"),
        record("c", "18446744073709551615"),
    ];
    assert_eq!(
        read(write(&dir, "d.jsonl", lines.as_bytes())).unwrap(),
        expected
    );
}

#[test]
fn answers_of_every_numeric_parquet_type_become_the_text_of_the_number() {
    let table: [(&str, [&str; 3]); 9] = [
        ("int64", ["1", "-2", "4611686018427387904"]),
        ("int8", ["1", "-2", "3"]),
        ("uint32", ["1", "2", "4000000000"]),
        ("double", ["0.1", "-2.0", "1e-7"]),
        ("float", ["0.5", "-2.0", "3.25"]),
        ("decimal", ["1.50", "-2.25", "0.01"]),
        ("large", ["a", "b", "c"]),
        ("binary", ["a", "b", "c"]),
        ("dictionary", ["a", "b", "a"]),
    ];
    for (kind, answers) in table {
        let records = read(fixture(&format!("answer_{kind}.parquet"))).unwrap();
        let found: Vec<_> = records.iter().map(|r| r.answer.as_str()).collect();
        assert_eq!(found, answers, "{kind}");
    }
}

#[test]
fn a_bad_record_is_named_by_file_place_and_key() {
    let dir = TempDir::new().unwrap();
    let good = r#"{"problem":"p","answer":"1"}"#;
    let table: [(&str, Vec<u8>, &[&str]); 19] = [
        ("empty.jsonl", b"".into(), &["holds no records"]),
        ("empty.json", b"[]".into(), &["holds no records"]),
        ("blank.jsonl", b"\n \n".into(), &["holds no records"]),
        (
            "cut.jsonl",
            format!("{good}\n{{\"problem\":").into(),
            &["line 2", "EOF while parsing", "at column 11"],
        ),
        ("cut.json", format!("[{good},").into(), &["JSON array"]),
        (
            "after.json",
            format!("[{good}] x").into(),
            &["JSON array", "trailing"],
        ),
        (
            "array.jsonl",
            format!("{good}\n[1]").into(),
            &["line 2", "object", "an array"],
        ),
        (
            "scalar.json",
            format!("[{good},3]").into(),
            &["row 2", "object", "a number"],
        ),
        (
            "key.jsonl",
            format!("{good}\n\n{{\"answer\":\"1\"}}").into(),
            &["line 3", "\"problem\"", "\"prompt\""],
        ),
        (
            "answer.jsonl",
            br#"{"problem":"p","Answer":"1"}"#.into(),
            &["line 1", "\"answer\""],
        ),
        (
            "null.jsonl",
            br#"{"problem":"p","answer":null}"#.into(),
            &["line 1", "\"answer\""],
        ),
        (
            "blank_problem.jsonl",
            br#"{"question":" ","prompt":"p","answer":"1"}"#.into(),
            &["\"question\"", "empty"],
        ),
        (
            "blank_answer.jsonl",
            br#"{"problem":"p","answer":""}"#.into(),
            &["\"answer\"", "empty"],
        ),
        (
            "number.jsonl",
            br#"{"problem":3,"answer":"1"}"#.into(),
            &["\"problem\"", "a number"],
        ),
        (
            "bool.jsonl",
            br#"{"problem":"p","answer":true}"#.into(),
            &["\"answer\"", "a boolean"],
        ),
        (
            "list.jsonl",
            br#"{"problem":"p","answer":["1"]}"#.into(),
            &["\"answer\"", "an array"],
        ),
        (
            "big.jsonl",
            br#"{"problem":"p","answer":123456789012345678901234567890}"#.into(),
            &["\"answer\"", "too large"],
        ),
        (
            "utf8.jsonl",
            [good.as_bytes(), b"\n{\"problem\":\"\xff"].concat(),
            &["line 2", "UTF-8"],
        ),
        (
            "deep.jsonl",
            "[".repeat(100_000).into(),
            &["line 1", "recursion"],
        ),
    ];
    for (name, bytes, words) in table {
        let error = read(write(&dir, name, &bytes)).unwrap_err().to_string();
        for word in words.iter().chain([&name]) {
            assert!(error.contains(word), "{name}: {error}");
        }
    }
    let missing = read(dir.path().join("missing.jsonl"))
        .unwrap_err()
        .to_string();
    assert!(missing.contains("missing.jsonl"), "{missing}");
}

#[test]
fn a_bad_parquet_column_is_named_by_file_row_and_key() {
    let table: [(&str, &[&str]); 6] = [
        ("null", &["row 2", "no key \"answer\""]),
        ("bool", &["row 1", "\"answer\"", "a boolean"]),
        ("list", &["column \"answer\"", "nested"]),
        ("date", &["row 1", "\"answer\"", "another type"]),
        ("latin1", &["row 2", "\"answer\"", "UTF-8"]),
        ("blank", &["row 2", "\"answer\"", "empty"]),
    ];
    for (kind, words) in table {
        let name = format!("wrong_{kind}.parquet");
        let error = read(fixture(&name)).unwrap_err().to_string();
        for word in words.iter().chain([&name.as_str()]) {
            assert!(error.contains(word), "{kind}: {error}");
        }
    }
}
