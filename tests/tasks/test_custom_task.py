"""`task.source=custom`: rows, and perhaps a verifier, from a function of the user."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.preflight.project import check_project
from npo_cli.tasks.custom_verifier import code_permitted
from npo_cli.tasks.task import Task, load_task
from tests.helpers.runs import resume, train

TASKS_FILE = """
import itertools
import random


def plain():
    print("loading")
    return [{"prompt": f"{n}+1=", "answer": n + 1, "topic": "add"} for n in range(8)]


def endless(seed, start=0):
    rng = random.Random(seed)
    return ({"prompt": f"{n}+{rng.random()}=", "answer": str(n)} for n in itertools.count(start))


def graded():
    rows = plain()
    return {"rows": rows[:5], "heldout": rows[5:], "verifier": grade}


def grade(response, answer, topic):
    return 0.5 if topic in response else float(response == answer)


def wrong(kind):
    return {
        "text": "rows", "none": [], "row": [3], "set": [{"prompt": "a", "answer": "1", "x": {1}}], "key": {"row": []},
        "closure": {"rows": plain(), "verifier": lambda response: 1.0}, "no prompt": [{"answer": "1"}] * 9,
    }[kind]


def fails():
    raise ValueError("no such table")


def dies():
    import os
    os._exit(3)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.py"
    path.write_text(TASKS_FILE)
    return path


@pytest.fixture(autouse=True)
def allow() -> Iterator[None]:
    with code_permitted():
        yield


def load(function: str, **settings: Any) -> Task:
    sizes = {"pool_size": 5, "heldout_size": 2, "verify_workers": 1, "verifier": "last_number"} | settings
    task = load_task(TaskSettings(source="custom", function=function, **sizes), seed=1)
    task.close()
    return task


def refusal(function: str, **settings: Any) -> NpoError:
    with pytest.raises(NpoError) as caught:
        load(function, **settings)
    assert caught.value.hint
    return caught.value


def test_custom_task_trains_on_the_first_rows_and_holds_out_the_next(file: Path):
    task = load(f"{file}:plain")
    assert [prompt.text for prompt in task.train] == ["0+1=", "1+1=", "2+1=", "3+1=", "4+1="]
    assert [prompt.answer for prompt in task.heldout] == ["6", "7"]
    assert task.train[0].columns == {"prompt": "0+1=", "answer": 1, "topic": "add"}
    assert load(f"{file}:plain", pool_size=100).compute_digest() != task.compute_digest()
    assert load(f"{file}:plain").compute_digest() == task.compute_digest()


def test_custom_task_gets_seed_and_arguments_and_may_be_endless(file: Path):
    task = load(f"{file}:endless", function_args={"start": 100})
    assert [int(prompt.answer) for prompt in (*task.train, *task.heldout)] == list(range(100, 107))
    assert load(f"{file}:endless", function_args={"start": 100}).compute_digest() == task.compute_digest()
    assert load(f"{file}:endless", function_args={"seed": 2, "start": 100}).compute_digest() != task.compute_digest()


def test_custom_task_brings_its_verifier(file: Path):
    task = load(f"{file}:graded", verifier="auto", heldout_size=3)
    try:
        results = task.grade(task.train[:3], ["1", "add", "x"])
        assert [result.reward for result in results] == [1.0, 0.5, 0.0]
        assert [result.verdict for result in results] == ["correct", "wrong", "wrong"]
        assert len(task.heldout) == 3
    finally:
        task.close()
    assert "returned no verifier" in refusal(f"{file}:plain", verifier="custom").message


def test_custom_task_of_an_installed_module(file: Path, monkeypatch: pytest.MonkeyPatch):
    folder = file.parent / "library"
    (folder / "problems").mkdir(parents=True)
    (folder / "problems" / "__init__.py").write_text("from problems.sums import grade\n")
    (folder / "problems" / "sums.py").write_text(TASKS_FILE)
    monkeypatch.syspath_prepend(folder)
    assert len(load("problems.sums:plain").train) == 5
    task = load("problems.sums:graded", verifier="auto")
    assert [result.reward for result in task.grade(task.train[:1], ["1"])] == [1.0]
    task.close()
    assert refusal("problems.sum:plain").message == "task.function names a module that is not installed: problems.sum"


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        ("plane", {}, "has no function 'plane'"),
        ("fails", {}, "tasks.py:33: ValueError: no such table"),
        ("dies", {}, "its process died"),
        ("plain", {"x": 1}, "unexpected keyword argument 'x'"),
        ("wrong", {"kind": "text"}, "returned a str, not rows"),
        ("wrong", {"kind": "none"}, "returned no rows"),
        ("wrong", {"kind": "row"}, "returned a int as row 1, not a dict"),
        ("wrong", {"kind": "set"}, "returned row 1 with a value that JSON cannot hold: a set"),
        ("wrong", {"kind": "key"}, "returned a dict with 'row'"),
        ("wrong", {"kind": "closure"}, "is no function of its file by that name"),
        ("wrong", {"kind": "no prompt"}, "tasks.py:wrong rows 1 has no column 'prompt'"),
    ],
)
def test_custom_task_that_gives_no_rows_is_refused(file: Path, function: str, arguments: dict[str, Any], words: str):
    assert words in refusal(f"{file}:{function}", function_args=arguments).message


def test_custom_task_needs_a_function(file: Path):
    assert "needs a function" in refusal("").message
    assert "names no function" in refusal(str(file)).message
    assert "names a file that does not exist" in refusal("nothing.py:f").message
    assert "too few to hold out 8" in refusal(f"{file}:plain", heldout_size=8).message


def test_custom_task_runs_only_with_allow_code_given_once_per_run(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    settings = ["task.source=custom", f"task.function={file}:plain", "task.verifier=last_number"]
    settings += ["task.pool_size=6", "task.heldout_size=2", "train.prompts_per_step=4"]
    train(tmp_path / "run", *settings, until=1)
    with code_permitted():
        from npo_cli.tasks.custom_verifier import _IS_CODE_ALLOWED

        before = _IS_CODE_ALLOWED.set(False)
        try:
            resume(tmp_path / "run", until=2)
            notes = [each for each in check_project("micro", settings) if each.part == "data"]
            assert "is user code and was not run" in notes[0].message
            with pytest.raises(NpoError, match="runs only with --allow-code"):
                train(tmp_path / "other", *settings, until=1)
            file.write_text(TASKS_FILE + "\n")
            with pytest.raises(NpoError, match="has changed since --allow-code was given"):
                resume(tmp_path / "run", until=3)
        finally:
            _IS_CODE_ALLOWED.reset(before)
