import json
import subprocess
import sys
from pathlib import Path

import pytest

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.custom_verifier import code_permitted
from npo_cli.tasks.math_verify import MathVerifier
from npo_cli.tasks.micro import micro_prompts
from npo_cli.tasks.task import load_task


def small(**settings: object) -> TaskSettings:
    return TaskSettings(**({"pool_size": 8, "heldout_size": 4} | settings))


def data_file(folder: Path, answers: list[str]) -> str:
    path = folder / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "answer": answer}) + "\n" for n, answer in enumerate(answers))
    )
    return str(path)


def test_load_task_micro_has_disjoint_splits():
    task = load_task(small(kind="addh1"), seed=3)
    assert (*task.train, *task.heldout) == tuple(micro_prompts("addh1", 12, 3))
    assert not {prompt.text for prompt in task.train} & {prompt.text for prompt in task.heldout}
    right = f"#{task.train[0].answer}"
    assert [one.verdict for one in task.grade(task.train[:2], [right, "#"])] == ["correct", "wrong"]


def test_load_task_pool_depends_on_the_seed_only():
    assert load_task(small(heldout_size=9), seed=3).train == load_task(small(), seed=3).train
    assert load_task(small(seed=5), seed=3).train == load_task(small(), seed=5).train


def test_load_task_file_is_verified_by_math_verify(tmp_path: Path):
    pytest.importorskip("math_verify")
    task = load_task(small(source="file", path=data_file(tmp_path, ["1/2"] * 8)), seed=0)
    assert isinstance(task.verifiers[0].verifier, MathVerifier)
    assert task.grade(task.train[:1], ["\\boxed{0.5}"])[0].verdict == "correct"
    task.close()
    task = load_task(small(source="file", path=data_file(tmp_path, ["1/2"] * 8), verifier="exact"), seed=0)
    assert task.grade(task.train[:1], ["0.5"])[0].verdict == "wrong"


def test_load_task_custom_verifier_needs_allow_code(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def longer(prompt, response, answer):\n    return len(response) > len(answer)\n")
    settings = small(verifier=f"{tmp_path / 'mine.py'}:longer", verify_workers=1)
    with pytest.raises(NpoError) as caught:
        load_task(settings, seed=0)
    assert "--allow-code" in caught.value.hint
    with code_permitted():
        task = load_task(settings, seed=0)
    assert [one.verdict for one in task.grade(task.train[:2], ["123456789", ""])] == ["correct", "wrong"]
    task.close()


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"verifier": "exakt"}, "task.verifier=exakt is not a known verifier", "did you mean exact?"),
        ({"verifier": "zzz"}, "task.verifier=zzz is not a known verifier", "file.py:function"),
        (
            {"verifier": "reasoning_gym"},
            "but task.source is micro",
            "task.verifier=auto",
        ),
        ({"suffix": "Go."}, "task.suffix has no effect", "task.suffix"),
        ({"source": "file"}, "task.source=file needs a file", "set task.path"),
        ({"source": "reasoning_gym"}, "task.source=reasoning_gym needs data sets", "set task.datasets"),
        ({"image_column": "images"}, "task.source is micro", "set task.source=file"),
        ({"chat": True}, "task.chat has no effect", "task.chat"),
        (
            {"source": "reasoning_gym", "datasets": [{"name": "gcd"}], "system": "S"},
            "needs chat prompts",
            "task.chat=true",
        ),
    ],
)
def test_load_task_refuses_contradictory_settings(settings: dict[str, object], message: str, hint: str):
    with pytest.raises(NpoError) as caught:
        load_task(small(**settings), seed=0)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_load_task_refuses_an_unreadable_reference_answer(tmp_path: Path):
    path = data_file(tmp_path, ["1", "2", "three", "4", "5", "6"])
    with pytest.raises(NpoError, match="rows/000002 is not a number"):
        load_task(small(source="file", path=path, verifier="last_number", heldout_size=1), seed=0)


@pytest.mark.parametrize(
    ("blocked", "settings", "hint"),
    [
        ("reasoning_gym", {"source": "reasoning_gym", "datasets": [{"name": "gcd"}]}, "pip install reasoning-gym"),
        ("math_verify", {"verifier": "math_verify"}, "pip install math-verify"),
        ("pyarrow", {"source": "file", "path": "a.parquet"}, "pip install pyarrow"),
    ],
)
def test_load_task_missing_package_is_named_with_its_command(
    tmp_path: Path, blocked: str, settings: dict[str, object], hint: str
):
    # a real interpreter in which the import fails, as it does where the package is absent
    (tmp_path / "a.parquet").write_text("")
    script = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {blocked!r}:
            raise ModuleNotFoundError(name)

import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {blocked!r} else real(name, *rest)
sys.meta_path.insert(0, Absent())
from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.task import load_task
try:
    load_task(TaskSettings(**{settings!r}), seed=0)
except NpoError as error:
    print(error.hint)
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script]
    environment = {"PYTHONPATH": str(root), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert hint in done.stdout


def test_tasks_import_nothing_heavy():
    script = "import sys, npo_cli.tasks.task; print([m for m in HEAVY if m in sys.modules])"
    heavy = ("torch", "transformers", "pyarrow", "reasoning_gym", "math_verify", "sympy", "numpy")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script.replace("HEAVY", repr(heavy))]
    assert subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout == "[]\n"
