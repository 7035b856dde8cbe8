"""`npo eval`: held-out accuracy of checkpoints, avg@k and pass@k, with intervals."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy

from npo_cli.errors import NpoError, as_typed
from npo_cli.guide.quality import cluster_interval, pass_at_k
from npo_cli.loading import in_force
from npo_cli.records import EvalReport, Group, Notice, Progress
from npo_cli.run_dir.checkpoints import Checkpoint, find_checkpoint, history
from npo_cli.run_dir.lineage import newest_branch
from npo_cli.run_dir.lock import writing
from npo_cli.run_dir.outcomes import Outcomes, all_outcomes, append_outcomes, prompt_key
from npo_cli.run_dir.paths import RunDir, open_run
from npo_cli.run_dir.scores import append_eval, evals
from npo_cli.seeds import derive_seed
from npo_cli.stages.batches import rollouts_of
from npo_cli.stages.world import World, answer, load_checkpoint, num_tokens, open_policy, open_task, open_world


def evaluate_policy(world: World, *, branch: str, step: int) -> EvalReport:
    """Sample the held-out prompts with the weights at hand; an evaluation already on record is not repeated.

    Seeds do not depend on the step, so checkpoints are compared on common random numbers. One whose outcomes were
    not kept (by an npo that kept none) is made again for their sake.
    """
    count = world.recipe.eval.samples_per_prompt
    asked = (branch, step, count)
    kept = any((one.branch, one.step, one.num_samples) == asked for one in all_outcomes(world.run))
    for report in evals(world.run):
        if kept and (report.branch, report.step, report.num_samples) == asked:
            return report
    slots = range(count)
    groups = answer(world, world.task.heldout, label=("eval",), slots=slots, sampler_step=step)
    report = summary(groups, branch=branch, step=step, seed=world.recipe.train.seed)
    # The sum comes last: a killed process leaves no report whose outcomes are missing.
    append_outcomes(world.run, outcomes(groups, branch=branch, step=step))
    append_eval(world.run, report)
    return report


def outcomes(groups: Sequence[Group], *, branch: str, step: int) -> Outcomes:
    """How often each prompt was solved."""
    return Outcomes(
        branch=branch,
        step=step,
        num_samples=len(groups[0].rollouts),
        prompts=tuple(prompt_key(group.prompt) for group in groups),
        num_correct=tuple(map(num_correct, groups)),
    )


def num_correct(group: Group) -> int:
    """Rollouts of one prompt that were verified correct."""
    return sum(rollout.verdict == "correct" for rollout in group.rollouts)


def summary(groups: Sequence[Group], *, branch: str, step: int, seed: int) -> EvalReport:
    """Accuracy and pass@k over prompts, 95 % intervals by resampling prompts."""
    count = len(groups[0].rollouts)
    correct = [num_correct(group) for group in groups]
    shares = [number / count for number in correct]
    solved = [pass_at_k(count, number, count) for number in correct]
    rng = numpy.random.default_rng(derive_seed(seed, "eval-interval"))
    low, high = cluster_interval(shares, rng, 2000)
    pass_low, pass_high = cluster_interval(solved, rng, 2000)
    rollouts = rollouts_of(groups)
    tokens = num_tokens(groups)
    return EvalReport(
        branch=branch,
        step=step,
        num_prompts=len(groups),
        num_samples=count,
        accuracy=statistics.fmean(shares),
        accuracy_low=low,
        accuracy_high=high,
        pass_at_k=statistics.fmean(solved),
        pass_at_k_low=pass_low,
        pass_at_k_high=pass_high,
        mean_length=tokens / len(rollouts),
        cut_off=statistics.fmean(not rollout.finished for rollout in rollouts),
        num_tokens=tokens,
    )


def evaluate_run(
    root: Path, *, step: int | None, every_step: bool, branch: str | None, overrides: Sequence[str], allow_code: bool
) -> Iterator[Progress | Notice | EvalReport]:
    """Evaluate the newest checkpoint, the one at `step`, or every one on the branch's line of descent."""
    run = open_run(root)
    branch = branch or newest_branch(run)
    recipe = in_force(run.recipe(branch), overrides, path=run.recipe_path(branch), fork=True)
    chosen = (
        _chosen(history(run, branch), run, every_step=every_step)
        if step is None
        else [find_checkpoint(run, branch, step)]
    )
    with writing(run):
        task = open_task(recipe, allow_code=allow_code)
        try:
            with closing(open_world(run, recipe, task=task, policy=open_policy(recipe, task, chosen[0]))) as world:
                for done, checkpoint in enumerate(chosen):
                    yield Progress(what="evaluate", done=done, total=len(chosen), note=f"step {checkpoint.step}")
                    load_checkpoint(world.policy, checkpoint)
                    yield evaluate_policy(world, branch=checkpoint.branch, step=checkpoint.step)
        finally:
            task.close()


def _chosen(found: Sequence[Checkpoint], run: RunDir, *, every_step: bool) -> list[Checkpoint]:
    if not found:
        raise NpoError(f"{run.root} has no complete checkpoint yet", f"train first: npo resume {as_typed(run.root)}")
    ordered = sorted(found, key=lambda checkpoint: checkpoint.step)
    return ordered if every_step else ordered[-1:]
