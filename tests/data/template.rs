use resa_engine::data::{Record, Template};

use crate::json;

fn record() -> Record {
    Record {
        problem: "What is 2 + 3?".into(),
        answer: "5".into(),
    }
}

#[test]
fn rendering_equals_jinja2() {
    let fixture = json("templates.json");
    let record = Record {
        problem: fixture["record"]["problem"].as_str().unwrap().into(),
        answer: fixture["record"]["answer"].as_str().unwrap().into(),
    };
    let cases = fixture["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 5);
    for case in cases {
        let source = case["template"].as_str().unwrap();
        let template = Template::parse("page.html", source).unwrap();
        assert_eq!(
            template.render(&record).unwrap(),
            case["text"],
            "{source:?}"
        );
    }
}

#[test]
fn the_built_in_template_thinks_and_answers_and_its_prompt_opens_the_thought() {
    let template = Template::builtin();
    let text = template.render_text(&record()).unwrap();
    let (prompt, rest) = text.text.split_at(text.answer_start);
    assert!(
        prompt.ends_with("User:\n What is 2 + 3?\n\nAssistant:\n <think>"),
        "{prompt:?}"
    );
    assert_eq!(rest, " 5 </think>\n<answer> Answer: 5</answer>");
    assert_eq!(template.prompt(&record()).unwrap(), prompt);
    assert_eq!(template.render(&record()).unwrap(), text.text);
}

#[test]
fn the_prompt_is_cut_at_the_answer_even_if_the_problem_holds_the_same_characters() {
    let template = Template::parse("t", "{{ problem }} = {{ answer }}").unwrap();
    for problem in ["5", "\u{f8ff}", "5 \u{f8ff}\u{f8ff} 5"] {
        let record = Record {
            problem: problem.into(),
            answer: "5".into(),
        };
        assert_eq!(template.prompt(&record).unwrap(), format!("{problem} ="));
    }
}

#[test]
fn a_template_that_cannot_serve_is_refused_with_its_name() {
    for (source, words) in [
        ("{{ problem }} {{ solution }} {{ answer }}", "undefined"),
        ("{{ problem", "syntax error"),
        ("{% if problem %}{{ answer }}", "syntax error"),
        ("{{ problem }}", "does not show the answer"),
        (
            "{% if answer == '5' %}five{% else %}other{% endif %} {{ answer }}",
            "must not depend on the answer",
        ),
        ("{% include 'other' %}{{ answer }}", "template not found"),
        ("{{ answer | no_such_filter }}", "unknown filter"),
    ] {
        let error = Template::parse("my.jinja", source)
            .and_then(|template| template.render_text(&record()))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("my.jinja") && error.contains(words),
            "{source}: {error}"
        );
    }
}

#[test]
fn template_files_are_read_and_bad_ones_named() {
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("t.jinja");
    std::fs::write(&path, "Q {{ question }} A {{ answer }}\n").unwrap();
    let template = Template::from_file(&path).unwrap();
    assert_eq!(template.render(&record()).unwrap(), "Q What is 2 + 3? A 5");
    std::fs::write(&path, b"\xff").unwrap();
    let error = Template::from_file(&path).unwrap_err().to_string();
    assert!(
        error.contains("t.jinja") && error.contains("UTF-8"),
        "{error}"
    );
    assert!(Template::from_file(dir.path().join("none")).is_err());
}
