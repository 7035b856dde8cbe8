"""PROBE: the present policy answers again what it failed on the way; Q, V and S of every rollback distance.

Answers are written chunk by chunk, so a killed probe goes on where it stopped. Nothing here is random but the
sampling, whose seeds are those of (run seed, branch, step, prompt, slot).
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from npo_cli.auto_records import Confirmation, Mistake
from npo_cli.guide.mistakes import Stratum, strata_of, to_ask
from npo_cli.guide.rollback import Hindsight, Probed, RollbackKnobs, SampleRatio, confirm
from npo_cli.policy.optimizer import peek_state
from npo_cli.records import Group, Progress, Prompt
from npo_cli.run_dir.auto import ProbeFolder, open_probe, probe_tokens
from npo_cli.run_dir.checkpoints import Checkpoint, history
from npo_cli.run_dir.lineage import owner_of
from npo_cli.run_dir.rollouts import RolloutJournal
from npo_cli.run_dir.seconds import add_seconds
from npo_cli.seeds import derive_seed
from npo_cli.stages.authors import forward_logps
from npo_cli.stages.auto_checks import usable_deltas
from npo_cli.stages.batches import own_part
from npo_cli.stages.ratios import JudgedSample, learner_ratios
from npo_cli.stages.saving import ANCHOR
from npo_cli.stages.world import World, answer, load_checkpoint

CHUNK_PROMPTS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One confirmation under way."""

    world: World
    branch: str
    present: Checkpoint
    """The policy that is asked, and would be the guide."""
    folder: ProbeFolder
    mistakes: tuple[Mistake, ...]
    strata: tuple[Stratum, ...]
    seed: int


def open_confirmation(world: World, branch: str, present: Checkpoint) -> Probe:
    """The mistakes saved with the policy's own checkpoint, by age."""
    recipe = world.recipe
    settings = {
        "prompts": recipe.autonpo.probe.num_prompts,
        "k": recipe.autonpo.probe.samples_per_prompt,
        "tau": recipe.autonpo.pool.max_accuracy,
        "deltas": list(usable_deltas(recipe)),
        "temperature": recipe.guide.cache.temperature or recipe.sampling.temperature,
        "max_new_tokens": recipe.sampling.max_new_tokens,
    }
    mistakes = peek_state(present.path / ANCHOR).mistakes
    return Probe(
        world=world,
        branch=branch,
        present=present,
        folder=open_probe(world.run, branch, present.step, settings=settings),
        mistakes=mistakes,
        strata=strata_of(
            mistakes, step=present.step, distances=usable_deltas(recipe), tau=recipe.autonpo.pool.max_accuracy
        ),
        seed=derive_seed(recipe.train.seed, "probe", branch, present.step),
    )


def confirmed(probe: Probe) -> Generator[Progress, None, Confirmation]:
    """Ask, look at every stored distance from both sides, decide."""
    world, count = probe.world, probe.world.recipe.autonpo.probe.num_prompts
    load_checkpoint(world.policy, probe.present)
    groups = yield from asked(probe, to_ask(probe.strata, num_prompts=count, seed=probe.seed))
    # How far each checkpoint of the past is from the policy that answered.
    hindsights = yield from looked_back(probe, groups)
    return confirm(
        probe.strata,
        outcomes_of(groups),
        hindsights,
        knobs=rollback_knobs(probe),
        num_tokens=probe_tokens(probe.folder),
    )


def asked(probe: Probe, chosen: Sequence[Sequence[str]]) -> Generator[Progress, None, list[Group]]:
    """Answers to the prompts of all strata; a chunk on record is read back."""
    world, recipe, journal = probe.world, probe.world.recipe, probe.folder.rollouts
    prompts = [world.task.prompt(prompt_id) for stratum in chosen for prompt_id in stratum]
    groups: list[Group] = []
    for place, start in enumerate(range(0, len(prompts), CHUNK_PROMPTS)):
        yield Progress(what="ask again what failed", done=start, total=len(prompts))
        known = journal.read_step(place)
        if known is None:
            began = time.perf_counter()
            known = answer(
                world,
                prompts[start : start + CHUNK_PROMPTS],
                label=("probe", probe.branch, probe.present.step),
                slots=range(recipe.autonpo.probe.samples_per_prompt),
                sampler_step=probe.present.step,
                temperature=recipe.guide.cache.temperature,
            )
            journal.write_step(place, known)
            tokens = sum(len(rollout.response_ids) for group in known for rollout in group.rollouts)
            add_seconds(probe.folder.folder, time.perf_counter() - began, num_tokens=tokens)
        groups += known
    yield Progress(what="ask again what failed", done=len(prompts), total=len(prompts))
    return groups


def outcomes_of(groups: Sequence[Group]) -> list[Probed]:
    """How the samples of each prompt came out."""
    return [
        Probed(
            prompt_id=group.prompt.prompt_id,
            num_samples=len(group.rollouts),
            num_correct=sum(rollout.verdict == "correct" and rollout.finished for rollout in group.rollouts),
        )
        for group in groups
    ]


def looked_back(probe: Probe, groups: Sequence[Group]) -> Generator[Progress, None, list[Hindsight]]:
    """The two views of every distance that has a full state; the present policy's weights are at hand."""
    world, heat = probe.world, probe.world.recipe.guide.cache.temperature
    pairs = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    began = time.perf_counter()
    logps = forward_logps(world, pairs, temperature=heat)
    step = probe.present.step
    samples = [
        (prompt, JudgedSample.of_rollout(step, rollout, each))
        for (prompt, rollout), each in zip(pairs, logps, strict=True)
    ]
    places = places_back(probe)
    backward = {place.step: on_record(probe, place.step) for place in places}
    hindsights = []
    for done, place in enumerate(places):
        yield Progress(what="look back", done=done, total=len(places), note=f"step {place.step}")
        load_checkpoint(world.policy, place)
        inside = slice_ids(probe, step - place.step)
        seen = [pair for pair in samples if pair[0].prompt_id in inside]
        forward = learner_ratios(world, seen, cap=world.recipe.scoring.weight_cap)
        hindsights.append(Hindsight(distance=step - place.step, forward=forward, backward=backward[place.step]))
    yield Progress(what="look back", done=len(places), total=len(places))
    add_seconds(probe.folder.folder, time.perf_counter() - began, num_tokens=0)
    return hindsights[::-1]


def places_back(probe: Probe) -> list[Checkpoint]:
    """Full states at the usable distances, on the line of descent, oldest first."""
    steps = {probe.present.step - delta for delta in usable_deltas(probe.world.recipe)}
    line = history(probe.world.run, probe.branch)
    return [found for found in line if found.step in steps and found.tier == "anchor"]


def slice_ids(probe: Probe, distance: int) -> frozenset[str]:
    """Prompts that failed within the last `distance` steps."""
    return frozenset(
        prompt_id for stratum in probe.strata if stratum.farthest <= distance for prompt_id in stratum.prompt_ids
    )


def on_record(probe: Probe, step: int) -> list[SampleRatio]:
    """What the policy of `step` itself had answered to prompts of the pool, seen by the present one (section 10.7).

    Its rollouts are those of the next training step, on whichever branch the line of descent made it.
    """
    world = probe.world
    owner = owner_of(world.run, probe.branch, step + 1)
    groups = RolloutJournal(world.run.rollouts_path(owner)).read_step(step + 1) or ()
    failed = {prompt_id for stratum in probe.strata for prompt_id in stratum.prompt_ids}
    rows: list[tuple[Prompt, JudgedSample]] = [
        (group.prompt, JudgedSample.of_rollout(step, rollout, rollout.behavior_logps))
        for group in map(own_part, groups)
        if group.prompt.prompt_id in failed
        for rollout in group.rollouts
    ]
    return learner_ratios(world, rows, cap=world.recipe.scoring.weight_cap)


def rollback_knobs(probe: Probe) -> RollbackKnobs:
    """The recipe's score, probe and auto sections, as the guide room knows them."""
    recipe = probe.world.recipe
    return RollbackKnobs(
        variance=recipe.scoring.variance,
        kappa=recipe.scoring.kl_scale,
        cap=recipe.scoring.weight_cap,
        average=recipe.scoring.kl_average,
        group_size=recipe.train.group_size,
        alpha=recipe.scoring.variance_exponent,
        rule=recipe.scoring.selection_rule,
        direction=recipe.autonpo.probe.variance_samples,
        resamples=recipe.scoring.bootstrap_resamples,
        seed=derive_seed(probe.seed, "bootstrap"),
        q_min=recipe.autonpo.probe.min_quality,
        pool_min=recipe.autonpo.rollback.min_failed_prompts,
    )
