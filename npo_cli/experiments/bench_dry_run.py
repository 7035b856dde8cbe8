"""`npo bench --dry-run`: the runs that are left, with what they train, sample and write."""

from collections.abc import Iterator, Sequence
from contextlib import closing

from npo_cli.config.recipe import Recipe
from npo_cli.experiments.bench import (
    BenchSpec,
    describe_replaced_settings,
    format_method_name,
    is_done,
    keep_permissions,
    make_bench_run,
    uses_autonpo,
)
from npo_cli.experiments.bench_plan import CommandSpan, list_spans
from npo_cli.guides.source import parse_spec
from npo_cli.policy.model import Policy
from npo_cli.registry import GUIDE_SOURCES
from npo_cli.session.dry_run import plan_continuations, plan_samples, plan_steps
from npo_cli.session.session import check_task_prompts, open_policy, open_task
from npo_cli.tasks.task import Task
from npo_cli.training.disk import plan_disk
from npo_cli.types.rollouts import Notice
from npo_cli.types.views import PlannedWork

OTHER_PARTS = ("evaluate", "sample guides", "continue prefixes")
"""Of a method's runs, beside their training."""


def plan_bench(question: BenchSpec) -> Iterator[PlannedWork | Notice]:
    """Steps, responses and disk space of each method's runs, after the checks of `run_bench`; nothing is written.

    With a grid the setting of the table's runs is known once it is tuned: the first one stands for it. Responses are
    counted as for guides sampled on every prompt ahead; what AutoNPO's interventions may add is not counted.
    """
    with keep_permissions(question, is_dry=True):
        yield from describe_replaced_settings(question)
        opened: dict[str, Policy] = {}
        for method in question.methods:
            for setting in question.grid:
                yield from _plan_runs(question, method, setting, question.tuning_seeds, "tuning", opened)
            yield from _plan_runs(question, method, (question.grid or ("",))[0], question.seeds, "runs", opened)


def _plan_runs(
    question: BenchSpec, method: str, setting: str, seeds: Sequence[int], subfolder: str, opened: dict[str, Policy]
) -> Iterator[PlannedWork | Notice]:
    """The runs of one method with one setting: their training, evaluations and guides."""
    cells = [make_bench_run(question, method, setting, seed=seed, subfolder=subfolder) for seed in seeds]
    num_left = sum(not is_done(cell) for cell in cells)
    name = f"{format_method_name(method)}{f' {setting}' if subfolder == 'tuning' else ''}"
    label = f"{name}: train {num_left} of {len(cells)} runs"
    if not num_left:
        yield PlannedWork(work=label, num_steps=0)
        return
    recipe = cells[0].resolve_recipe()
    if uses_autonpo(recipe):
        yield Notice(message=f"{name}: probes, guides and replays of AutoNPO come in addition and are not counted")
    works: dict[str, list[PlannedWork]] = {part: [] for part in ("train", *OTHER_PARTS)}
    guide_ends: dict[str, int] = {}
    num_steps = 0
    with closing(open_task(recipe)) as task:
        policy = _open_policy(recipe, task, opened)
        for span in list_spans(cells[0]):
            if span.command[0] == "sample-guide":
                works["sample guides"] += _plan_guide(span, len(task.train))
                guide_ends[span.options["--name"]] = span.last
            elif span.last > span.first:
                num_steps += span.last - span.first
                place = {"first": span.first + 1, "last": span.last}
                own = span.recipe.make_scout(num_steps=span.last) if span.command[0] == "scout" else span.recipe
                train, *evaluations = plan_steps(own, task, branch="", fork_step=span.fork_step, **place)
                disk = plan_disk(cells[0].run, own, policy, first_step=span.first + 1, last_step=span.last)
                works["train"] += [train, *disk]
                works["evaluate"] += evaluations
                guided = min(span.last, guide_ends.get(span.options.get("--guide", ""), span.first)) - span.first
                if guided > 0 and own.guide.inject.prefix.fraction:
                    works["continue prefixes"].append(plan_continuations("", own, num_steps=guided))
    yield _add_up(works["train"], label, num_left, num_steps=num_steps * num_left)
    for part in OTHER_PARTS:
        if works[part]:
            yield _add_up(works[part], f"{name}: {part}", num_left)


def _open_policy(recipe: Recipe, task: Task, opened: dict[str, Policy]) -> Policy:
    """The model, which methods with the same `model.*` share; every prompt of the task is checked."""
    settings = recipe.model.model_dump_json()
    if settings in opened:
        check_task_prompts(opened[settings], task, recipe)
    else:
        opened.clear()
        opened[settings] = open_policy(recipe, task, None)
    return opened[settings]


def _plan_guide(span: CommandSpan, num_prompts: int) -> Iterator[PlannedWork]:
    """The responses of a guide that is sampled; one that reads recorded responses has none."""
    if GUIDE_SOURCES.get(parse_spec(span.options["--source"]).name).is_fresh:
        yield plan_samples(
            "sample a guide",
            num_prompts=min(num_prompts, (span.last - span.first) * span.recipe.train.prompts_per_step),
            samples_per_prompt=span.recipe.guide.cache.samples_per_prompt,
            recipe=span.recipe,
            mean_length=None,
        )


def _add_up(works: Sequence[PlannedWork], label: str, num_runs: int, *, num_steps: int | None = None) -> PlannedWork:
    """The work of one run as that of `num_runs`."""
    return PlannedWork(
        work=label,
        num_steps=num_steps,
        samples=sum(work.samples or 0 for work in works) * num_runs,
        max_tokens=sum(work.max_tokens or 0 for work in works) * num_runs,
        num_bytes=sum(work.num_bytes or 0 for work in works) * num_runs or None,
    )
