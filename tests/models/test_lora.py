"""Adapters: what they are before and after training, in which names, and which settings are refused."""

import dataclasses
import json

import pytest
import torch
from families import write
from safetensors.torch import load_file, save_file
from test_logprobs import rows
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM

from models import dropout, generate, load, logprobs, lora, quantize, sharding
from train import reference, toy
from train.config import Fsdp, Lora, Model


def ours(folder, adapters, **settings):
    device = sharding.start_ranks(60)
    return load.build(Model(str(folder), **{"dtype": "float32"} | settings), folder, Fsdp(), device, 0, adapters)


@torch.no_grad()
def moved(model, by=0.1):
    """The model with adapters of random values."""
    stream = torch.Generator().manual_seed(3)
    for p in lora.trained(model).values():
        p.to_local().add_(torch.randn(p.shape, generator=stream).to(p.device) * by)
    return model


@torch.no_grad()
def logps(model, **changes):
    return logprobs.token_logps(model, rows([9, 3, 14]) | changes)["logps"].cpu()


SETTINGS = {
    "moe": Lora(r=4, target_modules=["q_proj", "o_proj"]),
    "lora": Lora(r=4, use_rslora=True),
    "dora": Lora(r=4, use_dora=True),
    "head": Lora(r=4, target_modules=["q_proj", "lm_head"]),
    "saved": Lora(r=4, modules_to_save=["lm_head", "embed_tokens"]),
    "norm": Lora(r=4, modules_to_save=["norm"]),
    "embedding": Lora(r=4, modules_to_save=["embed_tokens"]),
}


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize(
    "shape, name", [("llama", "lora"), ("qwen2", "dora"), ("llama", "head"), ("llama-tied", "saved"), ("qwen3_moe", "moe")]
)
def test_adapters_begin_as_nothing_and_can_be_switched_off(shape, name, quantization, tmp_path):
    """The first model is its base, bit by bit for a trained head that begins as a copy too; off, an adapted model is its base again."""
    write(shape, tmp_path)
    if quantization and name == "moe":
        with pytest.raises(ValueError, match=r"^model\.quantization: most weights of Qwen3MoeForCausalLM are in no linear layer"):
            ours(tmp_path, SETTINGS[name], quantization=quantization)
        return
    base = logps(ours(tmp_path, None, quantization=quantization))
    model = ours(tmp_path, SETTINGS[name], quantization=quantization)
    torch.testing.assert_close(logps(model), base, rtol=0, atol=1e-6)
    moved(model)
    assert (logps(model) - base).abs().max() > 1e-2
    with lora.adapters_off(model):
        assert torch.equal(logps(model), base)
    assert (logps(model) - base).abs().max() > 1e-2
    logprobs.token_logps(model, rows([9, 3]))["logps"].sum().backward()  # FSDP still gives gradients, to adapters alone
    assert all(p.grad is not None for p in lora.trained(model).values())
    assert {p.dtype for p in lora.trained(model).values()} == {torch.float32}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    "shape, name",
    [
        *[("llama", "lora"), ("qwen2", "dora"), ("llama", "head"), ("llama-tied", "saved"), ("qwen3_moe", "moe")],
        *[("llama-tied", "norm"), ("gemma3_text", "embedding")],
    ],
)
def test_merged_model_and_sampler_are_the_adapted_model(shape, name, tmp_path):
    write(shape, tmp_path / "base")
    model = moved(ours(tmp_path / "base", SETTINGS[name]))
    expected = logps(model)
    load.save_pretrained(model, toy.tokenizer("tiny"), tmp_path / "merged", torch.float32)
    merged = ours(tmp_path / "merged", None)
    torch.testing.assert_close(logps(merged), expected, rtol=1e-5, atol=1e-5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    assert generate.greedy(model, toy.tokenizer("tiny"), prompts, 8) == generate.greedy(merged, toy.tokenizer("tiny"), prompts, 8)


@pytest.mark.parametrize("name", ["dora", "saved"])
def test_an_adapter_is_read_back_and_another_base_is_refused(name, tmp_path):
    write("llama", tmp_path / "base")
    adapters = SETTINGS[name]
    model = moved(ours(tmp_path / "base", adapters))
    lora.save_adapter(model, toy.tokenizer("tiny"), tmp_path / "adapter")
    again = dataclasses.replace(adapters, adapter_name_or_path=str(tmp_path / "adapter"))
    assert torch.equal(logps(ours(tmp_path / "base", again)), logps(model))
    key = r"^lora\.adapter_name_or_path: .*adapter"
    write("llama", tmp_path / "other")
    with pytest.raises(ValueError, match=key + r" was made for .*base, not for .*other; if they are one model, say so"):
        ours(tmp_path / "other", again)
    write("phi3", tmp_path / "phi" / "base")
    with pytest.raises(ValueError, match=key + r" was made for other modules or a base of another shape: base_model"):
        ours(tmp_path / "phi" / "base", again)
    written = tmp_path / "adapter" / "adapter_config.json"
    for name, value, words in (
        ("alpha_pattern", {"q_proj": 3}, "with alpha_pattern"),
        ("init_lora_weights", "pissa", "changed base weights"),
    ):
        own = json.loads(written.read_text())
        written.write_text(json.dumps(own | {name: value}))
        with pytest.raises(ValueError, match=key + f".*{words}"):
            ours(tmp_path / "base", again)
        written.write_text(json.dumps(own))
    with pytest.raises(ValueError, match=r"^lora\.r: got 8, expected 4, with which .*adapter was made"):
        ours(tmp_path / "base", dataclasses.replace(again, r=8))
    with pytest.raises(ValueError, match=r"nowhere is no adapter: it has no adapter_model\.safetensors"):
        ours(tmp_path / "base", dataclasses.replace(again, adapter_name_or_path="nowhere"))


REFUSED = [
    (
        "llama",
        {"target_modules": ["query"]},
        r"lora\.target_modules: no module of LlamaForCausalLM matches \['query'\]; its linear layers are",
    ),
    (
        "llama",
        {"target_modules": ["q_proj", "v_porj"]},
        r"lora\.target_modules: no module of LlamaForCausalLM matches 'v_porj'; its linear layers are",
    ),
    ("llama", {"target_modules": ["embed_tokens"]}, r"lora\.target_modules: model\.embed_tokens is no linear layer but Embedding"),
    ("llama", {"modules_to_save": ["head"]}, r"lora\.modules_to_save: no module of LlamaForCausalLM is named head"),
    ("llama-tied", {"target_modules": ["lm_head"]}, r"lora\.target_modules: lm_head shares its weight with the embedding"),
    (
        "qwen3_moe",
        {},
        r"lora\.target_modules: adapters on the experts of Qwen3MoeForCausalLM are not supported; name others: k_proj, o_proj",
    ),
    ("llama", {"target_modules": ["lm_head"], "use_dora": True}, r"lora\.target_modules: lm_head cannot have DoRA here"),
]


@pytest.mark.parametrize("shape, settings, message", REFUSED)
def test_what_cannot_have_an_adapter(shape, settings, message, tmp_path):
    write(shape, tmp_path)
    with pytest.raises(ValueError, match="^" + message):
        ours(tmp_path, Lora(r=4, **settings))


def test_a_part_of_four_bits_cannot_be_trained_whole(tmp_path):
    write("llama", tmp_path)
    with pytest.raises(ValueError, match=r"^lora\.modules_to_save: mlp has 4-bit weights, which cannot be trained whole"):
        ours(tmp_path, Lora(r=4, target_modules=["q_proj"], modules_to_save=["mlp"]), quantization="nf4")


def test_an_adapter_is_no_model(tmp_path):
    write("llama", tmp_path / "base")
    lora.save_adapter(ours(tmp_path / "base", SETTINGS["lora"]), toy.tokenizer("tiny"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"^model\.model_name_or_path: .*adapter is an adapter, not a whole model; name its base here"):
        load.fetch(Model(str(tmp_path / "adapter")))


@pytest.mark.parametrize("seed", [0, 2**20, 20240601, 2**40, 2**63 - 1, 2**64 - 1])
def test_dropout_takes_any_seed(seed):
    keys = [dropout.row_keys(s, step, torch.arange(64)) for s in (seed, 7) for step in (1, 2)]
    assert len({k for part in keys for k in part.tolist()}) == 4 * 64


def test_keyed_dropout(tmp_path):
    """A row's draws are its own wherever it lies; another step, row or layer draws anew; the share is the one that was asked for."""
    write("llama", tmp_path)
    model = moved(ours(tmp_path, Lora(r=4, lora_dropout=0.3, target_modules=["q_proj", "lm_head"])))
    batch = rows([9, 3, 14])
    keys = dropout.row_keys(42, 5, torch.arange(3))

    def score(batch, keys):
        return logprobs.token_logps(model, batch | {"row_keys": keys})["logps"].detach()

    together = score(batch, keys)
    alone = score({k: t[2:] for k, t in batch.items()}, keys[2:])
    torch.testing.assert_close(together[2:], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, score(batch, dropout.row_keys(42, 6, torch.arange(3))), atol=1e-3)
    model.eval()
    assert torch.equal(score(batch, keys), logps(model))
    part = dropout.KeyedDropout(0.3, "x")
    part.keys = dropout.token_keys(keys, 4000).flatten()
    out = part(torch.ones(12000, 16))
    assert (out == 0).double().mean().item() == pytest.approx(0.3, abs=0.005)
    assert out.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.corrcoef((out == 0).float().T).triu(1).abs().max() < 0.05  # features do not drop together


def test_a_copy_of_the_adapters_is_a_reference_that_follows(tmp_path):
    write("llama", tmp_path)
    model = ours(tmp_path, Lora(r=4))
    first, copy = logps(model), reference.AdapterCopy(model)
    moved(model)
    now = logps(model)
    with copy.scoring():
        assert torch.equal(logps(model), first)
    assert torch.equal(logps(model), now)
    reference.follow(copy, model, 1.0)
    with copy.scoring():
        assert torch.equal(logps(model), now)


def test_a_quantised_base_is_refused_as_it_is(tmp_path):
    write("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("{", '{"quantization_config": {"quant_method": "bitsandbytes"},', 1))
    with pytest.raises(ValueError, match="is quantised already; name the model that it was made from"):
        ours(tmp_path, Lora(r=4))


def test_layers_that_nf4_cannot_find_are_named(tmp_path):
    write("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("up_proj.weight"))
    save_file({name: t for name, t in tensors.items() if name != gone}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"^model\.quantization: .* has no {gone}"):
        ours(tmp_path, Lora(r=4), quantization="nf4")


def test_gradient_norm_counts_adapters_alone(tmp_path):
    write("qwen3", tmp_path)
    model = moved(ours(tmp_path, Lora(r=4), quantization="nf4"))
    logprobs.token_logps(model, rows([9, 3]))["logps"].sum().backward()
    norm = get_total_norm([p.grad for p in lora.trained(model).values()])
    assert torch.isfinite(sharding.whole(norm)) and any(isinstance(m, quantize.NF4Linear) for m in model.modules())
