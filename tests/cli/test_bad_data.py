"""Data files and verifiers that cannot be used: the file, the line and what to do; no run directory is left."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from tests.helpers.cli_errors import SMALL, CommandResult, assert_refused, npo

GOOD = tuple(json.dumps({"prompt": f"{number}+1=", "answer": str(number + 1)}) for number in range(30))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def training(folder: Path, *overrides: str, lines: Sequence[str] | None = None, code: int = 2) -> str:
    """The words of a training on a file that must not begin. Paths are shortened to their names."""
    if lines is not None:
        (folder / "d.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    task = ("task.source=file", "task.path=d.jsonl", "task.verifier=last_number")
    result = assert_refused("train", "micro", "new", *SMALL, *task, *overrides, beside=folder, code=code)
    return f"{result.message} | {result.hint}".replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.jsonl", "the data file missing.jsonl does not exist | fix task.path"),
        ("folder.jsonl", "the folder folder.jsonl holds no data"),
        ("empty.jsonl", "the data file empty.jsonl is empty"),
        ("blank.jsonl", "the data file blank.jsonl is empty"),
        ("table.txt", "the data file table.txt is none of .jsonl, .parquet, .json, .csv"),
        ("torn.parquet", "torn.parquet is not a readable parquet file"),
    ],
)
def test_dataset_file_that_cannot_be_read_is_refused(folder, name, words):
    (folder / "folder.jsonl").mkdir()
    for there, text in (("empty.jsonl", ""), ("blank.jsonl", "\n \n"), ("table.txt", "a,b"), ("torn.parquet", "PAR1x")):
        (folder / there).write_text(text)
    assert words in training(folder, f"task.path={name}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{oops", "d.jsonl line 6 is not valid JSON"),
        ("[1]", "d.jsonl line 6 is a JSON array, not an object"),
        ("\udcff", "d.jsonl line 6 is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        ('{"prompt": "a", "prompt": "b", "answer": "1"}', "d.jsonl line 6 is not valid JSON: the key 'prompt' is"),
        ('{"answer": "1"}', "d.jsonl line 6 has no column 'prompt' (task.prompt_column)"),
        ('{"prompt": "1+1="}', "d.jsonl line 6 has no column 'answer' (task.answer_column)"),
        ('{"prompt": null, "answer": "1"}', "d.jsonl line 6: the prompt is a null"),
        ('{"prompt": " ", "answer": "1"}', "d.jsonl line 6: the prompt is empty"),
        ('{"prompt": "1", "answer": null}', "d.jsonl line 6: 'answer' is a null"),
        ('{"prompt": "1", "answer": "three"}', "d.jsonl line 6: the reference answer of prompt rows/000005 is"),
        ('{"prompt": "1\\ud800", "answer": "1"}', "d.jsonl line 6 contains half of a surrogate pair ('\\ud800')"),
        ('{"prompt": "' + "1" * 40 + '", "answer": "1"}', "line 6: prompt rows/000005 has 40 tokens; task.max_"),
        ('{"prompt": "1", "answer": "1", "image": "x.png"}', "d.jsonl line 6 has images"),
    ],
)  # fmt: skip
def test_dataset_row_error_names_the_line(folder, line, words):
    assert words in training(folder, "task.max_prompt_tokens=30", lines=[*GOOD[:5], line, *GOOD[5:]])


def test_dataset_missing_column_error_lists_the_columns(folder):
    words = training(folder, "task.answer_column=solution", lines=GOOD)
    assert words.startswith("d.jsonl line 1 has no column 'solution' (task.answer_column) | ")
    assert words.endswith("set task.answer_column to one of: prompt, answer")


def test_dataset_duplicate_id_error_names_both_rows(folder):
    lines = [json.dumps({"prompt": f"{n}+1=", "answer": "1", "name": f"p{n % 20}"}) for n in range(30)]
    words = training(folder, "task.id_column=name", lines=lines)
    assert "has the same prompt id 'p5' as d.jsonl line 6" in words


def test_dataset_with_too_few_rows_is_refused(folder):
    assert "d.jsonl has 3 rows, too few to hold out 4" in training(folder, lines=GOOD[:3])
    assert "the task has 2 training prompts, but train.prompts_per_step is 4" in training(folder, lines=GOOD[:6])


def test_dataset_heldout_prompt_in_training_set_is_refused(folder):
    words = training(folder, "task.heldout_path=d.jsonl", lines=GOOD)
    assert "d.jsonl line 1 (held out) has the same prompt as" in words


def test_dataset_prompt_too_long_for_the_model_is_refused(folder):
    # micro-base was made for 64 tokens: 4 of the prompt and 61 of the answer are one too many
    words = training(folder, "sampling.max_new_tokens=61", lines=[*GOOD[:9], GOOD[10], *GOOD[11:]])
    assert "and its response may have 65 tokens; micro-base supports 64 | lower sampling.max_new_tokens" in words


def test_dataset_chat_prompts_need_a_template(folder):
    turns = [json.dumps({"prompt": [{"role": "user", "content": f"{n}+1="}], "answer": "1"}) for n in range(30)]
    assert "micro-base: the tokenizer has no chat template, but prompts are chat messages" in training(
        folder, lines=turns
    )


def test_unknown_reasoning_gym_dataset_is_answered_with_the_nearest(folder):
    source = ("task.source=reasoning_gym", "task.datasets=[{name: chain_summ}]")
    result = assert_refused("train", "micro", "new", *SMALL, *source, beside=folder)
    assert result.message == "task.datasets: 'chain_summ' is not a reasoning-gym data set"
    assert result.hint == "did you mean chain_sum?"


def test_resume_works_from_another_folder(folder, monkeypatch):
    (folder / "d.jsonl").write_text("\n".join(GOOD))
    (folder / "v.py").write_text("def check(prompt, response, answer):\n    return answer in response\n")
    task = ("task.source=file", "task.path=d.jsonl", "task.verifier=v.py:check")
    assert npo("train", "micro", "new", *SMALL, *task, "train.num_steps=1", "--allow-code").code == 0
    monkeypatch.chdir("/")
    assert npo("resume", folder / "new", "train.num_steps=2", "--allow-code").code == 0


def test_recipe_in_a_folder_of_its_own_finds_its_model_data_and_verifier(folder, monkeypatch):
    project = folder / "project"
    shutil.copytree(MICRO_BASE_FOLDER, project / "base")
    (project / "d.jsonl").write_text("\n".join(GOOD))
    (project / "v.py").write_text("def check(prompt, response, answer):\n    return answer in response\n")
    task = "task: {source: file, path: d.jsonl, verifier: 'v.py:check', pool_size: 16, heldout_size: 4}\n"
    (project / "r.yaml").write_text(f"model: {{path: base}}\n{task}")
    small = [each for each in SMALL if not each.startswith("task.")]
    assert npo("train", "project/r.yaml", "new", *small, "train.num_steps=1", "--allow-code").code == 0
    saved = (folder / "new" / "recipe.yaml").read_text()
    for name in ("base", "d.jsonl", "v.py:check"):
        assert f": {project}/{name}\n" in saved
    monkeypatch.chdir("/")
    assert npo("resume", folder / "new", "train.num_steps=2", "--allow-code").code == 0


# Verifiers


VERIFIERS = """
import os
import time

def raises(prompt, response, answer):
    raise ValueError("boom\\nand more")

def hangs(prompt, response, answer):
    time.sleep(60)

def prints(prompt, response, answer):
    print("result by the verifier")
    return True

def nothing(prompt, response, answer):
    pass

def leaves(prompt, response, answer):
    raise SystemExit(3)

def dies(prompt, response, answer):
    print("no license found")
    os._exit(3)

def other(question):
    return True

NUMBER = 3
"""


def verified_by(folder: Path, verifier: str, *options: str) -> CommandResult:
    """One step judged by a function of the user's."""
    (folder / "v.py").write_text(VERIFIERS)
    task = (f"task.verifier={verifier}", "task.verify_timeout=0.2", "train.num_steps=1", "train.prompts_per_step=2")
    return npo("train", "micro", folder / "new", *SMALL, *task, "train.group_size=2", *options)


@pytest.mark.parametrize(
    ("verifier", "code", "words"),
    [
        ("exakt", 2, "task.verifier=exakt is not a known verifier"),
        ("w.py:f", 2, "task.verifier names a file that does not exist"),
        ("v.py:missing", 2, "v.py has no function 'missing'"),
        ("torn.py:f", 2, "torn.py:1: SyntaxError: '(' was never closed"),
        ("zero.py:f", 2, "zero.py: SyntaxError: source code string cannot contain null bytes"),
        ("v.py:NUMBER", 2, "v.py: NUMBER is not a function"),
        ("v.py:other", 2, "v.py: other(question) takes no response: none of its parameters is response (npo)"),
        ("fails.py:f", 1, "fails.py:1: ModuleNotFoundError: No module named 'no_such_thing'"),
    ],
)
def test_verifier_that_cannot_be_loaded_is_refused(folder, verifier, code, words):
    (folder / "v.py").write_text(VERIFIERS)
    (folder / "torn.py").write_text("def f(\n")
    (folder / "zero.py").write_bytes(b"def f(): pass\0")
    (folder / "fails.py").write_text("import no_such_thing as f\n")
    args = ("train", "micro", "new", *SMALL, f"task.verifier={verifier}", "--allow-code")
    before = {path.name for path in folder.iterdir()}
    result = npo(*args)
    assert (result.code, result.out, result.err.count("\n")) == (code, "", 2)
    assert words in result.message
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before


def test_custom_verifier_needs_allow_code(folder):
    result = verified_by(folder, "v.py:prints")
    assert (result.code, result.hint) == (2, "read the file, then add --allow-code to the command")
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", "v.py:6: ValueError: boom"),
        ("leaves", "v.py:19: SystemExit: 3"),
        ("nothing", "it returned None (None is not a number)"),
        ("dies", "its process died (exit code 3; last output: no license found)"),
    ],
)
def test_failing_custom_verifier_ends_the_run_which_can_be_resumed(folder, function, words):
    result = verified_by(folder, f"{folder}/v.py:{function}", "--allow-code")
    assert (result.code, result.out) == (1, "")
    assert result.message.startswith("the verifier failed on prompt mix3/")
    assert result.message.endswith(words)
    assert "npo resume" in result.hint
    mended = f"def {function}(prompt, response, answer): return 1\ndef old("
    (folder / "v.py").write_text(VERIFIERS.replace(f"def {function}(", mended))
    assert npo("resume", folder / "new", "--allow-code").code == 0


def test_allow_code_is_given_once_per_run_and_content_of_the_file(folder):
    code = "def check(prompt, response, answer):\n    return answer in response\n"
    (folder / "v.py").write_text(code)
    train = ("train", "micro", "new", *SMALL, "task.verifier=v.py:check", "train.num_steps=1")
    assert npo(*train, "--allow-code").code == 0
    assert npo("resume", "new", "train.num_steps=2").code == 0
    (folder / "v.py").write_text(code.replace("in", "not in"))
    for args in (["resume", "new", "train.num_steps=3"], ["eval", "new"]):
        refused = npo(*args)
        changed = f"{folder}/v.py (task.verifier) has changed since --allow-code was given for this run"
        assert (refused.code, refused.message) == (2, changed)
        assert refused.hint == "read the file, then add --allow-code to the command again"
    assert npo("eval", "new", "--step", "1", "--allow-code").code == 0
    assert npo("resume", "new", "train.num_steps=3").code == 0
    other = assert_refused(*train[:2], "other", *train[3:], beside=folder)
    assert other.hint == "read the file, then add --allow-code to the command"


def test_run_directory_from_elsewhere_permits_no_code(folder, monkeypatch):
    (folder / "v.py").write_text("def check(prompt, response, answer):\n    return answer in response\n")
    train = ("train", "micro", "new", *SMALL, "task.verifier=v.py:check", "train.num_steps=1")
    assert npo(*train, "--allow-code").code == 0
    assert npo("eval", "new", "--step", "1").code == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "of another user"))
    assert "runs only with --allow-code" in assert_refused("eval", "new", "--step", "1", beside=folder).message


def read_steps(result: CommandResult) -> list[dict]:
    return [line for line in map(json.loads, result.out.splitlines()) if line["record"] == "step_report"]


def test_hanging_custom_verifier_is_stopped_by_the_timeout(folder):
    result = verified_by(folder, "v.py:hangs", "--allow-code", "--json")
    (line,) = read_steps(result)
    assert (result.code, line["verify/timeout"], line["reward"]) == (0, 1.0, 0.0)


def test_output_of_a_custom_verifier_is_not_data(folder):
    result = verified_by(folder, "v.py:prints", "--allow-code", "--json")
    (line,) = read_steps(result)
    assert (result.code, line["reward"]) == (0, 1.0)
