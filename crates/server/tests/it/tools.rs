use bevel_engine::EngineConfig;
use serde_json::{Value, json};

use crate::{Running, server, server_with};

fn tools() -> Value {
    let properties = json!({
        "city": { "type": "string", "maxLength": 10, "pattern": "^[a-z]+$" },
        "days": { "type": "integer", "minimum": 1, "maximum": 9 },
    });
    let schema = json!({
        "type": "object",
        "properties": properties,
        "required": ["city", "days"],
        "additionalProperties": false,
    });
    let time = json!({ "name": "time", "parameters": { "type": "object", "properties": {}, "additionalProperties": false } });
    json!([
        { "type": "function", "function": { "name": "weather", "description": "Tells it", "parameters": schema } },
        { "type": "function", "function": time },
    ])
}

fn request(choice: &Value, seed: u32) -> Value {
    json!({
        "messages": [{ "role": "user", "content": "What is it like in Bath?" }],
        "tools": tools(),
        "tool_choice": choice,
        "parallel_tool_calls": false,
        "max_tokens": 120,
        "temperature": 1.0,
        "seed": seed,
    })
}

/// Panics unless a call has a tool's name and arguments after its schema.
#[track_caller]
fn check_call(name: &Value, arguments: &Value) {
    match name.as_str().unwrap() {
        "weather" => {
            assert!((1..=9).contains(&arguments["days"].as_u64().unwrap()), "{arguments}");
            let city = arguments["city"].as_str().unwrap();
            assert!(city.len() <= 10 && city.bytes().all(|b| b.is_ascii_lowercase()), "{city}");
            assert_eq!(arguments.as_object().unwrap().len(), 2);
        }
        "time" => assert_eq!(arguments, &json!({})),
        other => panic!("{other}"),
    }
}

fn arguments(call: &Value) -> Value {
    serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap()
}

#[test]
fn calls_follow_their_schemas_whole_and_streamed() {
    let server = server();
    let named = json!({ "type": "function", "function": { "name": "weather" } });
    for (choice, seeds) in [(json!("required"), 0..6), (named.clone(), 6..9)] {
        for seed in seeds {
            let request = request(&choice, seed);
            let whole = server.ask("/v1/chat/completions", &request);
            let choice = &whole["choices"][0];
            assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
            let call = &choice["message"]["tool_calls"][0];
            assert!(choice["message"]["content"].is_null());
            check_call(&call["function"]["name"], &arguments(call));

            let chunks = server.stream("/v1/chat/completions", &request);
            let deltas: Vec<&Value> = chunks
                .iter()
                .filter_map(|c| c["choices"][0]["delta"]["tool_calls"].get(0))
                .collect();
            assert_eq!(deltas.len(), 1);
            assert_eq!(
                (&deltas[0]["index"], &deltas[0]["function"]),
                (&json!(0), &call["function"])
            );
            assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
        }
    }
    // Where the model chooses, it may well say something instead.
    for seed in 0..3 {
        let whole = server.ask("/v1/chat/completions", &request(&json!("auto"), seed));
        let message = &whole["choices"][0]["message"];
        assert!(message["content"].is_string() || message["tool_calls"].is_array(), "{whole}");
    }
}

#[test]
fn the_template_shows_tools_calls_and_results() {
    let server = server();
    let call = json!({ "id": "call_1", "type": "function", "function": { "name": "time", "arguments": "{\"zone\": \"GMT\"}" } });
    let mut body = request(&json!("auto"), 0);
    body["messages"] = json!([
        { "role": "user", "content": "When?" },
        { "role": "assistant", "content": null, "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "call_1", "content": "noon" },
    ]);
    for name in ["max_tokens", "temperature", "seed"] {
        body.as_object_mut().unwrap().remove(name);
    }
    let text = server.ask("/apply-template", &body)["prompt"].as_str().unwrap().to_owned();
    for part in [
        "\"name\": \"weather\"",
        "<tool_call>\n{\"name\": \"time\", \"arguments\": {\"zone\": \"GMT\"}}\n</tool_call>",
        "<|im_start|>tool\nnoon<|im_end|>",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    body["tool_choice"] = "none".into();
    let text = server.ask("/apply-template", &body)["prompt"].as_str().unwrap().to_owned();
    assert!(!text.contains("weather"), "{text}");
}

#[test]
fn tools_that_cannot_be_offered_are_refused() {
    let server = server();
    let check = |change: Value, field: &str| {
        let mut body = request(&json!("auto"), 0);
        for (name, value) in change.as_object().unwrap() {
            body[name] = value.clone();
        }
        let (status, json) = server.post("/v1/chat/completions", &body);
        assert_eq!((status, &json["error"]["param"]), (400, &json!(field)), "{json}");
    };
    check(json!({ "tools": [{ "type": "retrieval" }] }), "tools[0].type");
    check(json!({ "tools": [{ "type": "function", "function": {} }] }), "tools[0]");
    check(json!({ "tools": [tools()[0], tools()[0]] }), "tools[1]");
    check(json!({ "tools": [], "tool_choice": "required" }), "tool_choice");
    check(json!({ "tool_choice": "perhaps" }), "tool_choice");
    check(
        json!({ "tool_choice": { "type": "function", "function": { "name": "x" } } }),
        "tool_choice",
    );
    check(json!({ "response_format": { "type": "json_object" } }), "response_format");
}

/// The names and data of a stream's events.
fn events(server: &Running, path: &str, body: &Value) -> Vec<(String, Value)> {
    let mut body = body.clone();
    body["stream"] = true.into();
    let mut response = Running::agent().post(server.url(path)).send(&body.to_string()).unwrap();
    assert_eq!(response.status(), 200);
    let text = response.body_mut().read_to_string().unwrap();
    let mut events = Vec::new();
    for event in text.split("\n\n").filter(|event| !event.is_empty()) {
        let (name, data) = event.split_once('\n').unwrap();
        let name = name.strip_prefix("event: ").unwrap().to_owned();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(data["type"], name);
        events.push((name, data));
    }
    events
}

#[test]
fn anthropics_clients_are_answered() {
    let server = server();
    let body = json!({
        "messages": [
            { "role": "user", "content": [{ "type": "text", "text": "Who is she?" }] },
            { "role": "assistant", "content": "She is" },
        ],
        "system": [{ "type": "text", "text": "Be brief.", "cache_control": { "type": "ephemeral" } }],
        "max_tokens": 12,
        "temperature": 0,
        "metadata": { "user_id": "x" },
    });
    let whole = server.ask("/v1/messages", &body);
    let text = whole["content"][0]["text"].as_str().unwrap();
    assert_eq!(
        (&whole["stop_reason"], &whole["role"]),
        (&json!("max_tokens"), &json!("assistant"))
    );
    assert_eq!(whole["usage"]["output_tokens"], 12);
    let mut count = body.clone();
    for name in ["max_tokens", "temperature", "metadata"] {
        count.as_object_mut().unwrap().remove(name);
    }
    let counted = server.ask("/v1/messages/count_tokens", &count)["input_tokens"].as_u64().unwrap();
    let usage = &whole["usage"];
    let read = |name: &str| usage[name].as_u64().unwrap();
    assert_eq!(read("input_tokens") + read("cache_read_input_tokens"), counted);

    let events = events(&server, "/v1/messages", &body);
    let names: Vec<&str> = events.iter().map(|event| event.0.as_str()).collect();
    assert_eq!(names[..2], ["message_start", "content_block_start"]);
    assert_eq!(names[names.len() - 3..], ["content_block_stop", "message_delta", "message_stop"]);
    let streamed: String =
        events.iter().filter_map(|event| event.1["delta"]["text"].as_str()).collect();
    assert_eq!(streamed, text);

    // A stop string inside it.
    let mut stopped = body.clone();
    stopped["stop_sequences"] = json!([&text[4..7]]);
    let answer = server.ask("/v1/messages", &stopped);
    assert_eq!(answer["stop_reason"], "stop_sequence");
    assert_eq!(answer["stop_sequence"], text[4..7]);

    let (status, error) = server.post("/v1/messages", &json!({ "messages": [], "max_tokens": 1 }));
    assert_eq!(
        (status, &error["type"], &error["error"]["type"]),
        (400, &json!("error"), &json!("invalid_request_error"))
    );
}

#[test]
fn anthropics_tools_are_called() {
    let server = server();
    let schema = tools()[0]["function"]["parameters"].clone();
    let body = json!({
        "messages": [
            { "role": "user", "content": "Weather?" },
            { "role": "assistant", "content": [
                { "type": "text", "text": "Let me see." },
                { "type": "tool_use", "id": "toolu_1", "name": "weather", "input": { "city": "bath", "days": 1 } },
            ] },
            { "role": "user", "content": [
                { "type": "tool_result", "tool_use_id": "toolu_1", "content": [{ "type": "text", "text": "Rain." }] },
                { "type": "text", "text": "And in York?" },
            ] },
        ],
        "tools": [{ "name": "weather", "description": "Tells it", "input_schema": schema }],
        "tool_choice": { "type": "any", "disable_parallel_tool_use": true },
        "max_tokens": 120,
        "seed": 3,
        "temperature": 1,
    });
    let whole = server.ask("/v1/messages", &body);
    let block = &whole["content"][0];
    assert_eq!((&block["type"], &whole["stop_reason"]), (&json!("tool_use"), &json!("tool_use")));
    check_call(&block["name"], &block["input"]);
    let events = events(&server, "/v1/messages", &body);
    let json: String =
        events.iter().filter_map(|event| event.1["delta"]["partial_json"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap(), block["input"]);
    assert_eq!(events[events.len() - 2].1["delta"]["stop_reason"], "tool_use");
}

#[test]
fn responses_are_whole_or_streamed_and_nothing_is_stored() {
    let server = server();
    let text = json!({
        "input": [
            { "role": "user", "content": [{ "type": "input_text", "text": "Who is she?" }] },
            { "type": "message", "role": "assistant", "content": [{ "type": "output_text", "text": "Emma." }] },
            { "role": "user", "content": "And he?" },
        ],
        "instructions": "Be brief.",
        "max_output_tokens": 20,
        "temperature": 0,
    });
    let whole = server.ask("/v1/responses", &text);
    assert_eq!((&whole["object"], &whole["store"]), (&json!("response"), &json!(false)));
    assert_eq!(
        (&whole["status"], &whole["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    let said = &whole["output"][0]["content"][0];
    let events_of_text = events(&server, "/v1/responses", &text);
    for (number, event) in events_of_text.iter().enumerate() {
        assert_eq!(event.1["sequence_number"], number);
    }
    let of = |name: &str| {
        let of_name = events_of_text.iter().filter(|event| event.0 == name);
        of_name.map(|event| event.1.clone()).collect::<Vec<_>>()
    };
    let deltas: String = of("response.output_text.delta")
        .iter()
        .map(|d| d["delta"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(deltas, said["text"]);
    assert_eq!(of("response.output_text.done")[0]["text"], said["text"]);
    let last = &of("response.incomplete")[0]["response"];
    assert_eq!(
        (&last["output"][0]["content"], &last["usage"]["total_tokens"]),
        (&whole["output"][0]["content"], &whole["usage"]["total_tokens"])
    );

    let function = tools()[0]["function"].clone();
    let call = json!({
        "input": [
            { "role": "user", "content": "Weather?" },
            { "type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{\"city\":\"bath\",\"days\":2}" },
            { "type": "function_call_output", "call_id": "c1", "output": "Rain." },
            { "role": "user", "content": "York?" },
        ],
        "tools": [{ "type": "function", "name": "weather", "parameters": function["parameters"] }],
        "tool_choice": { "type": "function", "name": "weather" },
        "parallel_tool_calls": false,
        "temperature": 1,
        "seed": 5,
    });
    let whole = server.ask("/v1/responses", &call);
    let item = &whole["output"][0];
    assert_eq!((&item["type"], &whole["status"]), (&json!("function_call"), &json!("completed")));
    check_call(&item["name"], &serde_json::from_str(item["arguments"].as_str().unwrap()).unwrap());
    let done = events(&server, "/v1/responses", &call);
    let done =
        done.iter().find(|event| event.0 == "response.function_call_arguments.done").unwrap();
    assert_eq!(done.1["arguments"], item["arguments"]);

    let form = json!({ "input": "x", "text": { "format": { "type": "json_schema", "name": "n", "schema": { "type": "object", "properties": { "a": { "type": "boolean" } }, "required": ["a"], "additionalProperties": false } } } });
    let answer = server.ask("/v1/responses", &form);
    let parsed: Value =
        serde_json::from_str(answer["output"][0]["content"][0]["text"].as_str().unwrap()).unwrap();
    assert!(parsed["a"].is_boolean());

    for (name, value) in [
        ("previous_response_id", json!("resp_1")),
        ("store", json!(true)),
        ("background", json!(true)),
        ("input", json!([{ "type": "item_reference", "id": "x" }])),
        ("tools", json!([{ "type": "web_search" }])),
        ("truncation", json!("auto")),
    ] {
        let mut body = json!({ "input": "x" });
        body[name] = value;
        let (status, json) = server.post("/v1/responses", &body);
        let blamed = json["error"]["param"].as_str().unwrap_or_default();
        assert!(status == 400 && blamed.starts_with(name), "{name}: {json}");
    }
}

/// As Pydantic writes models within models.
#[test]
fn schemas_may_refer_to_their_definitions() {
    let server = server_with(|_| {}, |model| model.engine = EngineConfig::new(1024, 4));
    let schema = json!({
        "$defs": { "Place": { "type": "object", "properties": { "city": { "enum": ["bath", "york"] } }, "required": ["city"], "additionalProperties": false } },
        "type": "object",
        "properties": { "from": { "$ref": "#/$defs/Place" }, "to": { "$ref": "#/$defs/Place" } },
        "required": ["from", "to"],
        "additionalProperties": false,
    });
    let tool = |name: &str| json!({ "type": "function", "function": { "name": name, "parameters": schema } });
    for tools in [json!([tool("go")]), json!([tool("go"), tool("ride")])] {
        let body = json!({
            "messages": [{ "role": "user", "content": "x" }],
            "tools": tools,
            "tool_choice": "required",
            "parallel_tool_calls": false,
            "max_tokens": 200,
        });
        let answer = server.ask("/v1/chat/completions", &body);
        assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls", "{answer}");
        let arguments = arguments(&answer["choices"][0]["message"]["tool_calls"][0]);
        assert!(
            ["bath", "york"].contains(&arguments["from"]["city"].as_str().unwrap()),
            "{answer}"
        );
    }
}
