"""Files, folders and hub datasets -> rows, each with where it stands, so that every complaint about a row can name its line."""

import codecs
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets

from train import toy

GAP = re.compile(r"[\s,]*")
NESTED = ("prompt", "completion", "messages", "conversations", "chosen", "rejected", "tools")  # columns of messages and of schemas


class BadRow(ValueError):
    """One malformed row. `reason` is what it is counted under; the message adds what was got, expected, and the cure."""

    def __init__(self, reason: str, got: object, expected: str, cure: str = ""):
        self.reason = reason
        super().__init__(f"{reason} (got {got}, expected {expected}{'; ' + cure if cure else ''})")


def read(
    source: str,
    split: str = "train",
    config: str | None = None,
    columns: dict[str, str] | None = None,
    max_rows: int | None = None,
    mixed: bool = False,
) -> Iterator:
    """Yields (where, row): where is "file.jsonl:LINE", "file.parquet:ROW" or "name[split]:ROW", row a dict, or the BadRow that
    says why it is none. `columns` renames, new name to the file's; the first `max_rows` alone are read. ValueError: nothing to
    read, or the first row lacks a column that `columns` names; one of several sources (mixed) may lack all of them."""
    where, first = None, True
    for where, row in islice(_source(source, split, config, streaming=max_rows is not None), max_rows):
        if isinstance(row, dict):
            absent = [old for old in (columns or {}).values() if old not in row]
            if first and absent and not (mixed and len(absent) == len(columns)):
                raise ValueError(f"{where}: data.columns renames {', '.join(absent)}, but the row has columns {', '.join(row)}")
            if columns:
                kept = {key: value for key, value in row.items() if key not in columns and key not in columns.values()}
                row = kept | {new: row[old] for new, old in columns.items() if old in row}
            first = False
        yield where, row
    if where is None:
        raise ValueError(f"{source}: there are no rows in it")


def _source(source: str, split: str, config: str | None, streaming: bool) -> Iterator:
    path, name = Path(source).expanduser(), f"{source}[{split}]"
    if source.startswith("builtin:"):
        rows = toy.dataset(source.removeprefix("builtin:"), split)
    elif path.is_file():
        if path.suffix in (".jsonl", ".json"):
            yield from (_json_lines if path.suffix == ".jsonl" else _json_file)(path, source)
            return
        if path.suffix != ".parquet":
            raise ValueError(f"{source}: cannot read a {path.suffix or 'suffix-less'} file; expected .jsonl, .json or .parquet")
        with open(path, "rb") as file:
            if file.read(4) != b"PAR1":
                raise ValueError(f"{source}: not a Parquet file; write it anew, or name it .jsonl or .json if it holds JSON")
        rows, name = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=streaming), source
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        rows = datasets.load_from_disk(str(path))
        if isinstance(rows, datasets.DatasetDict) and split not in rows:
            raise ValueError(f"{source}: no split {split!r}; it has {', '.join(rows)}")
        rows, name = (rows[split], name) if isinstance(rows, datasets.DatasetDict) else (rows, source)
    elif not path.exists() and _looks_like_path(source):
        raise ValueError(f"{source}: {_nearest(path)}")
    else:
        try:
            rows = datasets.load_dataset(source, config, split=split, streaming=streaming)
        except Exception as error:  # dozens of types, from network to parsing: all mean that the name, split or config is wrong
            what = "folder" if path.is_dir() else "no such file or folder, and the hub dataset"
            raise ValueError(f"{source}: {what} cannot be loaded with config {config}, split {split}: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"{name}:{number}", {key: _filled(value) if key in NESTED else value for key, value in row.items()}


def _filled(value: object) -> object:
    """Without the nulls that Arrow puts where an object lacks a key that another one has, and templates would render."""
    if isinstance(value, dict):
        return {key: _filled(one) for key, one in value.items() if one is not None}
    return [_filled(one) for one in value] if isinstance(value, list) else value


def _looks_like_path(source: str) -> bool:
    suffix = re.search(r"\.[A-Za-z]\w*$", source)  # not the .0 of org/name-v1.0
    return bool(suffix) or source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"no such file, and no folder {path.parent}"
    names = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1, 0)
    return "no such file" + (f"; the nearest name in {path.parent} is {names[0]}" if names else f"; {path.parent} is empty")


def _json_lines(path: Path, source: str) -> Iterator:
    with open(path, "rb") as file:  # bytes: only \n ends a line, and a bad byte has a line number
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield f"{source}:{number}", _decode(line.strip())[0]


def _json_file(path: Path, source: str) -> Iterator:
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not data.lstrip().startswith(b"["):
        yield from _json_lines(path, source)
        return
    try:
        text = data.decode()
        json.loads(text)  # from here on, the commas are known to be in place
    except (ValueError, RecursionError) as error:
        line = data.count(b"\n", 0, getattr(error, "start", 0)) + 1
        raise ValueError(f"{source}:{getattr(error, 'lineno', line)}: broken JSON ({error}); expected a list of objects") from None
    line, last, position = 1, 0, text.index("[") + 1
    while text[position := GAP.match(text, position).end()] != "]":
        line, last = line + text.count("\n", last, position), position
        row, position = _decode(text, position)
        assert position > last, row  # broken JSON ends at 0; the check above has seen to that
        yield f"{source}:{line}", row


def _decode(text: str | bytes, position: int = 0) -> tuple[dict | BadRow, int]:
    """The object at `position` (for bytes: it must be all there is), or the BadRow that says why there is none, and its end."""
    repeated = []

    def pairs(items):
        if len(row := dict(items)) < len(items):
            repeated.append(next(key for key, count in Counter(key for key, _ in items).items() if count > 1))
        return row

    try:
        line = text.decode() if isinstance(text, bytes) else text
        row, end = json.JSONDecoder(object_pairs_hook=pairs).raw_decode(line, position)
        if "\\u" in line[position:end]:  # "\ud83d" alone is half a character, which no tokenizer takes
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"byte {error.object[error.start]:#04x} at {error.start + 1}", "UTF-8 text"), 0
    except UnicodeEncodeError as error:
        return BadRow("not Unicode text", f"{error.object[error.start]!r}, half a character", "whole characters"), end
    except (ValueError, RecursionError) as error:
        return BadRow("broken JSON", error, "one JSON object on a line"), 0
    if isinstance(text, bytes) and line[end:].strip():
        return BadRow("broken JSON", f"{short(line[end:])} after the object", "one JSON object on a line"), end
    if not isinstance(row, dict):
        return BadRow("not an object", short(row), 'a JSON object such as {"text": ...}'), end
    if repeated:
        return BadRow("duplicate key", f"{repeated[0]!r} twice in one object", "each key once"), end
    return row, end


def short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
