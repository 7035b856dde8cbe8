"""`npo compare` as it is typed."""

import json

import pytest

from npo_cli.errors import quote_path
from tests.helpers.cli_errors import SMALL, assert_refused, npo


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("compared")
    settings = [one for one in SMALL if not one.startswith("eval.every")]
    for seed in (0, 1):
        assert npo("train", "micro", home / f"s{seed}", *settings, "eval.every=2", f"train.seed={seed}").code == 0
    return home


def test_json_lines_name_their_kind(runs, tmp_path):
    said = npo("compare", f"a={runs}/s0", f"b={runs}/s0", "--threshold", "0.01", "--json", "--out", tmp_path / "p.csv")
    lines = [json.loads(line) for line in said.out.splitlines()]
    kinds = [line["record"] for line in lines]
    assert kinds == [
        *(
            "method_summary",
            "method_summary",
            "method_difference",
            "method_time_to_threshold",
            "method_time_to_threshold",
            "speed_up",
        ),
        # steps 0, 2 and 4 of either
        *["seed_point"] * 6,
    ]
    assert (lines[0]["method"], lines[0]["resampling_unit"], lines[0]["seeds"]) == ("a", "prompts", [0])
    assert said.err == f"points: {tmp_path / 'p.csv'}\n"


def test_the_table_is_said_and_the_picture_drawn(runs, tmp_path):
    said = npo("compare", f"a={runs}/s0", f"a={runs}/s1", f"b={runs}/s1", "--figure", tmp_path / "c.png")
    assert said.code == 0
    assert [line for line in said.out.splitlines() if line.startswith(("Held", "What", "Arm", "Cost"))][:4] == [
        "Held-out accuracy",
        "What it took to stand at step 4",
        "Arm minus a",
        "Cost of reaching a held-out accuracy",
    ]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_signs_in_a_name_are_made_visible(runs):
    said = npo("compare", f"\x1b[31mred={runs}/s0", f"b={runs}/s1")
    assert "\x1b" not in said.out + said.err
    assert "\\x1b[31mred" in said.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threshold", "0"), "--threshold must be above 0 and at most 1, got 0"),
        (("--threshold", "nan"), "--threshold must be above 0 and at most 1, got nan"),
        (("--figure", "c.jpg"), "--figure c.jpg must end in .png, .svg"),
        (("--baseline", "c"), "--baseline: there is no arm 'c'"),
    ],
)
def test_slips_are_refused_at_once(runs, options, message):
    assert assert_refused("compare", f"a={runs}/s0", f"b={runs}/s1", *options, beside=runs).message == message


def test_a_folder_is_no_file_and_a_seed_counts_once(runs):
    assert "is a folder" in assert_refused("compare", f"{runs}/s0", f"b={runs}/s1", "--out", runs, beside=runs).message
    twice = assert_refused("compare", f"a={runs}/s0", f"a={runs}/s0", beside=runs)
    assert twice.message == f"arm 'a' has seed 0 twice: {runs}/s0:main and {runs}/s0:main"


def test_a_run_that_was_never_evaluated_is_told_how(runs, tmp_path):
    dark = tmp_path / "in the dark"
    assert npo("train", "micro", dark, *SMALL).code == 0
    hint = assert_refused("compare", f"a={dark}", f"b={runs}/s1", beside=tmp_path).hint
    assert hint == f"npo eval {quote_path(dark)} --all --branch main"
    assert npo("eval", dark, "--all", "--branch", "main").code == 0
    assert npo("compare", f"a={dark}", f"b={runs}/s1").code == 0
