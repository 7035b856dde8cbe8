"""Prefix slots: lengths, the policy's own continuation, loss beside plain autograd, record, kills, LoRA, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from npo_cli.config.guides import PrefixSettings
from npo_cli.errors import NpoError
from npo_cli.rollout.batch import ActiveGuide, StepBatch, build_batch
from npo_cli.rollout.prefix import choose_length
from npo_cli.session.session import Session
from npo_cli.storage.layout import RunDir
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.dry_run import plan_resume
from npo_cli.training.update import build_training_samples
from tests.distributed.test_two_processes import assert_same_metrics
from tests.helpers.guide_trajectories import correct_trajectory, make_active_guide, override_settings
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
)
from tests.helpers.torchrun import run as launch
from tests.training.test_update import distance, learned, norm, plain_logps

PREFIX = ("guide.inject.prefix.fraction=1", "guide.inject.prefix.schedule=uniform", "guide.inject.max_accuracy=1")
SIX = "train.num_steps=6"


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 5), (0.04, 1), (0.96, 9), (1.0, 9)])
def test_prefix_has_a_fraction_of_the_tokens_at_least_one_and_never_the_last(fraction, expected):
    # round(.5 10) = 5; round(.4) = 0, but one at least; round(9.6) = 10, but the tenth is the end token
    assert choose_length(10, PrefixSettings(fraction=fraction), fraction=fraction, seed=0) == expected


def test_uniform_prefixes_are_drawn_below_the_fraction():
    settings = PrefixSettings(fraction=0.5, schedule="uniform")
    lengths = [choose_length(100, settings, fraction=0.5, seed=seed) for seed in range(400)]
    assert (min(lengths) < 5, max(lengths) > 45, max(lengths) <= 50) == (True, True, True)
    assert sum(lengths) / 400 == pytest.approx(25, abs=3)


def test_linear_prefixes_get_shorter_down_to_the_last_step_with_the_guide():
    settings = PrefixSettings(fraction=0.8, schedule="linear")
    assert [settings.fraction_at(step, start_step=10, last_step=14) for step in (11, 12, 13, 14)] == pytest.approx(
        [0.8, 0.6, 0.4, 0.2]
    )
    assert PrefixSettings(fraction=0.8).fraction_at(14, start_step=10, last_step=14) == 0.8


def with_prefix(session: Session, **changes: object) -> Session:
    settings = session.recipe.guide.inject.prefix.model_copy(update={"fraction": 0.5} | changes)
    changed = override_settings(session, "guide.inject", max_accuracy=1.0, prefix=settings)
    return override_settings(changed, "train", grad_clip=1e9)


@pytest.fixture(scope="module")
def session(scout: Path) -> Session:
    return with_prefix(open_session_at(scout, 2))


@pytest.fixture(scope="module")
def guide(session: Session) -> ActiveGuide:
    """A right response to every prompt, with log-probabilities that float32 holds, as in a cache."""
    return make_active_guide(correct_trajectory(session, prompt) for prompt in session.task.train)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefix")


@pytest.fixture(scope="module")
def batch(session: Session, guide: ActiveGuide, folder: Path) -> StepBatch:
    log = RolloutLog(folder / "rollouts.jsonl")
    found = build_batch(session, log, seed_name="t", step=3, position=8, active_guide=guide)
    log.wait()
    return found


def test_prefix_slot_is_begun_by_the_guide_and_continued_by_the_policy(session, guide, batch):
    """Log-probabilities of the continuation are the policy's after prompt and prefix; the verdict is of the whole."""
    for group in batch.mixed:
        *own, last = group.rollouts
        (given,) = guide.rollouts[group.prompt.prompt_id]
        length = round(0.5 * given.num_tokens)
        assert last.response_ids[:length] == given.response_ids[:length]
        assert [(span.source, span.start, span.end, span.sampler_step) for span in last.spans] == [
            ("guide", 0, length, 99),
            ("own", length, last.num_tokens, 2),
        ]
        assert (last.guide_step, last.num_on_policy_tokens) == (99, last.num_tokens - length)
        assert last.num_tokens <= session.recipe.sampling.max_new_tokens
        ids = torch.tensor([[*session.policy.encode(group.prompt), *last.response_ids]])
        with torch.no_grad():
            logps_TW = session.policy.model(ids).logits[0, -last.num_tokens - 1 : -1].log_softmax(-1)
        logps_T = logps_TW.gather(1, torch.tensor(last.response_ids)[:, None])[:, 0]
        assert last.behavior_logps[length:] == pytest.approx(logps_T[length:].tolist(), abs=1e-4)
        assert last.behavior_logps[:length] == given.behavior_logps[:length]
        (result,) = session.task.grade([group.prompt], [last.text], finished=[last.finished])
        assert (last.verdict, last.reward) == (result.verdict, result.reward)
        assert not any(rollout.is_off_policy for rollout in own)
    continued = sum(group.rollouts[-1].num_on_policy_tokens for group in batch.mixed)
    own = sum(rollout.num_tokens for group in batch.on_policy for rollout in group.rollouts)
    assert batch.num_generated_tokens == own + continued


def test_prefix_slots_of_a_recorded_step_are_read_back(session, guide, batch, folder):
    broken = replace(session, engine=None)
    log = RolloutLog(folder / "rollouts.jsonl")
    again = build_batch(broken, log, seed_name="t", step=3, position=8, active_guide=guide)
    assert again == replace(batch, is_recorded=True)


@pytest.mark.parametrize(("weight", "ratio"), [(0.0, "exact"), (0.25, "proximal"), (1.0, "none")])
def test_gradient_of_a_prefix_slot_equals_plain_autograd(session, batch, weight, ratio):
    """Masked: 1/T over the continuation alone. Weighted: w times the prefix's tokens, 1/T over all of them."""
    changed = override_settings(with_prefix(session, weight=weight), "guide.inject", ratio=ratio)
    entries = []
    for entry in batch.selected[:2]:
        last = entry.group.rollouts[-1]
        prefix = replace(last.spans[0], is_trained=weight > 0, weight=weight or 1.0)
        rollouts = (*entry.group.rollouts[:-1], replace(last, spans=(prefix, last.spans[1])))
        entries.append(replace(entry, group=replace(entry.group, rollouts=rollouts), advantages=(1.0, -0.4, 0.0, 0.7)))
    samples = build_training_samples(changed.policy, entries, changed.recipe.guide.inject)
    gradient, _ = learned(changed, samples)
    total = torch.tensor(0.0)
    for one in samples:
        logps_T, factors_T = plain_logps(changed, one), torch.ones(len(one.tokens.response_ids))
        if one.is_off_policy:
            factors_T[: one.spans[0].end] = weight
        count = len(factors_T) if weight else int((factors_T > 0).sum())
        total = total - one.advantage * (factors_T * logps_T).sum() / (count * len(samples))
    expected = list(torch.autograd.grad(total, list(changed.policy.model.parameters())))
    assert norm(expected) > 1e-2
    assert distance(gradient, expected) < 1e-3 * norm(expected)


@pytest.fixture(scope="module")
def prefixed(scout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copy_run(scout, tmp_path_factory.mktemp("prefixed") / "run")
    resume(root, *PREFIX, SIX, at=2, guide="near")
    return root


def test_prefix_slots_are_trained_and_on_the_step_s_bill(prefixed):
    rows = [json.loads(line) for line in RunDir(prefixed).metrics_path("near").read_text().splitlines()]
    log = RolloutLog(RunDir(prefixed).rollouts_path("near"))
    for row in rows[:2]:
        groups = log.read_step(row["step"])
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        assert row["inject/slots"] == sum(rollout.is_off_policy for rollout in rollouts) > 0
        assert row["tokens"] == sum(rollout.num_on_policy_tokens for rollout in rollouts)
        assert row["inject/continued_tokens"] > 0 < row["inject/prefix_tokens"]
    # The guide is for steps 3 and 4.
    assert "inject/prefix_tokens" not in rows[2]


def test_dry_run_counts_a_continuation_per_slot_and_step(scout):
    options = {"at": 2, "guide": "near", "source_branch": None, "new_branch": None, "steps": None}
    planned = list(plan_resume(scout, overrides=(*PREFIX, SIX), **options))
    (work,) = [one for one in planned if getattr(one, "work", "") == "continue guide near"]
    # Steps 3 and 4, 4 prompts, 1 slot, at most 18 tokens.
    assert (work.steps, work.samples, work.max_tokens) == ("3-4", 8, 8 * 18)


KINDS = {
    "plain": (),
    "weighted": ("guide.inject.prefix.weight=0.5", "guide.inject.prefix.schedule=linear"),
    "two updates": ("guide.inject.prefix.weight=1", "train.num_updates=2"),
    "staleness": ("train.staleness=1",),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "plain" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_resume_of_prefix_slots_between_checkpoints_is_bitwise_identical(scout, prefixed, tmp_path, kind, request):
    if kind == "staleness":
        request.getfixturevalue("producers")
    settings, straight = (*PREFIX, *KINDS[kind], SIX), prefixed
    if kind == "two updates":
        scout = tmp_path / "scout"
        train(scout, "train.num_updates=2")
        sample(scout)
    if kind != "plain":
        straight = copy_run(scout, tmp_path / "straight")
        resume(straight, *settings, at=2, guide="near")
    root = copy_run(scout, tmp_path / "dropped")
    # Step 3 is recorded, the fork's checkpoint is the newest.
    stop_after(start_resume(root, *settings, at=2, guide="near"), 3)
    resume(root)
    expected = reproducible_digests(straight, "near")
    assert reproducible_digests(root, "near") == expected
    assert "checkpoints/step_000006/training_state/optimizer.safetensors" in expected


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "lora"])
def test_prefix_slots_of_two_processes_equal_one(lora, tmp_path):
    train(tmp_path / "single", *lora)
    sample(tmp_path / "single")
    root = copy_run(tmp_path / "single", tmp_path / "double")
    settings = (*PREFIX, "guide.inject.prefix.weight=0.5")
    launch("resume", str(root), "--at", "2", "--guide", "near", *settings, log=tmp_path / "log")
    resume(tmp_path / "single", *settings, at=2, guide="near")
    double, single = (
        [json.loads(line) for line in RunDir(one).metrics_path("near").read_text().splitlines()]
        for one in (root, tmp_path / "single")
    )
    assert_same_metrics(double, single)
    assert all(row["inject/continued_tokens"] > 0 for row in double)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["guide.experience.replay_fraction=0.5"], "not available with guide.experience.replay_fraction"),
        (["guide.inject.mode=none"], "not available with guide.inject.mode=none"),
        (["guide.inject.prefix.fraction=0"], "guide.inject.prefix.schedule has no effect"),
    ],
    ids=str,
)
def test_prefix_settings_are_refused(overrides, message):
    with pytest.raises(NpoError) as caught:
        tiny_recipe(*PREFIX, *overrides)
    assert message in caught.value.message
