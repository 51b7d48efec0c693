import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train import batches, loop
from train.checkpoint import prune
from train.data import Rows


def rows(lengths, per_example=1):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])
    return Rows(torch.arange(total).int(), torch.ones(total, dtype=torch.bool), offsets, per_example, {}, {}, "")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 200), st.integers(1, 5))
def test_every_example_is_dealt_once(lengths, budget, ranks):
    dealt = batches.deal(lengths, [n * n for n in lengths], budget, ranks)
    assert len(dealt) == ranks and len({len(bins) for bins in dealt}) == 1
    assert sorted(j for bins in dealt for bin in bins for j in bin) == list(range(len(lengths)))
    assert all(sum(lengths[j] for j in bin) <= budget for bins in dealt for bin in bins)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_visits_every_example_once(examples, batch_size, seed):
    steps = -(-examples // batch_size)
    for epoch in (0, 1):
        seen = [i for step in range(1, steps + 1) for i in batches.examples_of(epoch * steps + step, examples, batch_size, seed)]
        assert sorted(seen) == list(range(examples))


def test_balanced_work():
    """One long row and eight short ones of the same work in all: each rank gets one half."""
    dealt = batches.deal([80, *[10] * 8], [80, *[10] * 8], 80, 2)
    assert sorted(map(len, (dealt[0][0], dealt[1][0]))) == [1, 8]


def test_an_example_beyond_the_budget_is_refused_before_the_run():
    batches.check_budget(rows([5, 9, 3, 3], per_example=2), 14)
    with pytest.raises(ValueError, match=r"train.micro_batch_tokens: 13 is less than the 14 tokens"):
        batches.check_budget(rows([5, 9, 3, 3], per_example=2), 13)


@pytest.mark.parametrize(
    "text, pattern, expected",
    [
        ("so 1,200, as asked", r"-?\d+(?:,\d{3})*(?:\.\d+)?", "1200"),
        ("3 then 72", r"-?\d+(?:,\d{3})*(?:\.\d+)?", "72"),
        ("#### 18", r"#### (\d+)", "18"),
        ("none", r"\d+", None),
        ("all of it", None, "all of it"),
    ],
)
def test_what_of_an_answer_is_compared(text, pattern, expected):
    assert loop.compared(text, pattern) == expected


def test_pruning_keeps_the_newest_up_to_the_step_just_saved(tmp_path):
    for step in (50, 60, 70, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune(tmp_path, 70, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-60", "checkpoint-70"]
