"""EasyVideoR1's mixed-policy step, the NPO authors' nearest public code, beside a step of the track `authors`.

`mixed_policy_step` is written from a description of that code and shares nothing with npo. On one batch both have the
same slots, gate, advantages, loss and gradient. Where they cannot be equal a test below says where, and shows it: the
gate at its threshold, rewards with a format part, re-tokenized text, the correction for the engine's mismatch. What the
description leaves open is taken from npo: a prompt without a guide response keeps all its own, and a text ends with the
end token.
"""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel

from npo_cli.config.loading import load_recipe
from npo_cli.policy.optimizer import build_optimizer
from npo_cli.rollout.batch import add_advantages
from npo_cli.rollout.mixing import make_mix_strategy
from npo_cli.session.session import Session, sample_groups
from npo_cli.training.train import train_run
from npo_cli.training.update import Updater, build_training_samples
from npo_cli.types.rollouts import Group, Rollout
from recipes.teacher import trace
from tests.helpers.runs import TINY, open_session_at

NUM_PROMPTS, N, THRESHOLD = 8, 8, 0.6
CLIP_LOW, CLIP_HIGH, DUAL_CLIP, EPS, GRAD_CLIP = 0.2, 0.28, 3.0, 1e-6, 1.0


# The oracle


@dataclass
class Response:
    ids: list[int]
    accuracy: float
    """The metric that the gate reads."""
    score: float
    """The reward that the advantage reads."""


def is_replaced(own: Sequence[Response], threshold: float | None) -> bool:
    """All n are sampled and rewarded first; no threshold: always."""
    return threshold is None or statistics.fmean(each.accuracy for each in own) < threshold


def group_relative(scores: Sequence[float]) -> list[float]:
    mean, deviation = statistics.fmean(scores), statistics.stdev(scores)
    return [(score - mean) / (deviation + EPS) for score in scores]


def response_logps(model: PreTrainedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response]


def mixed_policy_step(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    groups: Sequence[list[Response]],
    guides: Sequence[Response | None],
) -> tuple[list[list[Response]], list[list[float]], float]:
    """The groups with guides, their advantages and the loss; the model keeps the clipped gradient."""
    mixed = [
        [*own[:-1], guide] if guide is not None and is_replaced(own, THRESHOLD) else own
        for own, guide in zip(groups, guides, strict=True)
    ]
    advantages = [group_relative([each.score for each in group]) for group in mixed]
    terms = []
    for prompt, group, row in zip(prompts, mixed, advantages, strict=True):
        for response, advantage in zip(group, row, strict=True):
            # The learner recomputes every slot's old log-probabilities, the guide's too.
            with torch.no_grad():
                old = response_logps(model, prompt, response.ids)
            ratio = (response_logps(model, prompt, response.ids) - old).exp()
            loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
            if advantage < 0:
                loss = torch.minimum(loss, torch.full_like(loss, -advantage * DUAL_CLIP))
            terms.append(loss)
    loss = torch.cat(terms).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    return mixed, advantages, loss.item()


# One batch for both


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The base model under the method authors/npo-late."""
    sizes = (
        f"train.prompts_per_step={NUM_PROMPTS}",
        f"train.group_size={N}",
        "train.num_steps=1",
        "train.save_every=1",
    )
    root = tmp_path_factory.mktemp("authors") / "run"
    list(train_run(root, load_recipe("micro", [*TINY, *sizes], method="authors/npo-late")))
    return open_session_at(root, 0)


@pytest.fixture(scope="module")
def batch(session: Session) -> list[Group]:
    """Groups of the first prompts; some are solved above the threshold, some below, some never."""
    groups = sample_groups(
        session, session.task.train[:NUM_PROMPTS], seed_label=("parity",), slots=range(N), sampler_step=0
    )
    solved = [group.accuracy for group in groups]
    assert any(accuracy > THRESHOLD for accuracy in solved) and 0 in solved and any(0 < one <= 0.5 for one in solved)
    return groups


def text_guide(session: Session, group: Group) -> Rollout:
    """A correct text as a guide response without log-probabilities."""
    text = trace(group.prompt)
    (found,) = session.task.grade([group.prompt], [text])
    return Rollout(
        **{"prompt_id": group.prompt.prompt_id, "slot": 0, "text": text, "finished": True, "sampler_step": 60},
        **{"source": "guide", "verdict": found.verdict, "reward": found.reward, "behavior_logps": None},
        response_ids=(*session.policy.encode_response(text), session.policy.end_id),
    )


def guides_of(session: Session, groups: Sequence[Group]) -> dict[str, tuple[Rollout, ...]]:
    """For all prompts but the first that failed."""
    first = next(group for group in groups if group.accuracy == 0)
    return {group.prompt.prompt_id: (text_guide(session, group),) for group in groups if group is not first}


def run_npo(session: Session, groups: Sequence[Group], **changes: object) -> tuple[list, float, list[torch.Tensor]]:
    """Mixed groups with advantages, the loss, and the clipped gradient."""
    recipe = session.recipe.model_copy(update=changes)
    strategy = make_mix_strategy(recipe.guide.inject, group_size=N, seed=0)
    entries = add_advantages(session, strategy.mix_groups(groups, guides_of(session, groups)))
    policy = replace(session.policy, model=copy.deepcopy(session.policy.model))
    # Plain gradient descent at rate 1: the weights change by the clipped gradient.
    updater = Updater(policy, torch.optim.SGD(policy.model.parameters()), recipe)
    report = updater.take_step(build_training_samples(policy, entries, recipe.guide.inject), lr=1.0)
    pairs = zip(session.policy.model.parameters(), policy.model.parameters(), strict=True)
    return entries, report.loss, [(before - after).detach() for before, after in pairs]


def run_oracle(session: Session, groups: Sequence[Group]) -> tuple[list, list, float, list[torch.Tensor]]:
    def response(rollout: Rollout | None) -> Response | None:
        return rollout and Response(list(rollout.response_ids), rollout.reward, rollout.reward)

    guides = guides_of(session, groups)
    model = copy.deepcopy(session.policy.model)
    found = mixed_policy_step(
        model,
        [list(session.policy.encode(group.prompt)) for group in groups],
        [[response(rollout) for rollout in group.rollouts] for group in groups],
        [response(next(iter(guides.get(group.prompt.prompt_id, ())), None)) for group in groups],
    )
    return *found, [parameter.grad for parameter in model.parameters()]


def relative_gap(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    difference = sum((one - other).square().sum() for one, other in zip(ours, theirs, strict=True))
    return (difference / sum(each.square().sum() for each in theirs)).sqrt().item()


# Equal


def test_authors_profile_has_the_settings_of_the_mixed_policy_step(session):
    recipe, optimizer = session.recipe, build_optimizer(session.policy.model, session.recipe.train).param_groups[0]
    assert (optimizer["betas"], optimizer["weight_decay"]) == ((0.9, 0.999), 0.01)
    assert (recipe.train.num_updates, recipe.train.grad_clip, recipe.train.schedule) == (1, GRAD_CLIP, "constant")
    assert (recipe.loss.clip_low, recipe.loss.clip_high, recipe.loss.dual_clip) == (CLIP_LOW, CLIP_HIGH, DUAL_CLIP)
    assert (recipe.loss.kl_coef, recipe.loss.entropy_coef, recipe.loss.adv_eps) == (0, 0, EPS)
    assert (recipe.guide.inject.max_accuracy, recipe.guide.inject.slots) == (THRESHOLD, 1)


def test_authors_step_has_the_slots_gate_and_advantages_of_the_mixed_policy_step(session, batch):
    entries, _, _ = run_npo(session, batch)
    mixed, advantages, _, _ = run_oracle(session, batch)
    ids = [[list(rollout.response_ids) for rollout in entry.group.rollouts] for entry in entries]
    assert ids == [[response.ids for response in group] for group in mixed]
    # injected where the group failed, but for the prompt without a guide
    injected = [entry.group.rollouts[-1].is_off_policy for entry in entries]
    failed = [group.accuracy <= THRESHOLD for group in batch]
    assert sum(injected) == sum(failed) - 1 > 2
    assert not any(rollout.is_off_policy for entry in entries for rollout in entry.group.rollouts[:-1])
    for entry, row in zip(entries, advantages, strict=True):
        assert entry.advantages == pytest.approx(row, abs=1e-5)


def test_authors_step_has_the_loss_and_gradient_of_the_mixed_policy_step(session, batch):
    _, loss, gradient = run_npo(session, batch)
    *_, oracle_loss, oracle_gradient = run_oracle(session, batch)
    assert loss == pytest.approx(oracle_loss, abs=1e-6)
    assert relative_gap(gradient, oracle_gradient) < 1e-4


# Not equal


@pytest.mark.parametrize(("n", "differing"), [(8, []), (5, [3])])
def test_gates_differ_only_at_the_threshold_itself(session, batch, n, differing):
    """`<` there, `<=` here (the paper's): never at n = 8 and 0.6, at 3 of 5 correct."""
    strategy = make_mix_strategy(session.recipe.guide.inject, group_size=n, seed=0)
    found = []
    for num_correct in range(n + 1):
        own = [Response([0], float(slot < num_correct), 0.0) for slot in range(n)]
        if is_replaced(own, THRESHOLD) != strategy.is_eligible(num_correct / n):
            found.append(num_correct)
    assert found == differing


def test_gate_is_open_without_a_threshold(session):
    """Their default injects into solved groups too, as `guide.inject.max_accuracy=1` does."""
    always = session.recipe.guide.inject.model_copy(update={"max_accuracy": 1.0})
    assert is_replaced([Response([0], 1.0, 1.0)] * N, None)
    assert make_mix_strategy(always, group_size=N, seed=0).is_eligible(1.0)


def test_advantages_differ_where_the_reward_has_a_format_part(session, batch):
    """0.9 accuracy + 0.1 format there, 0 or 1 here: the same advantages while all responses have the format."""
    group = next(group for group in batch if 0 < group.accuracy < 1)
    (ours,) = add_advantages(session, [group])
    formatted = [0.9 * rollout.reward + 0.1 for rollout in group.rollouts]
    assert ours.advantages == pytest.approx(group_relative(formatted), abs=1e-5)
    failed = next(group for group in batch if group.accuracy == 0)
    (ours,) = add_advantages(session, [failed])
    assert ours.advantages == (0.0,) * N
    # One response without the format: a gradient there, none here.
    assert min(group_relative([0.1] * (N - 1) + [0.0])) < -2


def test_injected_tokens_differ_where_a_text_has_several_tokenizations(session, batch):
    """Their guide is a text that the learner's tokenizer encodes, ours the tokens that the guide sampled."""
    tokenizer = Tokenizer(models.BPE(vocab={"1": 0, "2": 1, "12": 2}, merges=[("1", "2")]))
    sampled = [0, 1]
    assert tokenizer.encode(tokenizer.decode(sampled).replace(" ", "")).ids == [2] != sampled
    guide = replace(text_guide(session, batch[0]), response_ids=tuple(sampled))
    failed = next(group for group in batch if group.accuracy == 0)
    strategy = make_mix_strategy(session.recipe.guide.inject, group_size=N, seed=0)
    (mixed,) = strategy.mix_groups([failed], {failed.prompt.prompt_id: (guide,)})
    assert mixed.rollouts[-1].response_ids == tuple(sampled)


def test_gradients_differ_where_the_engine_disagrees_with_the_trainer(session, batch):
    """They do not read the engine's log-probabilities. Ours weigh own tokens by trainer / engine, unless it is off."""

    def shifted(rollout: Rollout) -> Rollout:
        return replace(rollout, behavior_logps=tuple(logp - 0.1 for logp in rollout.behavior_logps))

    groups = [replace(group, rollouts=tuple(map(shifted, group.rollouts))) for group in batch]
    *_, oracle_gradient = run_oracle(session, batch)
    *_, corrected = run_npo(session, groups)
    off = session.recipe.mismatch.model_copy(update={"mode": "off"})
    *_, uncorrected = run_npo(session, groups, mismatch=off)
    assert relative_gap(corrected, oracle_gradient) > 0.01
    assert relative_gap(uncorrected, oracle_gradient) < 1e-4
