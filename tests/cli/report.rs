//! `report` writes one page, and names what is wrong with a folder.

use std::fs;

use serde_json::{Value, json};

use super::support::{Workshop, stderr};

/// What the script of `page.html` draws.
fn page_data(workshop: &Workshop) -> Value {
    let page = fs::read_to_string(workshop.path("page.html")).unwrap();
    let data = page.split(r#"id="data">"#).nth(1).unwrap();
    serde_json::from_str(data.split("</script>").next().unwrap()).unwrap()
}

#[test]
fn a_page_holds_the_runs_and_asks_for_nothing_else() {
    let workshop = Workshop::new(22);
    workshop.train("a", &["--stage", "sae"]);
    workshop.train("b", &["--stage", "sae", "--seed", "7"]);
    // A text that would end the page's data, were it written as it is.
    let line = r#"{"problem": "</script><!--", "correct": true}"#;
    fs::write(workshop.path("a/eval.jsonl"), line).unwrap();
    workshop.prints(&["report", "a", "b", "--out", "page.html"]);
    let page = fs::read_to_string(workshop.path("page.html")).unwrap();
    assert!(!page.contains("{{") && page.matches("</script>").count() == 2);
    let data = page_data(&workshop);
    assert_eq!(data["runs"][1]["settings"]["seed"], "7");
    assert_eq!(data["runs"][0]["evaluations"][0]["correct"], 1);
    let metrics = super::support::metrics(&workshop.path("b"));
    let want: Vec<_> = metrics.iter().map(|line| line["fvu"].clone()).collect();
    let curves = data["runs"][1]["curves"].as_array().unwrap();
    let fvu = curves
        .iter()
        .find(|curve| curve["metric"] == "fvu")
        .unwrap();
    assert_eq!(fvu["values"].as_array().unwrap(), &want);
}

#[test]
fn a_folder_that_is_no_run_or_is_damaged_is_refused_by_name() {
    let workshop = Workshop::new(22);
    workshop.train("run", &["--stage", "sae"]);
    fs::create_dir(workshop.path("empty")).unwrap();
    let refused = |args: &[&str], named: &str| {
        let output = workshop.resa(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(
            stderr(&output).contains(named),
            "{named}: {}",
            stderr(&output)
        );
        assert!(!workshop.path("report.html").exists());
    };
    refused(
        &["report", "run", "empty"],
        "error: empty: there is no run in it",
    );
    let metrics = workshop.path("run/metrics.jsonl");
    let mut text = fs::read_to_string(&metrics).unwrap();
    text.push_str("{\"stage\": \"sae\"\n");
    let line = text.lines().count();
    fs::write(&metrics, text).unwrap();
    refused(
        &["report", "run"],
        &format!("metrics.jsonl: line {line}: EOF while parsing an object at column"),
    );
}

#[test]
fn an_evaluation_is_summed_up_as_eval_does_and_a_cut_last_line_passed_over() {
    let workshop = Workshop::new(22);
    workshop.train("run", &["--stage", "sae"]);
    // Two problems of one text are two; the last line was cut off by a full disk, within \u{e9}.
    let line = |index: usize, correct: bool| {
        let text = format!("p{}", index.min(18));
        let (answer, completion) = (1, if correct { "\\\\boxed{1}" } else { "" });
        format!(
            r#"{{"index": {index}, "problem": "{text}", "answer": {answer}, "completion": "{completion}", "correct": {correct}}}"#
        ) + "\n"
    };
    let whole: String = (0..20).map(|index| line(index, true)).collect();
    fs::write(workshop.path("whole.jsonl"), &whole).unwrap();
    let cut = [whole.as_bytes(), b"{\"index\": 20, \"problem\": \"\xc3"].concat();
    fs::write(workshop.path("run/eval.jsonl"), cut).unwrap();
    let metrics = workshop.path("run/metrics.jsonl");
    let text = fs::read_to_string(&metrics).unwrap() + "{\"stage\": \"s";
    fs::write(&metrics, text).unwrap();

    workshop.prints(&["report", "run", "--out", "page.html"]);
    let found = &page_data(&workshop)["runs"][0]["evaluations"][0];
    let printed = workshop.prints(&["eval", "--regrade", "whole.jsonl", "--json"]);
    let eval: Value = serde_json::from_str(&printed).unwrap();
    let pass = &eval["pass_at_k"][0];
    assert_eq!(found["problems"], 20);
    assert_eq!(found["pass_at_1"], pass["value"]);
    assert_eq!(found["interval"], json!([pass["low"], pass["high"]]));
}
