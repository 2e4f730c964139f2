//! `report` writes one page, and names what is wrong with a folder.

use std::fs;

use super::support::{Workshop, stderr};

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
    let data = page.split(r#"id="data">"#).nth(1).unwrap();
    let data = data.split("</script>").next().unwrap();
    let data: serde_json::Value = serde_json::from_str(data).unwrap();
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
    refused(&["report", "run", "empty"], "empty");
    let metrics = workshop.path("run/metrics.jsonl");
    let mut text = fs::read_to_string(&metrics).unwrap();
    text.push_str("{\"stage\": \"sae\"\n");
    fs::write(&metrics, text).unwrap();
    refused(&["report", "run"], "metrics.jsonl");
}
