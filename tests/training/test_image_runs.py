"""The whole circle on pictures, with a tiny Qwen3-VL."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from npo_cli.config.loading import load_recipe, recipe_from_dict
from npo_cli.config.recipe import Recipe, TaskSettings
from npo_cli.errors import NpoError
from npo_cli.guides.online import OnlineExtrapolation, extrapolated_rollouts
from npo_cli.guides.privileged import PrivilegedText
from npo_cli.interop.export import export_guide
from npo_cli.report.prompt_history import render_prompt_text
from npo_cli.session.session import open_task
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.layout import open_run
from npo_cli.storage.log_head import rewrite_head
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.tasks.file_dataset import load_file_prompts
from npo_cli.training.train import train_run
from npo_cli.types.rollouts import IMAGE_PLACEHOLDER, StepReport
from tests.helpers.images import load_vision_policy
from tests.helpers.runs import open_session_at, reproducible_digests, resume, sample, score, stop_after

SMALL = (
    *("train.num_steps=4", "train.save_every=2", "train.prompts_per_step=4", "train.group_size=8"),
    *(
        "task.pool_size=16",
        "task.heldout_size=4",
        "eval.every=0",
        "guide.cache.samples_per_prompt=16",
        "guide.cache.max_responses_per_prompt=1",
    ),
)

BLIND_WITHOUT = pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM reads images with torchvision")


def training(root: Path, model: Path, *overrides: str):
    recipe = load_recipe("shapes", [f"model.path={model}", *SMALL, *overrides])
    return train_run(root, recipe)


@pytest.fixture(scope="module")
def circle(taught_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained, and a guide sampled from step 4 for step 2."""
    root = tmp_path_factory.mktemp("shapes") / "run"
    list(training(root, taught_vl))
    sample(root)
    return root


@pytest.fixture
def copied(circle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(circle, tmp_path / "run"))


@pytest.mark.parametrize(
    "engine",
    [
        "transformers",
        *(pytest.param(kind, marks=(pytest.mark.vllm, BLIND_WITHOUT)) for kind in ("vllm", "vllm_server")),
    ],
)
def test_image_rollouts_are_scored_with_the_images_they_were_sampled_with(
    engine: str, circle: Path, taught_vl: Path, tmp_path: Path
):
    """What step 0 scores now is what was written down when it was asked."""
    if engine != "transformers":
        circle = tmp_path / "run"
        list(training(circle, taught_vl, f"engine.kind={engine}"))
    run = open_run(circle)
    policy = load_vision_policy(find_checkpoint(run, "main", 0).path)
    task = open_task(recipe_from_dict(run.read_recipe("main")))
    for _, group in RolloutLog(run.rollouts_path("main")).iter_groups(1):
        prompt = task.prompt(group.prompt.prompt_id)
        assert group.prompt.images == prompt.images and group.prompt.images[0].data is None
        rows = [policy.row(prompt, one.response_ids) for one in group.rollouts]
        scored_NT = policy.score(rows, temperature=1.0, chunk_tokens=64).logps_NT
        for one, logps_T in zip(group.rollouts, scored_NT.tolist(), strict=True):
            assert list(one.behavior_logps) == pytest.approx(logps_T[: len(one.response_ids)], abs=1e-5)


def test_image_guides_are_scored_and_injected(copied: Path):
    # the learner's answers under the learner: no distance at all
    scores = score(copied, at=2)
    assert [each.step for each in scores] == [4] and scores[0].variance >= 0
    _, trajectories = load_guide(open_run(copied), "near")
    assert trajectories
    resume(copied, at=2, guide="near")
    injected = [
        one
        for _, group in RolloutLog(open_run(copied).rollouts_path("near")).iter_groups()
        for one in group.rollouts
        if one.is_off_policy
    ]
    assert injected and all(one.guide_step == 4 and one.verdict == "correct" for one in injected)


def test_image_guide_of_other_images_is_refused(copied: Path):
    file = open_run(copied).guide_folder("near") / "rollouts.jsonl"
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    groups = [group for group in row["groups"] if group["rollouts"]]
    assert all(len(group["images"]) == 1 and "data" not in group["images"][0] for group in groups)
    groups[-1]["images"][0]["sha256"] = "0" * 64
    file.write_text(json.dumps(row) + "\n")
    rewrite_head(file, is_accepted=True)
    with pytest.raises(NpoError, match=f"was sampled with other images for prompt {groups[-1]['prompt_id']}"):
        resume(copied, at=2, guide="near")


def test_image_run_resumes_after_a_kill_to_the_same_bytes(circle: Path, taught_vl: Path, tmp_path: Path):
    """Stopped after step 3, whose answers are on record and whose weights are not: the pictures are the task's."""
    records = training(tmp_path / "run", taught_vl)
    for record in records:
        if isinstance(record, StepReport) and record.step == 3:
            records.close()
    resume(tmp_path / "run")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        whole, resumed = (root / "branches" / "main" / name for root in (circle, tmp_path / "run"))
        assert resumed.read_bytes() == whole.read_bytes(), name


def test_image_prompt_is_shown_with_references(circle: Path):
    _, group = next(RolloutLog(open_run(circle).rollouts_path("main")).iter_groups(1))
    image = group.prompt.images[0]
    name = image.location.rpartition("/")[2]
    shown = f"[image 1: {name}, 32x32, sha256 {image.sha256[:12]}]"
    assert (
        render_prompt_text(group.prompt)
        == f"user: {group.prompt.messages[0].content.replace(IMAGE_PLACEHOLDER, shown)}"
    )


def test_image_guide_export_includes_images(circle: Path, tmp_path: Path):
    """Read back as a data file, every prompt shows the same bytes in another place."""
    list(export_guide(circle, "near", out=tmp_path / "near.parquet", form="trl"))
    column = {"path": str(tmp_path / "near.parquet"), "image_column": "images", "id_column": "prompt_id"}
    again, heldout = load_file_prompts(TaskSettings(source="file", heldout_size=1, **column), seed=0)
    _, trajectories = load_guide(open_run(circle), "near")
    shown = {prompt.prompt_id: [image.sha256 for image in prompt.images] for prompt in (*again, *heldout)}
    assert shown == {name: [image.sha256 for image in kept.images] for name, kept in trajectories.items()}


def test_image_model_with_lora_workflow(taught_vl: Path, tmp_path: Path):
    root = tmp_path / "run"
    list(training(root, taught_vl, "model.lora.rank=2", "train.num_steps=2"))
    resume(root, "train.num_steps=3")
    assert open_run(root).read_recipe("main")["model"]["lora"]["rank"] == 2


@pytest.mark.slow
def test_image_model_extrapolated_and_resumed_after_a_kill(taught_vl: Path, tmp_path: Path):
    """What step 4 asked is what the policy of step 3, pushed away from step 1, scores when it is read again."""
    extrapolation = (
        "guide.source=extrapolated",
        "extrapolation.k=2",
        "guide.inject.max_accuracy=0.9",
        "train.save_every=1",
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    list(training(whole, taught_vl, *extrapolation))
    session = open_session_at(whole, 3)
    ahead = OnlineExtrapolation(session=session, branch="main").open_sampler(3)
    groups = RolloutLog(session.run.rollouts_path("main")).read_step(4)
    pairs = [
        (session.task.prompt(group.prompt.prompt_id), one) for group in groups for one in extrapolated_rollouts(group)
    ]
    assert pairs
    for (_, one), logps_T in zip(pairs, ahead.logprobs(pairs), strict=True):
        assert list(one.behavior_logps) == pytest.approx(logps_T, abs=1e-4)
    stop_after(training(resumed, taught_vl, *extrapolation), 3)
    resume(resumed)
    assert reproducible_digests(resumed) == reproducible_digests(whole)


def test_images_need_a_vision_model(tmp_path: Path):
    with pytest.raises(NpoError, match="micro-base is a text-only model, but prompts have images"):
        list(training(tmp_path / "run", Path("micro-base")))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="it is about the lack of torchvision")
@pytest.mark.parametrize("kind", ["vllm", "vllm_server"])
def test_image_run_with_vllm_needs_torchvision(kind: str, untaught_vl: Path, tmp_path: Path):
    with pytest.raises(NpoError, match=f"engine.kind={kind} reads images with torchvision"):
        list(training(tmp_path / "run", untaught_vl, f"engine.kind={kind}"))
    assert not (tmp_path / "run").exists()


def test_dense_target_of_an_image_run(copied):
    reports = resume(copied, "target.kind=distribution", "target.teacher=checkpoint:4", at=2, new_branch="dense")
    assert [report.metrics["target/kl"] > 0 for report in reports] == [True, True]
    session = open_session_at(copied, 2, branch="main")
    assert session.policy.vision is not None and session.policy.vision.suppressed_ids


def test_dense_target_of_an_image_run_whose_teacher_is_shown_the_answer(copied):
    """The teacher reads the same images before the answer: each prompt's image tokens stay in its template."""
    session = open_session_at(copied, 2)
    text = PrivilegedText(recipe=show_answers(session.recipe), policy=session.policy)
    for prompt in session.task.train[:4]:
        own, shown = session.policy.encode(prompt), text.encode_prompt(prompt)
        image_id = session.policy.model.config.image_token_id
        assert shown.count(image_id) == own.count(image_id) > 0
        assert len(shown) > len(own)
    settings = ("target.kind=token_weight", "target.teacher=policy", "target.privileged=answer")
    reports = resume(copied, *settings, at=2, new_branch="shown")
    assert all(report.metrics["target/tokens"] > 0 and report.metrics["target/kl"] > 0 for report in reports)


def show_answers(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"target": recipe.target.model_copy(update={"privileged": "answer"})})
