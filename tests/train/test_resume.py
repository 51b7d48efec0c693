"""Kill a run anywhere, run the same command again, get the same bytes; a checkpoint is whole or it is not used."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import plain
from train import checkpoint, optim

STEPS, SAVE_STEPS = 10, 5


@pytest.fixture(scope="module")
def settings(model_folder, data_file):
    """(output_dir, {dotted key: value}) -> settings of a run to step 10 with checkpoints after steps 5 and 10."""

    def make(output_dir, changes=()):
        fixed = {
            "output_dir": str(output_dir),
            "model.model_name_or_path": model_folder("llama"),
            "data.train": data_file("completion", 50),
            "data.eval": data_file("text", 10),
            "evaluation.steps": 1,
            "train.global_batch_size": 16,
            "train.micro_batch_tokens": 64,
            "train.max_steps": STEPS,
            "train.learning_rate": 1e-3,
            "train.warmup_steps": 2,
            "checkpoint.save_steps": SAVE_STEPS,
            "checkpoint.save_total_limit": None,
        }
        return fixed | dict(changes)

    return make


@pytest.fixture(scope="module")
def whole(settings, start, tmp_path_factory):
    """A run on two ranks that nothing disturbed."""
    run = start(settings(tmp_path_factory.mktemp("whole") / "run"), 2).wait()
    assert run.status()["state"] == "finished"
    return run


@pytest.fixture
def copied(whole, tmp_path):
    """The folder of a run that ended after its checkpoint of step 10, before the export."""
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    return tmp_path / "run"


def until(run, step):
    """Wait for the line of `step` in metrics.jsonl."""
    while len(run.metrics()) < step:
        assert run.process.poll() is None, run.console.read_text()[-6000:]
        time.sleep(0.005)


def assert_same_bytes(run, whole, file="model.safetensors"):
    """What was measured, timings apart, and what was trained."""
    ours, expected = ([json.dumps(plain(row)) for row in r.metrics()] for r in (run, whole))
    assert ours == expected
    assert (run.folder / "final" / file).read_bytes() == (whole.folder / "final" / file).read_bytes()


def test_killed_and_started_again_gives_the_same_bytes(settings, start, whole, tmp_path):
    run = start(settings(tmp_path / "run"), 2)
    until(run, SAVE_STEPS + 1)
    run.kill()
    assert run.status()["state"] == "running"
    assert [*checkpoint.found(run.folder)] == [SAVE_STEPS]
    again = start(settings(tmp_path / "run"), 2).wait()
    assert f"resuming from {run.folder}/checkpoint-{SAVE_STEPS}" in again.console.read_text()
    assert_same_bytes(again, whole)


def test_preempted_and_started_again_gives_the_same_bytes(settings, start, whole, tmp_path):
    """SIGTERM to one rank of two: both save after the step and end well."""
    run = start(settings(tmp_path / "run"), 2)
    until(run, 2)
    run.workers()[1].send_signal(signal.SIGTERM)
    step = run.wait().status()["step"]
    assert run.status()["state"] == "preempted" and step < STEPS
    assert step == max(checkpoint.found(run.folder)) and len(run.metrics()) in (step - 1, step), "the evaluation may be yet to come"
    assert not (run.folder / "final").exists()
    assert_same_bytes(start(settings(tmp_path / "run"), 2).wait(), whole)


def test_resumes_on_other_ranks_from_the_last_whole_checkpoint(settings, whole, copied, train_here, capsys):
    """Two ranks before, one now; the damaged newest checkpoint costs five steps, no more."""
    flip_a_bit(copied / "checkpoint-10")
    rows, expected = train_here(settings(copied)), whole.metrics()
    assert "checkpoint-10 rejected: rank-00001-of-00002.safetensors: sha256 differs" in capsys.readouterr().out
    assert rows[:SAVE_STEPS] == expected[:SAVE_STEPS]
    assert rows[SAVE_STEPS:] != expected[SAVE_STEPS:], "the run did not go on from step 5"
    for ours, theirs in zip(rows, expected, strict=True):
        for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("learning_rate", 1e-12), ("num_tokens", 0)):
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), f"{key} of step {ours['step']}"
    final = load_file(whole.folder / "final" / "model.safetensors")
    for name, weight in load_file(copied / "final" / "model.safetensors").items():
        torch.testing.assert_close(weight, final[name], rtol=0, atol=1e-5)


def flip_a_bit(folder):
    path = folder / "rank-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "rank-00001-of-00002.safetensors: sha256 differs": flip_a_bit,
    "rank-00000-of-00002.safetensors: 1000 bytes, expected": lambda f: os.truncate(f / "rank-00000-of-00002.safetensors", 1000),
    "rank-00001-of-00002.safetensors: missing": lambda f: (f / "rank-00001-of-00002.safetensors").unlink(),
    "state.json: sha256 differs": lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace("10", "11", 1)),
    "stranger.txt: not in the manifest": lambda f: (f / "stranger.txt").touch(),
    "manifest.json: FileNotFoundError": lambda f: (f / "manifest.json").unlink(),
    "manifest.json: JSONDecodeError": lambda f: os.truncate(f / "manifest.json", 50),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damaged_checkpoint_is_passed_over(reason, copied, one_rank):
    assert checkpoint.newest(copied, print) == copied / "checkpoint-10"
    DAMAGES[reason](copied / "checkpoint-10")
    said = []
    assert checkpoint.newest(copied, said.append) == copied / "checkpoint-5"
    assert len(said) == 1 and said[0].startswith(f"{copied / 'checkpoint-10'} rejected: {reason}")


def test_no_whole_checkpoint_is_an_error(settings, copied, train_here, capsys):
    """Starting over in silence would lose the run."""
    flip_a_bit(copied / "checkpoint-10")
    (copied / "checkpoint-5" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        train_here(settings(copied))
    assert "checkpoint-5 rejected: manifest.json" in capsys.readouterr().out


def test_half_written_checkpoint_is_not_one(copied, one_rank):
    """What a kill leaves before the rename has another name."""
    os.rename(copied / "checkpoint-10", copied / ".tmp-checkpoint-10")
    assert checkpoint.newest(copied, print) == copied / "checkpoint-5"


def test_other_settings_are_refused_one_by_one(settings, copied, train_here, data_file):
    changes = {"train.learning_rate": 2e-3, "seed": 7, "data.train": data_file("completion", 49), "train.micro_batch_tokens": 4096}
    with pytest.raises(ValueError, match="checkpoint of step 10 was made with other settings") as error:
        train_here(settings(copied, changes))
    assert "train.learning_rate: 0.001 then, 0.002 now" in str(error.value)
    assert "seed: 42 then, 7 now" in str(error.value)
    assert "data.train: the tokenised rows differ" in str(error.value)
    assert "micro_batch_tokens" not in str(error.value), "it changes nothing that is trained"


def test_used_folder_is_refused_where_asked(settings, copied, train_here):
    with pytest.raises(ValueError, match=r"^checkpoint\.resume: never"):
        train_here(settings(copied, {"checkpoint.resume": "never"}))


def test_keeps_the_newest_checkpoints(settings, train_here, tmp_path):
    train_here(settings(tmp_path / "run", {"train.max_steps": 5, "checkpoint.save_steps": 1, "checkpoint.save_total_limit": 2}))
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-5"]


DIVERGING = {"train.learning_rate": 1e30, "train.warmup_steps": 0, "checkpoint.save_steps": 1}


def test_stops_before_an_update_that_is_not_finite(settings, train_here, tmp_path, monkeypatch):
    made, make = [], optim.make_optimizer
    monkeypatch.setattr(optim, "make_optimizer", lambda *args: made.append(make(*args)) or made[0])
    with pytest.raises(FloatingPointError, match=r"^step 2: .*not finite"):
        train_here(settings(tmp_path / "run", DIVERGING))
    assert {int(state["step"]) for state in made[0].state.values()} == {1}, "the optimizer took a step that it should not"


def test_failed_run_names_the_step(settings, start, tmp_path):
    run = start(settings(tmp_path / "run", DIVERGING), 2).wait(code=1)
    status = run.status()
    assert (status["state"], status["step"]) == ("failed", 1)
    assert status["error"].startswith("FloatingPointError: step 2: ") and "nan" in status["error"]
    assert len(run.metrics()) == 1 and [*checkpoint.found(run.folder)] == [1]
