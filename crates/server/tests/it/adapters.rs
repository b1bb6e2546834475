//! Adapters that requests choose, by name and by number, and that come and go.

use std::path::Path;
use std::sync::Arc;

use bevel_base::DType;
use bevel_engine::EngineConfig;
use bevel_kernels::Cpu;
use bevel_model::{Adapter, AdapterFile, Checkpoint, LowRank, ModelConfig};
use bevel_server::{AdapterToServe, ModelToServe};
use serde_json::{Value, json};

use crate::running::{Running, loaded, serve, tiny_austen, to_serve};

/// An adapter that changes what the model says.
fn file(config: &ModelConfig, seed: usize) -> AdapterFile {
    let mut file = AdapterFile::new("test");
    for weight in ["blk.0.attn_v.weight", "blk.0.attn_output.weight", "blk.1.ffn_down.weight"] {
        let Some(&[rows, cols]) = config.tensor_shape(weight).as_deref() else { continue };
        let value = |i: usize| ((i * 7919 + seed * 31) % 101) as f32 / 250.0 - 0.2;
        let (a, b) = ((0..4 * cols).map(value).collect(), (0..rows * 4).map(value).collect());
        let matrix = LowRank {
            rank: 4,
            alpha: 8.0,
            rank_stabilized: false,
            dtype: DType::F32,
            a,
            b,
            magnitude: None,
        };
        file.insert(config, weight, matrix).unwrap();
    }
    file
}

/// A server of the model with two adapters, one of which counts half by its name.
fn server(may_load: bool) -> Running {
    let cpu = Arc::new(Cpu::new(2).unwrap());
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    let config = checkpoint.config();
    let adapter = |name: &str, seed, scale| AdapterToServe {
        name: name.to_owned(),
        path: format!("adapters/{name}").into(),
        adapter: Arc::new(Adapter::new(&file(config, seed), &checkpoint, &cpu).unwrap()),
        scale,
    };
    let adapters = vec![adapter("one", 1, 1.0), adapter("half", 2, 0.5)];
    let load = Box::new(|| Ok(loaded(EngineConfig::new(512, 8))));
    let open = move |path: &Path| {
        Adapter::open(path, &checkpoint, &cpu).map_err(|error| error.to_string())
    };
    let tiny = to_serve("tiny", 1, load);
    let load_adapter = may_load.then_some(Box::new(open) as _);
    serve(|_| {}, vec![ModelToServe { adapters, load_adapter, ..tiny }])
}

const PROMPT: &str = "She was the youngest of the two daughters of a most affectionate, indulgent \
    father, and had been mistress of his house from a very early period.";

fn request(with: &Value) -> Value {
    let mut request = json!({ "prompt": PROMPT, "max_tokens": 12, "temperature": 0.0 });
    request.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    request
}

fn text(server: &Running, with: &Value) -> String {
    let answer = server.ask("/v1/completions", &request(with));
    answer["choices"][0]["text"].as_str().unwrap().to_owned()
}

#[test]
fn requests_choose_adapters_by_name_and_by_number() {
    let server = server(false);
    let plain = text(&server, &json!({}));
    let named: Vec<String> =
        ["one", "half"].iter().map(|name| text(&server, &json!({ "model": name }))).collect();
    assert!(named[0] != plain && named[1] != plain && named[0] != named[1]);
    let scales = |one: f32, two: f32| {
        let lora = json!([{ "id": 0, "scale": one }, { "id": 1, "scale": two }]);
        text(&server, &json!({ "lora": lora }))
    };
    assert_eq!([scales(0.0, 0.0), scales(1.0, 0.0)], [plain.clone(), named[0].clone()]);
    assert_eq!(scales(0.0, 0.5), named[1]);
    assert!(![&plain, &named[0], &named[1]].contains(&&scales(1.0, 0.5)));
    assert_eq!(text(&server, &json!({ "lora": [{ "id": 0, "scale": 1 }] })), named[0]);
    let answer = server.ask("/v1/completions", &request(&json!({ "model": "one" })));
    assert_eq!(answer["model"], "one");
    // What one of them read is nothing to the others.
    assert!(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(0));

    // All at once they get what they get alone.
    let wanted = [("tiny", &plain), ("one", &named[0]), ("half", &named[1])];
    std::thread::scope(|scope| {
        for (name, expected) in wanted.iter().cycle().take(12) {
            let server = &server;
            scope.spawn(move || assert_eq!(text(server, &json!({ "model": name })), **expected));
        }
    });
    for path in ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"] {
        let mut ask = json!({ "model": "one" });
        match path {
            "/v1/responses" | "/v1/embeddings" => ask["input"] = "Who?".into(),
            _ => ask["messages"] = json!([{ "role": "user", "content": "Who?" }]),
        }
        if path == "/v1/messages" {
            ask["max_tokens"] = 4.into();
        }
        assert_eq!(server.ask(path, &ask)["model"], "one", "{path}");
    }
}

#[test]
fn adapters_are_listed_as_models_are() {
    let server = server(false);
    let list = server.get("/v1/models").1;
    let ids: Vec<&Value> = list["data"].as_array().unwrap().iter().map(|m| &m["id"]).collect();
    assert_eq!(ids, ["tiny", "one", "half"]);
    let one = server.get("/v1/models/one").1;
    assert_eq!((&one["parent"], &one["root"]), (&json!("tiny"), &json!("adapters/one")));
    let (status, error) = server.post("/v1/completions", &request(&json!({ "model": "two" })));
    assert_eq!((status, &error["error"]["code"]), (404, &json!("model_not_found")));
    assert!(error["error"]["message"].as_str().unwrap().contains("`half`"), "{error}");

    // How strongly they count for those who do not say.
    let plain = text(&server, &json!({}));
    let one = text(&server, &json!({ "model": "one" }));
    let set = |scales: Value| server.post("/lora-adapters", &scales);
    assert_eq!(set(json!([{ "id": 0, "scale": 1.0 }])).0, 200);
    assert_eq!(text(&server, &json!({})), one);
    assert_eq!(text(&server, &json!({ "lora": [] })), plain);
    let list = server.get("/lora-adapters").1;
    let expected = json!({ "id": 0, "name": "one", "path": "adapters/one", "scale": 1.0 });
    assert_eq!((&list[0], &list[1]["scale"]), (&expected, &json!(0.0)));
    assert_eq!(set(json!([])).0, 200);
    assert_eq!(text(&server, &json!({})), plain);
    for (wrong, expected) in [
        (json!([{ "id": 7, "scale": 1 }]), "number 7"),
        (json!([{ "id": 0, "scale": 1e39 }]), "single precision"),
        (json!([{ "id": 0 }]), "scale"),
        (json!([{ "id": 0, "scale": 1, "more": 1 }]), "more"),
        (json!({}), "list"),
    ] {
        let (status, error) = set(wrong.clone());
        let message = error["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.contains(expected), "{error}");
        let (status, error) = server.post("/v1/completions", &request(&json!({ "lora": wrong })));
        assert!(status == 400 && error.to_string().contains("lora"), "{error}");
    }
    let both = json!({ "model": "one", "lora": [{ "id": 0, "scale": 1 }] });
    let (status, error) = server.post("/v1/completions", &request(&both));
    assert!(status == 400 && error["error"]["param"] == "lora", "{error}");
    let (status, _) = server.post("/tokenize", &json!({ "prompt": "x", "lora": [] }));
    assert_eq!(status, 400, "tokens do not depend on adapters");
}

#[test]
fn adapters_come_and_go_where_the_operator_allows_it() {
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    let config = checkpoint.config();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.gguf");
    file(config, 1).write_gguf(&path, config).unwrap();
    let load = json!({ "lora_name": "new", "lora_path": path });
    let unload = json!({ "lora_name": "new" });
    let closed = server(false);
    for (path, body) in [("/v1/load_lora_adapter", &load), ("/v1/unload_lora_adapter", &unload)] {
        assert_eq!(closed.post(path, body).0, 403, "{path}");
    }
    let server = server(true);
    assert_eq!(server.post("/v1/unload_lora_adapter", &unload).0, 404);
    server.ask("/v1/load_lora_adapter", &load);
    assert_eq!(server.post("/v1/load_lora_adapter", &load).0, 400, "the name is taken");
    let one = text(&server, &json!({ "model": "one" }));
    assert_eq!(text(&server, &json!({ "model": "new" })), one);
    assert_eq!(server.get("/lora-adapters").1[2]["id"], 2);
    server.ask("/v1/unload_lora_adapter", &unload);
    assert_eq!(server.post("/v1/completions", &request(&json!({ "model": "new" }))).0, 404);
    server.ask("/v1/load_lora_adapter", &load);
    assert_eq!(server.get("/lora-adapters").1[2]["id"], 3, "numbers are not given twice");
    let gone = json!({ "lora_name": "gone", "lora_path": dir.path().join("gone") });
    let (status, error) = server.post("/v1/load_lora_adapter", &gone);
    assert!(status == 400 && error["error"]["param"] == "lora_path", "{error}");
    let mystery = json!({ "lora_name": "x", "lora_path": path, "mystery": 1 });
    let (status, error) = server.post("/v1/load_lora_adapter", &mystery);
    assert!(status == 400 && error["error"]["param"] == "mystery", "{error}");
}
