"""From the data set's shards to the two files of the recipe `qwen3-vl-8b-mmfinereason`."""

import runpy
import sys
from io import BytesIO
from pathlib import Path

import pytest

from npo_cli.policy.model import EMBEDDED
from npo_cli.tasks.files import file_problems

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "mmfinereason.py"


def picture(width: int, height: int, *, colour: str = "red", kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, format=kind)
    return buffer.getvalue()


def row(question: str, answer: str, image: bytes | None) -> dict:
    return {
        "source": "made up",
        "question": question,
        "answer": answer,
        "image": None if image is None else {"bytes": image, "path": "x.png"},
    }


def prepared(folder: Path, monkeypatch, *options: str) -> dict[str, list[dict]]:
    argv = ["mmfinereason.py", str(folder), str(folder / "out"), "--model", str(EMBEDDED), "--workers", "1", *options]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return {name: pq.read_table(folder / "out" / f"{name}.parquet").to_pylist() for name in ("train", "heldout")}


def test_only_rows_that_the_recipe_can_use_are_taken_and_the_others_are_counted(tmp_path, monkeypatch, capsys):
    small = picture(64, 64)
    shards = {
        "b": [row("<image>1+1=", "2", small), row("<image>1+1=", "2", small)],
        "a": [
            row("<image>2+2=", "\\frac{8}{2}", picture(2000, 1000, kind="JPEG")),
            row("3+3=", "6", small),
            row("<image><image>4+4=", "8", small),
            row("<image>5+5=", "10", None),
            row("<image>6+6=", "12", small[:40]),
            row("<image>7+7=", " ", small),
            row("<image>8+8=", "(", small),
            # A token a character: 3,968 of the question, 64 of the picture, 64 of the template are 4,096.
            row("<image>" + "9" * 3961, "9", small),
            row("<image>" + "9" * 3962, "9", small),
        ],
    }
    for name, rows in shards.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    written = prepared(tmp_path, monkeypatch, "--heldout-one-in", "1000000")
    assert written["heldout"] == []
    assert [(each["id"], each["question"][:12]) for each in written["train"]] == [
        ("a/000000", "<image>2+2="),
        ("a/000001", "<image>\n3+3="),
        ("a/000007", "<image>99999"),
        ("b/000000", "<image>1+1="),
    ]
    # 1024^2/(2000*1000) = .524, its root .724: 1448 x 724
    shrunk = Image.open(BytesIO(written["train"][0]["image"]["bytes"]))
    assert (shrunk.size, shrunk.format) == ((1448, 724), "JPEG")
    assert written["train"][1]["image"]["bytes"] == small
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "1 a picture that cannot be read",
        "1 a prompt that is too long",
        "1 a repeated row",
        "1 an answer that math_verify cannot read",
        "1 no picture",
        "1 no question or no answer",
        "1 several pictures",
        "4 train",
    ]
