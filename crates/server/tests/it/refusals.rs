use serde_json::{Value, json};

use crate::{Running, server, server_with};

#[track_caller]
fn check(server: &Running, path: &str, request: &Value, field: &str) {
    let (status, json) = server.post(path, request);
    let error = &json["error"];
    assert_eq!((status, &error["param"]), (400, &json!(field)), "{request}: {json}");
    assert!(error["message"].as_str().unwrap().contains(&format!("`{field}`")), "{json}");
}

/// Whatever a client asks for is done or refused by name.
#[test]
fn fields_that_cannot_be_honoured_are_named() {
    let server = server();
    let completions = [
        (json!({ "temperature": -1 }), "temperature"),
        (json!({ "temperature": "hot" }), "temperature"),
        (json!({ "top_p": 1.5 }), "top_p"),
        (json!({ "min_p": -0.1 }), "min_p"),
        (json!({ "typical_p": 2 }), "typical_p"),
        (json!({ "top_k": -2 }), "top_k"),
        (json!({ "n": 0 }), "n"),
        (json!({ "n": 9 }), "n"),
        (json!({ "n": 2, "best_of": 3 }), "best_of"),
        (json!({ "max_tokens": -1 }), "max_tokens"),
        (json!({ "logprobs": 21 }), "logprobs"),
        (json!({ "prompt_logprobs": 21 }), "prompt_logprobs"),
        (json!({ "prompt_logprobs": 1, "stream": true }), "prompt_logprobs"),
        (json!({ "suffix": "end" }), "suffix"),
        (json!({ "stop": ["a", ""] }), "stop"),
        (json!({ "stop": 7 }), "stop"),
        (json!({ "seed": 1.5 }), "seed"),
        (json!({ "logit_bias": { "4096": 1 } }), "logit_bias.4096"),
        (json!({ "logit_bias": { "the": 1 } }), "logit_bias.the"),
        (json!({ "presence_penalty": "much" }), "presence_penalty"),
        (json!({ "repetition_penalty": 0 }), "repetition_penalty"),
        (json!({ "stream_options": { "include_usage": true } }), "stream_options"),
        (json!({ "stream": true, "stream_options": { "x": 1 } }), "stream_options.x"),
        (json!({ "response_format": { "type": "yaml" } }), "response_format.type"),
        (json!({ "response_format": ["json_object"] }), "response_format"),
        (json!({ "response_format": { "type": "json_object", "schema": {} } }), "response_format"),
        (json!({ "structured_outputs": { "regex": "(" } }), "structured_outputs"),
        (json!({ "structured_outputs": { "choice": [] } }), "structured_outputs.choice"),
        (
            json!({ "response_format": { "type": "json_object" }, "structured_outputs": { "regex": "a" } }),
            "structured_outputs",
        ),
        (json!({ "structured_outputs": { "regex": "a".repeat(200_000) } }), "structured_outputs"),
        (json!({ "logit_bias": { "07": 1 } }), "logit_bias.07"),
        (json!({ "logit_bias": { "7": -3e38 } }), "logit_bias.7"),
        (json!({ "stop": ["x".repeat(2000)] }), "stop"),
        (json!({ "dry_sequence_breakers": vec!["x"; 100] }), "dry_sequence_breakers"),
        (json!({ "presence_penalty": 3e38 }), "presence_penalty"),
        (json!({ "use_beam_search": "yes" }), "use_beam_search"),
        (json!({ "use_beam_search": true, "temperature": 0.5 }), "temperature"),
        (json!({ "use_beam_search": true, "top_k": 40 }), "top_k"),
        (json!({ "use_beam_search": true, "n": 3, "best_of": 2 }), "best_of"),
        (json!({ "use_beam_search": true, "best_of": 9 }), "best_of"),
        (json!({ "use_beam_search": true, "early_stopping": "soon" }), "early_stopping"),
        (json!({ "early_stopping": true }), "early_stopping"),
        (json!({ "length_penalty": 2 }), "length_penalty"),
        (json!({ "prompt": { "a": 1 } }), "prompt"),
        (json!({ "prompt": [] }), "prompt"),
        (json!({ "prompt": [5000] }), "prompt"),
    ];
    for (mut request, field) in completions {
        if request["prompt"].is_null() {
            request["prompt"] = "x".into();
        }
        check(&server, "/v1/completions", &request, field);
    }
    check(&server, "/v1/completions", &json!({}), "prompt");

    let chats = [
        (json!({ "messages": [] }), "messages"),
        (json!({ "messages": [{ "content": "x" }] }), "messages[0]"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }] }),
            "messages[0].content[0]",
        ),
        (json!({ "messages": [{ "role": "user", "content": 7 }] }), "messages[0].content"),
        (json!({ "top_logprobs": 3 }), "top_logprobs"),
        (json!({ "tools": [{ "type": "function" }] }), "tools[0]"),
        (json!({ "tool_choice": { "type": "function" } }), "tool_choice"),
        (
            json!({ "tool_choice": { "type": "function", "function": { "name": "f", "x": 1 } } }),
            "tool_choice.function.x",
        ),
        (json!({ "tool_choice": "always" }), "tool_choice"),
        (json!({ "store": true }), "store"),
        (json!({ "modalities": ["text", "audio"] }), "modalities"),
        (json!({ "reasoning_effort": "high" }), "reasoning_effort"),
        (json!({ "chat_template_kwargs": { "tools": [] } }), "chat_template_kwargs.tools"),
        (json!({ "prompt": "x" }), "prompt"),
    ];
    for (mut request, field) in chats {
        if request["messages"].is_null() {
            request["messages"] = json!([{ "role": "user", "content": "x" }]);
        }
        check(&server, "/v1/chat/completions", &request, field);
    }
    check(&server, "/v1/chat/completions", &json!({}), "messages");
    check(&server, "/detokenize", &json!({ "tokens": [1, 9999] }), "tokens[1]");
    check(&server, "/tokenize", &json!({ "prompt": "x", "y": 1 }), "y");
}

#[test]
fn bodies_that_are_none_are_refused_as_json() {
    let server = server_with(|config| config.body_limit = 200_000, |_| {});
    let message = |(status, json): (u16, Value), expected: u16| {
        assert_eq!(status, expected, "{json}");
        json["error"]["message"].as_str().unwrap().to_owned()
    };
    let post = |body: &str| server.post_text("/v1/completions", body);
    assert!(message(post(""), 400).contains("not JSON"));
    assert!(message(post("{\"prompt\": \"x\""), 400).contains("not JSON"));
    assert!(message(post("[1]"), 400).contains("not an object"));
    assert!(message(post(&"[".repeat(100_000)), 400).contains("recursion limit"));
    let deep = format!("{{\"logit_bias\": {}1{}}}", "{\"1\":".repeat(5000), "}".repeat(5000));
    assert!(message(post(&deep), 400).contains("recursion limit"));
    let large = json!({ "prompt": "x".repeat(300_000) }).to_string();
    assert!(message(post(&large), 413).contains("limit"));
    let long = json!({ "prompt": "word ".repeat(30_000) });
    let (status, json) = server.post("/v1/completions", &long);
    assert_eq!((status, &json["error"]["code"]), (400, &json!("context_length_exceeded")));
    let compressed = Running::agent().post(server.url("/v1/completions"));
    let response = compressed.header("content-encoding", "gzip").send("x").unwrap();
    assert_eq!(response.status(), 415);
    let many = json!({ "prompt": vec!["x"; 200], "n": 8, "max_tokens": 1 });
    assert!(message(server.post("/v1/completions", &many), 400).contains("1600 answers"));
    assert!(message(server.get("/v2/nothing"), 404).contains("/v2/nothing"));
    assert!(message(server.get("/v1/completions"), 405).contains("GET"));
    // It still answers.
    server.ask("/v1/completions", &json!({ "prompt": "x", "max_tokens": 1 }));
}

/// Neither a chain of rules nor one of references ends the program, or takes anything from others.
#[test]
fn grammars_that_are_deep_end_nothing() {
    let server = server();
    let rules: String = (0..6000).map(|i| format!("a{i}: a{}\n", i + 1)).collect();
    let lark = format!("start: a0\n{rules}a6000: \"x\"");
    let definitions: serde_json::Map<String, Value> = (0..3000)
        .map(|i| (format!("d{i}"), json!({ "$ref": format!("#/$defs/d{}", i + 1) })))
        .chain([("d3000".to_owned(), json!({ "type": "integer" }))])
        .collect();
    let schema = json!({ "$defs": definitions, "$ref": "#/$defs/d0" });
    for structured in [json!({ "grammar": lark }), json!({ "json": schema })] {
        let request = json!({ "prompt": "x", "max_tokens": 2, "structured_outputs": structured });
        let (status, json) = server.post("/v1/completions", &request);
        assert!([200, 400].contains(&status), "{json}");
        server.ask("/v1/completions", &json!({ "prompt": "x", "max_tokens": 1 }));
    }
}

#[test]
fn pages_of_other_sites_are_refused() {
    let ask = |server: &Running, site: &str| {
        let request = Running::agent().post(server.url("/v1/completions"));
        let request =
            request.header("sec-fetch-site", site).header("origin", "https://app.example");
        request.send("{\"prompt\": \"x\", \"max_tokens\": 1}").unwrap()
    };
    let closed = server();
    assert_eq!(ask(&closed, "cross-site").status(), 403);
    assert_eq!(ask(&closed, "same-origin").status(), 200);
    let open = server_with(
        |config| config.cors = Some(vec!["https://app.example".parse().unwrap()]),
        |_| {},
    );
    let response = ask(&open, "cross-site");
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["access-control-allow-origin"], "https://app.example");
    let preflight = ureq::http::Request::options(open.url("/v1/completions"))
        .header("origin", "https://app.example")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type")
        .body(())
        .unwrap();
    let response = Running::agent().run(preflight).unwrap();
    let allowed = response.headers()["access-control-allow-headers"].to_str().unwrap().to_owned();
    assert!(allowed.contains("authorization"), "{allowed}");
}

#[test]
fn keys_are_asked_for() {
    let server = server_with(|config| config.api_keys = vec!["one".into(), "two".into()], |_| {});
    let get = |path: &str, header: (&str, &str)| {
        let request = Running::agent().get(server.url(path)).header(header.0, header.1);
        request.call().unwrap().status().as_u16()
    };
    for (header, status) in [
        (("accept", "*/*"), 401),
        (("authorization", "Bearer three"), 401),
        (("authorization", "Bearer on"), 401),
        (("authorization", "one"), 401),
        (("authorization", "Bearer "), 401),
        (("authorization", "Bearer one"), 200),
        (("authorization", "bearer one"), 200),
        (("authorization", "Bearer two"), 200),
        (("x-api-key", "two"), 200),
    ] {
        assert_eq!(get("/v1/models", header), status, "{header:?}");
        assert_eq!(get("/metrics", header), status, "{header:?}");
    }
    assert_eq!(get("/health", ("accept", "*/*")), 200, "a load balancer has no key");
    let (status, json) = server.post("/v1/completions", &json!({ "prompt": "x" }));
    assert_eq!((status, &json["error"]["code"]), (401, &json!("invalid_api_key")));
}

#[test]
fn a_full_queue_refuses() {
    let server = server_with(
        |_| {},
        |model| {
            model.engine.queue = 2;
            model.engine.sequences = 1;
        },
    );
    let long = json!({ "prompt": "x", "max_tokens": 500, "ignore_eos": true });
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let ask = || server.post("/v1/completions", &long).0;
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let count = |status| statuses.iter().filter(|&&s| s == status).count();
    assert!(count(200) >= 3 && count(429) >= 1, "{statuses:?}");
    assert_eq!(count(200) + count(429), 8);
}

/// What the OpenAPI document says is so: its fields are known, and of the right types; others are not.
#[test]
fn the_document_describes_the_server() {
    let server = server();
    let (status, document) = server.get("/openapi.json");
    assert_eq!((status, &document["openapi"]), (200, &json!("3.1.0")));
    for (path, methods) in document["paths"].as_object().unwrap() {
        let Some(post) = methods.get("post") else {
            let path = path.replace("{name}", "tiny");
            let status = Running::agent().get(server.url(&path)).call().unwrap().status();
            assert_eq!(status, 200, "{path}");
            continue;
        };
        // What adapters need is not here; they have tests of their own.
        if path.contains("lora") {
            assert!([400, 403].contains(&server.post(path, &json!({ "mystery": 1 })).0), "{path}");
            continue;
        }
        let schema = &post["requestBody"]["content"]["application/json"]["schema"];
        let mut request = json!({});
        for (name, value) in [
            ("model", json!("tiny")),
            ("messages", json!([{ "role": "user", "content": "x" }])),
            ("max_tokens", json!(1)),
            ("max_output_tokens", json!(1)),
            ("prompt", json!("x")),
            ("input", json!("x")),
            ("tokens", json!([1])),
        ] {
            let is_there = schema["properties"].get(name).is_some();
            if is_there && !(name == "prompt" && path == "/tokenize") {
                request[name] = value;
            }
        }
        server.ask(path, &request);
        for name in schema["properties"].as_object().unwrap().keys() {
            // A value of no type that any field has: it is looked at, or the field says nothing but notes.
            let mut with = request.clone();
            with[name] = json!({ "no": ["such"] });
            let (_, json) = server.post(path, &with);
            assert!(!json.to_string().contains("does not know the field"), "{path} {name}: {json}");
        }
        for name in schema["required"].as_array().unwrap() {
            let mut without = request.clone();
            without.as_object_mut().unwrap().remove(name.as_str().unwrap());
            let (status, json) = server.post(path, &without);
            let message = json["error"]["message"].as_str().unwrap_or_default();
            assert!(status == 400 && message.contains("is required"), "{path} {name}: {json}");
        }
        request["mystery"] = 1.into();
        let (status, json) = server.post(path, &request);
        let message = json["error"]["message"].as_str().unwrap_or_default();
        assert!(status == 400 && message.contains("`mystery`"), "{path}: {json}");
    }
}
