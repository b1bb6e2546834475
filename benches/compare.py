"""bevel and its rivals in turn on the same files, with the same threads.

    python benches/compare.py speed [MODEL.gguf ...] [--rounds 5] [--threads 1 2] --out benches/runs/NAME.json
    python benches/compare.py perplexity MODEL.gguf ... --text TEXT.txt [--tokens N] --out ...

llama.cpp is llama-cpp-python, which the first run installs into `target/compare`, built for this machine
(ten minutes on two cores), and bevel is built. Without models: SmolLM2 in four types.
Other builds of llama.cpp join by their llama-bench: `--rival "ik_llama.cpp=PATH/llama-bench -rtr 1"`.

Each round measures every program once, one after the other, so that all see the same machine. The
result holds every sample, the medians and the ratios of medians, bevel over each rival. What part of the
machine's limits each decoding reaches is held against the bandwidth that bevel measured in the same runs.
"""

import argparse
import json
import os
import platform
import shlex
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


def llama_cpp_python(args, model, threads):
    """llama.cpp with and without its flash attention: whichever is faster."""
    command = [sys.executable, HERE / "rival.py", "speed", model, "--prompt", args.prompt, "--generate",
               args.generate, "--repeat", 1, "--threads", threads]
    runs = [call([*command, *flash]) for flash in ([], ["--flash"])]
    return {what: max(run[what] for run in runs) for what in ("prefill", "decode")}


def llama_bench(command, args, model, threads):
    """A llama-bench, with and without flash attention: whichever is faster."""
    best = {"prefill": 0, "decode": 0}
    for flash in (0, 1):
        for run in call([*shlex.split(command), "-m", model, "-p", args.prompt, "-n", args.generate,
                         "-t", threads, "-r", 1, "-fa", flash, "-o", "json"]):
            what = "prefill" if run["n_prompt"] else "decode"
            best[what] = max(best[what], run["avg_ts"])
    return best


def speed(args, model, threads):
    rivals = {"llama.cpp": lambda: llama_cpp_python(args, model, threads)}
    for rival in args.rival:
        name, _, command = rival.partition("=")
        rivals[name] = lambda command=command: llama_bench(command, args, model, threads)
    samples = {who: {"prefill": [], "decode": []} for who in ("bevel", *rivals)}
    limits = {"read_bandwidth": [], "decode_part": [], "prefill_part": []}
    for _ in range(args.rounds):
        ours = call([args.bevel, "bench", model, "-p", args.prompt, "-n", args.generate, "-r", 1,
                     "-t", threads, "--json"])
        for what in ("prefill", "decode"):
            samples["bevel"][what].append(ours[what]["median"])
        for name, values in limits.items():
            values.append(ours["limits"][name])
        for who, measure in rivals.items():
            theirs = measure()
            for what in ("prefill", "decode"):
                samples[who][what].append(theirs[what])
    medians = {who: {what: statistics.median(v) for what, v in s.items()} for who, s in samples.items()}
    ratio = {who: {w: medians["bevel"][w] / medians[who][w] for w in ("prefill", "decode")}
             for who in rivals}
    limits = {name: statistics.median(values) for name, values in limits.items()}
    return {"threads": threads, "ratio": ratio, "limits": limits, "medians": medians, "samples": samples}


def table(results):
    """Medians in tokens a second, prefill and decoding, and bevel's multiple of each."""
    lines = []
    for model, runs in results.items():
        for run in runs:
            limits = run["limits"]
            lines.append(f"{model}, {run['threads']} threads")
            for who, median in run["medians"].items():
                times = run["ratio"].get(who)
                times = f"   bevel x{times['prefill']:.2f} x{times['decode']:.2f}" if times else ""
                lines.append(f"  {who:14} {median['prefill']:8.1f} {median['decode']:8.1f}{times}")
            lines.append(f"  memory gives {limits['read_bandwidth'] / 1e9:.1f} GB/s, of which bevel's "
                         f"decoding reads {limits['decode_part']:.0%}; its prefill reaches "
                         f"{limits['prefill_part']:.0%} of the processor's products")
    return "\n".join(lines)


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


def install():
    """Goes on in an environment of its own where llama-cpp-python is missing."""
    try:
        import llama_cpp  # noqa: F401
        return
    except ImportError:
        pass
    home = HERE.parent / "target/compare"
    python = home / "bin/python"
    if sys.prefix == str(home.resolve()):
        sys.exit("llama-cpp-python is installed but cannot be loaded")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "llama-cpp-python==0.3.36"], check=True,
                       env={**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"})
    os.execv(python, [python, *sys.argv])


def small_models(bevel):
    """SmolLM2 in four types, in `target/compare`."""
    home = HERE.parent / "target/compare"
    models = [home / f"smollm2-{kind}.gguf" for kind in ("Q4_0", "Q4_K_M", "Q8_0", "F16")]
    for model in models:
        if not model.exists():
            kind = model.stem.split("-")[1]
            subprocess.run([bevel, "quantize", "smollm2", kind, "-o", model], check=True)
    return models


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["speed", "perplexity"])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--bevel", type=Path)
    parser.add_argument("--rival", action="append", default=[], metavar="NAME=LLAMA-BENCH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--text")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    install()
    if not args.bevel:
        subprocess.run(["cargo", "build", "--release", "-p", "bevel"], cwd=HERE.parent, check=True)
        args.bevel = HERE.parent / "target/release/bevel"
    args.models = args.models or small_models(args.bevel)
    measure = {"speed": speed, "perplexity": perplexity}[args.what]
    results = {}
    for model in args.models:
        for threads in args.threads:
            result = measure(args, model, threads)
            results.setdefault(model.name, []).append(result)
            print(model.name, threads, json.dumps(result["ratio"]), file=sys.stderr, flush=True)
    version = call([sys.executable, "-c", "import llama_cpp, json; print(json.dumps(llama_cpp.__version__))"])
    if args.what == "speed":
        print(table(results))
    rivals = []
    for name, _, command in (rival.partition("=") for rival in args.rival):
        program, *options = shlex.split(command)
        rivals.append(f'--rival "{" ".join([f"{name}={Path(program).name}", *options])}"')
    options = (["--rounds", args.rounds, "--prompt", args.prompt, "--generate", args.generate, *rivals]
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
