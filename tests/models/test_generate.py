import pytest
import torch
from families import FAMILIES, write
from transformers import AutoModelForCausalLM
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from models import generate, load, sharding
from models.generate import Sampling
from models.logprobs import token_logps
from train.config import Fsdp, Model

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26]]
KEYS = [[100 * i + j for j in range(5)] for i in range(len(PROMPTS))]


def ours(folder, dtype="float32"):
    device = sharding.start_ranks(60)
    return load.build(Model(str(folder), dtype=dtype), str(folder), Fsdp(), device, seed=0)


@pytest.mark.parametrize("family,dtype", [*((family, "float32") for family in FAMILIES), ("qwen3", "bfloat16")])
def test_greedy_equals_transformers_generate(family, dtype, tmp_path, monkeypatch):
    """Token for token, with prompts of unlike lengths, fewer slots than prompts, and a cache that grows on the way."""
    monkeypatch.setattr(generate, "BLOCK", {"cpu": 16, "cuda": 16})
    write(family, tmp_path)
    model = ours(tmp_path, dtype)
    got = generate.generate(model, PROMPTS, [[0]] * 4, Sampling(40), [0, 3], batch_size=3)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).to(model.lm_head.weight.device)
    for prompt, (completion,) in zip(PROMPTS, got):
        ids = torch.tensor([prompt], device=plain.device)
        alone = plain.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=[0, 3], pad_token_id=0)
        assert completion.ids == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype,bound", [("float32", 2e-5), ("bfloat16", 0.05)])
def test_log_probs_are_the_trainers(dtype, bound, tmp_path):
    """What the sampler says of its tokens is what the seam says of them, at the same temperature."""
    write("qwen3", tmp_path)
    model = ours(tmp_path, dtype)
    sampling = Sampling(20, temperature=0.7, top_k=9)
    for prompt, own in zip(PROMPTS, generate.generate(model, PROMPTS, KEYS, sampling, [0], batch_size=7)):
        for c in own:
            ids = torch.tensor([prompt + c.ids])
            mask = torch.arange(ids.shape[1])[None] >= len(prompt)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(mask), "loss_mask": mask, "temperature": torch.tensor(0.7)}
            with torch.no_grad():
                logps = token_logps(model, batch)["logps"][mask].cpu()
            assert (logps - torch.tensor(c.logps)).abs().max() < bound
            assert c.ids[-1] == 0 or len(c.ids) == 20
            assert 0 not in c.ids[:-1]


def test_a_row_draws_by_its_key_alone(tmp_path):
    """The same completions whatever is decoded beside them: other prompts, fewer slots, another order."""
    write("llama", tmp_path)
    model, sampling = ours(tmp_path), Sampling(24, temperature=1.0)
    whole = generate.generate(model, PROMPTS, KEYS, sampling, [0], batch_size=32)
    narrow = generate.generate(model, PROMPTS, KEYS, sampling, [0], batch_size=3)
    back = generate.generate(model, PROMPTS[::-1], KEYS[::-1], sampling, [0], batch_size=8)[::-1]
    ids = [[c.ids for c in own] for own in whole]
    assert ids == [[c.ids for c in own] for own in narrow] == [[c.ids for c in own] for own in back]
    assert len({tuple(c) for own in ids for c in own}) > 15
    other = generate.generate(model, PROMPTS, [[k + 1000 for k in own] for own in KEYS], sampling, [0])
    assert ids != [[c.ids for c in own] for own in other]


def test_ended_rows_leave_the_batch(tmp_path, monkeypatch):
    """Rows computed are little more than tokens written, where lengths differ a lot."""
    write("llama", tmp_path)
    model, computed = ours(tmp_path), []
    compute = generate.Decoder.compute
    monkeypatch.setattr(generate.Decoder, "compute", lambda self: computed.append(self.size) or compute(self))
    prompts, keys = [[5, 6, 7]] * 8, [[8 * i + j for j in range(8)] for i in range(8)]
    found = generate.generate(model, prompts, keys, Sampling(120, temperature=1.0), [0, 1, 2], batch_size=16)
    lengths = [len(c.ids) for own in found for c in own]
    assert max(lengths) > 3 * sum(lengths) / len(lengths)
    assert sum(computed) < 1.6 * sum(lengths)
    assert 64 * max(lengths) > 3 * sum(computed)  # what a batch that waits for its longest row would compute


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8, "min_p": 0.05}])
def test_draws_follow_the_distribution(filters, monkeypatch):
    """Chi-square of 20,000 draws against the softmax of the filtered logits; tokens that are filtered out never come."""
    torch.manual_seed(0)
    logits, temperature = torch.randn(1, 12) * 2, 0.8
    monkeypatch.setattr(generate, "LANES", 5)
    z = logits / temperature
    for warper, name in ((TopKLogitsWarper, "top_k"), (TopPLogitsWarper, "top_p"), (MinPLogitsWarper, "min_p")):
        z = warper(filters[name])(None, z) if name in filters else z
    p, n = z.softmax(-1)[0], 20000
    uniform = torch.rand(n, 1, generator=torch.Generator().manual_seed(1))
    chosen, logps = generate.pick(logits.expand(n, -1), uniform, Sampling(1, temperature, **filters))
    counts = torch.bincount(chosen[:, 0], minlength=12)
    assert not counts[p == 0].any()
    kept = p > 0
    chi2 = ((counts[kept] - n * p[kept]) ** 2 / (n * p[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5 + 4  # beyond 4 standard deviations
    torch.testing.assert_close(logps[:, 0], (logits / temperature).log_softmax(-1)[0][chosen[:, 0]])


def test_the_ends_of_the_unit_interval():
    """No draw falls outside of the vocabulary or on a token without probability."""
    z = torch.tensor([[-1e9, 0.0, 1.0, -1e9]]).expand(2, -1)
    chosen, _ = generate.pick(z, torch.tensor([[0.0], [1.0]]), Sampling(1, 1.0))
    assert chosen[:, 0].tolist() == [1, 2]


def test_nothing_to_generate(tmp_path):
    write("llama", tmp_path)
    assert generate.generate(ours(tmp_path), [], [], Sampling(4), [0]) == []


def test_the_model_is_given_back_as_it_was(tmp_path):
    write("qwen3", tmp_path)
    model = ours(tmp_path, "bfloat16")
    generate.generate(model, PROMPTS, KEYS, Sampling(4), [0])
    assert model.training and model.config._attn_implementation.startswith("packed_")
    assert all(not p.to_local().isnan().any() and p.dtype == torch.float32 for p in model.parameters())
