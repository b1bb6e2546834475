//! Tools: what a model may call, and the calls found in what it writes.
//!
//! A model's chat template shows it the tools and says how to call one. Families differ in how; a [`Style`] is
//! one of their ways, known by its marks in the template. While tools are offered, answers follow a grammar:
//! text of any kind, but a call that is begun has a tool's name and arguments after its schema.

use bevel_engine::Grammar;
use bevel_model::chat::{ChatTemplate, TemplateError};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::sampling::{any_object, with_space};

/// How a family writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`: Hermes, Qwen, SmolLM.
    Hermes,
    /// `[TOOL_CALLS][{"name": …, "arguments": …}]`: Mistral.
    Mistral,
    /// `{"name": …, "parameters": …}` and nothing else: Llama 3.
    Llama,
}

impl Style {
    /// The one that a template teaches, if any.
    pub(crate) fn of(template: &str) -> Option<Self> {
        let has = |mark: &str| template.contains(mark);
        match () {
            () if !has("tools") => None,
            () if has("<tool_call>") => Some(Self::Hermes),
            () if has("[TOOL_CALLS]") => Some(Self::Mistral),
            () if has("\"parameters\"") || has("<|python_tag|>") => Some(Self::Llama),
            () => None,
        }
    }

    /// What a call's arguments are called.
    fn arguments(self) -> &'static str {
        match self {
            Self::Hermes | Self::Mistral => "arguments",
            Self::Llama => "parameters",
        }
    }

    /// What begins and ends a call. Without an end it is the rest of the answer.
    fn marks(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Hermes => ("<tool_call>", Some("</tool_call>")),
            Self::Mistral => ("[TOOL_CALLS]", None),
            Self::Llama => ("{", None),
        }
    }

    /// Whether marks are tokens that text does not show.
    pub(crate) fn has_special_marks(self) -> bool {
        self == Self::Mistral
    }

    /// A number for a call.
    fn new_id(self) -> String {
        match self {
            // Its templates insist on nine letters or digits.
            Self::Mistral => format!("{:09x}", rand::random::<u64>() >> 28),
            Self::Hermes | Self::Llama => format!("call_{:024x}", rand::random::<u128>() >> 32),
        }
    }
}

/// A function that may be called.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    /// The schema of its arguments.
    pub(crate) parameters: Value,
}

/// Whether a call is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// The model chooses.
    Auto,
    /// Not now.
    None,
    /// Any of them.
    Required,
    /// This one.
    Named(String),
}

impl ToolChoice {
    /// Takes `tool_choice` of OpenAI's APIs, in which functions are `named` in different ways.
    pub(crate) fn take<T: DeserializeOwned>(
        fields: &mut Fields,
        named: impl FnOnce(T) -> String,
    ) -> Result<Self, ApiError> {
        let word = fields.get("tool_choice").and_then(Value::as_str).map(str::to_owned);
        if word.is_none() {
            return Ok(fields.object("tool_choice")?.map_or(Self::Auto, |t| Self::Named(named(t))));
        }
        match fields.take::<String>("tool_choice")?.as_deref() {
            Some("auto") | None => Ok(Self::Auto),
            Some("none") => Ok(Self::None),
            Some("required") => Ok(Self::Required),
            Some(_) => {
                let problem = "expected \"auto\", \"none\", \"required\" or a function";
                Err(ApiError::field("tool_choice", problem))
            }
        }
    }
}

/// Tools offered to a model.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    functions: Vec<Function>,
    choice: ToolChoice,
    /// More than one call in an answer.
    parallel: bool,
    style: Style,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum GivenTool {
    Function { function: GivenFunction },
}

/// A function as OpenAI's APIs have it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GivenFunction {
    name: String,
    description: Option<String>,
    parameters: Option<Map<String, Value>>,
    // Arguments always follow their schema.
    #[allow(dead_code)]
    strict: Option<bool>,
}

impl From<GivenFunction> for Function {
    fn from(GivenFunction { name, description, parameters, .. }: GivenFunction) -> Self {
        let parameters = parameters.map_or_else(any_object, Value::from);
        Self { name, description, parameters }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GivenChoice {
    #[serde(rename = "type")]
    kind: Kind,
    function: GivenName,
}

/// What a tool can be.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    Function,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GivenName {
    name: String,
}

impl Tools {
    /// Takes the chat API's fields. `None` where no tools are offered.
    pub(crate) fn take(
        fields: &mut Fields,
        template: Result<&ChatTemplate, TemplateError>,
    ) -> Result<Option<Self>, ApiError> {
        let given: Vec<GivenTool> = fields.take("tools")?.unwrap_or_default();
        let function = |GivenTool::Function { function }| Function::from(function);
        let functions: Vec<Function> = given.into_iter().map(function).collect();
        let named = |GivenChoice { kind: Kind::Function, function }| function.name;
        let choice = ToolChoice::take(fields, named)?;
        let parallel = fields.take("parallel_tool_calls")?.unwrap_or(true);
        Self::new(functions, choice, parallel, template)
    }

    /// Tools for a model with this chat template. `None` where there are none.
    pub(crate) fn new(
        functions: Vec<Function>,
        choice: ToolChoice,
        parallel: bool,
        template: Result<&ChatTemplate, TemplateError>,
    ) -> Result<Option<Self>, ApiError> {
        if functions.is_empty() {
            return match choice {
                ToolChoice::Required | ToolChoice::Named(_) => {
                    Err(ApiError::field("tool_choice", "there are no tools to choose from"))
                }
                ToolChoice::Auto | ToolChoice::None => Ok(None),
            };
        }
        if let ToolChoice::Named(name) = &choice
            && !functions.iter().any(|function| function.name == *name)
        {
            return Err(ApiError::field("tool_choice", format!("there is no tool `{name}`")));
        }
        for (i, function) in functions.iter().enumerate() {
            if function.name.is_empty() || functions[..i].iter().any(|f| f.name == function.name) {
                let problem = "every tool needs a name of its own";
                return Err(ApiError::field(format!("tools[{i}]"), problem));
            }
        }
        let style = Style::of(template?.source()).ok_or_else(|| {
            ApiError::field("tools", "this model's chat template does not know tools")
        })?;
        Ok(Some(Self { functions, choice, parallel, style }))
    }

    pub(crate) fn style(&self) -> Style {
        self.style
    }

    /// Whether an answer may have calls.
    pub(crate) fn may_be_called(&self) -> bool {
        self.choice != ToolChoice::None
    }

    /// The tools as templates want them; none where none is to be called.
    pub(crate) fn for_template(&self) -> Option<Value> {
        let function = |function: &Function| {
            let Function { name, description, parameters } = function;
            let description = description.as_deref().unwrap_or_default();
            let function =
                json!({ "name": name, "description": description, "parameters": parameters });
            json!({ "type": "function", "function": function })
        };
        self.may_be_called().then(|| self.functions.iter().map(function).collect())
    }

    /// What an answer has to follow.
    pub(crate) fn grammar(&self) -> Grammar {
        let chosen = |function: &&Function| match &self.choice {
            ToolChoice::Named(name) => function.name == *name,
            _ => true,
        };
        let call = |(i, function): (usize, &Function)| {
            let arguments = self.style.arguments();
            let mut parameters = function.parameters.clone();
            if let Some(fields) = parameters.as_object_mut() {
                // What it refers to is looked for in itself, wherever it stands.
                fields.entry("$id").or_insert(format!("tool:///{i}").into());
            }
            json!({
                "type": "object",
                "properties": { "name": { "const": function.name }, arguments: parameters },
                "required": ["name", arguments],
                "additionalProperties": false,
            })
        };
        let calls: Vec<Value> =
            self.functions.iter().filter(chosen).enumerate().map(call).collect();
        let call = match <[Value; 1]>::try_from(calls) {
            Ok([call]) => call,
            Err(calls) => json!({ "anyOf": calls }),
        };
        // Models write calls on one line.
        let call = with_space(&call, " ");
        let free = !matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_));
        Grammar::Lark(match self.style {
            Style::Hermes => {
                let start = match (free, self.parallel) {
                    (true, true) => "start: text (call text)*",
                    (true, false) => "start: text (call)?",
                    (false, true) => "start: call (\"\\n\" call)*",
                    (false, false) => "start: call",
                };
                format!(
                    "{start}\n\
                     text: TEXT?\n\
                     TEXT: /(?s:.+)/ & ~/(?s:.*)<tool_call>(?s:.*)/\n\
                     call: \"<tool_call>\\n\" json \"\\n</tool_call>\"\n\
                     json: %json {call}"
                )
            }
            Style::Mistral => {
                let list = match self.parallel {
                    true => "\"[\" json (\", \" json)* \"]\"",
                    false => "\"[\" json \"]\"",
                };
                let start = if free { "start: TEXT | calls" } else { "start: calls" };
                format!(
                    "{start}\nTEXT: /(?s:.*)/\ncalls: <[TOOL_CALLS]> {list}\njson: %json {call}"
                )
            }
            Style::Llama => {
                let start = if free { "start: TEXT | json" } else { "start: json" };
                format!("{start}\nTEXT: /[^{{](?s:.*)/\njson: %json {call}")
            }
        })
    }

    /// What finds calls in an answer.
    pub(crate) fn parser(&self) -> CallParser {
        CallParser { style: self.style, held: String::new(), in_call: false, begun: false }
    }
}

/// A call that a model wrote.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Call {
    pub(crate) id: String,
    pub(crate) name: String,
    /// An object.
    pub(crate) arguments: Value,
}

/// Part of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Piece {
    /// What was thought before.
    Thought(String),
    Text(String),
    Call(Call),
}

/// Finds calls in text as it comes.
#[derive(Clone, Debug)]
pub(crate) struct CallParser {
    style: Style,
    /// What could be a mark, or is part of a call that has not ended.
    held: String,
    in_call: bool,
    /// Something other than white space came.
    begun: bool,
}

impl CallParser {
    /// Takes text; what is certain now.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let (open, close) = self.style.marks();
        let mut pieces = Vec::new();
        loop {
            if self.in_call {
                let Some(at) = close.and_then(|close| self.held.find(close)) else { return pieces };
                let rest = self.held.split_off(at + close.map_or(0, str::len));
                self.held.truncate(at);
                let written = std::mem::replace(&mut self.held, rest);
                pieces.extend(self.calls(&written, true));
                self.in_call = false;
                continue;
            }
            // A Llama's call is the whole answer.
            let found = self.held.find(open).filter(|&at| {
                self.style != Style::Llama || !self.begun && self.held[..at].trim().is_empty()
            });
            if let Some(at) = found {
                pieces.extend(self.text(at));
                if self.style != Style::Llama {
                    self.held.drain(..open.len());
                }
                self.in_call = true;
                continue;
            }
            let possible = (1..open.len()).rev().find(|&n| self.held.ends_with(&open[..n]));
            pieces.extend(self.text(self.held.len() - possible.unwrap_or(0)));
            return pieces;
        }
    }

    /// Nothing more comes.
    pub(crate) fn finish(&mut self) -> Vec<Piece> {
        let rest = std::mem::take(&mut self.held);
        match self.in_call {
            true => self.calls(&rest, false),
            false if rest.is_empty() => Vec::new(),
            false => vec![Piece::Text(rest)],
        }
    }

    /// The first `len` bytes held, as text. White space around calls is none.
    fn text(&mut self, len: usize) -> Option<Piece> {
        let text: String = self.held.drain(..len).collect();
        if !self.begun && text.trim().is_empty() {
            return None;
        }
        self.begun = true;
        (!text.is_empty()).then_some(Piece::Text(text))
    }

    /// The calls in what stands between the marks; as text again where it is none.
    fn calls(&mut self, written: &str, ended: bool) -> Vec<Piece> {
        let parsed: Option<Vec<Value>> = match serde_json::from_str(written.trim()) {
            Ok(Value::Array(calls)) => Some(calls),
            Ok(call) => Some(vec![call]),
            Err(_) => None,
        };
        let call = |call: &Value| {
            let name = call["name"].as_str()?.to_owned();
            let arguments = [self.style.arguments(), "arguments", "parameters"];
            let arguments = arguments.iter().find_map(|&name| call.get(name)).cloned();
            let arguments = arguments.unwrap_or_else(|| json!({}));
            Some(Piece::Call(Call { id: self.style.new_id(), name, arguments }))
        };
        let calls: Option<Vec<Piece>> = parsed.and_then(|calls| calls.iter().map(call).collect());
        // White space after a call does not begin a text.
        self.begun = false;
        calls.unwrap_or_else(|| {
            let (open, close) = self.style.marks();
            let open = if self.style == Style::Llama { "" } else { open };
            let close = close.filter(|_| ended).unwrap_or_default();
            vec![Piece::Text(format!("{open}{written}{close}"))]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parser(style: Style) -> CallParser {
        CallParser { style, held: String::new(), in_call: false, begun: false }
    }

    /// What is found, joined: texts as they are, calls as `NAME(ARGUMENTS)`.
    fn found(style: Style, text: &str, step: usize) -> String {
        let mut parser = parser(style);
        let characters: Vec<char> = text.chars().collect();
        let mut pieces = Vec::new();
        for part in characters.chunks(step) {
            pieces.extend(parser.push(&part.iter().collect::<String>()));
        }
        pieces.extend(parser.finish());
        let show = |piece: Piece| match piece {
            Piece::Text(text) | Piece::Thought(text) => text,
            Piece::Call(call) => format!("{}({})", call.name, call.arguments),
        };
        pieces.into_iter().map(show).collect()
    }

    #[track_caller]
    fn check(style: Style, text: &str, expected: &str) {
        for step in [1, 2, 5, 1000] {
            assert_eq!(found(style, text, step), expected, "{step} at a time");
        }
    }

    #[test]
    fn calls_are_found_however_they_come() {
        let call = r#"<tool_call>
{"name": "f", "arguments": {"x": 1}}
</tool_call>"#;
        check(Style::Hermes, call, r#"f({"x":1})"#);
        check(Style::Hermes, &format!("Well: {call}\n{call}"), r#"Well: f({"x":1})f({"x":1})"#);
        let list = r#"<tool_call>[{"name": "f", "arguments": {}}, {"name": "g"}]</tool_call>"#;
        check(Style::Hermes, list, "f({})g({})");
        check(Style::Hermes, "a < b, <tool", "a < b, <tool");
        check(
            Style::Hermes,
            "<tool_call>nonsense</tool_call>!",
            "<tool_call>nonsense</tool_call>!",
        );
        check(Style::Hermes, "<tool_call>{\"name\"", "<tool_call>{\"name\"");
        check(
            Style::Mistral,
            r#"[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]"#,
            r#"f({"x":1})"#,
        );
        check(Style::Mistral, "[1, 2]", "[1, 2]");
        check(Style::Llama, r#" {"name": "f", "parameters": {"x": 1}}"#, r#"f({"x":1})"#);
        check(Style::Llama, r#"So {"name": 1}"#, r#"So {"name": 1}"#);
        check(Style::Llama, r#"{"answer": 42}"#, r#"{"answer": 42}"#);
    }

    #[test]
    fn numbers_of_calls_have_their_form() {
        assert_eq!(Style::Mistral.new_id().len(), 9);
        assert_eq!(Style::Hermes.new_id().len(), 29);
    }
}
