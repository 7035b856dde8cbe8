"""What a response of the extrapolated policy does to the gradient: each token's factor by hand, from plain passes.

The reference shares no function with the objective: l = log softmax of a model's logits, row by row; the extrapolated
policy from two such passes; advantages from the rewards of the mixed group; then a factor for every token on A grad l.
The second of two updates is checked, so that old and current weights differ.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from npo_cli.config.recipe import ModelSettings
from npo_cli.guides.online import ExtrapolatedGuide, OnlineExtrapolation
from npo_cli.policy.model import load_policy
from npo_cli.rollout.batch import StepBatch, build_batch
from npo_cli.session.session import Session
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.update import TrainingSample, Updater, build_training_samples
from npo_cli.types.rollouts import Group, Rollout
from tests.helpers.guide_trajectories import override_settings
from tests.helpers.runs import open_session_at, train

SETTINGS = (
    *(
        "guide.source=extrapolated",
        "extrapolation.k=2",
        "extrapolation.a=2.0",
        "task.kind=any",
        "guide.inject.max_accuracy=0.8",
    ),
    *("train.num_steps=4", "train.prompts_per_step=12", "train.group_size=6", "train.grad_clip=1e9"),
)
CLIP, CAP = 0.2, 2.0
"""loss.clip_low = loss.clip_high; and both guide.inject.decoupled_cap and mismatch.cap."""
SHIFTS = (0.5, 1.0)
"""By how much the engine's log-probabilities of own rows are below the trainer's, in nats per token, in turn."""

Pass = Callable[[Tensor], Tensor]
"""Ids in, logits of every position out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRollout:
    """One rollout with its log-probabilities by plain passes, before the updates."""

    group: Group
    rollout: Rollout
    ids: tuple[int, ...]
    """Of prompt and response."""
    old: Tensor
    extrapolated: Tensor
    """Under the extrapolated policy, whichever policy sampled it."""
    advantage: float

    @property
    def is_extrapolated(self) -> bool:
        return self.rollout.source == "extrapolated"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixed:
    """A batch sampled by the policy of step 4 and by its extrapolation away from step 2."""

    session: Session
    batch: StepBatch
    scored_rollouts: list[ScoredRollout]


@pytest.fixture(scope="module", params=["logits-inject", "logits-sample", "weights-sample"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    space, mode = request.param.split("-")
    root = tmp_path_factory.mktemp("extrapolated") / "run"
    slots = ["extrapolation.slots=2"] if mode == "sample" else []
    train(root, *SETTINGS, f"extrapolation.space={space}", f"extrapolation.mode={mode}", *slots)
    session = open_session_at(root, 4)
    sampler = OnlineExtrapolation(session=session, branch="main").open_sampler(4)
    log = RolloutLog(tmp_path_factory.mktemp("rows") / "rollouts.jsonl")
    guide = ExtrapolatedGuide(session=session, sampler=sampler)
    batch = build_batch(session, log, seed_name="t", step=5, position=0, active_guide=None, online_guide=guide)
    older = load_policy(ModelSettings(path=str(find_checkpoint(session.run, "main", 2).path), threads=1)).model
    extrapolated_pass = {"logits": extrapolated_logits, "weights": extrapolated_weights}[space](
        session.policy.model, older
    )
    return Mixed(
        session=session, batch=batch, scored_rollouts=list(score_rollouts(session, batch.mixed, extrapolated_pass))
    )


def extrapolated_logits(new: torch.nn.Module, old: torch.nn.Module) -> Pass:
    """a = 2: pi_t^3 / pi_old^2, which the softmax behind it normalises."""
    return lambda ids_1L: 3 * new(ids_1L).logits.log_softmax(-1) - 2 * old(ids_1L).logits.log_softmax(-1)


def extrapolated_weights(new: torch.nn.Module, old: torch.nn.Module) -> Pass:
    """a = 2: 3 theta_t - 2 theta_old."""
    before = old.state_dict()
    extrapolated = {name: 3 * tensor - 2 * before[name] for name, tensor in new.state_dict().items()}
    return lambda ids_1L: torch.func.functional_call(new, extrapolated, (ids_1L,), tie_weights=False).logits


def logps_of(logits: Pass, ids: tuple[int, ...], response_ids: tuple[int, ...]) -> Tensor:
    """log softmax, token by token of the response."""
    logps_LW = logits(torch.tensor([ids]))[0].log_softmax(-1)[-len(response_ids) - 1 : -1]
    return logps_LW.gather(1, torch.tensor(response_ids)[:, None])[:, 0]


@torch.no_grad()
def score_rollouts(session: Session, groups: Sequence[Group], extrapolated_pass: Pass) -> list[ScoredRollout]:
    model, found = session.policy.model, []
    for group in groups:
        rewards = [float(rollout.verdict == "correct") for rollout in group.rollouts]
        mean, spread = statistics.mean(rewards), statistics.stdev(rewards)
        for rollout, reward in zip(group.rollouts, rewards, strict=True):
            ids = session.policy.encode(group.prompt) + rollout.response_ids
            old, extrapolated = (
                logps_of(each, ids, rollout.response_ids)
                for each in (lambda ids_1L: model(ids_1L).logits, extrapolated_pass)
            )
            advantage = (reward - mean) / (spread + 1e-6)
            fields = {"group": group, "rollout": rollout, "ids": ids, "advantage": advantage}
            found.append(ScoredRollout(**fields, old=old, extrapolated=extrapolated))
    return found


class PerturbingOptimizer:
    """Records each gradient and, after the first one, moves every weight a little, at random."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.param_groups, self.gradients = model, [{"lr": 0.0}], []

    def zero_grad(self, *, set_to_none: bool) -> None:
        self.model.zero_grad(set_to_none=set_to_none)

    @torch.no_grad()
    def step(self) -> None:
        self.gradients.append([parameter.grad.clone() for parameter in self.model.parameters()])
        if len(self.gradients) == 1:
            generator = torch.Generator().manual_seed(0)
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.003)


Factor = Callable[[ScoredRollout, Tensor], Tensor]
"""Of each token of a scored on A grad l, given l under the weights at hand."""


def both_gradients(
    mixed: Mixed, rows: Sequence[TrainingSample], factor: Factor, *, ratio: str, mismatch: str = "off"
) -> tuple[list[Tensor], list[Tensor]]:
    """Of the second of two updates: as the trainer makes it, and by hand."""
    # The update moves the weights, so it has a session of its own.
    session = override_settings(open_session_at(mixed.session.run.root, 4), "train", num_updates=2)
    session = override_settings(override_settings(session, "guide.inject", ratio=ratio), "mismatch", mode=mismatch)
    optimizer: Any = PerturbingOptimizer(session.policy.model)
    Updater(session.policy, optimizer, session.recipe).take_step(rows, lr=1.0)
    half = len(rows) // 2
    loss = torch.zeros(())
    for scored in mixed.scored_rollouts[half:]:
        now = logps_of(lambda ids_1L: session.policy.model(ids_1L).logits, scored.ids, scored.rollout.response_ids)
        # 1/N sum over rows of 1/T sum over tokens
        loss = loss - (factor(scored, now.detach()) * scored.advantage * now).mean() / half
    by_hand = torch.autograd.grad(loss, list(session.policy.model.parameters()))
    return optimizer.gradients[1], list(by_hand)


def clipped(ratio_T: Tensor, advantage: float) -> Tensor:
    """A ratio as a factor: 0 where a correct response is above 1 + CLIP, or a wrong one below 1 - CLIP."""
    cut_T = ratio_T > 1 + CLIP if advantage > 0 else ratio_T < 1 - CLIP
    return ratio_T.masked_fill(cut_T, 0.0)


TOKEN_FACTORS: dict[str, Factor] = {
    # pi_theta / pi_extrapolated
    "exact": lambda scored, now: clipped((now - scored.extrapolated).exp(), scored.advantage),
    # pi_theta / pi_old
    "proximal": lambda scored, now: clipped((now - scored.old).exp(), scored.advantage),
    # min(pi_old / pi_extrapolated, C) pi_theta / pi_old
    "decoupled": lambda scored, now: (
        (scored.old - scored.extrapolated).exp().clamp(max=CAP) * clipped((now - scored.old).exp(), scored.advantage)
    ),
    # pi_theta / 1
    "unit": lambda scored, now: clipped(now.exp(), scored.advantage),
    "none": lambda scored, now: torch.ones_like(now),
}


def importance_factor(ratio: str, own_weight: Callable[[Tensor], Tensor] = torch.ones_like) -> Factor:
    """Own rollouts: pi_theta / pi_old times the mismatch weight; extrapolated ones: by `guide.inject.ratio`."""

    def factor(scored: ScoredRollout, now: Tensor) -> Tensor:
        if scored.is_extrapolated:
            return TOKEN_FACTORS[ratio](scored, now)
        return own_weight(now) * clipped((now - scored.old).exp(), scored.advantage)

    return factor


def rows_of(mixed: Mixed) -> list[TrainingSample]:
    return build_training_samples(mixed.session.policy, mixed.batch.selected, mixed.session.recipe.guide.inject)


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Relative to the second."""
    apart = torch.nn.utils.get_total_norm([a - b for a, b in zip(first, second, strict=True)])
    return (apart / torch.nn.utils.get_total_norm(second)).item()


def extrapolated_with_advantage(mixed: Mixed) -> list[ScoredRollout]:
    """Extrapolated rollouts of the second half with an advantage other than 0."""
    return [
        scored
        for scored in mixed.scored_rollouts[len(mixed.scored_rollouts) // 2 :]
        if scored.is_extrapolated and scored.advantage
    ]


def test_extrapolated_rollouts_have_log_probabilities_of_the_normalised_policy(mixed):
    """Without its normaliser, pi_t^3 / pi_old^2 would be another number."""
    theirs = [scored for scored in mixed.scored_rollouts if scored.is_extrapolated]
    for scored in theirs:
        assert list(scored.rollout.behavior_logps) == pytest.approx(scored.extrapolated.tolist(), abs=1e-3)
    assert max((scored.extrapolated - scored.old).abs().max() for scored in theirs) > 0.1


def test_extrapolated_advantages_are_those_of_the_mixed_group(mixed):
    assert [row.advantage for row in rows_of(mixed)] == pytest.approx(
        [scored.advantage for scored in mixed.scored_rollouts], abs=1e-5
    )
    injected = [group for group in mixed.batch.mixed if group.injection_status == "injected"]
    means = [
        [statistics.mean(one.reward for one in some) for some in (group.rollouts, own(group))] for group in injected
    ]
    assert any(mixed_mean != own_mean for mixed_mean, own_mean in means)


def own(group: Group) -> list[Rollout]:
    return [rollout for rollout in group.rollouts if not rollout.is_off_policy]


@pytest.mark.parametrize("ratio", TOKEN_FACTORS)
def test_extrapolated_gradient_is_that_of_the_ratio_mode(mixed, ratio):
    signs = {scored.advantage > 0 for scored in extrapolated_with_advantage(mixed)}
    # an injected response is correct, a sampled slot may be either
    assert signs == ({True} if mixed.session.recipe.extrapolation.mode == "inject" else {True, False})
    trained, by_hand = both_gradients(mixed, rows_of(mixed), importance_factor(ratio), ratio=ratio)
    assert distance(trained, by_hand) < 1e-5


MISMATCHES: dict[str, Callable[[Tensor], Tensor]] = {
    # w = e^0.5 = 1.65 and e^1 = 2.72 in turn; the cap leaves 2
    "token_tis": lambda log_w: log_w.exp().clamp(max=CAP),
    # 2.72 is in [0.5, 5], the product of four or more tokens (e^3 = 20) is not
    "token_mis": torch.exp,
    "sequence_mis": torch.zeros_like,
}


def shift_own_logprobs(rows: Sequence[TrainingSample]) -> list[TrainingSample]:
    """Own rows with log-probabilities lower by SHIFTS; extrapolated ones as recorded."""
    found = []
    for row in rows:
        shifted = [logp - shift for logp, shift in zip(row.behavior_logps, shifts(row.num_tokens), strict=True)]
        found.append(row if row.is_off_policy else replace(row, behavior_logps=tuple(shifted)))
    return found


def shifts(length: int) -> list[float]:
    return [SHIFTS[place % 2] for place in range(length)]


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_mismatch_weights_own_rows_and_not_extrapolated_ones(mixed, mismatch):
    """An extrapolated row differs by pi_old / pi_extrapolated, which is no mismatch of the engine."""

    def own_weight(now: Tensor) -> Tensor:
        return MISMATCHES[mismatch](torch.tensor(shifts(len(now))))

    rows = shift_own_logprobs(rows_of(mixed))
    trained, by_hand = both_gradients(
        mixed, rows, importance_factor("exact", own_weight), ratio="exact", mismatch=mismatch
    )
    assert distance(trained, by_hand) < 1e-5


def test_extrapolated_rollouts_without_a_slot_are_not_trained(mixed):
    if mixed.session.recipe.extrapolation.mode == "sample":
        assert not any(group.unused_guide_rollouts for group in mixed.batch.mixed)
        return
    correct = [one for group in mixed.batch.mixed for one in group.unused_guide_rollouts if one.verdict == "correct"]
    assert correct
    # one row a slot: 12 groups of 6, and no more
    assert len(rows_of(mixed)) == 72
