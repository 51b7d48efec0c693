"""The trackers, each by its own library, without a network: what a run wrote is read back from there."""

import html
import json
import subprocess
import sys
from pathlib import Path

import pytest

from train import config, trackers

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"seed": 7, "train": {"learning_rate": 0.5}}


def opened(name, folder, first=1):
    return trackers.open_all(folder, config.Log(report_to=[name], project="tests", run_name="first"), SETTINGS, first)[0]


def killed_and_resumed(name, folder):
    """Steps 1 and 2, then from a second opening, as of a run that goes on, step 3; with one sample."""
    folder.mkdir()
    one = opened(name, folder)
    for step in (1, 2):
        one.scalars(step, {"loss": 1.0 / step, "rewards/margins": 2.0 * step})
    one.samples(2, [{"prompt": "a", "answer": "b", "match": True}])
    one.close()
    two = opened(name, folder, first=3)
    two.scalars(3, {"loss": 0.25})
    two.close()


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed_and_resumed("tensorboard", tmp_path / "run")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    texts = {tag: board.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in board.Tags()["tensors"]}
    assert "| train.learning_rate | 0.5 |" in texts["settings/text_summary"] and "**answer**: b" in texts["samples/0/text_summary"]


def test_settings_that_look_like_a_table():
    """Shown letter by letter in a cell of their own, by TensorBoard's own renderer."""
    from tensorboard.plugin_util import markdown_to_safe_html

    for text in ("a|b", "*a*_b_", "`<b>`", r"\d+\*"):
        cells = markdown_to_safe_html(f"| setting | value |\n|---|---|\n| x | {trackers.escaped(text)} |").split("<td>")
        assert html.unescape(cells[2].partition("</td>")[0]) == text


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions would rather have a database
    killed_and_resumed("mlflow", tmp_path / "run")
    client = mlflow.MlflowClient(f"file:{tmp_path}/store")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert run.data.params == {"seed": "7", "train.learning_rate": "0.5"} and run.info.run_name == "first"
    assert run.data.metrics["rewards/margins"] == 4.0
    assert [f.path for f in client.list_artifacts(run.info.run_id, "samples")] == ["samples/2.jsonl"]


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    killed_and_resumed("wandb", tmp_path / "run")
    number = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))
    assert len(files) == 2, "both openings are one run"
    records = [record for path in files for record in wandb_records(path)]
    steps = [{".".join(i.nested_key): i.value_json for i in r.history.item} for r in records if r.HasField("history")]
    assert [(s["_step"], s["loss"]) for s in steps] == [("1", "1"), ("2", "0.5"), ("3", "0.25")]
    assert (steps[1]["rewards/margins"], steps[1]["samples.nrows"]) == ("4", "1")
    begun = next(r.run for r in records if r.HasField("run"))
    assert (begun.display_name, begun.project) == ("first", "tests")
    assert {u.key: u.value_json for u in begun.config.update}["train"] == '{"learning_rate":0.5}'


def wandb_records(path):
    """The records of a .wandb file: blocks of 32 KiB, in them a checksum (4 bytes), a length (2), the part it is (1), and a message."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, part = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        message, at = message + data[at + 7 : at + 7 + size], at + 7 + size
        if part in (1, 4):  # whole, or the last part
            yield Record.FromString(message)
            message = b""


def test_trackio(tmp_path):
    pytest.importorskip("trackio", reason="pip install trackio")
    code = f"""if True:
        import trackio
        from pathlib import Path
        from tests.train.test_trackers import killed_and_resumed
        killed_and_resumed("trackio", Path({str(tmp_path / "run")!r}))
        from trackio.sqlite_storage import SQLiteStorage
        (run,) = trackio.Api().runs("tests")
        assert run.config["train.learning_rate"] == 0.5
        print([(row["step"], row["loss"]) for row in SQLiteStorage.get_logs("tests", run.name) if "loss" in row])"""
    environment = {"TRACKIO_DIR": str(tmp_path / "store"), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": ""}  # read at import
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["[(1, 1.0), (2, 0.5), (3, 0.25)]"], run.stdout + run.stderr


def test_a_missing_library_is_refused_with_its_cure(monkeypatch):
    for name, (module, package) in {name: t.library for name, t in trackers.TRACKERS.items()}.items():
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        with pytest.raises(ValueError, match=rf"log.report_to: {module.partition('.')[0]} is not installed .*: pip install {package}"):
            trackers.check(config.Log(report_to=[name]))
    trackers.check(config.Log(report_to=[]))


def test_nothing_is_imported_that_was_not_named():
    code = "import sys, train.trackers, train.log; print({'wandb', 'mlflow', 'trackio'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
