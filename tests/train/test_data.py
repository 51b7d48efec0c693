"""Rows against TRL's own preparation, every malformed row by its line, masks against decoded text, files of every kind."""

import json
import os
import re
import time
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from train import data, sources, toy
from train.config import Data

TEXTS = [
    "What is the capital of France? Paris.\n\nHow many clips did Natalia sell altogether in April and May?",
    "user assistant system tool\n<think>\n\n</think>\n\nYou are a helpful assistant. The answer is 72. 48/2 = 24\n",
    "def f(x):\n    return x + 1\n\n\nשלום עולם, مرحبا بالعالم 🎉 Grüße",  # noqa: RUF001
]
SPECIAL = [
    "<bos>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|endoftext|>",
    "<pad>",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTENT_ONLY = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
TEXT = [
    {"text": "The capital of France is Paris."},
    {"text": "Already ended.<|im_end|>"},
    {"text": "שלום 🎉 مرحبا"},
    {"text": " \n x"},
]
PAIR = [
    {"prompt": "What is 48/2?", "completion": " 24"},
    {"prompt": "How many cl", "completion": "ips did Natalia sell?"},  # tokens merge across the boundary
    {"prompt": "Ends with a space ", "completion": "42<|im_end|>"},
    {"prompt": "x" * 50, "completion": "\n\n🎉"},
]


def turns(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": role, "content": content} for role, content in zip(roles, contents)]


CHATS = [
    {"messages": turns("What is 2 + 2?", "The answer is 4.", "And 3 + 3?", "6", system="You are a helpful assistant.")},
    {"messages": turns("Hello", "\n\nHi there \n")},
    {"messages": turns("שלום", "🎉 مرحبا بالعالم 🎉", "a", "b", "c", "d")},
]
CHAT_PAIR = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in CHATS]
CHAT_PAIR = [row | {"chat_template_kwargs": {"enable_thinking": True}} for row in CHAT_PAIR]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}
CALL = [
    {"role": "user", "content": "Add 2 and 3"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]},
    {"role": "tool", "name": "add", "content": "5"},
    {"role": "assistant", "content": "It is 5."},
]


@cache
def backend(style):
    tokenizer = Tokenizer(models.BPE(byte_fallback=style == "metaspace", unk_token="<unk>" if style == "metaspace" else None))
    if style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet, tokenizer.decoder = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"), decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = SPECIAL + (["<unk>"] if style == "metaspace" else [])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer.to_str()


def tokenizer(template=CHATML, style="bytes", bos=False, pad="<pad>", eos="<|im_end|>"):
    made = Tokenizer.from_str(backend(style))
    if bos:
        made.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", SPECIAL.index("<bos>"))])
    names = {"eos_token": eos, "bos_token": "<bos>", "pad_token": pad}
    made = PreTrainedTokenizerFast(tokenizer_object=made, **{name: token for name, token in names.items() if token})
    made.chat_template = template
    return made


def trl_template(name):
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


@cache
def tiny(vocabulary):
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape))


def trl_rows(rows, tok, folder, **settings):
    """What TRL would train on: [(ids, labels)]."""
    trl = pytest.importorskip("trl")
    if trl.__version__ != "1.16.0":
        pytest.skip(f"compares with trl 1.16.0, this is {trl.__version__}")
    args = trl.SFTConfig(output_dir=str(folder / "trl"), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **settings)
    datasets.disable_progress_bars()
    made = trl.SFTTrainer(tiny(len(tok)), args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tok)
    return [(row["input_ids"], row["labels"]) for row in made.train_dataset]


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def prepare(folder, rows, tok, **settings):
    return data.prepare(write(folder, rows), "train", Data(train="", **settings), tok, "completions")


def labelled(rows):
    """[(ids, labels)] as TRL has them; the label of a row's first token is left out, no loss ever reads it."""
    pairs = [rows.row(i) for i in range(len(rows))]
    return [(ids.tolist(), torch.where(mask, ids, -100)[1:].tolist()) for ids, mask in pairs]


def trained(rows, tok, i=0):
    ids, mask = rows.row(i)
    return tok.decode(ids[mask])


def assert_equal_to_trl(rows, tok, folder, **settings):
    ours = prepare(folder, rows, tok, **settings)
    theirs = trl_rows(rows, tok, folder, **settings)
    assert labelled(ours) == [(ids, labels[1:]) for ids, labels in theirs]
    assert not ours.loss_mask[ours.offsets[:-1]].any()
    return ours


# ---- equal to TRL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["bytes", "metaspace"])
@pytest.mark.parametrize("bos", [False, True])
def test_text_equals_trl(tmp_path, style, bos):
    rows = assert_equal_to_trl(TEXT, tokenizer(style=style, bos=bos), tmp_path, max_length=12)
    assert rows.report["truncated"] > 0 and rows.report["kept"] == 4


@pytest.mark.parametrize("completion_only", [None, True, False])
def test_prompt_completion_equals_trl(tmp_path, completion_only):
    tok = tokenizer(bos=True)
    rows = assert_equal_to_trl(PAIR, tok, tmp_path, completion_only_loss=completion_only, max_length=30)
    assert rows.report["boundary_moved"] == (0 if completion_only is False else 1)
    cut = assert_equal_to_trl(PAIR, tok, tmp_path, completion_only_loss=completion_only, max_length=14)
    assert (len(rows), len(cut)) == ((4, 4) if completion_only is False else (3, 2))  # rows that are prompt alone are dropped
    assert sum(cut.report["dropped"].values()) == 4 - len(cut)
    assert_equal_to_trl(PAIR, tokenizer(style="metaspace"), tmp_path, completion_only_loss=completion_only, max_length=None)


@pytest.mark.parametrize("template", ["chatml", "marked", "llama3", "qwen2_5", "qwen3", "llama3_training", "qwen3_training"])
def test_chats_equal_trl(tmp_path, template):
    tok = tokenizer({"chatml": CHATML, "marked": MARKED}.get(template) or trl_template(template), bos=True)
    assert_equal_to_trl(CHATS, tok, tmp_path)
    assert_equal_to_trl(CHAT_PAIR, tok, tmp_path, max_length=65)
    assert_equal_to_trl(CHAT_PAIR, tok, tmp_path, completion_only_loss=False)


@pytest.mark.parametrize("template", ["marked", "llama3_training", "qwen2_5_training", "qwen3_training"])
def test_assistant_masks_of_marked_templates_equal_trl(tmp_path, template):
    tok = tokenizer({"marked": MARKED}.get(template) or trl_template(template))
    assert_equal_to_trl(CHATS, tok, tmp_path, assistant_only_loss=True)
    assert_equal_to_trl(CHATS, tok, tmp_path, assistant_only_loss=True, max_length=65)
    assert_equal_to_trl(CHAT_PAIR, tok, tmp_path, assistant_only_loss=True)
    rows = assert_equal_to_trl(CHAT_PAIR, tok, tmp_path, assistant_only_loss=True, completion_only_loss=False)
    assert trained(rows, tok, 2).count("<|eot_id|>" if template == "llama3_training" else "<|im_end|>") == 3
    if not template.startswith("qwen"):  # there a turn ends in "\n", which is two tokens here: "▁" and "\n"; TRL trains the first
        tok = tokenizer(tok.chat_template, style="metaspace")
        assert_equal_to_trl(CHATS, tok, tmp_path, assistant_only_loss=True)


@pytest.mark.parametrize("template", ["llama3", "cohere", "lfm2", "gemma3", "qwen3_instruct_2507", "qwen3"])
def test_assistant_masks_without_marks_equal_trls_own_templates(tmp_path, template):
    """TRL recognises these templates and swaps in its marked ones; we read the same masks off the template itself."""
    tok = tokenizer(trl_template(template))
    rows = [{"messages": row["messages"][: 3 if row["messages"][0]["role"] == "system" else 2]} for row in CHATS]
    assert_equal_to_trl(rows if template == "qwen3" else CHATS, tok, tmp_path, assistant_only_loss=True)


def test_qwen2_5_differs_from_trl_by_the_newline_of_the_generation_prompt(tmp_path):
    tok = tokenizer(trl_template("qwen2_5"))
    rows = [{"messages": turns("Hello", "Hi there", "x", "y")}]
    ((ids, ours),) = labelled(prepare(tmp_path, rows, tok, assistant_only_loss=True))
    ((their_ids, theirs),) = trl_rows(rows, tok, tmp_path, assistant_only_loss=True)
    differing = [i for i, (a, b) in enumerate(zip(ours, theirs[1:]), 1) if a != b]
    assert ids == their_ids and len(differing) == 2
    assert all(tok.decode(ids[: i + 1]).endswith("<|im_start|>assistant\n") and ours[i - 1] == -100 for i in differing)


def test_tools_and_template_settings_equal_trl(tmp_path):
    tok = tokenizer(trl_template("qwen2_5"))
    for tools in ([TOOL], json.dumps([TOOL])):
        rows = assert_equal_to_trl([{"messages": CALL, "tools": tools}], tok, tmp_path)
        assert '"properties"' in tok.decode(rows.input_ids) and "<tool_response>\n5" in tok.decode(rows.input_ids)
    rows = prepare(tmp_path, [{"messages": CALL, "tools": [TOOL]}], tok, assistant_only_loss=True)
    assert trained(rows, tok).startswith('<tool_call>\n{"name": "add"') and trained(rows, tok).endswith("\nIt is 5.<|im_end|>\n")
    assert "5\n</tool_response>" not in trained(rows, tok)
    tok = tokenizer(trl_template("qwen3_training"))
    rows = [{"prompt": turns("Hi"), "completion": [{"role": "assistant", "content": "Hello"}]}]
    rows = [row | {"chat_template_kwargs": {"enable_thinking": False}} for row in rows]
    rows = assert_equal_to_trl(rows, tok, tmp_path)
    assert trained(rows, tok).strip() == "Hello<|im_end|>"  # the empty thought is part of the prompt


def test_sharegpt_equals_trl(tmp_path):
    names = {"role": "from", "content": "value"}
    rows = [{"conversations": [{names[k]: v for k, v in message.items()} for message in row["messages"]]} for row in CHATS]
    tok = tokenizer()
    assert_equal_to_trl(rows, tok, tmp_path)
    with pytest.raises(ValueError, match=r":1: unknown role \(got 'human' in message 1, .*; rename it in the file: human is user"):
        prepare(tmp_path, [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}], tok)


# ---- masks (F18) -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_trained_text_is_the_assistants(tmp_path, template):
    tok = tokenizer(template)
    rows = prepare(tmp_path, CHATS, tok, assistant_only_loss=True)
    end = "<|im_end|>\n" if template == CHATML else "<|im_end|>"
    for i, chat in enumerate(CHATS):
        said = [message["content"] for message in chat["messages"] if message["role"] == "assistant"]
        newline = "\n" if i == 1 else ""  # one token holds the end of the prompt and the newlines that this turn begins with
        assert trained(rows, tok, i) == newline + "".join(content + end for content in said)
        ids, mask = rows.row(i)
        assert int((mask & (ids == tok.eos_token_id)).sum()) == len(said)  # the end of every assistant turn is trained
    assert rows.report["trained_eos"] == 6


def test_pad_token_does_not_matter(tmp_path):
    want = labelled(prepare(tmp_path, CHATS, tokenizer(), assistant_only_loss=True))
    for pad in (None, "<|im_end|>"):
        tok = tokenizer(pad=pad)
        rows = prepare(tmp_path, CHATS, tok, assistant_only_loss=True)
        assert labelled(rows) == want and rows.report["trained_eos"] == 6
        rows = prepare(tmp_path, TEXT, tok)
        assert all(ids[-1] == labels[-1] == tok.eos_token_id for ids, labels in labelled(rows))


def test_emoji_that_ends_a_turn_is_trained_whole(tmp_path):
    tok = tokenizer(CONTENT_ONLY)
    rows = prepare(tmp_path, [{"messages": turns("hi", "so 🦊")}], tok, assistant_only_loss=True)
    assert trained(rows, tok) == "so 🦊"
    assert "no row trains <|im_end|>" in rows.report["warnings"][0]


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    tok = tokenizer(trl_template("qwen3"))
    tok.name_or_path = "some/model"
    with pytest.raises(ValueError, match=r":1: chat template rewrites earlier turns .*'some/model' changes message 3 of 5"):
        prepare(tmp_path, CHATS, tok, assistant_only_loss=True)
    rows = prepare(tmp_path, CHATS, tok, assistant_only_loss=True, on_bad_row="skip")
    assert rows.report["dropped"] == {"chat template rewrites earlier turns": 2} and rows.report["kept"] == 1


def test_tokenizers_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl:1: rows are conversations, but the tokenizer .* has no chat template"):
        prepare(tmp_path, CHATS, tokenizer(None))
    with pytest.raises(ValueError, match="has no eos_token"):
        prepare(tmp_path, TEXT, tokenizer(eos=None))
    slow = tokenizer()
    slow.__class__ = type("SlowTokenizer", (type(slow),), {"is_fast": property(lambda self: False)})
    with pytest.raises(ValueError, match=r"assistant_only_loss: true needs a fast tokenizer \(got SlowTokenizer"):
        prepare(tmp_path, CHATS, slow, assistant_only_loss=True)
    with pytest.raises(ValueError, match="assistant_only_loss: true needs conversations"):
        prepare(tmp_path, TEXT, tokenizer(), assistant_only_loss=True)
    with pytest.raises(ValueError, match="completion_only_loss: true needs prompt and completion"):
        prepare(tmp_path, TEXT, tokenizer(), completion_only_loss=True)
    with pytest.raises(ValueError, match=r":1: no assistant text .*mend the chat template"):
        prepare(tmp_path, CHATS, tokenizer(CHATML + "{% generation %}{% endgeneration %}"), assistant_only_loss=True)


def test_doubled_bos_and_missing_eos_are_said(tmp_path):
    rows = [{"text": "<bos>Paris"}, {"text": "Rome"}]
    report = assert_equal_to_trl(rows, tokenizer(bos=True), tmp_path).report
    assert report["bos_doubled"] == 1 and "begin with <bos> twice" in report["warnings"][0]
    chats = prepare(tmp_path, CHATS, tokenizer("{{ bos_token }}" + CHATML, bos=True))
    assert chats.report["bos_doubled"] == 0 and not chats.report["warnings"]
    report = prepare(tmp_path, CHATS, tokenizer(eos="<|endoftext|>")).report
    assert "no row trains <|endoftext|>" in report["warnings"][0]
    tok = tokenizer()
    tok.add_tokens(["<new>"])
    assert prepare(tmp_path, [{"text": "<new>"}, {"text": "a"}], tok).report["max_token_id"] == len(tok) - 1


# ---- malformed rows (F17) ----------------------------------------------------------------------------------------------------

GOOD = {"messages": turns("Hi", "Hello")}
GOOD_PAIR = {"prompt": "Hi", "completion": " Hello"}


def chat(*messages):
    return {"messages": list(messages)}


USER, ASSISTANT = GOOD["messages"]
BAD = {
    "broken JSON": (GOOD, b'{"messages": [', "broken JSON"),
    "two objects on a line": (GOOD, b"{} {}", "broken JSON"),
    "not an object": (GOOD, b"[1, 2]", "not an object"),
    "null": (GOOD, b"null", "not an object"),
    "not UTF-8": (GOOD, b'{"messages": "\xff"}', "not UTF-8"),
    "half an emoji": (GOOD_PAIR, b'{"prompt": "a", "completion": "\\ud83d"}', "not Unicode text"),
    "duplicate key": (GOOD_PAIR, b'{"prompt": "a", "prompt": "b", "completion": "c"}', "duplicate key"),
    "duplicate key inside": (GOOD, b'{"messages": [{"role": "user", "role": "user", "content": "x"}]}', "duplicate key"),
    "missing column": (GOOD_PAIR, {"prompt": "Hi", "output": "x"}, "missing column"),
    "another format": (GOOD_PAIR, GOOD, "missing column"),
    "text where messages were": (GOOD, {"messages": "Hi"}, "not a list of messages"),
    "messages where text was": (GOOD_PAIR, {"prompt": [USER], "completion": [ASSISTANT]}, "not a string"),
    "number": (GOOD_PAIR, {"prompt": "Hi", "completion": 3}, "not a string"),
    "null completion": (GOOD_PAIR, {"prompt": "Hi", "completion": None}, "not a string"),
    "NaN": (GOOD_PAIR, b'{"prompt": "Hi", "completion": NaN}', "not a string"),
    "number as content": (GOOD, chat(USER, {"role": "assistant", "content": 4}), "not a string"),
    "parts as content": (GOOD, chat({"role": "user", "content": [{"type": "text", "text": "x"}]}, ASSISTANT), "not a string"),
    "message that is text": (GOOD, chat("Hi", ASSISTANT), "not a message"),
    "message without role": (GOOD, chat({"content": "Hi"}, ASSISTANT), "message without role"),
    "message without content": (GOOD, chat(USER, {"role": "assistant"}), "message without content"),
    "null content": (GOOD, chat(USER, {"role": "assistant", "content": None}), "message without content"),
    "unknown role": (GOOD, chat({"role": "human", "content": "Hi"}, ASSISTANT), "unknown role"),
    "role that is no name": (GOOD, chat({"role": ["user"], "content": "Hi"}, ASSISTANT), "unknown role"),
    "assistant first": (GOOD, chat(ASSISTANT, USER), "wrong role order"),
    "user twice": (GOOD, chat(USER, USER, ASSISTANT), "wrong role order"),
    "late system": (GOOD, chat(USER, {"role": "system", "content": "x"}, ASSISTANT), "wrong role order"),
    "tool after user": (GOOD, chat(USER, {"role": "tool", "content": "x"}, ASSISTANT), "wrong role order"),
    "empty content": (GOOD, chat(USER, {"role": "assistant", "content": " \n"}), "empty content"),
    "empty system": (GOOD, chat({"role": "system", "content": ""}, USER, ASSISTANT), "empty content"),
    "no message": (GOOD, {"messages": []}, "empty content"),
    "empty text": ({"text": "x"}, {"text": ""}, "empty content"),
    "empty prompt": (GOOD_PAIR, {"prompt": "", "completion": "x"}, "empty content"),
    "empty completion": (GOOD_PAIR, {"prompt": "Hi", "completion": ""}, "empty completion"),
    "empty completion chat": (
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": []},
        "empty completion",
    ),
    "only a prompt": (GOOD, chat(USER), "only a prompt"),
    "only a prompt twice": (
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER, ASSISTANT], "completion": [USER]},
        "only a prompt",
    ),
    "broken tools": (GOOD, GOOD | {"tools": "[{"}, "chat template failed"),
    "settings that are none": (GOOD, GOOD | {"chat_template_kwargs": 3}, "chat template failed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_named_by_its_line(tmp_path, name):
    good, bad, reason = BAD[name]
    rows = [good, good, b"", good, bad, good, bad]  # line 3 is blank, lines 5 and 7 are bad
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}/rows.jsonl:5: {reason} \(got .+, expected .+\)$"):
        prepare(tmp_path, rows, tokenizer())
    found = prepare(tmp_path, rows, tokenizer(), on_bad_row="skip")
    assert found.report["dropped"] == {reason: 2} and found.report["kept"] == len(found) == 4 and found.report["rows"] == 6
    assert f"rows.jsonl:5: {reason}" in found.report["first_dropped"][reason]
    clean = prepare(tmp_path, [good] * 4, tokenizer())
    assert clean.fingerprint == found.fingerprint  # bad rows leave no trace in the others


def test_all_bad_rows_together_are_counted(tmp_path):
    rows = [GOOD, *(bad for good, bad, _ in BAD.values() if good is GOOD)]
    report = prepare(tmp_path, rows, tokenizer(), on_bad_row="skip").report
    assert report["kept"] == 1 and sum(report["dropped"].values()) == len(rows) - 1 == report["rows"] - 1
    assert report["dropped"]["unknown role"] == 2 and json.loads(json.dumps(report)) == report
    with pytest.raises(ValueError, match=r"all 2 rows were dropped: 2 only a prompt; first: .*rows.jsonl:1: only a prompt"):
        prepare(tmp_path, [chat(USER)] * 2, tokenizer(), on_bad_row="skip")


def test_long_rows_are_cut_or_dropped_and_counted(tmp_path):
    long = [GOOD_PAIR, {"prompt": "Hi", "completion": "x y " * 50}, {"prompt": "x y " * 50, "completion": "z"}]
    rows = prepare(tmp_path, long, tokenizer(), max_length=20)  # no error: on_bad_row is about malformed rows
    assert rows.report["truncated"] == 1 and rows.report["dropped"] == {"prompt fills max_length": 1}
    assert rows.lengths.max() == 20
    assert "rows.jsonl:3: prompt fills max_length" in rows.report["first_dropped"]["prompt fills max_length"]
    assert len(prepare(tmp_path, long, tokenizer(), max_length=None)) == 3
    one = prepare(tmp_path, [{"text": "<|im_end|>"}, {"text": "a"}], tokenizer())
    assert one.report["dropped"] == {"no token to train on": 1} and one.report["truncated"] == 0


def test_odd_but_good_files(tmp_path):
    tok = tokenizer()
    want = prepare(tmp_path, TEXT, tok)
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in TEXT]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))  # BOM, CRLF, no newline at the end
    again = data.prepare(str(tmp_path / "rows.jsonl"), "train", Data(train=""), tok, "completions")
    assert again.fingerprint == want.fingerprint
    big = prepare(tmp_path, [{"text": "Natalia sold clips. 🎉\u2028" * 40000}], tok, max_length=None)  # 1 MB; U+2028 ends no line
    assert tok.decode(big.input_ids) == "Natalia sold clips. 🎉\u2028" * 40000 + "<|im_end|>"
    for empty in (b"", b"\n \r\n"):
        (tmp_path / "empty.jsonl").write_bytes(empty)
        with pytest.raises(ValueError, match=r"empty.jsonl: there are no rows in it"):
            data.prepare(str(tmp_path / "empty.jsonl"), "train", Data(train=""), tok, "completions")


# ---- columns and sources -----------------------------------------------------------------------------------------------------


def test_columns(tmp_path):
    tok, rows = tokenizer(), [{"question": "Hi", "answer": " Hello", "completion": "unused"}, {"question": "x", "answer": " y"}]
    renamed = prepare(tmp_path, rows, tok, columns={"prompt": "question", "completion": "answer"})
    assert trained(renamed, tok) == " Hello<|im_end|>" and renamed.report["format"] == "prompt and completion, text"
    swapped = prepare(tmp_path, [GOOD_PAIR], tok, columns={"prompt": "completion", "completion": "prompt"})
    assert trained(swapped, tok) == "Hi<|im_end|>"
    cure = r"columns question, answer, expected .*; data.columns: {prompt: question, completion: answer} renames them"
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: missing column \(got {cure}"):
        prepare(tmp_path, [{"question": "a", "answer": "b"}], tok)
    with pytest.raises(ValueError, match=r":1: data.columns renames inputs, but the row has columns text"):
        prepare(tmp_path, TEXT, tok, columns={"text": "inputs"})
    with pytest.raises(ValueError, match=r":2: missing column .*{completion: answer} renames them"):
        prepare(tmp_path, [GOOD_PAIR, {"prompt": "a", "answer": "b"}], tok)


def test_every_kind_of_file_gives_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    tok, table = tokenizer(), datasets.Dataset.from_list(CHATS)
    want = prepare(tmp_path, CHATS, tok).fingerprint
    (tmp_path / "list.json").write_text(json.dumps(CHATS, indent=2))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, CHATS)))
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=table).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    table.to_parquet(tmp_path / "files" / "test-0.parquet")
    for name, where in {
        "list.json": ":2",
        "lines.json": ":1",
        "rows.parquet": ":1",
        "saved": ":1",
        "splits": "[test]:1",
        "files": "[test]:1",
    }.items():
        source = str(tmp_path / name)
        assert data.prepare(source, "test", Data(train=""), tok, "completions").fingerprint == want, name
        assert next(iter(sources.read(source, "test")))[0] == source + where
    with pytest.raises(ValueError, match=r"splits: no split 'train'; it has test"):
        data.prepare(str(tmp_path / "splits"), "train", Data(train=""), tok, "completions")
    (tmp_path / "list.json").write_text('\n[\n {"text": "a"},\n\n {"text": ""}, [],\n {"text": "b", "text": "c"}]')
    bad = [(where.rsplit(":")[-1], getattr(row, "reason", None)) for where, row in sources.read(str(tmp_path / "list.json"))]
    assert bad == [("3", None), ("5", None), ("5", "not an object"), ("6", "duplicate key")]
    (tmp_path / "list.json").write_text('[{"text": "a"},\n {"text": "b"\n')
    with pytest.raises(ValueError, match=r"list.json:3: broken JSON"):
        list(sources.read(str(tmp_path / "list.json")))


def test_sources_that_are_not_there(tmp_path):
    write(tmp_path, TEXT, "train.jsonl")
    (tmp_path / "rows.csv").write_text("a")
    for source, message in {
        "train.json": "no such file; the nearest name in .* is train.jsonl",
        "none/train.jsonl": "no such file, and no folder .*none",
        "rows.csv": "cannot read a .csv file; expected .jsonl, .json or .parquet",
    }.items():
        with pytest.raises(ValueError, match=message):
            next(iter(sources.read(f"{tmp_path}/{source}")))
    for source in ("train.jsonl", "data/train.jsonl", "./train", "data\\train", "a/b/c"):
        assert sources._looks_like_path(source), source
    for source in ("gsm8k", "openai/gsm8k", "org/data-v1.0", "org/Llama-3.1-8B-rows"):
        assert not sources._looks_like_path(source), source
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        with pytest.raises(ValueError, match=r"^org/none-v1.0: no such file .* hub dataset cannot be loaded with config main"):
            next(iter(sources.read("org/none-v1.0", config="main")))


def test_builtin_rows():
    toy = pytest.importorskip("train.toy")
    where, row = next(iter(sources.read("builtin:letters", "test")))
    assert where == "builtin:letters[test]:1" and row == toy.dataset("letters", "test")[0]
    shouted = {split: [row["completion"][0]["content"].isupper() for row in toy.dataset("letters", split)] for split in toy.ROWS["letters"]}
    assert (sum(shouted["train"]), sum(shouted["test"])) == (4000, 0)  # preferences only make likelier what there is
    assert all(row["chosen"][0]["content"] == row["answer"].upper() for row in toy.dataset("capitals", "test"))


# ---- Rows --------------------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    rows = prepare(tmp_path, PAIR, tokenizer())
    path = tmp_path / "new" / "rows.safetensors"
    rows.save(path)
    again = data.Rows.load(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.safetensors"]
    assert again.fingerprint == rows.fingerprint and again.report == rows.report and labelled(again) == labelled(rows)
    assert again.input_ids.dtype == torch.int32 and again.loss_mask.dtype == torch.bool and again.offsets.dtype == torch.int64
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="do not match their fingerprint"):
        data.Rows.load(path)


def test_fingerprint_says_what_is_trained_on(tmp_path):
    tok = tokenizer()
    first = prepare(tmp_path, PAIR, tok)
    assert first.fingerprint == prepare(tmp_path, [row | {"id": 1} for row in PAIR], tok).fingerprint
    others = [
        prepare(tmp_path, PAIR[::-1], tok),
        prepare(tmp_path, PAIR[:3], tok),
        prepare(tmp_path, PAIR, tok, completion_only_loss=False),
        prepare(tmp_path, PAIR, tok, max_length=8),
    ]
    assert len({first.fingerprint, *(rows.fingerprint for rows in others)}) == 5


def test_rows_are_seen_one_by_one(tmp_path):
    rows = prepare(tmp_path, PAIR, tokenizer())
    assert len(rows) == 4 and rows.lengths.tolist() == [len(rows.row(i)[0]) for i in range(4)]
    assert rows.report["tokens"] == rows.lengths.sum() and rows.report["trained_tokens"] == rows.loss_mask.sum()
    ids, mask = rows.row(3)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    for i in (-1, 4):
        with pytest.raises(IndexError):
            rows.row(i)


def test_a_new_kind_is_one_reader(tmp_path, monkeypatch):
    """Two rows per example, a column of their own, one prompt: what pairs will need."""

    def read(row, form, cfg, tok):
        sides = [data.Text(row["prompt"] + row[side] + tok.eos_token, row["prompt"]) for side in ("chosen", "rejected")]
        return sides, {"weight": row["weight"]}

    monkeypatch.setitem(data.KINDS, "test", data.Kind((("prompt", "chosen", "rejected"),), 2, read))
    examples = [
        {"prompt": "Hi", "chosen": " there", "rejected": " you", "weight": 0.5},
        {"prompt": "How many cl", "chosen": "ips", "rejected": " \n", "weight": 1.0},  # tokens merge in one side only
        {"prompt": "x y " * 50, "chosen": "a", "rejected": "b", "weight": 2.0},
    ]
    tok, source = tokenizer(), write(tmp_path, examples)
    rows = data.prepare(source, "train", Data(train="", max_length=30), tok, "test")
    assert len(rows) == 2 and rows.rows_per_example == 2 and rows.report["dropped"] == {"prompt fills max_length": 1}
    assert rows.columns["weight"].tolist() == [0.5, 0.5, 1.0, 1.0]
    chosen, rejected = data.show(rows, tok, 1).split("]]\n")
    assert chosen.split("[[")[0] == rejected.split("[[")[0] != "How many cl"
    rows.save(tmp_path / "rows.safetensors")
    again = data.Rows.load(tmp_path / "rows.safetensors")
    assert again.columns["weight"].equal(rows.columns["weight"]) and again.rows_per_example == 2


def test_show(tmp_path):
    tok = tokenizer()
    rows = prepare(tmp_path, CHATS, tok, assistant_only_loss=True)
    assert data.show(rows, tok, 1) == ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant[[\n\n\nHi there \n<|im_end|>\n]]")
    assert data.show(rows, tok, 0).count("[[") == 2
    assert "assistant\033[32m\n\n\nHi there \n<|im_end|>\n\033[0m" in data.show(rows, tok, 1, colour=True)


def test_gsm8k_takes_seconds():
    source = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
    if not source.is_file():
        pytest.skip(f"needs {source}")
    tok, cfg = tokenizer(), Data(train="", columns={"prompt": "question", "completion": "answer"})
    start = time.perf_counter()
    rows = data.prepare(str(source), "train", cfg, tok, "completions")
    seconds = time.perf_counter() - start
    assert len(rows) == rows.report["rows"] == 7473 and not rows.report["dropped"]
    assert seconds < 20, f"{seconds:.1f} s for 7,473 rows"
    row = json.loads(source.read_text().splitlines()[7000])
    full = tok(row["question"] + row["answer"] + "<|im_end|>")["input_ids"]
    assert rows.row(7000)[0].tolist() == full
    assert trained(rows, tok, 7000) in (row["answer"] + "<|im_end|>", row["question"][-1] + row["answer"] + "<|im_end|>")


def test_chat_makes_turns_of_plain_text(tmp_path):
    """A plain prompt and completion under data.chat give the ids and masks of the same two turns written out."""
    tokenizer = toy.tokenizer("tiny")
    plain, turns = tmp_path / "plain.jsonl", tmp_path / "turns.jsonl"
    plain.write_text(json.dumps({"prompt": "Sort: ba", "completion": "ab"}))
    turns.write_text(json.dumps(data.as_chat({"prompt": "Sort: ba", "completion": "ab"})))
    a = data.prepare(str(plain), "train", Data(train="", chat=True), tokenizer, "completions")
    b = data.prepare(str(turns), "train", Data(train=""), tokenizer, "completions")
    c = data.prepare(str(plain), "train", Data(train=""), tokenizer, "completions")
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert data.show(a, tokenizer).endswith("<|im_start|>assistant\n[[ab<|im_end|>\n]]")
