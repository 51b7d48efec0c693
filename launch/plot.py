"""Curves of one or several runs in one PNG: `python launch/plot.py runs/dpo runs/simpo [--output curves.png] [--metrics loss grad_norm]`.

Reads each run's metrics.jsonl, also while it is being written. Held-out values are dots, everything else is a line, smoothed where a run
is long, with the raw one faint behind it. Needs matplotlib: pip install -e '.[plot]'.
"""

import argparse
import json
import math
import sys
from pathlib import Path

SHOWN = {  # metric: what its axis is called; those that no run has are left out
    "loss": "loss",
    "nll_loss": "nats a token",
    "reward": "reward",
    "frac_reward_zero_std": "of prompts, share",
    "rewards/chosen": "reward, nats",
    "rewards/rejected": "reward, nats",
    "rewards/margins": "reward margin, nats",
    "rewards/accuracies": "pairs ranked right, share",
    "log_odds_chosen": "log odds ratio, nats",
    "logps/chosen": "of good answers, nats",
    "logps/rejected": "of bad answers, nats",
    "exact_match": "answers right, share",
    "mean_token_accuracy": "likeliest tokens, share",
    "grad_norm": "gradient norm",
    "completions/mean_length": "completion length, tokens",
    "kl": "KL from the reference, nats",
    "entropy": "entropy, nats",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens/s",
    "peak_memory_gib": "peak memory, GiB",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output_dir of a run")
    parser.add_argument("--output", default="curves.png", help="file to write; its suffix says the format")
    parser.add_argument("--metrics", nargs="+", help="names in metrics.jsonl, instead of the usual ones that the runs have")
    args = parser.parse_args()
    try:
        draw({run: read(run) for run in args.runs}, args.metrics, args.output)
    except ValueError as e:
        sys.exit(f"plot.py: {e}")
    print(f"wrote {args.output}")


def read(run):
    """{metric: ([steps], [values])} of a run's metrics.jsonl."""
    path, curves = Path(run, "metrics.jsonl"), {}
    if not path.exists():
        raise ValueError(f"{run} has no metrics.jsonl; name the output_dir of a run")
    for line in path.read_text().splitlines(keepends=True):
        for name, value in json.loads(line).items() if line.endswith("\n") else ():  # the last line may be half-written
            if isinstance(value, (int, float)) and name != "step":
                steps, values = curves.setdefault(name, ([], []))
                steps.append(json.loads(line)["step"])
                values.append(value)
    return curves


def smoothed(values, width):
    """Means of what lies within `width` before and behind each value."""
    return [sum(near) / len(near) for near in (values[max(0, i - width) : i + width + 1] for i in range(len(values)))]


def draw(runs, metrics, output):
    """One panel a metric, one colour a run. ValueError: a metric that no run has, or no matplotlib."""
    try:
        import matplotlib
    except ImportError as e:
        raise ValueError("needs matplotlib: pip install -e '.[plot]'") from e
    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    known = {name for curves in runs.values() for name in curves}
    if unknown := [name for name in metrics or () if not {name, f"eval/{name}"} & known]:
        raise ValueError(f"no run has {unknown[0]}; there are {', '.join(sorted(known))}")
    names = metrics or [name for name in SHOWN if {name, f"eval/{name}"} & known]
    last = max((steps[-1] for curves in runs.values() for steps, _ in curves.values()), default=1)
    if not names:
        raise ValueError(f"{', '.join(runs)}: no step is written yet")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)  # inches
    for axis, name in zip(axes.flat, names):
        for (run, curves), colour in zip(runs.items(), pyplot.get_cmap("tab10").colors * len(runs)):
            steps, values = curves.get(name, ((), ()))
            width = len(values) // 100
            axis.plot(steps, values, color=colour, alpha=0.25 if width else 1, label=None if width else Path(run).name)
            if width:
                axis.plot(steps, smoothed(values, width), color=colour, label=Path(run).name)
            held_out = curves.get(f"eval/{name}", ((), ()))
            axis.plot(*held_out, "o:", color=colour, label=f"{Path(run).name}, held-out" if held_out[0] else None)
        axis.set(xlabel="step", ylabel=SHOWN.get(name, name), title=name, xlim=(-0.03 * last, 1.03 * last))
        if SHOWN.get(name, "").endswith("share"):
            axis.set_ylim(-0.05, 1.05)
        axis.grid(alpha=0.3)
        if name == "learning_rate":
            axis.ticklabel_format(axis="y", scilimits=(0, 0))
    for axis in axes.flat[len(names) :]:
        axis.remove()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(output, dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
