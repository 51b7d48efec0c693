"""GRPO: our sampler against transformers' `generate`, and our step against TRL's. `python tests/benchmarks/grpo_vs_trl.py [--model FOLDER]`

Rollouts: prompts of 20 to 120 tokens, several completions each, sampled at temperature 1 until one of 1/64 of all tokens comes, so that
lengths differ as they do in practice; tokens that were asked for, a second. Both sides in one process and in turn, medians over the
repeats. On CUDA the decode steps' share of the bandwidth limit is printed: bytes of weights and caches that a step must read, over the
time it took, over what a plain copy reaches on the same card.

Steps: GRPOTrainer with its defaults against a run of ours, whole processes in turn, as many prompts, completions and tokens; TRL draws
other completions, so only what a step costs can be compared.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sft_vs_trl import ROOT, VOCABULARY, WARM_UP, make_clock, make_model, run

sys.path.insert(0, str(ROOT))

GROUP = 8
SHAPES = {  # random weights of the shapes that people train
    "smollm2-135m": {"layers": 30, "hidden": 576, "ffn": 1536, "heads": 9, "kv": 3, "dim": 64, "vocabulary": 49152},
    "qwen3-0.6b": {"layers": 28, "hidden": 1024, "ffn": 3072, "heads": 16, "kv": 8, "dim": 128, "vocabulary": 151936},
}


def make_shape(folder, name):
    """A folder with a Qwen3 of random weights and one of these shapes."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    s = SHAPES[name]
    shape = {"hidden_size": s["hidden"], "intermediate_size": s["ffn"], "num_hidden_layers": s["layers"], "vocab_size": s["vocabulary"]}
    heads = {"num_attention_heads": s["heads"], "num_key_value_heads": s["kv"], "head_dim": s["dim"]}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    config = Qwen3Config(**shape, **heads, **ids, max_position_embeddings=4096, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def rollouts(folder, options):
    """Prints both sides' tokens a second, and the ratio."""
    import torch
    from transformers import AutoModelForCausalLM

    from models import generate, load, sharding
    from train.config import Fsdp, Model

    device = sharding.start_ranks(600)
    model = load.build(Model(folder), folder, Fsdp(), device, 0)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).to(device).eval()
    stream, vocabulary = random.Random(0), model.config.vocab_size
    prompts = [[stream.randrange(vocabulary) for _ in range(stream.randint(20, 120))] for _ in range(options.prompts)]
    stops = list(range(0, vocabulary, 64))
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts) * GROUP, width, dtype=torch.int64)
    for row in range(len(ids)):
        ids[row, width - len(prompts[row // GROUP]) :] = torch.tensor(prompts[row // GROUP])
    real = torch.arange(width) >= width - torch.tensor([len(p) for p in prompts for _ in range(GROUP)])[:, None]
    padded = {"input_ids": ids.to(device), "attention_mask": real.long().to(device)}

    def ours(turn):
        keys = [[turn * 10**6 + i * GROUP + j for j in range(GROUP)] for i in range(len(prompts))]
        found = generate.generate(model, prompts, keys, generate.Sampling(options.tokens, 1.0), stops, options.batch_size)
        return sum(len(c.ids) for own in found for c in own)

    def theirs(turn):
        torch.manual_seed(turn)
        options_of = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": stops, "pad_token_id": 1}
        with torch.no_grad():
            out = plain.generate(**padded, max_new_tokens=options.tokens, **options_of)[:, width:]
        ended = torch.isin(out, torch.tensor(stops, device=device)).long().cumsum(-1)
        return int(((ended == 0) | ((ended == 1) & (ended.diff(dim=-1, prepend=ended[:, :1] * 0) == 1))).sum())

    speeds = {"ours": [], "generate": []}
    for turn in range(options.repeats + 1):
        for name, side in (("ours", ours), ("generate", theirs)):
            began = time.perf_counter()
            tokens = side(turn)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                speeds[name].append(tokens / (time.perf_counter() - began))
                print(f"  {name}: {tokens} tokens, {speeds[name][-1]:.0f} tokens/s", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(
        f"| {options.label} | {medians['ours']:.0f} | {medians['generate']:.0f} | {medians['ours'] / medians['generate']:.2f}x |",
        flush=True,
    )
    if device.type == "cuda":
        bandwidth_share(model, prompts, stops, options)


def bandwidth_share(model, prompts, stops, options):
    """What decode steps read, by what they take, as a share of the card's copy bandwidth; no row ends, so the batch is constant."""
    import torch

    from models import generate

    big = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    other.copy_(big)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        other.copy_(big)
    torch.cuda.synchronize()
    limit = 20 * 2 * 2**30 / (time.perf_counter() - began)  # bytes/s, read and written
    seconds, cache = [], 0
    step = generate.Decoder.step

    def timed(self):
        nonlocal cache
        torch.cuda.synchronize()
        began = time.perf_counter()
        step(self)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        held = int((self.position[: self.size] + 1).sum())
        cache = held * sum(2 * k.shape[1] * k.shape[3] * k.element_size() for k in self.keys.values())

    generate.Decoder.step = timed
    keys = [[i * GROUP + j for j in range(GROUP)] for i in range(len(prompts))]
    generate.generate(model, prompts, keys, generate.Sampling(options.tokens, 1.0), [], options.batch_size)
    generate.Decoder.step = step
    weights = 2 * sum(p.numel() for p in model.parameters())  # bfloat16
    fast = statistics.median(seconds)
    print(
        f"  decode step of {min(options.batch_size, len(prompts) * GROUP)} rows: {fast * 1e3:.2f} ms, "
        f"{(weights + cache) / 2**30:.2f} GiB to read, {100 * (weights + cache) / fast / limit:.0f} % of {limit / 1e12:.2f} TB/s"
    )


def trl_side(job):
    """Train with GRPOTrainer in this process; writes the seconds of its steps to job["result"]."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    clock = make_clock()
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "bf16": False}
    sizes = {"per_device_train_batch_size": job["rows"], "num_generations": GROUP, "max_completion_length": job["tokens"]}
    config = GRPOConfig(output_dir=job["output_dir"], max_steps=job["steps"], **quiet, **sizes)
    rows = datasets.Dataset.from_json(job["data"], cache_dir=job["output_dir"])
    GRPOTrainer(job["model"], even, args=config, train_dataset=rows, callbacks=[clock]).train()
    tokens = [entry["completions/mean_length"] for entry in clock.logs]
    Path(job["result"]).write_text(json.dumps({"seconds": clock.seconds(), "length": statistics.mean(tokens[WARM_UP:])}))


def even(completion_ids, **columns):
    """A reward that any model can learn from: the share of even tokens."""
    return [sum(t % 2 == 0 for t in ids) / max(len(ids), 1) for ids in completion_ids]


def step_of(side, options):
    folder = Path(tempfile.mkdtemp(dir=options.work))
    job = {"output_dir": str(folder / "run"), "model": options.small, "data": options.data, "result": str(folder / "result.json")}
    job |= {"steps": options.steps, "rows": options.prompts * GROUP, "tokens": options.tokens}
    if side == "trl":
        gib = run([__file__, "--job", json.dumps(job)], folder / "output.txt")
        found = json.loads((folder / "result.json").read_text())
    else:
        settings = {
            "algorithm": "grpo",
            "output_dir": job["output_dir"],
            "model": {"model_name_or_path": job["model"]},
            "data": {"train": job["data"]},
            "train": {"global_batch_size": job["rows"], "max_steps": job["steps"], "learning_rate": 1e-6, "micro_batch_tokens": 2048},
            "grpo": {"num_generations": GROUP, "max_completion_length": job["tokens"], "reward_funcs": [f"{__file__}:even"]},
            "log": {"report_to": []},
        }
        (folder / "recipe.yaml").write_text(json.dumps(settings))
        gib = run([str(ROOT / "launch/train.py"), "--config", str(folder / "recipe.yaml")], folder / "output.txt")
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        found = {"seconds": [line["step_time"] for line in lines]}
        found["length"] = statistics.mean(line["completions/mean_length"] for line in lines[WARM_UP:])
    shutil.rmtree(folder)
    out = {"seconds": statistics.median(found["seconds"][WARM_UP:]), "gib": gib, "length": found["length"]}
    print(f"  {side}: {out['seconds']:.2f} s a step, {out['gib']:.2f} GiB, completions of {out['length']:.0f} tokens", flush=True)
    return out


def steps(options):
    """Prints what a whole step takes on both sides, and the ratio."""
    options.small, options.data = f"{options.work}/small", f"{options.work}/prompts.jsonl"
    make_model(options.small)
    stream = random.Random(0)
    rows = [{"prompt": " ".join(f"w{stream.randrange(VOCABULARY - 7)}" for _ in range(stream.randint(20, 120)))} for _ in range(512)]
    Path(options.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = {"ours": [], "trl": []}
    for _ in range(options.repeats):
        for side in runs:
            runs[side].append(step_of(side, options))
    medians = {(side, key): statistics.median(r[key] for r in rs) for side, rs in runs.items() for key in ("seconds", "gib")}
    ours, theirs = (f"{medians[side, 'seconds']:.2f} s, {medians[side, 'gib']:.2f} GiB" for side in runs)
    print(f"| GRPO step | {ours} | {theirs} | {medians['trl', 'seconds'] / medians['ours', 'seconds']:.2f}x |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help=f"prompts of a rollout, {GROUP} completions each")
    parser.add_argument("--tokens", type=int, default=256, help="longest completion")
    parser.add_argument("--batch-size", type=int, default=256, help="completions that our sampler decodes at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help=f"of a process; the first {WARM_UP} are left out")
    parser.add_argument("--only", choices=["rollouts", "steps"])
    parser.add_argument(
        "--shapes", nargs="*", choices=list(SHAPES), help="random models to sample from; default: the small one of the steps"
    )
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return trl_side(options.job)
    with tempfile.TemporaryDirectory() as options.work:
        for name in options.shapes or ["small"]:
            if options.only != "steps":
                options.label, folder = name, f"{options.work}/{name}"
                make_shape(folder, name) if options.shapes else make_model(folder)
                rollouts(folder, options)
        if options.only != "rollouts":
            steps(options)


if __name__ == "__main__":
    main()
