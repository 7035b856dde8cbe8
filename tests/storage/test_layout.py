import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_cli.config.loading import load_recipe, recipe_to_dict
from npo_cli.errors import NpoError
from npo_cli.storage.layout import FORMAT_VERSION, create_run, format_step, open_run, parse_step, validate_name
from tests.storage.builders import RECIPE, new_run


def test_steps_are_padded_so_that_names_sort_like_steps():
    assert format_step(120) == "step_000120"
    assert sorted(map(format_step, (1000, 20, 300))) == ["step_000020", "step_000300", "step_001000"]


@given(st.integers(min_value=0, max_value=10**9))
def test_a_step_is_read_back_from_its_name(step: int):
    assert parse_step(format_step(step)) == step


@pytest.mark.parametrize("name", [".step_000120.partial", "step_120", "step_0000120", "step_abcdef", "training_state"])
def test_other_names_are_no_step(name: str):
    assert parse_step(name) is None


@pytest.mark.parametrize("name", ["main", "late-2", "A.b_c", "x" * 64])
def test_plain_names_are_allowed(name: str):
    assert validate_name(name) == name


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a b", "x" * 65, "è", "a\n"])
def test_names_that_would_leave_the_folder_are_refused(name: str):
    with pytest.raises(NpoError, match="cannot name a guide or a branch"):
        validate_name(name)


def test_a_new_run_can_be_opened_and_knows_its_recipe(tmp_path):
    made = create_run(tmp_path / "deep" / "run", recipe=RECIPE, npo_version="0.1.0")
    run = open_run(tmp_path / "deep" / "run")
    assert run.run_id == made.run_id
    assert len(run.run_id) == 32
    assert run.read_recipe() == run.read_recipe("main") == RECIPE
    assert run.info.format == FORMAT_VERSION == 3


def test_a_branch_has_a_recipe_of_its_own(tmp_path):
    run = new_run(tmp_path)
    run.save_recipe("main", {"train": {"num_steps": 8}})
    assert run.read_recipe("main") == {"train": {"num_steps": 8}}
    assert run.read_recipe() == RECIPE


def test_an_empty_folder_may_become_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    assert create_run(tmp_path / "run", recipe=RECIPE, npo_version="0.1.0").root == tmp_path / "run"


def test_an_existing_run_is_refused_with_the_command_that_goes_on(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(NpoError, match="already holds a run") as caught:
        create_run(run.root, recipe=RECIPE, npo_version="0.1.0")
    assert f"npo resume {run.root}" in caught.value.hint
    assert "RUN" in caught.value.hint


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NpoError, match="is not empty and holds no run") as caught:
        create_run(tmp_path, recipe=RECIPE, npo_version="0.1.0")
    assert "RUN" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_a_training_left_that_was_killed_at_creation_is_named(tmp_path):
    run = create_run(tmp_path / "run", recipe=RECIPE, npo_version="0.1.0")
    (run.root / "npo_run.json").unlink()
    with pytest.raises(NpoError, match="killed before it began") as caught:
        create_run(run.root, recipe=RECIPE, npo_version="0.1.0")
    assert caught.value.hint.startswith("choose a new folder for RUN; this one may be removed")
    (run.root / "notes.txt").write_text("mine")
    with pytest.raises(NpoError, match="is not empty and holds no run"):
        create_run(run.root, recipe=RECIPE, npo_version="0.1.0")


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NpoError, match="is a file, not a folder"):
        create_run(tmp_path / "run", recipe=RECIPE, npo_version="0.1.0")
    with pytest.raises(NpoError, match="cannot make"):
        create_run(tmp_path / "run" / "inner", recipe=RECIPE, npo_version="0.1.0")


def test_a_failed_birth_leaves_nothing_behind(tmp_path):
    unspeakable = {"train": object()}  # YAML cannot say it
    with pytest.raises(Exception, match="cannot represent"):
        create_run(tmp_path / "new" / "run", recipe=unspeakable, npo_version="0.1.0")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(NpoError, match="there is no run directory") as caught:
        open_run(tmp_path / "nothing")
    assert "npo train" in caught.value.hint


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(NpoError, match=r"is not a run directory: it has no npo_run\.json"):
        open_run(tmp_path)


def test_a_format_from_the_future_is_refused_politely(tmp_path):
    run = new_run(tmp_path)
    (run.root / "npo_run.json").write_text(json.dumps({"format": 4, "npo_version": "9.0"}))
    with pytest.raises(
        NpoError, match=r"written by npo 9\.0 in run format 4; this npo reads formats up to 3"
    ) as caught:
        open_run(run.root)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "1"}', '{"format": true}', '{"format": 3}', "\xff"])
def test_a_damaged_passport_is_named(tmp_path, text: str):
    run = new_run(tmp_path)
    (run.root / "npo_run.json").write_text(text, encoding="latin-1")
    with pytest.raises(NpoError, match=r"npo_run\.json is damaged"):
        open_run(run.root)


def test_a_recipe_that_is_lost_or_damaged_is_named(tmp_path):
    run = new_run(tmp_path)
    run.recipe_path("main").write_text("a: [1\n")
    with pytest.raises(NpoError, match=r"recipe\.yaml is damaged"):
        run.read_recipe("main")
    run.recipe_path("main").write_text("just words\n")
    with pytest.raises(NpoError, match="it holds no mapping"):
        run.read_recipe("main")
    run.recipe_path("main").unlink()
    with pytest.raises(NpoError, match=r"recipe\.yaml is missing"):
        run.read_recipe("main")


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_run_directory_is_refused_in_one_line(tmp_path, version: int):
    run = new_run(tmp_path)
    path = run.root / "npo_run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": version}))
    with pytest.raises(NpoError, match=rf"run directory format {version}; this version of npo reads format 3 only"):
        open_run(run.root)


def test_recipe_cut_at_any_line_is_damage_and_one_without_checksum_is_read(tmp_path):
    recipe = recipe_to_dict(load_recipe("micro"))
    run = create_run(tmp_path / "run", recipe=recipe, npo_version="1")
    path = run.recipe_path(None)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert lines[-1].startswith("# checksum: ")
    path.write_text("".join(lines[:-1]), encoding="utf-8")
    assert run.read_recipe() == recipe
    for number in (1, 2, len(lines) // 2, len(lines) - 3, len(lines) - 2):
        path.write_text("".join(lines[:number]), encoding="utf-8")
        with pytest.raises(NpoError, match="is damaged: its end is missing"):
            run.read_recipe()
        path.write_text("".join(lines[: number + 1]).rstrip("\n"), encoding="utf-8")
        with pytest.raises(NpoError, match="is damaged: its end is missing"):
            run.read_recipe()
