//! Chat templates against `transformers`' rendering of them.

use std::path::Path;

use bevel_model::chat::{CHATML, ChatTemplate, DateTime, Message, SpecialTexts, TemplateError};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Map, Value};

/// What `goldens/chat/make_chat.py` wrote.
#[derive(Clone, Deserialize)]
struct Case {
    name: String,
    template: String,
    messages: Vec<Message>,
    tools: Option<Value>,
    prompt: bool,
    extra: Map<String, Value>,
    expected: Option<String>,
    error: Option<String>,
}

/// Monday the 5th of February 2024, 15:04:09: the clock of the goldens.
fn clock() -> DateTime {
    DateTime::from_unix(1_707_145_449)
}

fn special() -> SpecialTexts {
    SpecialTexts {
        bos_token: Some("<s>".to_owned()),
        eos_token: Some("</s>".to_owned()),
        ..SpecialTexts::default()
    }
}

fn cases() -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/chat/cases.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn render(case: &Case) -> Result<String, TemplateError> {
    ChatTemplate::with_clock(&case.template, special(), clock)?.render(
        &case.messages,
        case.tools.as_ref(),
        case.prompt,
        case.extra.clone(),
    )
}

#[test]
fn rendered_as_transformers_renders() {
    let cases = cases();
    let mut wrong = Vec::new();
    for case in &cases {
        let rendered = render(case);
        match (&rendered, &case.expected, &case.error) {
            (Ok(text), Some(expected), _) if text == expected => {}
            // What the template raises is passed on word by word; other errors have our words.
            (Err(TemplateError::Refused(message)), None, Some(error)) if message == error => {}
            (Err(TemplateError::Failed(_)), None, Some(_)) => {}
            _ => wrong.push(format!(
                "{}\n  expected {:?}\n  rendered {rendered:?}",
                case.name,
                case.expected.as_ref().or(case.error.as_ref())
            )),
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

proptest! {
    /// A damaged template is rendered or refused.
    #[test]
    fn damaged_templates(
        case in any::<prop::sample::Index>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), "[{}%#\\-+'\" a|(\\[]{1,3}"), 1..4),
    ) {
        let cases = cases();
        let mut case = cases[case.index(cases.len())].clone();
        for (place, text) in damage {
            let mut place = place.index(case.template.len() + 1);
            while !case.template.is_char_boundary(place) {
                place -= 1;
            }
            case.template.insert_str(place, &text);
        }
        if let Err(error) = render(&case) {
            prop_assert!(error.to_string().contains("chat template"), "{}", error);
        }
    }
}

#[track_caller]
fn check_error(source: &str, part_of_the_message: &str) {
    let template = ChatTemplate::with_clock(source, special(), clock);
    let rendered = template
        .and_then(|template| template.render(&[Message::new("user", "x")], None, true, Map::new()));
    let message = rendered.unwrap_err().to_string();
    assert!(message.contains(part_of_the_message), "{message}");
}

#[test]
fn errors_say_what_and_where() {
    check_error("{% for %}", "does not parse");
    check_error("a\n{{ 'x' }", "line 2");
    check_error("{% generation %}", "does not parse");
    check_error(
        "{{ raise_exception('no system role') }}",
        "refuses the conversation: no system role",
    );
    check_error("\n{{ messages.nobody.home }}", "line 2");
    check_error("{{ strftime_now('%Q') }}", "unknown directive in `%Q`");
    check_error("{{ unknown_function() }}", "unknown_function");
}

#[test]
fn the_chatml_template() {
    let template = ChatTemplate::new(CHATML, SpecialTexts::default()).unwrap();
    let messages = [Message::new("system", "s"), Message::new("user", "u")];
    let text = template.render(&messages, None, true, Map::new()).unwrap();
    let expected = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n\
                    <|im_start|>assistant\n";
    assert_eq!(text, expected);
}

#[test]
fn dates() {
    let date = |seconds| {
        let d = DateTime::from_unix(seconds);
        (d.year, d.month, d.day, d.hour, d.minute, d.second)
    };
    assert_eq!(date(0), (1970, 1, 1, 0, 0, 0));
    assert_eq!(date(951_782_400), (2000, 2, 29, 0, 0, 0));
    assert_eq!(date(1_709_251_199), (2024, 2, 29, 23, 59, 59));
    assert_eq!(date(4_107_542_400), (2100, 3, 1, 0, 0, 0));
    assert_eq!(date(-1), (1969, 12, 31, 23, 59, 59));
}

/// Templates come from anywhere, and one may try to take all time or memory.
#[test]
fn templates_without_an_end() {
    const LOOP: &str = "{% for i in range(99999) %}{% for j in range(99999) %}";
    const ENDS: &str = "{% endfor %}{% endfor %}";
    check_error(&format!("{LOOP}{ENDS}"), "did not come to an end");
    check_error(&format!("{LOOP}{{{{ 'a' * 1000000 }}}}{ENDS}"), "more than 64 MiB");
    check_error("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion");
    check_error("{{ 'a' | indent(99999999999) }}", "width");
    check_error("{{ 'a\nb' | indent(width=99999999999) }}", "width");
    check_error("{{ [1] | slice(99999999999) }}", "count");
    check_error("{{ [1] | batch(99999999999, 0) }}", "count");
    check_error("{{ '%099999999999d' | format(1) }}", "width");
    check_error("{{ '%*d' | format(99999999999, 1) }}", "width");
    check_error("{{ '{:99999999999}'.format(1) }}", "width");
    let grow = |step: &str| {
        format!(
            "{{% set ns = namespace(x='ab') %}}{LOOP}{{% set ns.x = {step} %}}{ENDS}{{{{ ns.x }}}}"
        )
    };
    check_error(&grow("ns.x ~ ns.x"), "64 MiB");
    check_error(&grow("[ns.x]"), "nested too deep");
    check_error(&grow("{'x': ns.x}"), "nested too deep");
    check_error(&grow("ns"), "nested too deep");
    check_error(&grow("namespace(x=ns)"), "nested too deep");
    check_error("{% set ns = namespace() %}{% set ns.x = ns) ~ (1 %}{{ ns }}", "does not parse");
}

#[test]
fn namespaces_keep_copies() {
    let check = |source: &str, expected: &str| {
        let template = ChatTemplate::with_clock(source, special(), clock).unwrap();
        let message = [Message::new("user", "x")];
        let text = template.render(&message, None, true, Map::new()).unwrap();
        assert_eq!(text, expected, "{source}");
    };
    let after = |tags: &str| format!("{{% set ns = namespace(a=1) %}}{tags}");
    check(&after("{% set ns.a = ns %}{{ ns.a.a }}"), "1");
    check(&after("{%- set ns.a, b = 2, '%}' -%} {{ ns.a ~ b }}"), "2%}");
    check(&after("{% set ns.a = 'x' if false %}{{ ns.a is defined }}"), "False");
    check(
        &after("{% set ns.a = messages + [{'role': '%'}] %}{{ ns.a | tojson }}"),
        r#"[{"role": "user", "content": "x"}, {"role": "%"}]"#,
    );
    check(&after("{% set ns.a = messages | map(attribute='role') %}{{ ns.a | list }}"), "['user']");
    check(&after("{% set ns.a %}b{% endset %}{{ ns.a }}"), "b");
    check(&after("{% set ns.a | upper %}b{% endset %}{{ ns.a }}"), "B");
    check(&after("{% set ns.a | default(ns, true) %}{% endset %}{{ ns.a.a }}"), "1");
    check(
        &after("{# {% set ns.a = ' #}{% raw %}{% set ns.a = 2 %}{% endraw %}{{ ns.a }}"),
        "{% set ns.a = 2 %}1",
    );
    check("{{ '{% generation %}' }}{% generation %}x{% endgeneration %}", "{% generation %}x");
}
