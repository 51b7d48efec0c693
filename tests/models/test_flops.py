"""What a model costs, against published figures and against a count of what is really multiplied."""

import pytest
import torch
from families import write
from test_logprobs import ours, rows
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from models import flops, load, logprobs, sharding
from train import loop
from train.config import Fsdp, Lora, Model

QWEN = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
SMALL = Qwen3Config(
    **QWEN, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, tie_word_embeddings=True
)
QWEN_8B = Qwen3Config(
    **QWEN, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, tie_word_embeddings=False
)
LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
)


PUBLISHED = [
    (SMALL, 4096, True, 4.99),
    (SMALL, 16384, True, 9.21),
    (QWEN_8B, 4096, True, 49.0),
    (LLAMA_8B, 8192, True, 51.5),
    (LLAMA_8B, 4096, False, 33.2),
    (SMALL, 4096, False, 3.79),
]


@pytest.mark.parametrize("config, length, trained, published", PUBLISHED)
def test_published_figures(config, length, trained, published):
    """GFLOP a token, causal, of one row, of a model that is trained whole or frozen (4 for each weight, as under LoRA)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).requires_grad_(trained)
    mask = torch.ones(1, length, dtype=torch.bool)
    found = flops.Work(model).of({"attention_mask": mask, "loss_mask": mask})
    assert found["flops"] / length / 1e9 == pytest.approx(published, rel=0.003)
    heads = 6 * config.num_hidden_layers * config.num_attention_heads * 128 * length**2
    assert found["flops_noncausal"] - found["flops"] == pytest.approx(heads)


@pytest.mark.parametrize("name, adapters", [("llama", None), ("qwen3_moe", None), ("llama", Lora(r=4))])
def test_what_is_really_multiplied(name, adapters, tmp_path):
    """torch's own count of a step's products, attention's apart; under adapters nothing needs the first layer's input's gradient."""
    write(name, tmp_path)
    model = load.build(Model(str(tmp_path), dtype="float32", logprobs="eager"), tmp_path, Fsdp(), sharding.start_ranks(60), 0, adapters)
    batch = rows([9, 3, 14])
    with FlopCounterMode(display=False) as counter:
        logprobs.token_logps(model, batch)["logps"].sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    work = flops.Work(model)
    expected = work.token * 26 + work.scored * int(batch["loss_mask"].sum())
    if name == "qwen3_moe":  # torch does not count grouped products: 2 layers, 26 tokens, 2 experts of 32 x 32 and 16 x 32
        expected -= 6 * 2 * 26 * 2 * (32 * 32 + 16 * 32)
    if adapters:
        first = model.model.layers[0].self_attn
        expected -= 2 * 26 * sum(p.numel() for n, p in first.named_parameters() if n[0] in "qkv" and "lora_B" not in n)
    assert counted == pytest.approx(expected, rel=1e-6)


def test_windows_and_masks():
    """Rows of 3 and 10 with a window of 4: 9 + 4 * 16 pairs; a look-up is free; the head works for scored tokens alone."""
    assert flops.pairs(torch.tensor([3.0, 10.0]), None) == 109
    assert flops.pairs(torch.tensor([3.0, 10.0]), 4) == 9 + 4 * 16


def test_speeds(one_rank):
    totals = {"all_tokens": 100.0, "trained_tokens": 40.0, "flops": 30.0, "flops_noncausal": 50.0}
    assert loop.speeds(totals, 2.0, 0.5, torch.device("cpu"), 100.0) == {
        "step_time": 2.0,
        "data_time": 0.5,
        "data_time_share": 0.25,
        "tokens_per_second": 50.0,
        "loss_tokens_per_second": 20.0,
        "mfu": 0.15,
        "mfu_noncausal": 0.25,
    }
    assert flops.peak(torch.device("cpu"), torch.bfloat16) is None


def test_totals_have_the_steps_flops(tmp_path, one_rank):
    """Placeholders weigh nothing."""
    from algorithms import sft

    write("llama", tmp_path)
    work, batch = flops.Work(ours(tmp_path)), rows([9, 3])
    totals = loop.total_counts(sft, [batch, batch, batch | {"placeholder": torch.tensor(True)}], False, work)
    assert totals["flops"] == pytest.approx(2 * work.of(batch)["flops"]) and totals["flops"] < totals["flops_noncausal"]
