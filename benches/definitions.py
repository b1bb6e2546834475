"""A real task: WordNet's definitions, learnt beside a model in 16 bits and beside the same model in 4.

    python benches/definitions.py WORDNET --bevel target/release/bevel --full F16.gguf --small Q4_K_M.gguf \
        --out benches/runs/definitions.json

WORDNET is the directory of `data.noun` and `data.verb` (Debian's package `wordnet-base` has it under
/usr/share/wordnet). Only the standard library is needed. Words are drawn with a fixed seed; a twentieth of the
examples is held out, and some words are in neither part: these are asked of the model as it was and as it became.
"""

import argparse
import json
import random
import subprocess
import tempfile
import time
from pathlib import Path

ASKED = 8


def entries(wordnet):
    """(kind, word, definition) of every synset whose first word is a plain one."""
    for kind in ("noun", "verb"):
        for line in (Path(wordnet) / f"data.{kind}").read_text().splitlines():
            if line.startswith("  "):
                continue
            fields, gloss = line.split(" | ", 1)
            word = fields.split()[4]
            # Without the examples that follow a definition, and without names.
            definition = gloss.split("; \"")[0].strip()
            if word.isalpha() and word.islower():
                yield kind, word, definition


def prompt(kind, word):
    return f"The {kind} \"{word}\" means:"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("wordnet")
    parser.add_argument("--bevel", required=True)
    parser.add_argument("--full", required=True)
    parser.add_argument("--small", required=True)
    parser.add_argument("--examples", type=int, default=1500)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    drawn = random.Random(7).sample(sorted(set(entries(args.wordnet))), args.examples + ASKED)
    asked, learnt = drawn[:ASKED], drawn[ASKED:]
    words = {word for _, word, _ in asked}
    learnt = [entry for entry in learnt if entry[1] not in words]
    settings = ["--rank", "8", "--lr", "1e-3", "--batch", "16", "--ctx", "64", "--evaluate-every", "1000"]
    runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "definitions.jsonl"
        with data.open("w") as file:
            for kind, word, definition in learnt:
                record = {"prompt": prompt(kind, word), "completion": f" {definition}"}
                file.write(json.dumps(record) + "\n")
        for name, model, more in [
            ("16 bits, single precision", args.full, ["--exact"]),
            ("16 bits", args.full, []),
            ("4 bits", args.small, []),
        ]:
            adapter = str(Path(scratch) / name)
            command = [args.bevel, "finetune", model, str(data), "-o", adapter, *settings, *more, "--json"]
            start = time.monotonic()
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            answers = []
            for kind, word, definition in asked:
                question = prompt(kind, word)
                both = []
                for adapted in ([], ["--adapter", adapter]):
                    ask = [args.bevel, "run", model, question, "--raw", "-n", "24", "--temp", "0", *adapted]
                    text = subprocess.run(ask, check=True, capture_output=True, text=True).stdout
                    both.append(text.removeprefix(question).strip())
                answers.append(
                    {"question": question, "wordnet": definition, "before": both[0], "after": both[1]}
                )
            runs[name] = {
                "command": " ".join(["bevel", "finetune", Path(model).name, data.name, *settings, *more]),
                "held_out_before": result["held_out_loss_before"],
                "held_out_after": result["held_out_loss"],
                "steps": result["steps"],
                "tokens": result["tokens"],
                "tokens_per_second": result["tokens_per_second"],
                "seconds": time.monotonic() - start,
                "answers": answers,
            }
            print(name, {k: v for k, v in runs[name].items() if k != "answers"}, flush=True)
    exact, small = runs["16 bits, single precision"], runs["4 bits"]
    report = {
        "examples": len(learnt),
        "of_the_exact_runs_loss": small["held_out_after"] / exact["held_out_after"],
        "runs": runs,
    }
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
