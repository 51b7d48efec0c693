"""Pairs and labelled rows against TRL's own preparation, unpairing, KTO's mismatched rows, ORPO's scored prompts, malformed rows."""

import json
import re
from types import SimpleNamespace

import datasets
import pytest
import torch
from test_data import CALL, CHATML, TOOL, tokenizer, trained, trl_template, turns, write
from trl import DPOTrainer, KTOTrainer
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from train import data, loop
from train.config import Data, Evaluation

datasets.disable_progress_bars()

EXPLICIT = [
    {"prompt": "What is 48/2?", "chosen": " 24", "rejected": " 25, I think"},
    {"prompt": "How many cl", "chosen": "ips did Natalia sell?", "rejected": "aims?"},  # tokens merge across the boundary, once
    {"prompt": "Ends with a space ", "chosen": "42<|im_end|>", "rejected": "41"},
    {"prompt": "x" * 40, "chosen": "\n\n🎉", "rejected": "y" * 30},
]
IMPLICIT = [
    {"chosen": "The capital of France is Paris.", "rejected": "The capital of France is Rome."},
    {"chosen": "def f(x):\n    return x + 1", "rejected": "def f(x):\n    return x + 2 + 3"},
    {"chosen": "How many clips?", "rejected": "How many clamps?"},
]
CHATS = [
    {"prompt": prompt, **{side: [{"role": "assistant", "content": text}] for side, text in (("chosen", chosen), ("rejected", rejected))}}
    for prompt, chosen, rejected in (
        (turns("Hello"), "\n\nHi there \n", "Go away"),
        (turns("2 + 2?", "4", "3 + 3?", system="You are a helpful assistant."), "6", "7 🎉"),
        (turns("שלום"), "🎉 مرحبا بالعالم 🎉", "a"),
    )
]
IMPLICIT_CHATS = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHATS]
CALLED = {"prompt": CALL[:-1], "chosen": CALL[-1:], "rejected": [{"role": "assistant", "content": "It is 6."}], "tools": [TOOL]}
THINKING = [row | {"chat_template_kwargs": {"enable_thinking": False}} for row in CHATS]


def prepare(folder, rows, tok, kind, **settings):
    return data.prepare(write(folder, rows), "train", Data(train="", **settings), tok, kind)


def ids_and_masks(rows):
    return [tuple(map(torch.Tensor.tolist, rows.row(i))) for i in range(len(rows.offsets) - 1)]


def trl_rows(trainer, rows, tok, max_length):
    """What TRL would train on: [(ids, mask)], of pairs chosen and rejected by turns."""
    made = trainer.__new__(trainer)
    vars(made).update(_tokenizer=tok, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    prepared = made._prepare_dataset(datasets.Dataset.from_list(rows), tok, args, "train")
    collator = DataCollatorForPreference if trainer is DPOTrainer else DataCollatorForUnpairedPreference
    batch = collator(pad_token_id=0, max_length=max_length)([*prepared])
    batch["completion_mask"][:, 0] = 0  # nothing comes before the first token, so no loss is computed there
    cut = [
        (ids[real].tolist(), mask[real].bool().tolist())
        for ids, mask, real in zip(batch["input_ids"], batch["completion_mask"], batch["attention_mask"].bool())
    ]
    return [cut[i] for pair in zip(range(len(prepared)), range(len(prepared), len(cut))) for i in pair] or cut


def assert_pairs_equal_trl(folder, rows, tok, **settings):
    ours = prepare(folder, rows, tok, "pairs", **settings)
    assert ids_and_masks(ours) == trl_rows(DPOTrainer, rows, tok, settings.get("max_length", 1024))
    assert ours.rows_per_example == 2 and len(ours) == len(ours.offsets) // 2
    return ours


# ---- equal to TRL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["bytes", "metaspace"])
@pytest.mark.parametrize("bos", [False, True])
def test_text_pairs_equal_trl(tmp_path, one_rank, style, bos):
    tok = tokenizer(style=style, bos=bos)
    assert_pairs_equal_trl(tmp_path, EXPLICIT, tok)
    rows = assert_pairs_equal_trl(tmp_path, IMPLICIT, tok)
    assert rows.report["format"] == "chosen and rejected, text"
    assert (trained(rows, tok, 0).lstrip(), trained(rows, tok, 1).lstrip()) == ("Paris.<|im_end|>", "Rome.<|im_end|>")


def test_pairs_share_the_prompt_that_both_can_have(tmp_path, one_rank):
    """Where a token of one response merges into the prompt, the other's prompt ends there too."""
    tok = tokenizer()
    rows = assert_pairs_equal_trl(tmp_path, EXPLICIT[1:2], tok)
    starts = [int(rows.row(i)[1].int().argmax()) for i in (0, 1)]
    assert starts[0] == starts[1] < len(tok("How many cl")["input_ids"]) and rows.report["boundary_moved"] == 1


def test_cut_pairs_equal_trl(tmp_path, one_rank):
    rows = assert_pairs_equal_trl(tmp_path, EXPLICIT, tokenizer(), max_length=44)
    assert rows.report["truncated"] == 1 and rows.lengths.max() == 44
    rows = assert_pairs_equal_trl(tmp_path, EXPLICIT, tokenizer(), max_length=20)
    assert rows.report["dropped"] == {"prompt fills max_length": 1} and rows.report["kept"] == 3
    assert "rows.jsonl:4: prompt fills max_length" in rows.report["first_dropped"]["prompt fills max_length"]


@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen2_5", "qwen3"])
def test_chat_pairs_equal_trl(tmp_path, one_rank, template):
    tok = tokenizer(CHATML if template == "chatml" else trl_template(template), bos=True)
    rows = assert_pairs_equal_trl(tmp_path, CHATS, tok)
    assert ids_and_masks(assert_pairs_equal_trl(tmp_path, IMPLICIT_CHATS, tok)) == ids_and_masks(rows)
    cut = assert_pairs_equal_trl(tmp_path, CHATS, tok, max_length=int(rows.lengths.max()) - 2)
    assert cut.report["truncated"] > 0
    plain = [{"prompt": "Hello", "chosen": "\n\nHi there \n", "rejected": "Go away"}]
    assert ids_and_masks(prepare(tmp_path, plain, tok, "pairs", chat=True)) == ids_and_masks(rows)[:2]


def test_tools_and_template_settings_of_pairs_equal_trl(tmp_path, one_rank):
    tok = tokenizer(trl_template("qwen2_5"))
    rows = assert_pairs_equal_trl(tmp_path, [CALLED], tok)
    assert '"properties"' in tok.decode(rows.input_ids) and trained(rows, tok, 1) == "It is 6.<|im_end|>\n"
    rows = assert_pairs_equal_trl(tmp_path, THINKING, tokenizer(trl_template("qwen3")))
    assert trained(rows, tok, 3).strip() == "7 🎉<|im_end|>"  # the empty thought is part of the prompt


def trl_rows_without_reference(trainer, rows, tok, max_length=1024):
    """([(ids, mask)], moved) of TRL's CPO and ORPO, chosen and rejected by turns; `moved` counts pairs whose masks TRL starts apart.

    There a token of one response merges into the prompt, and TRL trains the other response from a token later on; here both start early.
    """
    made, out, moved = trainer.__new__(trainer), [], 0
    vars(made).update(processing_class=tok, is_encoder_decoder=False, max_length=max_length)
    for row in rows:
        one = made.tokenize_row(maybe_apply_chat_template(maybe_extract_prompt(row), tok))
        starts = [[x != -100 for x in one[f"{side}_labels"]].index(True) for side in ("chosen", "rejected")]
        ids = [one[f"{side}_input_ids"] for side in ("chosen", "rejected")]
        out += [(own, [i >= min(starts) for i in range(len(own))]) for own in ids]
        moved += starts[0] != starts[1]
    return out, moved


@pytest.mark.parametrize("max_length", [1024, 44])
@pytest.mark.parametrize("trainer", [CPOTrainer, ORPOTrainer])
def test_text_pairs_equal_trls_of_cpo_and_orpo(tmp_path, trainer, max_length):
    tok = tokenizer(bos=True)
    for rows in (EXPLICIT[:1] + EXPLICIT[2:], IMPLICIT[:2]):  # in the others several tokens merge, and these masks step back by one at most
        ours = prepare(tmp_path, rows, tok, "pairs", max_length=max_length)
        assert (ids_and_masks(ours), 0) == trl_rows_without_reference(trainer, rows, tok, max_length)


@pytest.mark.parametrize("trainer", [CPOTrainer, ORPOTrainer])
def test_chat_pairs_have_no_tokens_around_the_template(tmp_path, trainer):
    """TRL's CPO and ORPO put a first and an end token around what the template writes; DPO and ours do not."""
    tok = tokenizer()
    for rows in (CHATS, IMPLICIT_CHATS):
        theirs, merged = trl_rows_without_reference(trainer, rows, tok)
        assert {(ids[0], ids[-1], mask[0], mask[-1]) for ids, mask in theirs} == {(tok.bos_token_id, tok.eos_token_id, False, True)}
        assert ids_and_masks(prepare(tmp_path, rows, tok, "pairs")) == [(ids[1:-1], mask[1:-1]) for ids, mask in theirs]
        assert merged == 1


LABELLED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(EXPLICIT)]
LABELLED_CHATS = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(CHATS)]


@pytest.mark.parametrize("form", [LABELLED, LABELLED_CHATS], ids=["text", "chat"])
@pytest.mark.parametrize("max_length", [1024, 20])
def test_labelled_rows_equal_trl(tmp_path, one_rank, max_length, form):
    tok = tokenizer(bos=True)
    ours = prepare(tmp_path, form, tok, "labelled", max_length=max_length)
    assert ids_and_masks(ours) == trl_rows(KTOTrainer, form, tok, max_length)
    assert ours.columns["desirable"].dtype == torch.bool and ours.rows_per_example == 1
    assert max_length == 20 or ours.columns["desirable"].tolist() == [row["label"] for row in form]


@pytest.mark.parametrize("form", [EXPLICIT, IMPLICIT, CHATS, IMPLICIT_CHATS, THINKING, [CALLED]])
def test_unpaired_rows_equal_trl(tmp_path, one_rank, form):
    """A pair makes a good and a bad row, one after the other; TRL puts all good ones first. Tools and template settings stay."""
    tok = tokenizer(trl_template("qwen3"))
    ours = prepare(tmp_path, form, tok, "labelled")
    expected = trl_rows(KTOTrainer, form, tok, 1024)
    assert ids_and_masks(ours)[0::2] + ids_and_masks(ours)[1::2] == expected
    assert ours.columns["desirable"].tolist() == [True, False] * len(form)


# ---- mismatched rows, scored prompts -----------------------------------------------------------------------------------------


def test_mismatched_rows(tmp_path):
    """Each row's prompt with the completion of the nearest row before it that has another prompt; before the first comes the last."""
    names = ["aa", "aa", "b", "b", "aa", "cccc"]
    rows = [{"prompt": name, "completion": f" {number}!", "label": number % 3 == 0} for number, name in enumerate(names)]
    tok = tokenizer()
    plain = prepare(tmp_path, rows, tok, "labelled")
    made = data.with_mismatched(plain, None)
    own, mixed = ids_and_masks(made)[0::2], ids_and_masks(made)[1::2]
    assert own == ids_and_masks(plain)
    assert [tok.decode(ids) for ids, _ in mixed] == [
        *("aa 5!<|im_end|>", "aa 5!<|im_end|>", "b 1!<|im_end|>", "b 1!<|im_end|>", "aa 3!<|im_end|>", "cccc 4!<|im_end|>")
    ]
    for (ids, mask), (own_ids, own_mask) in zip(mixed, own):
        start = own_mask.index(True)
        assert ids[:start] == own_ids[:start] and mask == [i >= start for i in range(len(ids))]
    assert made.rows_per_example == 2 and len(made) == len(plain) == 6
    assert made.columns["desirable"].tolist() == plain.columns["desirable"].repeat_interleave(2).tolist()
    assert made.fingerprint != plain.fingerprint
    longest = max(len(ids) for ids, _ in mixed)
    cut = ids_and_masks(data.with_mismatched(plain, longest - 1))
    assert cut[0::2] == own and cut[1::2] == [(ids[: longest - 1], mask[: longest - 1]) for ids, mask in mixed]
    assert all(any(mask) for _, mask in cut)


def test_one_prompt_has_no_mismatched_row(tmp_path):
    rows = prepare(tmp_path, [{"prompt": "a", "completion": f" {i}", "label": True} for i in range(3)], tokenizer(), "labelled")
    with pytest.raises(ValueError, match=r"^data\.train: KTO's baseline needs two different prompts; or set kto.loss_type"):
        data.with_mismatched(rows, None)


def test_scored_prompts(tmp_path):
    """All of a chosen row but its first token, which nothing predicts; of a rejected one what is trained."""
    rows = prepare(tmp_path, EXPLICIT, tokenizer(bos=True), "pairs", max_length=44)
    scored = data.scoring_prompts(rows)
    for i in range(2 * len(rows)):
        _, mask = rows.row(i)
        expected = torch.arange(len(mask)) > 0 if i % 2 == 0 else mask
        assert torch.equal(scored.per_token["score_mask"][rows.offsets[i] : rows.offsets[i + 1]], expected)
    assert torch.equal(scored.loss_mask, rows.loss_mask)


def test_answers_are_compared_with_good_ones(tmp_path, one_rank, monkeypatch):
    """Generated answers of the first examples, never against a rejected or bad answer or a mismatched one."""
    tok, seen = tokenizer(), []
    monkeypatch.setattr(
        loop, "greedy", lambda model, tok, prompts, limit, stopping: seen.extend(prompts) or [tok(" 24").input_ids] * len(prompts)
    )
    answers = [row | {"label": label} for row in LABELLED for label in (False, True)]
    for rows in (
        prepare(tmp_path, EXPLICIT, tok, "pairs"),
        prepare(tmp_path, answers, tok, "labelled"),
        data.with_mismatched(prepare(tmp_path, answers, tok, "labelled"), None),
    ):
        seen.clear()
        score, samples = loop.answer(None, tok, rows, Evaluation(generate=3))
        assert [tok.decode(ids) for ids in seen] == [sample["prompt"] for sample in samples]
        assert [sample["prompt"][:4] for sample in samples] == [row["prompt"][:4] for row in EXPLICIT[:3]]
        assert [sample["reference"][-3:] for sample in samples] == ["24", "ll?", "42"]
        assert score == {"exact_match": pytest.approx(1 / 3)}
    bad = prepare(tmp_path, [row | {"label": False} for row in LABELLED], tok, "labelled")
    assert loop.answer(None, tok, bad, Evaluation(generate=3)) == ({}, [])


# ---- malformed rows ----------------------------------------------------------------------------------------------------------

PAIR, BARE = {"prompt": "Hi", "chosen": " a", "rejected": " b"}, {"chosen": "Hi a", "rejected": "Hi b"}
CHAT, BARE_CHAT, ONE = CHATS[0], IMPLICIT_CHATS[0], {"prompt": "Hi", "completion": " a", "label": True}
BAD_PAIRS = {
    "identical": (PAIR, PAIR | {"rejected": " a"}, "chosen equals rejected"),
    "identical without a prompt": (BARE, {"chosen": "Hi a", "rejected": "Hi a"}, "chosen equals rejected"),
    "identical chats": (CHAT, CHAT | {"rejected": CHAT["chosen"]}, "chosen equals rejected"),
    "empty chosen": (PAIR, PAIR | {"chosen": ""}, "empty completion"),
    "blank rejected": (PAIR, PAIR | {"rejected": " \n"}, "empty completion"),
    "empty prompt": (PAIR, PAIR | {"prompt": ""}, "empty content"),
    "chat without an answer": (CHAT, CHAT | {"rejected": []}, "empty completion"),
    "empty answer": (CHAT, CHAT | {"chosen": [{"role": "assistant", "content": ""}]}, "empty content"),
    "answer of the user": (CHAT, CHAT | {"prompt": turns("a", "b"), "chosen": turns("c")}, "only a prompt"),
    "nothing in common": (BARE, {"chosen": "Hi", "rejected": "No"}, "no shared prompt"),
    "nothing in common in chats": (BARE_CHAT, {"chosen": turns("a", "b"), "rejected": turns("c", "b")}, "no shared prompt"),
    "null": (PAIR, PAIR | {"rejected": None}, "not a string"),
    "numbers": (BARE, {"chosen": 3, "rejected": 4}, "not a string"),
    "text and chat": (PAIR, PAIR | {"rejected": CHAT["rejected"]}, "not a string"),
    "missing column": (PAIR, {"prompt": "Hi", "chosen": " a"}, "missing column"),
}
BAD_LABELLED = {
    **{
        f"label {label}": (ONE, ONE | {"label": label}, "label is not true or false")
        for label in (None, float("nan"), "yes", "true", "", 2, -1, 0.5, [True])
    },
    "no label": (ONE, {"prompt": "Hi", "completion": " a"}, "label is not true or false"),
    "empty completion": (ONE, ONE | {"completion": ""}, "empty completion"),
    "identical pair": (PAIR, PAIR | {"rejected": " a"}, "chosen equals rejected"),
    "pair of nulls": (BARE, {"chosen": None, "rejected": None}, "not a string"),
    "pair with nothing in common": (BARE, {"chosen": "Hi", "rejected": "No"}, "no shared prompt"),
}
BAD = {("pairs", name): row for name, row in BAD_PAIRS.items()} | {("labelled", name): row for name, row in BAD_LABELLED.items()}


@pytest.mark.parametrize("kind, name", BAD)
def test_bad_row_is_named_by_its_line(tmp_path, kind, name):
    good, bad, reason = BAD[kind, name]
    rows = [good, good, b"", good, bad, good, bad]  # line 3 is blank, lines 5 and 7 are bad
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}/rows.jsonl:5: {reason} \(got .+, expected .+\)$"):
        prepare(tmp_path, rows, tokenizer(), kind)
    found, clean = prepare(tmp_path, rows, tokenizer(), kind, on_bad_row="skip"), prepare(tmp_path, [good] * 4, tokenizer(), kind)
    assert found.report["dropped"] == {reason: 2} and found.report["kept"] == clean.report["kept"] >= 4
    assert f"rows.jsonl:5: {reason}" in found.report["first_dropped"][reason] and json.loads(json.dumps(found.report)) == found.report
    assert found.fingerprint == clean.fingerprint  # bad rows leave no trace in the others


def test_labels_of_numbers(tmp_path):
    rows = prepare(tmp_path, [ONE | {"label": label} for label in (1, 0, True, False, 1.0)], tokenizer(), "labelled")
    assert rows.columns["desirable"].tolist() == [True, False, True, False, True]


def test_settings_for_other_rows_are_refused(tmp_path):
    for name, value in (("completion_only_loss", False), ("assistant_only_loss", True)):
        for kind, row in (("pairs", CHAT), ("labelled", {"prompt": CHAT["prompt"], "completion": CHAT["chosen"], "label": True})):
            with pytest.raises(ValueError, match=rf":1: data\.{name}: preferences and rewards are learned from whole completions"):
                prepare(tmp_path, [row], tokenizer(), kind, **{name: value})
