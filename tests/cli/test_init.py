"""`npo init`: a project that trains at once, and that never replaces a file."""

import json
import shutil

import pytest

from npo_cli.cli.init import PROJECT_FILES
from npo_cli.config.loading import load_recipe
from tests.helpers.cli_errors import assert_refused, folder_digests, npo

FEW_STEPS = ("train.num_steps=2", "train.save_every=2", "eval.every=0", "model.threads=1")


@pytest.fixture
def project(tmp_path, monkeypatch):
    result = npo("init", tmp_path / "p")
    assert result.code == 0
    assert result.out.splitlines()[-1].endswith("&& npo check recipe.yaml")
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path / "p"


def test_init_writes_a_recipe_of_about_20_lines_a_verifier_and_ten_rows(project):
    assert sorted(path.name for path in project.iterdir()) == sorted(PROJECT_FILES)
    recipe = (project / "recipe.yaml").read_text(encoding="utf-8")
    assert 18 <= len(recipe.splitlines()) <= 24
    assert max(map(len, recipe.splitlines())) <= 100
    rows = [json.loads(line) for line in (project / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sorted(row) for row in rows] == [["answer", "prompt"]] * 10
    assert load_recipe("recipe.yaml").task.verifier == "grade.py:grade"


def test_init_project_trains_at_once_and_needs_permission_once_its_verifier_is_edited(project):
    result = npo("train", "recipe.yaml", "r", *FEW_STEPS)
    assert (result.code, (project / "r" / "branches" / "main").is_dir()) == (0, True), result.err
    with (project / "grade.py").open("a", encoding="utf-8") as file:
        file.write("\n# my rule\n")
    refused = npo("train", "recipe.yaml", "r2", *FEW_STEPS)
    assert refused.code == 2
    assert "--allow-code" in refused.message


@pytest.mark.parametrize("name", PROJECT_FILES)
def test_init_never_overwrites_and_then_writes_nothing(tmp_path, name):
    (tmp_path / name).write_text("mine")
    result = assert_refused("init", tmp_path, beside=tmp_path)
    assert result.message == f"{tmp_path / name} exists already; nothing was written"


def test_init_killed_between_two_files_writes_the_others(tmp_path):
    assert npo("init", tmp_path / "whole").code == 0
    (tmp_path / "killed").mkdir()
    first = next(iter(PROJECT_FILES))
    shutil.copy(tmp_path / "whole" / first, tmp_path / "killed" / first)
    assert npo("init", tmp_path / "killed").code == 0
    assert folder_digests(tmp_path / "killed") == folder_digests(tmp_path / "whole")
    assert len(list((tmp_path / "killed").iterdir())) == len(PROJECT_FILES)


def test_init_refuses_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert assert_refused("init", tmp_path / "file", beside=tmp_path).message.endswith("file is a file")


def test_init_prints_json(tmp_path):
    *lines, conclusion = [json.loads(line) for line in npo("init", tmp_path / "new" / "p", "--json").out.splitlines()]
    assert conclusion["record"] == "conclusion"
    assert [line["record"] for line in lines] == ["written_file"] * 3
    assert [line["path"] for line in lines] == [str(tmp_path / "new" / "p" / name) for name in PROJECT_FILES]
