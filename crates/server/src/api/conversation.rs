//! Conversations: from messages to the text that a model reads, and from what it writes to text and calls.

use bevel_model::chat::Message;
use bevel_model::tokenizer::Tokenizer;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::Fields;
use super::sampling::Options;
use super::thoughts::ThoughtParser;
use super::tools::{CallParser, Piece, Tools};
use crate::answer::Answer;
use crate::served::Served;

/// A conversation to be answered.
#[derive(Clone, Debug)]
pub(crate) struct Conversation {
    /// As the model reads it.
    pub(crate) prompt: String,
    /// What it may call.
    pub(crate) tools: Option<Tools>,
    /// Where the model thinks before it answers.
    thoughts: Option<ThoughtParser>,
}

/// How a conversation is rendered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rendering {
    /// What one template understands.
    pub(crate) extra: Map<String, Value>,
    /// The answer is not begun.
    pub(crate) unprompted: bool,
    /// The answer goes on from the last message.
    pub(crate) continues: bool,
}

impl Rendering {
    /// Takes the fields, which are vLLM's.
    fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let extra: Map<String, Value> = fields.take("chat_template_kwargs")?.unwrap_or_default();
        for name in ["messages", "tools", "add_generation_prompt"] {
            if extra.contains_key(name) {
                let problem = "it is a field of the request itself";
                return Err(ApiError::field(format!("chat_template_kwargs.{name}"), problem));
            }
        }
        let continues = fields.take("continue_final_message")?.unwrap_or(false);
        let prompted = fields.take("add_generation_prompt")?.unwrap_or(!continues);
        if continues && prompted {
            let problem = "an answer is begun anew or a message is continued, not both";
            return Err(ApiError::field("continue_final_message", problem));
        }
        Ok(Self { extra, unprompted: !prompted, continues })
    }
}

impl Conversation {
    /// Takes the chat API's fields.
    pub(crate) fn take(fields: &mut Fields, model: &Served) -> Result<Self, ApiError> {
        let messages: Vec<Message> = fields.require("messages")?;
        if messages.is_empty() {
            return Err(ApiError::field("messages", "there is none"));
        }
        let messages: Vec<Message> =
            messages.into_iter().enumerate().map(message).collect::<Result<_, _>>()?;
        let mut rendering = Rendering::take(fields)?;
        let template = model.template()?;
        if let Some(effort) = fields.take::<String>("reasoning_effort")? {
            // Only some templates know what to do with it.
            if !template.source().contains("reasoning_effort") {
                let problem = "this model's chat template does not know it";
                return Err(ApiError::field("reasoning_effort", problem));
            }
            rendering.extra.insert("reasoning_effort".to_owned(), effort.into());
        }
        let tools = Tools::take(fields, model.tool_template())?;
        Self::render(&messages, tools, rendering, model)
    }

    /// Renders messages.
    pub(crate) fn render(
        messages: &[Message],
        tools: Option<Tools>,
        rendering: Rendering,
        model: &Served,
    ) -> Result<Self, ApiError> {
        let Rendering { extra, unprompted, continues } = rendering;
        let offered = tools.as_ref().and_then(Tools::for_template);
        let template = match offered {
            Some(_) => model.tool_template()?,
            None => model.template()?,
        };
        if !continues {
            let prompt = template.render(messages, offered.as_ref(), !unprompted, extra)?;
            let thoughts = ThoughtParser::new(template, &prompt);
            return Ok(Self { prompt, tools, thoughts });
        }
        // What the template writes after the message's text would end it: a mark that nothing else contains
        // tells where that is.
        let mark = format!("\u{f8ff}{:032x}", rand::random::<u128>());
        let mut messages = messages.to_vec();
        let last = messages.last_mut().filter(|message| message.role == "assistant");
        let text = last.as_ref().and_then(|message| message.content.as_str());
        let text = text.filter(|text| !text.trim().is_empty());
        let marked = text.map(|text| format!("{text}{mark}"));
        if let (Some(message), Some(marked)) = (last, marked) {
            message.content = marked.into();
        }
        let mut prompt = template.render(&messages, offered.as_ref(), !unprompted, extra)?;
        prompt.truncate(prompt.find(&mark).ok_or_else(|| {
            let problem = "the last message is not the assistant's, or has no text";
            ApiError::field("continue_final_message", problem)
        })?);
        // Its thoughts are over.
        Ok(Self { prompt, tools, thoughts: None })
    }

    /// Makes an answer follow what tools ask for.
    pub(crate) fn constrain(&mut self, options: &mut Options) -> Result<(), ApiError> {
        if options.grammar.is_some() {
            // There is no place for thoughts.
            self.thoughts = None;
        }
        let Some(tools) = self.tools.as_ref().filter(|tools| tools.may_be_called()) else {
            return Ok(());
        };
        if options.grammar.is_some() {
            let problem = "an answer can call tools or have a form, not both";
            return Err(ApiError::field(options.grammar_field, problem));
        }
        options.grammar = Some(tools.grammar());
        options.grammar_field = "tools";
        options.request.keep_special = tools.style().has_special_marks();
        Ok(())
    }

    /// What takes an answer apart.
    pub(crate) fn reader(&self) -> Reader {
        let tools = self.tools.as_ref().filter(|tools| tools.may_be_called());
        let thoughts = self.thoughts.clone();
        Reader { thoughts, calls: tools.map(Tools::parser), called: false, thought_tokens: 0 }
    }
}

/// Takes an answer apart into thoughts, text and calls.
#[derive(Clone, Debug)]
pub(crate) struct Reader {
    thoughts: Option<ThoughtParser>,
    calls: Option<CallParser>,
    called: bool,
    thought_tokens: usize,
}

impl Reader {
    /// All of an answer.
    pub(crate) fn read_all(&mut self, answer: &Answer) -> Vec<Piece> {
        let (mut pieces, mut read) = (Vec::new(), 0);
        for (_, text) in &answer.tokens {
            pieces.extend(self.read(text, 1, false));
            read += text.len();
        }
        pieces.extend(self.read(&answer.text[read..], 0, true));
        pieces
    }

    /// Text that so many tokens made certain, the last of it where `ended`.
    pub(crate) fn read(&mut self, text: &str, tokens: usize, ended: bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut text = text.to_owned();
        if let Some(thoughts) = &mut self.thoughts {
            let (thought, answer) = thoughts.push(&text, ended);
            if thoughts.is_thinking() || !thought.is_empty() {
                self.thought_tokens += tokens;
            }
            pieces.extend(Some(thought).filter(|part| !part.is_empty()).map(Piece::Thought));
            text = answer;
        }
        match &mut self.calls {
            None => pieces.extend(Some(text).filter(|part| !part.is_empty()).map(Piece::Text)),
            Some(calls) => {
                pieces.extend(calls.push(&text));
                if ended {
                    pieces.extend(calls.finish());
                }
            }
        }
        self.called |= pieces.iter().any(|piece| matches!(piece, Piece::Call(_)));
        pieces
    }

    /// Tokens that were thought.
    pub(crate) fn thought_tokens(&self) -> usize {
        self.thought_tokens
    }

    /// Whether there was a call.
    pub(crate) fn called(&self) -> bool {
        self.called
    }
}

/// A message as templates know them: of text only, arguments of calls parsed.
fn message((i, mut message): (usize, Message)) -> Result<Message, ApiError> {
    if let Value::Array(parts) = &message.content {
        let mut text = String::new();
        for (j, part) in parts.iter().enumerate() {
            match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(part)) => text.push_str(part),
                (kind, _) => {
                    let problem = format!("this model reads text, not `{}`", kind.unwrap_or("?"));
                    return Err(ApiError::field(format!("messages[{i}].content[{j}]"), problem));
                }
            }
        }
        message.content = text.into();
    }
    // An assistant may only have called tools.
    let may_be_missing = message.role == "assistant" && message.content.is_null();
    if !message.content.is_string() && !may_be_missing {
        return Err(ApiError::field(format!("messages[{i}].content"), "expected text"));
    }
    if message.role == "developer" {
        message.role = "system".to_owned();
    }
    if let Some(Value::Array(calls)) = message.extra.get_mut("tool_calls") {
        for call in calls {
            if let Some(arguments) = call.pointer_mut("/function/arguments") {
                *arguments = parsed(arguments);
            }
        }
    }
    Ok(message)
}

/// A call's arguments as templates want them: not as text, if they are an object in text.
pub(crate) fn parsed(arguments: &Value) -> Value {
    let object = arguments.as_str().and_then(|text| serde_json::from_str(text).ok());
    object.unwrap_or_else(|| arguments.clone())
}

/// A prompt as clients give it.
#[derive(Clone, Debug)]
pub(crate) enum Prompt {
    /// A rendered conversation: special tokens spelt in it count, and none are added.
    Text(String),
    /// Text to go on from.
    Raw(String),
    /// Tokens.
    Tokens(Vec<u32>),
}

impl Prompt {
    /// Bytes of text; of tokens at least as many as they are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Text(text) | Self::Raw(text) => text.len(),
            Self::Tokens(tokens) => tokens.len(),
        }
    }

    pub(crate) fn tokens(self, tokenizer: &Tokenizer) -> Result<Vec<u32>, ApiError> {
        let encoded = match self {
            Self::Tokens(tokens) => return Ok(tokens),
            Self::Text(text) => tokenizer.encode(&text, false, true),
            Self::Raw(text) => tokenizer.encode(&text, true, false),
        };
        encoded.map_err(|error| ApiError::field("prompt", error))
    }
}
