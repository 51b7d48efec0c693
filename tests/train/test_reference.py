"""The reference: its log-probs are the initial policy's, cached and keyed; a synced one follows; hardware changes nothing.

Run by torchrun instead of pytest, this file trains every variant of `RUNS` on the ranks that it is given.
"""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_resume import assert_same_bytes, until
from transformers import AutoModelForCausalLM

from launch import train as launcher
from models import load, sharding
from tests.conftest import TIMINGS
from train import config, data, reference, toy

LN2 = 0.6931472
BATCH, PAIRS = 16, 40  # two full steps and a short one make an epoch


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of answers in capitals, preferred to plain ones."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toy.dataset("capitals", "test")[:PAIRS]))
    return str(path)


@pytest.fixture
def settings(model_folder, pairs, tmp_path):
    """(name of the output_dir, settings with __ for the dot) -> settings of a DPO run."""

    def make(name, **changes):
        fixed = {
            "algorithm": "dpo",
            "output_dir": str(tmp_path / name),
            "model.model_name_or_path": model_folder("llama"),
            "data.train": pairs,
            "train.global_batch_size": BATCH,
            "train.micro_batch_tokens": 200,
            "train.max_steps": 4,
            "train.learning_rate": 1e-3,
            "checkpoint.save_total_limit": None,
            "log.report_to": [],
        }
        return fixed | {key.replace("__", "."): value for key, value in changes.items()}

    return make


@pytest.fixture
def prepared(model_folder, pairs, one_rank, tmp_path, monkeypatch):
    """The arguments of reference.with_logps, for 40 pairs in parts of 16: a function of the changes to `cfg.reference`."""
    monkeypatch.setattr(reference, "PART", 16)

    def make(**changes):
        folder, about = model_folder("llama"), config.Reference(**changes)
        cfg = config.Config(str(tmp_path / "run"), config.Model(folder), config.Data(pairs), "dpo", reference=about)
        rows = data.prepare(pairs, "train", cfg.data, load.load_tokenizer(cfg.model, folder), "pairs")
        policy = load.build(cfg.model, folder, cfg.fsdp, one_rank, cfg.seed)
        return rows, policy, reference.key_of(cfg, folder, one_rank), cfg, folder, one_rank, (200, 0, 1, 0.01)

    return make


def parts_of(cfg):
    """The cache's files of tensors and when they were written, by name."""
    return {path.name: path.stat().st_mtime_ns for path in Path(cfg.output_dir, "reference").glob("*/*.safetensors")}


def logps_by(folder, rows):
    """(N,) log-probs of the trained tokens by plain transformers, a row at a time."""
    model, out = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    for i in range(len(rows.offsets) - 1):
        ids, mask = rows.row(i)
        with torch.no_grad():
            logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        out.append(torch.nn.functional.pad(logps, (1, 0)).where(mask, 0))
    return torch.cat(out)


# ---- the cache ---------------------------------------------------------------------------------------------------------------


def test_log_probs_are_the_initial_policys(prepared, model_folder):
    given = prepared()
    rows = reference.with_logps(*given)
    torch.testing.assert_close(rows.per_token["ref_logps"], logps_by(model_folder("llama"), rows), rtol=0, atol=1e-5)
    assert given[1].training and "ref_logps" not in given[0].per_token
    assert rows.fingerprint == given[0].fingerprint


def test_named_reference(prepared, model_folder, tmp_path):
    shutil.copytree(model_folder("llama"), tmp_path / "other")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tmp_path / "other").config).save_pretrained(tmp_path / "other")
    rows = reference.with_logps(*prepared(model_name_or_path=str(tmp_path / "other")))
    torch.testing.assert_close(rows.per_token["ref_logps"], logps_by(tmp_path / "other", rows), rtol=0, atol=1e-5)
    assert (rows.per_token["ref_logps"] - logps_by(model_folder("llama"), rows)).abs().max() > 0.1


def test_cache_is_kept_and_completed(prepared, monkeypatch):
    """What is there is neither computed nor written again; a part that is missing is computed alone."""
    given, scored = prepared(), []
    score = reference.score
    monkeypatch.setattr(reference, "score", lambda model, rows, chosen, dealt: scored.append(chosen) or score(model, rows, chosen, dealt))
    first = reference.with_logps(*given).per_token["ref_logps"]
    assert scored == [range(0, 16), range(16, 32), range(32, 40)]
    written = parts_of(given[3])
    assert sorted(written) == ["000000000.safetensors", "000000016.safetensors", "000000032.safetensors"]
    again = reference.with_logps(*given).per_token["ref_logps"]
    assert len(scored) == 3 and parts_of(given[3]) == written and torch.equal(again, first)
    next(Path(given[3].output_dir, "reference").glob("*/000000016.safetensors")).unlink()
    again = reference.with_logps(*given).per_token["ref_logps"]
    assert scored[3:] == [range(16, 32)] and torch.equal(again, first)
    assert {name for name, when in parts_of(given[3]).items() if when == written[name]} == written.keys() - {"000000016.safetensors"}


def test_another_key_is_another_cache(prepared):
    given = prepared()
    reference.with_logps(*given)
    reference.with_logps(*given[:2], given[2] | {"dtype": "bfloat16"}, *given[3:])
    other_rows = dataclasses.replace(given[0], fingerprint="other")
    reference.with_logps(other_rows, *given[1:])
    keys = [json.loads(path.read_text()) for path in Path(given[3].output_dir, "reference").glob("*/key.json")]
    expected = [given[2] | {"rows": given[0].fingerprint}, given[2] | {"rows": "other"}]
    assert len(keys) == 3 and all(key in keys for key in [*expected, expected[0] | {"dtype": "bfloat16"}])


def test_key_is_all_that_log_probs_depend_on(prepared, one_rank, tmp_path, monkeypatch):
    _, _, key, cfg, folder, *_ = prepared()

    def key_of(cfg=cfg, folder=folder):
        return reference.key_of(cfg, folder, one_rank)

    def changed(block, **changes):
        return dataclasses.replace(cfg, **{block: dataclasses.replace(getattr(cfg, block), **changes)})

    assert key_of() == key == key_of(dataclasses.replace(cfg, output_dir="elsewhere", seed=7))
    other = shutil.copytree(folder, tmp_path / "other")
    assert key_of(changed("reference", model_name_or_path=str(other)))["weights"] == key["weights"]
    change_a_weight(other)
    bent = shutil.copytree(folder, tmp_path / "bent")
    (bent / "config.json").write_text((bent / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    made = [
        key_of(folder=other),
        key_of(folder=bent),
        key_of(changed("reference", model_name_or_path=str(other))),
        key_of(changed("model", dtype="bfloat16")),
        key_of(drawn := changed("model", from_scratch=True)),
        key_of(dataclasses.replace(drawn, seed=7)),
    ]
    assert len({json.dumps(k) for k in [key, *made]}) == 7
    monkeypatch.setattr(load, "snapshot_download", lambda name, **_: str(other))
    hub = key_of(changed("reference", model_name_or_path="org/model"))
    assert hub["weights"] == key_of(folder=other)["weights"], "a hub reference is known by its name alone"


def change_a_weight(folder):
    path = Path(folder, "model.safetensors")
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("algorithm", ["sft", "simpo", "orpo"])
@pytest.mark.parametrize("name, value", [("model_name_or_path", "some/model"), ("sync_ref_model", True)])
def test_setting_of_a_reference_that_is_not_there_is_refused(name, value, algorithm):
    with pytest.raises(ValueError, match=rf"^reference\.{name}: "):
        config.Config(
            "run", config.Model("builtin:tiny"), config.Data("builtin:capitals"), algorithm, reference=config.Reference(**{name: value})
        )


# ---- runs --------------------------------------------------------------------------------------------------------------------


def test_first_loss_is_ln_2(settings, train_here):
    rows = train_here(settings("run", train__max_steps=2))
    assert rows[0]["loss"] == pytest.approx(LN2, abs=1e-6) and abs(rows[1]["loss"] - LN2) > 1e-4
    assert max(abs(rows[0][f"rewards/{side}"]) for side in ("chosen", "rejected", "margins")) < 1e-6


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_wrong_cache_stops_the_run_before_its_first_update(algorithm, settings, train_here, tmp_path):
    made = train_here(settings("good", algorithm=algorithm, train__max_steps=1))
    shutil.copytree(tmp_path / "good" / "reference", tmp_path / "bad" / "reference")
    for path in (tmp_path / "bad" / "reference").glob("*/*.safetensors"):
        save_file({"ref_logps": load_file(path)["ref_logps"] * 1.1}, path)
    with pytest.raises(ValueError, match=r"^step 1: rewards/chosen is 0\.\d+, expected 0, because the policy has not been updated yet"):
        train_here(settings("bad", algorithm=algorithm, train__max_steps=1))
    assert len(made) == 1 and not (tmp_path / "bad" / "metrics.jsonl").read_text()


def test_resumed_without_its_cache_computes_it_from_the_initial_policy(settings, train_here, tmp_path):
    expected = train_here(settings("whole", checkpoint__save_steps=2))
    shutil.copytree(tmp_path / "whole", tmp_path / "again", ignore=shutil.ignore_patterns("reference", "checkpoint-4", "final"))
    again = train_here(settings("again", checkpoint__save_steps=2))
    for ours, theirs in zip(again, expected, strict=True):
        assert {n: ours[n] for n in theirs if n not in TIMINGS}.items() <= theirs.items()


@pytest.mark.parametrize("named", [False, True])
def test_resume_with_other_reference_weights_is_refused(named, settings, train_here, model_folder, tmp_path):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    changes = {"reference__model_name_or_path" if named else "model__model_name_or_path": str(folder), "train__max_steps": 1}
    train_here(settings("run", **changes))
    change_a_weight(folder)
    with pytest.raises(ValueError, match=r"made with other settings: reference weights: [0-9a-f]{16} then, [0-9a-f]{16} now[.;]"):
        train_here(settings("run", **changes))


# ---- a reference that follows ------------------------------------------------------------------------------------------------


def test_follow_mixes_policy_into_reference(prepared):
    _, policy, _, cfg, folder, device, _ = prepared()
    follower = reference.build(cfg, folder, device).requires_grad_(False)
    before = [p.to_local().clone() for p in follower.parameters()]
    with torch.no_grad():
        for p in policy.parameters():
            p.to_local().add_(torch.randn(p.to_local().shape))
    reference.follow(follower, policy, 0.6)
    for theirs, ours, old in zip(follower.parameters(), policy.parameters(), before, strict=True):
        torch.testing.assert_close(theirs.to_local(), 0.6 * ours.to_local() + 0.4 * old)


@pytest.mark.parametrize("algorithm, at_rest", [("dpo", LN2), ("kto", 0.5)])
def test_synced_reference_is_the_policy_again(algorithm, at_rest, settings, train_here):
    """With all of the policy in each update, every second step begins as the first did."""
    changes = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    changes = {f"reference__{name}": value for name, value in changes.items()}
    rows = train_here(settings("run", algorithm=algorithm, train__max_steps=6, **changes))
    for row in rows:
        moved = max(abs(row["loss"] - at_rest), abs(row["rewards/chosen"]), abs(row["rewards/rejected"]), row.get("kl", 0.0))
        assert moved < 1e-5 if row["step"] % 2 else moved > 1e-3, row["step"]


# ---- the hardware ------------------------------------------------------------------------------------------------------------

SYNCED = {"algorithm": "dpo", "reference.sync_ref_model": True, "reference.ref_model_sync_steps": 2, "train.max_steps": 8}
RUNS = {
    "dpo": {"algorithm": "dpo"},
    "aot": {"algorithm": "dpo", "dpo.loss_type": ["aot", "aot_unpaired"]},
    "kto": {"algorithm": "kto"},
    "simpo": {"algorithm": "simpo", "simpo.cpo_alpha": 0.5},
    "orpo": {"algorithm": "orpo"},
    "synced": SYNCED | {"checkpoint.save_steps": 4, "checkpoint.save_total_limit": None},
}


def settings_of(name, folder, file, micro_batch_tokens):
    """Settings of the run RUNS[name] below `folder`, evaluated on the pairs that it trains on."""
    fixed = {
        "output_dir": f"{folder}/{name}",
        "model.model_name_or_path": "builtin:tiny",
        "data.train": file,
        "data.eval": file,
        "evaluation.steps": 2,
        "train.global_batch_size": BATCH,
        "train.max_steps": 4,  # for pairs, the third one is short
        "train.learning_rate": 1e-3,
        "train.micro_batch_tokens": micro_batch_tokens,
        "log.report_to": [],
    }
    return fixed | RUNS[name]


@pytest.fixture(scope="module")
def on_two_ranks(start, pairs, tmp_path_factory):
    """The folder of all RUNS on two ranks, in many micro-batches; under way."""
    folder = tmp_path_factory.mktemp("two_ranks")
    return start(settings_of("dpo", folder, pairs, 128), 2, script=__file__), folder


@pytest.mark.parametrize("name", [name for name in RUNS if name != "synced"])
def test_hardware_changes_nothing(name, on_two_ranks, pairs, train_here, tmp_path):
    """One rank with each step in one micro-batch, one rank with many, two ranks with many."""
    whole, split = (train_here(settings_of(name, made_folder(tmp_path, tokens), pairs, tokens)) for tokens in (1 << 20, 128))
    run, folder = on_two_ranks
    run.wait()
    ranks = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert len(whole) == 4 and abs(whole[0]["loss"] - whole[3]["loss"]) > 1e-3, "nothing was learned"
    assert name != "kto" or max(row["kl"] for row in whole) > 1e-3, "the baseline is not part of the comparison"
    for rows in (split, ranks):
        for ours, expected in zip(rows, whole, strict=True):
            assert ours.keys() == expected.keys() and ours["rows"] == expected["rows"] and ours["num_tokens"] == expected["num_tokens"]
            for key in expected.keys() - TIMINGS - {"rows"}:
                relative, near_zero = 1e-4 if key == "grad_norm" else 1e-5, 0.0 if key in ("loss", "grad_norm") else 1e-5
                assert ours[key] == pytest.approx(expected[key], rel=relative, abs=near_zero), f"{key} of step {ours['step']}"


def made_folder(tmp_path, name):
    (tmp_path / str(name)).mkdir()
    return tmp_path / str(name)


def test_killed_synced_run_gives_the_same_bytes(on_two_ranks, start, pairs, tmp_path):
    """Killed after the checkpoint of step 4, which keeps a reference that was updated once; its next update is due at once."""
    given = settings_of("synced", tmp_path, pairs, 128)
    run = start(given, 2)
    until(run, 5)
    run.kill()
    assert not (run.folder / "final").exists()
    again = start(given, 2).wait()
    assert f"resuming from {run.folder}/checkpoint-4" in again.console.read_text()
    whole, folder = on_two_ranks
    whole.wait()
    rows = [json.loads(line) for line in (folder / "synced" / "metrics.jsonl").read_text().splitlines()]
    assert_same_bytes(again, SimpleNamespace(folder=folder / "synced", metrics=lambda: rows))


def train_all():
    """Every run of RUNS, one after the other, beside the output_dir of the --config that the command line names."""
    device, options = sharding.start_ranks(60), sys.argv[1:]
    first = config.parse(options)
    for name in RUNS:
        known = settings_of(name, Path(first.output_dir).parent, first.data.train, first.train.micro_batch_tokens)
        changes = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in known.items()]
        assert launcher.run(config.parse(options + changes), device, {"step": 0}) == "finished"
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    train_all()
