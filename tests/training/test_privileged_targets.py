"""Dense targets whose teacher is shown an answer, is the policy itself, or is extrapolated or heated."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npo_cli.errors import NpoError
from npo_cli.guides.dense_target import ActiveTarget, open_teacher
from npo_cli.guides.privileged import PrivilegedText, fill_template
from npo_cli.policy.extrapolated import ExtrapolatedPolicy
from npo_cli.policy.model import Policy
from npo_cli.rollout.batch import GroupWithAdvantages, build_batch
from npo_cli.session.session import Session
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_first_segment
from npo_cli.storage.retention import find_protected_checkpoints
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.train import train_run
from npo_cli.training.update import Updater, UpdateReport, build_training_samples
from npo_cli.types.rollouts import ImageRef, Message, Prompt, Rollout
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
    trajectories,
)
from tests.training.test_dense_targets import gradient_of, with_target
from tests.training.test_update import Recorder, distance, norm

SHOWN = (
    "guide.inject.mode=none",
    "target.kind=distribution",
    "target.teacher=checkpoint:4",
    "target.privileged=response",
)
RLSD = ("target.kind=token_weight", "target.teacher=policy", "target.privileged=answer", "target.weight=0.5")


@pytest.fixture(scope="module")
def session(scout: Path) -> Session:
    return open_session_at(scout, 2)


@pytest.fixture(scope="module")
def responses(scout: Path) -> Mapping[str, Sequence[Rollout]]:
    """The guide cache of step 4, of some of the prompts of step 3."""
    found = trajectories(scout)
    return {prompt_id: (found[prompt_id],) for prompt_id in sorted(found)[::2]}


@pytest.fixture(scope="module")
def entries(session: Session, tmp_path_factory: pytest.TempPathFactory) -> tuple[GroupWithAdvantages, ...]:
    """8 groups of 4, those that the guide cache is for; advantages by hand."""
    log = RolloutLog(tmp_path_factory.mktemp("rows") / "rollouts.jsonl")
    selected = [
        entry
        for step, position in ((3, 8), (4, 12))
        for entry in build_batch(session, log, seed_name="t", step=step, position=position, active_guide=None).selected
    ]
    return tuple(replace(entry, advantages=(1.0, -0.4, 0.7, 0.0)) for entry in selected)


def taught(session: Session, **changes: object) -> Session:
    """The learner of step 2 with this target and its teacher."""
    opened = override_settings(with_target(session, **changes), "guide.inject", max_accuracy=1.0)
    teacher = open_teacher(opened.run, opened.recipe, opened.policy, parent="main", fork_step=2)
    return replace(opened, teacher=teacher)


def learned(
    session: Session, entries: Sequence[GroupWithAdvantages], responses: Mapping[str, Sequence[Rollout]] | None = None
) -> tuple[list[Tensor], UpdateReport]:
    """Gradient and report of one update."""
    privileged = PrivilegedText(recipe=session.recipe, policy=session.policy, responses=responses or {})
    active = ActiveTarget(settings=session.recipe.target, teacher=session.teacher, fork_step=2)
    target = active.at_step(3, privileged=privileged if session.recipe.target.privileged else None)
    recorder: Any = Recorder(session.policy.model)
    samples = build_training_samples(session.policy, entries, session.recipe.guide.inject, target=target)
    report = Updater(session.policy, recorder, session.recipe).take_step(samples, lr=1.0, target=target)
    return recorder.gradients[-1], report


def logits_after(policy: Policy, text: str, response_ids: tuple[int, ...]) -> Tensor:
    """`(T, W)` of the response's tokens after a text, by the model's own forward pass."""
    prompt_ids = policy.tokenizer(text).input_ids
    logits_LW = policy.model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0]
    return logits_LW[len(prompt_ids) - 1 : -1]


def logps_after(policy: Policy, text: str, response_ids: tuple[int, ...]) -> Tensor:
    """`(T, 1)` of the response's tokens."""
    return logits_after(policy, text, response_ids).log_softmax(-1).gather(1, torch.tensor(response_ids)[:, None])


def shown_text(prompt: Prompt, text: str) -> str:
    """The template of recipes/micro.yaml."""
    return f"{prompt.text}{text}{prompt.text}"


# One batch beside an independent computation


def test_rlsd_with_the_reference_answer_equals_an_independent_computation(session, entries):
    """A_t = A (1 - lambda + lambda clip((pi(y_t | x, answer) / pi(y_t | x))^sign(A), 1 - e, 1 + e)), one policy."""
    changes = {"kind": "token_weight", "teacher": "policy", "privileged": "answer", "weight": 0.75, "clip_range": 0.5}
    rlsd = taught(session, **changes)
    assert rlsd.teacher is rlsd.policy
    gradient, report = learned(rlsd, entries)
    total, weights = torch.tensor(0.0), []
    for entry in entries:
        prompt = entry.group.prompt
        for rollout, advantage in zip(entry.group.rollouts, entry.advantages, strict=True):
            with torch.no_grad():
                teacher_T1 = logps_after(session.policy, shown_text(prompt, prompt.answer), rollout.response_ids)
            policy_T1 = logps_after(session.policy, prompt.text, rollout.response_ids)
            ratio_T1 = (teacher_T1 - policy_T1.detach()).exp()
            weight_T1 = (ratio_T1 if advantage > 0 else 1 / ratio_T1).clip(0.5, 1.5)
            total = total - (advantage * (0.25 + 0.75 * weight_T1) * policy_T1).mean() / 32
            weights += weight_T1.flatten().tolist() if advantage else []
    assert min(weights) == pytest.approx(0.5) and max(weights) == pytest.approx(1.5)
    assert any(0.5 < weight < 1.5 for weight in weights)
    assert report.stats.metrics()["target/weight_mean"] == pytest.approx(sum(weights) / len(weights), abs=1e-4)
    expected = gradient_of(session.policy, total)
    assert norm(expected) > 1e-2
    assert distance(gradient, expected) < 1e-4 * norm(expected)


@pytest.mark.parametrize("unfilled", ["skip", "plain"])
def test_b_opsd_with_the_teachers_own_answer_equals_an_independent_computation(session, entries, responses, unfilled):
    """(1/N) sum over wrong rollouts of the mean over tokens of KL(sg pi_F(. | x, y_P, y_<t) || pi(. | x, y_<t))."""
    settings = {"privileged": "response", "policy_gradient": False, "unfilled": unfilled}
    b_opsd = taught(session, **settings)
    gradient, report = learned(b_opsd, entries, responses)
    total, num_shown, num_plain = torch.tensor(0.0), 0, 0
    for entry in entries:
        prompt = entry.group.prompt
        known = responses.get(prompt.prompt_id)
        if known is None and unfilled == "skip":
            continue
        text = prompt.text if known is None else shown_text(prompt, known[0].text)
        for rollout in entry.group.rollouts:
            if rollout.is_correct:
                continue
            with torch.no_grad():
                teacher_TW = logits_after(b_opsd.teacher, text, rollout.response_ids).log_softmax(-1)
            policy_TW = logits_after(session.policy, prompt.text, rollout.response_ids).log_softmax(-1)
            kl_T = torch.nn.functional.kl_div(policy_TW, teacher_TW, reduction="none", log_target=True).sum(-1)
            total = total + kl_T.mean() / 32
            num_shown, num_plain = num_shown + (known is not None), num_plain + (known is None)
    assert num_shown > 0 and (num_plain > 0) is (unfilled == "plain")
    assert report.num_rows == num_shown + num_plain
    assert report.loss == pytest.approx(total.item(), rel=1e-4)
    expected = gradient_of(session.policy, total)
    assert norm(expected) > 1e-3
    assert distance(gradient, expected) < 1e-4 * norm(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"privileged": "answer"},
        {"privileged": "response", "unfilled": "plain", "top_k": 5},
        {"privileged": "answer", "kind": "token_weight", "teacher": "policy"},
    ],
    ids=str,
)
def test_privileged_gradient_does_not_depend_on_micro_batches_chunks_and_packing(session, entries, responses, changes):
    opened = taught(session, **changes)
    whole, report = learned(opened, entries, responses)
    assert norm(whole) > 1e-3
    for train_changes in (
        {"micro_batch_tokens": 130, "logit_chunk_tokens": 7},
        {"share_prompts": False, "logit_chunk_tokens": 5},
    ):
        split, again = learned(override_settings(opened, "train", **train_changes), entries, responses)
        assert distance(split, whole) < 1e-5 * norm(whole)
        assert again.stats.metrics() == pytest.approx(report.stats.metrics(), abs=1e-5)


def test_a_guides_response_is_shown_for_groups_at_or_below_the_gate_only(session, entries, responses):
    text = PrivilegedText(
        recipe=taught(session, privileged="response").recipe, policy=session.policy, responses=responses
    )
    gated = replace(
        text, recipe=override_settings(taught(session, privileged="response"), "guide.inject", max_accuracy=0.5).recipe
    )
    group = next(entry.group for entry in entries if entry.group.prompt.prompt_id in responses)
    for accuracy, is_shown in ((0.5, True), (0.75, False)):
        counted = replace(group, on_policy_accuracy=accuracy)
        assert (gated.encode(counted) is not None) is is_shown
        assert text.encode(counted) is not None


def test_target_temperature_heats_the_teacher_alone(session, entries):
    """The fork step itself at temperature 2: KL(softmax(z / 2) || softmax(z))."""
    heated = taught(session, teacher="self", temperature=2.0, rollouts="all", policy_gradient=False)
    gradient, report = learned(heated, entries)
    total = torch.tensor(0.0)
    for entry in entries:
        for rollout in entry.group.rollouts:
            logits_TW = logits_after(session.policy, entry.group.prompt.text, rollout.response_ids)
            teacher_TW, policy_TW = (logits_TW.detach() / 2).log_softmax(-1), logits_TW.log_softmax(-1)
            total = total + (teacher_TW.exp() * (teacher_TW - policy_TW)).sum(-1).mean() / 32
    assert report.loss == pytest.approx(total.item(), rel=1e-4)
    assert report.loss > 0.01
    expected = gradient_of(session.policy, total)
    assert distance(gradient, expected) < 1e-4 * norm(expected)


@pytest.mark.parametrize("kind", ["distribution", "token_weight"])
def test_extrapolated_teacher_in_logits_equals_an_independent_computation(session, entries, kind):
    """log pi_2 + a (log pi_2 - log pi_0), normalized: steps 2 and 0, k = 2, a = 1.5."""
    spec = "extrapolated:logits,k=2,a=1.5"
    opened = taught(session, kind=kind, teacher=spec, policy_gradient=kind != "distribution", rollouts="all")
    assert isinstance(opened.teacher, ExtrapolatedPolicy)
    old = open_session_at(session.run.root, 0).policy
    gradient, _ = learned(opened, entries)
    total = torch.tensor(0.0)
    for entry in entries:
        for rollout, advantage in zip(entry.group.rollouts, entry.advantages, strict=True):
            text, ids = entry.group.prompt.text, rollout.response_ids
            policy_TW = logits_after(session.policy, text, ids).log_softmax(-1)
            with torch.no_grad():
                new_TW, old_TW = policy_TW.detach(), logits_after(old, text, ids).log_softmax(-1)
                teacher_TW = (new_TW + 1.5 * (new_TW - old_TW)).log_softmax(-1)
            if kind == "distribution":
                total = total + (teacher_TW.exp() * (teacher_TW - policy_TW)).sum(-1).mean() / 32
                continue
            at_T1 = torch.tensor(ids)[:, None]
            policy_T1, teacher_T1 = policy_TW.gather(1, at_T1), teacher_TW.gather(1, at_T1)
            ratio_T1 = (teacher_T1 - policy_T1.detach()).exp()
            weight_T1 = (ratio_T1 if advantage > 0 else 1 / ratio_T1).clip(0.8, 1.2)
            total = total - (advantage * weight_T1 * policy_T1).mean() / 32
    expected = gradient_of(session.policy, total)
    assert norm(expected) > 1e-4
    assert distance(gradient, expected) < 1e-3 * norm(expected)


@pytest.mark.parametrize("lora", [(), pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_extrapolated_teacher_in_weights_has_their_weights_and_leaves_the_policy_alone(lora, tmp_path):
    train(tmp_path / "run", *lora)
    session = open_session_at(tmp_path / "run", 2)
    before = session.policy.digest
    opened = taught(session, teacher="extrapolated:weights,k=2,a=1")
    old = open_session_at(tmp_path / "run", 0).policy
    prompt = session.task.train[0]
    hidden = [logits_after(each, prompt.text, (1, 2, 3)) for each in (opened.teacher, session.policy, old)]
    assert not torch.allclose(hidden[0], hidden[1], atol=1e-4)
    if not lora:
        for name, tensor in opened.teacher.model.state_dict().items():
            now, then = (each.model.state_dict()[name] for each in (session.policy, old))
            assert torch.allclose(tensor, 2 * now - then, atol=1e-6)
    assert session.policy.digest == before
    assert not any(parameter.requires_grad for parameter in opened.teacher.model.parameters())


# Runs


def test_rlsd_trains_from_the_first_step_of_a_run(tmp_path):
    reports = train(tmp_path / "run", *RLSD)
    assert all(report.metrics["target/rollouts"] == 16 for report in reports)
    read = [report.metrics["target/tokens"] for report in reports]
    assert sum(read) > 0
    plain = train(tmp_path / "plain")
    # The first rollouts are the same; weights change what is learned from them.
    assert (reports[0].metrics["tokens"], reports[0].metrics["reward"]) == (
        plain[0].metrics["tokens"],
        plain[0].metrics["reward"],
    )
    assert reports[-1].metrics["grad_norm"] != plain[-1].metrics["grad_norm"]


def test_b_opsd_shows_the_guides_responses_and_injects_none(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    reports = resume(root, *SHOWN, "guide.inject.max_accuracy=1", at=2, guide="near", new_branch="dense")
    shown, prompts = trajectories(scout), open_session_at(scout, 2).prompts_between(8, 16)
    lines = [json.loads(line) for line in open_run(root).rollouts_path("dense").read_text().splitlines()]
    assert len(lines) == 8 == len(prompts)
    for report in reports:
        groups = [line for line in lines if line["step"] == report.step and line["prompt"]["prompt_id"] in shown]
        wrong = sum(
            not (one["verdict"] == "correct" and one["finished"]) for line in groups for one in line["rollouts"]
        )
        assert report.metrics["target/rollouts"] == wrong
        assert "inject/slots" not in report.metrics
    assert {len(line["rollouts"]) for line in lines} == {4}
    assert all(one["source"] == "own" for line in lines for one in line["rollouts"])


KINDS = {
    "shown a response": ("near", (*SHOWN, "guide.inject.max_accuracy=1", "target.unfilled=plain")),
    "the policy itself": (None, (*RLSD, "target.num_steps=3", "target.schedule=linear")),
    "extrapolated logits": (None, ("target.kind=token_weight", "target.teacher=extrapolated:logits,k=2,a=1")),
    "extrapolated weights": (None, ("target.kind=distribution", "target.teacher=extrapolated:weights,k=2,a=0.5")),
    "heated": (None, ("target.kind=distribution", "target.teacher=self", "target.temperature=1.5")),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "shown a response" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_resume_of_such_a_target_between_checkpoints_is_bitwise_identical(scout, tmp_path, kind):
    guide, settings = KINDS[kind]
    roots = [copy_run(scout, tmp_path / name) for name in ("straight", "dropped")]
    options = {"at": 2, "guide": guide, "new_branch": "dense"}
    resume(roots[0], *settings, "train.num_steps=6", **options)
    stop_after(start_resume(roots[1], *settings, "train.num_steps=6", **options), 5)
    assert [report.step for report in resume(roots[1])] == [5, 6]
    assert reproducible_digests(roots[1], "dense") == reproducible_digests(roots[0], "dense")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["the policy itself", "extrapolated logits", "extrapolated weights", "heated"])
def test_such_a_target_trains_adapters(tmp_path, kind):
    root = tmp_path / "run"
    train(root, *LORA)
    reports = resume(root, *KINDS[kind][1], at=2, new_branch="dense")
    assert all(report.metrics["target/kl"] > 0 for report in reports)


def test_older_copy_of_an_extrapolated_teacher_is_protected(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    resume(root, *KINDS["extrapolated weights"][1], at=2, new_branch="dense")
    run = open_run(root)
    assert find_first_segment(run, "dense").teacher == ("main", 0)
    assert {("main", 0), ("main", 2)} <= find_protected_checkpoints(run)


# Templates


def test_template_is_the_text_or_the_last_message():
    plain = Prompt(prompt_id="p", answer="3", text="1+2=")
    assert fill_template("{prompt} ({privileged}) {prompt}", plain, r"\frac{1}{2}").text == r"1+2= (\frac{1}{2}) 1+2="
    chat = Prompt(
        prompt_id="p",
        answer="3",
        messages=(Message(role="system", content="Add."), Message(role="user", content="1+2?")),
    )
    filled = fill_template("{prompt}\nAnswer: {privileged}", chat, "{prompt}")
    assert filled.messages == (chat.messages[0], Message(role="user", content="1+2?\nAnswer: {prompt}"))
    image = ImageRef(location="a.png", sha256="0", width=1, height=1)
    shown = fill_template("{prompt} {privileged}", replace(plain, text="<image>1+2=", images=(image,)), "3<image>")
    assert shown.text == "<image>1+2= 3"


def test_privileged_column_of_the_data(session):
    text = PrivilegedText(recipe=taught(session, privileged="solution").recipe, policy=session.policy)
    prompt = replace(session.task.train[0], columns={"solution": "12", "empty": None})
    assert text.find_text(prompt) == "12"
    assert replace(text, recipe=taught(session, privileged="empty").recipe).find_text(prompt) == ""
    with pytest.raises(NpoError, match="has no such column"):
        replace(text, recipe=taught(session, privileged="proof").recipe).find_text(prompt)


# Refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["target.kind=token_weight", "target.teacher=policy"],
            "target.teacher=policy teaches the policy what it knows",
        ),
        ([*RLSD, "train.num_updates=2"], "it needs train.num_updates=1"),
        ([*RLSD, "target.template=no"], "target.template has no {prompt}"),
        (
            ["target.kind=distribution", "target.teacher=self", "target.unfilled=plain"],
            "has no effect without target.priv",
        ),
    ],
    ids=str,
)
def test_such_target_settings_are_refused(overrides, message):
    with pytest.raises(NpoError) as caught:
        tiny_recipe(*overrides)
    assert message in caught.value.message


def test_privileged_text_is_refused_before_anything_is_written(scout, tmp_path):
    for overrides, message in (
        ([*RLSD[:2], "target.privileged=response"], "the branch has none"),
        ([*RLSD[:2], "target.privileged=proof"], "has no such column"),
        ([*RLSD, "sampling.max_new_tokens=40"], "the teacher may read"),
    ):
        with pytest.raises(NpoError) as caught:
            list(train_run(tmp_path / "run", tiny_recipe(*overrides)))
        assert message in caught.value.message
        assert not (tmp_path / "run").exists()
    root = copy_run(scout, tmp_path / "copy")
    for guide, overrides, message in (
        (None, SHOWN[1:], "the branch has none"),
        ("near", SHOWN[:1], "the guide would not be used"),
    ):
        with pytest.raises(NpoError) as caught:
            resume(root, *overrides, at=2, guide=guide, new_branch="dense")
        assert message in caught.value.message
    assert [path.name for path in (root / "branches").iterdir() if path.name != "main"] == []
