"""SFT on a GPU at the shapes of Qwen3-0.6B, Qwen3-1.7B and, with adapters, Llama-3-8B: `python tests/benchmarks/sft_on_gpu.py`

Random weights, bfloat16 arithmetic, rows of 4096 tokens, 8 of them a step, one or two of them at once. Ours and TRL's SFTTrainer, packed,
in turn: the fastest of `opponents`, found by a short try of each. No ratio is printed before the loss curves agree.

MFU is of 989.4 TFLOP/s, without pairs that the causal mask hides and without recomputation; 4 instead of 6 FLOP a frozen weight and token.
The attainable fraction is the time that the model's own matrix products, its attention and one pass over what lies between them take by
themselves on the same card, each measured in the same run, over the step that was measured.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import sft_vs_trl as common

LENGTH = 4096  # tokens of a row
QWEN = {"model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
QWEN |= {"head_dim": 128, "tie_word_embeddings": True, "rope_theta": 1e6}
LLAMA = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 5e5, "tie_word_embeddings": False}
SHAPES = {
    "qwen3-0.6b": QWEN | {"hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": QWEN | {"hidden_size": 2048, "intermediate_size": 6144},
    "llama3-8b-lora": LLAMA,
}


def write_model(folder, shape):
    """A Hugging Face folder of this shape with random weights in bfloat16, drawn on the GPU if there is one, and a tokenizer of words."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    common.make_model(folder, layers=1)  # for its tokenizer
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 2, "max_position_embeddings": 8192, "dtype": "bfloat16"}
    config = AutoConfig.for_model(**shape, **ends)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = torch.Generator(device).manual_seed(0)
    tensors = {
        name: torch.ones(p.shape, dtype=torch.bfloat16)
        if p.ndim == 1
        else torch.randn(p.shape, generator=stream, device=device, dtype=torch.bfloat16).mul_(0.02).cpu()
        for name, p in model.named_parameters()
    }
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})


def write_rows(path, count):
    stream = random.Random(0)
    with open(path, "w") as f:
        for _ in range(count):
            f.write(json.dumps({"text": " ".join(f"w{stream.randrange(common.VOCABULARY - 7)}" for _ in range(LENGTH - 1))}) + "\n")


def ours(name, at_once):
    """Settings of our run."""
    model = {"compile": True, "cuda_graphs": True}
    train = {"micro_batch_tokens": at_once * LENGTH, "learning_rate": 1e-5, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    blocks = {"model": model, "data": {"max_length": LENGTH}, "train": train, "fsdp": {"reshard_after_forward": False}}
    return blocks | ({"lora": common.ADAPTERS} if name.endswith("lora") else {})


def opponents(name, at_once):
    """TRL's settings: name -> SFTConfig fields."""
    size = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": common.ROWS_PER_STEP // at_once}
    rates = {"learning_rate": 1e-5, "lr_scheduler_type": "constant", "max_length": LENGTH, "packing": True}
    base = size | rates | common.UNCHECKED
    if name.endswith("lora"):
        base |= common.PEFT
    found = {}
    for attention in ("flash_attention_4", "sdpa"):
        for liger in (True, False):
            title = f"{attention}{', Liger' if liger else ''}"
            how = {"attn_implementation": attention, "dtype": "bfloat16" if name.endswith("lora") else "float32"}
            found[title] = base | {"model_init_kwargs": how, "use_liger_kernel": liger}
    return found


def fastest(name, at_once, options):
    """The title of TRL's fastest settings, by a short run of each."""
    tried = {}
    for title, settings in opponents(name, at_once).items():
        if options.only in title:
            try:
                tried[title] = common.measure("trl", settings, options, 4)
                print(f"tried TRL, {title}: {tried[title]['speed']:.0f} tokens/s, {tried[title]['gib']:.1f} GiB", flush=True)
            except SystemExit as e:
                print(f"tried TRL, {title}: failed: {str(e).splitlines()[-2:]}", flush=True)
    if not tried:
        raise SystemExit(f"none of TRL's settings runs {name} with {at_once} rows at once")
    return max(tried, key=lambda title: tried[title]["speed"])


def ideal(shape, name, at_once):
    """Seconds that a micro-batch of `at_once` rows, and an optimizer step, need at least: by parts, each measured alone."""
    import torch

    from models import attention

    n, h, f, layers = at_once * LENGTH, shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    d = shape.get("head_dim", h // shape["num_attention_heads"])
    q, kv, v = shape["num_attention_heads"] * d, shape["num_key_value_heads"] * d, shape["vocab_size"]
    frozen = name.endswith("lora")

    def seconds(call, times=20):
        """Of one call, without what the host adds: replayed as a graph."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(times):
                call()
        found = []
        for _ in range(5):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / times / 1e3)
        return statistics.median(found)

    def products(tokens, inputs, outputs):
        x, w, g = (
            torch.randn(a, b, device="cuda", dtype=torch.bfloat16) for a, b in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        )
        total = seconds(lambda: x @ w.t()) + seconds(lambda: g @ w)
        return total + (0 if frozen else seconds(lambda: g.t() @ x))

    linear = {(h, q): 1, (h, kv): 2, (q, h): 1, (h, f): 2, (f, h): 1}
    gemm = layers * sum(times * products(n, *size) for size, times in linear.items()) + products(n, h, v)
    kernel = attention.choose("auto", torch.device("cuda"), torch.bfloat16)
    attend = attention.AttentionInterface()[kernel]
    rows = attention.Rows([LENGTH] * at_once).to("cuda")
    heads = [torch.randn(n, width, device="cuda", dtype=torch.bfloat16).view(1, n, -1, d).transpose(1, 2) for width in (q, kv, kv)]
    heads = [t.detach().requires_grad_() for t in heads]
    up = torch.randn(1, n, q // d, d, device="cuda", dtype=torch.bfloat16)

    def both():
        torch.autograd.grad(attend(None, *heads, None, rows=rows, scaling=d**-0.5)[0], heads, up)

    source = torch.empty(2**28, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source))  # bytes/s
    # what lies between the products, read once and written once in 16 bits, forward and backward: per layer and token, elements
    between = 2 * n * layers * (16 * h + 5 * (q + kv) + 8 * f)
    head = n * v * 4  # the table of logits, once in 32 bits
    trained = 0 if frozen else layers * sum(a * b * times for (a, b), times in linear.items()) + h * v
    parts = {"products": gemm, "attention": layers * seconds(both), "between": (between + head) / bandwidth}
    step = 28 * trained / bandwidth  # weights, gradients and AdamW's two states
    print(
        f"{kernel}; copies at {bandwidth / 1e12:.2f} TB/s; ms of a micro-batch: "
        + ", ".join(f"{k} {1e3 * t:.1f}" for k, t in parts.items())
    )
    return sum(parts.values()), step


def ideal_of(name, at_once):
    """`ideal` in a process of its own, which leaves the card free."""
    command = [sys.executable, __file__, "--ideal", name, "--at-once", str(at_once)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    print(lines[-2], flush=True)
    return map(float, lines[-1].split())


def compare(name, options):
    """Rows of the table for one model."""
    options.model = f"{options.work}/{name}"
    write_model(options.model, SHAPES[name])
    rows = []
    for at_once in options.at_once:
        best = None if options.alone else fastest(name, at_once, options)
        runs = {"ours": []} | ({"trl": []} if best else {})
        for _ in range(options.repeats):
            for side in runs:
                settings = ours(name, at_once) if side == "ours" else opponents(name, at_once)[best]
                runs[side].append(common.measure(side, settings, options, options.steps))
                print(f"{side}, {name}: {runs[side][-1]['speed']:.0f} tokens/s, {runs[side][-1]['gib']:.1f} GiB", flush=True)
        if best:
            common.check_curves(runs, 2e-2)
        rows.append(row(name, at_once, runs, best))
    shutil.rmtree(options.model)
    return rows


def row(name, at_once, runs, best):
    speed, gib = ({side: statistics.median(r[key] for r in rs) for side, rs in runs.items()} for key in ("speed", "gib"))
    micro_batch, update = ideal_of(name, at_once)
    fraction = (common.ROWS_PER_STEP // at_once * micro_batch + update) * speed["ours"] / (common.ROWS_PER_STEP * LENGTH)
    mfu = statistics.median(r["mfu"] for r in runs["ours"])
    cells = [name, f"{at_once * LENGTH}", f"{speed['ours']:.0f}", f"{100 * mfu:.1f} %", f"{fraction:.2f}", f"{gib['ours']:.1f}"]
    if best:
        cells += [f"{speed['trl']:.0f}", f"{gib['trl']:.1f}", f"{speed['ours'] / speed['trl']:.2f}x", best]
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--at-once", nargs="+", type=int, choices=[1, 2, 4], default=[1, 2], help="rows in a micro-batch")
    parser.add_argument("--steps", type=int, default=8, help=f"steps of a process; the first {common.WARM_UP} are left out")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each side")
    parser.add_argument("--alone", action="store_true", help="ours only")
    parser.add_argument("--only", default="", help="try TRL's settings with this in their title only")
    parser.add_argument("--ideal", choices=list(SHAPES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ideal:
        return print(*ideal(SHAPES[options.ideal], options.ideal, options.at_once[0]))
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as options.work:
        options.data = f"{options.work}/rows.jsonl"
        write_rows(options.data, options.steps * common.ROWS_PER_STEP)
        heading = "| | tokens at once | tokens/s | MFU | of what is attainable | GiB |"
        heading += "" if options.alone else " TRL, tokens/s | GiB | speed | TRL's settings |"
        rows = [row for name in options.shapes for row in compare(name, options)]
    print("\n".join(["", heading, "|---" * (heading.count("|") - 1) + "|", *rows]))


if __name__ == "__main__":
    main()
