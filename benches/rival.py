"""llama.cpp, through llama-cpp-python, doing what `bevel eval` and `bevel bench` do.

    pip install llama-cpp-python==0.3.36        # built on this machine: CMAKE_ARGS=-DGGML_NATIVE=ON
    python rival.py perplexity MODEL.gguf TEXT.txt [--tokens N] [--ctx 512] [--threads 2]
    python rival.py speed MODEL.gguf [--prompt 512] [--generate 128] [--sequences 1] [--depth 0] [--repeat 3] [--threads 2]
    python rival.py load MODEL.gguf [--ctx 512] [--threads 2]

Prints one JSON object. `compare.py` runs both programs in turn.
"""

import argparse
import json
import math
import statistics
import time

import llama_cpp
import numpy as np


def load(path, ctx, threads, flash):
    return llama_cpp.Llama(
        path, n_ctx=ctx, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
        flash_attn=flash, verbose=False,
    )


def run(ctx, rows):
    """One llama_decode over rows of (token, position, sequence, whether logits are wanted)."""
    batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    for i, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[i] = token
        batch.pos[i] = position
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence
        batch.logits[i] = wanted
    assert llama_cpp.llama_decode(ctx, batch) == 0
    llama_cpp.llama_batch_free(batch)


def prefill(ctx, tokens, position=0, sequence=0, wanted=lambda i: False):
    run(ctx, [(token, position + i, sequence, wanted(i)) for i, token in enumerate(tokens)])


def truncate(ctx, length, sequences=1):
    """Leaves the first `length` tokens of each sequence."""
    for sequence in range(sequences):
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(ctx), sequence, length, -1)


def perplexity(args):
    """Chunks of `ctx` tokens, the second half of each scored: llama-perplexity's default."""
    model = load(args.model, args.ctx, args.threads, flash=False)
    text = open(args.text, "rb").read()
    add_bos = bool(llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(model.model)))
    tokens = model.tokenize(text, add_bos=add_bos, special=False)
    chunks = len(tokens) // args.ctx
    if args.tokens:
        chunks = min(chunks, args.tokens // args.ctx)
    vocab = model.n_vocab()
    first = args.ctx // 2
    nll = []
    for chunk in range(chunks):
        part = list(tokens[chunk * args.ctx:(chunk + 1) * args.ctx])
        targets = part[1:]
        if add_bos:
            part[0] = model.token_bos()
        truncate(model.ctx, 0)
        prefill(model.ctx, part, wanted=lambda i: i >= first)
        for i in range(first, args.ctx - 1):
            row = llama_cpp.llama_get_logits_ith(model.ctx, i)
            row = np.ctypeslib.as_array(row, shape=(vocab,)).astype(np.float64)
            peak = row.max()
            nll.append(math.log(np.exp(row - peak).sum()) + peak - row[targets[i]])
    return {"perplexity": math.exp(statistics.fmean(nll)), "scored": len(nll), "tokens": len(tokens)}


def speed(args):
    """A prompt, and decoding of some sequences together, each behind `depth` tokens."""
    length = args.depth + max(args.prompt, args.generate)
    model = load(args.model, length, args.threads, args.flash)
    params = model.context_params
    params.n_ctx, params.n_seq_max, params.kv_unified = length * args.sequences, args.sequences, False
    ctx = llama_cpp.llama_init_from_model(model.model, params)
    rng = np.random.default_rng(1)
    tokens = [int(t) for t in rng.integers(100, model.n_vocab() - 100, length)]
    past, rest = tokens[:args.depth], tokens[args.depth:]
    for sequence in range(args.sequences):
        for start in range(0, args.depth, 512):
            prefill(ctx, past[start:start + 512], start, sequence)
    seconds = {"prefill": [], "decode": []}
    for repeat in range(args.repeat + 1):
        truncate(ctx, args.depth, args.sequences)
        start = time.perf_counter()
        prefill(ctx, rest[:args.prompt], args.depth, wanted=lambda i: i == args.prompt - 1)
        llama_cpp.llama_synchronize(ctx)
        middle = time.perf_counter()
        truncate(ctx, args.depth, args.sequences)
        start_decode = time.perf_counter()
        for i in range(args.generate):
            run(ctx, [(rest[i], args.depth + i, s, True) for s in range(args.sequences)])
            llama_cpp.llama_synchronize(ctx)
        end = time.perf_counter()
        if repeat:  # the first is a warm-up
            seconds["prefill"].append(args.prompt / (middle - start))
            seconds["decode"].append(args.sequences * args.generate / (end - start_decode))
    return {what: statistics.median(v) for what, v in seconds.items()}


def first_token(args):
    """Loads and decodes a token: for who watches this process' memory."""
    start = time.perf_counter()
    model = load(args.model, args.ctx, args.threads, args.flash)
    seconds = time.perf_counter() - start
    prefill(model.ctx, [model.token_bos() if model.token_bos() >= 0 else 100], wanted=lambda i: True)
    return {"load_seconds": seconds}


parser = argparse.ArgumentParser()
parser.add_argument("what", choices=["perplexity", "speed", "load"])
parser.add_argument("model")
parser.add_argument("text", nargs="?")
parser.add_argument("--tokens", type=int)
parser.add_argument("--ctx", type=int, default=512)
parser.add_argument("--prompt", type=int, default=512)
parser.add_argument("--generate", type=int, default=128)
parser.add_argument("--sequences", type=int, default=1)
parser.add_argument("--depth", type=int, default=0)
parser.add_argument("--repeat", type=int, default=3)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--flash", action="store_true")
args = parser.parse_args()
print(json.dumps({"perplexity": perplexity, "speed": speed, "load": first_token}[args.what](args)))
