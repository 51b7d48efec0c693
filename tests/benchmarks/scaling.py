"""Several GPUs of one host: `python tests/benchmarks/scaling.py --ranks 1 2`. Tokens a second of each, and talk that is not hidden.

SFT, DPO and GRPO at the shapes of sft_on_gpu.py with random weights, eight examples a GPU and step, whatever their number; weights sharded
(`fsdp`), sharded in each of several groups (`hsdp`), or whole on each GPU (`whole`). The share of communication is that of a step's time,
by torch's profiler on rank 0 over the last two steps, in which the GPU runs NCCL's kernels and no others.

`--trl` adds TRL's SFTTrainer under accelerate's FSDP2 with the same rows, and says which dtype its log-probs have at the loss.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import sft_on_gpu
import sft_vs_trl as common

STEPS, PROFILED, EXAMPLES = 10, 2, 8  # of a process; of them under the profiler; a rank and step
LAYOUTS = {"fsdp": {"reshard_after_forward": True}, "hsdp": {"reshard_after_forward": True}, "whole": {"reshard_after_forward": False}}
ANSWER = 256  # tokens of GRPO's completions
TINY = sft_on_gpu.QWEN | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 8192}
SHAPES = sft_on_gpu.SHAPES | {"tiny": TINY}  # to see, also on a CPU, that everything runs; its figures mean nothing


def write_inputs(folder, count):
    """Rows for each algorithm, in pairs of half the length of a row."""
    sft_on_gpu.write_rows(f"{folder}/sft.jsonl", count)
    stream = random.Random(0)

    def words(n):
        return " ".join(f"w{stream.randrange(common.VOCABULARY - 7)}" for _ in range(n))

    for name, row in {
        "dpo": lambda: {
            "prompt": words(sft_on_gpu.LENGTH // 8),
            "chosen": " " + words(sft_on_gpu.LENGTH // 4),
            "rejected": " " + words(sft_on_gpu.LENGTH // 4),
        },
        "grpo": lambda: {"prompt": words(ANSWER)},
    }.items():
        Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(count)))
    reward = "def even(completion_ids, **_):\n    return [sum(i % 2 == 0 for i in ids) for ids in completion_ids]\n"
    Path(folder, "rewards.py").write_text(reward)


def recipe(algorithm, shape, layout, ranks, folder, steps):
    """Settings of our run."""
    train = {"global_batch_size": EXAMPLES * ranks, "max_steps": steps, "micro_batch_tokens": sft_on_gpu.LENGTH, "learning_rate": 1e-5}
    known = {"algorithm": algorithm, "output_dir": f"{folder}/run", "train": train, "log": {"report_to": []}}
    known |= {
        "model": {"model_name_or_path": f"{folder}/{shape}"},
        "data": {"train": f"{folder}/{algorithm}.jsonl", "max_length": sft_on_gpu.LENGTH},
    }
    known["fsdp"] = LAYOUTS[layout] | ({"replicas": ranks} if layout == "hsdp" else {})
    if algorithm == "grpo":
        known["grpo"] = {"reward_funcs": [f"{folder}/rewards.py:even"], "num_generations": 8, "max_completion_length": ANSWER}
        train["global_batch_size"] *= 8
    return known | ({"lora": common.ADAPTERS} if shape.endswith("lora") else {})


def worker(path, result):
    """One rank of our run, its last steps under the profiler."""
    sys.path.insert(0, str(common.ROOT))
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile, schedule

    from launch import train as launcher
    from models import sharding
    from train import config

    cfg, device = config.parse(["--config", path]), sharding.start_ranks(600)
    when = schedule(wait=cfg.train.max_steps - PROFILED - 1, warmup=1, active=PROFILED, repeat=1)
    with profile(activities=[getattr(ProfilerActivity, device.type.upper())], schedule=when) as profiler:
        report = launcher.Run.report

        def watched(self, step, metrics, preempted):
            report(self, step, metrics, preempted)
            if step < cfg.train.max_steps:  # the last call would end what is read below
                profiler.step()

        launcher.Run.report = watched
        launcher.run(cfg, device, {"step": 0})
    if dist.get_rank() == 0:
        kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        spans = {kind: [e.time_range for e in kernels if ("nccl" in e.name.lower()) == kind] for kind in (True, False)}
        talk, rest = (union([(t.start, t.end) for t in found]) for found in spans.values())
        everything = union(talk + rest)
        whole = everything[-1][1] - everything[0][0] if everything else 0
        shares = {"talk": length(talk), "exposed": length(everything) - length(rest)}
        Path(result).write_text(json.dumps({name: part / whole if whole else None for name, part in shares.items()}))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def union(spans):
    """Spans of time, put together where they overlap, in order."""
    out = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


def length(spans):
    return sum(end - start for start, end in spans)


def torchrun(ranks):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def ours(algorithm, shape, layout, ranks, options):
    """tokens/s of a rank (median step), peak GiB of rank 0, shares of the step: talk in all, and not hidden."""
    folder = options.work
    path, result = Path(folder, "recipe.yaml"), Path(folder, "result.json")
    path.write_text(json.dumps(recipe(algorithm, shape, layout, ranks, folder, options.steps)))
    common.run([*torchrun(ranks), __file__, "--worker", str(path), str(result)], f"{folder}/output.txt", ranks)
    lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(f"{folder}/run")
    counted = lines[common.WARM_UP : -PROFILED - 1]
    speed = statistics.median(line["tokens_per_second"] for line in counted) / ranks
    out = {"speed": speed, "gib": lines[-1].get("reserved_memory_gib"), "losses": [line["loss"] for line in lines]}
    return out | json.loads(result.read_text())


def trl(shape, ranks, options):
    """The same numbers of TRL's SFTTrainer under accelerate's FSDP2, and the dtype of its log-probs."""
    folder = options.work
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": EXAMPLES, "max_length": sft_on_gpu.LENGTH, "packing": True}
    settings |= {"learning_rate": 1e-5, "model_init_kwargs": {"attn_implementation": options.trl}} | common.UNCHECKED
    job = {"output_dir": f"{folder}/run", "model": f"{folder}/{shape}", "data": f"{folder}/sft.jsonl", "steps": options.steps}
    job |= {"result": f"{folder}/result.json", "settings": settings}
    job |= common.PEFT if shape.endswith("lora") else {}
    fsdp = {"use_fsdp": "", "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "mixed_precision": "bf16"}
    flags = [word for key, value in fsdp.items() for word in (f"--{key}", str(value)) if word]
    command = ["-m", "accelerate.commands.launch", "--num_processes", str(ranks), *flags]
    common.run([*command, str(common.HERE), "--side", "trl", "--job", json.dumps(job)], f"{folder}/output.txt", ranks)
    out = json.loads(Path(job["result"]).read_text())
    counted = slice(common.WARM_UP, None)
    speed = statistics.median(n / t for n, t in zip(out["tokens"][counted], out["seconds"][counted])) / ranks
    shutil.rmtree(f"{folder}/run", ignore_errors=True)
    return {"speed": speed, "gib": out["device_gib"], "dtypes": out["dtypes"], "losses": out["losses"], "exposed": None, "talk": None}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["qwen3-0.6b", "qwen3-1.7b"])
    parser.add_argument("--algorithms", nargs="+", choices=["sft", "dpo", "grpo"], default=["sft", "dpo", "grpo"])
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--trl", metavar="ATTENTION", help="TRL too, with this attention, e.g. sdpa")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--length", type=int, default=sft_on_gpu.LENGTH, help="tokens of a row")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(*options.worker)
    sft_on_gpu.LENGTH = options.length
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    heading, rows = "| | | GPUs | tokens/s of each | of one GPU's | GiB | communication | not hidden |", []
    with tempfile.TemporaryDirectory(dir=memory) as options.work:
        write_inputs(options.work, options.steps * EXAMPLES * max(options.ranks))
        for shape in options.shapes:
            sft_on_gpu.write_model(f"{options.work}/{shape}", SHAPES[shape])
            sides = {(f"{shape}, {a}", layout): partial(ours, a, shape, layout) for a in options.algorithms for layout in options.layouts}
            sides |= {(f"{shape}, sft", "TRL, FSDP2"): partial(trl, shape)} if options.trl else {}
            for (title, layout), side in sides.items():
                alone = None
                for ranks in options.ranks if layout != "hsdp" else [n for n in options.ranks if n > 1]:
                    found = side(ranks, options)
                    alone = alone or (found["speed"] if ranks == 1 else None)
                    gib = f"{found['gib']:.1f}" if found["gib"] else ""
                    scaled = f"{found['speed'] / alone:.2f}" if alone else ""
                    shares = [f"{100 * found[k]:.0f} %" if found[k] is not None else "" for k in ("talk", "exposed")]
                    cells = [title, layout, f"{ranks}", f"{found['speed']:.0f}", scaled, gib, *shares]
                    rows.append("| " + " | ".join(cells) + " |")
                    print(rows[-1], "losses", found["losses"], found.get("dtypes", ""), flush=True)
            shutil.rmtree(f"{options.work}/{shape}")
    print("\n".join(["", heading, "|---" * (heading.count("|") - 1) + "|", *rows]))


if __name__ == "__main__":
    main()
