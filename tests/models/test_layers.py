"""Checkpointing, compilation, attention and kernels of the decoder layers: whatever is chosen, loss and gradient are eager's.

Run as a script under TRITON_INTERPRET=1, this file compares Liger's kernels with the family's own operations.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from families import write
from test_logprobs import rows
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from models import attention, dropout, generate, load, logprobs, lora, sharding
from train import toy
from train.config import Config, Data, Fsdp, Lora, Model

LENGTHS = ([9, 3, 14, 6, 1], [5, 20, 3], [11, 3], [2, 3], [12, 9, 33, 1, 1, 1])
ROOT = Path(__file__).resolve().parents[2]


def ours(folder, checkpointing="none", adapters=None, **settings):
    device = sharding.start_ranks(60)
    fsdp = Fsdp(activation_checkpointing=checkpointing)
    model = load.build(Model(str(folder), **{"dtype": "float32"} | settings), folder, fsdp, device, seed=0, adapters=adapters)
    stream = torch.Generator().manual_seed(1)
    for p in lora.trained(model).values() if adapters else ():
        p.data.to_local().copy_(0.1 * torch.randn(p.shape, generator=stream))
    return model


def step(model, lengths=LENGTHS[0]):
    """Log-probs and the gradient of all that is trained, under an upstream gradient that differs from token to token."""
    model.zero_grad()
    batch = rows(lengths) | {"row_keys": dropout.row_keys(42, 5, torch.arange(len(lengths)))}
    out = logprobs.token_logps(model, batch)["logps"]
    (out * torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out)).sum().backward()
    return out.detach().cpu(), torch.cat([sharding.whole(p.grad).flatten().cpu() for p in model.parameters() if p.requires_grad])


def assert_close(got, expected, tolerance):
    for a, b in zip(got, expected):
        assert b.norm() > 0 and (a - b).norm() <= tolerance * b.norm()


COMBINATIONS = [
    (checkpointing, compiled, implementation, dtype)
    for checkpointing in ("none", "selective", "full", "offload")
    for compiled in (False, True)
    for implementation in ("chunked", "eager")
    for dtype in ("float32", "bfloat16")
    # compiling takes seconds: of what is alike, one
    if not compiled or (checkpointing, implementation, dtype) in (("none", "chunked", "float32"), ("full", "eager", "bfloat16"))
]


@pytest.mark.parametrize("checkpointing, compiled, implementation, dtype", COMBINATIONS)
def test_every_combination_is_the_eager_step(checkpointing, compiled, implementation, dtype, tmp_path):
    """Without compiling the same bits; on a GPU, `auto` attention is the kernel that a run there would take."""
    write("qwen3", tmp_path)
    expected = step(ours(tmp_path, dtype=dtype, logprobs="eager", attn_implementation="sdpa"))
    got = step(ours(tmp_path, checkpointing, dtype=dtype, logprobs=implementation, compile=compiled))
    assert_close(got, expected, 1e-5 if dtype == "float32" else 2e-2)
    if not compiled and not torch.cuda.is_available():
        assert all(map(torch.equal, got, step(ours(tmp_path, dtype=dtype, logprobs=implementation))))


REFUSED = [
    (
        {"compile": True},
        "selective",
        r"^fsdp.activation_checkpointing: got 'selective', expected none, full or offload where model",
    ),
    ({"compile": True, "kernels": ["rope"]}, "none", r"^model.kernels: got \['rope'\], expected nothing with model.compile"),
    (
        {"attn_implementation": "varlen"},
        "none",
        r"^model.attn_implementation: varlen needs a GPU of compute capability 8.0 or later and",
    ),
    ({"attn_implementation": "flex"}, "none", r"flex needs a GPU of compute capability 8.0 or later, got cpu and float32; `sdpa` runs"),
    ({"attn_implementation": "flash_attention_2"}, "none", "flash_attention_2 needs the package flash_attn: pip install flash-attn --no-b"),
    ({"attn_implementation": "flash_attention_3"}, "none", "flash_attention_3 needs the package flash_attn_interface: "),
    ({"kernels": ["swiglu"]}, "none", "model.kernels: Liger's kernels need a GPU"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the kernels")
@pytest.mark.parametrize("settings, checkpointing, message", REFUSED)
def test_every_other_combination_is_refused(settings, checkpointing, message, tmp_path):
    write("llama", tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        config = Config("r", Model(str(tmp_path), **settings), Data("d"), fsdp=Fsdp(activation_checkpointing=checkpointing))
        load.build(config.model, tmp_path, config.fsdp, sharding.start_ranks(60), 0)
    assert "\n" not in str(error.value)


def test_a_family_without_kernels_is_refused_by_name(tmp_path):
    write("cohere", tmp_path)
    with pytest.raises(ValueError, match=r"^model.kernels: no swaps are known for cohere, only for llama, mistral"):
        ours(tmp_path, kernels=["rms_norm"])


class Calls(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function._schema.name.rpartition("::")[2]] += 1
        return function(*args, **kwargs or {})


def test_what_is_computed_again(tmp_path):
    """selective: only what lies between products; full and offload: the layer; offload copies each layer's input away and back."""
    write("llama", tmp_path)
    calls = {}
    for name in ("none", "selective", "full", "offload"):
        model = ours(tmp_path, name)
        with Calls() as calls[name]:
            step(model)
    silu, products, copies = ({name: c.count[op] for name, c in calls.items()} for op in ("silu", "mm", "copy_"))
    assert silu == {"none": 2, "selective": 4, "full": 4, "offload": 4}
    assert products["selective"] == products["none"] and products["full"] == products["offload"]
    # the recomputation ends where the last tensor that is needed has been made: before the last product of a layer
    assert products["full"] == products["none"] + 2 * 6
    assert copies["offload"] > copies["full"]


@pytest.mark.parametrize("settings", [{}, {"quantization": "nf4"}])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_keyed_dropout_draws_the_same_again(checkpointing, settings, tmp_path):
    write("llama", tmp_path)
    adapters = Lora(r=4, lora_dropout=0.3)
    expected = step(ours(tmp_path, adapters=adapters, **settings))
    assert not torch.allclose(expected[0], step(ours(tmp_path, adapters=Lora(r=4), **settings))[0], atol=1e-3)
    assert all(map(torch.equal, step(ours(tmp_path, checkpointing, adapters, **settings)), expected))


def test_compiled_layers_are_compiled_once(tmp_path):
    """With adapters and their dropout: no graph after the second length, none for the sampler, and nothing has another name."""
    write("llama", tmp_path)
    plain, fast = (ours(tmp_path, how, Lora(r=4, lora_dropout=0.3), compile=how == "full") for how in ("none", "full"))
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in plain.named_parameters()]
    made = []
    for lengths in LENGTHS:
        assert_close(step(fast, lengths), step(plain, lengths), 1e-5)
        made.append(counters["stats"]["unique_graphs"])
    assert 0 < made[0] < made[1] == made[-1]
    prompts = [[5, 6, 7], [9, 8]]
    assert generate.greedy(fast, toy.tokenizer("tiny"), prompts, 6) == generate.greedy(plain, toy.tokenizer("tiny"), prompts, 6)
    assert counters["stats"]["unique_graphs"] == made[-1]


@pytest.mark.parametrize("window", [None, 4])
def test_flex_sees_what_sdpa_sees(window):
    """Its forward pass; torch has no backward pass for it on a CPU."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 33, 16, generator=g) for heads in (4, 2, 2))
    found = attention.Rows(LENGTHS[0])
    expected, _ = attention.sdpa(None, q, k, v, None, rows=found, sliding_window=window)
    with torch.compiler.set_stance("force_eager"):
        got, _ = attention.flex(None, q, k, v, None, rows=found, sliding_window=window)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert list(found.masks) == [window]


def test_liger_kernels_equal_the_familys_own():
    """In Triton's interpreter, float32; see `interpret`."""
    pytest.importorskip("liger_kernel")
    run = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/models'}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for line in ("9 Qwen3RMSNorm -> LigerRMSNorm", "2 Qwen3MLP -> LigerSwiGLUMLP", "modeling_qwen3.apply_rotary_pos_emb -> liger_rot"):
        assert f"swapped {line}" in run.stdout
    worst = json.loads(run.stdout.splitlines()[-1])
    assert worst.keys() == {"rms_norm", "swiglu", "rope"} and max(worst.values()) < 1e-5 and worst["swiglu"] > 0


def interpret():
    """{operation: largest relative error of log-probs and gradient}. The interpreter lacks two things that the kernels use: operations of
    Python numbers with tensors, and the device's rsqrt.
    """
    import numpy
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    known = interpreter._implicit_cvt

    def convert(x):
        if type(x) is not float:
            return known(x)
        return tl.core.tensor(interpreter.TensorHandle(numpy.array([x], numpy.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt, sys.modules[rms_norm.__name__].rsqrt = convert, lambda x: 1 / tl.sqrt(x)
    with tempfile.TemporaryDirectory() as folder:
        write("qwen3", folder)
        expected, worst = step(ours(folder)), {}
        for name in ("rms_norm", "swiglu", "rope"):  # rope last: it stays
            got = step(ours(folder, kernels=[name]))
            worst[name] = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, expected))
    print(json.dumps(worst))


if __name__ == "__main__":
    interpret()
