"""Half an hour of clients of all manners: `bevel serve` has to answer, and not to grow.

    python benches/soak.py MODEL.gguf --text BOOK.txt --minutes 30 --out result.json

Polite clients ask the same few questions again and again: every answer has to be the same as the first time, whatever
else goes on, and how long they wait is noted. Others go away in the middle of a stream, read a few bytes a second, keep
hundreds of connections open and say nothing, send bodies that are too large, too deep, cut off or no JSON, prompts without
end, fields that nobody knows, and whatever is rare: grammars, tools, beams, embeddings. Every error has to be JSON with a
status below 500. The server's memory and open files are noted every ten seconds. The exit status is 1 where something was
not as it has to be, or where memory grew by more than a twentieth after the first third of the time.
"""

import argparse
import collections
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Soak:
    def __init__(self, host: str, port: int, words: list, end: float):
        self.host, self.port, self.words, self.end = host, port, words, end
        self.url = f"http://{host}:{port}"
        self.lock = threading.Lock()
        self.statuses = collections.Counter()
        self.problems = []
        self.gaps = []
        self.first = []
        self.expected = {}
        self.samples = []

    def problem(self, what: str) -> None:
        with self.lock:
            if len(self.problems) < 50:
                self.problems.append(what)

    def prompt(self, rng: random.Random, count: int) -> str:
        start = rng.randrange(len(self.words) - count)
        return " ".join(self.words[start : start + count])

    def post(self, path: str, body, kind: str, expect=range(200, 500)) -> dict:
        """Sends JSON, or bytes as they are; notes what came back."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        except OSError as error:
            self.problem(f"{kind}: {error}")
            return {}
        with self.lock:
            self.statuses[f"{kind}: {status}"] += 1
        if status not in expect:
            self.problem(f"{kind}: status {status}: {text[:200]!r}")
        try:
            return json.loads(text)
        except ValueError:
            self.problem(f"{kind}: status {status}, not JSON: {text[:200]!r}")
            return {}

    def open(self, body: dict) -> socket.socket:
        """Begins a request and leaves its answer unread."""
        data = json.dumps(body).encode()
        connection = socket.create_connection((self.host, self.port), timeout=300)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection

    # ---- Clients. Each is called again until time is up.

    def polite(self, rng: random.Random) -> None:
        number = rng.randrange(8)
        prompt = self.prompt(random.Random(number), 30 + 20 * number)
        body = {"prompt": prompt, "max_tokens": 40, "temperature": 0 if number % 2 else 0.9, "seed": number, "stream": True}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode())
        start, text, times = time.monotonic(), "", []
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                for line in response:
                    if line.startswith(b"data: {"):
                        chunk = json.loads(line[6:])
                        text += chunk["choices"][0]["text"]
                        times.append(time.monotonic())
        except (OSError, ValueError, KeyError) as error:
            return self.problem(f"polite: {error}")
        with self.lock:
            self.statuses["polite: 200"] += 1
            self.first.append(times[0] - start)
            self.gaps.extend(b - a for a, b in zip(times, times[1:]))
            if self.expected.setdefault(number, text) != text:
                self.problems.append(f"polite: question {number} was answered otherwise: {text!r}")

    def gone(self, rng: random.Random) -> None:
        connection = self.open({"prompt": self.prompt(rng, 50), "max_tokens": 400, "ignore_eos": True, "stream": True, "n": rng.choice([1, 3])})
        connection.recv(rng.choice([1, 300, 2000]))
        connection.close()
        with self.lock:
            self.statuses["gone in the middle"] += 1
        time.sleep(rng.random())

    def slow(self, rng: random.Random) -> None:
        connection = self.open({"prompt": self.prompt(rng, 20), "max_tokens": 200, "ignore_eos": True, "stream": True, "logprobs": 20})
        until = min(self.end, time.monotonic() + 60)
        read = b""
        while time.monotonic() < until:
            read += connection.recv(50)
            time.sleep(0.2)
        connection.close()
        if not read.startswith(b"HTTP/1.1 200"):
            self.problem(f"slow: {read[:100]!r}")
        with self.lock:
            self.statuses["slow for a minute"] += 1

    def silent(self, rng: random.Random) -> None:
        connections = [socket.create_connection((self.host, self.port), timeout=60) for _ in range(250)]
        time.sleep(min(5, max(0, self.end - time.monotonic())))
        for connection in connections:
            connection.close()
        with self.lock:
            self.statuses["250 silent connections"] += 1

    def wrong(self, rng: random.Random) -> None:
        kind = rng.randrange(8)
        refused = range(400, 500)
        if kind == 0:
            self.post("/v1/completions", b'{"prompt": "x"', "no JSON", refused)
        elif kind == 1:
            self.post("/v1/completions", b"[" * 100_000, "deep", refused)
        elif kind == 2:
            self.post("/v1/completions", b'{"prompt": "' + b"x" * (20 << 20) + b'"}', "too large", [413])
        elif kind == 3:
            self.post("/v1/completions", {"prompt": "word " * 200_000}, "endless prompt", refused)
        elif kind == 4:
            self.post("/v1/chat/completions", {"messages": [], "max_tokns": 3}, "unknown field", refused)
        elif kind == 5:
            self.post("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "(" * 1000}}, "wrong grammar", refused)
        elif kind == 6:
            self.post("/v1/nothing", {}, "wrong route", refused)
        else:
            connection = socket.create_connection((self.host, self.port), timeout=60)
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{\"prompt\":")
            time.sleep(0.1)
            connection.close()
            with self.lock:
                self.statuses["cut off"] += 1
        time.sleep(rng.random())

    def rare(self, rng: random.Random) -> None:
        kind = rng.randrange(6)
        prompt = self.prompt(rng, rng.choice([5, 60, 300]))
        if kind == 0:
            schema = {"type": "object", "properties": {f"a{rng.randrange(1000)}": {"type": "integer"}}, "additionalProperties": False}
            self.post("/v1/completions", {"prompt": prompt, "max_tokens": 40, "structured_outputs": {"json": schema}}, "schema")
        elif kind == 1:
            function = {"name": "look", "parameters": {"type": "object", "properties": {"where": {"type": "string"}}}}
            body = {"messages": [{"role": "user", "content": prompt}], "tools": [{"type": "function", "function": function}], "max_tokens": 40}
            self.post("/v1/chat/completions", body, "tools")
        elif kind == 2:
            self.post("/v1/completions", {"prompt": prompt, "max_tokens": 12, "use_beam_search": True, "best_of": 4}, "beams", [200])
        elif kind == 3:
            self.post("/v1/embeddings", {"input": [prompt, "x"]}, "embeddings", [200])
        elif kind == 4:
            self.post("/v1/completions", {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 2}, "scores", [200])
        else:
            body = {"prompt": [prompt] * 3, "n": 2, "max_tokens": 20, "temperature": 1.2, "min_p": 0.1, "dry_multiplier": 0.5}
            self.post("/v1/completions", body, "several", [200])

    def run(self, client, seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < self.end:
            try:
                client(rng)
            except OSError as error:
                self.problem(f"{client.__name__}: {error}")
                time.sleep(1)

    def watch(self, server: subprocess.Popen) -> None:
        start = time.monotonic()
        while time.monotonic() < self.end and server.poll() is None:
            status = Path(f"/proc/{server.pid}/status").read_text().splitlines()
            resident = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
            files = len(os.listdir(f"/proc/{server.pid}/fd"))
            self.samples.append((round(time.monotonic() - start), resident, files))
            time.sleep(10)
        if server.poll() is not None:
            self.problem(f"the server ended with status {server.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--bevel", type=Path, default=ROOT / "target/release/bevel")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    words = args.text.read_text().split()
    command = [args.bevel, "serve", args.model, "--port", "0", "--json", "-q", "--ctx", "2048", "--kv-memory", "300MB", "--chat-template",
               ROOT / "interop/tools.jinja"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        ready = ""
        for line in server.stdout:
            ready += line
            if line.startswith("}"):
                break
        port = int(json.loads(ready)["url"].rsplit(":", 1)[1])
        soak = Soak("127.0.0.1", port, words, time.monotonic() + args.minutes * 60)
        clients = [soak.polite] * 4 + [soak.gone] * 2 + [soak.slow] * 2 + [soak.silent] + [soak.wrong] * 2 + [soak.rare] * 2
        threads = [threading.Thread(target=soak.run, args=(client, i)) for i, client in enumerate(clients)]
        threads.append(threading.Thread(target=soak.watch, args=(server,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(2)
        with urllib.request.urlopen(f"{soak.url}/metrics") as response:
            metrics = response.read().decode().splitlines()
        left = {name: float(next(line for line in metrics if line.startswith(name + "{")).rsplit(" ", 1)[1])
                for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "bevel:kv_blocks_used")}
        if any(left.values()):
            soak.problem(f"something is left: {left}")
        server.terminate()
    third = [memory for _, memory, _ in soak.samples[len(soak.samples) // 3 :]]
    halves = [statistics.median(half) for half in (third[: len(third) // 2 or 1], third[len(third) // 2 :])]
    if halves[1] > 1.05 * halves[0]:
        soak.problem(f"memory grew from {halves[0]} to {halves[1]} bytes")
    gaps = sorted(soak.gaps)
    result = {
        "command": f"python benches/soak.py {Path(args.model).name} --minutes {args.minutes:g}",
        "problems": soak.problems,
        "requests": dict(sorted(soak.statuses.items())),
        "polite clients": {
            "first token, median, s": statistics.median(soak.first),
            "between tokens, median, s": gaps[len(gaps) // 2],
            "between tokens, 99th percentile, s": gaps[len(gaps) * 99 // 100],
            "between tokens, longest, s": gaps[-1],
        },
        "memory after a third, median of what is left in two halves, bytes": halves,
        "memory, most, bytes": max(memory for _, memory, _ in soak.samples),
        "open files, most": max(files for *_, files in soak.samples),
        "samples: seconds, bytes, open files": soak.samples[:: max(1, len(soak.samples) // 60)],
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if not key.startswith("samples")}, indent=1))
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
