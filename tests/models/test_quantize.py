"""NF4 layers against bitsandbytes' own: values, gradients and memory of the backward pass; a whole model against transformers'."""

import bitsandbytes as bnb
import pytest
import torch
from families import write
from test_logprobs import rows
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from models import load, logprobs, quantize, sharding
from train.config import Fsdp, Model

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [128, 36])  # 36: blocks of 64 reach across rows
def test_layer_equals_that_of_bitsandbytes(inputs, bias, dtype):
    """The same bytes, outputs and gradients, under an upstream gradient that differs from number to number."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, 24, bias=bias, dtype=dtype)
    theirs = bnb.nn.Linear4bit(inputs, 24, bias=bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu").train()
    with torch.device("meta"):
        ours = quantize.NF4Linear(nn.Linear(inputs, 24, bias=bias, dtype=dtype))
    ours.fill(linear.weight.data, linear.bias.data if bias else None, "cpu")
    assert torch.equal(ours.packed.view(torch.uint8).flatten(), theirs.weight.data.flatten())
    results = []
    for layer in (ours, theirs):
        x = torch.linspace(-1, 2, 5 * inputs, dtype=dtype).view(5, inputs).requires_grad_()
        y = layer(x)
        (y * torch.linspace(-2, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
        results.append((y, x.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5) if dtype == torch.float32 else torch.testing.assert_close(a, b)
    assert (ours.weight - linear.weight).norm() < 0.12 * linear.weight.norm()


def test_backward_keeps_the_packed_bytes_alone():
    with torch.device("meta"):
        layer = quantize.NF4Linear(nn.Linear(256, 512, bias=False))
    layer.fill(torch.randn(512, 256), None, "cpu")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        layer(torch.randn(3, 256, requires_grad=True))
    assert sum(kept) == 256 * 512 // 2


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma3_text"])
def test_model_equals_that_of_transformers(name, tmp_path):
    """Log-probs of the model that is quantised while it is loaded, and those of bitsandbytes through transformers."""
    write(name, tmp_path)
    device = sharding.start_ranks(60)
    model = load.build(Model(str(tmp_path), dtype="float32", quantization="nf4"), tmp_path, Fsdp(), device, seed=0)
    batch = rows([14])
    with torch.no_grad():
        ours = logprobs.token_logps(model, batch)["logps"].cpu()[:, 1:]  # (1, T - 1)
    four_bits = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=four_bits).train()
    plain = plain.to(device)
    scores = plain(input_ids=batch["input_ids"].to(device)).logits.float().log_softmax(-1)[:, :-1].cpu()
    expected = scores.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * batch["loss_mask"][:, 1:]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    unquantised = load.build(Model(str(tmp_path), dtype="float32"), tmp_path, Fsdp(), device, seed=0)
    with torch.no_grad():
        whole = logprobs.token_logps(unquantised, batch)["logps"].cpu()[:, 1:]
    assert (whole - ours).abs().max() > 1e-3


def test_inputs_that_do_not_pack_are_refused():
    with torch.device("meta"), pytest.raises(ValueError, match=r"^model\.quantization: a linear layer of 30 inputs does not pack"):
        quantize.NF4Linear(nn.Linear(30, 8))
