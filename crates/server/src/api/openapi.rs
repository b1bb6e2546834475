//! `GET /openapi.json`: what the server can be asked, for programs. A test holds it against the server: every
//! field it describes is known, and every route is described.

use axum::Json;
use serde_json::{Map, Value, json};

/// The document.
pub(crate) async fn handle() -> Json<Value> {
    Json(document())
}

pub(crate) fn document() -> Value {
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "bevel",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Language models over HTTP, as OpenAI's and Anthropic's APIs have them. \
                Fields that are not described here are refused.",
        },
        "components": {
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "header": { "type": "apiKey", "in": "header", "name": "x-api-key" },
            },
            "schemas": { "Error": error(), "AnthropicError": anthropic_error() },
        },
        "security": [{}, { "bearer": [] }, { "header": [] }],
        "paths": {
            "/v1/chat/completions": post("Answer a conversation", chat(), true, "Error"),
            "/v1/completions": post("Go on from a text", completions(), true, "Error"),
            "/v1/responses": post("Answer a conversation", responses(), true, "Error"),
            "/v1/messages": post("Answer a conversation", messages(), true, "AnthropicError"),
            "/v1/messages/count_tokens":
                post("Count a conversation's tokens", count_tokens(), false, "AnthropicError"),
            "/v1/embeddings": post("Embed texts", embeddings(), false, "Error"),
            "/tokenize": post("Tokens of a text or a conversation", tokenize(), false, "Error"),
            "/detokenize": post("Text of tokens", detokenize(), false, "Error"),
            "/apply-template":
                post("The text that a conversation becomes", template(), false, "Error"),
            "/v1/load_lora_adapter":
                post("Load an adapter, where the server allows it", load_adapter(), false, "Error"),
            "/v1/unload_lora_adapter":
                post("Forget an adapter, where the server allows it", unload_adapter(), false, "Error"),
            "/lora-adapters": adapters(),
            "/models/load": post("Load a model", named(), false, "Error"),
            "/models/unload":
                post("Unload a model, until it is asked for", named(), false, "Error"),
            "/v1/models": get("What is served", "application/json", &[]),
            "/v1/models/{name}": get("One model", "application/json", &["name"]),
            "/health": get("Whether the models run", "application/json", &[]),
            "/metrics": get("Numbers for Prometheus", "text/plain", &[]),
            "/openapi.json": get("This document", "application/json", &[]),
        },
    })
}

fn error() -> Value {
    json!({
        "type": "object",
        "required": ["error"],
        "properties": { "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": { "type": "string", "description": "What is wrong and what to do" },
                "type": { "type": "string" },
                "param": { "type": ["string", "null"], "description": "The field to blame" },
                "code": { "type": ["string", "null"] },
            },
        } },
    })
}

fn anthropic_error() -> Value {
    json!({
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": { "const": "error" },
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": { "type": { "type": "string" }, "message": { "type": "string" } },
            },
        },
    })
}

fn get(summary: &str, kind: &str, parameters: &[&str]) -> Value {
    let parameter = |name: &&str| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } });
    let parameters: Vec<Value> = parameters.iter().map(parameter).collect();
    json!({ "get": {
        "summary": summary,
        "parameters": parameters,
        "responses": {
            "200": { "description": "As asked", "content": { kind: {} } },
            "4XX": failure("The request is at fault", "Error"),
            "5XX": failure("The server is at fault", "Error"),
        },
    } })
}

fn post(summary: &str, body: Value, streams: bool, error: &str) -> Value {
    let mut content = json!({ "application/json": { "schema": { "type": "object" } } });
    if streams {
        content["text/event-stream"] = json!({});
    }
    json!({ "post": {
        "summary": summary,
        "requestBody": { "required": true, "content": { "application/json": { "schema": body } } },
        "responses": {
            "200": { "description": "As asked", "content": content },
            "4XX": failure("The request is at fault", error),
            "5XX": failure("The server is at fault", error),
        },
    } })
}

fn failure(description: &str, schema: &str) -> Value {
    let schema = json!({ "$ref": format!("#/components/schemas/{schema}") });
    json!({ "description": description, "content": { "application/json": { "schema": schema } } })
}

/// A body with these fields and no others. One that is null is one that is not there.
fn body(required: &[&str], fields: impl IntoIterator<Item = Value>) -> Value {
    let mut properties = Map::new();
    for fields in fields {
        if let Value::Object(fields) = fields {
            properties.extend(fields);
        }
    }
    for (_, schema) in properties.iter_mut().filter(|(name, _)| !required.contains(&name.as_str()))
    {
        *schema = json!({ "anyOf": [schema.take(), { "type": "null" }] });
    }
    json!({
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": false,
    })
}

/// How an answer is chosen, in all APIs.
fn sampling() -> Value {
    let number = |minimum: f64, description: &str| json!({ "type": "number", "minimum": minimum, "description": description });
    let part = json!({ "type": "number", "minimum": 0, "maximum": 1 });
    json!({
        "model": { "type": "string", "description": "One of /v1/models; without it the first" },
        "lora": scales(),
        "temperature": number(0.0, "0 takes the likeliest token"),
        "top_p": part,
        "top_k": { "type": "integer", "minimum": -1, "description": "-1 or 0 for all" },
        "min_p": part,
        "typical_p": part,
        "repetition_penalty": { "type": "number", "exclusiveMinimum": 0 },
        "presence_penalty": { "type": "number" },
        "frequency_penalty": { "type": "number" },
        "dry_multiplier": { "type": "number" },
        "dry_base": { "type": "number", "exclusiveMinimum": 0 },
        "dry_allowed_length": { "type": "integer", "minimum": 0 },
        "dry_penalty_last_n": { "type": "integer" },
        "dry_sequence_breakers": { "type": "array", "items": { "type": "string" } },
        "logit_bias": { "type": "object", "additionalProperties": { "type": "number" } },
        "seed": { "type": "integer" },
        "ignore_eos": { "type": "boolean" },
        "use_beam_search": { "type": "boolean", "description": "The likeliest answers; nothing is left to chance" },
        "best_of": { "type": "integer", "minimum": 1, "description": "Beams, at least `n`; without beam search `n`" },
        "length_penalty": { "type": "number", "description": "An answer's logarithm is divided by its length to this power" },
        "early_stopping": { "enum": [true, false, "never"] },
        "priority": { "type": "integer", "description": "Smaller numbers are served first" },
        "structured_outputs": {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": false,
            "properties": {
                "json": { "type": "object" },
                "regex": { "type": "string" },
                "choice": { "type": "array", "items": { "type": "string" }, "minItems": 1 },
                "grammar": { "type": "string", "description": "Lark, as llguidance has it" },
                "json_object": { "type": "boolean" },
            },
        },
    })
}

/// What OpenAI's older APIs share.
fn answers() -> Value {
    json!({
        "n": { "type": "integer", "minimum": 1 },
        "stop": { "oneOf": [
            { "type": "string", "minLength": 1 },
            { "type": "array", "items": { "type": "string", "minLength": 1 }, "maxItems": 64 },
        ] },
        "max_tokens": { "type": "integer", "minimum": 0 },
        "response_format": { "anyOf": [
            object(json!({ "type": { "enum": ["text", "json_object"] } }), &["type"]),
            object(json!({
                "type": { "const": "json_schema" },
                "json_schema": object(named_schema(), &["schema"]),
            }), &["type", "json_schema"]),
        ] },
        "prompt_logprobs": { "type": "integer", "minimum": 0, "maximum": 20 },
        "stream": { "type": "boolean" },
        "stream_options": object(json!({ "include_usage": { "type": "boolean" } }), &[]),
        "user": note(),
    })
}

fn named_schema() -> Value {
    json!({
        "schema": { "type": "object" },
        "name": { "type": ["string", "null"] },
        "description": { "type": ["string", "null"] },
        "strict": { "type": ["boolean", "null"] },
    })
}

/// What only says something about a request.
fn note() -> Value {
    json!({ "type": ["string", "object"] })
}

fn rendering() -> Value {
    json!({
        "messages": { "type": "array", "minItems": 1, "items": message() },
        "chat_template_kwargs": { "type": "object" },
        "add_generation_prompt": { "type": "boolean" },
        "continue_final_message": { "type": "boolean" },
        "reasoning_effort": { "type": "string" },
        "tools": { "type": "array", "items": object(json!({
            "type": { "const": "function" },
            "function": object(function(), &["name"]),
        }), &["type", "function"]) },
        "tool_choice": choice(json!({ "function": object(name(), &["name"]) }), "function"),
        "parallel_tool_calls": { "type": "boolean" },
    })
}

/// An object with these members and no others.
fn object(properties: Value, required: &[&str]) -> Value {
    json!({
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": false,
    })
}

/// What is said; further members are the template's.
fn message() -> Value {
    let part = json!({
        "type": "object",
        "required": ["type", "text"],
        "properties": { "type": { "const": "text" }, "text": { "type": "string" } },
    });
    let content = json!([{ "type": "string" }, { "type": "array", "items": part }]);
    json!({ "anyOf": [
        {
            "type": "object",
            "required": ["role", "content"],
            "properties": { "role": { "type": "string" }, "content": { "anyOf": content } },
        },
        {
            "type": "object",
            "required": ["role", "tool_calls"],
            "properties": {
                "role": { "const": "assistant" },
                "content": { "type": ["string", "null"] },
                "tool_calls": { "type": "array", "items": { "type": "object" } },
            },
        },
    ] })
}

fn name() -> Value {
    json!({ "name": { "type": "string", "minLength": 1 } })
}

fn function() -> Value {
    json!({
        "name": { "type": "string", "minLength": 1 },
        "description": { "type": ["string", "null"] },
        "parameters": { "type": ["object", "null"] },
        "strict": { "type": ["boolean", "null"] },
    })
}

/// A word, or a function that is named by these properties.
fn choice(mut properties: Value, required: &str) -> Value {
    properties["type"] = json!({ "const": "function" });
    json!({ "anyOf": [
        { "enum": ["auto", "none", "required"] },
        object(properties, &["type", required]),
    ] })
}

fn chat() -> Value {
    let own = json!({
        "max_completion_tokens": { "type": "integer", "minimum": 0 },
        "logprobs": { "type": "boolean" },
        "top_logprobs": { "type": "integer", "minimum": 0, "maximum": 20 },
        "modalities": { "const": ["text"] },
        "store": { "const": false },
        "service_tier": { "enum": ["auto", "default"] },
        "verbosity": { "const": "medium" },
        "metadata": note(),
        "safety_identifier": note(),
        "prompt_cache_key": note(),
    });
    body(&["messages"], [rendering(), sampling(), answers(), own])
}

fn completions() -> Value {
    let own = json!({
        "prompt": prompts("The text to go on from, or its tokens; several of them too"),
        "logprobs": { "type": "integer", "minimum": 0, "maximum": 20 },
        "suffix": { "const": "" },
        "echo": { "type": "boolean" },
    });
    body(&["prompt"], [sampling(), answers(), own])
}

fn prompts(description: &str) -> Value {
    let some = |items: Value| json!({ "type": "array", "items": items, "minItems": 1 });
    let text = json!({ "type": "string", "minLength": 1 });
    let tokens = some(json!({ "type": "integer", "minimum": 0 }));
    let several = [some(text.clone()), some(tokens.clone())];
    json!({ "description": description, "anyOf": [text, tokens, several[0], several[1]] })
}

fn responses() -> Value {
    let own = json!({
        "input": { "anyOf": [
            { "type": "string" },
            { "type": "array", "items": { "type": "object" } },
        ] },
        "instructions": { "type": "string" },
        "max_output_tokens": { "type": "integer", "minimum": 0 },
        "stream": { "type": "boolean" },
        "text": object(json!({ "format": { "type": "object", "required": ["type"] } }), &[]),
        "tools": { "type": "array", "items": {
            "type": "object",
            "required": ["type", "name"],
            "properties": function(),
        } },
        "tool_choice": choice(name(), "name"),
        "parallel_tool_calls": { "type": "boolean" },
        "store": { "const": false },
        "background": { "const": false },
        "truncation": { "const": "disabled" },
        "service_tier": { "enum": ["auto", "default"] },
        "include": { "const": [] },
        "top_logprobs": { "const": 0 },
        "user": note(),
        "metadata": note(),
        "safety_identifier": note(),
        "prompt_cache_key": note(),
    });
    body(&["input"], [sampling(), own])
}

/// The fields that make a conversation in Anthropic's API.
fn anthropic_conversation() -> Value {
    let block = json!({ "type": "object", "required": ["type"] });
    let blocks = json!({ "type": "array", "items": block });
    json!({
        "messages": { "type": "array", "minItems": 1, "items": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {
                "role": { "enum": ["user", "assistant"] },
                "content": { "anyOf": [blocks, { "type": "string" }] },
            },
        } },
        "system": { "anyOf": [blocks, { "type": "string" }] },
        "thinking": object(json!({ "type": { "enum": ["adaptive", "disabled"] } }), &["type"]),
        "tools": { "type": "array", "items": { "type": "object" } },
        "tool_choice": { "type": "object" },
    })
}

fn messages() -> Value {
    let own = json!({
        "max_tokens": { "type": "integer", "minimum": 0 },
        "stop_sequences": { "type": "array", "items": { "type": "string" } },
        "stream": { "type": "boolean" },
        "metadata": note(),
        "service_tier": { "enum": ["auto", "standard_only"] },
    });
    body(&["messages", "max_tokens"], [anthropic_conversation(), sampling(), own])
}

fn count_tokens() -> Value {
    body(&["messages"], [anthropic_conversation(), model()])
}

fn model() -> Value {
    json!({ "model": { "type": "string" } })
}

fn named() -> Value {
    body(&["model"], [model()])
}

/// How strongly adapters count, as llama-server has it.
fn scales() -> Value {
    let scale = json!({ "id": { "type": "integer", "minimum": 0 }, "scale": { "type": "number" } });
    json!({
        "type": "array",
        "items": object(scale, &["id", "scale"]),
        "description": "Adapters of /lora-adapters; those left out do not count",
    })
}

fn adapters() -> Value {
    let mut both = get("The first model's adapters", "application/json", &[]);
    let set = post("How strongly they count where requests do not say", scales(), false, "Error");
    both["post"] = set["post"].clone();
    both
}

fn load_adapter() -> Value {
    let own = json!({ "lora_name": { "type": "string" }, "lora_path": { "type": "string" } });
    body(&["lora_name", "lora_path"], [model(), own])
}

fn unload_adapter() -> Value {
    body(&["lora_name"], [json!({ "lora_name": { "type": "string" } })])
}

fn embeddings() -> Value {
    let own = json!({
        "lora": scales(),
        "input": prompts("The texts, or their tokens"),
        "encoding_format": { "enum": ["float", "base64"] },
        "pooling": { "enum": ["mean", "last"] },
        "dimensions": { "type": "integer", "description": "As many as the model has" },
        "user": note(),
    });
    body(&["input"], [model(), own])
}

fn tokenize() -> Value {
    let own = json!({
        "prompt": { "type": "string", "description": "A text; without it a conversation" },
        "add_special_tokens": { "type": "boolean" },
        "parse_special": { "type": "boolean" },
        "return_token_strs": { "type": "boolean" },
    });
    body(&[], [rendering(), model(), own])
}

fn detokenize() -> Value {
    let own = json!({
        "tokens": { "type": "array", "items": { "type": "integer", "minimum": 0 } },
        "skip_special_tokens": { "type": "boolean" },
    });
    body(&["tokens"], [model(), own])
}

fn template() -> Value {
    body(&["messages"], [rendering(), model()])
}
