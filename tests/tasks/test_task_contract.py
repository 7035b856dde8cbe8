"""What every task source and every verifier must do, for all registered ones and for ones that this test adds."""

import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.registry import TASKS, VERIFIERS
from npo_cli.tasks.base import LoadedPrompts, TaskSource, Verifier
from npo_cli.tasks.custom_verifier import code_permitted
from npo_cli.tasks.task import load_task
from npo_cli.types.rollouts import Prompt, VerifierResult

NEEDED = {"reasoning_gym": "reasoning_gym", "shapes": "PIL", "file": "math_verify", "verifiers": "verifiers"}
"""Packages that a source or its verifier needs."""


def params(names: Iterable[str]) -> list[object]:
    """Each process of `verifiers` imports for seconds."""
    return [pytest.param(name, marks=pytest.mark.slow if name == "verifiers" else ()) for name in names]


CUSTOM_TASK = """
def load():
    rows = ({"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(20))
    return {"rows": rows, "verifier": grade}


def grade(response, answer):
    return response == answer
"""


class SquaresTask(TaskSource):
    """A whole task source in one class: squares of numbers."""

    name = "squares"
    default_verifier = "shorter"
    formats_prompts = False

    @classmethod
    def load(cls, settings: TaskSettings, *, seed: int) -> LoadedPrompts:
        def prompts(first: int, count: int) -> tuple[Prompt, ...]:
            numbers = range(first, first + count)
            return tuple(Prompt(prompt_id=f"squares/{n}", text=f"{n}^2=", answer=str(n * n)) for n in numbers)

        return LoadedPrompts(
            train=prompts(seed, settings.pool_size), heldout=prompts(seed + settings.pool_size, settings.heldout_size)
        )


class ShorterVerifier(Verifier):
    """A whole verifier in one class: the answer, and nothing longer than it."""

    name = "shorter"

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]:
        pairs = zip(prompts, responses, strict=True)
        return [
            VerifierResult(verdict="correct" if text and prompt.answer.startswith(text) else "wrong")
            for prompt, text in pairs
        ]


@pytest.fixture(autouse=True)
def plug_ins(monkeypatch: pytest.MonkeyPatch):
    with TASKS.registered(SquaresTask), VERIFIERS.registered(ShorterVerifier), code_permitted():
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "data" / "environments")
        yield


def settings_for(source: str, folder: Path, **changes: object) -> TaskSettings:
    rows = [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets = [{"name": "chain_sum"}] if source == "reasoning_gym" else ()
    path = str(folder / "rows.jsonl") if source == "file" else None
    function = None
    if source == "custom":
        (folder / "rows.py").write_text(CUSTOM_TASK)
        function = f"{folder}/rows.py:load"
    sizes = {"pool_size": 6, "heldout_size": 4, "verify_workers": 1}
    environment = "sums-env" if source == "verifiers" else None
    own = {"source": source, "datasets": datasets, "path": path, "function": function, "environment": environment}
    return TaskSettings(**own | sizes | changes)


@pytest.mark.parametrize("source", params([*TASKS.names(), "squares"]))
def test_task_source_loads_disjoint_splits_that_its_verifier_grades(source: str, tmp_path: Path):
    if source in NEEDED and find_spec(NEEDED[source]) is None:
        pytest.skip(f"{NEEDED[source]} is not installed")
    assert TASKS.get(source).name == source
    task, again = (load_task(settings_for(source, tmp_path), seed=3) for _ in range(2))
    try:
        assert (task.train, task.heldout) == (again.train, again.heldout)
        assert (len(task.train), len(task.heldout)) == (6, 4)
        prompts = [*task.train, *task.heldout]
        assert len({prompt.prompt_id for prompt in prompts}) == 10
        assert len({(prompt.text, prompt.messages, prompt.images) for prompt in prompts}) == 10
        # micro has scratchpads before the answer
        answers = [f"#{prompt.answer}" if source == "micro" else prompt.answer for prompt in prompts]
        assert [result.verdict for result in task.grade(prompts, answers)] == ["correct"] * 10
    finally:
        task.close()
        again.close()


@pytest.mark.parametrize("source", params([*TASKS.names(), "squares"]))
def test_task_pool_does_not_depend_on_the_number_of_heldout_prompts(source: str, tmp_path: Path):
    if source in NEEDED and find_spec(NEEDED[source]) is None:
        pytest.skip(f"{NEEDED[source]} is not installed")
    if source in ("file", "reasoning_gym"):
        pytest.skip("splits one collection of problems")
    load = TASKS.get(source).load
    few, many = (load(settings_for(source, tmp_path, heldout_size=size), seed=3).train for size in (1, 9))
    assert few == many


@pytest.mark.parametrize("source", params([*TASKS.names(), "squares"]))
def test_task_source_refuses_settings_that_it_does_not_use(source: str, tmp_path: Path):
    task: type[TaskSource] = TASKS.get(source)
    unused = {} if task.formats_prompts else {"suffix": "Think."}
    unused |= {} if task.supports_images else {"image_column": "images"}
    for key, value in unused.items():
        with pytest.raises(NpoError, match=rf"task\.{key} "):
            load_task(settings_for(source, tmp_path, **{key: value}), seed=0)


@pytest.mark.parametrize("name", params([*VERIFIERS.names(), "shorter"]))
def test_verifier_returns_one_verdict_per_response_in_order(name: str, tmp_path: Path):
    if find_spec(name) is None and name in ("math_verify", "reasoning_gym", "verifiers"):
        pytest.skip(f"{name} is not installed")
    verifier: type[Verifier] = VERIFIERS.get(name)
    assert verifier.name == name
    source = verifier.sources[0] if verifier.sources else "squares"
    task = load_task(settings_for(source, tmp_path, verifier=name), seed=3)
    try:
        prompts = task.train[:3]
        answers = [f"#{prompt.answer}" if source == "micro" else prompt.answer for prompt in prompts]
        results = task.grade(prompts, [answers[0], "", answers[2]])
        assert results[0].verdict == results[2].verdict == "correct"
        assert results[1].verdict in ("wrong", "unparseable")
        assert [result.reward for result in results] == [1.0, 0.0, 1.0]
        assert task.grade([], []) == []
        task.close()
        assert task.grade(prompts[:1], answers[:1])[0].verdict == "correct"
    finally:
        task.close()


def test_verifier_of_another_task_source_is_refused(tmp_path: Path):
    with pytest.raises(NpoError, match=r"task\.verifier=micro needs task\.source=micro, but task\.source is squares"):
        load_task(settings_for("squares", tmp_path, verifier="micro"), seed=0)
