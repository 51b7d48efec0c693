"""Checkpointing, compilation, attention and kernels of the decoder layers: whatever is chosen, loss and gradient are eager's.

Run as a script under TRITON_INTERPRET=1, this file compares Liger's kernels with the family's own operations.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import write
from test_logprobs import rows
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from models import attention, dropout, generate, kernels, load, logprobs, lora, replica, sharding
from train import toy
from train.config import Config, Data, Fsdp, Lora, Model

LENGTHS = ([9, 3, 14, 6, 1], [5, 20, 3], [11, 3], [2, 3], [12, 9, 33, 1, 1, 1])
ROOT = Path(__file__).resolve().parents[2]


def ours(folder, checkpointing="none", adapters=None, weights="sharded", **settings):
    """weights: sharded, whole (a replica), or recorded (a replica's CUDA graphs)."""
    device = sharding.start_ranks(60)
    fsdp = Fsdp(activation_checkpointing=checkpointing, reshard_after_forward=weights == "sharded")
    known = Model(str(folder), **{"dtype": "float32", "cuda_graphs": weights == "recorded"} | settings)
    model = load.build(known, folder, fsdp, device, seed=0, adapters=adapters, budget=512)
    stream = torch.Generator().manual_seed(1)
    for p in lora.trained(model).values() if adapters else ():
        p.data.to_local().copy_(0.1 * torch.randn(p.shape, generator=stream))
    return model


def step(model, lengths=LENGTHS[0]):
    """Log-probs and the gradient of all that is trained, under an upstream gradient that differs from token to token."""
    model.zero_grad()
    batch = rows(lengths) | {"row_keys": dropout.row_keys(42, 5, torch.arange(len(lengths)))}
    if model.replica:
        model.replica.begin(training=True)
    out = logprobs.token_logps(model.replica.twin if model.replica else model, batch)["logps"]
    (out * torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out)).sum().backward()
    if model.replica:
        model.replica.end()
    return out.detach().cpu(), torch.cat([sharding.whole(p.grad).flatten().cpu() for p in model.parameters() if p.requires_grad])


def assert_close(got, expected, tolerance):
    for a, b in zip(got, expected):
        assert b.norm() > 0 and (a - b).norm() <= tolerance * b.norm()


CUDA = torch.device("cuda", 0) if torch.cuda.is_available() else None
RECORDS = ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4")  # what CUDA graphs can hold
COMBINATIONS = [
    (weights, attend, checkpointing, compiled, implementation, dtype)
    for weights in ("sharded", "whole", "recorded")
    for dtype in ("float32", "bfloat16")
    for attend in ([name for name in attention.KERNELS if not attention.lacks(name, CUDA, getattr(torch, dtype))] if CUDA else ["auto"])
    for checkpointing in ("none", "selective", "full", "offload")
    for compiled in (False, True)
    for implementation in ("chunked", "eager")
    # compiling takes seconds: of what is alike, one
    if not compiled or (checkpointing, implementation, dtype) in (("none", "chunked", "float32"), ("full", "eager", "bfloat16"))
    if weights != "recorded" or (attend in RECORDS and checkpointing != "offload")
]


@pytest.mark.parametrize("weights, attend, checkpointing, compiled, implementation, dtype", COMBINATIONS)
def test_every_combination_is_the_eager_step(weights, attend, checkpointing, compiled, implementation, dtype, tmp_path):
    """Without compiling the same bits; on a GPU, with every attention that there is, and with recorded steps."""
    write("qwen3", tmp_path, head_dim=64)  # which all attention can
    expected = step(ours(tmp_path, dtype=dtype, logprobs="eager", attn_implementation="sdpa"))
    settings = {"dtype": dtype, "logprobs": implementation, "attn_implementation": attend}
    model = ours(tmp_path, checkpointing, weights=weights, compile=compiled, **settings)
    got = step(model)
    assert_close(got, expected, 1e-5 if dtype == "float32" else 2e-2)
    if not compiled and not CUDA:
        assert all(map(torch.equal, got, step(ours(tmp_path, **settings))))
    if weights == "recorded":
        assert len(model.replica.twin.score.__self__.recorded) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family, adapters",
    [
        ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
        ("llama", {"modules_to_save": ["lm_head"], "lora_dropout": 0.3}),
        ("gemma3_text", {"use_dora": True}),
        ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    ],
)
def test_adapters_on_whole_weights_are_the_same(family, adapters, dtype, tmp_path):
    """To the bit; what is frozen is not copied; in evaluation nothing is dropped."""
    write(family, tmp_path)
    settings = {"adapters": Lora(r=4, **adapters), "dtype": dtype, "attn_implementation": "sdpa"}
    sharded, whole = (ours(tmp_path, weights=weights, **settings) for weights in ("sharded", "whole"))
    assert all(map(torch.equal, step(whole), step(sharded)))
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in whole.parameters() if p.requires_grad)
    for name, p in whole.named_parameters():
        assert p.requires_grad != (p.to_local().data_ptr() == whole.replica.names[name].data_ptr())
    batch = rows(LENGTHS[1]) | {"row_keys": dropout.row_keys(42, 5, torch.arange(3))}
    whole.replica.begin(training=False)
    with torch.no_grad():
        scored = [logprobs.token_logps(model, batch)["logps"] for model in (whole.replica.twin, sharded.eval())]
    assert torch.equal(*scored)


def test_four_bits_have_no_replica(tmp_path):
    write("llama", tmp_path)
    assert ours(tmp_path, adapters=Lora(r=4), weights="whole", quantization="nf4").replica is None


def test_what_is_recorded_has_rows_as_long_as_those_to_come():
    """However a pack is filled up, its rows are no longer than `longest`, so kernels write all of a recorded one too."""
    stream = random.Random(0)
    for _ in range(200):
        n = 64 * stream.randint(1, 64)
        filled, lengths = 0, []
        while filled < n:
            lengths.append(min(n - filled, stream.randint(1, stream.choice([8, 200, 4096]))))
            filled += lengths[-1]
        longest, size = min(n, replica.power(max(lengths))), replica.power(len(lengths))
        bounds = replica.even(n, longest, size)
        steps = [b - a for a, b in pairwise(bounds)]
        assert len(steps) == size and sum(steps) == n and min(steps) >= 0 and max(steps) == min(n, longest)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_is_one_function_with_and_without_a_replica(recipe, tmp_path, monkeypatch):
    """Emulated: near the plain products; what scores a reference is what is trained; any number of tokens, as padding makes it 16s."""
    write("llama", tmp_path, hidden_size=64, intermediate_size=96)
    plain = step(ours(tmp_path))
    monkeypatch.setattr(kernels, "to_float8", partial(kernels.to_float8, emulate=True))
    sharded, whole = (ours(tmp_path, weights=weights, float8=recipe) for weights in ("sharded", "whole"))
    eighths = [m for m in whole.replica.twin.modules() if type(m).__name__ == "Float8Linear"]
    assert len(eighths) == 2 * 7 and all(m.config.pad_inner_dim for m in eighths)
    got = step(sharded)
    assert all(map(torch.equal, got, step(whole)))
    for a, b in zip(got, plain):
        assert 1e-4 < (a - b).norm() / b.norm() < 0.3
    with torch.no_grad():
        batch = rows(LENGTHS[0])
        scored = [logprobs.token_logps(model, batch)["logps"] for model in (whole, whole.replica.twin, sharded)]
    assert torch.equal(scored[0], scored[1]) and torch.equal(scored[0], scored[2])


GRAPHS = {"cuda_graphs": True}
REFUSED = [  # settings of `model`, of `fsdp`, and what is said
    (
        {"compile": True},
        {"activation_checkpointing": "selective"},
        r"^fsdp.activation_checkpointing: got 'selective', expected none, full or offload where model",
    ),
    ({"compile": True, "kernels": ["rope"]}, {}, r"^model.kernels: got \['rope'\], expected nothing with model.compile"),
    ({"attn_implementation": "varlen"}, {}, r"^model.attn_implementation: varlen needs a GPU of compute capability 8.0 or later and"),
    ({"attn_implementation": "flex"}, {}, r"flex needs a GPU of compute capability 8.0 or later, got cpu and float32; `sdpa` runs"),
    ({"attn_implementation": "flash_attention_2"}, {}, "flash_attention_2 needs the package flash_attn.flash_attn_interface: pip "),
    ({"attn_implementation": "flash_attention_3"}, {}, "flash_attention_3 needs the package flash_attn_interface: "),
    ({"attn_implementation": "flash_attention_4"}, {}, "flash_attention_4 needs the package flash_attn.cute: pip install --pre flash-"),
    ({"float8": "rowwise"}, {}, "model.float8: rowwise needs a GPU of compute capability 8.9 or later; leave it out"),
    ({"kernels": ["swiglu"]}, {}, "model.kernels: Liger's kernels need a GPU"),
    (GRAPHS, {}, "^model.cuda_graphs: got true, expected false where weights do not stay whole on a GPU; there is none on a CPU"),
    (GRAPHS, {"reshard_after_forward": False}, "^model.cuda_graphs: got true, .* there is none on a CPU"),
    (GRAPHS, {"reshard_after_forward": True}, "^fsdp.reshard_after_forward: got True, expected false or auto with model.cuda_graphs"),
    (
        GRAPHS,
        {"activation_checkpointing": "offload"},
        "^fsdp.activation_checkpointing: got 'offload', expected none, selective or full with",
    ),
    (
        GRAPHS | {"attn_implementation": "sdpa"},
        {},
        "^model.attn_implementation: got 'sdpa', expected auto, varlen or flash_attention_2 to 4",
    ),
    (
        GRAPHS | {"attn_implementation": "flex"},
        {},
        "^model.attn_implementation: got 'flex', expected auto, varlen or flash_attention_2 to 4",
    ),
    (GRAPHS | {"quantization": "nf4"}, {}, "^model.quantization: got 'nf4', expected null with model.cuda_graphs"),
    (GRAPHS | {"float8": "rowwise"}, {}, "^model.float8: got 'rowwise', expected null with model.cuda_graphs"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the kernels")
@pytest.mark.parametrize("settings, fsdp, message", REFUSED)
def test_every_other_combination_is_refused(settings, fsdp, message, tmp_path):
    write("llama", tmp_path)
    adapters = Lora(r=4) if "quantization" in settings else Lora()
    with pytest.raises(ValueError, match=message) as error:
        config = Config("r", Model(str(tmp_path), **settings), Data("d"), fsdp=Fsdp(**fsdp), lora=adapters)
        load.build(config.model, tmp_path, config.fsdp, sharding.start_ranks(60), 0, budget=512)
    assert "\n" not in str(error.value)


def test_graphs_are_refused_where_auto_attention_goes_row_by_row(tmp_path):
    """As in float32 on any GPU: the recorded rows would be those of the first micro-batch."""
    write("llama", tmp_path)
    model = ours(tmp_path)
    assert model.config._attn_implementation == "packed_sdpa"
    asked = Model(str(tmp_path), cuda_graphs=True), Fsdp(reshard_after_forward=False), model, torch.float32, "cuda", 80 * 2**30
    with pytest.raises(ValueError, match=r"^model.cuda_graphs: got true, expected false with packed_sdpa attention, all that this GPU has"):
        replica.wanted(*asked)
    model.config._attn_implementation = "packed_varlen"
    assert replica.wanted(*asked)


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


ALL = ("flash_attn_interface", "flash_attn.cute", "flash_attn.flash_attn_interface")


@pytest.mark.parametrize(
    "major, dtype, present, chosen",
    [
        (9, torch.bfloat16, ALL, "packed_fa3"),
        (9, torch.bfloat16, ALL[1:], "packed_fa4"),
        (10, torch.bfloat16, ALL, "packed_fa4"),
        (10, torch.bfloat16, ALL[2:], "packed_varlen"),
        (8, torch.bfloat16, ALL, "packed_varlen"),
        (7, torch.bfloat16, ALL, "packed_sdpa"),
        (9, torch.float32, ALL, "packed_sdpa"),
    ],
)
def test_auto_is_the_fastest_that_is_there(major, dtype, present, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(attention, "installed", lambda module: module in present)
    assert attention.choose("auto", torch.device("cuda"), dtype) == chosen


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("package", ALL)
def test_flash_is_told_what_sdpa_is_told(package, window, monkeypatch):
    """A stand-in for the packages, which need GPUs: their arguments, by name."""
    g, lengths, unset = torch.Generator().manual_seed(0), LENGTHS[0], None if package == "flash_attn.cute" else -1
    q, k, v = (torch.randn(1, heads, 33, 16, generator=g) for heads in (4, 2, 2))
    found = attention.Rows(lengths)

    def stand_in(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size):
        assert causal and max_seqlen_q == max_seqlen_k == max(lengths) and window_size == ((unset,) * 2 if window is None else (3, 0))
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        own = attention.Rows(cu_seqlens_q.diff().tolist())
        heads_first = (t.transpose(0, 1)[None] for t in (q, k, v))
        out, _ = attention.sdpa(None, *heads_first, None, rows=own, scaling=softmax_scale, sliding_window=window)
        return (out[0], None) if package == "flash_attn.cute" else out[0]

    monkeypatch.setitem(sys.modules, package, SimpleNamespace(flash_attn_varlen_func=stand_in))
    expected, got = (
        function(None, q, k, v, None, rows=found, scaling=0.3, sliding_window=window)[0]
        for function in (attention.sdpa, partial(attention.flash, package))
    )
    assert torch.equal(got, expected)


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
