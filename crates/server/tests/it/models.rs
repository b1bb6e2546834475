//! Models that come when they are asked for, and go.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bevel_engine::EngineConfig;
use bevel_server::{ModelToServe, Server, ServerConfig};
use serde_json::{Value, json};

use crate::running::{Running, loaded, serve, to_serve};

/// A model that takes so much memory and counts how often it is loaded.
fn model(name: &str, memory: u64, loads: &Arc<AtomicUsize>) -> ModelToServe {
    let loads = loads.clone();
    let load = move || {
        loads.fetch_add(1, Ordering::SeqCst);
        Ok(loaded(EngineConfig::new(512, 8)))
    };
    to_serve(name, memory, Box::new(load))
}

/// The models that are loaded.
fn there(server: &Running) -> Vec<String> {
    let list = server.get("/v1/models").1;
    let loaded = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|model| model["status"]["value"] == "loaded");
    loaded.map(|model| model["id"].as_str().unwrap().to_owned()).collect()
}

fn ask(server: &Running, name: &str) -> Value {
    let request = json!({ "model": name, "prompt": "She", "max_tokens": 3 });
    server.ask("/v1/completions", &request)["choices"][0]["text"].clone()
}

#[test]
fn the_model_that_was_used_longest_ago_makes_way() {
    let loads = Arc::new(AtomicUsize::new(0));
    let models = vec![model("a", 4, &loads), model("b", 3, &loads), model("c", 5, &loads)];
    let server = serve(|config| config.memory = Some(8), models);
    assert_eq!(there(&server), ["a", "b"], "as many as fit are there from the beginning");
    let text = ask(&server, "a");
    // Only b is in the way.
    assert_eq!(ask(&server, "b"), text);
    assert_eq!(ask(&server, "a"), text);
    assert_eq!(loads.load(Ordering::SeqCst), 2);
    assert_eq!(ask(&server, "c"), text);
    assert_eq!(there(&server), ["c"], "a takes 4, and 8 - 5 are left");
    assert_eq!(ask(&server, "b"), text);
    assert_eq!(there(&server), ["b", "c"]);
    assert_eq!(loads.load(Ordering::SeqCst), 4);
    // A request that names none is for the first.
    server.ask("/v1/completions", &json!({ "prompt": "She", "max_tokens": 1 }));
    assert_eq!(there(&server), ["a", "b"]);
    assert_eq!(server.get("/health").0, 200);
    assert_eq!(server.get("/v1/models/c").1["max_model_len"], 512);
}

#[test]
fn a_model_that_answers_is_waited_for() {
    let loads = Arc::new(AtomicUsize::new(0));
    let models = vec![model("a", 5, &loads), model("b", 5, &loads)];
    let server = serve(|config| config.memory = Some(5), models);
    let mut long = json!({ "model": "a", "prompt": "x", "max_tokens": 400, "ignore_eos": true });
    long["stream"] = true.into();
    let stream = Running::agent().post(server.url("/v1/completions")).send(&long.to_string());
    let mut lines = BufReader::new(stream.unwrap().into_body().into_reader()).lines();
    lines.next().unwrap().unwrap();
    // Those who ask for the other one meanwhile share one load; who asks for the first comes after them.
    std::thread::scope(|scope| {
        let others: Vec<_> = (0..4).map(|_| scope.spawn(|| ask(&server, "b"))).collect();
        let rest: Vec<String> = lines.map(Result::unwrap).collect();
        assert!(rest.iter().any(|line| line.contains("\"finish_reason\":\"length\"")));
        others.into_iter().for_each(|other| drop(other.join().unwrap()));
    });
    assert_eq!((there(&server), loads.load(Ordering::SeqCst)), (vec!["b".to_owned()], 2));
}

#[test]
fn models_come_and_go_as_they_are_told() {
    let loads = Arc::new(AtomicUsize::new(0));
    let models = vec![model("a", 1, &loads), model("b", 1, &loads)];
    let server = serve(|_| {}, models);
    assert_eq!(there(&server), ["a", "b"]);
    server.ask("/models/unload", &json!({ "model": "a" }));
    server.ask("/models/unload", &json!({ "model": "a" }));
    assert_eq!(there(&server), ["b"]);
    assert_eq!(server.get("/health").0, 200);
    server.ask("/models/load", &json!({ "model": "a" }));
    assert_eq!((there(&server).len(), loads.load(Ordering::SeqCst)), (2, 3));
    for path in ["/models/load", "/models/unload"] {
        assert_eq!(server.post(path, &json!({ "model": "c" })).0, 404);
        assert_eq!(server.post(path, &json!({})).0, 400);
    }
}

#[test]
fn a_model_that_nobody_asks_for_goes() {
    let loads = Arc::new(AtomicUsize::new(0));
    let models = vec![model("a", 1, &loads)];
    let after = Duration::from_millis(60);
    let server = serve(|config| config.unload_after = Some(after), models);
    assert_eq!(there(&server), ["a"]);
    // An answer may take longer.
    let start = Instant::now();
    let long = json!({ "prompt": "x", "max_tokens": 500, "ignore_eos": true, "n": 8 });
    server.ask("/v1/completions", &long);
    assert!(start.elapsed() > after, "the answers took {:?} only", start.elapsed());
    let waiting = Instant::now();
    while !there(&server).is_empty() {
        assert!(waiting.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(waiting.elapsed() > after / 2);
    ask(&server, "a");
    assert_eq!(loads.load(Ordering::SeqCst), 2);
}

#[test]
fn a_model_that_does_not_load_says_why() {
    let loads = Arc::new(AtomicUsize::new(0));
    let broken = |name: &str| ModelToServe {
        load: Box::new(|| Err("the file is gone".to_owned())),
        ..model(name, 2, &Arc::default())
    };
    let config = || {
        let mut config = ServerConfig::new(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        config.memory = Some(2);
        config
    };
    let models = vec![model("a", 2, &loads), broken("b")];
    let server = serve(|config| config.memory = Some(2), models);
    let (status, error) = server.post("/v1/completions", &json!({ "model": "b", "prompt": "x" }));
    assert_eq!((status, &error["error"]["code"]), (500, &json!("model_not_loaded")));
    assert!(error["error"]["message"].as_str().unwrap().contains("the file is gone"), "{error}");
    ask(&server, "a");
    // At the beginning it ends the server.
    let error = Server::bind(config(), vec![broken("b")]).unwrap_err().to_string();
    assert!(error.contains("`b`") && error.contains("the file is gone"), "{error}");
    let error = Server::bind(config(), vec![model("huge", 3, &loads)]).unwrap_err().to_string();
    assert!(error.contains("`huge`") && error.contains("3 bytes"), "{error}");
}
