import py_compile
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from contextvars import Context
from pathlib import Path

import pytest

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.tasks.base import LoadedPrompts
from npo_cli.tasks.custom_verifier import (
    CustomVerifier,
    code_permitted,
    is_custom_verifier,
    load_code,
    make_custom_verifier,
)
from npo_cli.tasks.task import Task, load_task
from npo_cli.types.rollouts import Message, Prompt, VerifierResult

VERIFIER = """
import sys

from neighbour import FULL


def check(prompt, response, answer):
    print("noise")
    if response == "loop":
        while True:
            pass
    if response == "fail":
        raise KeyError(prompt)
    if response == "exit":
        sys.exit("enough")
    if response == "none":
        return None
    return {"full": FULL, "half": 0.5, "true": response.startswith("t")}.get(response, response == answer)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(VERIFIER)
    (tmp_path / "neighbour.py").write_text("FULL = 1.0\n")
    monkeypatch.chdir(tmp_path)
    with code_permitted():
        yield tmp_path


def open_verifier(verifier: str, **settings: object) -> CustomVerifier:
    task = TaskSettings(verifier=verifier, verify_workers=1, verify_timeout=0.5, **settings)
    return make_custom_verifier(verifier, task, LoadedPrompts(train=(), heldout=()))


def verdicts(responses: Sequence[str], verifier: str = "mine.py:check") -> list[VerifierResult]:
    grader = open_verifier(verifier)
    prompts = [Prompt(prompt_id=f"p{place}", text="2+2=", answer="4") for place in range(len(responses))]
    try:
        return grader.grade(prompts, responses)
    finally:
        grader.close()


def test_custom_verifier_is_named_by_file_and_function():
    assert is_custom_verifier("mine.py:check")
    assert is_custom_verifier("/a b/c:d/mine.py:check")
    assert not is_custom_verifier("exact")
    assert not is_custom_verifier("mine.py")


def test_custom_verifier_true_and_one_are_correct(folder: Path, capfd: pytest.CaptureFixture[str]):
    found = verdicts(["4", "5", "full", "half", "true"])
    assert [one.verdict for one in found] == ["correct", "wrong", "correct", "wrong", "correct"]
    assert capfd.readouterr().out == ""  # its prints are talk, not data


def test_custom_verifier_that_hangs_is_a_timeout(folder: Path):
    assert [one.verdict for one in verdicts(["4", "loop", "4"])] == ["correct", "timeout", "correct"]


@pytest.mark.parametrize(
    ("response", "line", "said"),
    [("fail", 13, "KeyError: '2+2='"), ("exit", 15, "SystemExit: enough")],
)
def test_custom_verifier_exception_names_file_and_line(folder: Path, response: str, line: int, said: str):
    with pytest.raises(RunFailed, match=re.escape(f"on prompt p1: {folder / 'mine.py'}:{line}: {said}")):
        verdicts(["4", response])


def test_custom_verifier_invalid_value_is_an_error(folder: Path):
    with pytest.raises(RunFailed, match=r"on prompt p0: .*check must return a finite number.*, it returned None"):
        verdicts(["none"])


def test_custom_verifier_import_error_names_the_line(folder: Path):
    (folder / "neighbour.py").write_text("FULL = 1 / 0\n")
    with pytest.raises(RunFailed, match=r"neighbour\.py:1: ZeroDivisionError"):
        verdicts(["4"])


def test_custom_verifier_gets_chat_prompts_as_text(folder: Path):
    (folder / "mine.py").write_text(
        "def check(prompt, response, answer):\n    return prompt == 'Be brief.\\n\\n2+2='\n"
    )
    grader = open_verifier("mine.py:check")
    messages = (Message(role="system", content="Be brief."), Message(role="user", content="2+2="))
    assert grader.grade([Prompt(prompt_id="a", messages=messages, answer="4")], ["4"])[0].verdict == "correct"
    grader.close()


def refusal(verifier: str) -> NpoError:
    with pytest.raises(NpoError) as caught:
        open_verifier(verifier)
    return caught.value


def test_custom_verifier_is_refused_without_permission(folder: Path):
    error = Context().run(refusal, "mine.py:check")
    assert "--allow-code" in error.hint
    assert Context().run(refusal, f"{folder / 'mine.py'}:check").message == error.message


def test_custom_verifier_missing_file_or_function_is_named(folder: Path):
    (folder / "mine.py").write_text(VERIFIER + "\nraise SystemExit\n")
    assert str(folder / "other.py") in refusal("other.py:check").message
    missing = refusal("mine.py:chekc")
    assert missing.message.endswith("has no function 'chekc'")
    assert "check" in missing.hint


def test_custom_verifier_syntax_error_names_the_line(folder: Path):
    (folder / "mine.py").write_text("def check(:\n    pass\n")
    assert f"{folder / 'mine.py'}:1: SyntaxError" in refusal("mine.py:check").message


ROWS = """
def by_topic(response, topic):
    return response == topic


def compare(response, answer):
    return response == answer


def optional(response, answer="none given"):
    return response == answer


def everything(response, **columns):
    return "answer" not in columns


def verl(solution_str, ground_truth):
    return solution_str == ground_truth
"""


def load_rows(folder: Path, function: str, *rows: str) -> Task:
    (folder / "rows.py").write_text(ROWS)
    (folder / "data.jsonl").write_text("".join(f"{row}\n" for row in rows))
    settings = TaskSettings(
        source="file", path="data.jsonl", heldout_size=1, verifier=f"rows.py:{function}", verify_workers=1
    )
    return load_task(settings, seed=0)


@pytest.mark.parametrize(
    ("function", "response"), [("by_topic", "sums"), ("optional", "none given"), ("everything", "x")]
)
def test_custom_verifier_works_without_reference_answers(folder: Path, function: str, response: str):
    with closing(load_rows(folder, function, *(f'{{"prompt": "{n}", "topic": "sums"}}' for n in range(3)))) as task:
        (result,) = task.grade(task.train[:1], [response])
    assert result.verdict == "correct"


@pytest.mark.parametrize(("function", "argument"), [("compare", "answer"), ("verl", "ground_truth")])
def test_custom_verifier_that_asks_for_answers_names_the_column_that_is_missing(folder: Path, function, argument):
    with pytest.raises(NpoError) as refusal:
        load_rows(folder, function, *(f'{{"prompt": "{n}", "topic": "sums"}}' for n in range(3)))
    assert refusal.value.message.endswith(
        f"{function} asks for {argument!r}, but the data has no column 'answer' (task.answer_column)"
    )
    assert "prompt, topic" in refusal.value.hint


def test_custom_verifier_names_the_row_without_an_answer_among_others(folder: Path):
    rows = ('{"prompt": "1", "answer": "2"}', '{"prompt": "2"}', '{"prompt": "3", "answer": "4"}')
    with pytest.raises(NpoError, match=r"data.jsonl line 2: prompt rows/000001 has no reference answer"):
        load_rows(folder, "compare", *rows)


def test_byte_code_beside_the_file_is_neither_run_nor_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "grade.py"
    path.write_text("VALUE = 2\n")
    py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    path.write_text("VALUE = 1\n")
    assert load_code(str(path)).VALUE == 1
    shutil.rmtree(tmp_path / "__pycache__")
    assert load_code(str(path)).VALUE == 1
    assert [each.name for each in tmp_path.iterdir()] == ["grade.py"]
