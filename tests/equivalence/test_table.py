"""The README's table of equality lists every variant that the tests of this folder compare with TRL."""

import re

import table

README = (table.ROOT / "README.md").read_text()


def test_readme_has_every_variant():
    """In order, with what it is in TRL, and deviations below what the tests allow."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*Trainer: .*\|$", README, re.M)]
    assert [row[:2] for row in rows] == [list(names) for *names, _, _ in table.variants()]
    assert all(0 <= float(number) < 1e-6 for row in rows for number in row[2:])
