import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.file_dataset import load_file_prompts
from npo_cli.types.rollouts import Message, Prompt

Split = tuple[tuple[Prompt, ...], tuple[Prompt, ...]]


def sums(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}+1=", "answer": str(n + 1), "note": "x"} for n in range(start, start + count)]


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, *, seed: int = 0, **settings: Any) -> Split:
    sizes = {"pool_size": 100, "heldout_size": 2} | settings
    return load_file_prompts(TaskSettings(source="file", path=str(path), **sizes), seed=seed)


def refusal(path: Path, **settings: Any) -> NpoError:
    with pytest.raises(NpoError) as caught:
        load(path, **settings)
    assert caught.value.hint
    return caught.value


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_file_dataset_is_split_by_the_seed(tmp_path: Path):
    path = jsonl(tmp_path / "sums.jsonl", sums(10))
    train, heldout = load(path)
    assert (len(train), len(heldout)) == (8, 2)
    assert sorted(prompt.row for prompt in (*train, *heldout)) == list(range(10))
    assert load(path) == (train, heldout)
    assert any(load(path, seed=seed)[1] != heldout for seed in range(1, 4))
    third = next(prompt for prompt in (*train, *heldout) if prompt.row == 3)
    assert third == Prompt(prompt_id="rows/000003", text="3+1=", answer="4", row=3)


def test_file_dataset_with_a_smaller_pool_keeps_the_heldout_rows(tmp_path: Path):
    path = jsonl(tmp_path / "sums.jsonl", sums(10))
    train, heldout = load(path, pool_size=3)
    assert len(train) == 3
    assert heldout == load(path)[1]
    assert set(train) < set(load(path)[0])


def test_file_dataset_with_a_heldout_file_is_not_split(tmp_path: Path):
    train_path, heldout_path = jsonl(tmp_path / "a.jsonl", sums(4)), jsonl(tmp_path / "b.jsonl", sums(5, start=50))
    train, heldout = load(train_path, heldout_path=str(heldout_path))
    assert [prompt.text for prompt in train] == ["0+1=", "1+1=", "2+1=", "3+1="]
    assert [(prompt.prompt_id, prompt.text) for prompt in heldout] == [
        ("heldout/000000", "50+1="),
        ("heldout/000001", "51+1="),
    ]


def test_file_dataset_parquet_equals_jsonl(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(sums(6)), tmp_path / "sums.parquet")
    assert load(tmp_path / "sums.parquet") == load(jsonl(tmp_path / "sums.jsonl", sums(6)))


def test_file_dataset_columns_ids_and_numeric_answers(tmp_path: Path):
    lines = [
        '{"q": "a", "a": 0.10, "id": 7}',
        "",
        '{"q": "b", "a": 12345678901234567890, "id": "x"}',
        '{"q": "c", "a": "3", "id": 8}',
    ]
    path = write(tmp_path / "data.jsonl", *lines)
    train, heldout = load(path, prompt_column="q", answer_column="a", id_column="id", heldout_size=1)
    found = {prompt.prompt_id: (prompt.answer, prompt.row) for prompt in (*train, *heldout)}
    # answers are kept as they are written, digit for digit
    assert found == {"7": ("0.10", 0), "x": ("12345678901234567890", 1), "8": ("3", 2)}


def test_file_dataset_system_message_applies_to_chats_without_one(tmp_path: Path):
    own = [{"role": "system", "content": "S"}, {"role": "user", "content": "one"}]
    bare = [
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "?"},
        {"role": "user", "content": "more"},
    ]
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": own, "answer": "1"}, {"prompt": bare, "answer": "2"}])
    heldout = jsonl(tmp_path / "b.jsonl", [{"prompt": "plain", "answer": "3"}])
    train, other = load(path, heldout_path=str(heldout), system="Ours", chat=True, suffix="Go.")
    assert [message.content for message in train[0].messages] == ["S", "one\nGo."]
    assert [message.content for message in train[1].messages] == ["Ours", "two", "?", "more\nGo."]
    assert other[0].messages == (Message(role="system", content="Ours"), Message(role="user", content="plain\nGo."))


def test_file_dataset_parquet_chats_and_images(tmp_path: Path):
    chat = [{"role": "user", "content": "hello"}]
    rows = [{"prompt": chat, "answer": 5, "images": []}, {"prompt": chat, "answer": 6, "images": ["a.png"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1] * 3), tmp_path / "plain.parquet")
    assert load(tmp_path / "plain.parquet", heldout_path=str(jsonl(tmp_path / "h.jsonl", sums(1))))[0][0].answer == "5"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "images.parquet")
    assert "images.parquet row 2 has images" in refusal(tmp_path / "images.parquet").message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "answer": ', "line 2 is not valid JSON"),
        ('{"prompt": "a", "answer": NaN}', "line 2 is not valid JSON: NaN"),
        ('{"prompt": "a", "answer": ' + "7" * 5000 + "}", "line 2 is not valid JSON"),
        ('["a"]', "line 2 is a JSON array, not an object"),
        ("null", "line 2 is a JSON null, not an object"),
        ('{"prompt": "a"}', "line 2 has no column 'answer' (task.answer_column)"),
        ('{"question": "a", "answer": "1"}', "line 2 has no column 'prompt' (task.prompt_column)"),
        ('{"prompt": " ", "answer": "1"}', "line 2: the prompt is empty"),
        ('{"prompt": [], "answer": "1"}', "line 2: the prompt is empty"),
        ('{"prompt": 4, "answer": "1"}', "line 2: the prompt is a int"),
        ('{"prompt": "a", "answer": null}', "line 2: 'answer' is a null"),
        ('{"prompt": "a", "answer": true}', "line 2: 'answer' is a bool"),
        ('{"prompt": "a", "answer": ["1"]}', "line 2: 'answer' is a list"),
        ('{"prompt": "a", "answer": ""}', "line 2: 'answer' is empty"),
        ('{"prompt": ["a"], "answer": "1"}', "line 2, message 1 is not an object"),
        ('{"prompt": [{"role": "user"}], "answer": "1"}', "line 2, message 1: role and content must be strings"),
        ('{"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}', "the last message is the assistant's"),
        ('{"prompt": [{"role": "user", "content": "a", "name": "b"}], "answer": "1"}', "message 1 has 'name'"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}', "message 1 has an image"),
        ('{"prompt": "a", "answer": "1", "image": "b.png"}', "line 2 has images"),
    ],
)
def test_file_dataset_error_names_the_line(tmp_path: Path, line: str, said: str):
    path = write(
        tmp_path / "data.jsonl", '{"prompt": "fine", "answer": "1"}', line, '{"prompt": "last", "answer": "2"}'
    )
    message = refusal(path, heldout_size=1).message
    assert message.startswith(str(path))
    assert said in message


def test_file_dataset_missing_column_error_lists_the_columns(tmp_path: Path):
    assert refusal(write(tmp_path / "a.jsonl", '{"question": "a", "solution": "1"}')).hint.endswith(
        "question, solution"
    )
    table = pyarrow.Table.from_pylist([{"question": "a", "solution": "1"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet").hint.endswith("question, solution")


def test_file_dataset_missing_number_in_parquet_is_null(tmp_path: Path):
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["a", "b"], "answer": [1.0, float("nan")]}), tmp_path / "a.parquet"
    )
    assert "a.parquet row 2: 'answer' is a null" in refusal(tmp_path / "a.parquet").message


def test_file_dataset_invalid_utf8_names_the_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "1"}\n{"prompt": "\xff", "answer": "1"}\n')
    assert "line 2 is not valid JSON" in refusal(path).message


def test_file_dataset_refuses_other_files(tmp_path: Path):
    assert "does not exist" in refusal(tmp_path / "a.jsonl").message
    assert "holds no data" in refusal(tmp_path).message
    assert "is empty" in refusal(write(tmp_path / "b.jsonl", "", "")).message
    assert "is none of .jsonl, .parquet, .json, .csv" in refusal(write(tmp_path / "c.txt", "prompt,answer")).message
    assert "not a readable parquet file" in refusal(write(tmp_path / "d.parquet", "no")).message


def test_file_dataset_with_too_few_rows_is_refused(tmp_path: Path):
    said = refusal(jsonl(tmp_path / "a.jsonl", sums(3)), heldout_size=3)
    assert "has 3 rows, too few to hold out 3" in said.message
    assert "task.heldout_size below 3" in said.hint


def test_file_dataset_repeated_id_names_both_rows(tmp_path: Path):
    rows = [row | {"id": name} for row, name in zip(sums(4), "abca", strict=True)]
    message = refusal(jsonl(tmp_path / "a.jsonl", rows), id_column="id", heldout_size=1).message
    assert "the same prompt id 'a'" in message
    assert "line 1" in message
    assert "line 4" in message


def test_file_dataset_shared_prompt_names_both_rows(tmp_path: Path):
    train, heldout = jsonl(tmp_path / "a.jsonl", sums(4)), jsonl(tmp_path / "b.jsonl", sums(2, start=3))
    message = refusal(train, heldout_path=str(heldout)).message
    assert f"{heldout} line 1 (held out) has the same prompt as {train} line 4" in message


def test_file_dataset_system_message_needs_chats(tmp_path: Path):
    assert "task.system needs chat prompts" in refusal(jsonl(tmp_path / "a.jsonl", sums(4)), system="S").message


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_file_dataset_keeps_every_column_but_images(tmp_path: Path, form: str):
    rows = [
        {"prompt": f"{n}+1=", "answer": str(n + 1), "level": 0.5, "meta": {"tags": ["a"], "share": 0.25}, "pic": []}
        for n in range(4)
    ]
    path = tmp_path / f"d.{form}"
    if form == "jsonl":
        jsonl(path, rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    train, heldout = load(path, image_column="pic")
    columns = {prompt.row: prompt.columns for prompt in (*train, *heldout)}
    assert columns == {n: {name: value for name, value in row.items() if name != "pic"} for n, row in enumerate(rows)}
    assert type(columns[0]["level"]) is type(columns[0]["meta"]["share"]) is float


@pytest.mark.parametrize("verifier", ["grade.py:grade", ("grade.py:grade", "other.py:style")])
def test_file_dataset_needs_no_answers_where_no_verifier_compares_with_them(tmp_path: Path, verifier):
    path = write(tmp_path / "a.jsonl", *(f'{{"prompt": "{n}", "topic": "t{n}"}}' for n in range(3)))
    train, heldout = load(path, heldout_size=1, verifier=verifier)
    assert {prompt.answer for prompt in (*train, *heldout)} == {""}
    assert {prompt.columns["topic"] for prompt in (*train, *heldout)} == {"t0", "t1", "t2"}


def test_file_dataset_needs_answers_if_one_of_several_verifiers_compares(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}', '{"prompt": "b"}')
    assert "line 1 has no column 'answer'" in refusal(path, verifier=("grade.py:grade", "exact")).message


def test_file_dataset_needs_the_answer_column_that_is_named(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a", "gold": "1"}', '{"prompt": "b", "gold": "2"}')
    found = refusal(path, verifier="grade.py:grade", answer_column="golf", heldout_size=1)
    assert "line 1 has no column 'golf' (task.answer_column)" in found.message
    assert found.hint.endswith("prompt, gold")
