"""ShareGPT's and Alpaca's rows against TRL's preparation of the same rows in its own columns; tools; what is refused, and the cure."""

import json

import datasets
import pytest
from test_data import TOOL, labelled, tokenizer, trained, trl_rows, trl_template, write

from train import data, formats, toy
from train.config import Data

datasets.disable_progress_bars()

SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Add 2 and 3"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "5"},
        {"from": "gpt", "value": "It is 5.", "weight": None},
    ],
    "system": "Be brief.",
    "tools": json.dumps([TOOL["function"]]),
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add 2 and 3"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "It is 5."},
]
ALPACA = {"instruction": "Sort", "input": "ba", "output": "ab"}
TOOLS = (  # a template of our own: it shows the tools, the calls and what came of them
    "{% if tools %}<|im_start|>system\n{{ tools[0].function.name }}?<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}@{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prepare(folder, rows, tok, kind="completions", **settings):
    return data.prepare(write(folder, rows), "train", Data(train="", **settings), tok, kind)


def with_tools():
    made = toy.tokenizer("tiny")
    made.chat_template = TOOLS
    return made


def test_sharegpt_by_hand(tmp_path):
    """In the embedded tokenizer <|im_end|> is 0, <|im_start|> 1, user 5, assistant 6, a newline 10, and a letter its code less 21."""
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    made = prepare(tmp_path, rows, toy.tokenizer("tiny"), format="sharegpt", assistant_only_loss=True)
    ids, mask = made.row(0)
    assert ids.tolist() == [1, 5, 10, 76, 0, 10, 1, 6, 10, 77, 0, 10]
    assert mask.tolist() == [False] * 9 + [True] * 3


def test_sharegpt_equals_trls_own_columns(tmp_path):
    tok = tokenizer(trl_template("qwen2_5"))
    ours = prepare(tmp_path, [SHAREGPT], tok, format="sharegpt")
    assert labelled(ours) == [(ids, labels[1:]) for ids, labels in trl_rows([{"messages": MESSAGES, "tools": [TOOL]}], tok, tmp_path)]
    datasets.Dataset.from_list([SHAREGPT]).to_parquet(tmp_path / "rows.parquet")
    again = data.prepare(str(tmp_path / "rows.parquet"), "train", Data(train="", format="sharegpt"), tok, "completions")
    assert again.fingerprint == ours.fingerprint


def test_sharegpt_preferences_labels_and_prompts(tmp_path):
    """Each as the same row in TRL's columns."""
    asked, answers = SHAREGPT | {"conversations": SHAREGPT["conversations"][:-1]}, {"chosen": "It is 5.", "rejected": "Six"}
    theirs = {"prompt": MESSAGES[:-1], "tools": [TOOL]}
    ended = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    for sides in (
        {side: {"from": "gpt", "value": text} for side, text in answers.items()},
        {side: [{"role": "assistant", "content": text}] for side, text in answers.items()},
    ):
        for kind in ("pairs", "labelled"):
            ours = prepare(tmp_path, [asked | sides], with_tools(), kind, format="sharegpt")
            assert ours.fingerprint == prepare(tmp_path, [theirs | ended], with_tools(), kind).fingerprint
    ours = prepare(tmp_path, [SHAREGPT | {"label": True}], with_tools(), "labelled", format="sharegpt")
    row = theirs | {"completion": MESSAGES[-1:], "label": True}
    assert ours.fingerprint == prepare(tmp_path, [row], with_tools(), "labelled").fingerprint
    for row in (SHAREGPT, asked):
        ours = prepare(tmp_path, [row], with_tools(), "prompts", format="sharegpt")
        assert ours.input_ids.equal(prepare(tmp_path, [theirs], with_tools(), "prompts").input_ids)


def test_alpaca_by_hand(tmp_path):
    text = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    text += "### Instruction:\nSort\n\n"
    tok = toy.tokenizer("tiny")
    plain = prepare(tmp_path, [ALPACA, ALPACA | {"input": ""}, {"instruction": "Sort", "output": "ab"}], tok, format="alpaca")
    paired = text.format(", paired with an input that provides further context") + "### Input:\nba\n\n### Response:\n"
    short = text.format("") + "### Response:\n"
    assert [data.show(plain, tok, i) for i in range(3)] == [f"{paired}[[ab<|im_end|>]]", *[f"{short}[[ab<|im_end|>]]"] * 2]
    chat = prepare(tmp_path, [ALPACA | {"system": "s", "history": [["Sort", "hm"]]}], tok, format="alpaca", chat=True)
    turns = (("system", "s"), ("user", "Sort"), ("assistant", "hm"), ("user", "Sort\nba"))
    before = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
    assert data.show(chat, tok) == f"{before}<|im_start|>assistant\n[[ab<|im_end|>\n]]"


@pytest.mark.parametrize("chat", [False, True])
def test_alpaca_equals_trls_own_columns(tmp_path, chat):
    tok, user = tokenizer(), "Sort\nba"
    rows = [{"prompt": formats.alpaca(ALPACA, "completions", False)["prompt"], "completion": "ab"}]
    if chat:
        rows = [{"prompt": [{"role": "user", "content": user}], "completion": [{"role": "assistant", "content": "ab"}]}]
    ours = prepare(tmp_path, [ALPACA], tok, format="alpaca", chat=chat)
    assert labelled(ours) == [(ids, labels[1:]) for ids, labels in trl_rows(rows, tok, tmp_path)]
    sides = {"chosen": "ab", "rejected": "ba"}
    preferred = {"instruction": "Sort", "input": "ba"} | sides
    for kind in ("pairs", "labelled"):
        ours = prepare(tmp_path, [preferred], tok, kind, format="alpaca", chat=chat)
        want = prepare(tmp_path, [{"prompt": rows[0]["prompt"]} | sides], tok, kind, chat=chat)
        assert ours.fingerprint == want.fingerprint
    prompts = prepare(tmp_path, [ALPACA | {"answer": "ab"}], tok, "prompts", format="alpaca", chat=chat)
    assert prompts.examples[0]["prompt"] == rows[0]["prompt"] and prompts.examples[0]["answer"] == "ab"


def test_tools_are_shown_and_their_results_never_trained(tmp_path):
    want = (
        "<|im_start|>system\nadd?<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd 2 and 3<|im_end|>\n"
        '<|im_start|>assistant\n[[@add{"a": 2}<|im_end|>\n]]<|im_start|>tool\n5<|im_end|>\n'
        "<|im_start|>assistant\n[[It is 5.<|im_end|>\n]]"
    )
    for tools in ([TOOL], json.dumps([TOOL])):
        rows = prepare(tmp_path, [{"messages": MESSAGES, "tools": tools}], with_tools(), assistant_only_loss=True)
        assert data.show(rows, with_tools()) == want
    rows = prepare(tmp_path, [SHAREGPT], with_tools(), format="sharegpt", assistant_only_loss=True)
    assert data.show(rows, with_tools()) == want and trained(rows, with_tools()).count("5") == 1
    two = [MESSAGES[2]["tool_calls"][0], {"type": "function", "function": {"name": "mul", "arguments": {"b": 3}}}]
    both = [{"messages": [*MESSAGES[:2], {"role": "assistant", "tool_calls": two, "content": ""}], "tools": [TOOL]}]
    datasets.Dataset.from_list(both).to_parquet(tmp_path / "rows.parquet")  # where each call has both arguments, one of them null
    made = data.prepare(str(tmp_path / "rows.parquet"), "train", Data(train=""), with_tools(), "completions")
    assert made.fingerprint == prepare(tmp_path, both, with_tools()).fingerprint
    for kind, row in (("completions", {"messages": MESSAGES}), ("prompts", {"prompt": MESSAGES[:2]})):
        with pytest.raises(ValueError, match=r"rows.jsonl:1: chat template failed \(got JSONDecodeError"):
            prepare(tmp_path, [row | {"tools": "[{"}], with_tools(), kind)


def turn(**what):
    return {"conversations": [{"from": "human", "value": "a"}, what]}


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        (
            "sharegpt",
            ALPACA,
            "missing column (got columns instruction, input, output, expected conversations; data.columns: {conversations: NAME}",
        ),
        ("sharegpt", {"conversations": "a"}, "not a list of messages (got str 'a' in conversations"),
        ("sharegpt", {"conversations": []}, "not a list of messages (got list [] in conversations"),
        ("sharegpt", {"conversations": ["a"]}, "not a message (got str 'a' as turn 1 of conversations"),
        ("sharegpt", turn(value="a"), "unknown role (got NoneType None in turn 2 of conversations, expected system, human"),
        ("sharegpt", turn(**{"from": "narrator", "value": "a"}), "unknown role (got str 'narrator' in turn 2"),
        ("sharegpt", turn(**{"from": "gpt"}), "message without content (got role in message 2"),
        ("sharegpt", turn(**{"from": "gpt", "value": "a", "weight": 0}), "weighted turn (got weight 0 in turn 2"),
        ("sharegpt", turn(**{"from": "function_call", "value": "add(2)"}), "broken function call (got str 'add(2)' in turn 2"),
        ("sharegpt", turn(**{"from": "human", "value": "b"}), "wrong role order (got user after user as message 2"),
        ("sharegpt", SHAREGPT | {"tools": "[{"}, "broken tools (got str '[{', expected a list of JSON schemas"),
        ("sharegpt", SHAREGPT | {"system": 3}, "not a string (got int 3 as content of message 1"),
        ("alpaca", {"prompt": "a", "completion": "b"}, "missing column (got columns prompt, completion, expected instruction and output"),
        ("alpaca", ALPACA | {"input": 3}, "not a string (got int 3 in input"),
        ("alpaca", ALPACA | {"instruction": " "}, "empty content (got ' ' in instruction"),
        ("alpaca", ALPACA | {"output": None}, "not a string (got NoneType None in completion"),
        (
            "alpaca",
            ALPACA | {"system": "s"},
            "not plain text (got system, expected instruction, input and output alone; set data.chat: true",
        ),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, name, row, problem):
    good = SHAREGPT if name == "sharegpt" else ALPACA
    with pytest.raises(ValueError) as error:
        prepare(tmp_path, [good, row], with_tools(), format=name)
    assert f"rows.jsonl:2: {problem}" in str(error.value)
    report = prepare(tmp_path, [good, row], with_tools(), format=name, on_bad_row="skip").report
    assert report["kept"] == 1 and report["dropped"] == {problem.partition(" (")[0]: 1}


@pytest.mark.parametrize(
    ("row", "kind", "name"),
    [
        (ALPACA, "completions", "alpaca"),
        ({"instruction": "a", "chosen": "b c", "rejected": "b d"}, "pairs", "alpaca"),
        ({"instruction": "a", "chosen": "b c", "rejected": "b d"}, "labelled", "alpaca"),
        (SHAREGPT, "completions", "sharegpt"),  # whose system message would be left out
        (SHAREGPT | {"chosen": {}, "rejected": {}}, "pairs", "sharegpt"),
        (SHAREGPT, "prompts", "sharegpt"),
    ],
)
def test_the_line_to_add(tmp_path, row, kind, name):
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: the columns .* are {name}'s; set data.format: {name}$"):
        prepare(tmp_path, [row], tokenizer(), kind)


def test_what_needs_no_format(tmp_path):
    assert len(prepare(tmp_path, [ALPACA | {"text": "Sort ba: ab"}], tokenizer())) == 1
    with pytest.raises(ValueError, match=r"data\.format: sharegpt does so in conversations"):
        prepare(tmp_path, [turn(**{"from": "gpt", "value": "b"})], tokenizer())
