"""DPO, SimPO, KTO and ORPO, ours against TRL's trainers with their defaults: examples a second and peak memory.

`python tests/benchmarks/preference_vs_trl.py [--algorithms dpo,kto] [--no-checkpointing]`: the same model, rows, order, learning rate,
float type and threads; whole processes in turn, medians over the repeats. KTO's examples are single answers, the others' are pairs.

A run's speed is the examples of a step by its median step time, data included, after the first steps. TRL computes the reference's
log-probs in each step, ours once before the first: its seconds are shared out among the steps of the one epoch, so ours pays for them
in full. No ratio is printed before every step has the same tokens and the same loss on both sides. Memory is as in sft_vs_trl.py.
"""

import argparse
import json
import random
import re
import shutil
import statistics
import tempfile
from pathlib import Path

from sft_vs_trl import OURS, ROOT, UNCHECKED, VOCABULARY, WARM_UP, make_clock, make_model, run

LENGTHS = (50, 400)  # tokens of prompt and one answer
RATE = 1e-4  # above the defaults of both, for losses that move
SETTINGS = {"dpo": {}, "simpo": {"beta": 2.0, "simpo_gamma": 1.0}, "kto": {}, "orpo": {}}
TOLERANCE = {"dpo": 1e-4, "simpo": 1e-4, "kto": 3e-2, "orpo": 1e-4}  # the mismatched rows of KTO's baseline are not the same ones


def make_examples(count, labelled):
    """Conversations of log-uniform length: a prompt of a third of the words, and two answers, or one with a label, of the rest."""
    stream, words = random.Random(0), [f"w{i}" for i in range(VOCABULARY - 7)]
    weights = [1 / (i + 10) for i in range(len(words))]

    def turn(role, size):
        return [{"role": role, "content": " ".join(stream.choices(words, weights, k=size))}]

    def example(i):
        size = int(LENGTHS[0] * (LENGTHS[1] / LENGTHS[0]) ** stream.random())
        answers = {"completion": size * 2 // 3} if labelled else {"chosen": size * 2 // 3, "rejected": size * stream.randint(1, 2) // 3}
        row = {"prompt": turn("user", size // 3)} | {name: turn("assistant", n) for name, n in answers.items()}
        return row | ({"label": i % 2 == 0} if labelled else {})

    return [example(i) for i in range(count)]


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def trl_side(job):
    """Train with TRL in this process, as `job` says; writes its numbers to job["result"]."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config, trainer = {
        "dpo": (DPOConfig, DPOTrainer),
        "kto": (KTOConfig, KTOTrainer),
        "simpo": (CPOConfig, CPOTrainer),
        "orpo": (ORPOConfig, ORPOTrainer),
    }[job["algorithm"]]

    cuda, clock, tokens = torch.cuda.is_available(), make_clock(), []

    class Counted(trainer):
        def training_step(self, model, inputs, *args):
            masks = (inputs.get(f"{rows}attention_mask") for rows in ("", "chosen_", "rejected_"))
            tokens.append(sum(int(mask.sum()) for mask in masks if mask is not None))
            return super().training_step(model, inputs, *args)

    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": not cuda, "bf16": cuda}
    settings = job["settings"] | ({"loss_type": "simpo", "cpo_alpha": 0.0} if job["algorithm"] == "simpo" else {})
    args = config(output_dir=job["output_dir"], max_steps=job["steps"], learning_rate=RATE, **quiet, **settings)
    rows = datasets.Dataset.from_json(job["data"], cache_dir=job["output_dir"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    Counted(model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[clock]).train()
    result = {"losses": [entry["loss"] for entry in clock.logs], "tokens": tokens, "seconds": clock.seconds()}
    result["device_gib"] = torch.cuda.max_memory_reserved() / 2**30 if cuda else None
    Path(job["result"]).write_text(json.dumps(result))


def measure(side, job):
    """Run one side in a process of its own: losses and tokens of each step, speed (examples/s), peak memory (GiB)."""
    import torch

    folder = Path(tempfile.mkdtemp(dir=Path(job["model"]).parent))
    job = job | {"output_dir": str(folder / "run"), "result": str(folder / "result.json"), "data": job["data"][side]}
    reference = 0.0  # seconds a step
    if side == "trl":
        host_gib = run([__file__, "--job", json.dumps(job)], folder / "output.txt")
        out = json.loads(Path(job["result"]).read_text())
    else:
        train = {"global_batch_size": job["batch"], "max_steps": job["steps"], "learning_rate": RATE}
        recipe = {"algorithm": job["algorithm"], "output_dir": job["output_dir"], "model": {"model_name_or_path": job["model"]}}
        recipe |= {"data": {"train": job["data"]}, "log": {"report_to": []}, job["algorithm"]: SETTINGS[job["algorithm"]]}
        recipe["train"] = train | OURS["cuda" if torch.cuda.is_available() else "cpu"].get("train", {})
        (folder / "recipe.yaml").write_text(json.dumps({name: block for name, block in recipe.items() if block}))
        host_gib = run([str(ROOT / "launch/train.py"), "--config", str(folder / "recipe.yaml")], folder / "output.txt")
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        totals = [line["num_tokens"] for line in lines]
        out = {"losses": [line["loss"] for line in lines], "tokens": [b - a for a, b in zip((0, *totals), totals)]}
        out |= {"seconds": [line["step_time"] for line in lines], "device_gib": lines[-1].get("reserved_memory_gib")}
        passes = re.findall(r"examples in ([\d.]+) s", (folder / "output.txt").read_text())
        assert len(passes) == (job["algorithm"] in ("dpo", "kto")), passes
        reference = sum(map(float, passes)) / job["steps"]
    shutil.rmtree(folder)
    out["speed"] = job["batch"] / (statistics.median(out["seconds"][WARM_UP:]) + reference)
    return out | {"gib": out["device_gib"] or host_gib}


def check_curves(algorithm, ours, theirs):
    """Refuse to compare runs that do not train alike: tokens of each step equal, losses equal to TOLERANCE."""
    if ours["tokens"] != theirs["tokens"]:
        raise SystemExit(f"{algorithm}: the steps differ: tokens {ours['tokens']} (ours), {theirs['tokens']} (TRL)")
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"]))
    curve = f"{algorithm}: losses from {theirs['losses'][0]:.5f} to {theirs['losses'][-1]:.5f}, largest difference {worst:.1e} of the loss"
    if worst > TOLERANCE[algorithm]:
        raise SystemExit(f"{curve}, more than {TOLERANCE[algorithm]:.0e}\n{ours['losses']}\n{theirs['losses']}")
    print(curve, flush=True)


def compare(algorithm, options, work):
    """One row of the table: medians of both sides, whose processes take turns."""
    from train.batches import examples_of

    count = options.steps * options.batch
    rows, order = make_examples(count, algorithm == "kto"), examples_of(1, count, count, seed=42)
    data = {side: f"{work}/{algorithm}-{side}.jsonl" for side in ("ours", "trl")}
    write(data["ours"], rows)
    write(data["trl"], [rows[i] for i in order] if algorithm == "kto" else rows)  # TRL's KTO keeps the file's order
    settings = SETTINGS[algorithm] | {"per_device_train_batch_size": options.batch} | (UNCHECKED if options.no_checkpointing else {})
    job = {"algorithm": algorithm, "model": f"{work}/model", "data": data, "steps": options.steps, "settings": settings}
    job["batch"] = options.batch
    runs = {side: [] for side in data}
    for _ in range(options.repeats):
        for side, done in runs.items():
            done.append(measure(side, job))
            print(f"{algorithm}, {side}: {done[-1]['speed']:.2f} examples/s, {done[-1]['gib']:.3f} GiB", flush=True)
    check_curves(algorithm, runs["ours"][0], runs["trl"][0])
    speed, gib = ({side: statistics.median(r[k] for r in done) for side, done in runs.items()} for k in ("speed", "gib"))
    ratios = f"{speed['ours'] / speed['trl']:.2f}x | {gib['ours'] / gib['trl']:.2f}x"
    return f"| {algorithm} | {speed['ours']:.2f} | {speed['trl']:.2f} | {gib['ours']:.2f} | {gib['trl']:.2f} | {ratios} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", default="dpo,simpo,kto,orpo")
    parser.add_argument("--smollm2", action="store_true", help="the shape of SmolLM2-135M, with random weights")
    parser.add_argument("--batch", type=int, default=8, help="examples of a step; 8 is TRL's default")
    parser.add_argument("--steps", type=int, default=6, help=f"steps of a process; the first {WARM_UP} are left out")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--no-checkpointing", action="store_true", help="take gradient checkpointing, a default, from TRL")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return trl_side(options.job)
    with tempfile.TemporaryDirectory() as work:
        make_model(f"{work}/model", layers=4, smollm2=options.smollm2)
        rows = [compare(algorithm, options, work) for algorithm in options.algorithms.split(",")]
    print("\n| | ours, examples/s | TRL | ours, peak GiB | TRL | speed | memory |\n|---|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
