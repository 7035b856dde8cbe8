"""Every line of bad_inputs.yaml is refused: exit code 2, at most four lines, nothing on stdout, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from tests.helpers.autonpo_runs import EAGER
from tests.helpers.cli_errors import SMALL, CommandResult, folder_digests, npo

pytestmark = pytest.mark.slow
INPUTS = yaml.safe_load(Path(__file__).with_name("bad_inputs.yaml").read_text(encoding="utf-8"))
GOOD = tuple(json.dumps({"prompt": f"{number}+1=", "answer": str(number + 1)}) for number in range(30))
MAX_LINES = 4
REWARD_FUNCTIONS = """
def f(prompt, response, answer): return True
def needs_column(response, difficulty): return 1
def no_response(prompt, answer): return 1
def trl_column(completions, solution, **kwargs): return [1.0]
def verl_column(solution_str, ground_truth, language): return 1
def positional(response, /): return 1
NUMBER = 3
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 0, 2 and 4 and the guide cache `near`."""
    run = tmp_path_factory.mktemp("bad") / "R"
    assert npo("train", "micro", run, *SMALL).code == 0
    sample = ("sample-guide", run, "--at", 2, "--source", 4, "--name", "near", "guide.cache.min_yield=0")
    assert npo(*sample).code == 0
    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_refused(folder: Path, *args: object) -> CommandResult:
    before = folder_digests(folder)
    result = npo(*args)
    assert (result.code, result.out) == (2, ""), result
    assert 0 < len(result.err.splitlines()) <= MAX_LINES, result.err
    assert "Traceback" not in result.err
    assert [line.split()[0] for line in result.err.splitlines()[-2:]] == ["error:", "try:"], result.err
    assert folder_digests(folder) == before
    return result


@pytest.mark.parametrize("settings", INPUTS["settings"], ids=str)
def test_bad_setting(folder: Path, settings: str | list[str]):
    assert_refused(folder, "train", "micro", "new", *SMALL, *([settings] if isinstance(settings, str) else settings))


@pytest.mark.parametrize("settings", INPUTS["ladders"], ids=str)
def test_bad_ladder(folder: Path, settings: list[str]):
    assert_refused(folder, "train", "micro", "new", *EAGER, "autonpo.rungs.num_steps=2", *settings, "--autonpo")


@pytest.mark.parametrize("args", INPUTS["commands"], ids=" ".join)
def test_bad_command(folder: Path, finished: Path, args: list[str]):
    shutil.copytree(finished, folder / "R")
    assert_refused(folder, *args)


@pytest.mark.parametrize("source", INPUTS["endpoints"])
def test_bad_endpoint(folder: Path, finished: Path, source: str):
    shutil.copytree(finished, folder / "R")
    assert_refused(folder, "sample-guide", "R", "--at", 2, "--name", "new", "--source", source)


@pytest.mark.parametrize("text", INPUTS["recipes"])
def test_bad_recipe(folder: Path, text: str):
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    assert_refused(folder, "train", "./recipe.yaml", "new")


@pytest.mark.parametrize("line", INPUTS["data"])
def test_bad_data(folder: Path, line: str):
    text = "\n".join([*GOOD[:5], line, *GOOD[5:]])
    (folder / "d.jsonl").write_text(text, encoding="utf-8", errors="surrogatepass")
    task = ("task.source=file", "task.path=d.jsonl", "task.verifier=last_number", "task.max_prompt_tokens=50")
    assert_refused(folder, "train", "micro", "new", *SMALL, *task)


@pytest.mark.parametrize("verifier", INPUTS["verifiers"])
def test_bad_verifier(folder: Path, verifier: str):
    (folder / "v.py").write_text(REWARD_FUNCTIONS)
    (folder / "torn.py").write_text("def f(\n")
    assert_refused(folder, "train", "micro", "new", *SMALL, f"task.verifier={verifier}", "--allow-code")


@pytest.mark.parametrize("files", INPUTS["models"], ids=json.dumps)
def test_bad_model(folder: Path, files: dict[str, str | None]):
    shutil.copytree(MICRO_BASE_FOLDER, folder / "base")
    for name, text in files.items():
        if text is None:
            (folder / "base" / name).unlink()
        else:
            (folder / "base" / name).write_text(text)
    assert_refused(folder, "train", "micro", "new", *SMALL, "model.path=base")


def test_there_are_enough_bad_inputs():
    assert sum(map(len, INPUTS.values())) >= 350
