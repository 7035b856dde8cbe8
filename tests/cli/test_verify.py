"""Lost and changed lines of a finished run: reported by the commands that read them and by `npo verify`."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from npo_cli.storage.layout import RunDir, head_path
from npo_cli.storage.log_head import rewrite_head
from tests.helpers.cli_errors import assert_refused, copy_run, damage_file, edit_file, npo, set_fields

ROLLOUTS = ["show", "rollouts", "--branch", "main"]
GOES_ON = ("resume", "--branch", "main", "train.num_steps=6")


@pytest.fixture
def run(circle: Path, tmp_path: Path) -> Path:
    return copy_run(circle, tmp_path, "run")


def find_file(run: Path, pattern: str) -> Path:
    (path,) = run.glob(pattern)
    return path


def verify(run: Path) -> list[str]:
    """The findings, without the verdict; nothing is written."""
    result = npo("verify", run)
    *findings, verdict = [line for line in result.out.splitlines() if not line.startswith("next: npo show ")]
    assert result.err == ""
    assert (result.code, verdict.startswith(f"{run}: {f'{len(findings)} damaged' if findings else 'whole'} (")) == (
        int(bool(findings)),
        True,
    )
    return findings


def without_last_line(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:-1])


def test_verify_of_a_whole_run(circle):
    before = sorted(circle.rglob("*"))
    assert verify(circle) == []
    assert sorted(circle.rglob("*")) == before
    (record,) = [json.loads(line) for line in npo("verify", circle, "--json").out.splitlines()]
    assert record == {
        "record": "verified_run",
        "run": str(circle),
        "num_damages": 0,
        "num_logs": 5 + 2 * 3 + 2,  # of the run (all but autonpo's), of main and again, a guide cache, a scoring
        "num_checkpoints": 3 + 2,
    }
    assert "is not a run directory" in npo("verify", circle / "branches").err


def test_after_a_finished_command_every_log_that_is_cut_at_a_line_is_reported(run, tmp_path):
    logs = RunDir(run).list_logs()
    assert len(logs) == 13
    for path in logs:
        whole = path.read_bytes()
        damage_file(path, without_last_line)
        num_lines = whole.count(b"\n")
        detail = f"{path} is damaged: it has {num_lines - 1} lines, and {num_lines} were written"
        findings = verify(run)
        assert findings[0].startswith(f"{detail}: restore it from a copy of the run directory"), path
        assert all(str(path) in finding for finding in findings)
        # whoever writes next would write behind the hole
        assert assert_refused(GOES_ON[0], run, *GOES_ON[1:], beside=tmp_path).message == detail
        path.write_bytes(whole)
    assert verify(run) == []


@pytest.mark.parametrize("name", ["segments", "metrics", "costs"])
@pytest.mark.parametrize("lost", ["the log", "its head", "both", "its content"])
def test_lost_log_is_reported(run, tmp_path, name, lost):
    path = find_file(run, f"branches/main/{name}.jsonl" if name == "metrics" else f"{name}.jsonl")
    if lost == "its content":
        path.write_bytes(b"")
    if lost in ("the log", "both"):
        path.unlink()
    if lost in ("its head", "both"):
        head_path(path).unlink()
    problem = {"its head": f"its head {path.name}.head is missing", "its content": "it has 0 lines, and "}
    expected = f"{path} is damaged: {problem.get(lost, 'it ')}"
    assert any(finding.startswith(expected) for finding in verify(run))
    assert assert_refused(GOES_ON[0], run, *GOES_ON[1:], beside=tmp_path).message.startswith(expected)
    reader = {"segments": "lineage", "metrics": "metrics", "costs": "costs"}[name]
    for args in (["index"], ["show", reader])[: 2 if lost != "both" or name == "segments" else 1]:
        assert assert_refused(args[0], run, *args[1:], beside=tmp_path).message.startswith(expected)


def test_damaged_last_line_with_a_newline_is_reported_and_not_cut_off(run, tmp_path):
    path = run / "segments.jsonl"
    damage_file(path, lambda text: text[:-2] + "\n")
    size = path.stat().st_size
    message = f"{path} is damaged: line 2 of 2 is not a JSON object"
    for args in (("show", "lineage"), ("index",), GOES_ON, ("resume", "--branch", "again", "train.num_steps=6")):
        assert assert_refused(args[0], run, *args[1:], beside=tmp_path).message == message
    assert path.stat().st_size == size
    assert verify(run)[0].startswith(message)


def repeat_line(text: str) -> str:
    first, rest = text.split("\n", 1)
    return f"{first}\n{first}\n{rest}"


def exchange(before: str, after: str) -> Callable[[str], str]:
    return lambda text: text.replace(before, after, 1)


CHANGES = {
    "a line twice": ("costs.jsonl", repeat_line, ["show", "costs"]),
    "tokens": ("costs.jsonl", exchange('"tokens":', '"tokens":1'), ["show", "costs"]),
    "a step twice": ("branches/main/metrics.jsonl", repeat_line, ["show"]),
    "log-probabilities": ("guides/near/rollouts.jsonl", exchange('"behavior_logps":"', '"behavior_logps":"A'), None),
    "a reward": ("branches/main/rollouts.jsonl", exchange('"reward":1.0', '"reward":0.0'), ROLLOUTS),
    "scored samples": ("scores/*/rollouts.jsonl", exchange('"num_tokens":', '"num_tokens":1'), ["index"]),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_line_is_reported(run, tmp_path, kind):
    pattern, change, args = CHANGES[kind]
    path = find_file(run, pattern)
    damage_file(path, change)
    args = args or ["resume", "--at", "0", "--guide", "near", "--new-branch", "other"]
    message = f"{path} is damaged: its first "
    assert assert_refused(args[0], run, *args[1:], beside=tmp_path).message.startswith(message)
    assert verify(run)[0].startswith(message)


@pytest.mark.parametrize("pattern", ["guides/near/rollouts.jsonl", "scores/*/rollouts.jsonl"])
def test_finished_artifact_knows_its_samples_without_the_head(run, tmp_path, pattern):
    path = find_file(run, pattern)
    damage_file(path, without_last_line)
    rewrite_head(path)
    assert f"{path} is damaged: it has " in verify(run)[0]
    args = ["resume", "--at", "0", "--guide", "near", "--new-branch", "other"] if "guides" in pattern else ["index"]
    assert f"{path} is damaged: it has " in assert_refused(args[0], run, *args[1:], beside=tmp_path).message


RANGES = [
    ("evals.jsonl", '"accuracy":', '"accuracy":55', ["index"], "accuracy is 55"),
    ("branches/main/rollouts.jsonl", '"reward":1.0', '"reward":1e999', ROLLOUTS, "reward is inf"),
    ("branches/main/rollouts.jsonl", '"verdict":"correct"', '"verdict":"fine"', ROLLOUTS, "verdict is"),
    ("branches/main/rollouts.jsonl", '"behavior_logps":"', '"behavior_logps":"AACAPwAAgD8AAIA/', ROLLOUTS, "log-prob"),
    ("branches/main/rollouts.jsonl", '"off"', '"on"', ROLLOUTS, "injection_status is 'on'"),
    ("branches/main/timings.jsonl", '"seconds":', '"seconds":-', ["show"], "seconds is -"),
    ("branches/main/timings.jsonl", '"time":"2', '"time":"x', ["show"], "which is not a time"),
    ("branches/main/metrics.jsonl", '"step":2,', '"step":5,', ["show"], "step 5 comes after step 1"),
    ("costs.jsonl", '"seconds":', '"seconds":-', ["show", "costs"], "a cost is negative"),
    ("costs.jsonl", '"kind":"train"', '"kind":"trial"', ["show", "costs"], "kind is 'trial'"),
    ("segments.jsonl", '"fork_step":0', '"fork_step":-4', ["show", "lineage"], "fork_step is -4"),
    ("guides/near/rollouts.jsonl", '"source":"guide"', '"source":"me"', GOES_ON, "source is 'me'"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "before", "after", "args", "message"), RANGES)
def test_value_out_of_range_is_refused_by_line(run, tmp_path, pattern, before, after, args, message):
    path = find_file(run, pattern)
    edit_file(path, lambda text: text.replace(before, after))
    finding = verify(run)[0]
    assert finding.startswith(f"{path}, line ")
    assert message in finding
    if args is not GOES_ON:
        assert message in assert_refused(args[0], run, *args[1:], beside=tmp_path).message


def test_time_that_is_no_time_is_reported_with_its_file(run):
    path = find_file(run, "scores/*/scores.json")
    set_fields(path, saved_at="yesterday")
    assert verify(run) == [
        f"{path} is damaged: saved_at is 'yesterday', which is not a time: restore it from a copy of the run directory"
    ]
    assert f"{path} is damaged" in npo("index", run).err


# What can be restored


def carry_out(finding: str, run: Path) -> None:
    """The commands of a finding, as a person would paste them."""
    ways = finding.partition(", or make it again: ")[2] or finding.partition("; ")[0]
    for command in ways.removesuffix(", with the settings as before").split("; "):
        word, *args = shlex.split(command)
        if word == "rm":
            for path in args[1:]:
                (shutil.rmtree if Path(path).is_dir() else Path.unlink)(Path(path))
        else:
            assert word == "npo"
            assert npo(*args).code == 0


@pytest.mark.parametrize("pattern", ["guides/near/rollouts.jsonl", "evals.jsonl", "prompt_results.jsonl"])
def test_damaged_samples_and_evaluations_are_made_again_equally(circle, run, pattern):
    path = find_file(run, pattern)
    damage_file(path, lambda text: text.replace("1", "0", 1))
    (finding,) = verify(run)
    carry_out(finding, run)
    assert verify(run) == []
    lines = set(find_file(circle, pattern).read_text().splitlines())
    assert lines <= set(path.read_text().splitlines())


def test_log_that_was_edited_on_purpose_is_accepted(run, tmp_path):
    path = run / "events.jsonl"
    damage_file(path, without_last_line)
    assert f"npo verify {run} --accept {path}" in verify(run)[0]
    assert npo("verify", run, "--accept", path).code == 0
    assert npo(GOES_ON[0], run, *GOES_ON[1:]).code == 0
    assert verify(run) == []
    # a lost head is made again
    head_path(run / "costs.jsonl").unlink()
    assert npo("verify", run, "--accept", run / "costs.jsonl").code == 0


def test_log_that_the_run_needs_is_not_accepted_with_a_hole(run, tmp_path):
    path = run / "branches" / "main" / "metrics.jsonl"
    damage_file(path, lambda text: text.split("\n")[0] + "\n")
    result = assert_refused("verify", run, "--accept", path, beside=tmp_path)
    assert result.message == f"{path} has 1 lines, and 4 were written: the run needs all of them"
    assert verify(run)[0] == (
        f"{path} is damaged: it has 1 lines, and 4 were written: restore it from a copy of the run directory"
    )
    assert "is not a log of" in assert_refused("verify", run, "--accept", run / "x", beside=tmp_path).message


def test_damaged_checkpoint_is_set_aside_and_an_older_one_continued(run):
    folder = run / "branches" / "main" / "checkpoints" / "step_000004"
    damage_file(folder / "config.json", lambda text: text.replace("1", "2", 1))
    (finding,) = verify(run)
    assert finding.startswith(f"{folder}/config.json does not have the sha256 that was saved: ")
    again = f"npo resume {run} --branch main --at 2 --no-guide"
    assert finding.endswith(f"step 2 can be continued: {again}")
    folder.rename(f"{folder}.damaged")
    assert verify(run) == []
    assert npo(*shlex.split(again)[1:]).code == 0
    assert verify(run) == []
