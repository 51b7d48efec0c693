"""What only a CUDA device can show: the packed kernel, 16-bit log-probs, the head's kernels, recorded steps, a whole run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import write
from test_logprobs import check_head_kernels, rows
from transformers import Qwen3Config

from algorithms import sft
from models import attention, load, logprobs, sharding
from train import dry_run, loop, optim
from train.config import Config, Data, Fsdp, Model, Train

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
    packed = {"rows": attention.Rows(lengths).to("cuda"), "sliding_window": window}
    results = []
    for function, dtype in ((attention.sdpa, torch.float32), (attention.varlen, torch.bfloat16)):
        inputs = [t.to(dtype).detach().requires_grad_() for t in (q, k, v)]
        out, _ = function(None, *inputs, None, scaling=0.125, **packed)
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


@pytest.mark.parametrize("block, vocabulary", [(16, 37), (4096, 5), (4096, 5000)])
def test_head_kernels_equal_the_plain_functions(block, vocabulary, monkeypatch):
    from models import head_kernels

    monkeypatch.setattr(head_kernels, "BLOCK", block)  # put back after the test
    check_head_kernels("cuda", block, vocabulary)


@pytest.mark.parametrize("transform", [(2.5, None, 0.7), (2.5, 3.0, 0.7)])
@pytest.mark.parametrize("live", ["live_entropy", "entropy"])
@pytest.mark.parametrize("kept", [0, 2**32])
def test_chunked_equals_eager(transform, live, kept, monkeypatch):
    """Values and gradients by the head's kernels, in slices of 64 targets and a part of one."""
    monkeypatch.setattr(logprobs, "SLICE", {"cuda": 64 * 5000})
    monkeypatch.setattr(logprobs, "KEPT", {"cuda": kept})
    g, results = torch.Generator("cuda").manual_seed(0), []
    hidden, weight = (0.3 * torch.randn(n, 64, device="cuda", generator=g) for n in (300, 5000))
    labels, upstream = torch.randint(5000, (300,), device="cuda", generator=g), torch.linspace(-2, 3, 300, device="cuda")
    for implementation in (logprobs.eager, logprobs.chunked):
        inputs = [t.clone().requires_grad_() for t in (hidden, weight)]
        out = implementation(*inputs, None, labels, transform, tuple({"entropy", live, "is_top1"}))
        (out["logps"] * upstream + out[live] * upstream.flip(0)).sum().backward()
        results.append([out["is_top1"], *(out[name].detach() for name in ("logps", "entropy", live)), *(t.grad for t in inputs)])
    assert torch.equal(*(found.pop(0) for found in results))
    assert all(relative(b, a) < 1e-5 for a, b in zip(*results))


def test_recorded_steps_are_the_steps(tmp_path):
    """Two sizes of micro-batches by turns, with weights that change: what an earlier one left in a graph's memory changes nothing."""
    write("qwen3", tmp_path, head_dim=64)
    device = sharding.start_ranks(60)
    plain, recorded = (
        load.build(
            Model(str(tmp_path), dtype="bfloat16", cuda_graphs=graphs),
            *(tmp_path, Fsdp(reshard_after_forward=not graphs), device, 0),
            budget=512,
        )
        for graphs in (False, True)
    )
    small, large, other = (rows(lengths, seed=sum(lengths)) for lengths in ([40, 7, 23], [100, 60, 9], [50, 30, 12]))
    for micro_batches in ([small, large], [large, other], [small]):
        totals, results = loop.total_counts(sft, micro_batches, False), []
        for model in (plain, recorded):
            model.zero_grad()
            sums = loop.accumulate(model, sft, sft.Config(), micro_batches, totals, device, backward=True)
            gradient = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
            with torch.no_grad():
                held_out = loop.accumulate(model, sft, sft.Config(), micro_batches, totals, device, backward=False)
            results.append([sums["loss"], sums["entropy"], gradient, held_out["loss"]])
        for a, b in zip(*results, strict=True):
            assert b.isfinite().all() and relative(b, a) < 2e-2
        recorded.replica.begin(training=True)
        for batch in micro_batches:
            scored = [logprobs.token_logps(m, batch)["logps"] for m in (plain, recorded.replica.twin)]
            assert scored[1].requires_grad and relative(scored[1], scored[0]) < 2e-2
            sum(logps.sum() for logps in scored).backward()
        for p in (*plain.parameters(), *recorded.parameters()):
            p.data.to_local().mul_(1.05)
    assert len(recorded.replica.twin.score.__self__.recorded) == 4, "of each size one with byproducts, one without"


def test_recording_leaves_no_gradient(tmp_path):
    """A pack much longer than its rows, in memory full of NaN: what no kernel writes would be in the sums."""
    write("qwen3", tmp_path, head_dim=64)
    model = load.build(
        Model(str(tmp_path), dtype="bfloat16", cuda_graphs=True),
        *(tmp_path, Fsdp(reshard_after_forward=False), sharding.start_ranks(60), 0),
        budget=1024,
    )
    torch.full((2**28,), float("nan"), device="cuda")  # freed at once, and given out again as it is
    model.replica.begin(training=True)
    logps = logprobs.token_logps(model.replica.twin, rows([100, 200, 250, 230, 200]))["logps"]
    assert logps.isfinite().all()
    assert all((total == 0).all() for total in model.replica.sums.values())


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


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_the_dry_run_knows_the_peak(kind, reshard, tmp_path):
    """Of a model of 0.2 billion weights over two micro-batches of 8192 tokens, to 10 %, once what CUDA's libraries take is there."""
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32768, "tie_word_embeddings": True}
    shape = Qwen3Config(hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, **heads)
    shape.architectures = ["Qwen3ForCausalLM"]
    shape.save_pretrained(tmp_path)
    fsdp, known = Fsdp(activation_checkpointing=kind, reshard_after_forward=reshard), Model(str(tmp_path), from_scratch=True)
    cfg = Config("runs/x", known, Data("builtin:letters"), fsdp=fsdp, train=Train(micro_batch_tokens=8192))
    ids = torch.randint(32768, (4, 2048))
    batch = {"input_ids": ids, "attention_mask": ids >= 0, "loss_mask": (torch.arange(2048) > 0).expand_as(ids)}
    estimate = dry_run.memory(cfg, dry_run.outline(cfg, shape, "cuda"), 1, int(batch["loss_mask"].sum()), True).peak
    device = sharding.start_ranks(60)
    before = torch.cuda.memory_allocated()
    model = load.build(known, tmp_path, fsdp, device, 0, None, 8192)
    optimizer = optim.make_optimizer(model, cfg.train)
    for step in range(2):
        if step:
            torch.cuda.reset_peak_memory_stats()
        totals = loop.total_counts(sft, [batch, batch], False)
        optimizer.zero_grad()
        loop.accumulate(model, sft, sft.Config(), [batch, batch], totals, device, backward=True)
        optimizer.step()
    measured = torch.cuda.max_memory_allocated() - before
    print(kind, reshard, estimate / measured)
    assert abs(estimate / measured - 1) < 0.1, (estimate / 2**30, measured / 2**30)
