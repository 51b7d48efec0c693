"""DPO, SimPO, KTO and ORPO, ours against TRL's trainers with their defaults: examples a second and peak memory.

`python tests/benchmarks/preference_vs_trl.py [--algorithms dpo,kto]`: whole processes in turn on the same model, data, float type and
threads, medians over the repeats. Ours pays for its reference pass: its seconds are counted with the steps'. DPO's losses must agree
before a ratio is printed (the others tokenise or order rows differently; tests/equivalence compares them). KTO's examples are single
answers, the others' are pairs.
"""

import argparse
import json
import random
import re
import shutil
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from sft_vs_trl import LENGTHS, ROOT, VOCABULARY, WARM_UP, make_model, run

BATCH = 8  # TRL's default per_device_train_batch_size
SETTINGS = {"dpo": {}, "simpo": {"beta": 2.0, "simpo_gamma": 1.0}, "kto": {}, "orpo": {}}


def make_pairs(path, count, labelled):
    """Conversations of log-uniform length: a prompt of a third of the words, and two answers of the rest."""
    stream, words = random.Random(0), [f"w{i}" for i in range(VOCABULARY - 7)]
    with open(path, "w") as f:
        for i in range(count):
            size = int(LENGTHS[0] * (LENGTHS[1] / LENGTHS[0]) ** stream.random())
            prompt, a, b = (" ".join(stream.choices(words, k=n)) for n in (size // 3, size * 2 // 3, size * 2 // 3))
            turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}
            row = {"prompt": prompt} | ({"completion": a, "label": i % 2 == 0} if labelled else {"chosen": a, "rejected": b})
            f.write(json.dumps({k: [{"role": turns[k], "content": v}] if k in turns else v for k, v in row.items()}) + "\n")


def trl_side(job):
    """Train with TRL in this process, as `job` says; writes its numbers to job["result"]."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config, trainer = {
        "dpo": (DPOConfig, DPOTrainer),
        "kto": (KTOConfig, KTOTrainer),
        "simpo": (CPOConfig, CPOTrainer),
        "orpo": (ORPOConfig, ORPOTrainer),
    }[job["algorithm"]]
    cuda, ends, losses = torch.cuda.is_available(), [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            ends.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs, **_):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": not cuda, "bf16": cuda}
    settings = SETTINGS[job["algorithm"]] | ({"loss_type": "simpo", "cpo_alpha": 0.0} if job["algorithm"] == "simpo" else {})
    args = config(output_dir=job["output_dir"], max_steps=job["steps"], **quiet, **settings)
    rows = datasets.Dataset.from_json(job["data"], cache_dir=job["output_dir"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    trainer(model, args=args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(job["model"]), callbacks=[Clock()]).train()
    gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    Path(job["result"]).write_text(json.dumps({"losses": losses, "seconds": [b - a for a, b in pairwise(ends)], "gib": gib}))


def measure(side, job, work):
    """Run one side in a process of its own: losses, examples a second of the steps after the first ones, peak memory in GiB."""
    folder = Path(tempfile.mkdtemp(dir=work))
    job = job | {"output_dir": str(folder / "run"), "result": str(folder / "result.json")}
    if side == "trl":
        gib = run([__file__, "--job", json.dumps(job)], folder / "output.txt")
        out, reference = json.loads(Path(job["result"]).read_text()), 0.0
    else:
        algorithm = job["algorithm"]
        recipe = {"algorithm": algorithm, "output_dir": job["output_dir"], algorithm: SETTINGS[algorithm]}
        recipe |= {"model": {"model_name_or_path": job["model"]}, "data": {"train": job["data"]}, "log": {"report_to": []}}
        train = {"global_batch_size": BATCH, "max_steps": job["steps"], "learning_rate": 1e-6, "micro_batch_tokens": 2048}
        (folder / "recipe.yaml").write_text(json.dumps({k: v for k, v in (recipe | {"train": train}).items() if v}))
        gib = run([str(ROOT / "launch/train.py"), "--config", str(folder / "recipe.yaml")], folder / "output.txt")
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        out = {"losses": [x["loss"] for x in lines], "seconds": [x["step_time"] for x in lines], "gib": lines[-1].get("peak_memory_gib")}
        passes = re.findall(r"examples in ([\d.]+) s", (folder / "output.txt").read_text())
        reference = sum(map(float, passes)) / job["steps"]  # seconds a step: the data are just one epoch
    shutil.rmtree(folder)
    steady = out["seconds"][WARM_UP:]
    return out | {"speed": BATCH * len(steady) / (sum(steady) + reference * len(steady)), "gib": out["gib"] or gib}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", default="dpo,simpo,kto,orpo")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return trl_side(options.job)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        make_model(f"{work}/model")
        for algorithm in options.algorithms.split(","):
            job = {"algorithm": algorithm, "model": f"{work}/model", "data": f"{work}/{algorithm}.jsonl", "steps": options.steps}
            make_pairs(job["data"], options.steps * BATCH, algorithm == "kto")
            runs = {"ours": [], "trl": []}
            for _ in range(options.repeats):
                for side in runs:
                    runs[side].append(measure(side, job, work))
                    print(f"{algorithm}, {side}: {runs[side][-1]['speed']:.2f} /s in {runs[side][-1]['gib']:.3f} GiB", flush=True)
            worst = max(abs(a - b) / abs(b) for a, b in zip(runs["ours"][0]["losses"], runs["trl"][0]["losses"]))
            if algorithm == "dpo" and worst > 1e-2:  # TRL logs few digits
                raise SystemExit(f"DPO's losses differ by {worst:.1e}\n{runs['ours'][0]['losses']}\n{runs['trl'][0]['losses']}")
            speed, gib = ({side: statistics.median(r[k] for r in rs) for side, rs in runs.items()} for k in ("speed", "gib"))
            ratios = f"{speed['ours'] / speed['trl']:.2f}x | {gib['ours'] / gib['trl']:.2f}x"
            rows.append(f"| {algorithm} | {speed['ours']:.2f} | {speed['trl']:.2f} | {gib['ours']:.2f} | {gib['trl']:.2f} | {ratios} |")
    print("\n| | ours, examples/s | TRL | ours, peak GiB | TRL | speed | memory |\n|---|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
