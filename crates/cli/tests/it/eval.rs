use crate::{chat_model, check_failure, json, output, output_with_input, scratch, stdout};

const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tour.txt");

#[test]
fn both_conventions() {
    let common =
        ["eval", "tiny-austen", "--text", TEXT, "--ctx", "64", "--tokens", "256", "--json"];
    let llama = json(&common);
    assert_eq!(llama["convention"], "llama.cpp");
    assert_eq!((&llama["windows"], &llama["scored_tokens"]), (&4.into(), &124.into()));
    let strided = json(&[&common[..], &["--stride", "32"]].concat());
    assert_eq!(strided["convention"], "strided");
    assert_eq!((&strided["windows"], &strided["scored_tokens"]), (&7.into(), &255.into()));
    for value in [&llama, &strided] {
        let number = |key: &str| value[key].as_f64().unwrap();
        assert!((number("perplexity").ln() - number("nats_per_token")).abs() < 1e-9);
        // The model has perplexity 54 on unseen Austen; this is a short and easy piece of it.
        assert!((15.0..150.0).contains(&number("perplexity")), "{value}");
        assert!((1.0..3.0).contains(&number("bits_per_byte")), "{value}");
    }
}

#[test]
fn figures_for_people() {
    let args = ["eval", "tiny-austen", "--text", TEXT, "--ctx", "64", "--tokens", "128"];
    let text = stdout(&output(&args));
    for part in ["perplexity ", " ± ", "95 %", "bits per byte", "62 tokens", "2 windows of 64"] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}

#[test]
fn texts_that_cannot_be_used() {
    let dir = scratch();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let eval = |text: &str| output(&["eval", "tiny-austen", "--text", text]);
    check_failure(&eval("no-such.txt"), 1, &["`no-such.txt`"]);
    check_failure(&eval(dir.path().to_str().unwrap()), 1, &["cannot read"]);
    check_failure(&eval(&file("empty.txt", b"")), 1, &["is empty"]);
    check_failure(&eval(&file("short.txt", b"Too short.")), 1, &["a window takes 512"]);
    let broken = eval(&file("broken.txt", b"fine\nnot \xfffine"));
    check_failure(&broken, 1, &["0xFF", "offset 9", "line 2"]);
    let piped = output_with_input(&["eval", "tiny-austen", "--text", "-"], b"\xc3");
    check_failure(&piped, 1, &["stdin is not UTF-8"]);
    let stride = output(&["eval", "tiny-austen", "--text", TEXT, "--stride", "600"]);
    check_failure(&stride, 1, &["a stride of 600"]);
}

#[test]
fn speed_as_a_table_and_as_json() {
    let args = ["bench", "tiny-austen", "-p", "32", "-n", "4", "-r", "2"];
    let text = stdout(&output(&args));
    for part in ["prefill", "decode", "median", "memory", "threads"] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    let value = json(&[&args[..], &["--json", "-d", "10"]].concat());
    assert_eq!(value["depth"], 10);
    assert_eq!(value["parameters"], 4_196_608);
    for what in ["prefill", "decode"] {
        assert_eq!(value[what]["samples"].as_array().unwrap().len(), 2);
        for key in ["mean", "deviation", "median", "min", "max"] {
            assert!(value[what][key].as_f64().unwrap() >= 0.0, "{what} {key}");
        }
    }
    assert!(value["machine"]["isa"].is_string() && value["machine"]["threads"].is_number());
}

#[test]
fn divergence_from_another_model() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (small, logits) = (path("small.gguf"), path("base.logits"));
    stdout(&output(&["quantize", "tiny-austen", "Q4_0", "-o", &small]));
    let common = [
        "eval",
        &small,
        "--against",
        "tiny-austen",
        "--text",
        TEXT,
        "--ctx",
        "64",
        "--tokens",
        "256",
    ];
    let run = |more: &[&str]| json(&[&common[..], more, &["--json"]].concat());
    let exact = run(&[]);
    let kl = |value: &serde_json::Value| value["kl"]["value"].as_f64().unwrap();
    assert!((1e-3..0.3).contains(&kl(&exact)), "{exact}");
    assert_eq!((&exact["windows"], &exact["scored_tokens"]), (&4.into(), &124.into()));
    assert!(exact["ln_ratio"]["error"].as_f64() < exact["standard_error"].as_f64());
    assert!(exact["same_top"]["value"].as_f64().unwrap() > 0.7);
    assert!(exact["kl_quantiles"]["q999"].as_f64() <= exact["kl_quantiles"]["max"].as_f64());
    assert_eq!(exact["file"]["path"], small.as_str());
    assert_eq!(exact["file"]["bytes"], std::fs::metadata(&small).unwrap().len());
    assert!(exact["file"]["provenance"]["recipe"].as_str().unwrap().contains("Q4_0"));
    assert!(
        exact["file"]["bits_per_weight"].as_f64() < exact["base_file"]["bits_per_weight"].as_f64()
    );

    // The first run writes the file, the second and the third read it.
    let kept = run(&["--base-logits", &logits]);
    let again = run(&["--base-logits", &logits]);
    assert!((kl(&kept) - kl(&exact)).abs() < 1e-5);
    assert_eq!(kl(&kept), kl(&again));
    let text = stdout(&output(&[
        "eval",
        &small,
        "--against",
        &logits,
        "--text",
        TEXT,
        "--ctx",
        "64",
        "--tokens",
        "128",
    ]));
    for part in
        ["perplexity ", "KL divergence", "same top token", "RMS Δp", "99.9 %", "correlation"]
    {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    let other =
        ["eval", "tiny-austen", "--against", &small, "--base-logits", &logits, "--text", TEXT];
    check_failure(&output(&other), 1, &["another model", "base.logits"]);
    let window = ["eval", &small, "--against", &logits, "--text", TEXT];
    check_failure(&output(&window), 1, &["--ctx 64"]);
    for more in [&["--against", &logits][..], &["--against", &small, "--base-logits", &logits]] {
        let exact =
            [&["eval", &small, "--text", TEXT, "--ctx", "64", "--base-exact"], more].concat();
        check_failure(&output(&exact), 1, &["predictions already", "--base-exact"]);
    }
}

/// The bound that docs/speed.md states: predictions on two instruction sets have a divergence below 1e-4.
#[test]
fn instruction_sets_predict_the_same() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (small, logits) = (path("small.gguf"), path("scalar.logits"));
    stdout(&output(&["quantize", "tiny-austen", "Q4_0", "-o", &small]));
    let args = ["eval", &small, "--against", &small, "--base-logits", &logits, "--text", TEXT];
    let args = [&args[..], &["--ctx", "64", "--tokens", "512", "--json"]].concat();
    // The first, which is scalar, leaves its predictions for the others.
    for isa in bevel::kernels::Isa::available() {
        let run = crate::bevel(&args).env("BEVEL_ISA", isa.to_string()).output().unwrap();
        let value: serde_json::Value = serde_json::from_str(&stdout(&run)).unwrap();
        let (kl, worst) = (&value["kl"]["value"], &value["kl_quantiles"]["max"]);
        let (kl, worst) = (kl.as_f64().unwrap(), worst.as_f64().unwrap());
        assert_eq!(value["isa"], isa.to_string());
        assert!(kl < 1e-4 && worst < 2e-3, "{isa}: {kl:e}, {worst:e} at worst");
    }
}

#[test]
fn exact_products_tell_what_rounding_activations_costs() {
    let dir = scratch();
    let small = dir.path().join("small.gguf");
    let small = small.to_str().unwrap();
    stdout(&output(&["quantize", "tiny-austen", "Q8_0", "-o", small]));
    let run = |more: &[&str]| {
        let common = ["eval", small, "--text", TEXT, "--ctx", "64", "--tokens", "256", "--json"];
        json(&[&common, more].concat())
    };
    let kl = |more: &[&str]| {
        let value = run(&[&["--against", small], more].concat());
        value["kl"]["value"].as_f64().unwrap()
    };
    let rounding = kl(&["--base-exact"]);
    assert!((1e-7..1e-3).contains(&rounding), "{rounding}");
    assert!(kl(&["--exact"]) < 1e-9, "both are exact");
    let perplexity = |more: &[&str]| run(more)["perplexity"].as_f64().unwrap();
    let (exact, rounded) = (perplexity(&["--exact"]), perplexity(&[]));
    assert!(exact != rounded && (exact / rounded - 1.0).abs() < 5e-3, "{exact}, {rounded}");
    for verb in ["run", "bench"] {
        let more: &[&str] =
            if verb == "run" { &["It was", "-n", "4"] } else { &["-p", "8", "-n", "4", "-r", "1"] };
        json(&[&[verb, small, "--exact", "--json"], more].concat());
    }
}

#[test]
fn multiple_choice() {
    let dir = scratch();
    let file = dir.path().join("questions.jsonl");
    let file = file.to_str().unwrap();
    let lines = concat!(
        "{\"prompt\": \"She was very much\", \"choices\": [\"obliged to him\", \"xylophone\"], \"answer\": \"A\", \"subject\": \"manners\"}\n",
        "{\"question\": \"Who is there?\", \"choices\": [\"Mr. Darcy.\", \"Qz.\"], \"answer\": 0, \"subject\": \"people\"}\n",
    );
    std::fs::write(file, lines).unwrap();
    let value =
        json(&["eval", "tiny-austen", "--choices", file, "--against", "tiny-austen", "--json"]);
    assert_eq!(value["questions"], 2);
    assert_eq!(value["acc_norm"]["value"], 1.0);
    assert_eq!(value["agreement"]["acc"]["value"], 1.0);
    assert_eq!(value["base"]["acc"], value["acc"]);
    assert_eq!(value["subjects"][1]["subject"], "people");
    assert_eq!(value["answers"][0]["log_likelihoods"].as_array().unwrap().len(), 2);
    let chatty = chat_model(&dir);
    let chatty = chatty.to_str().unwrap();
    let text = stdout(&output(&["eval", chatty, "--choices", file, "--chat"]));
    for part in ["questions", "acc_norm", "manners", "people", "all", "tokens run"] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    check_failure(&output(&["eval", "tiny-austen", "--choices", file, "--chat"]), 1, &["--chat"]);
    std::fs::write(file, format!("{lines}{{\"prompt\": 3}}\n")).unwrap();
    let broken = output(&["eval", "tiny-austen", "--choices", file]);
    check_failure(&broken, 1, &["questions.jsonl", "line 3"]);
}

#[test]
fn a_page_over_several_models() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let logits = path("base.logits");
    let mut reports = Vec::new();
    for mix in ["Q8_0", "Q4_0", "Q5_0"] {
        let (model, report) = (path(&format!("a<b>.{mix}.gguf")), path(&format!("{mix}.json")));
        stdout(&output(&["quantize", "tiny-austen", mix, "-o", &model]));
        let eval = [
            "eval",
            &model,
            "--against",
            "tiny-austen",
            "--base-logits",
            &logits,
            "--text",
            TEXT,
            "--ctx",
            "64",
            "--tokens",
            "256",
            "--json",
        ];
        std::fs::write(&report, stdout(&output(&eval))).unwrap();
        reports.push(report);
    }
    let speed = path("speed.json");
    let model = path("a<b>.Q8_0.gguf");
    let bench = output(&["bench", &model, "-p", "0", "-n", "2", "-r", "1", "--json"]);
    std::fs::write(&speed, stdout(&bench)).unwrap();

    let page = path("page.html");
    let compare = |reports: &[&str], more: &[&str]| {
        output(&[&["compare"], reports, &["-o", &page], more].concat())
    };
    let all: Vec<&str> = reports.iter().chain([&speed]).map(String::as_str).collect();
    let value: serde_json::Value =
        serde_json::from_str(&stdout(&compare(&all, &["--json"]))).unwrap();
    // The largest first, whatever the order of the arguments.
    let runs = value["runs"].as_array().unwrap();
    let models: Vec<&str> = runs.iter().map(|run| run["model"].as_str().unwrap()).collect();
    assert!(models[0].ends_with("Q8_0.gguf") && models[2].ends_with("Q4_0.gguf"), "{models:?}");
    assert!(runs[0]["decode_tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(runs[1]["decode_tokens_per_second"].is_null());
    let html = std::fs::read_to_string(&page).unwrap();
    for part in
        ["3 models against tiny-austen", "a&lt;b&gt;.Q5_0", "Size and divergence", "Recipes"]
    {
        assert!(html.contains(part), "no `{part}` in the page");
    }
    assert!(!html.contains("a<b>"));
    assert_eq!(html.matches("<tr").count(), 4);

    check_failure(&compare(&all, &[]), 1, &["page.html", "--force"]);
    check_failure(&compare(&[&speed], &["--force"]), 1, &["no report"]);
    check_failure(&compare(&[&reports[0], TEXT], &["--force"]), 1, &["tour.txt"]);
    let other = path("other.json");
    let changed =
        std::fs::read_to_string(&reports[0]).unwrap().replace("\"context\": 64", "\"context\": 32");
    std::fs::write(&other, changed).unwrap();
    check_failure(
        &compare(&[&reports[1], &other], &["--force"]),
        1,
        &["windows of 64 and of 32 tokens"],
    );
}
