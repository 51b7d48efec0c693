"""The seam, against transformers' own padded pass, plain autograd and hand-worked values.

Run as a script under TRITON_INTERPRET=1, this file compares the head's kernels with the plain functions whose place they take on a GPU.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, write
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM

from models import load, logprobs, sharding
from train.config import Fsdp, Model


def rows(lengths, vocabulary=61, seed=0):
    """A right-padded batch of random rows, scored from a third of each row on."""
    g = torch.Generator().manual_seed(seed)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (R, T)
    loss = real & (torch.arange(max(lengths)) >= torch.tensor([max(1, n // 3) for n in lengths])[:, None])
    ids = torch.randint(3, vocabulary, real.shape, generator=g) * real
    return {"input_ids": ids, "attention_mask": real, "loss_mask": loss}


def ours(folder, **settings):
    device = sharding.start_ranks(60)
    return load.build(Model(str(folder), **{"dtype": "float32"} | settings), folder, Fsdp(), device, seed=0)


def extreme_logits(vocabulary):
    """(Logits (m, V), labels (m,)): random ones, labels at both ends; ties; what overflows, cancels or is certain."""
    g = torch.Generator().manual_seed(2)
    z = 3 * torch.randn(12, vocabulary, generator=g)
    labels = torch.randint(vocabulary, (12,), generator=g)
    last, early, late = vocabulary - 1, vocabulary // 4, vocabulary - 2
    labels[0], labels[1] = 0, last
    for row, label in ((2, early), (3, late)):  # the likeliest twice, far apart: the first is the likeliest
        z[row, [early, late]], labels[row] = 50.0, label
    for row, label, level in ((4, 0, 0.0), (5, last, 300.0), (6, 1, -300.0)):
        z[row], labels[row] = level, label
    z[7], z[8] = z[7] + 1e4, z[8] - 1e4
    for row, label in ((9, last), (10, 0)):  # certain, of the label and of another
        z[row, last], labels[row] = 1e4, label
    z[11] = z[11].sort().values  # each block has a new likeliest
    return z, labels


def check_head_kernels(device, block, vocabulary):
    """`head_kernels` against `logprobs` in float64 on the CPU, to what float32 leaves of a row's largest logit."""
    from models import head_kernels

    head_kernels.BLOCK, (z, labels) = block, extreme_logits(vocabulary)
    near = 1e-5 + 1e-6 * z.abs().amax(-1)  # (m,)
    names = ("lse", "logps", "entropy", "is_top1", "mean_logits", "log_sum_sq")
    exact = z.double()
    expected, plain = {name: torch.empty_like(exact[:, 0]) for name in names}, torch.empty_like(exact)
    logprobs.read(exact, labels, expected, plain)
    assert expected["is_top1"].tolist()[2:6] == [1, 0, 1, 0] and expected["is_top1"][9:11].tolist() == [1, 0]
    moved, places = z.to(device), labels.to(device)
    for wanted, dtype in ((names, torch.float32), (names, torch.bfloat16), (names, None), (names[:2], None), (names[:4], torch.float32)):
        out = {name: torch.full((len(z),), torch.nan, device=device) for name in wanted}
        rest = None if dtype is None else torch.full(z.shape, torch.nan, dtype=dtype, device=device)
        head_kernels.read(moved, places, out, rest)
        for name, value in out.items():
            assert ((value.cpu() - expected[name]).abs() <= near).all(), name
        if dtype:
            rounding = 2**-7 if dtype == torch.bfloat16 else 0  # the interpreter cuts off what a device rounds
            assert ((rest.cpu().float() - plain).abs() <= near[:, None] + rounding * plain.abs()).all()
    assert torch.equal(moved.cpu(), z)
    lse, entropy = (expected[name].float() for name in ("lse", "entropy"))
    grad, of_entropy = torch.linspace(-2, 3, len(z)), torch.linspace(1, -0.5, len(z))
    for live in (None, of_entropy):
        slopes = lse, grad, entropy, live
        want = logprobs.slope(z.double(), labels, *(v if v is None else v.double() for v in slopes), (2.5, None, 0.7), torch.float64)
        for dtype in (torch.float32, torch.bfloat16):
            got = head_kernels.slope(moved, places, *(v if v is None else v.to(device) for v in slopes), 2.5 / 0.7, dtype)
            rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5
            assert got.dtype == dtype and ((got.cpu().float() - want).abs() <= 1e-5 + rounding * want.abs()).all()


def test_head_kernels_equal_the_plain_functions():
    """In Triton's interpreter; tests/gpu runs the same on a device."""
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}:{root / 'tests/models'}"}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def head(vocabulary=23, hidden=8, tokens=17, bias=True):
    g = torch.Generator().manual_seed(1)
    h, w, b = torch.randn(tokens, hidden, generator=g), torch.randn(vocabulary, hidden, generator=g), torch.randn(vocabulary, generator=g)
    return [t.requires_grad_() for t in ((h, w, b) if bias else (h, w))], torch.randint(vocabulary, (tokens,), generator=g)


def test_by_hand():
    """Logits (ln 2, 0, 0) give probabilities 1/2, 1/4, 1/4: log-prob ln 1/2, entropy 1.5 ln 2, and the target is the likeliest."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[math.log(2)], [0.0], [0.0]])
    for implementation in (logprobs.eager, logprobs.chunked):
        out = implementation(hidden, weight, None, torch.tensor([0]), (1.0, None, 1.0), ("entropy", "is_top1"))
        assert out["logps"].item() == pytest.approx(math.log(0.5), abs=1e-6)
        assert out["entropy"].item() == pytest.approx(1.5 * math.log(2), abs=1e-6)
        assert out["is_top1"].item() == 1


@pytest.mark.parametrize("transform", [(1.0, None, 1.0), (0.3, None, 1.0), (1.0, 2.0, 1.0), (2.5, 3.0, 0.7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens, kept", [(5, 0), (17, 0), (5, 2**20)])
@pytest.mark.parametrize("live", ["live_entropy", "entropy"])
def test_chunked_equals_eager(transform, bias, tokens, kept, live, monkeypatch):
    """Values and gradients, in several slices and in one, made again or kept, under upstream gradients that differ between tokens."""
    monkeypatch.setattr(logprobs, "SLICE", {"cpu": 23 * tokens})
    monkeypatch.setattr(logprobs, "KEPT", {"cpu": kept})
    upstream, results = torch.linspace(-2, 3, 17), []
    for implementation in (logprobs.eager, logprobs.chunked):
        inputs, labels = head(bias=bias)
        hidden, weight, *rest = inputs
        out = implementation(hidden, weight, rest[0] if rest else None, labels, transform, tuple({"entropy", live, "is_top1"}))
        (out["logps"] * upstream + out[live] * upstream.flip(0).square()).sum().backward()
        assert not out["entropy"].requires_grad and torch.allclose(out["entropy"], out[live])
        results.append([*(out[name] for name in ("logps", "entropy", live, "is_top1")), *(t.grad for t in inputs)])
    for a, b in zip(*results):
        assert (a - b).norm() <= 2e-6 * b.norm()


def test_chunked_gradient_is_the_derivative(monkeypatch):
    monkeypatch.setattr(logprobs, "SLICE", {"cpu": 23 * 4})
    (hidden, weight, bias), labels = head(tokens=6)
    double = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]

    def logps(h, w, b):
        z = 3.0 * torch.tanh((h @ w.t() + b) * 2.5 / 3.0) / 0.7
        return z.log_softmax(-1).gather(-1, labels[:, None])[:, 0]

    upstream = torch.linspace(-1, 2, 6).double()
    expected = torch.autograd.grad((logps(*double) * upstream).sum(), double)
    out = logprobs.chunked(hidden, weight, bias, labels, (2.5, 3.0, 0.7), ())["logps"]
    got = torch.autograd.grad((out * upstream.float()).sum(), (hidden, weight, bias))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_padded(name, tmp_path):
    """Log-probs of rows packed end to end, and their gradient, equal those of transformers' own padded forward pass."""
    write(name, tmp_path)
    batch = rows([9, 3, 14, 6, 1])
    model = ours(tmp_path)
    out = {name: t.cpu() for name, t in logprobs.token_logps(model, batch, ("entropy", "is_top1")).items()}  # (R, T) each
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    plain.to(device := model.lm_head.weight.device)  # the same arithmetic on both sides
    inputs = {"input_ids": batch["input_ids"].to(device), "attention_mask": batch["attention_mask"].long().to(device)}
    scores = plain(**inputs).logits.log_softmax(-1)[:, :-1].cpu()
    mask = batch["loss_mask"][:, 1:]
    expected = scores.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * mask
    torch.testing.assert_close(out["logps"][:, 1:], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["entropy"][:, 1:], -(scores.exp() * scores).sum(-1) * mask, rtol=1e-4, atol=1e-4)
    assert (out["logps"][:, 0] == 0).all() and (out["is_top1"][:, 1:] == (scores.argmax(-1) == batch["input_ids"][:, 1:]) * mask).all()
    upstream = torch.linspace(-1, 2, out["logps"].numel()).view_as(out["logps"])
    (out["logps"] * upstream).sum().backward()
    (expected * upstream[:, 1:]).sum().backward()
    ours_norm = get_total_norm([p.grad for p in model.parameters()]).full_tensor().cpu()
    torch.testing.assert_close(ours_norm, get_total_norm([p.grad for p in plain.parameters()]).cpu(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("settings", [{}, {"logprobs": "eager"}, {"dtype": "bfloat16"}])
def test_rows_cannot_see_each_other(settings, tmp_path):
    write("llama", tmp_path)
    model = ours(tmp_path, **settings)
    batch, other = rows([9, 3, 14]), rows([9, 3, 14], seed=1)
    mixed = batch | {"input_ids": torch.cat([other["input_ids"][:1], batch["input_ids"][1:2], other["input_ids"][2:]])}
    a, b = (logprobs.token_logps(model, x)["logps"] for x in (batch, mixed))
    assert torch.equal(a[1], b[1]) and not torch.equal(a[0], b[0])
    assert a.dtype == torch.float32


def test_score_mask_widens_what_is_scored(tmp_path):
    write("llama", tmp_path)
    model, batch = ours(tmp_path), rows([9, 5])
    wide = batch | {"score_mask": batch["attention_mask"] & (torch.arange(9) > 0)}
    a, b = (logprobs.token_logps(model, x)["logps"].cpu() for x in (batch, wide))
    assert torch.equal(a, b * batch["loss_mask"]) and (b[:, 1:] != 0).sum() == 12


def test_a_batch_without_targets_has_a_backward_pass(tmp_path):
    write("llama", tmp_path)
    model, batch = ours(tmp_path), rows([9])
    out = logprobs.token_logps(model, batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])}, ("entropy",))
    out["logps"].sum().backward()
    assert all(p.grad is not None and not p.grad.to_local().any() for p in model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the kernel")
def test_attention_that_would_be_wrong_is_refused(tmp_path):
    with pytest.raises(ValueError, match="varlen needs a GPU"):
        write("llama", tmp_path)
        ours(tmp_path, attn_implementation="varlen")


if __name__ == "__main__":
    for vocabulary in (5, 16, 37):  # less than a block, one, and two and a part
        check_head_kernels("cpu", 16, vocabulary)
