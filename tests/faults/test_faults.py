"""Faults and what a run makes of them, on real processes: F1 to F29 of the plan below, in their short form.

| fault | where its test stands |
|---|---|
| F1 kills at random moments | here, ten; `python tests/faults/kill.py --kills 200` for the long form |
| F2 kills at each place of a save, F4 full disk, F5 read-only, F6 F7 preemption, F8 a dead rank, F9 a stuck one, F10 memory, F11 | here |
| F3 damaged checkpoints | test_resume.py: test_damaged_checkpoint_is_passed_over; every bit and byte: here |
| F11 not finite | test_resume.py: test_stops_before_an_update_that_is_not_finite; on one rank of two: here |
| F12 resume at each step, no row twice or never | test_batches.py: test_an_epoch_visits_every_example_once; here: kills after each step |
| F13 other world size | test_resume.py, test_lora_runs.py, test_rollouts.py, one change each; here: 2 -> 1 -> 4 -> 2 |
| F14 normalisation | test_invariance.py, test_reference.py, test_rollouts.py, tests/equivalence/test_splits.py |
| F15 learning rates | test_optim.py; another number of steps: here |
| F16 changed inputs | test_resume.py: test_other_settings_are_refused_one_by_one; files that changed under their name: here |
| F17 bad rows, F18 tokenizers | test_data.py, test_preferences.py, test_prompts.py |
| F19 rewards | test_reward_workers.py; vLLM: test_vllm_server.py |
| F20 two hosts | test_hosts.py |
| F21 one output_dir, two runs, F24 secrets, F27 strange surroundings | here |
| F22 races of ranks for the data's file | every run of four ranks here and in test_rollouts.py |
| F23 code in files | test_security.py, test_config.py |
| F25 clean exits, F26 leaks | `python tests/faults/kill.py --clean 50 --steps 2000` |
| F28 order of rows | test_batches.py, by hypothesis |
| F29 export | test_load.py, test_lora_runs.py |
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from kill import assert_same, expected_of
from nursery import PLACES, Nursery
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, plain, write_recipe
from train import checkpoint, peers

STEPS = 10


@pytest.fixture(scope="module")
def nursery():
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def files(model_folder, tmp_path_factory):
    """A folder with a model, and rows for each kind of run."""
    folder, stream = tmp_path_factory.mktemp("files"), random.Random(0)

    def word(longest):
        return "".join(stream.choices("abcdefghij", k=stream.randint(1, longest)))

    rows = [{"prompt": word(9) + ":", "chosen": word(12), "rejected": word(12)} for _ in range(30)]
    tables = {"dpo": rows, "sft": [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]}
    tables["kto"] = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 > 0} for i, r in enumerate(rows)]
    tables["grpo"] = [{"prompt": r["prompt"]} for r in rows]
    for name, table in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    (folder / "rewards.py").write_text("def early(completions):\n    return [sum(c < 'h' for c in text) / 9 for text in completions]\n")
    shutil.copytree(model_folder("llama"), folder / "model")
    return folder


@pytest.fixture(scope="module")
def settings(files):
    """(output_dir, kind, {dotted key: value}) -> settings of a run to step 10; kind: sft, dpo or grpo, with -lora for adapters."""

    def make(output_dir, kind="sft", changes=()):
        algorithm, _, adapted = kind.partition("-")
        known = {
            "algorithm": algorithm,
            "output_dir": str(output_dir),
            "model.model_name_or_path": str(files / "model"),
            "data.train": str(files / f"{algorithm}.jsonl"),
            "data.eval": str(files / f"{algorithm}.jsonl"),
            "evaluation.steps": 2,
            "train.global_batch_size": 8,
            "train.micro_batch_tokens": 100,
            "train.max_steps": STEPS,
            "train.learning_rate": 1e-3,
            "checkpoint.save_steps": 1,
            "fsdp.timeout_seconds": 60,
            "log.report_to": [],
        }
        if algorithm == "grpo":
            known |= {"grpo.reward_funcs": [f"{files}/rewards.py:early"], "grpo.num_generations": 4, "grpo.max_completion_length": 12}
            known |= {"grpo.num_iterations": 2, "evaluation.generate": 2, "evaluation.max_new_tokens": 8}
        if algorithm == "dpo":
            known |= {"train.global_batch_size": 4}
        if adapted:
            known |= {"lora.r": 4}
        return known | dict(changes)

    return make


@pytest.fixture(scope="module")
def whole(nursery, settings, tmp_path_factory):
    """kind -> what a run of it on two ranks comes to that nothing disturbs."""
    made = {}

    def get(kind="sft"):
        if kind not in made:
            made[kind] = expected_of(nursery.start(settings(tmp_path_factory.mktemp("whole") / kind, kind), 2).good())
        return made[kind]

    return get


# ---- kills ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_killed_at_every_place_of_a_save(background, nursery, settings, whole, tmp_path):
    """F2, F12: one run, killed in the save of step 1 at the first place, in that of step 2 at the next, and so on."""
    given = settings(tmp_path / "run", changes={"checkpoint.async_save": background})
    for step, place in enumerate(PLACES, 2):
        dying = place in ("flush", "own tensors")  # rank 0 does the rest
        run = nursery.start(given, 2, {"do": "kill", "place": place, "step": step, "on": int(dying)})
        assert run.wait()[int(dying)] == -signal.SIGKILL, f"{place}: the fault did not come\n{run.console.read_text()[-3000:]}"
        published = place in ("after the rename", "before the pruning", "inside of the pruning")
        assert max(checkpoint.found(run.folder)) == (step if published else step - 1), place
    run = nursery.start(given, 2).good()
    assert_same(run, whole())
    assert not list(run.folder.glob(".tmp-*"))


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_killed_at_random(kind, nursery, settings, whole, tmp_path):
    """F1: five kills each at moments of no choice."""
    expected, given, stream = whole(kind), settings(tmp_path / "run", kind), random.Random(kind)
    for _ in range(5):
        run = nursery.start(given, 2)
        done = len(run.metrics())
        while len(run.metrics()) <= min(done, STEPS - 1) and not run.ended():
            time.sleep(0.002)
        time.sleep(stream.random() * 0.1)
        run.kill()
    assert_same(nursery.start(given, 2).good(), expected)


def test_torchrun_starts_a_dead_rank_again(start, settings, whole, tmp_path):
    """F8: `--max-restarts`, by the real torchrun."""
    run = start(settings(tmp_path / "run"), 2, more=("--max-restarts", "1"))
    while len(run.metrics()) < 4:
        time.sleep(0.01)
    victim = run.workers()[1]
    victim.kill()
    run.wait()
    assert_same(run, whole())
    text = run.console.read_text()
    assert text.count("resuming from") == 1 and "rank 0 waited in 'step " in text and "rank 1 gives no sign of life" in text


# ---- asked to stop -------------------------------------------------------------------------------------------------------------

ASKED = {
    "in a step": ("sft", {"place": "step 3: training", "do": "term", "on": 1}, 3),
    "by the other signal": ("sft", {"place": "step 3: training", "do": "usr1", "on": 0}, 3),
    "in an evaluation": ("sft", {"place": "step 4: evaluation", "do": "term", "on": 1}, 4),
    "in the last evaluation": ("sft", {"place": f"step {STEPS}: evaluation", "do": "term", "on": 0}, STEPS),
    "in an evaluation by answers": ("grpo", {"place": "step 4: evaluation", "call": 3, "do": "term", "on": 0}, 4),
    "in a rollout": ("grpo", {"place": "step 5: drawing rows", "call": 3, "do": "term", "on": 1}, 4),
    "in the first rollout": ("grpo", {"place": "step 1: drawing rows", "call": 3, "do": "term", "on": 1}, 0),
    "in a reference pass": ("dpo", {"place": "reference log-probs", "do": "term", "on": 1}, 0),
    "in an evaluation's baseline": ("kto", {"place": "step 4: evaluation", "do": "term", "on": 1}, 4),
    "in a save": ("sft", {"place": "manifest", "step": 3, "do": "term", "on": 0}, 4),
}


@pytest.mark.parametrize("when", ASKED)
def test_asked_to_stop(when, nursery, settings, whole, tmp_path):
    """F6, F7: whoever gets the signal, all save and end well; what comes of the next start has the same bytes."""
    kind, fault, step = ASKED[when]
    given = settings(tmp_path / "run", kind, {"checkpoint.save_steps": int(when == "in a save"), "checkpoint.save_total_limit": 1})
    run = nursery.start(given, 2, fault).good()
    status = run.status()
    assert (status["state"], status["error"]) == ("preempted", None)
    assert status["step"] in (step, step + 1) and [*checkpoint.found(run.folder)] == ([status["step"]] if status["step"] else [])
    assert not (run.folder / "final").exists()
    assert_same(nursery.start(given, 2).good(), whole(kind))


def test_two_signals_of_one_moment_are_one(nursery, settings, tmp_path):
    """The second is torchrun's copy of what the whole process group got."""
    run = nursery.start(settings(tmp_path / "run", changes={"train.max_steps": 100000, "checkpoint.save_steps": 0}), 2)
    while len(run.metrics()) < 2:
        time.sleep(0.01)
    run.signal(signal.SIGTERM)
    run.signal(signal.SIGTERM)
    assert run.good().status()["state"] == "preempted"


@pytest.mark.parametrize("stuck", [None, 1])
def test_asked_twice_ends_at_once(stuck, nursery, settings, tmp_path):
    """F7: also a rank that waits in a collective for one that is stuck."""
    run = nursery.start(settings(tmp_path / "run"), 2, {"place": "step 3: training", "do": "sleep", "on": stuck})
    while len(run.metrics()) < 2:
        time.sleep(0.01)
    run.signal(signal.SIGTERM)
    time.sleep(peers.AGAIN + 0.5)
    assert not run.ended()
    run.signal(signal.SIGTERM)
    assert set(run.wait(5)) == {128 + signal.SIGTERM}


def test_a_stop_does_not_wait_for_a_reward(nursery, settings, files, tmp_path):
    """F7: one that has a minute left."""
    (files / "slow.py").write_text("import time\n\n\ndef slow(completions):\n    time.sleep(60)\n    return [0.0] * len(completions)\n")
    given = settings(
        tmp_path / "run", "grpo", {"grpo.reward_funcs": [f"{files}/slow.py:slow"], "data.eval": None, "rollout.reward_seconds": 80}
    )
    given = {key: value for key, value in given.items() if not key.startswith("evaluation.")}
    run = nursery.start(given, 2)
    while "steps 1 to" not in run.console.read_text():
        time.sleep(0.05)
    time.sleep(2)
    run.signal(signal.SIGTERM, [1])
    assert set(run.wait(15)) == {0} and run.status()["state"] == "preempted"


@pytest.mark.parametrize("always", [False, True])
def test_asked_to_stop_on_a_bad_disk(always, nursery, settings, tmp_path):
    """F4, F7: with `on_save_error: warn`, a stop's save is tried again, and a run that could not save does not say it is preempted."""
    given = settings(tmp_path / "run", changes={"checkpoint.on_save_error": "warn", "checkpoint.save_steps": 0, "train.max_steps": 100000})
    run = nursery.start(given, 2, {"do": "input/output error", "place": "flush", "on": 1, "call": None if always else 1})
    while len(run.metrics()) < 3:
        time.sleep(0.01)
    run.signal(signal.SIGTERM)
    assert set(run.wait()) == {int(always)} and run.console.read_text().count("warning: checkpoint.save_steps: ") == 1 + always
    status = run.status()
    assert (status["state"], [*checkpoint.found(run.folder)]) == (("failed", []) if always else ("preempted", [status["step"]]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_signal_to_torchrun(number, start, settings, tmp_path):
    """torchrun hands SIGTERM on, and dies of the others; its ranks save then too, and none stays behind."""
    run = start(settings(tmp_path / "run", changes={"train.max_steps": 100000, "train.lr_scheduler_type": "constant"}), 2)
    while len(run.metrics()) < 3:
        time.sleep(0.01)
    ranks = run.workers()
    assert len(ranks) == 2
    run.process.send_signal(number)
    _, alive = psutil.wait_procs(ranks, timeout=15)
    assert not alive
    assert run.process.wait(timeout=15) == (1 if number == signal.SIGTERM else -number)
    status = run.status()
    assert status["state"] == "preempted" and status["step"] == max(checkpoint.found(run.folder))
    assert len(run.metrics()) in (status["step"] - 1, status["step"]), "the evaluation may be yet to come"


# ---- dead and stuck ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do", ["kill", "stop", "sleep", "hold", "abort", "segfault", "out of memory"])
def test_the_missing_rank_is_named(do, nursery, settings, tmp_path):
    """F9, F10: rank 1 of three dies or stands still in step 3; the others end within the timeout and say which, and where."""
    limit = 4
    given = settings(tmp_path / "run", changes={"fsdp.timeout_seconds": limit, "evaluation.steps": 0})
    run = nursery.start(given, 3, {"do": do, "place": "step 3: training", "on": 1})
    while len(run.metrics()) < 2:
        time.sleep(0.01)
    began, others = time.monotonic(), [psutil.Process(run.pids[r]) for r in (0, 2)]
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in others):
        assert time.monotonic() - began < limit + 2 * peers.SILENCE + 8, run.console.read_text()[-4000:]
        time.sleep(0.05)
    run.signal(signal.SIGKILL, [1])
    codes = run.wait()
    assert codes[0] == codes[2] == 1, (codes, run.console.read_text()[-4000:])
    text = run.console.read_text()
    how = {"sleep": "does not answer", "out of memory": "failed in 'step 3: training': OutOfMemoryError: a micro-batch of "}
    how = how.get(do, "gives no sign of life")
    for rank in (0, 2):
        (line,) = [line for line in text.splitlines() if line.startswith(f"rank {rank} waited in ")]
        assert "step 3" in line and f"rank 1 {how}" in line, line
    status = run.status()
    assert status["state"] == "failed" and status["step"] == 2 and max(checkpoint.found(run.folder)) == 2
    assert ("rank 1" in status["error"]) or "out of memory" in status["error"]
    if do == "out of memory":
        assert re.search(
            r"rank 1: failed in 'step 3: training': a micro-batch of \d rows, \d+ tokens, the longest row of \d+, did not fit", text
        )


def test_not_finite_on_one_rank_stops_all_before_the_update(nursery, settings, tmp_path):
    """F11."""
    run = nursery.start(settings(tmp_path / "run"), 2, {"do": "not finite", "place": "step 3: training", "on": 1})
    assert set(run.wait()) == {1}
    assert "FloatingPointError: step 3: loss" in run.status()["error"] and max(checkpoint.found(run.folder)) == 2


# ---- the disk ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """(MiB) -> a folder on a disk of that size."""
    made = []

    def make(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("this user may not mount a small disk")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_too_small_is_refused_before_the_first_step(nursery, settings, small_disk):
    """F4."""
    run = nursery.start(settings(small_disk(1) / "run"), 2)
    assert set(run.wait()) == {2}
    assert "checkpoint.save_total_limit: 3 more checkpoints of " in run.status()["error"] and not run.metrics()


@pytest.mark.parametrize("policy, background", [("stop", False), ("warn", False), ("stop", True)])
def test_a_disk_that_fills_up(policy, background, nursery, settings, small_disk):
    """F4: the save that finds no room says so; the older checkpoint is as it was, and the run goes on from it once there is room."""
    disk = small_disk(12)
    changes = {"checkpoint.on_save_error": policy, "checkpoint.async_save": background}
    given = settings(disk / "run", changes=changes | {"train.max_steps": 100000, "train.lr_scheduler_type": "constant"})
    run = nursery.start(given, 2)
    while len(run.metrics()) < 3:
        time.sleep(0.01)
    with open(disk / "others", "wb") as f, pytest.raises(OSError):
        while True:
            f.write(b"0" * 65536)
            f.flush()
    text = ""
    began = time.monotonic()
    while "No space left on device" not in text:
        assert time.monotonic() - began < 30
        text = run.console.read_text()
    if policy == "warn":
        os.unlink(disk / "others")
        step = len(run.metrics())
        while max(checkpoint.found(run.folder), default=0) <= step:
            assert not run.ended() and time.monotonic() - began < 30, run.console.read_text()[-3000:]
            time.sleep(0.01)
        run.signal(signal.SIGTERM, [0])
        run.good()
        return
    assert set(run.wait()) == {1}
    assert "bytes to write" in text and f"{run.folder}/.tmp-checkpoint-" in text and "free)" in text
    assert not list(run.folder.glob(".tmp-*"))
    step = max(checkpoint.found(run.folder))
    os.unlink(disk / "others")
    again = nursery.start(given, 2)
    while max(checkpoint.found(run.folder)) <= step:
        assert not again.ended(), again.console.read_text()[-3000:]
        time.sleep(0.01)
    again.kill()
    assert f"resuming from {run.folder}/checkpoint-{step}" in again.console.read_text()


def test_what_killed_runs_left_is_no_room_that_is_needed(settings, train_here, monkeypatch, tmp_path):
    """F4: the same command on the same disk goes on."""
    given = settings(tmp_path / "run", changes={"train.max_steps": 2})
    train_here(given)
    left = tmp_path / "run" / ".tmp-checkpoint-9"
    left.mkdir()
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 0)
    train_here(given)
    assert not left.exists()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint\.save_total_limit: 1 more checkpoints of"):
        train_here(given)


def test_training_goes_on_during_a_save_in_the_background(nursery, settings, tmp_path):
    """Steps 6 to 9 are done before the checkpoint of step 5 is there."""
    given = settings(tmp_path / "run", changes={"checkpoint.save_steps": 5, "checkpoint.async_save": True, "evaluation.steps": 0})
    run = nursery.start(given, 2, {"do": "nap", "place": "flush", "step": 5, "on": 1})
    while len(run.metrics()) < 9:
        time.sleep(0.005)
    assert not checkpoint.found(run.folder) and (run.folder / ".tmp-checkpoint-5").exists()
    run.good()
    assert [*checkpoint.found(run.folder)] == [10, 5]


def test_a_save_in_the_background_that_stands_still(nursery, settings, tmp_path):
    """F9: all ranks end, in twice the time that a collective may take."""
    given = settings(tmp_path / "run", changes={"checkpoint.async_save": True, "fsdp.timeout_seconds": 3})
    run = nursery.start(given, 2, {"do": "sleep", "place": "flush", "step": 3, "on": 1})
    assert set(run.wait(40)) == {1} and "saving'" in run.console.read_text() and max(checkpoint.found(run.folder)) == 2


def test_an_output_dir_that_cannot_be_written(one_rank, tmp_path):
    """F5: below a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^output_dir: .* cannot be written: Not a directory"):
        checkpoint.claim(tmp_path / "file" / "run")


@pytest.fixture
def read_only():
    """(folder): from now on nothing can be opened for writing in it."""
    made = []

    def make(folder):
        if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
            pytest.skip("this user may not mount a folder read-only")
        made.append(folder)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    yield make
    for folder in made:
        subprocess.run(["umount", "-l", folder], check=True)


def test_an_output_dir_that_becomes_read_only(nursery, settings, read_only, tmp_path):
    """F5: the run ends and says why."""
    run = nursery.start(settings(tmp_path / "run", changes={"train.max_steps": 100000, "train.lr_scheduler_type": "constant"}), 2)
    while len(run.metrics()) < 3:
        time.sleep(0.01)
    read_only(run.folder)
    assert set(run.wait()) == {1}
    text = run.console.read_text()
    assert "Read-only file system" in text and f"{run.folder}/.tmp-checkpoint-" in text, text[-3000:]


def test_an_output_dir_that_is_read_only(nursery, settings, read_only, tmp_path):
    """F5: refused before a model is read."""
    folder = tmp_path / "run"
    folder.mkdir()
    read_only(folder)
    run = nursery.start(settings(folder), 2)
    assert set(run.wait()) == {2}
    assert f"output_dir: {folder} cannot be written: Read-only file system" in run.console.read_text()


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_with_errors(background, nursery, settings, tmp_path):
    """F5: a save whose flush fails is no checkpoint, and the one before it stands."""
    given = settings(tmp_path / "run", changes={"checkpoint.async_save": background})
    run = nursery.start(given, 2, {"do": "input/output error", "place": "flush", "step": 4, "on": 1})
    assert set(run.wait()) == {1}
    assert "Input/output error" in run.console.read_text() and max(checkpoint.found(run.folder)) == 3
    assert not list(run.folder.glob(".tmp-*"))


# ---- other hardware, other inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "sft-lora", "dpo", "dpo-lora", "grpo", "grpo-lora"])
def test_other_ranks_and_micro_batches_at_each_resume(kind, nursery, settings, whole, tmp_path):
    """F13: two ranks, then one, then four, then two: the run of two ranks, within rounding."""
    expected = whole(kind)
    for ranks, stop, tokens in ((2, 2, 100), (1, 5, 4096), (4, 7, 60), (2, None, 200)):
        given = settings(tmp_path / "run", kind, {"checkpoint.save_steps": 0, "train.micro_batch_tokens": tokens})
        fault = stop and {"place": f"step {stop}: training", "do": "term", "on": ranks - 1}
        run = nursery.start(given, ranks, fault).good()
    rows = run.metrics()
    assert [row["step"] for row in rows] == [row["step"] for row in expected["rows"]] == [*range(1, STEPS + 1)]
    for row, other in zip(rows, expected["rows"]):
        for key, value in plain(other).items():
            if key == "rows":
                assert kind.startswith("grpo") or row[key] == value
            else:
                relative = 1e-4 if key == "grad_norm" else 1e-5
                assert row[key] == pytest.approx(value, rel=relative, abs=2e-6), f"{key} of step {row['step']}"
    (name,) = (p.name for p in (run.folder / "final").glob("*.safetensors"))
    theirs = load_file(expected["final"] / name)
    for key, tensor in load_file(run.folder / "final" / name).items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=1e-4, msg=lambda words, key=key: f"{key}: {words}")


CHANGES = {
    "weights": "model.model_name_or_path: the weights of ",
    "reward": "grpo.reward_funcs: the file of ",
    "data": "data.train: the tokenised rows differ",
    "lora.r": "lora.r: 4 then, 8 now",
    "lora.lora_alpha": "lora.lora_alpha: 8 then, 4.0 now",
    "seed": "seed: 42 then, 7 now",
    "algorithm": "algorithm: dpo then, simpo now",
    "train.max_steps": "train.max_steps: 3 steps in all then, 20 now (the steps done so far would have had other learning rates",
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_inputs_are_refused(what, settings, files, train_here, tmp_path):
    """F16: what a run is made of, also where a file has changed under its name."""
    kind = {"reward": "grpo", "weights": "sft-lora", "lora.r": "dpo-lora", "lora.lora_alpha": "sft-lora", "algorithm": "dpo"}.get(
        what, "sft"
    )
    own = tmp_path / "files"
    shutil.copytree(files, own)
    given = {k: v.replace(str(files), str(own)) if isinstance(v, str) else v for k, v in settings(tmp_path / "run", kind).items()}
    if what == "reward":
        given["grpo.reward_funcs"] = [f"{own}/rewards.py:early"]
    given |= {"train.max_steps": 3, "data.eval": None}
    given = {key: value for key, value in given.items() if not key.startswith("evaluation.")}
    train_here(given)
    if what == "weights":
        path = own / "model" / "model.safetensors"
        tensors = {k: t * 1.5 for k, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    elif what in ("reward", "data"):
        path = own / {"reward": "rewards.py", "data": "sft.jsonl"}[what]
        path.write_text(path.read_text().replace("/ 9" if what == "reward" else "a", "/ 8" if what == "reward" else "b"))
    else:
        given[what] = {"lora.r": 8, "lora.lora_alpha": 4, "seed": 7, "algorithm": "simpo", "train.max_steps": 20}[what]
    with pytest.raises(ValueError, match="was made with other settings") as error:
        train_here(given)
    assert CHANGES[what] in str(error.value)


def test_what_may_change(settings, train_here, tmp_path):
    """F15, F16: logging, saving, evaluation, and more steps where the steps done had the same learning rates."""
    given = settings(tmp_path / "run", changes={"train.lr_scheduler_type": "constant", "train.max_steps": 3})
    train_here(given)
    more = {"log.logging_steps": 5, "checkpoint.save_steps": 3, "checkpoint.async_save": True, "evaluation.steps": 0, "train.max_steps": 6}
    rows = train_here(given | more)
    whole = train_here(given | {"output_dir": str(tmp_path / "whole"), "train.max_steps": 6, "evaluation.steps": 0})
    assert [plain(r) for r in rows][3:] == [plain(r) for r in whole][3:] and len(rows) == 6


# ---- surroundings --------------------------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(nursery, settings, tmp_path):
    """F21: the second is refused and leaves everything as it is; a killed run's lock is no lock."""
    given = settings(tmp_path / "run", changes={"train.max_steps": 100000, "train.lr_scheduler_type": "constant"})
    first = nursery.start(given, 2)
    while len(first.metrics()) < 2:
        time.sleep(0.01)
    second = nursery.start(given, 2)
    assert set(second.wait()) == {2}
    assert f"is being written by process {first.pids[0]} of " in second.console.read_text()
    assert first.status()["state"] == "running" and not first.ended()
    first.kill()
    third = nursery.start(given, 2)
    while "resuming from" not in third.console.read_text():
        assert not third.ended(), third.console.read_text()[-3000:]
        time.sleep(0.01)
    third.kill()


def test_secrets_stay_where_they_are(nursery, settings, tmp_path):
    """F24: of a run that ends well and of one that fails."""
    env = {name: f"canary-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")}
    nursery.start(settings(tmp_path / "run", "grpo", {"train.max_steps": 2}), 2, env=env).good()
    failing = nursery.start(settings(tmp_path / "failed"), 2, {"do": "out of memory", "place": "step 2: training", "on": 0}, env=env)
    assert set(failing.wait()) == {1}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20 and not [path for path in written if b"canary-" in path.read_bytes()]


def test_strange_surroundings(settings, tmp_path):
    """F27: no home, another locale and time zone, a cache that cannot be written."""
    given = settings(tmp_path / "run", changes={"train.max_steps": 2})
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": "/nonexistent", "HF_HOME": "/proc/nowhere", "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "TZ": "Pacific/Kiritimati"}
    command = [sys.executable, ROOT / "launch" / "train.py", "--config", write_recipe(given)]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(Path(tmp_path, "run", "run_status.json").read_text())["state"] == "finished"


def test_every_damage_to_a_checkpoint_is_seen(one_rank, settings, train_here, tmp_path):
    """F3: single bits, cut ends, a hole of zeros, a file of another step; 70 damages, none passes."""
    train_here(settings(tmp_path / "run", changes={"train.max_steps": 2}))
    folder, stream = tmp_path / "run" / "checkpoint-2", random.Random(0)
    paths = sorted(folder.iterdir())
    for _ in range(60):
        path = stream.choice(paths)
        content = bytearray(path.read_bytes())
        place = stream.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << stream.randrange(8)
        path.write_bytes(damaged)
        assert checkpoint.verify(folder) or (path.name == "manifest.json" and json.loads(damaged) == json.loads(content)), (path, place)
        path.write_bytes(content)
    large = max(paths, key=os.path.getsize)
    content = large.read_bytes()
    other = (tmp_path / "run" / "checkpoint-1" / large.name).read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:-1], content[:4096] + bytes(4096) + content[8192:], other):
        large.write_bytes(damaged)
        assert checkpoint.verify(folder)
    large.write_bytes(content)
    assert checkpoint.verify(folder) is None
