"""The hardware is not a hyperparameter: ranks, replicas and micro-batch sizes leave losses and gradients as they are.

Run by torchrun instead of pytest, this file is a training run that writes down the dtypes that it sees.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from algorithms import sft
from launch import train as launcher
from models import sharding
from train import batches, config, data, optim

STEPS = 10
BATCH = 8  # rows of a step
ROWS = 26  # three full steps and one of two rows make an epoch: there, two of four ranks have no row
SHORT_STEP = 4


def settings(output_dir, model, file, **changes):
    """Settings of a run, `changes` with __ for the dot."""
    fixed = {
        "output_dir": str(output_dir),
        "model.model_name_or_path": model,
        "data.train": file,
        "train.global_batch_size": BATCH,
        "train.max_steps": STEPS,
        "train.learning_rate": 1e-3,
        "log.report_to": [],
    }
    return fixed | {key.replace("__", "."): value for key, value in changes.items()}


@pytest.mark.parametrize(
    "shape, ranks, replicas, micro_batch_tokens",
    [("qwen3", 1, 1, 64), ("qwen3", 2, 1, 128), ("qwen3", 4, 1, 4096), ("llama", 4, 2, 128)],
)
def test_hardware_changes_nothing(shape, ranks, replicas, micro_batch_tokens, model_folder, data_file, start, train_here, tmp_path):
    """Every step equals that of one rank with the whole step in one micro-batch. qwen3 has tied embeddings, llama has not."""
    model, file = model_folder(shape), data_file("completion", ROWS)
    fsdp = {"fsdp__replicas": replicas, "fsdp__prefetch": ranks - 1, "fsdp__activation_checkpointing": "full" if ranks > 1 else "none"}
    split = settings(tmp_path / "split", model, file, train__micro_batch_tokens=micro_batch_tokens, **fsdp)
    run = start(split, ranks)
    whole = train_here(settings(tmp_path / "whole", model, file, train__micro_batch_tokens=4096))
    rows = run.wait().metrics()
    assert len(rows) == len(whole) == STEPS
    for ours, expected in zip(rows, whole):
        for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("entropy", 1e-5)):
            assert ours[key] == pytest.approx(expected[key], rel=tolerance), f"{key} of step {ours['step']}"
        for key in ("step", "rows", "num_tokens", "learning_rate"):
            assert ours[key] == expected[key]
    final = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    for name, weight in load_file(tmp_path / "split" / "final" / "model.safetensors").items():
        torch.testing.assert_close(weight, final[name], rtol=0, atol=1e-5)
    assert has_empty_micro_batch(tmp_path / "split", ranks, micro_batch_tokens) == (ranks == 4)
    files = (tmp_path / "split" / f"checkpoint-{STEPS}").glob("rank-*.safetensors")
    assert sum(bool(safe_open(f, "pt").keys()) for f in files) == ranks // replicas  # only one replica writes


def has_empty_micro_batch(output_dir, ranks, micro_batch_tokens):
    rows = data.Rows.load(output_dir / "data" / "train.safetensors")
    chosen = batches.examples_of(SHORT_STEP, ROWS, BATCH, seed=42)
    parts = (batches.micro_batches(rows, chosen, micro_batch_tokens, rank, ranks, 0.0) for rank in range(ranks))
    return any("placeholder" in batch for part in parts for batch in part)


@pytest.mark.parametrize("reduced", ["float32", "bfloat16"])
def test_bfloat16_stops_at_the_layers(reduced, model_folder, data_file, start, tmp_path):
    """Layers compute in bfloat16; log-probs, parameters, what the optimizer sees and, by default, reduced gradients are float32."""
    changes = {"model__dtype": "bfloat16", "train__max_steps": 2, "train__micro_batch_tokens": 128, "fsdp__reduce_dtype": reduced}
    run = start(settings(tmp_path / "run", model_folder("llama"), data_file("completion", ROWS), **changes), 2, script=__file__)
    run.wait()
    expected = {"layer": ["bfloat16"], "head": ["bfloat16"], "logps": ["float32"], "reduced": [reduced]}
    expected |= {"parameters": ["float32"], "gradients": ["float32"], "logps are rounded": [False]}
    for rank in range(2):
        assert json.loads((tmp_path / "run" / f"seen-{rank}.json").read_text()) == expected


def train_and_watch():
    """launch/train.py's run on this rank; seen-<rank>.json tells what was seen: dtypes, and whether all log-probs fit bfloat16."""
    seen = defaultdict(set)

    def note(name, tensor):
        seen[name].add(str(tensor.dtype).removeprefix("torch."))

    def before(module, name, look):
        """Call `look` with the arguments of each call of a module's function."""
        function = getattr(module, name)

        def watched(*args, **kwargs):
            look(*args, **kwargs)
            return function(*args, **kwargs)

        setattr(module, name, watched)

    def look_at_loss(logps, *_):
        note("logps", logps)
        seen["logps are rounded"].add(bool((logps.bfloat16() == logps).all()))

    def look_at_model(model, _):
        for name, module in {"layer": model.model.layers[0].mlp.up_proj, "head": model.lm_head}.items():
            module.register_forward_pre_hook(lambda module, _, name=name: note(name, module.weight))

    def look_at_optimizer(optimizer, *_):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            note("parameters", p)
            note("gradients", p.grad)

    before(sft, "loss", look_at_loss)
    before(optim, "make_optimizer", look_at_model)
    before(optim.torch.optim.AdamW, "step", look_at_optimizer)
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"  # torch 2.13, 2.11
    before(dist, scatter, lambda **arguments: note("reduced", arguments["input"]))
    cfg = config.parse()
    device = sharding.start_ranks(60)
    launcher.run(cfg, device, {"step": 0})
    text = json.dumps({name: sorted(values) for name, values in seen.items()})
    Path(cfg.output_dir, f"seen-{dist.get_rank()}.json").write_text(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    train_and_watch()
