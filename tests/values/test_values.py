"""Plain training and an exact fork compute what is recorded; `python -m tests.values check` does all circles."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.values.comparing import differences, rounded

FOLDER = Path(__file__).parent


def test_differences_name_the_place_and_ignore_rounding_noise():
    recorded = {"steps": [{"loss": 0.25, "token ids": "ab", "rows": 4}]}
    assert list(differences(recorded, {"steps": [{"loss": 0.25 * (1 + 5e-6), "token ids": "ab", "rows": 4}]})) == []
    found = {"steps": [{"loss": 0.25 * (1 + 2e-5), "token ids": "ac", "rows": None}]}
    assert [line.partition(":")[0] for line in differences(recorded, found)] == [
        "/steps[0]/loss",
        "/steps[0]/token ids",
        "/steps[0]/rows",
    ]
    assert list(differences(recorded, {"lines": []})) == [
        "/steps: recorded [{'loss': 0.25, 'token ids': 'ab', 'rows': 4}], now missing",
        "/lines: not recorded, now []",
    ]


def test_floats_are_rounded_to_seven_digits_and_counts_are_not():
    assert rounded([{"V": 1.23456789, "tokens": 123456789}]) == [{"V": 1.234568, "tokens": 123456789}]


@pytest.mark.slow
def test_train_and_exact_fork_compute_the_recorded_values():
    command = [sys.executable, "-m", "tests.values", "check", FOLDER / "baseline.json"]
    only = ["--only", "train", "--only", "fork-exact"]
    ended = subprocess.run([*command, *only], cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
