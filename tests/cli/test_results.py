"""`--out FILE` and `--figure FILE`: the same in every command that has results or a picture."""

import csv
import json

import pytest

from npo_cli.api.results import save_results
from npo_cli.types.comparison import SeedPoint
from npo_cli.types.rollouts import StepReport
from tests.helpers.cli_errors import SMALL, assert_refused, npo


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("results") / "run"
    settings = [one for one in SMALL if not one.startswith("eval.every")]
    assert npo("train", "micro", root, *settings, "eval.every=2").code == 0
    return root


def test_csv_has_one_row_per_record_and_empty_unknown_cells(tmp_path):
    point = SeedPoint(
        method='a, "b"',
        seed=1,
        run="r",
        branch="main",
        step=5,
        updates=10,
        tokens=99,
        forwards=120,
        seconds=None,
        accuracy=0.5,
        entropy=None,
    )
    path = tmp_path / "new" / "points.csv"
    save_results([point, StepReport(branch="main", step=1, metrics={}, timings={})], path, of=SeedPoint)
    assert path.read_text() == (
        "method,seed,run,branch,step,updates,tokens,forwards,teacher_tokens,seconds,accuracy,entropy,curve\n"
        '"a, ""b""",1,r,main,5,10,99,120,0,,0.5,,own\n'
    )


def test_csv_has_every_column_that_any_row_has(tmp_path):
    steps = [StepReport(branch="main", step=n, metrics={f"m{n}": 0.5}, timings={}) for n in (1, 2)]
    save_results(steps, tmp_path / "m.csv", of=StepReport)
    assert (tmp_path / "m.csv").read_text() == "branch,step,m1,m2\nmain,1,0.5,\nmain,2,,0.5\n"


@pytest.mark.parametrize(
    ("command", "column"),
    [
        (("show", "metrics"), "reward"),
        (("show", "rollouts"), "reference_answer"),
        (("show", "lineage"), "fork_step"),
        (("index",), "size_bytes"),
        (("eval",), "accuracy"),
    ],
)
def test_results_are_saved_by_suffix(run, tmp_path, command, column):
    name, *more = command
    for suffix in ("csv", "json", "jsonl"):
        result = npo(name, run, *more, "--out", tmp_path / f"r.{suffix}", "--json")
        assert result.code == 0
        assert f"results: {tmp_path}/r.{suffix}" in result.err
        printed = [json.loads(line) for line in result.out.splitlines()]
    table = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert table and column in table[0]
    listed = json.loads((tmp_path / "r.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert listed == lines == [one for one in printed if one["record"] != "conclusion"]


def test_plan_saves_its_needs(tmp_path):
    assert npo("plan", "micro", "--out", tmp_path / "p.csv").code == 0
    assert {"name", "num_bytes"} <= set(next(csv.reader((tmp_path / "p.csv").open())))


@pytest.mark.parametrize("arguments", [("show", "metrics"), ("show", "lineage"), ("show", "costs"), ("eval",)])
def test_pictures_are_saved(run, tmp_path, arguments):
    name, *more = arguments
    result = npo(name, run, *more, "--figure", tmp_path / "f.png")
    assert result.code == 0
    assert f"picture: {tmp_path}/f.png" in result.err
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "metrics", "--out", "a.txt"), "--out a.txt must end in .csv, .json, .jsonl"),
        (("index", "--out", "a.parquet"), "--out a.parquet must end in .csv, .json, .jsonl"),
        (("eval", "--figure", "a.jpg"), "--figure a.jpg must end in .png, .svg, .pdf"),
        (("show", "rollouts", "--figure", "a.png"), "--figure does not apply to rollouts"),
        (("score-checkpoints", "--at", "2", "--dry-run", "--out", "a.csv"), "--out has no effect with --dry-run"),
    ],
)
def test_unknown_formats_are_refused(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    name, *more = arguments
    refused = assert_refused(name, run, *more, beside=tmp_path)
    assert message in refused.err
