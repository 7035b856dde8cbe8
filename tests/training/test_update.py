"""One batch becomes one update: the gradient, whatever it is split into, and what injected rows do to it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from npo_cli.errors import NpoError
from npo_cli.guides.source import compute_logprobs
from npo_cli.policy.model import Policy
from npo_cli.policy.optimizer import build_optimizer
from npo_cli.policy.packing import TokenRow
from npo_cli.rollout.batch import GroupWithAdvantages, build_batch
from npo_cli.session.logprob_pass import plan_policy_passes, run_logprob_pass
from npo_cli.session.session import Session, sample_groups
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.checkpointing import restore_state
from npo_cli.training.update import TrainingSample, Updater, UpdateReport, build_training_samples
from npo_cli.types.rollouts import TokenSpan
from tests.helpers.guide_trajectories import correct_trajectory, make_active_guide, make_trajectory, override_settings
from tests.helpers.runs import open_session_at

LOSSES = {
    "grpo": {},
    "token mean, clip higher": {"aggregation": "token_mean", "clip_high": 0.28},
    "dr grpo": {"aggregation": "seq_mean_token_sum_norm"},
    "gspo": {"kind": "gspo"},
    "cispo, dual clip": {"kind": "cispo", "dual_clip": 3.0},
}


class Recorder:
    """An optimizer that records gradients and changes nothing."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.param_groups, self.gradients = model, [{"lr": 0.0}], []

    def zero_grad(self, *, set_to_none: bool) -> None:
        self.model.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        self.gradients.append([parameter.grad.clone() for parameter in self.model.parameters()])


@pytest.fixture(scope="module")
def session(scout) -> Session:
    opened = override_settings(open_session_at(scout, 2), "train", grad_clip=1e9)
    return override_settings(opened, "guide.inject", max_accuracy=1.0, ratio="exact")


@pytest.fixture(scope="module")
def rows(session, tmp_path_factory) -> list[TrainingSample]:
    """16 rows; each group holds a guide's answer, which the guide found likelier than the learner does."""
    active_guide = make_active_guide(correct_trajectory(session, prompt, shift=0.05) for prompt in session.task.train)
    rollout_log = RolloutLog(tmp_path_factory.mktemp("rows") / "rollouts.jsonl")
    batch = build_batch(session, rollout_log, seed_name="t", step=3, position=8, active_guide=active_guide)
    found = build_training_samples(session.policy, batch.selected, session.recipe.guide.inject)
    assert sum(row.is_off_policy for row in found) == 4
    return found


def learned(
    session: Session, rows: Sequence[TrainingSample], *, every_row: bool = False, reference: Policy | None = None
) -> tuple[list[Tensor], UpdateReport]:
    """Gradient (of the last update) and report."""
    recorder: Any = Recorder(session.policy.model)
    updater = Updater(session.policy, recorder, session.recipe, reference=reference)
    updater.trains_zero_advantages |= every_row
    report = updater.take_step(rows, lr=1.0)
    return recorder.gradients[-1], report


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def norm(gradient: Sequence[Tensor]) -> float:
    return torch.nn.utils.get_total_norm(gradient).item()


@pytest.mark.parametrize("loss", LOSSES)
def test_update_gradient_does_not_depend_on_micro_batches(session, rows, loss):
    session = override_settings(session, "loss", **LOSSES[loss])
    whole, report = learned(session, rows)
    assert norm(whole) > 0.01
    for micro_batch_tokens, logit_chunk_tokens in ((1, 1), (90, 7), (200, 4096)):
        changes = {"micro_batch_tokens": micro_batch_tokens, "logit_chunk_tokens": logit_chunk_tokens}
        split, again = learned(override_settings(session, "train", **changes), rows)
        assert distance(split, whole) < 1e-6
        assert again.loss == pytest.approx(report.loss, abs=1e-6)
        assert again.grad_norm_fraction == pytest.approx(report.grad_norm_fraction, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_update_gradient_does_not_depend_on_shared_prompts(session, rows, loss):
    session = override_settings(session, "loss", **LOSSES[loss], kl_coef=0.1, entropy_coef=0.01)
    tokens = [row.tokens for row in rows]
    ends = {}
    for share in (True, False):
        changed = override_settings(session, "train", share_prompts=share, num_updates=2)
        plan = plan_policy_passes(changed.policy, changed.recipe.train, tokens)
        assert (max(size for batch in plan for size in batch.pack_sizes) > 1) is share
        ends[share] = learned(changed, rows, reference=changed.policy)
    (plain, report), (shared, again) = ends[False], ends[True]
    assert norm(plain) > 0.01
    assert distance(shared, plain) < 1e-5 * norm(plain)
    assert again.loss == pytest.approx(report.loss, abs=1e-6)
    assert again.stats.metrics() == pytest.approx(report.stats.metrics(), abs=1e-5)


def test_update_skips_rows_without_advantage(session, rows):
    silent = [replace(row, advantage=0.0 if place % 3 else 1.0) for place, row in enumerate(rows)]
    skipped, report = learned(session, silent)
    included, everything = learned(session, silent, every_row=True)
    assert distance(skipped, included) < 1e-6
    assert (report.num_rows, everything.num_rows) == (6, 16)


def test_update_divides_by_the_full_batch(session, rows):
    silent = [replace(row, advantage=0.0) for row in rows[1:]]
    alone, _ = learned(session, rows[:1])
    among, _ = learned(session, [rows[0], *silent])
    # one of 16 rows: its mean over tokens weighs 1/16
    assert distance([16 * part for part in among], alone) < 1e-6


def test_update_without_advantages_still_decays_moments(session, rows, scout):
    fresh = open_session_at(scout, 2)
    optimizer = build_optimizer(fresh.policy.model, fresh.recipe.train)
    updater = Updater(fresh.policy, optimizer, fresh.recipe)
    report = updater.take_step([replace(row, advantage=0.0) for row in rows], lr=1e-3)
    assert (report.grad_norm, report.num_rows, report.num_skipped) == (0.0, 0, 0)
    assert {state["step"].item() for state in optimizer.state.values()} == {1.0}
    assert updater.take_step([], lr=1e-3).num_rows == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_update_is_skipped_if_the_gradient_is_not_finite(rows, scout, bad):
    session = open_session_at(scout, 2)
    optimizer = build_optimizer(session.policy.model, session.recipe.train)
    updater = Updater(session.policy, optimizer, session.recipe)
    updater.take_step(rows, lr=1e-3)
    weights = [parameter.clone() for parameter in session.policy.model.parameters()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    report = updater.take_step([*rows[1:], replace(rows[0], advantage=bad)], lr=1e-3)
    assert report.num_skipped == 1
    assert distance(list(session.policy.model.parameters()), weights) == 0
    assert distance([state["exp_avg"] for state in optimizer.state.values()], moments) == 0


def test_update_twice_per_step_uses_old_logprobs(scout, rows):
    session = override_settings(open_session_at(scout, 2), "train", num_updates=2)
    optimizer = build_optimizer(session.policy.model, session.recipe.train)
    report = Updater(session.policy, optimizer, session.recipe).take_step(rows, lr=1e-2)
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}
    # After a first update this large, some ratios of the second half leave the clip range.
    assert report.stats.clipped_low + report.stats.clipped_high > 0


def test_update_computes_old_logprobs_only_of_trained_rows_after_the_first_part(scout, rows, monkeypatch):
    passes: list[Sequence[TokenRow]] = []

    def record(policy, recipe, tokens):
        passes.append(tokens)
        return run_logprob_pass(policy, recipe, tokens)

    monkeypatch.setattr("npo_cli.training.update.run_logprob_pass", record)
    session = override_settings(open_session_at(scout, 2), "train", num_updates=2)
    some = [replace(row, advantage=0.0 if place % 3 else 1.0) for place, row in enumerate(rows)]
    learned(session, some)
    # of the second half, rows 8 to 15: those with an advantage
    assert passes == [[rows[9].tokens, rows[12].tokens, rows[15].tokens]]
    learned(override_settings(session, "loss", entropy_coef=0.1), some)
    assert passes[1] == [row.tokens for row in rows[8:]]
    learned(override_settings(session, "train", num_updates=1), some)
    assert len(passes) == 2


def test_update_grad_norm_fraction_of_off_policy_rows(session, rows):
    _, report = learned(session, rows)
    off_policy, _ = learned(session, [row if row.is_off_policy else replace(row, advantage=0.0) for row in rows])
    own, _ = learned(session, [replace(row, advantage=0.0) if row.is_off_policy else row for row in rows])
    assert report.grad_norm_fraction == pytest.approx(norm(off_policy) / (norm(off_policy) + norm(own)), abs=1e-5)
    assert 0 < report.grad_norm_fraction < 1


def count_passes(session: Session, patched: pytest.MonkeyPatch, rows: Sequence[TrainingSample], **names: Any):
    """Gradient, report and number of forward passes of one step."""
    passes, score = [], Policy.score
    with patched.context() as patch:
        patch.setattr(Policy, "score", lambda self, *args, **kw: passes.append(1) or score(self, *args, **kw))
        recorder: Any = Recorder(session.policy.model)
        report = Updater(session.policy, recorder, session.recipe).take_step(rows, lr=1.0, **names)
    return recorder.gradients[-1], report, len(passes)


def test_update_without_the_guides_fraction_has_the_same_gradient_in_fewer_passes(session, rows, monkeypatch):
    apart, measured, num_apart = count_passes(session, monkeypatch, rows)
    together, report, num_together = count_passes(session, monkeypatch, rows, measures_guide=False)
    assert (num_apart, num_together) == (2, 1)
    assert report.grad_norm_fraction is None
    assert distance(apart, together) < 1e-6
    assert report.loss == pytest.approx(measured.loss, abs=1e-6)
    assert report.stats.metrics() == pytest.approx(measured.stats.metrics(), rel=1e-5, abs=1e-6)


def test_update_takes_the_engines_logprobs_for_the_old_policys(session, rows, monkeypatch):
    own = [row for row in rows if not row.is_off_policy and row.advantage]
    tokens = [row.tokens for row in own]
    for row, scores in zip(own, run_logprob_pass(session.policy, session.recipe, tokens), strict=True):
        assert row.behavior_logps == pytest.approx(scores.logps_T.tolist(), abs=1e-5)
    session = override_settings(session, "train", num_updates=2)
    computed, _, num_computed = count_passes(session, monkeypatch, own)
    reused, _, num_reused = count_passes(override_settings(session, "engine", reuse_logprobs=True), monkeypatch, own)
    assert num_reused < num_computed
    assert distance(computed, reused) < 1e-5


# Ratio modes, on rows whose guide found its tokens e times less likely than the learner does


@pytest.fixture(scope="module")
def far(session, rows) -> list[TrainingSample]:
    behind = [tuple(logp - 1.0 for logp in row.behavior_logps) for row in rows]
    return [
        replace(row, behavior_logps=logps) if row.is_off_policy else row
        for row, logps in zip(rows, behind, strict=True)
    ]


def in_mode(
    session: Session, rows: Sequence[TrainingSample], mode: str
) -> tuple[list[Tensor], dict[str, float], float | None]:
    gradient, report = learned(override_settings(session, "guide.inject", ratio=mode), rows)
    return gradient, report.stats.metrics(), report.grad_norm_fraction


def test_importance_ratio_exact_clips_a_distant_guide(session, rows, far):
    near, far_off = (in_mode(session, some, "exact") for some in (rows, far))
    assert near[1]["inject/tokens_with_gradient"] > 0.9
    # rho = e^(1 - 0.05) = 2.6, above the clip at 1.2 on every token
    assert far_off[1]["inject/ratio_min"] == pytest.approx(2.586, abs=0.01)
    assert (far_off[1]["inject/tokens_with_gradient"], far_off[2]) == (0.0, 0.0)
    for mode in ("proximal", "decoupled", "none"):
        _, metrics, share = in_mode(session, far, mode)
        assert metrics["inject/tokens_with_gradient"] == 1
        assert share > 0


def test_importance_ratios_proximal_and_none_ignore_the_guide(session, rows, far):
    proximal, _, _ = in_mode(session, rows, "proximal")
    for mode in ("proximal", "none"):
        assert distance(in_mode(session, far, mode)[0], proximal) < 1e-7


def test_importance_ratios_decoupled_and_exact_weigh_by_the_guide(session, rows):
    plain, _, share = in_mode(session, rows, "proximal")
    own = [replace(row, advantage=0.0) if row.is_off_policy else row for row in rows]
    own_part, _, _ = in_mode(session, own, "proximal")
    off_policy_part = [a - b for a, b in zip(plain, own_part, strict=True)]
    assert share > 0
    for mode in ("decoupled", "exact"):
        gradient, _, _ = in_mode(session, rows, mode)
        # old/guide = e^-0.05 on every token, in both modes
        expected = [a + 0.951229 * b for a, b in zip(own_part, off_policy_part, strict=True)]
        assert distance(gradient, expected) < 1e-6


@pytest.mark.parametrize("mode", ["proximal", "none", "exact", "decoupled"])
def test_importance_ratio_1_is_plain_grpo(scout, tmp_path, mode):
    """The guide repeats the very rollouts that it replaces: the same weights come out of the whole step."""
    ends = {}
    for kind in ("plain", "mixed"):
        session = override_settings(
            override_settings(open_session_at(scout, 2), "guide.inject", ratio=mode, max_accuracy=1.0), "train", lr=1e-3
        )
        rollout_log = RolloutLog(tmp_path / f"{kind}.jsonl")
        plain = RolloutLog(tmp_path / "own.jsonl")
        own = build_batch(session, plain, seed_name="t", step=3, position=4, active_guide=None)
        last = [(group.prompt, group.rollouts[-1]) for group in own.on_policy if group.rollouts[-1].reward]
        assert last, "no group ends with a right answer, so this shows nothing"
        guides = [make_trajectory(session, prompt, rollout.response_ids, rollout.text) for prompt, rollout in last]
        active_guide = make_active_guide(guides) if kind == "mixed" else None
        batch = build_batch(session, rollout_log, seed_name="t", step=3, position=4, active_guide=active_guide)
        rows = build_training_samples(session.policy, batch.selected, session.recipe.guide.inject)
        assert sum(row.is_off_policy for row in rows) == (len(last) if active_guide else 0)
        optimizer = build_optimizer(session.policy.model, session.recipe.train)
        restore_state(session, optimizer, find_checkpoint(session.run, "main", 2))
        Updater(session.policy, optimizer, session.recipe).take_step(rows, lr=session.recipe.train.lr)
        ends[kind] = [parameter.detach().clone() for parameter in session.policy.model.parameters()]
    # Without a gate the slot given away is not sampled, and the others' last bits depend on their company.
    assert distance(ends["plain"], ends["mixed"]) < 5e-7
    start = list(open_session_at(scout, 2).policy.model.parameters())
    assert distance(ends["plain"], start) > 1e-5


# Engine mismatch, on rows that the engine found likelier than the trainer does


def seen_by(rows: Sequence[TrainingSample], *, own: float, guide_in_all: float) -> list[TrainingSample]:
    """Behavior log-probabilities shifted: on-policy by `own` nats per token, of a guide by `guide_in_all` in all."""
    shifts = [guide_in_all / len(row.behavior_logps) if row.is_off_policy else own for row in rows]
    moved = [tuple(logp + shift for logp in row.behavior_logps) for row, shift in zip(rows, shifts, strict=True)]
    return [replace(row, behavior_logps=logps) for row, logps in zip(rows, moved, strict=True)]


OWN_FACTORS = {
    # w = e^-3 a token; e^-20 an answer (of 7 tokens or more), 0 to the eye; masks and filters leave nothing
    **{"token_tis": 0.049787, "sequence_tis": 0.0, "off": 1.0},
    **{"token_mis": 0.0, "sequence_mis": 0.0, "geometric": 0.0, "k3": 0.0},
}


@pytest.mark.parametrize("ratio", ["exact", "proximal"])
@pytest.mark.parametrize("mode", OWN_FACTORS)
def test_mismatch_correction_leaves_a_distant_guide_alone(session, rows, mode, ratio):
    session = override_settings(override_settings(session, "guide.inject", ratio=ratio), "mismatch", mode="off")
    far = seen_by(rows, own=3.0, guide_in_all=20.0)
    whole, report = learned(override_settings(session, "mismatch", mode=mode), far)
    guide_part, _ = learned(session, [row if row.is_off_policy else replace(row, advantage=0.0) for row in far])
    own_part, _ = learned(session, [replace(row, advantage=0.0) if row.is_off_policy else row for row in far])
    assert min(norm(guide_part), norm(own_part)) > 0.01
    expected = [a + OWN_FACTORS[mode] * b for a, b in zip(guide_part, own_part, strict=True)]
    assert distance(whole, expected) < 1e-6
    metrics = report.stats.metrics()
    assert metrics["inject/tokens_with_gradient"] == 1
    assert metrics["mismatch/kept_fraction"] == float(mode in ("token_tis", "sequence_tis", "off"))
    if OWN_FACTORS[mode] == 0.0:
        assert report.grad_norm_fraction == pytest.approx(1.0, abs=1e-4)


def test_mismatch_of_the_transformers_engine_is_zero(session, rows):
    plain, report = learned(override_settings(session, "mismatch", mode="off"), rows)
    for mode in OWN_FACTORS:
        assert distance(learned(override_settings(session, "mismatch", mode=mode), rows)[0], plain) < 1e-6
    # log-probabilities of two float32 forward passes, a few units of rounding apart
    metrics = report.stats.metrics()
    assert metrics["mismatch/abs_log_w_p99"] < 1e-5
    assert (metrics["mismatch/weight_max"], metrics["mismatch/ess"]) == pytest.approx((1.0, 1.0), abs=1e-5)
    assert (metrics["mismatch/clipped_fraction"], metrics["mismatch/kept_fraction"]) == (0.0, 1.0)


def test_mismatch_metrics_cover_trained_rows(session, rows):
    noisy = seen_by(
        [replace(row, advantage=0.0) if place % 3 else row for place, row in enumerate(rows)], own=0.3, guide_in_all=5
    )
    _, report = learned(session, noisy)
    trained = [row for row in noisy if row.advantage and not row.is_off_policy]
    assert 0 < len(trained) < sum(not row.is_off_policy for row in noisy)
    assert report.stats.mismatch.sequences == len(trained)
    assert report.stats.mismatch.tokens == sum(len(row.behavior_logps) for row in trained)
    metrics = report.stats.metrics()
    # log w = -0.3 on every token, in the bin from 10^-0.55 = 0.28 to 10^-0.5 = 0.32
    assert metrics["mismatch/k1"] == pytest.approx(0.3, abs=1e-5)
    assert metrics["mismatch/abs_log_w_p99"] == pytest.approx(10**-0.5)
    _, again = learned(override_settings(session, "train", micro_batch_tokens=90), noisy)
    assert again.stats.metrics() == pytest.approx(metrics, abs=1e-5)


def test_mismatch_uses_old_logprobs_in_several_updates(scout, rows):
    session = override_settings(open_session_at(scout, 2), "train", num_updates=2)
    optimizer = build_optimizer(session.policy.model, session.recipe.train)
    report = Updater(session.policy, optimizer, session.recipe).take_step(rows, lr=1e-2)
    # The second half was learned after an update that moved ratios out of the clip; its engine saw none of it.
    assert report.stats.clipped_low + report.stats.clipped_high > 0
    assert report.stats.metrics()["mismatch/weight_max"] == pytest.approx(1.0, abs=1e-5)


# Provenance per token: a guide's prefix and the policy's own continuation in one response


def plain_logps(session: Session, sample: TrainingSample) -> Tensor:
    """log softmax of the model's own logits at the response tokens, with gradient."""
    prompt_ids, response_ids = sample.tokens.prompt_ids, sample.tokens.response_ids
    logits_LW = session.policy.model(input_ids=tensor([[*prompt_ids, *response_ids]])).logits[0]
    logps_TW = torch.log_softmax(logits_LW[len(prompt_ids) - 1 : -1].float(), dim=-1)
    return logps_TW[range(len(response_ids)), list(response_ids)]


def prefix_group(session: Session, *, has_logprobs: bool) -> GroupWithAdvantages:
    """Two rollouts, the first with a prefix of two guide tokens and a last token that is not trained; A = 2 and 0."""
    prompt = session.task.train[0]
    (group,) = sample_groups(session, [prompt], seed_label=("prefix",), slots=range(2), sampler_step=2)
    first, second = group.rollouts
    length = first.num_tokens
    assert length > 4
    spans = (
        TokenSpan(start=0, end=2, source="guide", sampler_step=99, has_logprobs=has_logprobs),
        TokenSpan(start=2, end=length - 1, sampler_step=2),
        TokenSpan(start=length - 1, end=length, sampler_step=2, is_trained=False),
    )
    (logps_T,) = compute_logprobs(session, [(prompt, first)])
    # the guide finds its tokens 0.1 and 0.5 nats less likely than the policy, the engine the policy's 0.2 more likely
    shifts = (-0.1, -0.5, *[0.2] * (length - 2))
    logps = tuple(logp + shift for logp, shift in zip(logps_T, shifts, strict=True))
    mixed = replace(first, spans=spans, source="guide", behavior_logps=logps)
    return GroupWithAdvantages(group=replace(group, rollouts=(mixed, second)), advantages=(2.0, 0.0))


@pytest.mark.parametrize(
    ("ratio", "has_logprobs", "prefix_factors"),
    [
        # rho = e^0.1, and e^0.5 = 1.65 above the clip at 1.2
        ("exact", True, lambda logps_T: (math.exp(0.1), 0.0)),
        # old / guide, after a clip that rho = 1 passes
        ("decoupled", True, lambda logps_T: (math.exp(0.1), math.exp(0.5))),
        ("proximal", False, lambda logps_T: (1.0, 1.0)),
        ("none", False, lambda logps_T: (1.0, 1.0)),
        # rho = pi
        ("unit", False, lambda logps_T: tuple(logps_T[:2].exp().tolist())),
    ],
)
def test_provenance_of_a_guide_prefix_and_own_continuation_decides_each_token(
    session, ratio, has_logprobs, prefix_factors
):
    session = override_settings(session, "guide.inject", ratio=ratio)
    entry = prefix_group(session, has_logprobs=has_logprobs)
    samples = build_training_samples(session.policy, [entry], session.recipe.guide.inject)
    gradient, report = learned(session, samples)
    logps_T = plain_logps(session, samples[0])
    num_own = len(logps_T) - 3
    # on-policy tokens: rho = 1 times the mismatch weight trainer / engine = e^-0.2; the last token is not trained
    factors_T = tensor([*prefix_factors(logps_T.detach()), *[math.exp(-0.2)] * num_own, 0.0])
    # -A / (N T) with N = 2 rows and T trained tokens
    loss = -2.0 * (factors_T * logps_T).sum() / (2 * (len(logps_T) - 1))
    expected = torch.autograd.grad(loss, list(session.policy.model.parameters()))
    assert norm(expected) > 0.01
    assert distance(gradient, expected) < 1e-6
    metrics = report.stats.metrics()
    assert (report.stats.on_policy_tokens, report.stats.off_policy_tokens) == (num_own + samples[1].num_tokens, 2.0)
    assert metrics["mismatch/weight_mean"] == pytest.approx(math.exp(-0.2), abs=1e-5)
    assert ("inject/ratio_mean" in metrics) == has_logprobs
    if has_logprobs:
        assert metrics["inject/ratio_max"] == pytest.approx(math.exp(0.5), abs=1e-4)


def test_provenance_without_logprobs_refuses_a_ratio_that_needs_them(session):
    entry = prefix_group(session, has_logprobs=False)
    with pytest.raises(NpoError, match=r"has no log-probabilities: guide\.inject\.ratio=exact is not available"):
        build_training_samples(session.policy, [entry], session.recipe.guide.inject)


def test_provenance_of_untrained_tokens_needs_no_logprobs(session):
    entry = prefix_group(session, has_logprobs=False)
    rollout, other = entry.group.rollouts
    spans = (replace(rollout.spans[0], is_trained=False), *rollout.spans[1:])
    group = replace(entry.group, rollouts=(replace(rollout, spans=spans), other))
    samples = build_training_samples(session.policy, [replace(entry, group=group)], session.recipe.guide.inject)
    gradient, report = learned(session, samples)
    assert all(part.isfinite().all() for part in gradient)
    assert report.stats.off_policy_tokens == 0
