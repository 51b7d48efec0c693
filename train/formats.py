"""Rows in ShareGPT's and Alpaca's columns -> rows in TRL's, by `data.format`.

ShareGPT's are read as LLaMA-Factory and axolotl write them: `conversations` of {from, value}, beside it perhaps `system`, `tools`
(JSON), `chosen` and `rejected` (one turn each, or several). Alpaca's have `instruction`, `output` (or `chosen` and `rejected`), and
perhaps `input`, `system` and `history` ([[question, answer], ...]).
"""

import json

from train.sources import BadRow, short

ROLES = {"system": "system", "human": "user", "user": "user", "observation": "tool", "tool": "tool"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "model", "assistant", "function_call"), "assistant")
ALPACA = (  # Stanford's, with the newline at its end that torchtune and axolotl have
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)


def convert(row: dict, name: str, kind: str, chat: bool) -> dict:
    """The row in TRL's columns for rows of this kind; columns of other names stay."""
    return sharegpt(row, kind) if name == "sharegpt" else alpaca(row, kind, chat)


def wanted(row: dict, forms: tuple[tuple[str, ...], ...]) -> str | None:
    """The `data.format` that a row seems to need; None where its columns are TRL's, or nobody's."""
    known = next((names for names in forms if all(name in row for name in names)), ())
    if known not in ((), ("chosen", "rejected"), ("conversations",)):
        return None
    if isinstance(row.get("conversations"), list) and (not known or {"chosen", "system"} & row.keys()):
        return "sharegpt"
    return "alpaca" if "instruction" in row and {"output", "chosen"} & row.keys() else None


def sharegpt(row: dict, kind: str) -> dict:
    """messages; for preferences prompt, chosen and rejected; for labelled rows and prompts the last answer apart from its prompt."""
    _require(row, ("conversations", "chosen", "rejected") if kind == "pairs" else ("conversations",))
    rest, turns = _without(row, "conversations", "system", "tools"), _turns(row, "conversations")
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    if row.get("tools"):
        rest["tools"] = _tools(row["tools"])
    if kind != "completions" and {"chosen", "rejected"} <= row.keys():
        return rest | {"prompt": turns} | {side: _turns(row, side) for side in ("chosen", "rejected")}
    if kind == "completions":
        return rest | {"messages": turns}
    return rest | ({"prompt": turns[:-1], "completion": turns[-1:]} if turns[-1]["role"] == "assistant" else {"prompt": turns})


def _turns(row: dict, column: str) -> list[dict]:
    turns = [row[column]] if isinstance(row[column], dict) else row[column]
    if not isinstance(turns, list) or not turns:
        raise BadRow("not a list of messages", f"{short(turns)} in {column}", "turns with from and value")
    return [_turn(turn, f"turn {number} of {column}") for number, turn in enumerate(turns, 1)]


def _turn(turn: object, place: str) -> dict:
    if not isinstance(turn, dict):
        raise BadRow("not a message", f"{short(turn)} as {place}", "an object with from and value")
    who, said = (turn.get("from", turn.get("role")), turn.get("value", turn.get("content")))
    if not isinstance(who, str) or who not in ROLES:
        raise BadRow("unknown role", f"{short(who)} in {place}", ", ".join(ROLES))
    if turn.get("weight") not in (None, 1):
        raise BadRow("weighted turn", f"weight {turn['weight']} in {place}", "none: assistant turns count alike")
    rest = _without(turn, "from", "value", "role", "content", "weight")
    return rest | {"role": ROLES[who], **(_calls(said, place) if who == "function_call" else {"content": said})}


def _calls(said: object, place: str) -> dict:
    """What a function_call says, {name, arguments} or a list of them as JSON, as transformers has it."""
    try:
        calls = json.loads(said)
        calls = [(call["name"], call["arguments"]) for call in (calls if isinstance(calls, list) else [calls])]
        made = [{"name": name, "arguments": json.loads(given) if isinstance(given, str) else given} for name, given in calls]
    except (TypeError, ValueError, KeyError) as error:
        raise BadRow("broken function call", f"{short(said)} in {place}", "JSON with name and arguments") from error
    return {"content": "", "tool_calls": [{"type": "function", "function": function} for function in made]}


def _tools(tools: object) -> list | None:
    """A list of {"type": "function", "function": {name, description, parameters}}; the inner object alone is wrapped."""
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise BadRow("broken tools", short(tools), "a list of JSON schemas, or its JSON text") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("broken tools", short(tools), "a list of JSON schemas, or its JSON text")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def alpaca(row: dict, kind: str, chat: bool) -> dict:
    """prompt and completion, or chosen and rejected. Plain text is Stanford's prompt; with chat, instruction and input are the user's
    turn, after the system message and the history."""
    preferred = kind != "completions" and {"chosen", "rejected"} <= row.keys()
    answers = {"chosen", "rejected"} if preferred or kind == "pairs" else () if kind == "prompts" else ("output",)
    _require(row, ("instruction", *sorted(answers)))
    instruction, given = row["instruction"], row.get("input") or ""
    for name, value in (("instruction", instruction), ("input", given)):
        if not isinstance(value, str):
            raise BadRow("not a string", f"{short(value)} in {name}", "text")
    if not instruction.strip():
        raise BadRow("empty content", f"{instruction!r} in instruction", "some text")
    rest, system, history = _without(row, "instruction", "input", "output", "system", "history"), row.get("system"), row.get("history")
    if "output" in row and not preferred:
        rest["completion"] = row["output"]
    if not chat and (system or history):
        cure = "set data.chat: true, which makes turns of them"
        raise BadRow("not plain text", "system" if system else "history", "instruction, input and output alone", cure)
    if not chat:
        context = ", paired with an input that provides further context" if given else ""
        return rest | {"prompt": ALPACA.format(context, instruction, f"### Input:\n{given}\n\n" if given else "")}
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history or ()):
        raise BadRow("broken history", short(history), "pairs of question and answer")
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": role, "content": text} for pair in history or () for role, text in zip(("user", "assistant"), pair)]
    return rest | {"prompt": [*turns, {"role": "user", "content": f"{instruction}\n{given}" if given else instruction}]}


def _require(row: dict, names: tuple[str, ...]) -> None:
    if absent := [name for name in names if name not in row]:
        cure = f"data.columns: {{{absent[0]}: NAME}} renames one, or change data.format"
        raise BadRow("missing column", f"columns {', '.join(row)}", " and ".join(names), cure)


def _without(row: dict, *names: str) -> dict:
    return {name: value for name, value in row.items() if name not in names}
