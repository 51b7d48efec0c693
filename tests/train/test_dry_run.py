"""`--dry_run`: what it says of memory against what a real run takes, and what it shows and refuses."""

import json
import os
import random
import re
import subprocess
import sys

import pytest
import yaml
from transformers import AutoModelForCausalLM, Qwen3Config

from launch.train import ALGORITHMS
from tests.conftest import ROOT
from train import config, dry_run, toy

MEASURE = """
import json, re, sys
from pathlib import Path
from launch import train as launcher
from models import sharding
from train import config

def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

device, publish, peaks = sharding.start_ranks(60), launcher.checkpoint.publish, []
def measured_publish(*args):
    peaks[-1] = status("VmHWM") - peaks[-1]  # before the writing of files, which takes memory of its own
    publish(*args)
launcher.checkpoint.publish = measured_publish
for path in sys.argv[1:]:
    peaks.append(status("VmRSS"))
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is of what follows
    launcher.run(config.parse(["--config", path]), device, {})
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Runs on rows of 256 tokens, of all weights and of adapters: of a small model, after which all libraries are warm, and a larger."""
    folder = tmp_path_factory.mktemp("dry")
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64, "vocab_size": 4096}
    size = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4}
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 2}
    stream = random.Random(0)
    texts = ({"text": "".join(stream.choices(toy.LETTERS, k=255))} for _ in range(8))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    for name, more in (("model", size), ("small", size | {"hidden_size": 48, "num_hidden_layers": 1})):
        toy.write_model("tiny", folder / name)
        shape = Qwen3Config(**more, **heads, **ends, tie_word_embeddings=False, dtype="float32")
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder / name)
    train = {"max_steps": 2, "global_batch_size": 4, "micro_batch_tokens": 512}
    known = {"data": {"train": str(folder / "rows.jsonl")}, "train": train, "log": {"report_to": []}}
    for base in ("small", "model"):
        for kind in ("none", "selective", "full"):
            run = {"model": {"model_name_or_path": str(folder / base)}, "fsdp": {"activation_checkpointing": kind}}
            (folder / f"{base}-{kind}.yaml").write_text(yaml.safe_dump({"output_dir": str(folder / f"{base}-{kind}-run")} | known | run))
    return folder


def described(path, ranks=1, device="cpu", **options):
    cfg = config.parse(["--config", str(path), *(f"--{name}={value}" for name, value in options.items())])
    return "\n".join(dry_run.describe(cfg, ALGORITHMS[cfg.algorithm], ranks, device))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_memory_is_that_of_a_real_run(recipes, checkpointing):
    """To 15 %, with all weights trained."""
    freed = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}  # else glibc keeps what is no longer used
    command = [sys.executable, "-c", MEASURE, *(str(recipes / f"{name}-{checkpointing}.yaml") for name in ("small", "model"))]
    run = subprocess.run(command, env=os.environ | freed | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    _, measured = json.loads(run.stdout.splitlines()[-1])
    number, unit = re.search(r"peak ([\d.]+) (GiB|MiB)", described(recipes / f"model-{checkpointing}.yaml")).groups()
    estimate = float(number) * {"GiB": 2**30, "MiB": 2**20}[unit]
    print(checkpointing, estimate / measured)
    assert abs(estimate / measured - 1) < 0.15, (estimate, measured)


def test_what_it_says_of_many_ranks(recipes):
    """Weights, gradients and optimizer by hand: the parameters in float32, cut by eight; under bfloat16 activations shrink."""
    alone, eight = described(recipes / "model-none.yaml"), described(recipes / "model-none.yaml", 8, "cuda")
    count = 2 * 4096 * 384 + 4 * (4 * 384 * 384 + 3 * 384 * 1024 + 2 * 384 + 2 * 64) + 384
    assert f"{count:,} parameters, {count:,} of them trained, bfloat16, 8 x cuda" in eight
    for ranks, text in ((1, alone), (8, eight)):
        mib = count / ranks / 2**20
        assert f"weights {dry_run.in_words(mib * 4 * 2**20)}, gradients {dry_run.in_words(mib * 4 * 2**20)}, " in text
        assert f"optimizer {dry_run.in_words(mib * 8 * 2**20)}, " in text
    assert "run: 8 examples, 2 steps of 4, 2 micro-batches a rank and step, 2,048 tokens" in alone
    assert f"disk: {dry_run.in_words(count * 12)} a checkpoint, of which 2 are kept; {dry_run.in_words(count * 4)} for final/" in alone


def test_grpo_keeps_caches(recipes):
    grpo = {"algorithm": "grpo", "data.train": "builtin:letters", "train.global_batch_size": 16, "grpo.max_completion_length": 100}
    short, long = (described(recipes / "model-none.yaml", **grpo | {"grpo.max_completion_length": n}) for n in (100, 1000))
    rollouts = [float(re.search(r"rollouts ([\d.]+)", text)[1]) * (1 if "rollouts 0." not in text else 1024) for text in (short, long)]
    unit = 16 * 900 * 2 * 4 * 6 * 64 * 4 / 2**20  # 16 rows, 900 tokens more, keys and values of 4 layers, 6 heads, 64 numbers of 4 bytes
    assert rollouts[1] - rollouts[0] == pytest.approx(unit, rel=0.1)


def test_the_command(recipes, tmp_path):
    """Nothing is written, and no ranks are started."""
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--dry_run=64xcuda", "--output_dir", "nothing"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "[[" in run.stdout and "bfloat16, 64 x cuda" in run.stdout, run.stderr
    assert list(tmp_path.iterdir()) == []
