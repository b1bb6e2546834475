//! Clients that come in numbers, go away, or want too much.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::{Running, server, server_with};

const RUNNING: &str = "vllm:num_requests_running";

/// Sends a request and leaves the answer to the caller.
fn begin(server: &Running, path: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    stream
}

#[test]
fn a_client_that_goes_away_costs_nothing_more() {
    let server = server();
    let endless = json!({ "prompt": "x", "max_tokens": 480, "ignore_eos": true, "n": 4 });
    for stream in [true, false] {
        let mut request = endless.clone();
        request["stream"] = stream.into();
        let mut client = begin(&server, "/v1/completions", &request.to_string());
        server.wait_for(RUNNING, 4.0);
        if stream {
            client.read_exact(&mut [0; 64]).unwrap();
        }
        drop(client);
        server.wait_for(RUNNING, 0.0);
        server.wait_for("bevel:kv_blocks_used", 0.0);
    }
    let ended = "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"abort\"}";
    assert_eq!(server.metric(ended), 2.0);
}

#[test]
fn many_clients_at_once_get_what_each_gets_alone() {
    let server = server();
    let request = |i: usize| json!({ "prompt": format!("Chapter {i}"), "max_tokens": 12, "temperature": 0.8, "seed": i });
    let ask = |i: usize| server.ask("/v1/completions", &request(i))["choices"][0]["text"].clone();
    let alone: Vec<_> = (0..40).map(ask).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..40).map(|i| scope.spawn(move || ask(i))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
}

/// Few grammars are prepared at a time, and the others wait.
#[test]
fn many_grammars_at_once_are_all_followed() {
    let server = server();
    std::thread::scope(|scope| {
        for i in 0..40 {
            let server = &server;
            scope.spawn(move || {
                let regex = format!("n{i}=[0-9]{{3}}");
                let request = json!({ "prompt": "x", "structured_outputs": { "regex": regex } });
                let answer = server.ask("/v1/completions", &request);
                let text = answer["choices"][0]["text"].as_str().unwrap();
                assert!(text.starts_with(&format!("n{i}=")), "{text}");
            });
        }
    });
}

#[test]
fn a_thousand_connections_disturb_nobody() {
    // Both ends of each are in this process.
    bevel_base::raise_file_limit();
    let server = server();
    let idle: Vec<TcpStream> =
        (0..1000).map(|_| TcpStream::connect(server.address).unwrap()).collect();
    let start = Instant::now();
    server.ask("/v1/completions", &json!({ "prompt": "x", "max_tokens": 20 }));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    drop(idle);
}

/// What they have not read waits in the server, and nobody else does.
#[test]
fn clients_that_read_slowly_hold_nobody_up() {
    let server = server();
    // More than the sockets' buffers hold.
    let long = json!({ "prompt": ["x", "y", "z"], "max_tokens": 480, "ignore_eos": true, "n": 8, "logprobs": 20, "stream": true });
    let mut slow: Vec<TcpStream> =
        (0..2).map(|_| begin(&server, "/v1/completions", &long.to_string())).collect();
    server.wait_for(RUNNING, 8.0);
    let start = Instant::now();
    server.ask("/v1/completions", &json!({ "prompt": "x", "max_tokens": 20, "priority": -1 }));
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    // The engine goes on to the end of their answers.
    server.wait_for(RUNNING, 0.0);
    server.ask("/v1/completions", &json!({ "prompt": "x", "max_tokens": 20 }));
    server.end();
    for client in &mut slow {
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text.matches("\"finish_reason\":\"length\"").count(), 24);
        assert!(text.contains("[DONE]") && text.len() > 8 << 20, "{} bytes", text.len());
    }
    server.join();
}

#[test]
fn what_runs_may_end_before_the_server_does() {
    let server = server();
    let request = json!({ "prompt": "x", "max_tokens": 300, "ignore_eos": true, "stream": true });
    let mut client = begin(&server, "/v1/completions", &request.to_string());
    server.wait_for(RUNNING, 1.0);
    server.end();
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert!(text.contains("\"finish_reason\":\"length\"") && text.contains("[DONE]"), "{text}");
    let address = server.address;
    server.join();
    assert!(TcpStream::connect(address).is_err(), "nobody listens any more");
}

#[test]
fn a_client_that_says_nothing_is_not_waited_for() {
    let server = server();
    let silent: Vec<TcpStream> =
        ["", "POST /v1/comp", "POST /v1/completions HTTP/1.1\r\nhost: x\r\n"]
            .into_iter()
            .map(|begun| {
                let mut stream = TcpStream::connect(server.address).unwrap();
                stream.write_all(begun.as_bytes()).unwrap();
                stream
            })
            .collect();
    server.ask("/v1/completions", &json!({ "prompt": "x", "max_tokens": 1 }));
    let start = Instant::now();
    server.end();
    server.join();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    drop(silent);
}

#[test]
fn a_request_has_a_number() {
    let server = server();
    let id = |given: Option<&str>| {
        let mut request = Running::agent().get(server.url("/health"));
        if let Some(given) = given {
            request = request.header("x-request-id", given);
        }
        let response = request.call().unwrap();
        response.headers()["x-request-id"].to_str().unwrap().to_owned()
    };
    assert_eq!(id(Some("mine-7")), "mine-7");
    assert!(id(None).starts_with("req-") && id(None) != id(None));
}

#[test]
fn answers_come_over_tls() {
    let dir = tempfile::tempdir().unwrap();
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let files = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&files.0, cert.pem()).unwrap();
    std::fs::write(&files.1, signing_key.serialize_pem()).unwrap();
    let server = server_with(|config| config.tls = Some(files), |_| {});
    let tls = ureq::tls::TlsConfig::builder().disable_verification(true).build();
    let agent: ureq::Agent = ureq::Agent::config_builder().tls_config(tls).build().into();
    let url = server.url("/v1/completions").replace("http://", "https://");
    let mut response = agent.post(url).send("{\"prompt\": \"x\", \"max_tokens\": 3}").unwrap();
    let answer = response.body_mut().read_to_string().unwrap();
    assert!(answer.contains("\"finish_reason\""), "{answer}");
    assert!(ureq::get(server.url("/health")).call().is_err(), "nothing is said in the clear");
}
