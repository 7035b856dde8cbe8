"""`npo compare` as it is typed."""

import pytest

from npo_cli.errors import quote_path
from tests.helpers.cli_errors import SMALL, assert_refused, json_rows, npo


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("compared")
    settings = [one for one in SMALL if not one.startswith("eval.every")]
    for seed in (0, 1):
        assert npo("train", "micro", home / f"s{seed}", *settings, "eval.every=2", f"train.seed={seed}").code == 0
    return home


def test_compare_json_names_the_record_types(runs, tmp_path):
    result = npo(
        "compare", f"a={runs}/s0", f"b={runs}/s0", "--threshold", "0.01", "--json", "--out", tmp_path / "p.csv"
    )
    lines = json_rows(result.out)
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
    assert result.err == f"results: {tmp_path / 'p.csv'}\n"


def test_compare_prints_tables_and_saves_a_figure(runs, tmp_path):
    both = (f"a={runs}/s0", f"a={runs}/s1", f"b={runs}/s1")
    result = npo("compare", *both, "--threshold", "0.6", "--figure", tmp_path / "c.png")
    assert result.code == 0
    sentence, *tables, last = result.out.split("\n\n")
    assert sentence.startswith(("a ends highest: final accuracy ", "b ends highest: final accuracy "))
    assert [table.splitlines()[0] for table in tables][:3] == [
        *("Methods", "Method minus a", "Cost of reaching a held-out accuracy")
    ]
    assert last == f"next: npo report {runs}/s0 {runs}/s1\n"
    full = npo("compare", f"a={runs}/s0", f"a={runs}/s1", f"b={runs}/s1", "--threshold", "0.6", "--full").out
    assert [line for line in full.splitlines() if line.startswith(("Held", "What", "Method", "Cost"))][:4] == [
        "Held-out accuracy",
        "Cost of reaching step 4",
        "Method minus a",
        "Cost of reaching a held-out accuracy",
    ]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_compare_escapes_control_characters_in_names(runs):
    result = npo("compare", f"\x1b[31mred={runs}/s0", f"b={runs}/s1")
    assert "\x1b" not in result.out + result.err
    assert "\\x1b[31mred" in result.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threshold", "0"), "--threshold must be above 0 and at most 1, got 0"),
        (("--threshold", "nan"), "--threshold must be above 0 and at most 1, got nan"),
        (("--figure", "c.jpg"), "--figure c.jpg must end in .png, .svg, .pdf"),
        (("--baseline", "c"), "--baseline: there is no method 'c'"),
    ],
)
def test_compare_refuses_bad_options(runs, options, message):
    assert assert_refused("compare", f"a={runs}/s0", f"b={runs}/s1", *options, beside=runs).message == message


def test_compare_refuses_a_folder_as_file_and_a_repeated_seed(runs):
    assert "is a folder" in assert_refused("compare", f"{runs}/s0", f"b={runs}/s1", "--out", runs, beside=runs).message
    twice = assert_refused("compare", f"a={runs}/s0", f"a={runs}/s0", beside=runs)
    assert twice.message == f"method 'a' has seed 0 twice: {runs}/s0:main and {runs}/s0:main"


def test_compare_refuses_a_run_without_evaluations(runs, tmp_path):
    dark = tmp_path / "in the dark"
    assert npo("train", "micro", dark, *SMALL).code == 0
    hint = assert_refused("compare", f"a={dark}", f"b={runs}/s1", beside=tmp_path).hint
    assert hint == f"npo eval {quote_path(dark)} --all --branch main"
    assert npo("eval", dark, "--all", "--branch", "main").code == 0
    assert npo("compare", f"a={dark}", f"b={runs}/s1").code == 0
