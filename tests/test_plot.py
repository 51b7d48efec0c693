"""launch/plot.py on runs that are written as training writes them."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="pip install -e '.[plot]'")
from launch import plot


@pytest.fixture
def runs(tmp_path):
    """Two runs: a long one with held-out values, and one that is still writing its third line."""
    for name, steps in (("long", 250), ("short", 2)):
        (tmp_path / name).mkdir()
        lines = [{"step": i, "loss": 2.0 / i, "grad_norm": 1.0, "rows": "0a", "tokens_per_second": 9.0} for i in range(1, steps + 1)]
        lines[-1]["eval/loss"] = 0.5
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    return [str(tmp_path / "long"), str(tmp_path / "short")]


def test_curves(runs, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (drawn.append(self), save(self, *args, **more)))
    monkeypatch.setattr("sys.argv", ["plot.py", *runs, "--output", str(tmp_path / "x.png")])
    plot.main()
    assert Path(tmp_path, "x.png").read_bytes().startswith(b"\x89PNG")
    axes = {axis.get_title(): axis for axis in drawn[0].axes}
    assert list(axes) == ["loss", "grad_norm", "tokens_per_second"] and axes["tokens_per_second"].get_ylabel() == "tokens/s"
    raw, smooth, held_out, short, _ = axes["loss"].lines
    assert raw.get_ydata()[9] == 0.2 and smooth.get_ydata()[9] == pytest.approx(sum(2.0 / i for i in range(8, 13)) / 5)
    assert ([*held_out.get_xdata()], [*held_out.get_ydata()], [*short.get_ydata()]) == ([250], [0.5], [2.0, 1.0])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["long", "long, held-out", "short", "short, held-out"]


def test_legend_of_all_panels(tmp_path, monkeypatch):
    """Runs of one name are told apart; what only the second panel shows is explained, and each line once."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: drawn.append(self))
    first, second = {"loss": ([1], [2.0])}, {"loss": ([1], [3.0]), "rewards/accuracies": ([1], [0.5]), "eval/exact_match": ([1], [0.5])}
    plot.draw({"a/dpo": first, "b/dpo/": second, "b/simpo": first}, None, tmp_path / "x.png")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a/dpo", "b/dpo", "b/dpo, held-out", "simpo"]
    assert [axis.get_ylim() for axis in drawn[0].axes[1:]] == [(-0.05, 1.05)] * 2  # shares


def test_names():
    assert plot.names_of(["runs/dpo", "runs/simpo"]) == {"runs/dpo": "dpo", "runs/simpo": "simpo"}
    assert plot.names_of(["x/a/dpo", "y/a/dpo"]) == {"x/a/dpo": "x/a/dpo", "y/a/dpo": "y/a/dpo"}
    here = str(Path.cwd().name)
    assert plot.names_of(["dpo", "a/dpo", "."]) == {"dpo": f"{here}/dpo", "a/dpo": "a/dpo", ".": here}
    assert plot.names_of(["dpo", "dpo/"]) == {"dpo": "dpo", "dpo/": "dpo"}


def test_axes_are_labelled_for_every_algorithm():
    """A quantity, then its unit where it has one; a log-prob is an answer's or a token's, so the label says neither."""
    for name, label in plot.SHOWN.items():
        assert label and not label.startswith("of "), name
    assert plot.SHOWN["logps/chosen"] == plot.SHOWN["logps/rejected"] == "mean log-prob, nats"


def test_refusals(runs, tmp_path):
    plot.draw({runs[0]: {"eval/loss": ([250], [0.5])}}, ["loss"], tmp_path / "x.png")  # held-out values alone are enough
    with pytest.raises(ValueError, match="no run has los; there are eval/loss, grad_norm, loss, tokens_per_second"):
        plot.draw({runs[0]: plot.read(runs[0])}, ["los"], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"nothing has no metrics\.jsonl; name the output_dir of a run"):
        plot.read(str(tmp_path / "nothing"))
