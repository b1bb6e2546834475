use serde_json::{Value, json};

use crate::{Running, prompt_tokens, server, server_with};

const PROMPT: &str = "It is a truth universally acknowledged";

/// The texts of a stream's choices, and how they ended.
fn put_together(chunks: &[Value], text: impl Fn(&Value) -> &Value) -> Vec<(String, Value)> {
    let mut choices: Vec<(String, Value)> = Vec::new();
    for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
        let index = choice["index"].as_u64().unwrap() as usize;
        choices.resize(choices.len().max(index + 1), Default::default());
        assert!(choices[index].1.is_null(), "news of a choice that has ended");
        choices[index].0.push_str(text(choice).as_str().unwrap_or_default());
        choices[index].1 = choice["finish_reason"].clone();
    }
    choices
}

#[test]
fn a_stream_says_what_a_whole_answer_says() {
    let server = server();
    let requests = [
        json!({ "prompt": PROMPT, "max_tokens": 20 }),
        json!({ "prompt": PROMPT, "max_tokens": 20, "echo": true, "stop": [" of", "zzz"] }),
        json!({ "prompt": ["Mr. Darcy", "She"], "max_tokens": 12, "n": 2, "temperature": 1.0, "seed": 7 }),
        json!({ "prompt": [[5, 6, 7], [8]], "max_tokens": 3, "logprobs": 2 }),
        json!({ "prompt": [5, 6, 7], "max_tokens": 0 }),
        json!({ "prompt": [PROMPT, "x"], "max_tokens": 3, "logprobs": 2, "echo": true, "n": 2, "temperature": 1, "seed": 4 }),
        json!({ "prompt": PROMPT, "max_tokens": 8, "use_beam_search": true, "n": 2, "best_of": 4 }),
        json!({ "prompt": PROMPT, "max_tokens": 30, "temperature": 0.9, "top_k": 50, "typical_p": 0.95,
            "min_p": 0.01, "seed": -3, "dry_multiplier": 0.8, "presence_penalty": 0.1,
            "frequency_penalty": 0.1, "repetition_penalty": 1.05, "logit_bias": { "13": -100 } }),
    ];
    for request in requests {
        let whole = server.ask("/v1/completions", &request);
        let mut request = request;
        request["stream_options"] = json!({ "include_usage": true });
        let chunks = server.stream("/v1/completions", &request);
        let (last, chunks) = chunks.split_last().unwrap();
        assert_eq!(
            (&last["usage"]["total_tokens"], &last["choices"]),
            (&whole["usage"]["total_tokens"], &json!([]))
        );
        let expected = whole["choices"].as_array().unwrap();
        let streamed = put_together(chunks, |choice| &choice["text"]);
        assert_eq!(streamed.len(), expected.len());
        for ((text, finish), choice) in streamed.iter().zip(expected) {
            assert_eq!(
                (&Value::from(text.as_str()), finish),
                (&choice["text"], &choice["finish_reason"])
            );
        }
        if request["logprobs"].is_u64() {
            let parts = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
            let first = parts.filter(|choice| choice["index"] == 0);
            let of = |name: &'static str| {
                first.clone().filter_map(move |c| c["logprobs"][name].as_array()).flatten()
            };
            for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                assert!(of(name).eq(expected[0]["logprobs"][name].as_array().unwrap()), "{name}");
            }
            let echoed = if request["echo"] == true { prompt_tokens(PROMPT) } else { 0 };
            assert_eq!(of("tokens").count(), echoed + 3);
        }
    }
}

#[test]
fn it_is_told_how_likely_a_prompt_was() {
    let server = server();
    let ask = |body: Value| server.ask("/v1/completions", &body)["choices"][0].clone();
    let tokens = server.ask("/tokenize", &json!({ "prompt": PROMPT }))["tokens"].clone();
    let echoed = ask(json!({ "prompt": PROMPT, "echo": true, "logprobs": 1, "max_tokens": 0 }));
    assert_eq!(echoed["text"], PROMPT);
    let logprobs = &echoed["logprobs"];
    let count = tokens.as_array().unwrap().len();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[name].as_array().unwrap().len(), count, "{name}");
    }
    assert_eq!(
        (&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]),
        (&Value::Null, &Value::Null)
    );
    // Each token is as likely as it is after those before it.
    let whole = ask(json!({ "prompt": PROMPT, "prompt_logprobs": 0, "max_tokens": 1 }));
    for i in 1..count {
        let before = &tokens.as_array().unwrap()[..i];
        let id = tokens[i].as_u64().unwrap();
        // A bias chooses the token, and does not count.
        let next = ask(
            json!({ "prompt": before, "logprobs": 0, "max_tokens": 1, "logit_bias": { id.to_string(): 100 } }),
        );
        assert_eq!(next["logprobs"]["tokens"][0], logprobs["tokens"][i]);
        assert_eq!(next["logprobs"]["token_logprobs"][0], logprobs["token_logprobs"][i]);
        let entry = &whole["prompt_logprobs"][i][id.to_string()];
        assert_eq!(entry["logprob"], logprobs["token_logprobs"][i]);
        let top = logprobs["top_logprobs"][i].as_object().unwrap();
        let is_first = top.values().next() == Some(&entry["logprob"]);
        assert_eq!(entry["rank"] == 1, is_first, "{entry} {top:?}");
    }
    let chat = json!({ "messages": [{ "role": "user", "content": "Who?" }], "max_tokens": 1, "prompt_logprobs": 2 });
    let count = server.ask("/tokenize", &json!({ "messages": chat["messages"] }))["count"].clone();
    let scored = server.ask("/v1/chat/completions", &chat)["prompt_logprobs"].clone();
    assert_eq!(scored.as_array().unwrap().len() as u64, count.as_u64().unwrap());
    assert!(scored[1].as_object().unwrap().len() >= 2);
}

#[test]
fn beams_find_likelier_answers_than_greed_does() {
    let server = server();
    let ask = |options: Value| {
        let mut request =
            json!({ "prompt": PROMPT, "max_tokens": 12, "logprobs": 0, "ignore_eos": true });
        request.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        let response = server.ask("/v1/completions", &request);
        let sum = |choice: &Value| -> f64 {
            let of = choice["logprobs"]["token_logprobs"].as_array().unwrap();
            assert_eq!(of.len(), 12);
            of.iter().map(|p| p.as_f64().unwrap()).sum()
        };
        response["choices"].as_array().unwrap().iter().map(sum).collect::<Vec<f64>>()
    };
    let greedy = ask(json!({ "temperature": 0 }));
    let one = ask(json!({ "use_beam_search": true }));
    let best = ask(
        json!({ "use_beam_search": true, "temperature": 0, "n": 3, "best_of": 8, "early_stopping": "never" }),
    );
    assert_eq!(greedy, one);
    assert!(
        best.len() == 3 && best.is_sorted_by(|a, b| a >= b) && best[0] > greedy[0],
        "{best:?} {greedy:?}"
    );
}

#[test]
fn usage_counts_tokens() {
    let server = server();
    let ask = |n: u32| {
        let request = json!({ "prompt": PROMPT, "max_tokens": 5, "n": n, "ignore_eos": true });
        server.ask("/v1/completions", &request)["usage"].clone()
    };
    let prompt = prompt_tokens(PROMPT);
    for n in [1, 3] {
        let expected = json!({
            "prompt_tokens": prompt,
            "completion_tokens": 5 * n,
            "total_tokens": prompt + 5 * n as usize,
            "prompt_tokens_details": { "cached_tokens": 0 },
        });
        assert_eq!(ask(n), expected);
    }
    let long = json!({ "prompt": PROMPT.repeat(5), "max_tokens": 1 });
    server.ask("/v1/completions", &long);
    let cached =
        &server.ask("/v1/completions", &long)["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert_eq!(cached.as_u64().unwrap() as usize, (prompt_tokens(&PROMPT.repeat(5)) - 1) / 16 * 16);
}

#[test]
fn a_conversation_is_rendered_by_the_template() {
    let server = server();
    let messages = json!([
        { "role": "developer", "content": "Be brief." },
        { "role": "user", "content": [{ "type": "text", "text": "Who is " }, { "type": "text", "text": "she?" }] },
    ]);
    let text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho is she?<|im_end|>\n";
    let rendered = |body: Value| server.ask("/apply-template", &body)["prompt"].clone();
    assert_eq!(rendered(json!({ "messages": messages })), format!("{text}<|im_start|>assistant\n"));
    let without = json!({ "messages": messages, "add_generation_prompt": false });
    assert_eq!(rendered(without), text);
    let mut begun = messages.clone();
    begun.as_array_mut().unwrap().push(json!({ "role": "assistant", "content": "She is " }));
    let continued = json!({ "messages": begun, "continue_final_message": true });
    assert_eq!(rendered(continued), format!("{text}<|im_start|>assistant\nShe is "));
    // What the template writes may contain the same.
    begun[2]["content"] = "<".into();
    let continued = json!({ "messages": begun, "continue_final_message": true });
    assert_eq!(rendered(continued), format!("{text}<|im_start|>assistant\n<"));

    // The answer to a conversation is the completion of its rendering.
    let request = json!({ "messages": messages, "max_completion_tokens": 12, "logprobs": true, "top_logprobs": 1 });
    let chat = server.ask("/v1/chat/completions", &request);
    let tokens = server.ask("/tokenize", &json!({ "messages": messages }))["tokens"].clone();
    let completion = server.ask("/v1/completions", &json!({ "prompt": tokens, "max_tokens": 12 }));
    let choice = &chat["choices"][0];
    assert_eq!(choice["message"]["content"], completion["choices"][0]["text"]);
    assert_eq!(choice["message"]["role"], "assistant");
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len() as u64, chat["usage"]["completion_tokens"].as_u64().unwrap());
    assert!(content.iter().all(|token| token["top_logprobs"][0]["logprob"] == token["logprob"]));

    let chunks = server.stream("/v1/chat/completions", &request);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let streamed = put_together(&chunks, |choice| &choice["delta"]["content"]);
    assert_eq!(Value::from(streamed[0].0.as_str()), choice["message"]["content"]);
    assert_eq!(streamed[0].1, choice["finish_reason"]);
}

/// Where a template begins thoughts, what comes before their end is no part of the answer.
#[test]
fn thoughts_are_no_part_of_an_answer() {
    let template =
        "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n{# until </think> #}";
    let server = server_with(|_| {}, |model| model.template = Some(template.to_owned()));
    let messages = json!([{ "role": "user", "content": "Emma was" }]);
    let request = json!({ "messages": messages, "max_tokens": 9 });
    let prompt = server.ask("/apply-template", &json!({ "messages": messages }))["prompt"].clone();
    assert_eq!(prompt, "Emma was<think>\n");
    let tokens = server.ask("/tokenize", &json!({ "messages": messages }))["tokens"].clone();
    let completion = server.ask("/v1/completions", &json!({ "prompt": tokens, "max_tokens": 9 }));
    let text = completion["choices"][0]["text"].as_str().unwrap().trim();

    let chat = server.ask("/v1/chat/completions", &request);
    let message = &chat["choices"][0]["message"];
    assert_eq!(
        (&message["content"], message["reasoning_content"].as_str().unwrap().trim()),
        (&json!(""), text)
    );
    assert_eq!(chat["usage"]["completion_tokens_details"]["reasoning_tokens"], 9);
    let chunks = server.stream("/v1/chat/completions", &request);
    let streamed = put_together(&chunks, |choice| &choice["delta"]["reasoning_content"]);
    assert_eq!(streamed[0].0.trim(), text);
    assert_eq!(put_together(&chunks, |choice| &choice["delta"]["content"])[0].0, "");

    let response =
        server.ask("/v1/responses", &json!({ "input": "Emma was", "max_output_tokens": 9 }));
    assert_eq!(response["output"][0]["type"], "reasoning");
    assert_eq!(response["output"][0]["content"][0]["text"].as_str().unwrap().trim(), text);
    assert_eq!(response["usage"]["output_tokens_details"]["reasoning_tokens"], 9);
    let message = server.ask("/v1/messages", &request);
    assert_eq!(message["content"][0]["type"], "thinking");
    assert_eq!(message["content"][0]["thinking"].as_str().unwrap().trim(), text);

    // A form leaves no place for thoughts.
    let mut formed = request.clone();
    formed["structured_outputs"] = json!({ "choice": ["yes", "no"] });
    let message = &server.ask("/v1/chat/completions", &formed)["choices"][0]["message"];
    assert!(["yes", "no"].contains(&message["content"].as_str().unwrap()), "{message}");
}

#[test]
fn tokens_and_texts_go_both_ways() {
    let server = server();
    let text = "Él é ☂ and <|endoftext|> café";
    let tokens = server.ask("/tokenize", &json!({ "prompt": text, "add_special_tokens": false }));
    let back = server.ask("/detokenize", &json!({ "tokens": tokens["tokens"] }));
    assert_eq!(back["prompt"], text);
}

#[test]
fn answers_follow_their_grammar() {
    let server = server();
    let ask = |grammar: Value, seed: u32| {
        let mut request = json!({ "prompt": "Here it is:\n", "max_tokens": 200, "temperature": 1.0, "seed": seed });
        for (name, value) in grammar.as_object().unwrap() {
            request[name] = value.clone();
        }
        let response = server.ask("/v1/completions", &request);
        let choice = &response["choices"][0];
        (choice["text"].as_str().unwrap().to_owned(), choice["finish_reason"].clone())
    };
    let schema = json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 12 },
            "age": { "type": "integer", "minimum": 0, "maximum": 130 },
            "titles": { "type": "array", "items": { "enum": ["Mr.", "Mrs.", "Miss"] }, "maxItems": 2 },
        },
        "required": ["name", "age", "titles"],
        "additionalProperties": false,
    });
    let format = json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "who", "strict": true, "schema": schema } } });
    for seed in 0..8 {
        let (text, finish) = ask(format.clone(), seed);
        assert_eq!(finish, "stop", "{text}");
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value.as_object().unwrap().len(), 3);
        assert!(
            value["age"].as_u64().unwrap() <= 130 && value["name"].as_str().unwrap().len() <= 48
        );

        let (text, _) =
            ask(json!({ "structured_outputs": { "regex": "[0-9]{4}-[0-9]{2}" } }), seed);
        let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        assert!(text.len() == 7 && digits(&text[..4]) && digits(&text[5..]), "{text}");
        let (text, _) =
            ask(json!({ "structured_outputs": { "choice": ["yes", "no \"quoted\"\n"] } }), seed);
        assert!(["yes", "no \"quoted\"\n"].contains(&text.as_str()), "{text}");
        let lark = "start: \"<\" WORD \">\"\nWORD: /[a-z]{1,8}/";
        let (text, _) = ask(json!({ "structured_outputs": { "grammar": lark } }), seed);
        assert!(text.starts_with('<') && text.ends_with('>') && text.len() <= 10, "{text}");
    }
    let many: Vec<String> = (0..5000).map(|i| format!("{i}.*")).collect();
    let (text, _) = ask(json!({ "structured_outputs": { "choice": many } }), 3);
    assert!(many.contains(&text), "{text}");
    // Several at once, each in a state of its own.
    let request = json!({ "prompt": "So: ", "n": 4, "temperature": 1.5, "seed": 3, "max_tokens": 100,
        "structured_outputs": { "regex": "(one|two|three)( and (one|two|three)){2}" } });
    let response = server.ask("/v1/completions", &request);
    for choice in response["choices"].as_array().unwrap() {
        assert_eq!(choice["text"].as_str().unwrap().split(" and ").count(), 3, "{choice}");
    }
}

#[test]
fn models_are_chosen_by_name() {
    let server = server();
    let (status, list) = server.get("/v1/models");
    assert_eq!((status, &list["data"][1]["id"]), (200, &json!("austen/tiny")));
    assert_eq!(server.get("/v1/models/austen/tiny").1["max_model_len"], 512);
    assert_eq!(server.get("/v1/models/gpt-4").0, 404);
    let ask = |model: &str| {
        server.post("/v1/completions", &json!({ "model": model, "prompt": "x", "max_tokens": 1 }))
    };
    assert_eq!(ask("austen/tiny").1["model"], "austen/tiny");
    let (status, error) = ask("gpt-4");
    assert_eq!((status, &error["error"]["code"]), (404, &json!("model_not_found")));
    assert!(
        error["error"]["message"].as_str().unwrap().contains("`tiny`, `austen/tiny`"),
        "{error}"
    );
}

#[test]
fn an_answer_that_takes_too_long_ends() {
    let server = server_with(
        |_| {},
        |model| {
            model.request_timeout = Some(std::time::Duration::from_millis(1));
            model.engine.step_tokens = 32;
        },
    );
    let request = json!({ "prompt": PROMPT.repeat(30), "max_tokens": 400, "ignore_eos": true });
    let (status, error) = server.post("/v1/completions", &request);
    assert_eq!((status, &error["error"]["code"]), (504, &json!("timeout")), "{error}");
}

#[test]
fn embeddings_are_vectors_of_length_one() {
    let server = server();
    let ask = |body: Value| server.ask("/v1/embeddings", &body);
    let vector = |response: &Value, i: usize| -> Vec<f64> {
        let numbers = response["data"][i]["embedding"].as_array().unwrap();
        numbers.iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let texts = ["She was happy.", "She was glad.", "The 4th of July, 1776"];
    for pooling in ["mean", "last"] {
        let response = ask(json!({ "input": texts, "pooling": pooling }));
        let vectors: Vec<Vec<f64>> = (0..3).map(|i| vector(&response, i)).collect();
        let dot = |a: usize, b: usize| -> f64 {
            vectors[a].iter().zip(&vectors[b]).map(|(x, y)| x * y).sum()
        };
        assert!((dot(0, 0) - 1.0).abs() < 1e-5 && vectors[0].len() == 256);
        assert!(dot(0, 1) > dot(0, 2), "{pooling}: what means the same is nearer");
        let alone = ask(json!({ "input": texts[1], "pooling": pooling, "model": "tiny" }));
        assert_eq!(vector(&alone, 0), vectors[1]);
    }
    let response =
        ask(json!({ "input": texts[0], "encoding_format": "base64", "dimensions": 256 }));
    assert_eq!(
        response["data"][0]["embedding"].as_str().unwrap().len(),
        (256 * 4usize).div_ceil(3) * 4
    );
    assert_eq!(response["usage"]["prompt_tokens"], prompt_tokens(texts[0]));
    for (body, field) in [
        (json!({ "input": [] }), "input"),
        (json!({ "input": "x", "dimensions": 64 }), "dimensions"),
        (json!({ "input": "x", "encoding_format": "hex" }), "encoding_format"),
        (json!({}), "input"),
    ] {
        let (status, json) = server.post("/v1/embeddings", &body);
        assert_eq!((status, &json["error"]["param"]), (400, &json!(field)), "{json}");
    }
}

#[test]
fn the_page_is_there_and_runs_nothing_else() {
    let server = server_with(|config| config.api_keys = vec!["key".into()], |_| {});
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/markdown.js", "text/javascript; charset=utf-8"),
    ] {
        let mut response = Running::agent().get(server.url(path)).call().unwrap();
        assert_eq!(
            (response.status().as_u16(), &response.headers()["content-type"]),
            (200, &kind.parse().unwrap())
        );
        let policy = response.headers()["content-security-policy"].to_str().unwrap().to_owned();
        assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
        let text = response.body_mut().read_to_string().unwrap();
        assert!(!text.contains("src=\"http") && !text.contains("onclick=\""), "{path}");
    }
}
