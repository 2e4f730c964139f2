//! Chat templates, as transformers renders them.

use std::fs;

use resa_engine::data::{ChatTemplate, Message};
use serde_json::json;
use tempfile::TempDir;

/// Whitespace control, loop controls, Python's methods and JSON in one template.
const TEMPLATE: &str = r#"{{- bos_token }}
{% for message in messages %}
    {%- if message['role'] == 'skip' %}{% continue %}{% endif %}
    {% if loop.first and message.role != 'system' %}
<s>{{ 'be helpful' | upper }}</s>
    {% endif %}
<{{ message.role }}>{{ message.content.strip().split('|')[-1] }}
    {%- set ns = namespace(n=message.content | length) %}
[{{ ns.n }}]{{ {"a": [1, "é<"], "b": none} | tojson }}
{% endfor %}
{% if add_generation_prompt %}
<assistant>
{%- endif %}"#;

/// What `apply_chat_template` of transformers 5 gives for it and two messages.
const RENDERED: &str = "<b>\n<s>BE HELPFUL</s>\n<user> two[10]{\"a\": [1, \"é<\"], \"b\": null}\n\
    <user>x[1]{\"a\": [1, \"é<\"], \"b\": null}\n<assistant>";

fn folder(config: &serde_json::Value) -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

fn render(dir: &TempDir, texts: &[&str]) -> Result<String, String> {
    let chat = ChatTemplate::from_dir(dir.path()).map_err(|e| e.to_string())?;
    let messages: Vec<Message> = texts.iter().map(|text| Message::user(text)).collect();
    let text = chat.unwrap().render(&messages, true);
    text.map_err(|e| e.to_string())
}

#[test]
fn a_template_renders_as_in_transformers() {
    let config = json!({"bos_token": {"content": "<b>"}, "chat_template": TEMPLATE});
    let text = render(&folder(&config), &[" one | two", "x"]);
    assert_eq!(text.as_deref(), Ok(RENDERED));
}

#[test]
fn the_template_is_a_file_else_the_default_of_several_else_there_is_none() {
    let named = json!([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]);
    let dir = folder(&json!({"chat_template": named}));
    assert_eq!(render(&dir, &[]).as_deref(), Ok("d"));
    fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(render(&dir, &[]).as_deref(), Ok("file"));
    let none = folder(&json!({}));
    assert!(ChatTemplate::from_dir(none.path()).unwrap().is_none());
}

#[test]
fn json_is_indented_by_at_most_64_spaces() {
    let indented = |indent: &str| {
        let template = format!("{{{{ [1] | tojson(indent={indent}) }}}}");
        render(&folder(&json!({ "chat_template": template })), &[])
    };
    assert_eq!(indented("2").as_deref(), Ok("[\n  1\n]"));
    assert!(indented("64").is_ok());
    for indent in ["65", "9000000000000000000"] {
        let error = indented(indent).unwrap_err();
        assert!(
            error.contains("at most 64") && error.contains(indent),
            "{error}"
        );
    }
}

#[test]
fn what_is_wrong_with_a_template_is_said_with_the_file() {
    for (template, what) in [
        (json!("{% for %}"), "chat_template"),
        (json!(7), "expected a text"),
        (json!([{"name": "tools", "template": "t"}]), "default"),
        (
            json!("{{ raise_exception('roles must alternate') }}"),
            "roles must alternate",
        ),
        (
            json!("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
            "fuel",
        ),
        (json!("{{ messages[0].content.foo.bar }}"), "undefined"),
    ] {
        let error = render(&folder(&json!({"chat_template": template})), &["x"]).unwrap_err();
        assert!(error.contains("tokenizer_config.json"), "{error}");
        assert!(error.contains(what), "{error}");
    }
}
