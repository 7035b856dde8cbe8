"""`npo bench --dry-run`: the runs that are left, with what they train, sample and write."""

from collections.abc import Iterator, Sequence
from contextlib import closing

from npo_cli.config.recipe import Recipe
from npo_cli.experiments.bench import (
    BenchSpec,
    format_method_name,
    is_done,
    keep_permissions,
    make_bench_run,
)
from npo_cli.experiments.bench_plan import CommandSpan, list_spans
from npo_cli.guides.source import parse_spec
from npo_cli.registry import GUIDE_SOURCES
from npo_cli.session.dry_run import plan_samples, plan_steps
from npo_cli.session.session import open_policy, open_task
from npo_cli.training.disk import plan_disk
from npo_cli.types.views import PlannedWork


def plan_bench(question: BenchSpec) -> Iterator[PlannedWork]:
    """Steps, responses and disk space of each method's runs, after the checks of `run_bench`; nothing is written.

    With a grid the setting of the table's runs is known once it is tuned: the first one stands for it. Responses are
    counted as for guides sampled on every prompt ahead; what AutoNPO's interventions may add is not counted.
    """
    with keep_permissions(question, is_dry=True):
        for method in question.methods:
            for setting in question.grid:
                yield from _plan_runs(question, method, setting, question.tuning_seeds, "tuning")
            yield from _plan_runs(question, method, (question.grid or ("",))[0], question.seeds, "runs")


def _plan_runs(
    question: BenchSpec, method: str, setting: str, seeds: Sequence[int], subfolder: str
) -> Iterator[PlannedWork]:
    """The runs of one method with one setting: their training, evaluations and guides."""
    cells = [make_bench_run(question, method, setting, seed=seed, subfolder=subfolder) for seed in seeds]
    num_left = sum(not is_done(cell) for cell in cells)
    name = f"{format_method_name(method)}{f' {setting}' if subfolder == 'tuning' else ''}"
    label = f"{name}: train {num_left} of {len(cells)} runs"
    if not num_left:
        yield PlannedWork(work=label, num_steps=0)
        return
    recipe = cells[0].resolve_recipe()
    trained: list[PlannedWork] = []
    evaluated: list[PlannedWork] = []
    guided: list[PlannedWork] = []
    num_steps = 0
    with closing(open_task(recipe)) as task:
        policy = open_policy(recipe, task, None)
        for span in list_spans(cells[0]):
            if span.command[0] == "sample-guide":
                guided += _plan_guide(span, recipe, len(task.train))
            elif span.last > span.first:
                num_steps += span.last - span.first
                first = span.first + 1
                own = recipe.make_scout(num_steps=span.last) if span.command[0] == "scout" else recipe
                train, *evaluations = plan_steps(own, task, branch="", first=first, last=span.last)
                disk = plan_disk(cells[0].run, own, policy, first_step=first, last_step=span.last)
                trained += [train, *disk]
                evaluated += evaluations
    yield _add_up(trained, label, num_left, num_steps=num_steps * num_left)
    for part, works in (("evaluate", evaluated), ("sample guides", guided)):
        if works:
            yield _add_up(works, f"{name}: {part}", num_left)


def _plan_guide(span: CommandSpan, recipe: Recipe, num_prompts: int) -> Iterator[PlannedWork]:
    """The responses of a guide that is sampled; one that reads recorded responses has none."""
    if GUIDE_SOURCES.get(parse_spec(span.options["--source"]).name).is_fresh:
        yield plan_samples(
            "sample a guide",
            num_prompts=min(num_prompts, (span.last - span.first) * recipe.train.prompts_per_step),
            samples_per_prompt=recipe.guide.cache.samples_per_prompt,
            recipe=recipe,
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
