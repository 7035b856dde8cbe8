"""Prompts of csv and json files, of folders, and of data sets on a hub that cannot be reached."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from npo_cli.config.base import is_dataset_id
from npo_cli.config.loading import load_recipe
from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.file_dataset import FileTask
from npo_cli.training.train import make_paths_absolute
from npo_cli.types.rollouts import Prompt
from tests.helpers.runs import resume, train

GSM8K = {"prompt_column": "question", "answer_mark": "####"}


def questions(first: int, count: int) -> list[dict[str, Any]]:
    """Rows of the form of GSM8K."""
    return [{"question": f"{n}+1=", "answer": f"{n} and 1.\n#### {n + 1}"} for n in range(first, first + count)]


def load(path: Path | str, **settings: Any) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    sizes = {"pool_size": 100, "heldout_size": 2} | settings
    task = TaskSettings(source="file", path=str(path), **sizes)
    FileTask.validate(task)
    loaded = FileTask.load(task, seed=0)
    return loaded.train, loaded.heldout


def refusal(path: Path | str, **settings: Any) -> NpoError:
    with pytest.raises(NpoError) as caught:
        load(path, **settings)
    assert caught.value.hint
    return caught.value


def answers(prompts: tuple[Prompt, ...]) -> list[int]:
    return [int(prompt.answer) for prompt in prompts]


def save(folder: Path) -> Path:
    """A data set with three splits, by save_to_disk."""
    rows = {"train": questions(0, 6), "test": questions(10, 3), "extra": questions(20, 4)}
    datasets.DatasetDict({name: datasets.Dataset.from_list(some) for name, some in rows.items()}).save_to_disk(folder)
    return folder


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


# Files


def test_csv_file_has_texts_by_column_and_the_line_in_errors(tmp_path: Path):
    path = tmp_path / "d.csv"
    path.write_text('\ufeffprompt,answer,topic\n"2, and\n3",007,a\nx,1,b\ny,2,c\n', encoding="utf-8")
    train, heldout = load(path)
    found = sorted((*train, *heldout), key=lambda prompt: prompt.row)
    assert [(each.text, each.answer) for each in found] == [("2, and\n3", "007"), ("x", "1"), ("y", "2")]
    assert found[0].columns == {"prompt": "2, and\n3", "answer": "007", "topic": "a"}
    path.write_text("prompt,answer\nx,1\ny\n")
    assert refusal(path).message == f"{path} line 3 has 1 cells for 2 columns"
    path.write_text("prompt,answer\nx,\ny,1\n")
    assert refusal(path).message == f"{path} line 2: 'answer' is empty"
    path.write_text("prompt,answer,answer\nx,1,2\n")
    assert "two columns 'answer'" in refusal(path).message
    path.write_text('prompt,answer\n"x" y,1\n')
    assert "line 2 is not CSV" in refusal(path).message
    path.write_bytes(b"prompt,answer\n\xff,1\n")
    assert "is not UTF-8 text (byte 14)" in refusal(path).message
    path.write_text("prompt,answer\n")
    assert "is empty" in refusal(path).message


def test_json_file_is_an_array_of_rows(tmp_path: Path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"prompt": f"{n}", "answer": n} for n in range(5)]).replace("4}", "0.10}"))
    train, heldout = load(path)
    assert "0.10" in {prompt.answer for prompt in (*train, *heldout)}
    path.write_text('{"rows": []}')
    assert refusal(path).message == f"{path} is a JSON object, not an array of rows"
    path.write_text('[{"prompt": "a", "answer": "1"}, 3]')
    assert f"{path} row 2 is a JSON number" in refusal(path).message
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert "name it .jsonl" in refusal(path).hint
    path.write_text("[]")
    assert "is empty" in refusal(path).message


def test_splits_of_a_file_are_refused(tmp_path: Path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(questions(0, 5)))
    for name in ("split", "heldout_split", "subset"):
        assert f"task.{name}" in refusal(path, **GSM8K, **{name: "test"}).message
    assert "nothing follows '##!'" in refusal(path, prompt_column="question", answer_mark="##!").message


# Folders


def test_folder_of_save_to_disk_has_splits(tmp_path: Path):
    folder = save(tmp_path / "saved")
    train, heldout = load(folder, **GSM8K)  # of the split `train` two rows are held out
    assert sorted(answers(train) + answers(heldout)) == [1, 2, 3, 4, 5, 6]
    train, heldout = load(folder, heldout_split="test", **GSM8K)
    assert (answers(train), answers(heldout)) == ([1, 2, 3, 4, 5, 6], [11, 12])
    train, heldout = load(folder, split="extra", heldout_split="test", heldout_size=3, pool_size=3, **GSM8K)
    assert (answers(train), answers(heldout)) == ([21, 22, 23], [11, 12, 13])
    assert train[0].columns["question"] == "20+1="
    error = refusal(folder, split="validation", **GSM8K)
    assert (error.message, error.hint) == (
        f"{folder} has no split 'validation'",
        "set task.split to one of: train, test, extra",
    )
    assert "is the split that is trained on" in refusal(folder, heldout_split="train", **GSM8K).message
    assert f"{folder} test row 1 has no column 'answr'" in refusal(folder, split="test", answer_column="answr").message
    assert "task.subset has no effect" in refusal(folder, subset="main", **GSM8K).message
    assert "is needed to read it" in without_datasets(folder)


def without_datasets(path: Path | str) -> str:
    """The error where the package is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        error = refusal(path, **GSM8K)
    assert error.hint.startswith("pip install datasets")
    return error.message


def test_folder_of_one_saved_split_needs_no_name(tmp_path: Path):
    datasets.Dataset.from_list(questions(0, 4)).save_to_disk(tmp_path / "one")
    assert sum(map(len, load(tmp_path / "one", **GSM8K))) == 4


def test_folder_of_parquet_files_has_the_splits_and_subsets_of_their_names(tmp_path: Path):
    for number in range(2):
        name = f"train-0000{number}-of-00002.parquet"
        write_parquet(tmp_path / "main" / name, questions(3 * number, 3))
        write_parquet(tmp_path / "socratic" / name, questions(30 + 3 * number, 3))
    write_parquet(tmp_path / "main" / "test-00000-of-00001.parquet", questions(10, 2))
    train, heldout = load(tmp_path, subset="main", heldout_split="test", **GSM8K)
    assert (answers(train), answers(heldout)) == ([1, 2, 3, 4, 5, 6], [11, 12])
    assert [prompt.prompt_id for prompt in train] == [f"rows/00000{n}" for n in range(6)]
    assert sum(map(len, load(tmp_path / "socratic", **GSM8K))) == 6
    assert refusal(tmp_path, **GSM8K).hint == "set task.subset to one of: main, socratic"
    assert "no subset 'man'" in refusal(tmp_path, subset="man", **GSM8K).message
    write_parquet(tmp_path / "hub" / "train" / "0000.parquet", questions(0, 4))
    write_parquet(tmp_path / "hub" / "test" / "0000.parquet", questions(10, 4))
    assert answers(load(tmp_path / "hub", split="test", heldout_split="train", **GSM8K)[0]) == [11, 12, 13, 14]


def test_answer_mark_on_the_command_line_is_no_comment():
    overrides = ["task.source=file", "task.path=d.jsonl", "task.answer_mark=####"]
    assert load_recipe("micro", overrides).task.answer_mark == "####"


# The hub


def test_hub_id_is_owner_and_name_without_such_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert is_dataset_id("openai/gsm8k")
    assert not any(map(is_dataset_id, ["gsm8k", "./openai/gsm8k", "data/train.jsonl", "data/d.csv", "a/b/c", "/a/b"]))
    (tmp_path / "recipe.yaml").write_text("task: {source: file, path: openai/gsm8k, subset: main, split: train}\n")
    recipe = make_paths_absolute(load_recipe(str(tmp_path / "recipe.yaml")))
    assert recipe.task.path == "openai/gsm8k"
    save(tmp_path / "openai" / "gsm8k")
    assert not is_dataset_id("openai/gsm8k")
    monkeypatch.chdir("/")
    assert load_recipe(str(tmp_path / "recipe.yaml")).task.path == str(tmp_path / "openai" / "gsm8k")


def test_hub_that_cannot_be_reached_is_an_error_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    error = refusal("openai/gsm8k", subset="main", **GSM8K)
    assert error.message == (
        "openai/gsm8k is no file or folder here, and the Hugging Face hub cannot be reached to look for it there"
    )
    assert "hf download --repo-type dataset openai/gsm8k --local-dir FOLDER" in error.hint
    assert "to load it from the Hugging Face hub, the package datasets is needed" in without_datasets("openai/gsm8k")


# A run


def test_run_with_other_data_than_at_its_start_is_refused(tmp_path: Path):
    folder = save(tmp_path / "saved")
    task = [f"task.path={folder}", *(f"task.{name}={value!r}" for name, value in GSM8K.items())]
    task += ["task.source=file", "task.verifier=last_number", "task.heldout_split=test", "task.heldout_size=2"]
    train(tmp_path / "run", *task, "train.prompts_per_step=4", "task.pool_size=6", until=1)
    resume(tmp_path / "run", until=2)
    other = {"train": questions(0, 6), "test": questions(11, 3)}
    changed = tmp_path / "changed"
    datasets.DatasetDict({name: datasets.Dataset.from_list(some) for name, some in other.items()}).save_to_disk(changed)
    folder.rename(tmp_path / "old")
    changed.rename(folder)
    with pytest.raises(NpoError, match=r"the data of task\.\* has changed"):
        resume(tmp_path / "run", until=3)
