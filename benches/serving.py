"""Many clients at once: `bevel serve` and llama-server on the same file, threads and requests, in turn.

    python benches/serving.py MODEL.gguf --llama-server PATH --text BOOK.txt --out result.json

llama-server is llama.cpp's, built for this machine. Each round starts one server after the other, loads it by
`benches/load` with the same requests, and stops it; medians of the rounds are written, with every sample.
With `--rate` requests come at random times (a Poisson process), with `--clients` slots. `--prefix` makes all prompts begin alike; bevel then also runs without its prefix cache.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_ready(url: str, server: subprocess.Popen) -> float:
    start = time.monotonic()
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1) as response:
                if response.status == 200:
                    return time.monotonic() - start
        except OSError:
            time.sleep(0.01)
    sys.exit(f"the server ended with status {server.returncode}")


def memory(pid: int) -> int:
    """Peak resident memory of a process, bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def measure(command: list, url: str, load: list) -> dict:
    """Starts a server, loads it, stops it."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            ready = wait_until_ready(url, server)
            report = json.loads(subprocess.run([*load[:1], url, *load[1:]], check=True, stdout=subprocess.PIPE, text=True).stdout)
            if report["errors"]:
                sys.exit(f"{command[0]}: {report['errors'][0]}")
            peak = memory(server.pid)
        finally:
            server.terminate()
    waste = report["kv_waste"]
    return {
        "tokens_per_second": report["tokens_per_second"],
        "tokens_per_second_with_prompts": report["tokens_per_second_with_prompts"],
        "first_token_p50": report["first_token_seconds"]["p50"],
        "first_token_p99": report["first_token_seconds"]["p99"],
        "between_tokens_p50": report["between_tokens_seconds"]["p50"],
        "between_tokens_p99": report["between_tokens_seconds"]["p99"],
        "ready_seconds": ready,
        "peak_memory": peak,
        **({"kv_waste": waste} if waste is not None else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bevel", type=Path, default=ROOT / "target/release/bevel")
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rate", type=float, help="requests a second, at random times, instead of clients in turn")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prefix", type=int, default=0)
    parser.add_argument("--prompt", type=int, nargs=2, default=[20, 400])
    parser.add_argument("--answer", type=int, nargs=2, default=[16, 128])
    args = parser.parse_args()

    build = ["cargo", "build", "--release", "--quiet", "--manifest-path", ROOT / "benches/load/Cargo.toml"]
    target = ROOT / "target/load"
    subprocess.run(build, check=True, env={**os.environ, "CARGO_TARGET_DIR": str(target)})
    clients = ["--rate", args.rate] if args.rate else ["--clients", args.clients]
    load = [target / "release/load", "--text", args.text, *clients, "--requests", args.requests,
            "--prefix", args.prefix, "--prompt", *args.prompt, "--answer", *args.answer]

    def bevel(port: int, *options: str) -> list:
        return [args.bevel, "serve", args.model, "-q", "-t", args.threads, "--port", port, "--ctx", args.context,
                "--parallel", args.clients, *options]

    def llama(port: int) -> list:
        return [args.llama_server, "-m", args.model, "-t", args.threads, "-tb", args.threads, "--port", port,
                "-c", args.context * args.clients, "-np", args.clients, "--no-webui"]

    servers = {"bevel": bevel}
    if args.prefix:
        servers["bevel --no-prefix-cache"] = lambda port: bevel(port, "--no-prefix-cache")
    if args.llama_server:
        servers["llama-server"] = llama
    samples = {name: [] for name in servers}
    for number in range(args.rounds):
        for name, command in servers.items():
            port = free_port()
            words = [str(word) for word in command(port)]
            result = measure(words, f"http://127.0.0.1:{port}", [str(word) for word in [*load, "--seed", number + 1]])
            samples[name].append(result)
            print(number, name, json.dumps({k: round(v, 4) for k, v in result.items()}), file=sys.stderr, flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in samples.items()
    }
    ratios = {
        name: medians["bevel"]["tokens_per_second"] / values["tokens_per_second"]
        for name, values in medians.items() if name != "bevel"
    }
    options = [f"--{name} {value}" for name, value in vars(args).items()
               if name in ("threads", "rounds", "clients", "rate", "requests", "context", "prefix") and value is not None]
    options += [f"--prompt {args.prompt[0]} {args.prompt[1]}", f"--answer {args.answer[0]} {args.answer[1]}"]
    lscpu = subprocess.run(["lscpu"], stdout=subprocess.PIPE, text=True).stdout
    machine = next(line.split(":")[1].strip() for line in lscpu.splitlines() if line.startswith("Model name"))
    args.out.write_text(json.dumps({
        "command": f"python benches/serving.py {args.model.name} {' '.join(options)}",
        "machine": machine,
        "medians": medians,
        "ratios of tokens per second": ratios,
        "samples": samples,
    }, indent=1) + "\n")
    print(json.dumps({"medians": medians, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
