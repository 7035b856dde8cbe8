"""`npo check`: every fault of a project at once, with its fix, and nothing written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from npo_cli.preflight.project import check_project
from npo_cli.tasks.custom_verifier import code_permitted
from npo_cli.types.views import ProjectCheck
from tests.helpers.cli_errors import folder_digests, npo

BROKEN = yaml.safe_load((Path(__file__).parent / "broken_projects.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    npo("init", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def break_project(folder: Path, case: dict) -> None:
    for name in case.get("model", ()):
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / name).write_bytes((MICRO_BASE_FOLDER / name).read_bytes())
    for name, text in case.get("files", {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    if "rows" in case:
        lines = [json.dumps(row) + "\n" for row in case["rows"]]
        (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")


def faults_of(checks: list[ProjectCheck]) -> list[ProjectCheck]:
    return [check for check in checks if check.state == "fault"]


def test_there_are_twenty_broken_projects_with_several_faults_each():
    assert len(BROKEN) == 20
    assert sum(len(case["faults"]) >= 2 for case in BROKEN) >= 19


@pytest.mark.parametrize("case", BROKEN, ids=[case["name"] for case in BROKEN])
def test_every_fault_of_a_broken_project_is_named_at_once(project, case):
    break_project(project, case)
    before = folder_digests(project)
    settings = ["task.verifier=exact", *case["recipe"]]
    if case.get("allow_code"):
        with code_permitted():
            checks = list(check_project("recipe.yaml", settings))
    else:
        checks = list(check_project("recipe.yaml", settings))
    found = faults_of(checks)
    assert len(found) == len(case["faults"]), [check.message for check in found]
    for part, fault in zip(case["faults"], found, strict=True):
        assert part in fault.message
        assert fault.hint
    assert folder_digests(project) == before


def test_project_of_init_has_no_fault_and_shows_what_was_checked(project):
    result = npo("check", "recipe.yaml")
    assert (result.code, result.out.splitlines()[-1]) == (0, "next: npo train recipe.yaml")
    assert max(map(len, result.out.splitlines())) <= 80
    *checks, conclusion = [json.loads(line) for line in npo("check", "recipe.yaml", "--json").out.splitlines()]
    assert conclusion["sentence"] == "recipe.yaml has no fault."
    assert {check["state"] for check in checks} == {"ok"}
    parts = {check["part"]: check["message"] for check in checks}
    assert {"recipe", "data", "model", "engine", "verifier", "prompts", "memory", "disk"} == set(parts)
    assert parts["verifier"] == "grade: '#146459' is correct, '(no answer)' is wrong; tried on 3 rows"
    assert "the model reads: '46699+59764='" in parts["prompts"]


def test_faults_leave_with_2_and_an_error_that_counts_them(project):
    result = npo("check", "recipe.yaml", "train.lrr=1", "model.path=./nowhere")
    assert (result.code, result.message) == (2, "recipe.yaml has 2 faults, listed above")
    assert result.hint == "write train.lr instead of train.lrr"
    *lines, last = npo("check", "recipe.yaml", "train.lrr=1", "--json").out.splitlines()
    assert [json.loads(line)["state"] for line in lines].count("fault") == 1
    assert json.loads(last)["exit_code"] == 2


def test_user_code_is_not_run_without_permission(project):
    (project / "grade.py").write_text("open('ran', 'w')\ndef grade(prompt, response, answer):\n    return False\n")
    (note,) = [each for each in check_project("recipe.yaml") if each.part == "verifier"]
    assert (note.state, note.hint) == ("note", "read the file, then repeat with --allow-code")
    assert not (project / "ran").exists()


def test_repeated_prompts_are_a_note(project):
    lines = (project / "data.jsonl").read_text().splitlines()
    (project / "data.jsonl").write_text("\n".join([*lines, lines[0]]))
    (note,) = [each for each in check_project("recipe.yaml", ["task.heldout_size=1"]) if each.state == "note"]
    assert note.message == "rows with the prompt of an earlier row: 11 (1 in all)"


def test_faults_that_need_no_torch_are_found_without_it(project):
    code = (
        "import sys; from npo_cli.preflight.project import check_project\n"
        "found = list(check_project('recipe.yaml', ['model.path=./nowhere', 'task.path=grade.py', 'train.lr=0']))\n"
        "assert [one.state for one in found].count('fault') == 3, found\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_images_are_counted_and_every_missing_or_large_one_is_named(project):
    for name, size in (("a", (8, 4)), ("b", (6, 5)), ("large", (40, 30))):
        Image.new("L", size).save(project / f"{name}.png")
    images = (["a.png", "b.png"], [], "gone.png", "large.png", "away.png", "b.png")
    rows = [
        {"prompt": f"{'<image>' * len([one] if isinstance(one, str) else one)}{n}", "answer": "1", "images": one}
        for n, one in enumerate(images)
    ]
    (project / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["task.image_column=images", "task.heldout_size=1", "train.prompts_per_step=2", "task.verifier=exact"]
    checks = list(check_project("recipe.yaml", [*settings, "task.max_image_pixels=100"]))
    missing, large = (check.message for check in faults_of(checks) if check.part == "data")
    assert "line 3, image 1 (gone.png) cannot be read: No such file or directory; and in 1 more rows: 5" in missing
    assert "line 4, image 1 (large.png) has 40 x 30 = 1,200 pixels; task.max_image_pixels is 100" in large
    notes = [check.message for check in checks if check.part == "data" and check.state == "ok"]
    assert "3 images in 2 rows, the largest 8 x 4 = 32 pixels, of at most 100" in notes


def test_verifier_that_asks_for_no_answer_is_tried_without_one(project):
    (project / "data.jsonl").write_text("".join(f'{{"prompt": "{n}+1=", "sum": {n + 1}}}\n' for n in range(6)))
    (project / "grade.py").write_text("def grade(response, sum):\n    return response == str(sum)\n")
    settings = ["task.heldout_size=1", "train.prompts_per_step=2"]
    with code_permitted():
        checks = list(check_project("recipe.yaml", settings))
    assert faults_of(checks) == []
    (verifier,) = (check.message for check in checks if check.part == "verifier")
    assert verifier == "grade: '(no answer)' is wrong; tried on 3 rows without a reference answer"
