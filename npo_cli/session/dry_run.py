"""What a command would do, for `--dry-run`: the checks of the real one run, its work does not.

A session of a dry run has the trainer's own engine, whatever the recipe's is: starting another one takes minutes and
memory, and its settings were checked before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain, islice
from statistics import fmean
from typing import Any

from npo_cli.config.recipe import Recipe
from npo_cli.policy.model import Policy
from npo_cli.session.session import Session, build_session, open_task_and_policy
from npo_cli.storage.checkpoints import Checkpoint
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import ancestry
from npo_cli.storage.metrics import read_metrics, read_timings
from npo_cli.tasks.task import Task
from npo_cli.types.views import PlannedWork

Row = dict[str, Any]
NUM_RECORDED = 20
"""Newest recorded steps that an estimate is made from."""


@contextmanager
def open_dry_session(run: RunDir, recipe: Recipe, *, checkpoint: Checkpoint | None) -> Iterator[Session]:
    """Task and policy, checked as for the real session."""
    with open_task_and_policy(recipe, checkpoint) as (task, policy), dry_session(run, recipe, task, policy) as session:
        yield session


@contextmanager
def dry_session(run: RunDir, recipe: Recipe, task: Task, policy: Policy) -> Iterator[Session]:
    """The same for an open task and policy."""
    own = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"kind": "transformers"})})
    with closing(build_session(run, own, task=task, policy=policy)) as session:
        yield session


def plan_steps(
    recipe: Recipe,
    task: Task,
    *,
    branch: str,
    first: int,
    last: int,
    fork_step: int = 0,
    recorded: tuple[RunDir, str] | None = None,
) -> Iterator[PlannedWork]:
    """Training from step `first` to `last` with its evaluations, on a branch that was forked at `fork_step`.

    `recorded` is a branch whose steps give estimates.
    """
    steps, train, num_heldout = last - first + 1, recipe.train, len(task.heldout)
    samples = sum(count_step_samples(recipe, step, fork_step=fork_step) for step in range(first, last + 1))
    tokens, seconds = (None, None) if recorded is None or not samples else recorded_step(*recorded)
    yield PlannedWork(
        work=f"train {branch}",
        steps=f"{first}-{last}",
        prompts=min(len(task.train), steps * train.prompts_per_step),
        samples=samples,
        max_tokens=samples * recipe.sampling.max_new_tokens,
        recorded_tokens=None if tokens is None else round(tokens * steps),
        recorded_seconds=None if seconds is None else seconds * steps,
    )
    every = recipe.eval.every
    if every:
        evaluated = {step for step in range(first, last + 1) if step % every == 0} | {last}
        evaluated |= {0} if first == 1 else set()
        count = len(evaluated) * num_heldout * recipe.eval.samples_per_prompt
        yield PlannedWork(
            work=f"evaluations: {len(evaluated)}",
            prompts=num_heldout,
            samples=count,
            max_tokens=count * recipe.sampling.max_new_tokens,
        )


def count_step_samples(recipe: Recipe, step: int, *, fork_step: int) -> int:
    """At most so many responses a step samples, without continuations of prefix slots."""
    train, target, sampling = recipe.train, recipe.target, recipe.sampling
    if train.objective == "sft":
        return 0
    start_step = fork_step if target.start_step is None else target.start_step
    in_window = target.coefficient_at(step, start_step=start_step) is not None
    per_prompt = (target.group_size if in_window else None) or train.group_size
    if recipe.guide.source == "extrapolated" and recipe.extrapolation.mode == "inject":
        per_prompt += recipe.extrapolation.samples_per_group
    return train.prompts_per_step * per_prompt * (sampling.max_gen_batches if sampling.dynamic else 1)


def plan_continuations(work: str, recipe: Recipe, *, num_steps: int, steps: str = "") -> PlannedWork:
    """What the policy samples after the prefixes of a guide that it is given for `num_steps` steps."""
    train, inject = recipe.train, recipe.guide.inject
    samples = num_steps * train.prompts_per_step * inject.slots
    return PlannedWork(work=work, steps=steps, samples=samples, max_tokens=samples * recipe.sampling.max_new_tokens)


def plan_samples(
    work: str, *, num_prompts: int, samples_per_prompt: int, recipe: Recipe, mean_length: float | None, steps: str = ""
) -> PlannedWork:
    """Sampling of some prompts; `mean_length`: tokens of a recorded response."""
    samples = num_prompts * samples_per_prompt
    return PlannedWork(
        work=work,
        steps=steps,
        prompts=num_prompts,
        samples=samples,
        max_tokens=samples * recipe.sampling.max_new_tokens,
        recorded_tokens=None if mean_length is None else round(samples * mean_length),
    )


def recorded_step(run: RunDir, branch: str) -> tuple[float | None, float | None]:
    """Mean tokens and seconds of the newest recorded steps on a branch's line of descent; None without any."""
    return _mean_of(_newest(run, branch, read_metrics), "tokens"), _mean_of(
        _newest(run, branch, read_timings), "seconds"
    )


def recorded_length(run: RunDir, branch: str) -> float | None:
    """Mean length of the policy's newest recorded responses in tokens; None without any."""
    return _mean_of(_newest(run, branch, read_metrics), "completions/mean_length")


def _newest(run: RunDir, branch: str, read: Callable[[RunDir, str], Iterator[Row]]) -> list[Row]:
    """The newest rows of a log on a branch's line of descent, the newest first."""
    names = [span.branch for span in ancestry(run, branch)]
    rows = chain.from_iterable(reversed(list(read(run, name))) for name in reversed(names))
    return list(islice(rows, NUM_RECORDED))


def _mean_of(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return fmean(values) if values else None
