"""The recipe `qwen3-vl-8b-mmfinereason`: its plan, and the way from the data set's shards to its two files."""

import runpy
import sys
from io import BytesIO
from pathlib import Path

import pytest

from npo_cli.config.loading import load_recipe
from npo_cli.experiments.bench_plan import BenchRun, build_commands
from npo_cli.memory.model_shape import model_shape
from npo_cli.memory.planner import plan_resources
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_newest_branch
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.tasks.shapes import shapes_prompts
from npo_cli.training.train import train_run
from npo_cli.types.memory import Hardware, PeakUsage
from npo_cli.types.rollouts import StepReport
from tests.helpers.cli_errors import npo

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).parents[2]
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
    argv = [
        "mmfinereason.py",
        str(folder),
        str(folder / "out"),
        "--model",
        str(MICRO_BASE_FOLDER),
        "--workers",
        "1",
        *options,
    ]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return {name: pq.read_table(folder / "out" / f"{name}.parquet").to_pylist() for name in ("train", "heldout")}


def test_mmfinereason_takes_usable_rows_and_counts_the_others(tmp_path, monkeypatch, capsys):
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


def test_mmfinereason_heldout_split_depends_on_content_only(tmp_path, monkeypatch):
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


def test_mmfinereason_plan_fits_eight_gpus_and_counts_the_parameters():
    settings = [f"model.path={ROOT / 'recipes' / 'models' / 'qwen3-vl-8b.json'}"]
    name = "qwen3-vl-8b-mmfinereason"
    assert model_shape(load_recipe(name, settings).model).num_params == 8_767_123_696
    footing = Hardware(num_gpus=8, gpu_bytes=80 * 10**9, host_bytes=10**12, disk_bytes=4 * 10**12)

    def verdicts(*more: str) -> dict[str, bool]:
        found = plan_resources(name, [*settings, *more], method="autonpo", hardware=footing, autonpo=True)
        return {one.location: one.fits for one in found if isinstance(one, PeakUsage)}

    assert verdicts() == {"gpu": True, "host": True, "disk": True}
    server = (
        "engine.kind=vllm_server",
        "engine.vllm.gpu_memory_utilization=0.9",
        "engine.vllm.data_parallel_size=4",
        "engine.vllm.devices=4,5,6,7",
    )
    assert verdicts(*server) == {"gpu": True, "engine gpu": True, "host": True, "disk": True}


@pytest.mark.parametrize("method", ["grpo", "npo-early", "npo-late", "npo", "autonpo"])
def test_mmfinereason_recipe_accepts_the_methods(method):
    recipe = load_recipe("qwen3-vl-8b-mmfinereason", method=f"matched/{method}")
    assert (recipe.method.name, recipe.guide.inject.max_accuracy, recipe.guide.inject.slots) == (method, 0.6, 1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Drawn pictures in the two files that the recipe reads."""
    folder = tmp_path_factory.mktemp("drawn")
    prompts = shapes_prompts(24, 0)
    rows = [
        {
            "id": prompt.prompt_id,
            "question": prompt.messages[0].content,
            "answer": prompt.answer,
            "image": {"bytes": prompt.images[0].data, "path": "x.ppm"},
        }
        for prompt in prompts
    ]
    for name, some in (("train", rows[:16]), ("heldout", rows[16:])):
        pq.write_table(pa.Table.from_pylist(some), folder / f"{name}.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", ["npo-early", "npo-late", "autonpo"])
def test_mmfinereason_methods_run_with_a_tiny_model(taught_vl, drawn, tmp_path, method):
    """The commands of the method, as `npo bench` would give them."""
    settings = (
        *(f"model.path={taught_vl}", f"task.path={drawn}/train.parquet", f"task.heldout_path={drawn}/heldout.parquet"),
        *(
            "task.pool_size=16",
            "task.suffix=''",
            "task.verify_workers=1",
            "sampling.max_new_tokens=3",
            "guide.cache.samples_per_prompt=8",
            "guide.cache.min_yield=0",
        ),
        *("train.num_steps=6", "train.save_every=2", "train.prompts_per_step=4", "eval.every=0", "model.threads=1"),
        *(
            "guide.replay.at_step=2",
            "guide.replay.guide_step=4",
            "autonpo.early.scout_steps=2",
            "autonpo.early.replay_steps=2",
            "autonpo.early.enabled=true",
        ),
        *(
            "autonpo.rollback.distances=[2]",
            "autonpo.rollback.min_failed_prompts=1",
            "autonpo.probe.num_prompts=4",
            # Two steps change the policy too little for a Q above that of the old policy's second try.
            "scoring.quality_baseline=none",
            "autonpo.probe.min_quality=0",
            "autonpo.trigger.warmup_steps=1",
            "autonpo.trigger.window=2",
            "autonpo.trigger.patience=1",
        ),
    )
    cell = BenchRun(
        recipe="qwen3-vl-8b-mmfinereason",
        method=f"matched/{method}",
        settings=settings,
        seed=0,
        folder=tmp_path,
        teacher="",
    )
    for command in build_commands(cell):
        result = npo(*command)
        assert result.code == 0, (command, result.err)
    run = open_run(cell.run)
    branch = find_newest_branch(run)
    sources = [
        one.source
        for _, group in RolloutLog(run.rollouts_path(branch)).iter_groups()
        for one in group.rollouts
        if one.is_off_policy
    ]
    assert sources and set(sources) == {"guide"}
    assert find_checkpoint(run, branch, 6).step == 6


def test_mmfinereason_recipe_trains_with_a_tiny_model(untaught_vl, tmp_path, monkeypatch):
    rows = [row(f"<image>{number}+1=", str(number + 1), picture(64, 64)) for number in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shard.parquet")
    prepared(tmp_path, monkeypatch, "--heldout-one-in", "4")
    settings = [
        *(f"model.path={untaught_vl}", f"task.path={tmp_path}/out/train.parquet", "task.verify_workers=1"),
        *(f"task.heldout_path={tmp_path}/out/heldout.parquet", "task.pool_size=16", "task.chat=false"),
        *("train.num_steps=2", "train.prompts_per_step=2", "sampling.max_new_tokens=4", "eval.every=0"),
    ]
    recipe = load_recipe("qwen3-vl-8b-mmfinereason", settings, method="matched/grpo")
    reports = [one for one in train_run(tmp_path / "run", recipe) if isinstance(one, StepReport)]
    assert [one.step for one in reports] == [1, 2]
