"""bevel and its rivals in turn on the same files, with the same threads.

    python benches/compare.py speed [MODEL.gguf ...] [--sequences 8] [--depth 8192] [--busy 2] --out FILE.json
    python benches/compare.py load [MODEL.gguf ...] --out FILE.json
    python benches/compare.py perplexity MODEL.gguf ... --text TEXT.txt [--tokens N] --out FILE.json

`speed`: a prompt, and decoding, of one sequence or of several together, behind `--depth` tokens. With
`--busy N` as many other processes keep processors busy in every second measurement, and what is left of the
speed is told. `load`: seconds until a model is loaded, and the most memory that the process takes, of the file's size.

llama.cpp is llama-cpp-python, which the first run installs into `target/compare`, built for this machine
(ten minutes on two cores), and bevel is built. Without models: SmolLM2 in four types.
Other builds of llama.cpp join `speed` by their llama-bench: `--rival "ik_llama.cpp=PATH/llama-bench -rtr 1"`;
with `--sequences` by their llama-batched-bench.

Each round (`--rounds`) measures every program once, one after the other, so that all see the same machine. The
result holds every sample, the medians and the ratios of medians, bevel over each rival. What part of the
machine's limits each decoding reaches is held against the bandwidth that bevel measured in the same runs.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
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
               args.generate, "--sequences", args.sequences, "--depth", args.depth, "--repeat", 1,
               "--threads", threads]
    runs = [call([*command, *flash]) for flash in ([], ["--flash"])]
    return {what: max(run[what] for run in runs) for what in ("prefill", "decode")}


def llama_bench(command, args, model, threads):
    """A llama-bench, with and without flash attention: whichever is faster. Forks that know of no depth are
    told of none."""
    depth = ["-d", args.depth] if args.depth else []
    best = {"prefill": 0, "decode": 0}
    for flash in (0, 1):
        for run in call([*shlex.split(command), "-m", model, "-p", args.prompt, "-n", args.generate,
                         "-t", threads, "-r", 1, "-fa", flash, *depth, "-o", "json"]):
            what = "prefill" if run["n_prompt"] else "decode"
            best[what] = max(best[what], run["avg_ts"])
    return best


def llama_batched_bench(command, args, model, threads):
    """A llama-batched-bench, whose prompts are of one token: decoding alone. It prints a table."""
    room = args.sequences * (args.generate + 8)
    done = subprocess.run([*shlex.split(command), "-m", str(model), "-t", str(threads), "-c", str(room),
                           "-npp", "1", "-ntg", str(args.generate), "-npl", str(args.sequences)],
                          capture_output=True, text=True, check=True)
    # Forks print the table among other things that they have to say.
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (done.stdout + done.stderr).splitlines()
            if line.startswith("|")]
    header = next(row for row in rows if "S_TG t/s" in row)
    return {"decode": float(rows[-1][header.index("S_TG t/s")])}


def bevel_bench(args, model, threads):
    ours = call([args.bevel, "bench", model, "-p", args.prompt, "-n", args.generate, "-r", 1, "-t", threads,
                 "--sequences", args.sequences, "-d", args.depth, "--json"])
    return {what: ours[what]["median"] for what in ("prefill", "decode")} | {"limits": ours["limits"]}


@contextlib.contextmanager
def busy(processes):
    """Other work for some processors."""
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(processes)]
    try:
        time.sleep(0.2 if processes else 0)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def speed(args, model, threads):
    programs = {"bevel": bevel_bench, "llama.cpp": llama_cpp_python}
    for rival in args.rival:
        name, _, command = rival.partition("=")
        bench = llama_batched_bench if args.sequences > 1 else llama_bench
        programs[name] = lambda *a, bench=bench, command=command: bench(command, *a)
    kinds = ["samples", "busy_samples"] if args.busy else ["samples"]
    samples = {kind: {who: {"prefill": [], "decode": []} for who in programs} for kind in kinds}
    limits = {"read_bandwidth": [], "decode_part": [], "prefill_part": []}
    for _ in range(args.rounds):
        for who, measure in programs.items():
            for kind in kinds:
                with busy(args.busy if kind == "busy_samples" else 0):
                    run = measure(args, model, threads)
                for what, values in samples[kind][who].items():
                    values += [run[what]] if what in run else []
                if who == "bevel" and kind == "samples":
                    for name, values in limits.items():
                        values.append(run["limits"][name])
    middle = {kind: {who: {what: statistics.median(v) for what, v in s.items() if v} for who, s in all.items()}
              for kind, all in samples.items()}
    result = {"threads": threads, **samples, "medians": middle["samples"],
              "limits": {name: statistics.median(values) for name, values in limits.items()}}
    ours = middle["samples"]["bevel"]
    result["ratio"] = {who: {what: ours[what] / theirs[what] for what in theirs}
                       for who, theirs in middle["samples"].items() if who != "bevel"}
    if args.busy:
        result["kept"] = {who: {what: busy_speed / middle["samples"][who][what] for what, busy_speed in s.items()}
                          for who, s in middle["busy_samples"].items()}
    return result


def measured(command):
    """What a command prints, and its peak memory in bytes."""
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))}: status {status}")
    return json.loads(out), usage.ru_maxrss * 1024


def load(args, model, threads):
    """Seconds to load, and memory in parts of the file."""
    commands = {
        "bevel": [args.bevel, "run", model, "Hello", "-n", 1, "--ctx", args.ctx, "-t", threads, "--json"],
        "llama.cpp": [sys.executable, HERE / "rival.py", "load", model, "--ctx", args.ctx, "--threads", threads],
    }
    runs = {who: [] for who in commands}
    for _ in range(args.rounds):
        for who, command in commands.items():
            runs[who].append(measured(command))
    size = model.stat().st_size
    result = {"threads": threads, "file_bytes": size}
    for who, values in runs.items():
        result[who] = {
            "load_seconds": statistics.median(run["load_seconds"] for run, _ in values),
            "peak_bytes": statistics.median(peak for _, peak in values),
        }
        result[who]["peak_of_file"] = result[who]["peak_bytes"] / size
        result[who]["load_seconds_a_gigabyte"] = result[who]["load_seconds"] / size * 1e9
    result["ratio"] = {what: result["bevel"][what] / result["llama.cpp"][what]
                       for what in ("load_seconds", "peak_bytes")}
    return result


def table(results):
    """Medians in tokens a second, prefill and decoding, and bevel's multiple of each."""
    lines = []
    for model, runs in results.items():
        for run in runs:
            limits = run["limits"]
            lines.append(f"{model}, {run['threads']} threads")
            for who, median in run["medians"].items():
                times = run["ratio"].get(who, {})
                times = "".join(f" x{times[what]:.2f}" for what in ("prefill", "decode") if what in times)
                kept = run.get("kept", {}).get(who)
                kept = f"   keeps {kept['decode']:.0%} of its decoding beside busy processes" if kept else ""
                lines.append(f"  {who:14} {median.get('prefill', 0):8.1f} {median['decode']:8.1f}"
                             f"{'   bevel' + times if times else ''}{kept}")
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
    parser.add_argument("what", choices=["speed", "load", "perplexity"])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--bevel", type=Path)
    parser.add_argument("--rival", action="append", default=[], metavar="NAME=LLAMA-BENCH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=1, help="decoded together")
    parser.add_argument("--depth", type=int, default=0, help="tokens before each measurement")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="measure beside N busy processes too")
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
    measure = {"speed": speed, "load": load, "perplexity": perplexity}[args.what]
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
    options = {
        "speed": ["--rounds", args.rounds, "--prompt", args.prompt, "--generate", args.generate,
                  "--sequences", args.sequences, "--depth", args.depth, "--busy", args.busy, *rivals],
        "load": ["--rounds", args.rounds, "--ctx", args.ctx],
        "perplexity": ["--text", Path(args.text or "").name, "--ctx", args.ctx,
                       "--tokens", args.tokens or "all"],
    }[args.what]
    shown = " ".join(map(str, ["python benches/compare.py", args.what, *(m.name for m in args.models),
                               "--threads", *args.threads, *options]))
    args.out.write_text(json.dumps({
        "command": shown,
        "machine": {"cpu": cpu(), "kernel": platform.release()},
        "llama-cpp-python": version,
        "results": results,
    }, indent=1) + "\n")


main()
