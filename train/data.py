"""Files or hub datasets -> tokenised rows with masks; the row kinds; one decoded example shown.

Ids and masks are those of TRL 1.16's SFTTrainer. Where we depart from it:
- a malformed row is refused or counted with its file and line; TRL crashes later, or trains on what the template makes of it;
- `assistant_only_loss` needs no `{% generation %}` in the chat template: without it, a turn is what the template writes between
  `messages[:i]` with the generation prompt and `messages[:i + 1]`. TRL swaps in a template of its own, or raises. The masks are
  equal for llama3, qwen3 and most others; TRL's own qwen2_5 template also trains the newline that ends the generation prompt;
- a template that rewrites earlier turns is refused under `assistant_only_loss`; TRL trains on its own template's text instead;
- nulls that Arrow puts into messages and tools, as all objects of a column have the same keys there, are left out; TRL renders them;
- a character that ends an assistant turn and is cut into several tokens is trained whole, TRL trains the first of them;
- `completion_only_loss: true` on rows without a prompt is an error, TRL ignores it;
- a row whose only trained token is its first one is dropped: nothing comes before it, so no loss is ever computed there.

A new kind of rows is one entry in `KINDS` and one reader: `(row, form, cfg, tokenizer) -> ([Text, ...], {extra column: number})`.
Other people's columns become TRL's in `formats.py`, before anything else.
"""

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from train import config, formats
from train.sources import BadRow, read, short

CHUNK = 1000  # examples tokenised at once: enough to keep a fast tokenizer's threads busy
AFTER = {  # role: what may come before it; None is the start
    "system": {None},
    "developer": {None, "system"},
    "user": {None, "system", "developer", "assistant", "tool"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
SYNONYMS = {
    "prompt": ("question", "instruction", "input", "query", "problem"),
    "completion": ("answer", "output", "response", "solution", "target"),
    "messages": ("conversations", "conversation", "chat", "dialogue", "dialog"),
    "text": ("content", "document", "body", "story"),
}
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokenised rows end to end: R rows, N tokens. For pairs rows alternate chosen, rejected."""

    input_ids: Tensor  # (N,) int32
    loss_mask: Tensor  # (N,) bool; never True at the first token of a row
    offsets: Tensor  # (R + 1,) int64
    rows_per_example: int  # 1; 2 for pairs
    columns: dict[str, Tensor]  # extras of each row, (R,)
    report: dict  # what was kept, truncated, dropped and why; JSON-able
    fingerprint: str  # sha256 over all tensors above: changes if and only if what is trained on changes
    per_token: dict[str, Tensor] = field(default_factory=dict)  # (N,) each, computed later: ref_logps, score_mask
    constants: dict[str, Tensor] = field(default_factory=dict)  # 0-d each, the same for all rows: temperature
    examples: list[dict] = field(default_factory=list)  # of prompts: the rows as they were read, for the reward functions

    def __len__(self) -> int:
        """Number of examples: rows, or pairs of them."""
        return (len(self.offsets) - 1) // self.rows_per_example

    @cached_property
    def lengths(self) -> Tensor:
        """(R,) int64, tokens of each row."""
        return self.offsets.diff()

    def row(self, i: int) -> tuple[Tensor, Tensor]:
        """Ids (T,) int64 and loss mask (T,) bool of row i; IndexError where there is none."""
        if not 0 <= i < len(self.offsets) - 1:
            raise IndexError(f"row {i} of {len(self.offsets) - 1}")
        cut = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.input_ids[cut].long(), self.loss_mask[cut]

    @classmethod
    def of(cls, input_ids: Tensor, loss_mask: Tensor, offsets: Tensor, columns: dict[str, Tensor]) -> "Rows":
        """Rows that no file was read for."""
        fingerprint = _fingerprint(_tensors(input_ids, loss_mask, offsets, columns), 1)
        return cls(input_ids, loss_mask, offsets, 1, columns, {}, fingerprint)

    def save(self, path: str | Path) -> None:
        """One safetensors file, whole or not there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")  # process numbers repeat across hosts
        head = {"report": json.dumps(self.report), "per_example": str(self.rows_per_example), "fingerprint": self.fingerprint}
        later = {f"per_token.{name}": t for name, t in self.per_token.items()} | {f"constants.{n}": t for n, t in self.constants.items()}
        main = _tensors(self.input_ids, self.loss_mask, self.offsets, self.columns, self.examples)
        save_file(main | later, temporary, metadata=head)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> "Rows":
        """What `save` wrote. ValueError: the file is another one, or the tensors are not those that were saved."""
        with safe_open(path, "pt") as file:
            head, tensors = file.metadata() or {}, load_file(path)
        if not head.keys() >= {"report", "per_example", "fingerprint"}:
            raise ValueError(f"{path}: not a file of prepared rows (its metadata has {', '.join(head) or 'nothing'}); delete it")
        per_example, fingerprint = int(head["per_example"]), head["fingerprint"]

        def group(prefix):
            return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}

        later, constants = group("per_token."), group("constants.")
        if _fingerprint(tensors, per_example) != fingerprint:
            raise ValueError(f"{path}: the tensors do not match their fingerprint, the file is damaged; delete it")
        main = [tensors.pop(name) for name in ("input_ids", "loss_mask", "offsets")]
        examples = json.loads(bytes(tensors.pop("examples", torch.tensor([91, 93])).tolist()))  # else []
        return cls(*main, per_example, group("columns."), json.loads(head["report"]), fingerprint, later, constants, examples)


def _tensors(input_ids: Tensor, loss_mask: Tensor, offsets: Tensor, columns: dict[str, Tensor], examples=()) -> dict[str, Tensor]:
    extras = {f"columns.{name}": tensor for name, tensor in columns.items()}
    if examples:
        extras["examples"] = torch.frombuffer(bytearray(json.dumps(examples).encode()), dtype=torch.uint8)
    return {"input_ids": input_ids, "loss_mask": loss_mask, "offsets": offsets, **extras}


def _fingerprint(tensors: dict[str, Tensor], rows_per_example: int) -> str:
    digest = hashlib.sha256(str(rows_per_example).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f" {name} {tensor.dtype} {len(tensor)} ".encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()


class Text(NamedTuple):
    """What becomes one row."""

    full: str
    prompt: str | None = None  # how `full` begins; what it shares with it is not trained
    spans: list[tuple[int, int]] | None = None  # characters of `full`: nothing else is trained


class Form(NamedTuple):
    """What the first row says of all rows."""

    columns: tuple[str, ...]
    conversational: bool


def _form(row: dict, kind: "Kind", cfg: config.Data, tokenizer) -> Form:
    """ValueError (not BadRow) where no row of this data can be trained on."""
    columns = next((names for names in kind.forms if all(name in row for name in names)), None)
    if columns is None:
        raise ValueError(str(_missing(row, kind.forms)))
    turns = columns[0] in ("messages", "conversations")
    if not isinstance(row[columns[0]], list if turns else str | list):
        expected = "a list of messages" if turns else "text or a list of messages"
        raise BadRow("not a list of messages" if turns else "not a string", f"{short(row[columns[0]])} in {columns[0]}", expected)
    chat, name = isinstance(row[columns[0]], list), tokenizer.name_or_path
    if chat and not tokenizer.chat_template:
        raise ValueError(f"rows are conversations, but the tokenizer {name!r} has no chat template; give it one")
    if not chat and not tokenizer.eos_token:
        raise ValueError(f"the tokenizer {name!r} has no eos_token to end a text with; set one")
    if cfg.assistant_only_loss and not chat:
        raise ValueError(f"data.assistant_only_loss: true needs conversations (got text in {columns[0]}); set it to false")
    if cfg.assistant_only_loss and not tokenizer.is_fast:
        raise ValueError(f"data.assistant_only_loss: true needs a fast tokenizer (got {type(tokenizer).__name__} of {name!r})")
    if kind.read is not completions and (cfg.completion_only_loss is False or cfg.assistant_only_loss):
        name = "assistant_only_loss" if cfg.assistant_only_loss else "completion_only_loss"
        raise ValueError(f"data.{name}: preferences and rewards are learned from whole completions; leave it out")
    if kind.read is completions and cfg.completion_only_loss and "completion" not in columns:
        raise ValueError(f"data.completion_only_loss: true needs prompt and completion (got {columns[0]}); set it to null")
    return Form(columns, chat)


def _missing(row: dict, forms: tuple[tuple[str, ...], ...]) -> BadRow:
    """What the row has, what it should have, and the `data.columns` that would do, as far as that can be guessed."""
    guesses = [{new: next((old for old in (new, *SYNONYMS.get(new, ())) if old in row), None) for new in names} for names in forms]
    guess = max(guesses, key=lambda guess: (None not in guess.values(), sum(old is not None for old in guess.values())))
    renames = ", ".join(f"{new}: {old or 'NAME'}" for new, old in guess.items() if new != old)
    cure = f"data.columns: {{{renames}}} renames them" if renames else ""
    if {"chosen", "rejected"} <= row.keys():
        cure = "from such pairs dpo, simpo, kto and orpo learn: set algorithm"
    return BadRow("missing column", f"columns {', '.join(row)}", " or ".join(" and ".join(names) for names in forms), cure)


def completions(row: dict, form: Form, cfg: config.Data, tokenizer) -> tuple[list[Text], dict]:
    """SFT: prompt and completion, messages, text, or conversations with from/value."""
    if not all(name in row for name in form.columns):
        raise _missing(row, (form.columns,))
    values = [row[name] for name in form.columns]
    for name, value in zip(form.columns, values):
        if not isinstance(value, list if form.conversational else str):
            reason = "not a list of messages" if form.conversational else "not a string"
            raise BadRow(reason, f"{short(value)} in {name}", "what the first row has")
        if not (value if form.conversational else value.strip()):
            raise BadRow("empty completion" if name == "completion" else "empty content", f"{value!r} in {name}", "some text")
    both = len(values) == 2
    if form.conversational:
        messages = values[0] + values[1] if both else values[0]
        return [_chat(row, messages, len(values[0]) if both else 0, cfg, tokenizer)], {}
    full = "".join(values)
    full = full if values[-1].endswith(tokenizer.eos_token) else full + tokenizer.eos_token
    return [Text(full, values[0] if both and cfg.completion_only_loss is not False else None)], {}


def preferences(row: dict, form: Form, cfg: config.Data, tokenizer) -> tuple[list[Text], dict]:
    """A chosen and a rejected answer to one prompt, which may also stand at the beginning of both."""
    if not all(name in row for name in form.columns):
        raise _missing(row, (form.columns,))
    row = explicit(row)
    sides, plain = (row | {"completion": row[name]} for name in ("chosen", "rejected")), form._replace(columns=("prompt", "completion"))
    return [completions(side, plain, cfg, tokenizer)[0][0] for side in sides], {}


def labelled(row: dict, form: Form, cfg: config.Data, tokenizer) -> tuple[list[Text], dict]:
    """One answer to a prompt, labelled good or bad."""
    texts, _ = completions(row, form._replace(columns=("prompt", "completion")), cfg, tokenizer)
    if row.get("label") not in (True, False):  # also 0 and 1; null and NaN are neither
        raise BadRow("label is not true or false", short(row.get("label")), "true or false in label")
    return texts, {"desirable": bool(row["label"])}


def prompts(row: dict, form: Form, cfg: config.Data, tokenizer) -> tuple[list[Text], dict]:
    """A prompt that is to be answered; the other columns are for the reward functions."""
    prompt = row.get("prompt")
    if not isinstance(prompt, list if form.conversational else str):
        raise BadRow("not a list of messages" if form.conversational else "not a string", f"{short(prompt)} in prompt", "as the first row")
    if not (prompt if form.conversational else prompt.strip()):
        raise BadRow("empty prompt", repr(prompt), "some text")
    try:
        json.dumps(row)
    except (TypeError, ValueError) as error:
        raise BadRow("not JSON", str(error), "columns of text, numbers, lists and objects") from error
    if not form.conversational:
        return [Text(prompt)], {}
    messages, options = _messages(prompt), row.get("chat_template_kwargs") or {}
    with _rendering():
        more = {"tools": _tools(row), "tokenize": False, "add_generation_prompt": True, **options}
        return [Text(tokenizer.apply_chat_template(messages, **more))], {}


def explicit(row: dict) -> dict:
    """A preference row with its prompt in a column of its own: what both answers begin with, by turns or by characters."""
    chosen, rejected = row["chosen"], row["rejected"]
    for name in ("chosen", "rejected"):
        if not isinstance(row[name], str | list) or type(row[name]) is not type(chosen):
            raise BadRow("not a string", f"{short(row[name])} in {name}", "two texts, or two lists of messages")
    if chosen == rejected:
        raise BadRow("chosen equals rejected", short(chosen), "two different answers")
    if "prompt" in row:
        return row
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)) - 1)
    if isinstance(chosen, str) and shared > 0 and chosen[shared - 1] == " ":
        shared -= 1  # the space belongs to the answer's first token
    if shared < 1:
        raise BadRow("no shared prompt", short(chosen), "chosen and rejected that begin with the same prompt, or a prompt column")
    return row | {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def unpaired(row: dict) -> list[dict]:
    """A preference row as a good and a bad labelled row; any other row as it is."""
    if "label" in row or not {"chosen", "rejected"} <= row.keys():
        return [row]
    row = explicit(row)
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}  # the prompt, tools, template settings
    return [rest | {"completion": row[side], "label": side == "chosen"} for side in ("chosen", "rejected")]


def _chat(row: dict, messages: list, prompt_turns: int, cfg: config.Data, tokenizer) -> Text:
    """The first `prompt_turns` messages are the prompt; with 0 there is none."""
    messages, spans = _messages(messages), None
    if not any(message["role"] == "assistant" for message in messages[prompt_turns:]):
        raise BadRow("only a prompt", ", ".join(message["role"] for message in messages), "an assistant message after the prompt")
    options = row.get("chat_template_kwargs") or {}
    with _rendering():
        tools = _tools(row)

        def render(turns, **more):
            return tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **more, **options)

        full = render(messages)
        masked = prompt_turns and cfg.completion_only_loss is not False
        prompt = render(messages[:prompt_turns], add_generation_prompt=True) if masked else None
        template = tokenizer.get_chat_template(tools=tools)
        if cfg.assistant_only_loss and GENERATION.search(template):
            names = {"chat_template": template, **tokenizer.special_tokens_map, **options}
            spans = render_jinja_template([messages], tools=tools, return_assistant_tokens_mask=True, **names)[1][0]
        elif cfg.assistant_only_loss:
            spans = _prefix_spans(messages, full, render, tokenizer)
    if spans is not None and not any(start < end for start, end in spans):
        raise BadRow("no assistant text", "nothing inside {% generation %}", "assistant text there", "mend the chat template")
    return Text(full, prompt, spans)


def _tools(row: dict) -> list | None:
    """What the row's messages may call: JSON schemas, or their JSON text."""
    return json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")


@contextmanager
def _rendering():
    """BadRow for whatever a template raises on a row that it does not like."""
    try:
        yield
    except BadRow:
        raise
    except Exception as error:
        expected = "messages, tools (a list, or JSON) and chat_template_kwargs that it can render"
        raise BadRow("chat template failed", f"{type(error).__name__}: {error}", expected) from error


TURNS = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}


def as_chat(row: dict, turns: dict[str, str] = TURNS) -> dict:
    """The row with each plain prompt and answer as one turn of a conversation."""
    return row | {k: [{"role": role, "content": row[k]}] for k, role in turns.items() if isinstance(row.get(k), str)}


def with_system(row: dict, text: str) -> dict:
    """The row with a system message before all others."""
    names = next((names for names in (("prompt",), ("messages",), ("chosen", "rejected")) if names[0] in row), ())
    for name in names:
        if not isinstance(row[name], list):
            raise BadRow("not a conversation", f"{short(row[name])} in {name}", "messages for data.system_prompt", "set data.chat: true")
        if any(isinstance(message, dict) and message.get("role") == "system" for message in row[name]):
            raise BadRow("two system messages", f"data.system_prompt and one in {name}", "one of them")
    return row | {name: [{"role": "system", "content": text}, *row[name]] for name in names}


def _messages(messages: list) -> list[dict]:
    """The messages without their null fields, which templates would render as text. BadRow: what no template should be given."""
    cleaned, previous = [], None
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRow("not a message", f"{short(message)} as message {number}", "an object with role and content")
        message = {key: value for key, value in message.items() if value is not None}
        if "from" in message and "role" not in message:
            message = {{"from": "role", "value": "content"}.get(key, key): value for key, value in message.items()}
        role, content = message.get("role"), message.get("content")
        keys = f"{', '.join(message) or 'nothing'} in message {number}"
        if role is None:
            raise BadRow("message without role", keys, "role and content")
        if not isinstance(role, str) or role not in AFTER:
            cure = "rename it in the file: human is user, gpt and model are assistant; data.format: sharegpt does so in conversations"
            raise BadRow("unknown role", f"{role!r} in message {number}", ", ".join(AFTER), cure)
        if content is None and not message.get("tool_calls"):
            raise BadRow("message without content", keys, "role and content")
        if content is not None and not isinstance(content, str):
            raise BadRow("not a string", f"{short(content)} as content of message {number}", "text")
        if not (content or "").strip() and role != "tool" and not message.get("tool_calls"):
            raise BadRow("empty content", f"{content!r} in message {number} ({role})", "some text", "leave an empty message out")
        if previous not in AFTER[role]:
            got = f"{role} after {previous or 'nothing'} as message {number}"
            raise BadRow("wrong role order", got, f"{role} after {' or '.join(sorted(map(str, AFTER[role])))}")
        cleaned.append(message)
        previous = role
    return cleaned


def _prefix_spans(messages: list[dict], full: str, render: Callable, tokenizer) -> list[tuple[int, int]]:
    """(start, end) characters of `full` for each assistant turn, what ends the turn included: what the template adds to the
    messages before it and the generation prompt. BadRow where the template writes earlier turns otherwise once others follow."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:i], add_generation_prompt=True)
            after = full if i + 1 == len(messages) else render(messages[: i + 1])
            if not (full.startswith(after) and after.startswith(before)):
                got = f"the template of {tokenizer.name_or_path!r} changes message {i + 1} of {len(messages)}"
                cure = "give it {% generation %} marks, or train on prompt and completion with assistant_only_loss: false"
                raise BadRow("chat template rewrites earlier turns", got, "the same text whatever follows", cure)
            spans.append((len(before), len(after)))
    return spans


class Kind(NamedTuple):
    forms: tuple[tuple[str, ...], ...]  # the columns that make a row; the first form that the first row has is taken
    rows_per_example: int
    read: Callable
    expand: Callable = lambda row: [row]  # one row of the file -> the rows that are read


KINDS = {
    "completions": Kind((("prompt", "completion"), ("messages",), ("text",), ("conversations",)), 1, completions),
    "pairs": Kind((("prompt", "chosen", "rejected"), ("chosen", "rejected")), 2, preferences),
    "labelled": Kind((("prompt", "completion", "label"),), 1, labelled, unpaired),
    "prompts": Kind((("prompt",),), 1, prompts),
}


class _Store:
    """Growing token arrays, five bytes a token, and the counts of the report."""

    def __init__(self):
        self.ids, self.mask, self.offsets, self.columns = array("i"), bytearray(), array("q", [0]), {}
        self.examples = []
        self.count = Counter(kept=0, truncated=0, bos_doubled=0, boundary_moved=0)
        self.dropped, self.first = Counter(), {}

    def drop(self, where: str, reason: str, message: str) -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, f"{where}: {message}")


def prepare(source: str, split: str, cfg: config.Data, tokenizer, kind: str, limit: int | None = None) -> Rows:
    """All rows of one source, or the first `limit`, tokenised and masked.

    ValueError: a malformed row unless `on_bad_row` is skip, no row left, or a setting that does not fit the rows. Rows whose prompt
    alone fills `max_length` are no error: they are dropped and counted."""
    plan, store, form, pending = KINDS[kind], _Store(), None, []
    for where, row in islice(rows_of(source, split, cfg), limit):
        try:
            if isinstance(row, BadRow):
                raise row
            if cfg.format:
                row = formats.convert(row, cfg.format, kind, cfg.chat)
            elif form is None and (name := formats.wanted(row, plan.forms)):
                raise ValueError(f"the columns {', '.join(row)} are {name}'s; set data.format: {name}")
            row = as_chat(row, {"prompt": "user"} if kind == "prompts" else TURNS) if cfg.chat else row
            row = with_system(row, cfg.system_prompt) if cfg.system_prompt else row
            for one in plan.expand(row):
                form = form or _form(one, plan, cfg, tokenizer)
                pending.append((where, *plan.read(one, form, cfg, tokenizer), one if kind == "prompts" else None))
        except BadRow as bad:
            if cfg.on_bad_row == "error":
                raise ValueError(f"{where}: {bad}") from bad
            store.drop(where, bad.reason, str(bad))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if len(pending) >= CHUNK:
            _tokenise(pending, store, form, cfg, tokenizer)
            pending = []
    if pending:
        _tokenise(pending, store, form, cfg, tokenizer)
    return _rows(source, split, form, plan, store, tokenizer)


def sources_of(cfg: config.Data, part: str) -> list[tuple[str, str, config.Data]]:
    """(source, split, its own settings) of each source of data.train, or of data.eval, which is read as the first of train's is."""
    names = cfg.train if isinstance(cfg.train, list) else [cfg.train]
    shared = cfg.train_split, cfg.config, cfg.format
    own = [[value[i] if isinstance(value, list) else value for value in shared] for i in range(len(names))]
    if part == "eval":
        return [(cfg.eval, cfg.eval_split, replace(cfg, config=own[0][1], format=own[0][2], max_rows=None))]
    return [(name, split, replace(cfg, config=subset, format=form)) for name, (split, subset, form) in zip(names, own)]


def rows_of(source: str, split: str, cfg: config.Data) -> Iterator:
    """What `sources.read` yields of one source."""
    return read(source, split, cfg.config, cfg.columns, cfg.max_rows, isinstance(cfg.train, list))


def epoch_of(sizes: list[int], weights: list[float] | None) -> list[int]:
    """Examples of each source in an epoch. With weights: the fewest that have their shares, to the nearest example, and leave none out."""
    unit = max(size / weight for size, weight in zip(sizes, weights or sizes))
    return [round(unit * weight) for weight in weights or sizes]


def mix(parts: list[Rows], weights: list[float] | None, seed: int) -> Rows:
    """The epoch of several sources, one after the other. A source that is needed more than once is there whole as often as it goes,
    then in part: which of its examples come once more is drawn from (seed, number of the source), for the whole run."""
    if len(parts) == 1:
        return parts[0]
    chosen, counts = [], epoch_of([len(part) for part in parts], weights)
    for number, (part, count) in enumerate(zip(parts, counts)):
        drawn = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed + number))[: count % len(part)]
        chosen.append(torch.cat([torch.arange(len(part)).repeat(count // len(part)), drawn.sort().values]))
    ids, mask, lengths, columns = zip(*map(_take, parts, chosen))
    columns = {name: torch.cat([own[name] for own in columns]) for name in columns[0]}
    tensors = torch.cat(ids), torch.cat(mask), torch.cat([torch.zeros(1, dtype=torch.int64), *lengths]).cumsum(0), columns
    examples = [part.examples[i] for part, own in zip(parts, chosen) if part.examples for i in own.tolist()]
    shares = zip(parts, counts)
    report = {
        "epoch": [f"{n} of {part.report['source']} ({n / sum(counts):.1%}, its {len(part)} x {n / len(part):.4g})" for part, n in shares],
        "kept": sum(counts),
        "tokens": len(tensors[0]),
        "trained_tokens": int(tensors[1].sum()),
        "max_token_id": max(part.report["max_token_id"] for part in parts),
    }
    k = parts[0].rows_per_example
    return Rows(*tensors[:3], k, columns, report, _fingerprint(_tensors(*tensors, examples), k), examples=examples)


def _take(rows: Rows, examples: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Ids (N,), mask (N,), lengths (R,) and columns of these examples' rows."""
    k = rows.rows_per_example
    index = (examples[:, None] * k + torch.arange(k)).flatten()  # (R,)
    lengths = rows.lengths[index]  # (R,)
    tokens = torch.arange(int(lengths.sum())) + (rows.offsets[index] - lengths.cumsum(0) + lengths).repeat_interleave(lengths)  # (N,)
    return rows.input_ids[tokens], rows.loss_mask[tokens], lengths, {name: column[index] for name, column in rows.columns.items()}


def _tokenise(examples: list, store: _Store, form: Form, cfg: config.Data, tokenizer) -> None:
    """Appends the examples to `store`, or counts why not. One call of the tokenizer for the texts, one for the prompts."""
    texts = [text for _, own, _, _ in examples for text in own]
    options = {"add_special_tokens": not form.conversational, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer([text.full for text in texts], return_offsets_mapping=cfg.assistant_only_loss, **options)
    prompts = [text.prompt for text in texts if text.prompt is not None]
    prompts = iter(tokenizer(prompts, **options)["input_ids"] if prompts else ())
    encoded = zip(encoded["input_ids"], encoded["offset_mapping"] if cfg.assistant_only_loss else repeat(()))
    for where, own, extras, raw in examples:
        ids, places = zip(*islice(encoded, len(own)))
        heads = [(next(prompts), full) for text, full in zip(own, ids) if text.prompt is not None]
        shared = [_common_prefix(head, full) for head, full in heads]
        start = min(shared, default=0)  # the rows of a pair have one prompt
        masks = [_mask(text, full, place, start) for text, full, place in zip(own, ids, places)]
        if raw is not None:  # a prompt: nothing of it is trained, and it is never cut
            if cfg.max_length is not None and len(ids[0]) > cfg.max_length:
                store.drop(where, "prompt longer than max_length", f"got {len(ids[0])} tokens, data.max_length {cfg.max_length}")
                continue
            masks = [np.zeros(len(ids[0]), dtype=bool)]
            store.examples.append(raw)
        elif not all(mask[: cfg.max_length].any() for mask in masks):
            reason = "prompt fills max_length" if all(mask.any() for mask in masks) else "no token to train on"
            store.drop(where, reason, f"{reason} (got {max(map(len, ids))} tokens, max_length {cfg.max_length})")
            continue
        for full, mask in zip(ids, masks):
            store.ids.extend(full[: cfg.max_length])
            store.mask += mask[: cfg.max_length].tobytes()
            store.offsets.append(len(store.ids))
        for name, value in extras.items():
            store.columns.setdefault(name, []).extend([value] * len(own))
        store.count["kept"] += 1
        store.count["truncated"] += any(full != full[: cfg.max_length] for full in ids)
        store.count["bos_doubled"] += any(full[:2] == [tokenizer.bos_token_id] * 2 for full in ids)
        store.count["boundary_moved"] += any(n < len(head) for n, (head, _) in zip(shared, heads))


def _mask(text: Text, ids: list[int], places: list[tuple[int, int]], start: int) -> np.ndarray:
    """(T,) bool: tokens that have a character in one of the spans (all tokens without spans), from token `start` on.

    places: (T, 2) first and past-the-last character of each token."""
    mask = np.full(len(ids), text.spans is None)  # (T,)
    places = np.asarray(places, dtype=np.int64).reshape(-1, 2)  # (T, 2)
    for first, end in text.spans or ():
        mask |= (places[:, 0] < end) & (places[:, 1] > first)
    mask[: max(start, 1)] = False  # nothing comes before the first token, so it is no target
    return mask


def _common_prefix(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _rows(source: str, split: str, form: Form | None, plan: Kind, store: _Store, tokenizer) -> Rows:
    count, dropped = store.count, sum(store.dropped.values())
    if not count["kept"]:
        reasons = ", ".join(f"{number} {reason}" for reason, number in store.dropped.most_common())
        raise ValueError(f"{source}: all {dropped} rows were dropped: {reasons}; first: {next(iter(store.first.values()))}")
    ids = torch.frombuffer(store.ids, dtype=torch.int32)  # (N,)
    mask = torch.frombuffer(store.mask, dtype=torch.bool)  # (N,)
    offsets = torch.frombuffer(store.offsets, dtype=torch.int64)  # (R + 1,)
    columns = {name: torch.tensor(values) for name, values in store.columns.items()}  # (R,) each
    trained_eos = 0 if tokenizer.eos_token_id is None else int((mask & (ids == tokenizer.eos_token_id)).sum())
    bos, eos, moved = tokenizer.bos_token, tokenizer.eos_token, "rows where the prompt alone is not how the whole begins: its last"
    warnings = {
        f"{count['bos_doubled']} rows begin with {bos} twice: the text has one and the tokenizer adds one": count["bos_doubled"],
        f"{count['boundary_moved']} {moved} tokens are trained on": count["boundary_moved"],
        f"no row trains {eos}: unless turns end with another token, the model will not learn to stop": not (trained_eos or store.examples),
    }
    report = {
        "source": source,
        "split": split,
        "format": f"{' and '.join(form.columns)}, {'conversations' if form.conversational else 'text'}",
        "rows": count["kept"] + dropped,
        **count,
        "dropped": dict(store.dropped),
        "first_dropped": store.first,
        "tokens": len(ids),
        "trained_tokens": int(mask.sum()),
        "trained_eos": trained_eos,
        "max_token_id": int(ids.max()),
        "warnings": [text for text, wanted in warnings.items() if wanted],
    }
    fingerprint = _fingerprint(_tensors(ids, mask, offsets, columns, store.examples), plan.rows_per_example)
    return Rows(ids, mask, offsets, plan.rows_per_example, columns, report, fingerprint, examples=store.examples)


def scoring_prompts(rows: Rows) -> Rows:
    """Pairs whose chosen rows are to be scored whole, prompt included: adds `score_mask`."""
    mask = rows.loss_mask.clone()  # (N,)
    for first, end in zip(rows.offsets[:-1:2].tolist(), rows.offsets[1::2].tolist()):
        mask[first + 1 : end] = True
    return replace(rows, per_token=rows.per_token | {"score_mask": mask})


def with_mismatched(rows: Rows, max_length: int | None) -> Rows:
    """Each row followed by a mismatched one: its prompt with the completion of the nearest row before it that has another prompt.

    Rows 2i and 2i + 1 make example i. ValueError where all rows have one prompt.
    """
    cuts = list(zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist()))
    starts = [first + int(rows.loss_mask[first:end].int().argmax()) for first, end in cuts]
    prompts = [rows.input_ids[first:start] for (first, _), start in zip(cuts, starts)]
    ids, masks = [], []
    for i, (first, end) in enumerate(cuts):
        other = next((j % len(cuts) for j in range(i - 1, i - len(cuts), -1) if not torch.equal(prompts[j], prompts[i])), None)
        if other is None:
            raise ValueError("data.train: KTO's baseline needs two different prompts; or set kto.loss_type: apo_zero_unpaired")
        completion = rows.input_ids[starts[other] : cuts[other][1]]
        mixed = torch.cat([prompts[i], completion])[:max_length]  # (T,)
        ids += [rows.input_ids[first:end], mixed]
        masks += [rows.loss_mask[first:end], torch.arange(len(mixed)) >= len(prompts[i])]
    offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)  # (2R + 1,)
    columns = {name: column.repeat_interleave(2) for name, column in rows.columns.items()}
    tensors = (torch.cat(ids), torch.cat(masks), offsets)
    return Rows(*tensors, 2, columns, rows.report, _fingerprint(_tensors(*tensors, columns), 2))


def show(rows: Rows, tokenizer, i: int = 0, colour: bool = False) -> str:
    """Example i decoded, special tokens included, trained tokens in [[...]] (or in green)."""
    left, right = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    lines = []
    for number in range(i * rows.rows_per_example, (i + 1) * rows.rows_per_example):
        ids, mask = rows.row(number)
        edges = (mask[1:] != mask[:-1]).nonzero().flatten() + 1
        runs = zip(ids.tensor_split(edges), mask.tensor_split(edges))
        decoded = ((tokenizer.decode(run, skip_special_tokens=False), bool(trained[0])) for run, trained in runs)
        lines.append("".join(f"{left}{text}{right}" if trained else text for text, trained in decoded))
    return "\n".join(lines)
