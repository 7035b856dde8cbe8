"""Supervised fine-tuning on a guide cache: loss and gradient beside plain autograd, runs, kills, refusals."""

from typing import Any

import pytest
import torch

from npo_cli.errors import NpoError
from npo_cli.rollout.batch import ActiveGuide, build_sft_batch
from npo_cli.storage.cost_sums import cost_at
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.layout import open_run
from npo_cli.storage.verify import Damage, verify_run
from npo_cli.training.train import train_run
from npo_cli.training.update import Updater, build_training_samples
from tests.helpers.guide_trajectories import override_settings
from tests.helpers.runs import (
    LORA,
    copy_run,
    open_session_at,
    reproducible_digests,
    resume,
    sample,
    start_resume,
    stop_after,
    tiny_recipe,
    train,
    trajectories,
)
from tests.training.test_update import Recorder, distance, norm

SFT = "train.objective=sft"


@pytest.mark.parametrize("aggregation", ["seq_mean_token_mean", "token_mean"])
def test_sft_equals_an_independent_negative_log_likelihood(scout, aggregation):
    changes = {"objective": "sft", "grad_clip": 1e9, "prompts_per_step": 8}
    session = override_settings(open_session_at(scout, 2), "train", **changes)
    session = override_settings(session, "loss", aggregation=aggregation)
    guides = {prompt_id: (rollout,) for prompt_id, rollout in trajectories(scout).items()}
    batch = build_sft_batch(session, ActiveGuide(rollouts=guides, until_step=4), position=8)
    prompts = [prompt for prompt in session.prompts_between(8, 16) if prompt.prompt_id in guides]
    assert (batch.position, batch.on_policy) == (16, ())
    samples = build_training_samples(session.policy, batch.selected, session.recipe.guide.inject)
    assert len(samples) == len(prompts) > 1
    recorder: Any = Recorder(session.policy.model)
    report = Updater(session.policy, recorder, session.recipe).take_step(samples, lr=1.0, measures_guide=False)
    means, sums, num_tokens = [], [], 0
    for prompt in prompts:
        prompt_ids, response_ids = session.policy.encode(prompt), guides[prompt.prompt_id][0].response_ids
        ids = torch.tensor([[*prompt_ids, *response_ids]])
        logits_TW = session.policy.model(ids).logits[0, len(prompt_ids) - 1 : -1]
        nll_T = torch.nn.functional.cross_entropy(logits_TW, ids[0, len(prompt_ids) :], reduction="none")
        means, sums, num_tokens = [*means, nll_T.mean()], [*sums, nll_T.sum()], num_tokens + len(nll_T)
    mean_of_means, mean = torch.stack(means).mean(), torch.stack(sums).sum() / num_tokens
    total = mean_of_means if aggregation == "seq_mean_token_mean" else mean
    assert report.loss == pytest.approx(total.item(), rel=1e-4)
    expected = list(torch.autograd.grad(total, list(session.policy.model.parameters())))
    assert norm(expected) > 1e-2
    assert distance(recorder.gradients[-1], expected) < 1e-4 * norm(expected)


def test_sft_samples_nothing_and_grpo_goes_on_from_it(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    reports = resume(root, SFT, "train.lr=1e-3", at=2, guide="near", new_branch="sft")
    assert [report.step for report in reports] == [3, 4]
    assert [report.metrics["tokens"] for report in reports] == [0, 0]
    assert sum(report.metrics["rows_trained"] for report in reports) == len(trajectories(scout))
    assert [report.metrics["data_position"] for report in reports] == [12, 16]
    assert not any("reward" in report.metrics for report in reports)
    run = open_run(root)
    # The scout up to step 4 and the guide's samples, and nothing for the two steps.
    guide = load_guide(run, "near")[0].num_tokens
    assert cost_at(run, "sft", 4).tokens == cost_at(run, "main", 4).tokens + guide
    after = resume(root, "train.objective=rl", "train.num_steps=6", at=4, source_branch="sft", new_branch="grpo")
    assert [report.step for report in after] == [5, 6]
    assert all(report.metrics["tokens"] > 0 for report in after)
    assert not [line for line in verify_run(root) if isinstance(line, Damage)]


@pytest.mark.parametrize("overrides", [(), pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_resume_of_sft_between_checkpoints_is_bitwise_identical(tmp_path, overrides):
    root = tmp_path / "run"
    train(root, *overrides, "train.save_every=4")
    sample(root, at=0)
    roots = [copy_run(root, tmp_path / name) for name in ("straight", "dropped")]
    options = {"at": 0, "guide": "near", "new_branch": "sft"}
    resume(roots[0], SFT, **options)
    stop_after(start_resume(roots[1], SFT, **options), 3)
    assert [report.step for report in resume(roots[1])] == [1, 2, 3, 4]
    straight = reproducible_digests(roots[0], "sft")
    assert reproducible_digests(roots[1], "sft") == straight
    assert "checkpoints/step_000004/training_state/optimizer.safetensors" in straight


@pytest.mark.parametrize(
    "overrides",
    [
        ("target.kind=distribution", "target.teacher=self"),
        ("train.staleness=1",),
        ("sampling.dynamic=true",),
        ("guide.experience.replay_fraction=0.5",),
        ("guide.source=extrapolated",),
        ("order.mistakes=0.5",),
    ],
)
def test_sft_is_refused_with_what_needs_rollouts(overrides):
    with pytest.raises(NpoError, match=r"train.objective=sft samples no rollouts"):
        tiny_recipe(SFT, *overrides)


def test_sft_is_refused_without_a_guide_and_beyond_it(scout, tmp_path):
    with pytest.raises(NpoError, match="learns the responses of a guide cache"):
        list(train_run(tmp_path / "run", tiny_recipe(SFT)))
    assert not (tmp_path / "run").exists()
    root = copy_run(scout, tmp_path / "copy")
    for options, message in (
        ({}, "learns the responses of a guide cache"),
        ({"guide": "near"}, "has nothing to learn after that"),
    ):
        with pytest.raises(NpoError, match=message):
            resume(root, SFT, "train.num_steps=6", at=2, new_branch="sft", **options)
    assert [path.name for path in (root / "branches").iterdir() if path.name != "main"] == []
