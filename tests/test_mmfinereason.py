"""The recipe `qwen3-vl-8b-mmfinereason`: its plan, and the way from the data set's shards to its two files."""

import runpy
import sys
from io import BytesIO
from pathlib import Path

import pytest

from npo_cli.loading import load_recipe
from npo_cli.plan_records import Footing, Verdict
from npo_cli.policy.model import EMBEDDED
from npo_cli.policy.shape import model_shape
from npo_cli.records import StepReport
from npo_cli.stages.plan import plan_recipe
from npo_cli.stages.train import train_run

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


def test_what_is_held_out_depends_on_what_a_row_holds_and_not_on_where_it_stands(tmp_path, monkeypatch):
    rows = [row(f"<image>{number}+1=", str(number + 1), picture(64, 64)) for number in range(40)]
    found = []
    for name, order in (("one", rows), ("other", rows[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist(order), folder / "shard.parquet")
        written = prepared(folder, monkeypatch, "--heldout-one-in", "4")
        found.append({split: {each["question"] for each in some} for split, some in written.items()})
    assert found[0] == found[1]
    assert found[0]["heldout"] and not found[0]["heldout"] & found[0]["train"]
    assert len(found[0]["heldout"] | found[0]["train"]) == 40


def test_the_plan_of_eight_gpus_fits_and_counts_the_published_parameters():
    settings = [f"model.path={ROOT / 'recipes' / 'models' / 'qwen3-vl-8b.json'}"]
    name = "qwen3-vl-8b-mmfinereason"
    assert model_shape(load_recipe(name, settings).model).num_params == 8_767_123_696
    footing = Footing(num_gpus=8, gpu_bytes=80 * 10**9, host_bytes=10**12, disk_bytes=4 * 10**12)

    def verdicts(*more: str) -> dict[str, bool]:
        found = plan_recipe(name, [*settings, *more], method="autonpo", footing=footing, autonpo=True)
        return {one.where: one.fits for one in found if isinstance(one, Verdict)}

    assert verdicts() == {"gpu": True, "host": True, "disk": True}
    server = ("engine.kind=vllm_server", "engine.memory_share=0.9", "engine.data_parallel=4", "engine.devices=4,5,6,7")
    assert verdicts(*server) == {"gpu": True, "engine gpu": True, "host": True, "disk": True}


@pytest.mark.parametrize("method", ["grpo", "npo-early", "npo-late", "npo", "autonpo"])
def test_the_recipe_takes_the_methods_of_the_paper(method):
    recipe = load_recipe("qwen3-vl-8b-mmfinereason", method=f"matched/{method}")
    assert (recipe.method.name, recipe.inject.gate, recipe.inject.slots) == (method, 0.6, 1)


def test_the_recipe_trains_with_a_tiny_model_and_made_up_data_in_their_places(untaught_vl, tmp_path, monkeypatch):
    rows = [row(f"<image>{number}+1=", str(number + 1), picture(64, 64)) for number in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shard.parquet")
    prepared(tmp_path, monkeypatch, "--heldout-one-in", "4")
    settings = [
        *(f"model.path={untaught_vl}", f"task.path={tmp_path}/out/train.parquet", "task.verify_workers=1"),
        *(f"task.heldout_path={tmp_path}/out/heldout.parquet", "task.pool_size=16", "task.chat=false"),
        *("train.num_steps=2", "train.prompts_per_step=2", "sampling.max_new_tokens=4", "eval.every=0"),
    ]
    recipe = load_recipe("qwen3-vl-8b-mmfinereason", settings, method="matched/grpo")
    reports = [one for one in train_run(tmp_path / "run", recipe, allow_code=False) if isinstance(one, StepReport)]
    assert [one.step for one in reports] == [1, 2]
