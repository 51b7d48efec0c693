"""What tests share: a process group of one rank, tiny models, data of unequal lengths, and real runs of launch/train.py."""

import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # before anything reads them

import psutil
import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from launch import train as launcher
from models import sharding
from train import config, loop, toy

ROOT = Path(__file__).resolve().parents[1]
TOTALS = dict.fromkeys(("all_tokens", "trained_tokens"), 1.0)
TIMINGS = {*loop.speeds(TOTALS, 1.0, 1.0, torch.device("cpu"), None), "mfu", "mfu_noncausal", "peak_memory_gib", "reserved_memory_gib"}
TIMINGS |= {"rollout_time", "rollout_tokens_per_second"}  # of metrics.jsonl, all that changes from run to run
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 2,
}
SHAPES = {
    "llama": LlamaConfig(**TINY, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**TINY, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**TINY, tie_word_embeddings=True, sliding_window=16),
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def one_rank():
    """A process group of this process alone, for tests that call the product's functions directly."""
    device = sharding.start_ranks(60)
    yield device
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """shape -> a Hugging Face folder with a tiny random model of that shape and a tokenizer of single characters."""

    @cache
    def make(shape):
        folder = tmp_path_factory.mktemp("models") / shape
        toy.write_model("tiny", folder)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.float32).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """(form, rows) -> a .jsonl file of random letters, 5 to 60 tokens a row; form: text | completion (a conversation) | pairs."""

    @cache
    def make(form, rows):
        stream = random.Random(rows)

        def word(low, high):
            length = low + int((high - low + 1) * stream.random() ** 2)  # more short than long
            return "".join(stream.choices(toy.LETTERS, k=length))

        def row():
            if form == "text":
                return {"text": word(4, 59)}
            if form == "pairs":
                return {"prompt": word(1, 20), "chosen": word(1, 30), "rejected": word(1, 30)}
            prompt, completion = [{"role": "user", "content": word(1, 20)}], [{"role": "assistant", "content": word(1, 30)}]
            return {"prompt": prompt, "completion": completion}

        path = tmp_path_factory.mktemp("data") / f"{form}.jsonl"
        path.write_text("".join(json.dumps(row()) + "\n" for _ in range(rows)))
        return str(path)

    return make


def write_recipe(settings):
    """A YAML file of `settings` (dotted key: value), beside their output_dir. Also on GPUs in float32, for what is compared to 1e-5."""
    nested = {"model": {"dtype": "float32"}} if torch.cuda.is_available() else {}
    for key, value in settings.items():
        *blocks, name = key.split(".")
        block = nested
        for b in blocks:
            block = block.setdefault(b, {})
        block[name] = value
    path = Path(f"{settings['output_dir']}.yaml")
    path.write_text(yaml.safe_dump(nested))
    return path


def plain(row):
    """A line of metrics.jsonl without what changes from run to run."""
    return {key: value for key, value in row.items() if key not in TIMINGS}


def read_metrics(output_dir):
    """The objects of metrics.jsonl, one a step; of a run that goes on, as far as it has come."""
    path = Path(output_dir, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []


@pytest.fixture
def train_here(one_rank):
    """settings (dotted key: value) -> metrics of the steps of launch/train.py's run in this process, on one rank."""

    def train(settings):
        cfg = config.parse(["--config", str(write_recipe(settings))])
        assert launcher.run(cfg, one_rank, {"step": 0}) == "finished"
        return read_metrics(cfg.output_dir)

    return train


class Run:
    """`torchrun launch/train.py` with `settings` (dotted key: value), under way."""

    def __init__(self, settings, ranks, script="launch/train.py", more=()):
        if torch.cuda.is_available() and ranks > torch.cuda.device_count():
            pytest.skip(f"needs {ranks} GPUs, or none")
        self.folder = Path(settings["output_dir"])
        self.console = Path(f"{self.folder}.console")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        with open(self.console, "ab") as console:
            self.process = subprocess.Popen(
                [*torchrun, *more, ROOT / script, "--config", write_recipe(settings)],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                cwd=self.folder.parent,
                stdout=console,
                stderr=console,
            )

    def workers(self):
        """Processes of the ranks."""
        return psutil.Process(self.process.pid).children()

    def kill(self):
        """SIGKILL to torchrun and to every process below it."""
        if self.process.poll() is None:
            torchrun = psutil.Process(self.process.pid)
            for process in [*torchrun.children(recursive=True), torchrun]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def wait(self, code=0):
        """This run, once it has ended with that exit code."""
        assert self.process.wait(timeout=180) == code, self.console.read_text()[-6000:]
        return self

    def metrics(self):
        return read_metrics(self.folder)

    def status(self):
        """run_status.json."""
        return json.loads((self.folder / "run_status.json").read_text())


@pytest.fixture(scope="session")
def start():
    """(settings, ranks) -> a Run under way; what still runs at the end of the session is killed."""
    runs = []

    def begin(*args, **kwargs):
        runs.append(Run(*args, **kwargs))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()
