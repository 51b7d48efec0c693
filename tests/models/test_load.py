import json

import pytest
import torch
import torch.distributed as dist
from families import COMMON, write
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from models import generate, load, logprobs, sharding
from train import toy
from train.config import Fsdp, Model


def ours(folder, **settings):
    device = sharding.start_ranks(60)
    return load.build(Model(str(folder), **settings), folder, Fsdp(), device, seed=0)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3_moe", "gemma3_text"])
def test_weights_equal_from_pretrained(name, tmp_path):
    write(name, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    got = ours(tmp_path).state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k].full_tensor().cpu(), expected[k]) for k in got)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3_moe"])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_saved_folder_equals_the_original(name, max_shard_bytes, tmp_path):
    """The same keys and bytes as transformers writes, in one file or several, and nothing temporary left behind."""
    write(name, tmp_path / "base")
    model = ours(tmp_path / "base")
    load.save_pretrained(model, toy.tokenizer("tiny"), tmp_path / "out", max_shard_bytes=max_shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes < 2**30)
    saved = {k: t for f in files for k, t in load_file(f).items()}
    original = load_file(tmp_path / "base" / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[k], original[k]) for k in saved)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.arange(3, 20)[None]
    assert type(reloaded) is type(plain) and torch.equal(reloaded(ids).logits, plain(ids).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_saved_in_another_dtype(tmp_path):
    write("llama", tmp_path / "base")
    load.save_pretrained(ours(tmp_path / "base"), toy.tokenizer("tiny"), tmp_path / "out", torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_from_scratch_follows_the_seed_and_the_families_scheme(tmp_path):
    write("llama", tmp_path)
    device = sharding.start_ranks(60)
    a, b, c = (
        {
            k: t.full_tensor()
            for k, t in load.build(Model(str(tmp_path), from_scratch=True), tmp_path, Fsdp(), device, s).state_dict().items()
        }
        for s in (0, 0, 1)
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    assert a["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert (a["model.norm.weight"] == 1).all()


def test_weights_that_do_not_fit_are_refused(tmp_path):
    write("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    extra = weights.pop("lm_head.weight")
    save_file(weights | {"stranger.weight": extra}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config.json: 1 missing keys, the first lm_head.weight; 1 unexpected keys"):
        ours(tmp_path)


def test_folders_that_are_no_model_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sharding.start_ranks(60)
    with pytest.raises(ValueError, match=r"there is no folder '\./nowhere'"):
        load.fetch(Model("./nowhere"))
    with pytest.raises(ValueError, match="the hub did not give it"):
        load.fetch(Model("no-such/model"))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="weights must be safetensors"):
        load.weight_files(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    write("llama", tmp_path)
    load.check_vocabulary(model := ours(tmp_path), COMMON["vocab_size"] - 1)
    with pytest.raises(ValueError, match="token 61, but the model's embedding has 61 rows"):
        load.check_vocabulary(model, 61)


def test_weights_are_whole_only_inside_gathered(tmp_path):
    write("llama", tmp_path)
    model = ours(tmp_path)
    with sharding.gathered(model):
        assert not hasattr(model.lm_head.weight, "to_local") and not model.training
    assert hasattr(model.lm_head.weight, "to_local") and model.training


def test_replicas_must_divide_the_ranks():
    device = sharding.start_ranks(60)
    with pytest.raises(ValueError, match=r"^fsdp.replicas: got 3, expected a divisor of the run's 1 ranks"):
        sharding.make_mesh(device, 3)
    assert dist.get_world_size() == 1


def test_layers_that_would_mix_rows_are_refused(tmp_path):
    sharding.start_ranks(60)
    AutoConfig.for_model("lfm2", **COMMON, layer_types=["conv", "full_attention"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lfm2 has conv layers, which would mix the rows of a pack"):
        ours(tmp_path, from_scratch=True)


def test_dropout_is_off(tmp_path, capsys):
    """Two passes in training mode give the same log-probs, though the model's config asks for dropout."""
    config = write("llama", tmp_path)
    config.attention_dropout = 0.5
    config.save_pretrained(tmp_path)
    model = ours(tmp_path)
    ids = torch.arange(3, 20)[None]
    batch = {"input_ids": ids, "attention_mask": ids > 0, "loss_mask": ids > 3}
    a, b = (logprobs.token_logps(model, batch)["logps"] for _ in range(2))
    assert model.training and torch.equal(a, b) and a.any()
    assert "attention_dropout of the model is 0.5; set to 0" in capsys.readouterr().out


def test_dtype_and_generation_config_of_the_base_are_kept(tmp_path):
    config = write("llama", tmp_path / "base")
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path / "base")
    GenerationConfig(eos_token_id=[2, 5], temperature=0.6, do_sample=True).save_pretrained(tmp_path / "base")
    model = ours(tmp_path / "base")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert generate.stop_ids(model, toy.tokenizer("tiny")) == [0, 2, 5]
    load.save_pretrained(model, toy.tokenizer("tiny"), tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


def test_a_folder_left_by_a_kill_does_not_stand_in_the_way(tmp_path):
    for name in ("final", ".old-final", ".tmp-final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mark").write_text(name)
    load.publish(tmp_path / ".tmp-final", tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"] and (tmp_path / "final" / "mark").read_text() == ".tmp-final"
