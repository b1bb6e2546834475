"""The same function with other weights: norm gains folded into the linear layers, and the residual stream
times a random orthogonal matrix (arXiv 2404.00456, without its online rotations).

    python benches/rivals/rotate.py MODEL OUT [--seed 0] [--text TEXT.txt]

MODEL is a GGUF file or a Hugging Face directory (llama and qwen2 families); OUT a Hugging Face directory
in f32, its head untied from the embedding. A model that was quantized before lies on its old grid, and a
comparison of quantizers on it says little: rotated, it lies on none. For a GGUF file, `--config DIR` names
a directory with its config.json and tokenizer files, as `bevel convert MODEL -o DIR` writes it. With
`--text` the logits of both models on its first 128 tokens are compared.

With Q orthogonal, g a norm's gain, W [out, in] a linear layer:
1. Embedding E <- E Q, so that every residual vector x becomes x Q; an RMS norm commutes with Q, once its gain is 1.
2. Layers that read the stream: W <- W diag(g) Q.
3. Layers that write to it (o_proj, down_proj): W <- Q^T W.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from dequantize import weights

READS = {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
         "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"]}
WRITES = ["self_attn.o_proj", "mlp.down_proj"]


def orthogonal(size, seed):
    """Uniform over the orthogonal matrices: QR of a normal one, R's diagonal positive. f64."""
    normal = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(normal)
    return q * torch.sign(torch.diagonal(r))


def rotate(tensors, layers, seed):
    """In place, in f64, one tensor at a time."""
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding)
    q = orthogonal(embedding.shape[1], seed)
    gain = lambda name: tensors[name].double()
    tensors["lm_head.weight"] = (head.double() * gain("model.norm.weight") @ q).float()
    tensors["model.embed_tokens.weight"] = (embedding.double() @ q).float()
    tensors["model.norm.weight"].fill_(1)
    for i in range(layers):
        at = lambda part: f"model.layers.{i}.{part}.weight"
        for norm, linears in READS.items():
            for linear in linears:
                tensors[at(linear)] = (tensors[at(linear)].double() * gain(at(norm)) @ q).float()
            tensors[at(norm)].fill_(1)
        for linear in WRITES:
            tensors[at(linear)] = (q.T @ tensors[at(linear)].double()).float()
            bias = at(linear).replace(".weight", ".bias")
            if bias in tensors:
                tensors[bias] = (tensors[bias].double() @ q).float()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, help="where config.json and the tokenizer are; MODEL if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    source = args.config or args.model
    args.out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in weights(args.model)}
    config = json.loads((source / "config.json").read_text())
    before = logits(source, tensors, args.text) if args.text else None
    rotate(tensors, config["num_hidden_layers"], args.seed)
    config.update(tie_word_embeddings=False, dtype="float32", torch_dtype="float32")
    for file in source.iterdir():
        if file.suffix in (".json", ".txt", ".jinja", ".model") and "safetensors" not in file.name:
            shutil.copy(file, args.out / file.name)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({k: v.contiguous() for k, v in tensors.items()}, args.out / "model.safetensors", {"format": "pt"})
    if args.text:
        after = logits(args.out, tensors, args.text)
        print(f"greatest difference of logits {(after - before).abs().max():.2e} of {before.abs().max():.1f}")


@torch.inference_mode()
def logits(config, tensors, text):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    settings = AutoConfig.from_pretrained(config)
    settings.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(settings).float().eval()
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict({**tensors, "lm_head.weight": head}, strict=True)
    ids = AutoTokenizer.from_pretrained(config)(text.read_text()[:4000])["input_ids"][:128]
    return model(torch.tensor([ids])).logits


main()
