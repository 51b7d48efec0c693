"""Several sources in one epoch, the first rows of a source, and a chat template by file: prepared, in a dry run, in a run, on resume."""

from collections import Counter
from dataclasses import replace

import datasets
import pytest
from test_data import write
from transformers import AutoTokenizer

from launch.train import ALGORITHMS
from models import load
from tests.conftest import plain
from train import config, data, dry_run, sources, toy
from train.config import Data

datasets.disable_progress_bars()
BIG = [{"text": letter * (i + 1)} for i, letter in enumerate("abcdef")]
SMALL = [{"text": "ij"}, {"text": "ji"}]


def mixed(cfg, seed=0, kind="completions"):
    tok = toy.tokenizer("tiny")
    return data.mix([data.prepare(*source, tok, kind) for source in data.sources_of(cfg, "train")], cfg.weights, seed)


def texts(rows):
    return [toy.tokenizer("tiny").decode(rows.row(i)[0][:-1]) for i in range(len(rows.offsets) - 1)]


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path, BIG, "big.jsonl"), write(tmp_path, SMALL, "small.jsonl")]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [(None, [6, 2]), ([1, 1], [6, 6]), ([3, 1], [6, 2]), ([1, 3], [6, 18]), ([2, 1], [6, 3]), ([30, 1], [60, 2]), ([0.6, 0.25], [6, 2])],
)
def test_an_epoch_has_the_shares_and_all_rows(files, weights, counts):
    """By hand, of six rows and two: the fewest examples with these shares that leave no row out; 6 : 2.5 is nearest to 6 : 2."""
    assert data.epoch_of([6, 2], weights) == counts
    rows = mixed(Data(train=files, weights=weights))
    said = Counter(texts(rows))
    assert [sum(said[row["text"]] for row in part) for part in (BIG, SMALL)] == counts and len(rows) == sum(counts)
    for part, count in zip((BIG, SMALL), counts):  # no row more than once more than another
        assert {said[row["text"]] for row in part} <= {count // len(part), -(-count // len(part))}
    assert rows.report["kept"] == len(rows) and [line.split()[0] for line in rows.report["epoch"]] == [str(n) for n in counts]


def test_whole_repetitions_are_those_of_one_file(files, tmp_path):
    """To the bit: ids, masks and their order."""
    for weights, rows in ((None, BIG + SMALL), ([1, 1], BIG + SMALL * 3)):
        one = mixed(Data(train=write(tmp_path, rows)))
        assert mixed(Data(train=files, weights=weights)).fingerprint == one.fingerprint


def test_the_remainder_is_drawn_from_the_seed(files):
    cfg = Data(train=files, weights=[2, 1])
    found = {tuple(texts(mixed(cfg, seed))) for seed in range(8)}
    assert found == {tuple([row["text"] for row in BIG] + ["ij", "ji", extra]) for extra in ("ij", "ji")}
    assert mixed(cfg, 3).fingerprint == mixed(cfg, 3).fingerprint


def test_fingerprint_says_which_mix(files, tmp_path):
    cfg = Data(train=files, weights=[1, 1])
    others = [{"train": files[::-1]}, {"weights": [1, 2]}, {"weights": None}, {"train": [files[0]] * 2}]
    prints = {mixed(replace(cfg, **other)).fingerprint for other in ({}, *others)}
    write(tmp_path, SMALL[::-1], "small.jsonl")
    assert len(prints | {mixed(cfg).fingerprint}) == 6


def test_pairs_labels_and_prompts_stay_together(tmp_path):
    pairs = [{"prompt": "a", "chosen": letter, "rejected": letter * 2} for letter in "bcd"]
    cfg = Data(train=[write(tmp_path, pairs, "a.jsonl"), write(tmp_path, pairs[:1], "b.jsonl")], weights=[1, 2])
    rows = mixed(cfg, kind="pairs")
    assert texts(rows) == ["ab", "abb", "ac", "acc", "ad", "add"] + ["ab", "abb"] * 6 and len(rows) == 9
    rows.save(tmp_path / "rows.safetensors")
    assert data.Rows.load(tmp_path / "rows.safetensors").fingerprint == rows.fingerprint
    assert mixed(cfg, kind="labelled").columns["desirable"].tolist() == [True, False] * 9
    rows = mixed(cfg, kind="prompts")
    assert [row["chosen"] for row in rows.examples] == ["b", "c", "d", *["b"] * 6] and len(rows) == 9


def test_each_source_has_its_own_format_and_columns(tmp_path):
    alpaca = {"instruction": "Sort", "input": "ba", "output": "ab"}
    asked = [{"prompt": "Sort\nba", "completion": "ab"}] * 2
    train = [write(tmp_path, [alpaca], "alpaca.jsonl"), write(tmp_path, [{"question": "Sort\nba", "answer": "ab"}], "asked.jsonl")]
    cfg = Data(train=train, format=["alpaca", None], columns={"prompt": "question", "completion": "answer"}, chat=True, eval=train[0])
    assert mixed(cfg).fingerprint == mixed(Data(train=write(tmp_path, asked), chat=True)).fingerprint
    ((source, split, one),) = data.sources_of(replace(cfg, max_rows=1), "eval")
    assert (source, split, one.format, one.max_rows) == (train[0], "test", "alpaca", None)
    write(tmp_path, [{"question": "a"}], "asked.jsonl")
    with pytest.raises(ValueError, match=r"asked.jsonl:1: data.columns renames answer, but the row has columns question"):
        mixed(cfg)


def test_the_first_rows_alone_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = write(tmp_path, [*BIG[:2], b"{broken"])
    want = mixed(Data(train=write(tmp_path, BIG[:2], "two.jsonl"))).fingerprint
    table = datasets.Dataset.from_list(BIG)
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "hub").mkdir()
    table.to_parquet(tmp_path / "hub" / "train-0.parquet")
    asked, load_dataset = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: asked.append(more["streaming"]) or load_dataset(*args, **more))
    for source in (lines, str(tmp_path / "rows.parquet"), str(tmp_path / "hub")):
        assert mixed(Data(train=source, max_rows=2)).fingerprint == want, source
    assert asked == [True, True]
    assert [where for where, _ in sources.read(str(tmp_path / "hub"), max_rows=2)] == [f"{tmp_path}/hub[train]:{i}" for i in (1, 2)]
    assert len(mixed(Data(train=[lines, str(tmp_path / "rows.parquet")], max_rows=2))) == 4


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"train": "a", "weights": [1]}, "data.weights: got [1], expected no list for one source"),
        ({"train": ["a", "b"], "weights": [1]}, "data.weights: got [1], expected 2 of them, one a source of data.train"),
        ({"train": ["a", "b"], "weights": [1, 0]}, "data.weights: got [1, 0], expected numbers above 0"),
        ({"train": ["a", "b"], "format": ["alpaca"]}, "data.format: got ['alpaca'], expected 2 of them"),
        ({"train": "a", "config": ["main"]}, "data.config: got ['main'], expected no list for one source"),
        ({"train": "a", "max_rows": 0}, "data.max_rows: got 0, expected a number from 1 up"),
    ],
)
def test_settings_that_do_not_fit(settings, problem):
    with pytest.raises(ValueError) as error:
        Data(**settings)
    assert str(error.value).startswith(problem)


def options(folder, files, more=()):
    base = {"output_dir": f"{folder}/run", "model.model_name_or_path": "builtin:tiny", "data.train": files, "log.report_to": []}
    return base | {"train.max_steps": 2, "train.global_batch_size": 4, "checkpoint.save_steps": 1} | dict(more)


def test_the_command_line_and_the_dry_run(files, tmp_path):
    argv = [f"--{name}={value}" for name, value in options(tmp_path, f"[{', '.join(files)}]").items() if name != "train.max_steps"]
    argv += ["--data.weights=[2, 1]", "--data.format=[null, null]", "--data.eval=null", "--evaluation.generate=0"]
    cfg = config.parse([*argv, "--train.max_steps=null"])
    assert cfg.data.train == files and cfg.data.weights == [2.0, 1.0] and cfg.data.format == [None, None]
    said = "\n".join(dry_run.describe(cfg, ALGORITHMS["sft"], 2, "cpu"))
    assert f"an epoch: 6 examples of {files[0]}, 3 examples of {files[1]}" in said and said.count("data.train: source") == 2
    tokens = sum(len(row["text"]) + 1 for row in BIG) + 3 * 3  # an end a row; all rows of the small source are three tokens long
    assert f"run: 9 examples, 3 steps of 4, 1 micro-batches a rank and step, {3 * 4 * tokens // 9:,} tokens" in said


def test_a_run_goes_on_in_its_second_epoch(files, tmp_path, train_here):
    """Stopped after step 2 of 5, where an epoch has 3: the same examples and losses as without the stop."""
    more = {"data.weights": [2, 1], "train.max_steps": 5, "train.lr_scheduler_type": "constant"}
    (tmp_path / "whole").mkdir()
    whole = train_here(options(tmp_path / "whole", files, more))
    train_here(options(tmp_path, files, more | {"train.max_steps": 2}))
    parts = train_here(options(tmp_path, files, more))
    assert [plain(row) for row in parts] == [plain(row) for row in whole] and len({row["rows"] for row in whole}) == 5


def test_a_run_and_what_resume_refuses(files, tmp_path, train_here, capsys):
    train_here(options(tmp_path, files, {"data.weights": [2, 1], "train.max_steps": 1}))
    said = capsys.readouterr().out
    assert f"epoch ['6 of {files[0]} (66.7%, its 6 x 1)', '3 of {files[1]} (33.3%, its 2 x 1.5)']" in said
    assert f"on {files[0]}, {files[1]} (9 examples)" in (tmp_path / "run" / "final" / "README.md").read_text()
    longer = {"train.max_steps": 2, "train.lr_scheduler_type": "linear"}
    for changes in ({"data.train": files[::-1], "data.weights": [1, 2]}, {"data.weights": [1, 1]}, {"seed": 1}):
        with pytest.raises(ValueError, match=r"checkpoint of step 1 was made with other settings") as error:
            train_here(options(tmp_path, files, {"data.weights": [2, 1]} | longer | changes))
        assert all(f"{name}: " in str(error.value) for name in changes)
        assert "seed" in changes or "data.train: the tokenised rows differ" in str(error.value)


def test_a_chat_template_by_file(tmp_path, train_here):
    mine = tmp_path / "mine.jinja"
    mine.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chats = write(tmp_path, [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 4)
    settings = options(tmp_path, chats, {"model.chat_template_path": str(mine), "train.max_steps": 1})
    train_here(settings)
    rows, tok = data.Rows.load(tmp_path / "run" / "data" / "train.safetensors"), AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert data.show(rows, tok) == "user: a<|im_end|>assistant: [[b<|im_end|>]]" and tok.chat_template == mine.read_text()
    mine.write_text(mine.read_text().replace(": {{", " {{"))
    with pytest.raises(ValueError, match=r"data\.train: the tokenised rows differ"):
        train_here(settings)
    with pytest.raises(ValueError, match=r"^model\.chat_template_path: 'none\.jinja' cannot be read: No such file or directory$"):
        train_here(settings | {"model.chat_template_path": "none.jinja", "output_dir": f"{tmp_path}/other"})
    found = dry_run.tokenizer_of(config.Model("builtin:tiny", chat_template_path=str(mine)))
    assert found.chat_template == mine.read_text() == load.with_template(toy.tokenizer("tiny"), mine).chat_template


def test_template_by_file_equals_trl(tmp_path):
    """TRL's chat_template_path and ours, on the same rows."""
    trl = pytest.importorskip("trl")
    from test_data import CHATS, MARKED, labelled, tiny, tokenizer

    mine = tmp_path / "mine.jinja"
    mine.write_text(MARKED)
    args = {"output_dir": str(tmp_path / "trl"), "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    args = trl.SFTConfig(**args, chat_template_path=str(mine), assistant_only_loss=True)
    tok = tokenizer()
    theirs = trl.SFTTrainer(tiny(len(tok)), args, train_dataset=datasets.Dataset.from_list(CHATS), processing_class=tok).train_dataset
    cfg = Data(train="", assistant_only_loss=True)
    ours = data.prepare(write(tmp_path, CHATS), "train", cfg, load.with_template(tokenizer(), str(mine)), "completions")
    assert labelled(ours) == [(row["input_ids"], row["labels"][1:]) for row in theirs]
