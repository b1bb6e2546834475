"""Loads models that bevel wrote in their own programs, on the CPU, and compares perplexities.

    python interop/run.py MODELS --bevel target/release/bevel

MODELS is a directory of models: directories, or `.gguf` files. Every model is run by the program
that its `config.json` asks for and by bevel, over the same tokens: windows of the text, each scored
from its second token on. The exit status is 1 where a program cannot load a model, or its perplexity
differs from bevel's by more than `--tolerance`.

Each program is a process of its own and runs all of its models; one that cannot load a model says
so and goes on.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from client import ANSWER

HERE = Path(__file__).parent


def kind_of(model: Path) -> str:
    """The program that reads a model."""
    if model.suffix == ".gguf":
        return "llama.cpp"
    config = json.loads((model / "config.json").read_text())
    if "quantization" in config:
        return "mlx"
    method = (config.get("quantization_config") or {}).get("quant_method")
    return {"gptq": "gptqmodel", "awq": "gptqmodel", None: "transformers"}.get(method, method)


def windows_of(model: Path, text: Path, context: int, windows: int) -> list[list[int]]:
    """Tokens of the text, in windows, by the model's own tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    # What a few windows need, however long the text.
    start = text.read_text(encoding="utf-8")[: 16 * context * windows]
    tokens = tokenizer.encode(start).ids
    cut = [tokens[i * context : (i + 1) * context] for i in range(windows)]
    return [window for window in cut if len(window) == context]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--text", type=Path, default=HERE.parent / "assets" / "tour.txt")
    parser.add_argument("--tokenizer", type=Path, help="a directory with tokenizer.json, for GGUF files")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--bevel", type=Path, help="the program; without it nothing is compared")
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a program")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    models = [arguments.models] if (arguments.models / "config.json").exists() else sorted(
        path for path in arguments.models.iterdir()
        if path.suffix == ".gguf" or (path / "config.json").exists())
    by_program: dict[str, list[dict]] = {}
    for model in models:
        tokenizer = arguments.tokenizer if model.suffix == ".gguf" else model
        tokens = windows_of(tokenizer, arguments.text, arguments.context, arguments.windows)
        by_program.setdefault(kind_of(model), []).append({"model": str(model), "tokens": tokens})

    paths = {model.name: model for model in models}
    results = {}
    print(f"{'model':32} {'program':18} {'perplexity':>11} {'bevel':>11} {'ratio':>8} {'seconds':>8}")
    for program, tasks in by_program.items():
        for name, result in run(program, tasks, arguments.timeout):
            result["program"] = program
            if arguments.bevel:
                result["bevel"] = perplexity_of_bevel(arguments, paths[name])
            if result.get("perplexity") and result.get("bevel"):
                result["ratio"] = result["perplexity"] / result["bevel"]
            results[name] = result
            print(line_of(name, result), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(is_good(result, arguments) for result in results.values()) else 1


def line_of(name: str, result: dict) -> str:
    def number(field, digits):
        return "-" if result.get(field) is None else f"{result[field]:.{digits}f}"

    line = (f"{name:32} {result['program']:18} {number('perplexity', 4):>11} "
            f"{number('bevel', 4):>11} {number('ratio', 5):>8} {number('seconds', 1):>8}")
    return line + (f"\n    {result['error']}" if "error" in result else "")


def is_good(result: dict, arguments) -> bool:
    if arguments.bevel:
        return abs(result.get("ratio", math.inf) - 1) <= arguments.tolerance
    return "perplexity" in result


def perplexity_of_bevel(arguments, model: Path) -> float | None:
    """What bevel measures on the same tokens."""
    context = str(arguments.context)
    command = [arguments.bevel, "--json", "eval", model, "--text", arguments.text, "--ctx", context,
               "--stride", context, "--tokens", str(arguments.context * arguments.windows)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stderr.strip().splitlines()[-1:])
        return None
    return json.loads(done.stdout)["perplexity"]


def run(kind: str, tasks: list[dict], timeout: float):
    """Yields each model's name and result as its program delivers them."""
    with tempfile.TemporaryDirectory() as directory:
        task, log = Path(directory) / "task.json", Path(directory) / "log"
        task.write_text(json.dumps({"program": kind, "models": tasks}))
        command = [sys.executable, str(HERE / "client.py"), str(task)]
        waiting = [Path(one["model"]).name for one in tasks]
        with log.open("w") as errors:
            client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            timer = threading.Timer(timeout, client.kill)
            timer.start()
            # Programs print what they like; answers are marked.
            for line in client.stdout:
                if line.startswith(ANSWER):
                    answer = json.loads(line.removeprefix(ANSWER))
                    name = waiting.pop(0)
                    if losses := answer.pop("losses", None):
                        answer |= {"perplexity": math.exp(sum(losses) / len(losses)),
                                   "tokens": len(losses)}
                    yield name, answer
            timer.cancel()
            status = client.wait()
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        for name in waiting:
            yield name, {"error": f"the program ended with status {status}: {lines[-1:]}"}


if __name__ == "__main__":
    sys.exit(main())
