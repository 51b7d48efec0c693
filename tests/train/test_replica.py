"""Steps on whole copies of the weights are the steps of FSDP: the same bits on one rank, the same numbers on four; stopped, they go on.

Run by torchrun instead of pytest, this file trains every recipe beside its own on its ranks, and goes on with each from its middle.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from launch import train as launcher
from models import replica, sharding
from tests.conftest import plain, read_metrics, write_recipe
from train import config

STEPS = 4
RUNS = {  # of four ranks: shards that are uneven and that are empty, two replicas of two shards
    "sft-tied": {"model": "qwen3"},
    "dpo-untied": {"fsdp.replicas": 2, "fsdp.activation_checkpointing": "full"},
    "sft-lora": {"lora.r": 6, "lora.lora_dropout": 0.2, "lora.modules_to_save": ["lm_head"]},
    "dpo-dora": {"lora.r": 5, "lora.use_dora": True, "fsdp.replicas": 2},
}


@pytest.fixture(scope="module")
def settings(model_folder, data_file):
    """(name of a run, folder, ranks) -> its settings; on one rank without what takes several."""

    def make(name, folder, ranks):
        folder.mkdir(exist_ok=True)
        algorithm, known = name.split("-")[0], dict(RUNS[name])
        form = {"sft": "completion", "dpo": "pairs"}[algorithm]
        fixed = {
            "algorithm": algorithm,
            "output_dir": str(folder / name),
            "model.model_name_or_path": model_folder(known.pop("model", "llama")),
            "data.train": data_file(form, 26),
            "data.eval": data_file(form, 10),
            "evaluation.steps": 1,
            "train.global_batch_size": 8,
            "train.micro_batch_tokens": 256,
            "train.max_steps": STEPS,
            "train.learning_rate": 1e-3,
            "checkpoint.save_steps": 2,
            "checkpoint.save_total_limit": None,
            "log.report_to": [],
            "fsdp.reshard_after_forward": False,
        }
        return fixed | {key: value for key, value in known.items() if ranks > 1 or key != "fsdp.replicas"}

    return make


@pytest.fixture(scope="module")
def on_four_ranks(settings, start, tmp_path_factory):
    """The folder of all RUNS on four ranks; under way."""
    folder = tmp_path_factory.mktemp("four_ranks")
    recipes = [settings(name, folder, 4) for name in RUNS]
    for recipe in recipes:
        write_recipe(recipe)
    return start(recipes[0], 4, script=__file__), folder


def steps_on(replicas):
    """Wrap `Replica.end`, so that its calls are counted in the list that is given."""
    end = replica.Replica.end

    def counted(self):
        replicas.append(self)
        end(self)

    return counted


def weights_file(folder):
    return next((folder / "final").glob("*model.safetensors"))


@pytest.mark.parametrize("name", RUNS)
def test_whole_weights_change_nothing(name, on_four_ranks, settings, train_here, tmp_path, monkeypatch):
    """Losses, held-out losses, gradient norms and what is trained, against FSDP on one rank."""
    monkeypatch.setattr(replica.Replica, "end", steps_on(replicas := []))
    expected = train_here(settings(name, tmp_path / "sharded", 1) | {"fsdp.reshard_after_forward": True})
    assert not replicas
    whole = train_here(settings(name, tmp_path / "whole", 1))
    assert len(replicas) == STEPS
    assert [*map(plain, whole)] == [*map(plain, expected)] and all(row["grad_norm"] > 0 for row in whole)
    files = [weights_file(tmp_path / kind / name) for kind in ("sharded", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    run, folder = on_four_ranks
    run.wait()
    rows = read_metrics(folder / name)
    for ours, theirs in zip(rows, expected, strict=True):
        for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("eval/loss", 1e-5)):
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), f"{key} of step {ours['step']}"
    final = load_file(files[0])
    for key, weight in load_file(weights_file(folder / name)).items():
        torch.testing.assert_close(weight, final[key], rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", RUNS)
def test_what_was_stopped_goes_on(name, on_four_ranks):
    """Steps 3 and 4 again, from the checkpoint of step 2: the same bytes."""
    run, folder = on_four_ranks
    run.wait()
    first, again = folder / f"{name}-first", folder / name
    assert [*map(plain, read_metrics(again))] == [*map(plain, read_metrics(first))]
    assert weights_file(again).read_bytes() == weights_file(first).read_bytes()


def train_all():
    device, folder = sharding.start_ranks(60), Path(config.parse().output_dir).parent
    replica.Replica.end = steps_on(replicas := [])
    for recipe in sorted(folder.glob("*.yaml")):
        cfg = config.parse(["--config", str(recipe)])
        out = Path(cfg.output_dir)
        for steps in (STEPS, STEPS // 2):
            replicas.clear()
            assert launcher.run(cfg, device, {"step": 0}) == "finished"
            assert len(replicas) == steps
            dist.barrier()
            if steps == STEPS and dist.get_rank() == 0:
                shutil.copytree(out, f"{out}-first")
                shutil.rmtree(out / "final")
                shutil.rmtree(out / f"checkpoint-{STEPS}")
            dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    train_all()
