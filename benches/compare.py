"""bevel and llama.cpp in turn on the same files, with the same threads.

    cargo build --release
    pip install llama-cpp-python==0.3.36        # CMAKE_ARGS=-DGGML_NATIVE=ON
    python benches/compare.py speed MODEL.gguf ... [--rounds 5] [--threads 1 2] --out benches/runs/NAME.json
    python benches/compare.py perplexity MODEL.gguf ... --text TEXT.txt [--tokens N] --out ...

Each round measures both programs once, one after the other, so that both see the same machine. The
result holds every sample, the medians and the ratio of medians, bevel over llama.cpp.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def call(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return json.loads(done.stdout)


def speed(args, model, threads):
    samples = {"bevel": {"prefill": [], "decode": []}, "llama.cpp": {"prefill": [], "decode": []}}
    for _ in range(args.rounds):
        ours = call([args.bevel, "bench", model, "-p", args.prompt, "-n", args.generate, "-r", 1,
                     "-t", threads, "--json"])
        theirs = [call([sys.executable, HERE / "rival.py", "speed", model, "--prompt", args.prompt,
                        "--generate", args.generate, "--repeat", 1, "--threads", threads, *flash])
                  for flash in ([], ["--flash"])]
        for what in ("prefill", "decode"):
            samples["bevel"][what].append(ours[what]["median"])
            # llama.cpp with and without its flash attention: whichever is faster.
            samples["llama.cpp"][what].append(max(t[what] for t in theirs))
    medians = {who: {what: statistics.median(v) for what, v in s.items()} for who, s in samples.items()}
    ratio = {w: medians["bevel"][w] / medians["llama.cpp"][w] for w in ("prefill", "decode")}
    return {"threads": threads, "ratio": ratio, "medians": medians, "samples": samples}


def perplexity(args, model, threads):
    extra = ["--tokens", args.tokens] if args.tokens else []
    ours = call([args.bevel, "eval", model, "--text", args.text, "--ctx", args.ctx, "-t", threads,
                 "--json", *extra])
    theirs = call([sys.executable, HERE / "rival.py", "perplexity", model, args.text,
                   "--ctx", args.ctx, "--threads", threads, *extra])
    for place in ("model", "text"):  # paths of this machine
        del ours[place]
    ratio = ours["perplexity"] / theirs["perplexity"]
    return {"ratio": ratio, "bevel": ours, "llama.cpp": theirs}


def cpu():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["speed", "perplexity"])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--bevel", default=HERE.parent / "target/release/bevel")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--text")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    measure = {"speed": speed, "perplexity": perplexity}[args.what]
    results = {}
    for model in args.models:
        for threads in args.threads:
            result = measure(args, model, threads)
            results.setdefault(model.name, []).append(result)
            print(model.name, threads, json.dumps(result["ratio"]), file=sys.stderr, flush=True)
    version = call([sys.executable, "-c", "import llama_cpp, json; print(json.dumps(llama_cpp.__version__))"])
    options = (["--rounds", args.rounds, "--prompt", args.prompt, "--generate", args.generate]
               if args.what == "speed" else
               ["--text", Path(args.text).name, "--ctx", args.ctx, "--tokens", args.tokens or "all"])
    shown = " ".join(map(str, ["python benches/compare.py", args.what, *(m.name for m in args.models),
                               "--threads", *args.threads, *options]))
    args.out.write_text(json.dumps({
        "command": shown,
        "machine": {"cpu": cpu(), "kernel": platform.release()},
        "llama-cpp-python": version,
        "results": results,
    }, indent=1) + "\n")


main()
