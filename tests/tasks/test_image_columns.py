"""Rows with pictures: every form of a cell, every place of a mark, and what is refused with its row."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.images import open_image
from npo_cli.tasks.file_dataset import load_file_prompts
from npo_cli.types.rollouts import Message, Prompt

SHADES = (10, 20, 30)


def shade(folder: Path, grey: int) -> bytes:
    file = folder / f"{grey}.png"
    Image.new("L", (4, 3), grey).save(file)
    return file.read_bytes()


def problems(file: Path, **options: Any) -> tuple[Prompt, ...]:
    settings = TaskSettings(source="file", path=str(file), image_column="images", heldout_size=1, **options)
    train, heldout = load_file_prompts(settings, seed=0)
    return tuple(sorted([*train, *heldout], key=lambda prompt: prompt.row))


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps({"answer": "1"} | row) + "\n" for row in rows))
    return file


def greys(prompt: Prompt) -> list[int]:
    return [open_image(image).getpixel((0, 0))[0] for image in prompt.images]


def test_image_column_paths_are_relative_to_the_data_file(tmp_path: Path, monkeypatch):
    for grey in SHADES:
        shade(tmp_path, grey)
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    file = jsonl(
        tmp_path,
        {"prompt": "<image>what?", "images": "10.png"},
        {"prompt": "first <image> then <image>?", "images": ["20.png", str(tmp_path / "30.png")]},
        {"prompt": [{"role": "user", "content": parts}], "images": [{"path": "30.png", "bytes": None}]},
        {"prompt": "none", "images": []},
        {"prompt": "none at all", "images": None},
    )
    monkeypatch.chdir("/")
    found = problems(file)
    assert [greys(prompt) for prompt in found] == [[10], [20, 30], [30], [], []]
    assert found[0].text == "<image>what?" and found[0].images[0].location == str(tmp_path / "10.png")
    assert found[2].messages == (Message(role="user", content="a<image>b"),)


def test_image_column_parquet_bytes_are_read_on_demand(tmp_path: Path):
    data = {grey: shade(tmp_path, grey) for grey in SHADES}
    cells = [
        [{"bytes": data[10], "path": "10.png"}, {"bytes": data[20], "path": None}],
        [{"bytes": None, "path": "30.png"}],
        [{"bytes": data[20], "path": None}],
    ]
    rows = [
        {"prompt": f"{'<image>' * len(cell)}{place}", "answer": "1", "images": cell} for place, cell in enumerate(cells)
    ]
    file = tmp_path / "data.parquet"
    # a row group a row: the last row is the first of its group
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=1)
    found = problems(file)
    assert [greys(prompt) for prompt in found] == [[10, 20], [30], [20]]
    assert found[2].images[0].location == f"{file}#images/2/0" and found[2].images[0].data is None
    bare = [{"prompt": f"<image>{grey}", "answer": "1", "images": data[grey]} for grey in SHADES]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(bare), tmp_path / "bare.parquet")
    assert [greys(prompt) for prompt in problems(tmp_path / "bare.parquet")] == [[10], [20], [30]]


BAD_ROWS = {
    "line 2 has 1 images, but 0 placeholders <image>": {"prompt": "what?", "images": ["10.png"]},
    "line 2 has 1 images, but 2 placeholders <image>": {"prompt": "<image><image>", "images": "10.png"},
    "line 2 has 0 images, but 1 placeholders <image>": {"prompt": "<image>", "images": []},
    "line 2 has no column 'images' (task.image_column)": {"prompt": "what?"},
    "line 2, image 1 (gone.png) cannot be read: No such file": {"prompt": "<image>", "images": "gone.png"},
    "line 2, image 2 (.) cannot be read: Is a directory": {"prompt": "<image><image>", "images": ["10.png", "."]},
    "line 2, image 1 (bad.png) is not an image": {"prompt": "<image>", "images": "bad.png"},
    "line 2, image 1 (cut.png) is damaged": {"prompt": "<image>", "images": "cut.png"},
    "line 2, image 1 is a URL": {"prompt": "<image>", "images": "https://example.org/x.png"},
    "line 2, image 1 is neither a path nor bytes": {"prompt": "<image>", "images": [7]},
    "message 1, part 1 has <image> in a text": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]}],
        "images": "10.png",
    },
    "message 1, part 1 contains an image (url)": {
        "prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        "images": "10.png",
    },
    "message 1, part 1 is neither text nor an image": {
        "prompt": [{"role": "user", "content": [{"type": "video"}]}],
        "images": "10.png",
    },
}


@pytest.mark.parametrize("problem", BAD_ROWS)
def test_image_column_error_names_the_row(tmp_path: Path, problem: str):
    whole = shade(tmp_path, 10)
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(whole[:-30])
    file = jsonl(tmp_path, {"prompt": "<image>?", "images": "10.png"}, BAD_ROWS[problem])
    with pytest.raises(NpoError) as refusal:
        problems(file)
    assert problem in refusal.value.message


def test_image_column_size_limit_can_be_raised(tmp_path: Path):
    shade(tmp_path, 10)
    shade(tmp_path, 20)
    rows = [{"prompt": "<image>", "images": f"{grey}.png"} for grey in (10, 20)]
    # 4 x 3 pixels
    with pytest.raises(NpoError, match=r"line 1, image 1 \(10.png\) has 4 x 3 = 12 pixels; .* is 11"):
        problems(jsonl(tmp_path, *rows), max_image_pixels=11)
    assert len(problems(jsonl(tmp_path, *rows), max_image_pixels=12)) == 2


def test_image_column_equal_images_make_equal_prompts(tmp_path: Path):
    (tmp_path / "copy.png").write_bytes(shade(tmp_path, 10))
    rows = [{"prompt": "<image>", "images": name} for name in ("10.png", "copy.png")]
    with pytest.raises(NpoError, match="has the same prompt as"):
        problems(jsonl(tmp_path, *rows))
