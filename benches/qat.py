"""Training for a type of few bits beside training and rounding afterwards.

    python3 benches/qat.py MODEL TYPE --bevel target/release/bevel --text BOOK.txt --lr 2e-5 --steps 60 --out benches/runs/qat-NAME.json

The same model learns the same pieces of a text twice: in 16 bits, to be rounded to TYPE by `bevel quantize` afterwards,
and with --qat TYPE. The losses are those of pieces that were held out. Then what was written with --qat is held against its
own weights in single precision, as bevel runs both: what is left is the rounding of activations.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path


def call(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("type")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bevel", default="target/release/bevel")
    parser.add_argument("--steps", default="60")
    parser.add_argument("--lr", default="2e-5")
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        common = ["--ctx", "256", "--batch", "2", "--held-out", "0.05", "--evaluate-every", "100000"]
        learn = lambda model, out, *more: json.loads(
            call(args.bevel, "finetune", model, args.text, "-o", f"{scratch}/{out}", *common, "--steps", args.steps, "--lr", args.lr, "--json", *more)
        )
        before = lambda model: json.loads(
            call(args.bevel, "finetune", model, args.text, "-o", f"{scratch}/loss", "--force", *common, "--steps", "1", "--json")
        )["held_out_loss_before"]
        plain, trained = learn(args.model, "plain", "--full"), learn(args.model, "qat", "--qat", args.type)
        for model, out in [(args.model, "model"), (f"{scratch}/plain/model.gguf", "plain")]:
            call(args.bevel, "quantize", model, args.type, "-o", f"{scratch}/{out}-rounded.gguf", "--no-eval")
        single = f"{scratch}/single.gguf"
        call(args.bevel, "quantize", f"{scratch}/qat/model.gguf", "F32", "-o", single, "--no-eval")
        apart = json.loads(
            call(args.bevel, "eval", f"{scratch}/qat/model.gguf", "--against", single, "--text", args.text, "--tokens", "4096", "--json")
        )
        report = {
            "command": " ".join(["python3", *sys.argv]),
            "machine": platform.processor() or platform.machine(),
            "held_out_loss": {
                "the model": plain["held_out_loss_before"],
                "the model, rounded": before(f"{scratch}/model-rounded.gguf"),
                "trained": plain["held_out_loss"],
                "trained, then rounded": before(f"{scratch}/plain-rounded.gguf"),
                "trained for the type": trained["held_out_loss"],
                "the file that was written": before(f"{scratch}/qat/model.gguf"),
            },
            "kl_of_the_file_from_its_own_weights": apart["kl"]["value"],
            "seconds": {"trained": plain["seconds"], "trained for the type": trained["seconds"]},
        }
    print(json.dumps(report, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
