"""GRPO's runs: hardware changes neither samples nor losses; several steps on one rollout; killed anywhere, the same bytes again.

Run by torchrun instead of pytest, this file trains every variant of `RUNS`, or one run that stops for good at a chosen place.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from launch import train as launcher
from models import generate, sharding
from tests.conftest import plain
from train import checkpoint, config, data, rollouts

REWARDS = '''
def early(completions, letter):
    """The share of letters before the wanted one, and a little for each place where that stands."""
    return [sum(c < letter[i] for c in text) / 12 + 0.1 * text.count(letter[i]) for i, text in enumerate(completions)]


def rare(completions):
    """1 where a letter comes twice in a row, None where there is no text: groups are often flat."""
    return [None if not text else float(any(a == b for a, b in zip(text, text[1:]))) for text in completions]
'''
G, PROMPTS = 4, 10  # three rollouts of four prompts are more than an epoch
SEVERAL = {"grpo.steps_per_generation": 2, "grpo.num_iterations": 2, "train.max_steps": 6, "checkpoint.save_steps": 3}
SYNCED = {"grpo.beta": 0.2, "reference.sync_ref_model": True, "reference.ref_model_sync_steps": 2, "reference.ref_model_mixup_alpha": 1.0}
STEPS = 10  # of the long run: rollouts at steps 1, 5 and 9; checkpoints after 3, 6 and 9, each inside of a rollout
EVALUATED = {"evaluation.steps": 3, "evaluation.generate": 3, "evaluation.max_new_tokens": 6, "evaluation.temperature": 0.8}
RUNS = {
    "plain": {},
    "evaluated": EVALUATED
    | {"evaluation.num_samples": 2, "grpo.temperature": 0.7, "grpo.top_k": 20, "grpo.top_p": 0.9, "grpo.min_p": 0.01},
    "several": SEVERAL | {"grpo.epsilon": 0.02},
    "kl": {"grpo.beta": 0.2},
    "long": SEVERAL
    | SYNCED
    | {
        "grpo.dynamic_sampling": 1,
        "train.max_steps": STEPS,
        "evaluation.steps": 5,
        "evaluation.generate": 2,
        "evaluation.max_new_tokens": 4,
    },
    "dynamic": {"grpo.dynamic_sampling": 2, "grpo.loss_type": "grpo"},
    "lively": {"grpo.top_entropy_quantile": 0.4, "grpo.entropy_coef": 0.01, "grpo.mask_truncated_completions": True},
    "gspo": SEVERAL | {"grpo.importance_sampling_level": "sequence", "grpo.epsilon": 0.001, "grpo.loss_type": "grpo"},
}


def settings_of(folder, inputs, micro_batch_tokens, name="plain", changes=()):
    """Settings of the run RUNS[name] below `folder`; inputs: the folder of model, prompts and rewards."""
    rewards = "rare" if name == "dynamic" else "early"
    fixed = {
        "algorithm": "grpo",
        "output_dir": f"{folder}/{name}",
        "model.model_name_or_path": f"{inputs}/model",
        "data.train": f"{inputs}/prompts.jsonl",
        "train.global_batch_size": 4 * G,
        "train.max_steps": 3,
        "train.learning_rate": 3e-3,
        "train.micro_batch_tokens": micro_batch_tokens,
        "grpo.reward_funcs": [f"{inputs}/rewards.py:{rewards}", "soft_overlong(max_length=12, cache=6)"],
        "grpo.num_generations": G,
        "grpo.max_completion_length": 12,
        "checkpoint.save_total_limit": None,
        "log.report_to": [],
    }
    return fixed | RUNS[name] | ({"data.eval": f"{inputs}/prompts.jsonl"} if "evaluation.generate" in RUNS[name] else {}) | dict(changes)


@pytest.fixture(scope="module")
def inputs(model_folder, tmp_path_factory):
    """A folder with a model whose completions end by themselves now and then, prompts of unequal lengths, and rewards."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(model_folder("qwen3"), folder / "model")
    words = ["ab", "hello", "c", "longer words", "de", "fgh", "ijkl", "some words more", "m", "nop"]
    rows = [{"prompt": f"{word}:", "letter": "jklmnopqrs"[i]} for i, word in enumerate(words)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def on_many(start, inputs, tmp_path_factory):
    """ranks -> the folder of all RUNS on so many ranks, in many micro-batches; both are under way once one is asked for."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (2, 4)}
    under_way = {ranks: start(settings_of(folder, inputs, 60), ranks, script=__file__) for ranks, folder in folders.items()}
    return lambda ranks: under_way[ranks].wait() and folders[ranks]


def lines(folder, name):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def without_timings(rows):
    return [plain(row) for row in rows]


# ---- the hardware ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_hardware_changes_nothing(name, on_many, inputs, train_here, tmp_path):
    """One rank with each step in one micro-batch; the same, two and four ranks with many micro-batches."""
    for folder in ("whole", "split"):
        (tmp_path / folder).mkdir()
    whole = train_here(settings_of(tmp_path / "whole", inputs, 1 << 20, name))
    samples = lines(tmp_path / "whole" / name, "samples.jsonl")
    check(name, whole, samples)
    train_here(settings_of(tmp_path / "split", inputs, 60, name))
    for folder in (tmp_path / "split", on_many(2), on_many(4)):
        for mine, other in zip(lines(folder / name, "samples.jsonl"), samples, strict=True):
            assert mine | {"advantage": 0} == other | {"advantage": 0}
            assert mine.get("advantage") == other.get("advantage")
        for row, expected in zip(without_timings(lines(folder / name, "metrics.jsonl")), without_timings(whole), strict=True):
            assert row.keys() == expected.keys()
            for key, value in expected.items():
                relative, near_zero = (1e-4, 0) if key == "grad_norm" else (1e-5, 2e-6)
                assert row[key] == value if isinstance(value, str) else row[key] == pytest.approx(value, rel=relative, abs=near_zero), (
                    f"{key} of step {row['step']} in {folder}"
                )


def check(name, rows, samples):
    """That the run is of its kind: something is learned, and what the variant is about takes place."""
    per_rollout = 4 if name in ("several", "long", "gspo") else 1
    assert len(rows) == RUNS[name].get("train.max_steps", 3)
    assert rows[0]["grad_norm"] > 1e-3 and rows[0]["sampling/sampling_logp_difference/mean"] < 1e-5
    assert 0 < rows[0]["completions/clipped_ratio"] < 1
    rolled = [row["step"] for row in rows if "reward" in row]
    assert rolled == [*range(1, len(rows) + 1, per_rollout)]
    assert len([s for s in samples if "advantage" in s]) == len(rolled) * 4 * G * (2 if per_rollout > 1 else 1)
    if name == "evaluated":
        assert [s["step"] for s in samples if "advantage" not in s] == [0] * 6 + [3] * 6
        assert 0 <= rows[-1]["eval/pass@1"] <= rows[-1]["eval/pass@2"] <= 1 and "eval/pass@1" not in rows[0]
    if name in ("several", "gspo"):
        moved = [row["clip_ratio/region_mean"] for row in rows]
        assert moved[0] == moved[4] == 0 < min(moved[1:4]), moved
    if name in ("kl", "long"):
        kl = [row["kl"] for row in rows]
        assert abs(kl[0]) < 1e-6 and kl[1] > 1e-4
        assert name == "kl" or max(kl[2::2]) < 1e-6, "the reference has not become the policy again"
    if name == "dynamic":
        assert rows[-1]["prompts_drawn"] > 3 * 4, "no group was replaced"
    if name == "lively":
        trained = [row["policy_loss"] - row["loss"] for row in rows]
        assert min(trained) > 0


def test_sick_run_says_so(inputs, train_here, tmp_path, capsys):
    """One reward for all, no completion that ends, and a reward function that fails."""
    (tmp_path / "own.py").write_text("def broken(completions):\n    raise KeyError('of mine')\n")
    rewards = ["soft_overlong(max_length=100, cache=1)", f"{tmp_path}/own.py:broken"]
    given = {"grpo.max_completion_length": 1, "grpo.reward_funcs": rewards, "train.max_steps": 1}
    (row,) = train_here(settings_of(tmp_path, inputs, 60, changes=given))
    said = capsys.readouterr().out
    for words in (
        "step 1: warning: every reward equals its group's, so nothing is learned from this step",
        "step 1: warning: every completion was cut off; raise grpo.max_completion_length",
        "step 1: warning: 16 rewards failed",
        "broken -  advantage 0.00",  # a line for a sample
        "rank 0: the first failure of broken: exception:\nTraceback",
    ):
        assert words in said
    assert row["loss"] == row["grad_norm"] == 0 and row["frac_reward_zero_std"] == 1 and row["rewards/failures"] == 16
    assert {s["rewards"]["broken"] for s in lines(tmp_path / "plain", "samples.jsonl")} == {None}


def test_refused_run_leaves_the_folder_as_it_is(inputs, train_here, tmp_path):
    given = settings_of(tmp_path, inputs, 60) | {"grpo.reward_funcs": ["accuracy"]}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"^grpo\.reward_funcs: accuracy needs solution or answer, but the data has letter; "):
        train_here(given)
    assert (tmp_path / "plain" / "metrics.jsonl").read_text() == '{"step": 1}\n' and not (tmp_path / "plain" / "config.yaml").exists()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_nothing_but_truncated_completions(share, inputs, train_here, tmp_path, capsys):
    """A step that trains no token changes nothing, says so, and is not the end: the next may."""
    limits = {"grpo.max_completion_length": 1, "grpo.mask_truncated_completions": True, "grpo.top_entropy_quantile": share}
    first, second = train_here(settings_of(tmp_path, inputs, 60, changes=limits | {"train.max_steps": 2}))
    assert (first["loss"], first["grad_norm"], first["completions/clipped_ratio"]) == (0, 0, 1)
    assert "step 1: warning: every completion was cut off" in capsys.readouterr().out
    assert second["completions/clipped_ratio"] < 1 and second["grad_norm"] > 0


# ---- killed and started again ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(on_many):
    """The folder of a run on two ranks that nothing disturbed."""
    return on_many(2) / "long"


@pytest.fixture(scope="module")
def killed(start, inputs, tmp_path_factory, whole):
    """The run after three kills, at which it stood in a rollout, before an update, and in a save; what each new start found."""
    given, found = settings_of(tmp_path_factory.mktemp("killed"), inputs, 60, "long"), []
    folder = Path(given["output_dir"])
    for place in ("rollout 5", "update 8", "save 9"):
        Path(f"{folder}.place").write_text(place)
        run = start(given, 2, script=__file__)
        began = time.monotonic()
        while not Path(f"{folder}.reached").exists():
            assert run.process.poll() is None and time.monotonic() - began < 120, run.console.read_text()[-6000:]
            time.sleep(0.01)
        run.kill()
        Path(f"{folder}.reached").unlink()
        found.append((len(run.metrics()), sorted(p.name for p in folder.glob("*checkpoint*")), run.console.read_text()))
        if place == "update 8":
            shutil.copytree(folder, f"{folder}.copy")
    Path(f"{folder}.place").unlink()
    return start(given, 2).wait(), found


def test_killed_anywhere_gives_the_same_bytes(killed, whole):
    run, found = killed
    assert [(steps, names) for steps, names, _ in found] == [
        (4, ["checkpoint-3"]),
        (7, ["checkpoint-3", "checkpoint-6"]),
        (9, [".tmp-checkpoint-9", "checkpoint-3", "checkpoint-6"]),
    ]
    for step, text in ((3, found[1][2]), (6, found[2][2])):
        assert f"resuming from {run.folder}/checkpoint-{step}" in text
    assert run.console.read_text().count(f"resuming from {run.folder}/checkpoint-6") == 2
    assert without_timings(run.metrics()) == without_timings(lines(whole, "metrics.jsonl"))
    ranks = [f"checkpoint-{STEPS}/rank-0000{rank}-of-00002.safetensors" for rank in range(2)]
    for name in ("samples.jsonl", "final/model.safetensors", *ranks):
        assert (run.folder / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (data.Rows.load(folder / f"checkpoint-{STEPS}" / rollouts.KEPT) for folder in (run.folder, whole))
    assert ours.fingerprint == theirs.fingerprint and ours.per_token.keys() == {"sampling_logps", "old_logps"}
    assert all(torch.equal(value, theirs.per_token[name]) for name, value in ours.per_token.items())


def test_goes_on_inside_of_a_rollout_on_other_ranks(killed, whole, inputs, train_here, tmp_path):
    """Two ranks before, one now."""
    given = settings_of(tmp_path, inputs, 60, "long")
    shutil.copytree(f"{killed[0].folder}.copy", given["output_dir"])
    rows, expected = without_timings(train_here(given)), without_timings(lines(whole, "metrics.jsonl"))
    assert rows[:6] == expected[:6] and rows[6:] != expected[6:]
    for row, other in zip(rows, expected, strict=True):
        for key in other.keys() - {"rows"}:
            relative, near_zero = (1e-4, 0) if key == "grad_norm" else (1e-5, 2e-6)
            assert row[key] == pytest.approx(other[key], rel=relative, abs=near_zero), f"{key} of step {row['step']}"
    ours, theirs = ([s["completion"] for s in lines(folder, "samples.jsonl")] for folder in (given["output_dir"], whole))
    assert ours == theirs
    final = load_file(whole / "final" / "model.safetensors")
    for name, weight in load_file(Path(given["output_dir"], "final", "model.safetensors")).items():
        torch.testing.assert_close(weight, final[name], rtol=0, atol=1e-5)


def stop_at(place, folder):
    """Have this process stand still for good at a place of its run: `rollout N`, `update N` or `save N`; `<folder>.reached` says when."""
    kind, _, number = place.partition(" ")
    step, rolling = int(number), []

    def stand_still():
        Path(f"{folder}.reached").touch()
        time.sleep(600)

    def before(owner, name, look):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            look(*args)
            return function(*args, **kwargs)

        setattr(owner, name, watched)

    def at_token(decoder):
        if rolling and decoder.steps == 6:
            stand_still()

    if kind == "rollout":
        before(rollouts.Rollouts, "roll", lambda _, now: now == step and rolling.append(now))
        before(generate.Decoder, "step", at_token)
    if kind == "update":
        before(rollouts.Rollouts, "check", lambda _, now, metrics: now == step and stand_still())
    if kind == "save":
        before(checkpoint, "entry_of", lambda path: path.name == rollouts.KEPT and f"-{step}" in str(path.parent) and stand_still())


def train_all():
    """Every run of RUNS beside the output_dir of the --config that the command line names; or that run, up to a place."""
    device, options = sharding.start_ranks(60), sys.argv[1:]
    first = config.parse(options)
    place = Path(f"{first.output_dir}.place")
    if place.exists():
        stop_at(place.read_text(), first.output_dir)
        launcher.run(first, device, {"step": 0})
    inputs, folder = Path(first.data.train).parent, Path(first.output_dir).parent
    for name in RUNS:
        known = settings_of(folder, inputs, first.train.micro_batch_tokens, name)
        changes = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in known.items()]
        assert launcher.run(config.parse(options + changes), device, {"step": 0}) == "finished"
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    train_all()
