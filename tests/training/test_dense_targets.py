"""Training with a dense target: loss and gradient beside plain autograd, window, kills, LoRA, costs, refusals."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npo_cli.errors import NpoError
from npo_cli.guides.dense_target import ActiveTarget, StepTarget, check_teacher, open_teacher
from npo_cli.policy.model import Policy
from npo_cli.report.tables_autonpo import account_tables
from npo_cli.report.tables_costs import costs_tables
from npo_cli.rollout.batch import GroupWithAdvantages, build_batch
from npo_cli.session.session import Session
from npo_cli.storage.cost_sums import compute_run_costs, cost_at, costs_by_activity
from npo_cli.storage.costs import read_cost_lines
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_first_segment
from npo_cli.storage.retention import find_protected_checkpoints
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.train import train_run
from npo_cli.training.update import Updater, UpdateReport, build_training_samples
from tests.helpers.guide_trajectories import override_settings
from tests.helpers.runs import (
    LORA,
    copy_run,
    open_session_at,
    reproducible_digests,
    resume,
    start_resume,
    stop_after,
    tiny_recipe,
    train,
)
from tests.training.test_update import Recorder, distance, norm

DISTILL = ("target.kind=distribution", "target.teacher=checkpoint:4")
WEIGH = ("target.kind=token_weight", "target.teacher=checkpoint:4")


def with_target(session: Session, **changes: object) -> Session:
    changes = {"teacher": "checkpoint:4", "kind": "distribution"} | changes
    return override_settings(override_settings(session, "target", **changes), "train", grad_clip=1e9)


@pytest.fixture(scope="module")
def session(scout: Path) -> Session:
    """The learner of step 2, with the policy of step 4 as teacher."""
    opened = with_target(open_session_at(scout, 2))
    teacher = open_teacher(opened.run, opened.recipe, opened.policy, parent="main", fork_step=2)
    return replace(opened, teacher=teacher)


@pytest.fixture(scope="module")
def entries(session: Session, tmp_path_factory: pytest.TempPathFactory) -> tuple[GroupWithAdvantages, ...]:
    """4 groups of 4; advantages by hand, as most groups of so weak a policy have none."""
    log = RolloutLog(tmp_path_factory.mktemp("rows") / "rollouts.jsonl")
    selected = build_batch(session, log, seed_name="t", step=3, position=4, active_guide=None).selected
    assert any(rollout.is_correct for entry in selected for rollout in entry.group.rollouts)
    return tuple(replace(entry, advantages=(1.0, -0.4, 0.7, 0.0)) for entry in selected)


def step_target(session: Session) -> StepTarget:
    assert session.teacher is not None
    found = ActiveTarget(settings=session.recipe.target, teacher=session.teacher, fork_step=2).at_step(3)
    assert found is not None
    return found


def learned(session: Session, entries: Sequence[GroupWithAdvantages]) -> tuple[list[Tensor], UpdateReport]:
    """Gradient and report of one update."""
    target, recorder = step_target(session), Recorder(session.policy.model)
    samples = build_training_samples(session.policy, entries, session.recipe.guide.inject, target=target)
    optimizer: Any = recorder
    report = Updater(session.policy, optimizer, session.recipe).take_step(samples, lr=1.0, target=target)
    return recorder.gradients[-1], report


def response_logits(policy: Policy, entry: GroupWithAdvantages, response_ids: tuple[int, ...]) -> Tensor:
    """`(T, W)` by the model's own forward pass over one unpadded row."""
    prompt_ids = policy.encode(entry.group.prompt)
    logits_LW = policy.model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0]
    return logits_LW[len(prompt_ids) - 1 : -1]


def gradient_of(policy: Policy, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(policy.model.parameters())))


@pytest.mark.parametrize("rollouts", ["wrong", "all"])
def test_distribution_target_equals_an_independent_forward_kl(session, entries, rollouts):
    """B-OPSD's loss: per response the mean over tokens of KL(sg teacher || policy), over all N responses."""
    session = with_target(session, rollouts=rollouts, policy_gradient=False)
    gradient, report = learned(session, entries)
    total, num_tokens, kl_sum, num_rollouts = torch.tensor(0.0), 0, 0.0, 0
    for entry in entries:
        for rollout in entry.group.rollouts:
            if rollouts == "wrong" and rollout.is_correct:
                continue
            with torch.no_grad():
                teacher_TW = response_logits(session.teacher, entry, rollout.response_ids).log_softmax(-1)
            policy_TW = response_logits(session.policy, entry, rollout.response_ids).log_softmax(-1)
            kl_T = torch.nn.functional.kl_div(policy_TW, teacher_TW, reduction="none", log_target=True).sum(-1)
            total = total + kl_T.mean() / 16
            num_tokens, kl_sum, num_rollouts = num_tokens + len(kl_T), kl_sum + kl_T.sum().item(), num_rollouts + 1
    assert 0 < num_rollouts <= 16
    assert (num_rollouts == 16) is (rollouts == "all")
    assert report.loss == pytest.approx(total.item(), rel=1e-4)
    assert report.stats.target_tokens == num_tokens
    assert report.stats.metrics()["target/kl"] == pytest.approx(kl_sum / num_tokens, rel=1e-4)
    expected = gradient_of(session.policy, total)
    assert norm(expected) > 1e-3
    assert distance(gradient, expected) < 1e-4 * norm(expected)


def test_token_weight_target_equals_an_independent_rlsd(session, entries):
    """A_t = A (1 - lambda + lambda clip((pi_teacher / pi)^sign(A), 1 - e, 1 + e)), with the mean over tokens."""
    changes = {"kind": "token_weight", "clip_range": 0.05, "weight": 0.75}
    gradient, report = learned(with_target(session, **changes), entries)
    total, weights = torch.tensor(0.0), []
    for entry in entries:
        for rollout, advantage in zip(entry.group.rollouts, entry.advantages, strict=True):
            ids_T1 = torch.tensor(rollout.response_ids)[:, None]
            with torch.no_grad():
                teacher_T = (
                    response_logits(session.teacher, entry, rollout.response_ids).log_softmax(-1).gather(1, ids_T1)
                )
            policy_T = response_logits(session.policy, entry, rollout.response_ids).log_softmax(-1).gather(1, ids_T1)
            ratio_T = (teacher_T - policy_T.detach()).exp()
            weight_T = (ratio_T if advantage > 0 else 1 / ratio_T).clip(0.95, 1.05)
            total = total - (advantage * (0.25 + 0.75 * weight_T) * policy_T).mean() / 16
            weights += weight_T.flatten().tolist() if advantage else []
    assert min(weights) == pytest.approx(0.95) and max(weights) == pytest.approx(1.05)
    assert report.stats.metrics()["target/weight_mean"] == pytest.approx(sum(weights) / len(weights), abs=1e-5)
    expected = gradient_of(session.policy, total)
    assert norm(expected) > 1e-2
    assert distance(gradient, expected) < 1e-4 * norm(expected)


@pytest.mark.parametrize("changes", [{}, {"divergence": "js", "top_k": 5}, {"kind": "token_weight"}], ids=str)
def test_target_gradient_does_not_depend_on_micro_batches_chunks_and_packing(session, entries, changes):
    session = with_target(session, **changes)
    whole, report = learned(session, entries)
    assert norm(whole) > 1e-3
    for train_changes in (
        {"micro_batch_tokens": 90, "logit_chunk_tokens": 7},
        {"share_prompts": False, "logit_chunk_tokens": 5},
    ):
        split, again = learned(override_settings(session, "train", **train_changes), entries)
        assert distance(split, whole) < 1e-5 * norm(whole)
        assert again.stats.metrics() == pytest.approx(report.stats.metrics(), abs=1e-5)


def test_target_beside_the_policy_gradient_is_the_sum_of_both(session, entries):
    both, _ = learned(session, entries)
    alone, report = learned(with_target(session, policy_gradient=False), entries)
    policy_only, _ = learned(with_target(session, weight=0.0), entries)
    assert distance(both, [a + b for a, b in zip(alone, policy_only, strict=True)]) < 1e-5 * norm(both)
    assert min(norm(alone), norm(policy_only)) > 1e-3
    # Without the policy gradient only rows with a target are passed.
    wrong = sum(not rollout.is_correct for entry in entries for rollout in entry.group.rollouts)
    assert report.num_rows == wrong < 16


def test_token_weights_of_a_second_update_are_those_of_the_start_of_the_step(session, entries):
    """The policy moves with the first update, its old log-probabilities and so the weights do not."""
    session = with_target(session, kind="token_weight", clip_range=1.0)
    _, whole = learned(session, entries)
    target = step_target(session)
    samples = build_training_samples(session.policy, entries, session.recipe.guide.inject, target=target)
    twice = override_settings(session, "train", num_updates=2)
    start = {name: tensor.clone() for name, tensor in session.policy.model.state_dict().items()}
    optimizer = torch.optim.SGD(session.policy.model.parameters())
    report = Updater(session.policy, optimizer, twice.recipe).take_step(samples, lr=0.5, target=target)
    moved = session.policy.model.state_dict()
    assert max((moved[name] - start[name]).abs().max().item() for name in start) > 1e-3
    session.policy.model.load_state_dict(start)
    assert report.stats.target_tokens == whole.stats.target_tokens
    assert report.stats.target_weight_sum == pytest.approx(whole.stats.target_weight_sum, rel=1e-4)
    # The KL estimate is that of the moved policy.
    assert report.stats.target_kl_sum != pytest.approx(whole.stats.target_kl_sum, rel=1e-2)


def test_target_takes_the_temperature_of_sampling(session, entries):
    session = with_target(session, policy_gradient=False)
    warm = override_settings(session, "sampling", temperature=2.0)
    _, report = learned(warm, entries)
    entry, rollout = next(
        (entry, rollout) for entry in entries for rollout in entry.group.rollouts if not rollout.is_correct
    )
    only = replace(entry, group=replace(entry.group, rollouts=(rollout,)), advantages=(0.0,))
    _, single = learned(warm, [only])
    teacher_TW, policy_TW = (
        (response_logits(one, entry, rollout.response_ids) / 2).log_softmax(-1)
        for one in (session.teacher, session.policy)
    )
    kl = (teacher_TW.exp() * (teacher_TW - policy_TW)).sum(-1).mean().item()
    assert single.loss == pytest.approx(kl, rel=1e-3)
    assert report.stats.target_tokens > 0


# Runs


def test_run_has_the_target_in_its_window_only(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    window = ("target.start_step=3", "target.num_steps=2", "target.group_size=2", "target.schedule=linear")
    reports = resume(root, *DISTILL, *window, "train.num_steps=6", at=2, new_branch="dense")
    assert [report.metrics.get("target/coefficient") for report in reports] == [None, 1.0, 0.5, None]
    rollouts = [
        len(line["rollouts"])
        for line in map(json.loads, open_run(root).rollouts_path("dense").read_text().splitlines())
    ]
    assert rollouts == [4] * 4 + [2] * 8 + [4] * 4
    # Before the window training is that of a branch without a target.
    plain = resume(copy_run(scout, tmp_path / "plain"), "train.num_steps=6", at=2, new_branch="dense")
    assert reports[0].metrics == plain[0].metrics
    assert reports[1].metrics["tokens"] < plain[1].metrics["tokens"]


def test_run_outside_the_window_is_bitwise_plain(scout, tmp_path):
    roots = [copy_run(scout, tmp_path / name) for name in ("plain", "over")]
    resume(roots[0], at=2, new_branch="same")
    resume(roots[1], *DISTILL, "target.start_step=90", at=2, new_branch="same")
    assert reproducible_digests(roots[1], "same") == reproducible_digests(roots[0], "same")


def test_run_with_a_guide_cache_has_no_target_on_injected_responses(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    reports = resume(root, *DISTILL, "target.rollouts=all", "guide.inject.max_accuracy=1", at=2, guide="near")
    for report in reports:
        assert report.metrics["inject/slots"] > 0
        assert report.metrics["target/rollouts"] == 16 - report.metrics["inject/slots"]
    assert next(line for line in read_cost_lines(open_run(root)) if line.kind == "fork").until == ["main", 4]


KINDS = {
    "distribution": (*DISTILL, "target.num_steps=3", "target.group_size=2", "target.rollouts=all"),
    "top k, js, alone": (*DISTILL, "target.top_k=4", "target.divergence=js", "target.policy_gradient=false"),
    "token weight": (*WEIGH, "target.weight=0.5", "target.schedule=linear", "target.num_steps=3"),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "distribution" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_resume_of_a_target_between_checkpoints_is_bitwise_identical(scout, tmp_path, kind):
    roots = [copy_run(scout, tmp_path / name) for name in ("straight", "dropped")]
    settings = KINDS[kind]
    resume(roots[0], *settings, "train.num_steps=6", at=2, new_branch="dense")
    # Step 5 is recorded, step 4 is the newest checkpoint.
    stop_after(start_resume(roots[1], *settings, "train.num_steps=6", at=2, new_branch="dense"), 5)
    assert [report.step for report in resume(roots[1])] == [5, 6]
    straight = reproducible_digests(roots[0], "dense")
    assert reproducible_digests(roots[1], "dense") == straight
    assert "checkpoints/step_000006/training_state/optimizer.safetensors" in straight


def test_lora_teacher_has_other_adapters_on_the_same_base(tmp_path):
    root = tmp_path / "run"
    train(root, *LORA)
    session = with_target(open_session_at(root, 2))
    teacher = open_teacher(session.run, session.recipe, session.policy, parent="main", fork_step=2)
    own, others = (dict(policy.model.named_parameters()) for policy in (session.policy, teacher))
    assert own.keys() == others.keys()
    shared = {name for name in own if own[name].data_ptr() == others[name].data_ptr()}
    assert {name for name in own if ".lora_" not in name} == shared
    assert any(not torch.equal(own[name], others[name]) for name in own.keys() - shared)
    assert not any(parameter.requires_grad for parameter in others.values())
    before = teacher.digest
    reports = resume(root, *DISTILL, at=2, new_branch="dense")
    assert all(report.metrics["target/kl"] > 0 for report in reports)
    again = open_teacher(session.run, session.recipe, session.policy, parent="main", fork_step=2)
    assert again.digest == before


def test_another_run_and_a_model_are_teachers_from_the_first_step(scout, tmp_path):
    for name, spec in (("run", f"run:{scout}@4"), ("model", "model:micro-base")):
        root = tmp_path / name
        settings = ("target.kind=distribution", f"target.teacher={spec}", "train.num_steps=2")
        reports = train(root, *settings)
        kls = [report.metrics["target/kl"] for report in reports]
        # micro-base is the policy itself before the first update
        assert (kls[0] < 1e-9, kls[1] > 1e-6) == (name == "model", True)
        assert find_first_segment(open_run(root), "main").teacher is None


def test_teacher_is_on_the_bill_and_protected(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    reports = resume(root, *DISTILL, at=2, new_branch="dense")
    run = open_run(root)
    assert find_first_segment(run, "dense").teacher == ("main", 4)
    lines = [line for line in read_cost_lines(run) if line.branch == "dense"]
    # The scout was trained up to step 4, two steps beyond the fork.
    assert next(line for line in lines if line.kind == "fork").until == ["main", 4]
    own = sum(int(report.metrics["tokens"]) for report in reports)
    assert cost_at(run, "dense", 4).tokens == cost_at(run, "main", 4).tokens + own
    scored = [line.teacher_tokens for line in lines if line.kind == "train"]
    assert scored == [report.metrics["target/tokens"] for report in reports]
    assert min(scored) > 0
    assert ("main", 4) in find_protected_checkpoints(run)
    # Read by the teacher, and no part of the tokens.
    costs = compute_run_costs(run, "dense")
    assert costs.teacher_tokens == cost_at(run, "dense", 4).teacher_tokens == sum(scored)
    spent = {one.activity: one.teacher_tokens for one in costs_by_activity(run, "dense")}
    assert spent["training, line of dense"] == spent["total"] == sum(scored)
    (account,) = account_tables([costs])
    assert ("read by the teacher", f"{int(sum(scored)):,}") in account.rows
    (activities,) = costs_tables(list(costs_by_activity(run, "dense")))
    assert "teacher tokens" in activities.header
    assert "teacher tokens" not in costs_tables(list(costs_by_activity(open_run(scout), "main")))[0].header


# Refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["target.kind=distribution"], "target.kind=distribution needs a teacher"),
        (["target.teacher=checkpoint:4"], "target.teacher has no effect with target.kind=none"),
        (["target.kind=distil"], "target.kind=distil is not a known target"),
        ([*DISTILL[:1], "target.teacher=chekpoint:4"], "target.teacher=chekpoint:4 is not a known guide source"),
        ([*DISTILL, "target.clip_range=0.1"], "target.clip_range has no effect with target.kind=distribution"),
        ([*WEIGH, "target.top_k=5"], "target.top_k has no effect with target.kind=token_weight"),
        ([*WEIGH, "target.weight=2"], "target.weight must be at most 1 with target.kind=token_weight"),
        ([*DISTILL, "target.schedule=linear"], "target.schedule=linear needs the length of the window"),
        ([*DISTILL, "guide.experience.replay_fraction=0.5"], "not available with guide.experience.replay_fraction"),
        ([*DISTILL, "guide.source=extrapolated"], "is not available with guide.source=extrapolated"),
        ([*DISTILL, "sampling.dynamic=true"], "sampling.dynamic=true drops groups without advantages"),
        ([*DISTILL, "target.group_size=2", "guide.inject.slots=2"], "guide.inject.slots must be below target.group_s"),
    ],
    ids=str,
)
def test_target_settings_are_refused(overrides, message):
    with pytest.raises(NpoError) as caught:
        tiny_recipe(*overrides)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("checkpoint:4", "a run begins without checkpoints of its own"),
        ("base", "a run begins without checkpoints of its own"),
        ("past", "source past has no distribution per token"),
        ("extrapolated:logits,k=2,a=1", "a run begins without checkpoints of its own"),
        ("file:traces.jsonl", "source file has no distribution per token"),
        ("run:RUN", "without a step it would change"),
        ("run:RUN@3", "step 3"),
        ("run:nowhere@3", "there is no run directory"),
        ("model:nowhere", "nowhere"),
    ],
)
def test_teacher_of_a_new_run_is_refused_before_anything_is_written(scout, tmp_path, spec, message):
    recipe = tiny_recipe("target.kind=distribution", f"target.teacher={spec.replace('RUN', str(scout))}")
    with pytest.raises(NpoError) as caught:
        list(train_run(tmp_path / "run", recipe))
    assert caught.value.message.startswith("target.teacher=")
    assert message in caught.value.message
    assert not (tmp_path / "run").exists()


def test_teacher_of_a_fork_is_refused_before_the_branch_is_created(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    for spec, message in (
        ("checkpoint:2", "is not later than"),
        ("checkpoint:3", "step 3"),
        (f"run:{root}@4", "itself"),
    ):
        with pytest.raises(NpoError) as caught:
            resume(root, "target.kind=distribution", f"target.teacher={spec}", at=2, new_branch="dense")
        assert message in caught.value.message
    assert [path.name for path in (root / "branches").iterdir() if path.name != "main"] == []


def test_teacher_with_another_tokenizer_is_refused(session):
    tokenizer = type(session.policy.tokenizer).from_pretrained(session.policy.tokenizer.name_or_path)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(NpoError) as caught:
        check_teacher(replace(session.policy, tokenizer=tokenizer), session.policy)
    assert "another tokenizer" in caught.value.message


def test_target_changes_at_a_fork_only(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    with pytest.raises(NpoError) as caught:
        resume(root, *DISTILL, "train.num_steps=6")
    assert "target.kind cannot change" in caught.value.message
