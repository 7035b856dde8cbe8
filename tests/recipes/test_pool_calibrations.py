"""`recipes/pool_calibrations.py`: means over runs, by hand."""

import csv
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "recipes/pool_calibrations.py"


def write_calibration(path: Path, regrets: dict[str, float]) -> Path:
    gain = {"gain": 0.25, "gain_low": 0.125, "gain_high": 0.375, "quality": 0.5, "quality_net": 0.0, "price": 4.0}
    learner = {"learner_step": 20, "candidate": "self", "variances": {"kl_exp": 1.0, "tok2": 1.5}}
    rows = [{"record": "candidate_gain", **learner, **gain}] + [
        {
            "record": "rule_result",
            "rule": rule,
            "regret": regret,
            "rank_correlation": 1 - regret,
            "share": 0.5,
            "share_per_cost": 0.25,
        }
        for rule, regret in regrets.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pool(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, check=False)


def test_pooled_rules_are_means_over_runs_sorted_by_regret(tmp_path):
    files = [
        write_calibration(tmp_path / "a.json", {"farthest": 0.1, "Q": 0.2, "Q_net": 0.3, "Q/kl_exp": 0.0}),
        write_calibration(tmp_path / "b.json", {"farthest": 0.3, "Q": 0.2, "Q_net": 0.5, "Q/kl_exp": 0.1}),
    ]
    done = pool(*files, "--csv", tmp_path / "rules.csv")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "rules.csv").open() as file:
        head, *rows = csv.reader(file)
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert [row[0] for row in rows] == ["Q/kl_exp", "farthest", "Q", "Q_net"]
    assert found["Q/kl_exp"]["regret"] == "0.050"
    assert found["Q/kl_exp"]["regret minus farthest"] == "-0.150"
    assert found["Q/kl_exp"]["rank_correlation"] == "0.950"
    assert found["Q_net"]["regret minus Q"] == "0.200"


def test_pooled_rules_have_intervals_from_three_runs_on(tmp_path):
    regrets = {"farthest": 0.0, "Q": 0.0, "Q_net": 0.0}
    files = [write_calibration(tmp_path / f"{n}.json", regrets | {"Q/kl_exp": 0.1 * n}) for n in range(3)]
    assert "| Q/kl_exp | 0.100 [0.000, 0.200] |" in pool(*files).stdout


def test_gains_are_listed_per_run_and_candidate(tmp_path):
    regrets = {"farthest": 0.0, "Q": 0.0, "Q_net": 0.0}
    files = [write_calibration(tmp_path / f"{name}.json", regrets) for name in "ab"]
    assert pool(*files, "--gains", tmp_path / "gains.csv").returncode == 0
    with (tmp_path / "gains.csv").open() as file:
        head, *rows = csv.reader(file)
    assert head[:4] == ["run and seed", "learner step", "candidate", "gain"]
    figures = ["20", "self", "0.250", "0.125", "0.375", "0.500", "0.000", "1.000", "1.500", "4.0"]
    assert rows == [["a", *figures], ["b", *figures]]


def test_pooling_a_file_without_rules_is_refused(tmp_path):
    (tmp_path / "empty.json").write_text("")
    done = pool(tmp_path / "empty.json")
    assert done.returncode == 1
    assert "has no rule: write it with npo calibrate --json" in done.stderr
