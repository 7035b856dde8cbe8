"""`npo bench` for real: processes, a stop in the middle, and the same command again."""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from npo_cli.cli.bench import parse_grid, parse_seeds
from npo_cli.errors import NpoError, RunFailed
from npo_cli.experiments.bench import BenchSpec, describe_replaced_settings, run_bench
from npo_cli.experiments.compare import compare_runs
from npo_cli.storage.bench_dir import hold_bench, load_bench_index
from npo_cli.storage.cost_sums import learning_curve
from npo_cli.storage.layout import open_run
from npo_cli.types.comparison import MethodSummary
from npo_cli.types.rollouts import Notice
from npo_cli.types.views import TunedSetting
from tests.helpers.cli_errors import assert_refused, npo
from tests.helpers.runs import TINY, file_digests, train
from tests.inference.openai_server import run_server

NPO = (sys.executable, "-c", "from npo_cli.cli.main import main; main()")
SETTINGS = (*TINY, "eval.every=2", "autonpo.early.scout_steps=2", "autonpo.early.replay_steps=2")


def bench_spec(out: Path, **changes: object) -> BenchSpec:
    plain = {"recipe": "micro", "methods": ("grpo",), "settings": SETTINGS, "seeds": (0,), "grid": ()}
    return BenchSpec(**{**plain, "tuning_seeds": (100,), "teacher": "", "out": out, "jobs": 2, **changes})


def tuning_run(spec: BenchSpec, setting: str) -> Path:
    return spec.out / "tuning/matched-grpo" / setting.replace(" ", "+") / "seed-100/run"


def logs(out: Path) -> str:
    return "".join(path.read_text() for path in sorted(out.rglob("log.txt")))


def compare_bench(out: Path) -> list[object]:
    return list(compare_runs([str(out)], thresholds=(), baseline=None, figure=None))


def commands_in(out: Path) -> list[str]:
    return [line.split()[2] for line in logs(out).splitlines() if line.startswith("$ npo")]


@pytest.mark.slow
def test_bench_tunes_each_method_and_run_again_does_nothing(tmp_path):
    spec = bench_spec(tmp_path, grid=("train.lr=1e-5 train.num_updates=2", "train.lr=1e-3"))
    *_, last = records = list(run_bench(spec))
    (tuned,) = (record for record in records if isinstance(record, TunedSetting))
    assert tuned.method == "matched-grpo"
    assert set(tuned.areas) == set(spec.grid)
    assert tuned.setting == max(tuned.areas, key=tuned.areas.__getitem__)
    # two settings with the tuning seed, then the better one with seed 0
    assert commands_in(tmp_path) == ["train"] * 3
    assert "--allow-code" not in logs(tmp_path)
    made = tmp_path / "runs/matched-grpo" / tuned.setting.replace(" ", "+") / "seed-0/run"
    assert isinstance(last, Notice)
    assert last.message == f"as a page: npo report {tmp_path} --out {tmp_path / 'report.html'}"
    assert load_bench_index(tmp_path) == [("matched-grpo", made)]
    # the mean of a fine polyline over the tokens that both settings generated
    curves = {setting: learning_curve(open_run(tuning_run(spec, setting)), "main", name="") for setting in spec.grid}
    grid = np.linspace(0, min(points[-1].total_tokens for points in curves.values()), 20001)
    for setting, points in curves.items():
        area = np.interp(grid, [one.total_tokens for one in points], [one.accuracy for one in points]).mean()
        assert tuned.areas[setting] == pytest.approx(area, abs=1e-4)
    before = logs(tmp_path)
    assert [record for record in run_bench(spec) if isinstance(record, TunedSetting)] == [tuned]
    assert logs(tmp_path) == before


@pytest.mark.slow
def test_bench_needs_allow_code_once_per_folder_and_content_of_the_verifier(tmp_path):
    verifier = tmp_path / "mine.py"
    verifier.write_text("def grade(prompt, response, answer):\n    return 1.0\n")
    args = ("bench", "micro", "--methods", "grpo", "--out", tmp_path / "bench", *SETTINGS)
    args += ("train.num_steps=2", f"task.verifier={verifier}:grade")
    assert "runs only with --allow-code" in assert_refused(*args, "--seeds", "1", beside=tmp_path).message
    npo(*args, "--seeds", "1", "--dry-run", "--allow-code")
    assert "runs only with --allow-code" in assert_refused(*args, "--seeds", "1", beside=tmp_path).message
    assert npo(*args, "--seeds", "1", "--allow-code").code == 0
    assert npo(*args, "--seeds", "2").code == 0
    assert len(commands_in(tmp_path / "bench")) == 2
    verifier.write_text("def grade(prompt, response, answer):\n    return 0.0\n")
    assert "has changed since --allow-code" in assert_refused(*args, "--seeds", "3", beside=tmp_path).message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "seeds"),
    [(signal.SIGTERM, (0,)), (signal.SIGTERM, (0, 1)), (signal.SIGKILL, (0,))],
    ids=["one", "two", "killed"],
)
def test_bench_that_a_signal_ends_stops_its_runs_and_resumes_to_the_same_bytes(tmp_path, number, seeds):
    longer = [*SETTINGS, "train.num_steps=40", "eval.every=20", "train.save_every=20"]
    command = (*NPO, "bench", "micro", *longer, "--out", tmp_path / "out", "--methods", "grpo")
    command += ("--seeds", str(len(seeds)))
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE)
    branches = [tmp_path / "out/runs/matched-grpo/as-it-is" / f"seed-{seed}/run/branches/main" for seed in seeds]
    deadline = time.monotonic() + 120
    while not any((branch / "metrics.jsonl").exists() for branch in branches):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    stderr = process.communicate()[1].decode()
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert "stopped by SIGTERM" in stderr
    assert not any((branch.parents[2] / "done.json").exists() for branch in branches)
    done = subprocess.run([*map(str, command)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert "resume" in commands_in(tmp_path / "out")
    train(tmp_path / "straight", *longer, "train.seed=0")
    if len(seeds) > 1:
        check_last_hint(done.stderr.decode())
    for name in ("branches/main/metrics.jsonl", "branches/main/rollouts.jsonl"):
        assert file_digests(branches[0].parents[1])[name] == file_digests(tmp_path / "straight")[name]


@pytest.mark.slow
def test_bench_whose_fork_server_is_killed_says_so_and_resumes(tmp_path):
    command = (*NPO, "bench", "micro", *SETTINGS, "train.num_steps=2", "--methods", "grpo", "--seeds", "1")
    words = [*map(str, command), "--out", str(tmp_path)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    while (server := find_fork_server(process.pid)) is None:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(server, signal.SIGKILL)
    assert "the process that starts the commands died" in process.communicate()[1].decode()
    assert process.returncode == 1
    assert subprocess.run(words, capture_output=True).returncode == 0
    assert commands_in(tmp_path) == ["train"]


def find_fork_server(parent: int) -> int | None:
    """The child of a bench from which its commands are forked."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            is_child = int(file.read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and b"multiprocessing.forkserver" in file.with_name("cmdline").read_bytes():
                return int(file.parent.name)
    return None


def check_last_hint(stderr: str) -> None:
    """`npo bench` ends with a command of `npo compare`, which works."""
    hint = next(line for line in stderr.splitlines() if "npo compare" in line)
    methods, _, picture = hint.partition("npo compare ")[2].partition(" --figure ")
    records = compare_runs(shlex.split(methods), thresholds=(), baseline=None, figure=Path(picture))
    assert [(one.method, one.seeds) for one in records if isinstance(one, MethodSummary)] == [("matched-grpo", (0, 1))]


@pytest.mark.slow
def test_bench_continues_after_a_failed_run_and_quotes_its_error(tmp_path):
    spec = bench_spec(tmp_path, methods=("luffy", "npo-early", "grpo"), teacher="--source file:nowhere.jsonl")
    found = []
    with pytest.raises(RunFailed, match=r"1 of 3 runs failed; the first: error: .*nowhere\.jsonl"):
        found.extend(run_bench(spec))
    failed = tmp_path / "runs/matched-luffy/as-it-is/seed-0"
    warnings = [one.message for one in found if isinstance(one, Notice) and one.level == "warning"]
    assert [text.partition(" failed: ")[0] for text in warnings] == [str(failed)]
    assert commands_in(tmp_path / "runs/matched-npo-early") == ["train", "sample-guide", "resume"]
    assert (tmp_path / "runs/matched-npo-early/as-it-is/seed-0/done.json").exists()
    # What is finished can be compared.
    compared = {one.method for one in compare_bench(tmp_path) if isinstance(one, MethodSummary)}
    assert compared == {"matched-npo-early", "matched-grpo"}


@pytest.mark.slow
def test_bench_shows_no_key_that_an_endpoint_echoes(tmp_path, monkeypatch):
    monkeypatch.setenv("NPO_ENDPOINT_KEY", "sk-secret-0123456789")
    refusal = (401, {}, b"Bearer sk-secret-0123456789 is unknown")
    with run_server(lambda _: {"text": ""}, failures=[refusal] * 20) as served:
        spec = bench_spec(tmp_path, methods=("luffy",), teacher=f"--source endpoint:{served.url}#teacher")
        with pytest.raises(RunFailed, match="status 401") as caught:
            list(run_bench(spec))
    assert "Bearer [key] is unknown" in logs(tmp_path)
    assert "secret" not in f"{caught.value}{caught.value.hint}"
    assert [path for path in tmp_path.rglob("*") if path.is_file() and b"sk-secret" in path.read_bytes()] == []


def test_second_bench_in_a_folder_is_refused_while_the_first_one_is_at_work(tmp_path):
    with hold_bench(tmp_path), pytest.raises(NpoError, match=f"another npo bench .process {os.getpid()}.") as caught:
        list(run_bench(bench_spec(tmp_path)))
    assert "--out" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_bench_waits_for_the_commands_of_a_killed_one(tmp_path):
    """What holds the lock is a process that inherited it; the one that took it is gone."""
    code = """if True:
        import subprocess, sys
        from pathlib import Path
        from npo_cli.storage.bench_dir import hold_bench
        with hold_bench(Path(sys.argv[1])) as lock:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"], pass_fds=(lock,))
    """
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    lock = os.open(tmp_path / ".lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
    with hold_bench(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_bench_with_other_settings_in_the_same_folder_is_refused(tmp_path):
    folder = tmp_path / "runs/matched-grpo/as-it-is/seed-0"
    folder.mkdir(parents=True)
    (folder / "done.json").write_text(json.dumps({"commands": [["train", "micro"]]}))
    with pytest.raises(NpoError, match="was made with other commands"):
        list(run_bench(bench_spec(tmp_path)))


def test_bench_that_cannot_be_fair_is_refused_before_it_writes(tmp_path):
    with pytest.raises(NpoError, match="seed 0 would both choose a setting and be in the table"):
        list(run_bench(bench_spec(tmp_path, grid=("train.lr=1e-4",), tuning_seeds=(0,))))
    with pytest.raises(NpoError, match="without held-out evaluations there is nothing to compare"):
        list(run_bench(bench_spec(tmp_path, settings=(*TINY, "eval.every=0"))))
    with pytest.raises(NpoError, match="there is no method 'gpro'"):
        list(run_bench(bench_spec(tmp_path, methods=("gpro",))))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("autonpo", (), "method autonpo: autonpo.* and the run has only 4 steps"),
        ("npo-late", ("guide.replay.at_step=1", "guide.replay.guide_step=4"), "needs a checkpoint of step 1 for"),
        ("npo-late", ("guide.replay.at_step=2", "guide.replay.guide_step=6"), "trains from step 0 to 6"),
        ("grpo", ("task.source=file", "task.path=nowhere.jsonl"), "nowhere"),
    ],
)
def test_bench_refuses_a_plan_that_cannot_work_before_it_writes(tmp_path, method, settings, message):
    with pytest.raises(NpoError, match=message):
        list(run_bench(bench_spec(tmp_path, methods=("grpo", method), settings=(*SETTINGS, *settings))))
    assert os.listdir(tmp_path) == []


def test_bench_names_settings_that_replace_a_methods_own(tmp_path):
    """With the groups of `grpo` the control of twice as many rollouts would be `grpo` again."""
    spec = bench_spec(tmp_path, methods=("grpo", "grpo-2n"), grid=("train.lr=1e-4", "train.lr=3e-4"))
    (notice,) = describe_replaced_settings(spec)
    assert notice.message == "controls-grpo-2n: train.group_size=4 replaces the method's own 16"


def test_grid_lists_alternatives_and_combines_options():
    assert parse_grid(["train.lr=1,2 train.num_updates=4", "train.group_size=8,16"]) == (
        "train.lr=1 train.group_size=8",
        "train.lr=1 train.group_size=16",
        "train.lr=2 train.group_size=8",
        "train.lr=2 train.group_size=16",
        "train.num_updates=4 train.group_size=8",
        "train.num_updates=4 train.group_size=16",
    )
    assert parse_grid([]) == ()


def test_one_seed_is_named_with_a_comma():
    assert parse_seeds("3") == (0, 1, 2)
    assert parse_seeds("7,") == (7,)
    assert parse_seeds("7,9") == (7, 9)
    for text in ("7,,", ",", "7,7"):
        with pytest.raises(NpoError, match="seed"):
            parse_seeds(text)


@pytest.mark.parametrize("texts", [["train.lr"], [" "], ["train.lr=1", "train.lr=2 train.num_updates=2"]])
def test_grid_that_sets_a_key_twice_or_not_at_all_is_refused(texts: list[str]):
    with pytest.raises(NpoError, match="--grid"):
        parse_grid(texts)
