"""Whole runs with adapters: every algorithm with LoRA, DoRA and QLoRA on one and two ranks, stopped and gone on; what they leave behind.

Run by torchrun instead of pytest, this file trains every run of `RUNS` on its ranks, and goes on with each from its middle.
"""

import ctypes
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from test_resume import assert_same_bytes, until
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from launch import export
from launch import train as launcher
from models import load, logprobs, quantize, sharding
from tests.conftest import plain
from train import checkpoint, config, toy

ALGORITHMS = ["sft", "dpo", "simpo", "kto", "orpo", "grpo"]
KINDS = {
    "lora": {"lora.modules_to_save": ["lm_head"]},
    "dora": {"lora.use_dora": True, "lora.use_rslora": True},
    "qlora": {"model.quantization": "nf4", "train.optim": "adamw_8bit", "lora.r": 128},  # some 8-bit states, some not
}
RUNS = [f"{algorithm}-{kind}" for algorithm in ALGORITHMS for kind in KINDS] + ["sft-dropout", "dpo-synced", "grpo-kl"]
LONG = "dpo-long"  # to be killed
MORE = {
    "sft-dropout": {"lora.lora_dropout": 0.2},
    "dpo-synced": {"reference.sync_ref_model": True, "reference.ref_model_sync_steps": 2},
    "grpo-kl": {"grpo.beta": 0.1},
    "dpo-long": KINDS["qlora"] | {"train.max_steps": 12, "checkpoint.save_steps": 3},
}


def settings_of(name, folder, base, data, tokens):
    algorithm, kind = name.split("-")
    files = {"sft": "sft.jsonl", "grpo": "prompts.jsonl"}
    known = {
        "algorithm": algorithm,
        "output_dir": str(folder / name),
        "model.model_name_or_path": str(base),
        "data.train": str(data / files.get(algorithm, "pairs.jsonl")),
        "lora.r": 4,
        "train.global_batch_size": 8,
        "train.micro_batch_tokens": tokens,
        "train.max_steps": 4,
        "train.learning_rate": 3e-3,
        "checkpoint.save_steps": 2,
        "checkpoint.save_total_limit": None,
        "log.report_to": [],
    }
    if algorithm == "grpo":
        known |= {"grpo.reward_funcs": [f"{data}/rewards.py:early"], "grpo.num_generations": 4, "grpo.max_completion_length": 8}
    return known | KINDS.get(kind, {}) | MORE.get(name, {})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of rows for each algorithm, and a reward."""
    folder, stream = tmp_path_factory.mktemp("data"), random.Random(0)

    def turn(role, longest):
        return [{"role": role, "content": "".join(stream.choices(toy.LETTERS, k=stream.randint(1, longest)))}]

    rows = [{"prompt": turn("user", 12), "chosen": turn("assistant", 14), "rejected": turn("assistant", 14)} for _ in range(20)]
    tables = {"pairs": rows}
    tables["sft"] = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    tables["prompts"] = [{"prompt": row["prompt"][0]["content"]} for row in rows]
    for name, table in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    reward = "def early(completions, **_):\n    return [sum(c < 'h' for c in text) / 9 for text in completions]\n"
    (folder / "rewards.py").write_text(reward)
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(start, files, model_folder, tmp_path_factory):
    """The folder of all RUNS on two ranks; under way."""
    folder = tmp_path_factory.mktemp("two_ranks")
    return start(settings_of("sft-plain", folder, model_folder("llama"), files, 128), 2, script=__file__), folder


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_hardware_changes_nothing_and_what_was_stopped_goes_on(name, on_two_ranks, files, model_folder, train_here, tmp_path):
    """One rank with large micro-batches against two with small ones; there, steps 3 and 4 again from the checkpoint of step 2."""
    whole = train_here(settings_of(name, tmp_path, model_folder("llama"), files, 1 << 20))
    run, folder = on_two_ranks
    run.wait()
    rows = metrics_of(folder / name)
    assert len(rows) == len(whole) == 4 and all(row["grad_norm"] > 0 for row in rows)
    eight_bits = any(k.startswith("optimizer.absmax") for k in safe_open(*rank_file(folder / name, 4), framework="pt").keys())  # noqa: SIM118
    assert eight_bits == name.endswith("qlora")
    for ours, expected in zip(rows, whole, strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6), f"loss of step {ours['step']}"
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), f"gradient norm of step {ours['step']}"
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / f"{name}-first" / file).read_bytes() == (folder / name / "final" / file).read_bytes()
    ours, theirs = (load_file(parent / name / "final" / "adapter_model.safetensors") for parent in (folder, tmp_path))
    assert ours.keys() == theirs.keys() and any(t.abs().max() > 0 for k, t in ours.items() if "lora_B" in k)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["simpo-full", "kto-dora", "orpo-lora", "grpo-kl"])
def test_whole_weights_change_no_bit(name, files, model_folder, train_here, tmp_path):
    """On one rank; test_replica.py has more ranks, and the other algorithms."""
    found = []
    for reshard in (True, False):
        folder = tmp_path / str(reshard)
        folder.mkdir()
        given = settings_of(name, folder, model_folder("llama"), files, 256) | {"fsdp.reshard_after_forward": reshard}
        given["lora.r"] = None if name.endswith("full") else 4
        rows = [plain(row) for row in train_here(given)]
        found.append((rows, next((folder / name / "final").glob("*model.safetensors")).read_bytes()))
    assert found[0] == found[1]


def rank_file(folder, step):
    return sorted((folder / f"checkpoint-{step}").glob("rank-*.safetensors"))[:1]


def test_killed_run_gives_the_same_bytes(on_two_ranks, start, files, model_folder, tmp_path):
    whole, folder = on_two_ranks
    whole.wait()
    given = settings_of(LONG, tmp_path, model_folder("llama"), files, 128)
    killed = start(given, 2)
    until(killed, 4)
    killed.kill()
    assert not (killed.folder / "final").exists()
    again = start(given, 2).wait()
    assert re.search(r"resuming from .*/checkpoint-(3|6|9)", again.console.read_text())
    expected = SimpleNamespace(folder=folder / LONG, metrics=lambda: metrics_of(folder / LONG))
    assert_same_bytes(again, expected, "adapter_model.safetensors")


def test_eight_bit_states_move_to_another_number_of_ranks(on_two_ranks, files, model_folder, train_here, tmp_path):
    """Two ranks up to step 3, one after it: the states are rounded once more, and no more than that."""
    run, folder = on_two_ranks
    run.wait()
    shutil.copytree(folder / LONG, tmp_path / LONG, ignore=shutil.ignore_patterns("checkpoint-6", "checkpoint-9", "checkpoint-12", "final"))
    rows, expected = train_here(settings_of(LONG, tmp_path, model_folder("llama"), files, 128)), metrics_of(folder / LONG)
    assert len(rows) == len(expected) == 12 and rows[4]["loss"] != expected[4]["loss"], "the run did not go on from step 3"
    for ours, theirs in zip(rows, expected):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3), f"loss of step {ours['step']}"


def test_checkpoints_hold_what_is_trained(on_two_ranks):
    run, folder = on_two_ranks
    run.wait()
    names = {key for file in (folder / "sft-dora" / "checkpoint-4").glob("rank-*") for key in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert names and all("lora_" in name for name in names)


@pytest.mark.parametrize("name", ["sft-lora", "dpo-dora", "grpo-qlora"])
def test_exported_adapter_and_merged_folder_give_the_logits_of_training(name, on_two_ranks, model_folder, one_rank, tmp_path):
    """In plain peft, over the base quantised by bitsandbytes itself where ours was; and merged, in plain transformers."""
    run, folder = on_two_ranks
    run.wait()
    saved, base = folder / name / "checkpoint-4", model_folder("llama")
    export.export(saved, tmp_path / "merged", torch.float32, merge=True)
    export.export(saved, tmp_path / "adapter")
    written, final = ((f / "adapter_model.safetensors").read_bytes() for f in (tmp_path / "adapter", folder / name / "final"))
    assert written == final
    known = checkpoint.read_state(saved)["config"]
    model = load.build(config.Model(**known["model"]), base, config.Fsdp(), one_rank, 0, config.Lora(**known["lora"]))
    checkpoint.load(saved, model)
    ids = torch.randint(3, 90, (1, 30), generator=torch.Generator().manual_seed(0))
    quantization = {}
    if known["model"]["quantization"]:
        four_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
        quantization = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **four_bits)}
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **quantization)
    with torch.no_grad():
        ours = logprobs.token_logps(model, {"input_ids": ids, "attention_mask": ids > 0, "loss_mask": torch.arange(30)[None] > 0})
        before = plain.train()(input_ids=ids).logits  # bitsandbytes repacks its weights in eval mode
        models = {
            "adapter": PeftModel.from_pretrained(plain, tmp_path / "adapter").train(),
            "merged": AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32),
        }
        for other in models.values():
            z = other(input_ids=ids).logits
            logps = z.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            torch.testing.assert_close(ours["logps"][:, 1:], logps, rtol=0, atol=1e-5)
            assert (z - before).abs().max() > 1e-3, "nothing was learned"


def test_export_refuses_what_makes_no_sense(on_two_ranks, tmp_path):
    run, folder = on_two_ranks
    run.wait()
    with pytest.raises(ValueError, match=r"^--dtype: an adapter is written as it was trained; add --merge"):
        export.export(folder / "sft-lora" / "checkpoint-4", tmp_path / "out", torch.float32)
    with pytest.raises(ValueError, match=r"final is an adapter; name the checkpoint-<step> beside it"):
        export.export(folder / "sft-lora" / "final", tmp_path / "out")


def test_a_rank_holds_its_share_of_the_four_bits(start, files, tmp_path):
    """A base of 113 million weights, on two ranks: what a rank says it holds of each weight, and what its process grew by."""
    base = tmp_path / "base"
    toy.write_model("tiny", base)
    shape = AutoConfig.from_pretrained(base)
    shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, shape.head_dim = 1024, 4096, 7, 256
    shape.layer_types = ["full_attention"] * 7
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(base)
    given = settings_of("sft-qlora", tmp_path, base, files, 1 << 20) | {"train.max_steps": 1, "lora.r": 1, "train.optim": "adamw"}
    run = start(given | {"model.dtype": "bfloat16"}, 2, script=__file__)
    console = run.wait().console.read_text()
    weights, trained, held = re.search(r"([\d,]+) parameters, ([\d,]+) of them trained, ([\d.]+) bytes each", console).groups()
    weights, trained = (int(n.replace(",", "")) for n in (weights, trained))
    embedded = 128 * 1024 * 2  # bytes that stay in 16 bits, in two shares
    expected = (0.5 * weights + embedded + 4 * trained) / 2 + weights / 64  # two shares of four bits; the scales are whole
    assert float(held) == pytest.approx(expected / weights, rel=0.02) and float(held) < 0.28
    for grown in re.findall(r"resident: (\d+) bytes more", console):
        print(f"{weights:,} weights: {held} bytes each by count, {int(grown) / weights:.3f} by the resident set")
        assert int(grown) < 0.5 * weights  # less than the four bits of all; a rank's share of the base in 16 bits is 1 byte each


def train_all():
    """Every run of RUNS, or the one of the --config alone if it is none of them; each goes on once more from its middle."""
    device, options = sharding.start_ranks(60), sys.argv[1:]
    given = config.parse(options)
    folder, base, data = Path(given.output_dir).parent, given.model.model_name_or_path, Path(given.data.train).parent
    if given.train.max_steps == 1:
        measure(given, device)
    for name in (*RUNS, LONG) if given.train.max_steps > 1 else ():
        known = settings_of(name, folder, base, data, given.train.micro_batch_tokens)
        changes = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in known.items()]
        for turn in ("first", "again") if name in RUNS else ("only",):
            assert launcher.run(config.parse(options + changes), device, {"step": 0}) == "finished"
            dist.barrier()
            if turn == "first" and dist.get_rank() == 0:
                shutil.move(folder / name / "final", folder / f"{name}-first")
                shutil.rmtree(folder / name / "checkpoint-4")
            dist.barrier()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def measure(cfg, device):
    """A run that says what its process grew by while the model was built."""
    build, process = load.build, psutil.Process()
    quantize.library().quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)  # loads what it needs

    def watched(*args):
        before = anonymous(process)
        model = build(*args)
        ctypes.CDLL(None).malloc_trim(0)  # what was freed counts no longer
        print(f"resident: {anonymous(process) - before} bytes more", flush=True)
        return model

    load.build = watched
    launcher.run(cfg, device, {"step": 0})


def anonymous(process):
    """Bytes of the resident set that are no file's pages."""
    info = process.memory_info()
    return info.rss - info.shared


if __name__ == "__main__":
    train_all()
