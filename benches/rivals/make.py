"""A rival's quantized model, made with the calibration sequences that bevel is given, and what it cost.

    python benches/rivals/make.py TOOL MODEL OUT --texts CALIBRATION.txt... [--bits 4] [--group-size 128]
        [--samples 128] [--length 512] [--set NAME=VALUE...]

    TOOL            pip install
    gptqmodel       gptqmodel==7.7.0              GPTQ, the tool's defaults: symmetric, group-aware order
    gptqmodel-awq   gptqmodel==7.7.0              AWQ as AutoAWQ does it, scales and clipping: asymmetric
    llmcompressor   llmcompressor==0.14.0.1       AWQ, scales only: asymmetric
    autoawq         autoawq==0.2.9                AWQ: asymmetric. Deprecated; wants transformers==4.51.3 torch==2.6.0
    autoround       auto-round==0.15.1            200 steps of sign gradient descent a block: symmetric
    bitsandbytes    bitsandbytes==0.50.2          NF4, block 64, double quantization; sees no text
    mlx             'mlx[cpu]' mlx-lm==0.32.2     affine rounding; sees no text

MODEL is a Hugging Face directory. `--set` gives the tool an option of its own (JSON values), for example
`--set sym=false` or `--set desc_act=true`. OUT/run.json holds wall and CPU seconds and peak memory, of
quantizing alone and of the whole process.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

START = time.perf_counter()


def usage():
    """CPU seconds of this process and those it waited for, and the most memory it held, in bytes."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return cpu, max(own.ru_maxrss, children.ru_maxrss) * 1024


class Cost:
    """What a `with` block takes."""

    def __enter__(self):
        self.start, (self.cpu, self.memory) = time.perf_counter(), usage()
        return self

    def __exit__(self, *_):
        cpu, memory = usage()
        self.taken = {"wall_seconds": time.perf_counter() - self.start, "cpu_seconds": cpu - self.cpu,
                      "peak_bytes_before": self.memory, "peak_bytes": memory}


def gptqmodel(args, shown, **more):
    """Called for AWQ too, with a method of its own."""
    from gptqmodel import GPTQModel, QuantizeConfig
    options = {"bits": args.bits, "group_size": args.group_size, **more, **args.set}
    model = GPTQModel.load(args.model, QuantizeConfig(**options), device="cpu", dtype=dtype(args))
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in shown]
    with Cost() as cost:
        model.quantize(data, batch_size=1)
        model.save(str(args.out))
    return cost


def gptqmodel_awq(args, shown):
    return gptqmodel(args, shown, method="awq", format="gemm", sym=False)


def llmcompressor(args, shown):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype(args))
    grid = QuantizationArgs(num_bits=args.bits, type="int", symmetric=False, strategy="group",
                            group_size=args.group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=grid)
    data = Dataset.from_dict({"input_ids": shown, "attention_mask": [[1] * len(s) for s in shown]})
    with Cost() as cost:
        oneshot(model=model, dataset=data, num_calibration_samples=len(shown), max_seq_length=args.length,
                recipe=[AWQModifier(**args.set),
                        QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"])])
        model.save_pretrained(args.out, save_compressed=True)
    return cost


def autoawq(args, shown):
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer
    from transformers import AutoTokenizer

    class Quantizer(AwqQuantizer):
        """Its copy of the weights, `v.cpu()`, is none on a CPU: scales tried one after another would pile up."""

        def _compute_best_scale(self, x, w_mean, x_mean, module, *rest):
            own = module.state_dict
            module.state_dict = lambda: {name: tensor.clone() for name, tensor in own().items()}
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module, *rest)
            finally:
                del module.state_dict

    model = AutoAWQForCausalLM.from_pretrained(args.model, torch_dtype=dtype(args), device_map="cpu")
    config = {"zero_point": True, "q_group_size": args.group_size, "w_bit": args.bits, "version": "GEMM"}
    with Cost() as cost:
        model.quantize(AutoTokenizer.from_pretrained(args.model), config, calib_data=shown,
                       max_calib_samples=len(shown), max_calib_seq_len=args.length, quantizer_cls=Quantizer,
                       **args.set)
        model.save_quantized(str(args.out))
    return cost


def autoround(args, shown):
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype(args))
    options = {"bits": args.bits, "group_size": args.group_size, "sym": True, "iters": 200,
               "nsamples": len(shown), "seqlen": args.length, **args.set}
    data = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            for ids in shown]
    with Cost() as cost:
        rounder = AutoRound(model, AutoTokenizer.from_pretrained(args.model), dataset=data, device_map="cpu",
                            **options)
        rounder.quantize_and_save(str(args.out), format="auto_gptq" if options["sym"] else "auto_round")
    for folder in [p for p in args.out.iterdir() if p.is_dir()]:  # it makes a directory of its own naming
        shutil.copytree(folder, args.out, dirs_exist_ok=True)
        shutil.rmtree(folder)
    return cost


def bitsandbytes(args, shown):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.float32, **args.set)
    with Cost() as cost:
        model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=how, device_map="cpu",
                                                     dtype=dtype(args))
        model.save_pretrained(args.out)
    return cost


def mlx(args, shown):
    from mlx_lm import convert
    with Cost() as cost:
        convert(args.model, str(args.out), quantize=True, q_bits=args.bits, q_group_size=args.group_size,
                **args.set)
    return cost


def dtype(args):
    import torch
    return getattr(torch, args.dtype)


def main():
    tools = {"gptqmodel": gptqmodel, "gptqmodel-awq": gptqmodel_awq, "llmcompressor": llmcompressor, "autoawq": autoawq,
             "autoround": autoround, "bitsandbytes": bitsandbytes, "mlx": mlx}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=tools)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", nargs="+", default=[])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="in which the tool computes; the kindest is the default")
    parser.add_argument("--set", type=option, nargs="+", default=[])
    args = parser.parse_args()
    args.set = dict(args.set)
    os.environ["OMP_NUM_THREADS"] = os.environ["GPTQMODEL_CPU_WORKERS"] = str(args.threads)
    import torch
    torch.set_num_threads(args.threads)
    shown = []
    if args.texts:
        sys.path.insert(0, str(Path(__file__).parent))
        from calibration import sequences
        from transformers import AutoTokenizer
        shown = sequences(AutoTokenizer.from_pretrained(args.model), args.texts, args.samples, args.length)
    if args.out.exists():
        shutil.rmtree(args.out)
    cost = tools[args.tool](args, shown)
    cpu, memory = usage()
    run = {"tool": args.tool, "bits": args.bits, "group_size": args.group_size, "samples": len(shown),
           "length": args.length, "dtype": args.dtype, "set": args.set, "threads": args.threads,
           "quantizing": cost.taken, "process": {"wall_seconds": time.perf_counter() - START,
                                                 "cpu_seconds": cpu, "peak_bytes": memory}}
    (args.out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    print(json.dumps(run))


def option(text):
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    main()
