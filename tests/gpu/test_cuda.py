"""What only a CUDA device can show: the packed kernel, 16-bit log-probs, a whole run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import write

from models import attention, load, logprobs, sharding
from train.config import Fsdp, Model

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("key_heads", [1, 2, 8])
@pytest.mark.parametrize("window", [None, 16])
def test_varlen_equals_row_by_row(key_heads, window):
    lengths = [5, 130, 64, 1, 300]
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, h, sum(lengths), 64, device="cuda", generator=g) for h in (8, key_heads, key_heads))
    upstream = torch.randn(1, sum(lengths), 8, 64, device="cuda", generator=g)
    rows = {"rows": attention.Rows(lengths).to("cuda"), "sliding_window": window}
    results = []
    for function, dtype in ((attention.sdpa, torch.float32), (attention.varlen, torch.bfloat16)):
        inputs = [t.to(dtype).detach().requires_grad_() for t in (q, k, v)]
        out, _ = function(None, *inputs, None, scaling=0.125, **rows)
        out.backward(upstream.to(dtype))
        results.append([out, *(t.grad for t in inputs)])
    for a, b in zip(*results):
        assert a.shape == b.shape and relative(b, a) < 1e-2


def test_log_probs_in_bfloat16_lose_nothing_but_the_inputs_rounding(tmp_path):
    """The head's product leaves the matrix unit in float32: against float64 on the same 16-bit inputs the error is float32's."""
    g = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 256, device="cuda", generator=g).bfloat16().requires_grad_() for n in (300, 5000))
    labels = torch.randint(5000, (300,), device="cuda", generator=g)
    out = logprobs.chunked(hidden, weight, None, labels, (1.0, None, 1.0), ("entropy",))["logps"]
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert out.dtype == torch.float32 and (out - exact).abs().max() < 1e-4
    upstream = torch.linspace(-1, 2, 300, device="cuda")
    got = torch.autograd.grad((out * upstream).sum(), (hidden, weight))
    expected = torch.autograd.grad((exact * upstream).sum(), (hidden, weight))
    assert all(relative(a, b) < 1e-2 for a, b in zip(got, expected))


def test_packed_bfloat16_equals_float32(tmp_path):
    write("qwen3", tmp_path)
    device, results = sharding.start_ranks(60), []
    real = torch.arange(40) < torch.tensor([40, 7, 23])[:, None]
    ids = torch.randint(3, 61, real.shape, generator=torch.Generator().manual_seed(0)) * real
    batch = {"input_ids": ids, "attention_mask": real, "loss_mask": real & (torch.arange(40) > 0)}
    for settings in ({"dtype": "float32"}, {"dtype": "bfloat16", "attn_implementation": "varlen"}):
        model = load.build(Model(str(tmp_path), **settings), tmp_path, Fsdp(), device, seed=0)
        logps = logprobs.token_logps(model, batch)["logps"]
        logps.sum().backward()
        results.append((logps, torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])))
    assert relative(results[1][0], results[0][0]) < 2e-2 and relative(results[1][1], results[0][1]) < 5e-2


def test_the_embedded_default_learns(tmp_path):
    command = [sys.executable, str(ROOT / "launch/train.py"), "--output_dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    assert "packed_varlen attention" in run.stdout
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["eval/exact_match"] > 0.9
