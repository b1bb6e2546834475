"""What quantized models lost, each against the same base by one evaluator on the same tokens.

    pip install torch transformers gguf safetensors bitsandbytes
    python benches/quality.py BASE --text TEXT.txt --windows 64 --out benches/runs/NAME.json \\
        [--table NAME.md] CANDIDATE... [NAME=CANDIDATE...]

BASE is a Hugging Face directory in full precision. A candidate is a GGUF file or a Hugging Face
directory of any format that `dequantize.py` reads, whoever made it. Its weights are dequantized exactly
and run through one f32 forward pass, that of transformers, so that candidates differ in their weights
and in nothing else: no kernels, no activation types, no caches.

Windows of 512 tokens lie evenly over the text; each begins as the tokenizer begins a text, and the
second half of each is scored. For each scored token, with p the base's distribution and q the
candidate's: KL = sum p ln(p/q) in nats, and whether their most probable tokens are the same. Errors are
standard errors of the mean over windows, as tokens of one window are not independent; that of a ratio of
perplexities is of paired windows.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "rivals"))
from calibration import begins_with, tokens_of
from dequantize import bits_per_weight, size_in_bytes, weights


def windows_of(tokenizer, text, count, length):
    """`count` windows of `length` ids, evenly over the text and not overlapping."""
    stream, bos = tokens_of(tokenizer, text), begins_with(tokenizer)
    inner = length - len(bos)
    possible = len(stream) // inner
    if possible < count:
        sys.exit(f"{text} holds {possible} windows of {length} tokens, fewer than {count}")
    starts = [i * possible // count * inner for i in range(count)]
    return torch.tensor([bos + stream[s:s + inner] for s in starts])


class Evaluator:
    def __init__(self, base, windows):
        config = AutoConfig.from_pretrained(base)
        config.tie_word_embeddings = False  # a candidate's head may differ from its embedding
        config.dtype = torch.float32
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        self.windows = windows
        self.first = windows.shape[1] // 2
        self.load(base)
        # Base log-probabilities in f32, on disk: [windows, scored, vocabulary].
        shape = (len(windows), windows.shape[1] - 1 - self.first, config.vocab_size)
        self.file = tempfile.NamedTemporaryFile()
        self.base = np.memmap(self.file.name, np.float32, "w+", shape=shape)
        self.base_nll = np.zeros(shape[:2])
        for i, logp in enumerate(self.forward()):
            self.base[i] = logp.numpy()
            self.base_nll[i] = self.nll(i, logp)

    def load(self, path):
        """Puts a candidate's weights into the model; every parameter must be found, and nothing else."""
        wanted = dict(self.model.named_parameters())
        found = set()
        with torch.no_grad():
            for name, tensor in weights(path):
                if name not in wanted:
                    sys.exit(f"{path}: tensor `{name}` has no place in the base model")
                if tensor.shape != wanted[name].shape:
                    sys.exit(f"{path}: `{name}` is {list(tensor.shape)}, expected {list(wanted[name].shape)}")
                wanted[name].copy_(tensor)
                found.add(name)
            if "lm_head.weight" not in found:
                wanted["lm_head.weight"].copy_(wanted["model.embed_tokens.weight"])
                found.add("lm_head.weight")
        if missing := set(wanted) - found:
            sys.exit(f"{path}: no tensor for {sorted(missing)}")

    @torch.inference_mode()
    def forward(self):
        """Log-probabilities after the scored positions of each window: [scored, vocabulary]."""
        for window in self.windows:
            hidden = self.model.model(window[None], use_cache=False).last_hidden_state[0, self.first:-1]
            yield torch.log_softmax(self.model.lm_head(hidden).float(), -1)

    def nll(self, i, logp):
        targets = self.windows[i, self.first + 1:]
        return -logp[torch.arange(len(targets)), targets].double().numpy()

    def measure(self, path):
        self.load(path)
        kl, same, nll = (np.zeros(self.base_nll.shape) for _ in range(3))
        for i, q in enumerate(self.forward()):
            p = torch.from_numpy(self.base[i])
            kl[i] = torch.sum(p.exp() * (p - q), -1, dtype=torch.float64).numpy()
            same[i] = (p.argmax(-1) == q.argmax(-1)).numpy()
            nll[i] = self.nll(i, q)
        error = lambda a: float(a.mean(1).std(ddof=1) / math.sqrt(len(a))) if len(a) > 1 else math.nan
        base, own = math.exp(self.base_nll.mean()), math.exp(nll.mean())
        return {
            "bytes": size_in_bytes(path),
            "bits_per_weight": round(bits_per_weight(path), 4),
            "mean_kl": float(kl.mean()), "mean_kl_error": error(kl),
            "median_kl": float(np.median(kl)), "kl_99": float(np.quantile(kl, 0.99)),
            "top_1": float(same.mean()), "top_1_error": error(same),
            "perplexity": own, "delta_perplexity": own - base,
            "delta_perplexity_error": own * error(nll - self.base_nll),
        }


def table(base, rows):
    lines = [f"Base perplexity {base:.4f}.", "",
             "| model | bytes | bits/weight in blocks | mean KL | ± | top-1 | Δ perplexity |",
             "|---|---|---|---|---|---|---|"]
    lines += [f"| {name} | {r['bytes']:,} | {r['bits_per_weight']:.3f} | {r['mean_kl']:.5f} | "
              f"{r['mean_kl_error']:.5f} | {100 * r['top_1']:.2f} % | {r['delta_perplexity']:+.3f} |"
              for name, r in rows.items()]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("candidates", nargs="+", help="path, or name=path")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    evaluator = Evaluator(args.base, windows_of(
        AutoTokenizer.from_pretrained(args.base), args.text, args.windows, args.length))
    base, rows = math.exp(evaluator.base_nll.mean()), {}
    for candidate in args.candidates:
        name, _, path = candidate.rpartition("=")
        path = Path(path)
        name = name or f"{path.parent.name}/{path.name}"
        start = time.perf_counter()
        rows[name] = evaluator.measure(path)
        print(f"{name:40} {rows[name]['bytes']:>12,} KL {rows[name]['mean_kl']:.5f} "
              f"top-1 {100 * rows[name]['top_1']:.2f} % Δppl {rows[name]['delta_perplexity']:+.3f} "
              f"({time.perf_counter() - start:.1f} s)", flush=True)
        write(args, evaluator.base_nll.size, base, rows)  # after each, so that a long run can be stopped


def write(args, scored, base, rows):
    args.out.write_text(json.dumps({
        "command": f"python benches/quality.py {args.base.name} --text {args.text.name} "
                   f"--windows {args.windows} --length {args.length}",
        "torch": torch.__version__,
        "scored": scored,
        "base_perplexity": base,
        "results": rows,
    }, indent=1) + "\n")
    if args.table:
        args.table.write_text(table(base, rows))


main()
