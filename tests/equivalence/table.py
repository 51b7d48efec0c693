"""The README's table of equality with TRL. `python tests/equivalence/table.py` prints its rows: for each variant the largest relative
deviation of loss and gradient over the settings and batches that the tests of this folder try."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import test_dpo
import test_kto
import test_orpo
import test_sft
import test_simpo

ROOT = Path(__file__).resolve().parents[2]
TESTED = {
    ("sft", "SFTTrainer"): test_sft,
    ("dpo", "DPOTrainer"): test_dpo,
    ("simpo", "CPOTrainer"): test_simpo,
    ("kto", "KTOTrainer"): test_kto,
    ("orpo", "ORPOTrainer"): test_orpo,
}


def variants():
    """(variant, its counterpart in TRL, the module that tests it, its settings) of every variant."""
    for (algorithm, trainer), tests in TESTED.items():
        for name, (counterpart, several) in tests.VARIANTS.items():
            yield name if name == algorithm else f"{algorithm}: {name}", f"{trainer}: {counterpart}", tests, several


def main():
    print("| variant | TRL 1.16 | loss | gradient |\n|---|---|---|---|")
    for variant, counterpart, tests, several in variants():
        found = [test_dpo.deviations(*tests.both(settings, rows)) for settings in several for rows in tests.ROWS.values()]
        numbers = (f"{worst:.0e}" if worst else "0" for worst in map(max, zip(*found)))
        print(f"| {variant} | {counterpart} |", " | ".join(numbers), "|")


if __name__ == "__main__":
    main()
