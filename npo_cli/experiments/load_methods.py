"""The methods of a comparison, read from run directories: `[NAME=]RUN[:BRANCH]`; the same name again is another
seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_cli.config.loading import recipe_from_dict
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.bench_dir import is_bench, load_bench_index
from npo_cli.storage.cost_sums import best_held_curve, learning_curve
from npo_cli.storage.evals import PromptResults, match_prompt_results
from npo_cli.storage.index import select_best_evals
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import (
    Span,
    ancestry,
    find_main_branch,
    find_newest_branch,
    find_policy_owner,
    list_result_branches,
    refuse_scout,
)
from npo_cli.storage.metrics import read_metrics
from npo_cli.types.comparison import SeedPoint
from npo_cli.types.costs import CurvePoint


@dataclass(frozen=True, kw_only=True, slots=True)
class RunBranch:
    """One branch of a run, with the name of its method."""

    method: str
    run: RunDir
    branch: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """`RUN:BRANCH`, as it is typed."""
        return f"{self.run.root}:{self.branch}"

    @property
    def seed(self) -> int:
        """train.seed."""
        return self.recipe.train.seed


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedRun:
    """One seed of a method, with its evaluations and metrics."""

    run_branch: RunBranch
    points: tuple[SeedPoint, ...]
    """Its evaluations; the fork of a replay has two, the second with all costs of the guide."""
    held: tuple[SeedPoint, ...]
    """Its best-held curve; empty where that is its own."""
    curve: tuple[CurvePoint, ...]
    """The learning curve that they come from."""
    outcomes: dict[int, PromptResults]
    """By step; empty unless every evaluation has its own, all on the same prompts."""
    steps: dict[int, dict[str, Any]]
    """The metrics of every step of its line of descent."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Keys of its held-out prompts; none without results per prompt."""
        return next((one.prompt_keys for one in self.outcomes.values()), ())


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRuns:
    """One method, one run per seed."""

    name: str
    runs: tuple[SeedRun, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds it was trained with."""
        return tuple(one.run_branch.seed for one in self.runs)


def load_methods(texts: Sequence[str], *, baseline: str | None) -> list[MethodRuns]:
    """Every method, the baseline first, then in the given order."""
    branches = [one for text in texts for one in resolve_run_branches(text)]
    by_method: dict[str, list[RunBranch]] = {}
    for one in branches:
        by_method.setdefault(one.method, []).append(one)
    for name, some in by_method.items():
        validate_unique_seeds(name, some)
    first = next(iter(by_method)) if baseline is None else baseline
    if first not in by_method:
        raise NpoError(f"--baseline: there is no method {first!r}", f"the methods are: {', '.join(by_method)}")
    if len(branches) < 2:
        raise NpoError(
            f"there is only one run to compare: {branches[0].name}",
            f"name another run or branch, or look at this one: npo show {quote_path(branches[0].run.root)} costs",
        )
    ordered = [first, *(name for name in by_method if name != first)]
    return [
        MethodRuns(
            name=name, runs=tuple(load_seed_run(place) for place in sorted(by_method[name], key=lambda one: one.seed))
        )
        for name in ordered
    ]


def validate_unique_seeds(name: str, places: Sequence[RunBranch]) -> None:
    """A seed counted twice would make the intervals too narrow."""
    seen: dict[int, RunBranch] = {}
    for place in places:
        if place.seed in seen:
            raise NpoError(
                f"method {name!r} has seed {place.seed} twice: {seen[place.seed].name} and {place.name}",
                "leave one out, or give it a name of its own: NAME=RUN:BRANCH",
            )
        seen[place.seed] = place


def resolve_run_branches(text: str) -> Iterator[RunBranch]:
    """Branches named by one argument: of a run, or the one that every run of a bench ended on."""
    name, path, branch = parse_method_argument(text)
    if not is_bench(path):
        yield from iter_run_branches(path, name=name, branch=branch)
        return
    if name or branch:
        raise NpoError(f"{path} holds the runs of a bench, which have names", f"npo compare {quote_path(path)}")
    for method, root in load_bench_index(path):
        yield from iter_run_branches(root, name=method, branch=find_newest_branch(open_run(root)))


def iter_run_branches(path: Path, *, name: str | None, branch: str | None) -> Iterator[RunBranch]:
    """Of one run: the branch, else all. A method that is named is one branch."""
    run = open_run(path)
    known = list_result_branches(run)
    if branch is not None and branch not in known:
        refuse_scout(run, branch, "is no method: it has no held-out evaluation")
        named = ", ".join(known) or "none yet"
        raise NpoError(f"{path} has no branch {branch!r}: {named}", f"npo show {quote_path(path)} lineage")
    if branch is None and name is not None and len(known) > 1:
        raise NpoError(
            f"{path} has several branches, so {name} is not one method: {', '.join(known)}",
            f"npo compare {name}={quote_path(path)}:{known[-1]}",
        )
    chosen = [branch] if branch else known or [find_main_branch(run)]
    for one in chosen:
        recipe = recipe_from_dict(run.read_recipe(one), source=str(run.recipe_path(one)))
        yield RunBranch(method=name or f"{recipe.name}:{one}", run=run, branch=one, recipe=recipe)


def parse_method_argument(text: str) -> tuple[str | None, Path, str | None]:
    """Name, run and branch. A path that exists is taken literally."""
    given, name = text, None
    if "=" in text and not Path(text).exists():
        name, _, text = text.partition("=")
        if not name.strip() or "/" in name:
            raise NpoError(f"{name!r} cannot name a method", "write NAME=RUN or NAME=RUN:BRANCH")
    branch: str | None = None
    if ":" in text and not Path(text).exists():
        text, _, branch = text.rpartition(":")
    if not text or branch == "":
        raise NpoError(f"a method is [NAME=]RUN[:BRANCH], got {given!r}", "name a run directory: npo=runs/a:late")
    return name, Path(text), branch


def load_seed_run(place: RunBranch) -> SeedRun:
    """Learning curve, results per prompt and metrics of one branch; an error without a held-out evaluation."""
    run, branch = place.run, place.branch
    line = ancestry(run, branch)
    found = learning_curve(run, branch, name=place.method)
    if not found:
        raise NpoError(
            f"{place.name} has no held-out evaluation", f"npo eval {quote_path(run.root)} --all --branch {branch}"
        )
    per_step, timed = place.recipe.train.num_updates, found[-1].total_seconds > 0
    own, held = (
        tuple(
            SeedPoint(
                method=place.method,
                seed=place.seed,
                run=str(run.root),
                branch=branch,
                step=point.step,
                updates=point.total_steps * per_step,
                tokens=point.total_tokens,
                forwards=point.total_forwards,
                teacher_tokens=point.total_teacher_tokens,
                seconds=point.total_seconds if timed else None,
                accuracy=point.accuracy,
                entropy=point.entropy if isinstance(point, CurvePoint) else None,
                curve=kind,
            )
            for point in points
        )
        for kind, points in (("own", found), ("best held", best_held_curve(run, branch, name=place.method)))
    )
    return SeedRun(
        run_branch=place,
        points=own,
        held=held,
        curve=tuple(found),
        outcomes=load_complete_outcomes(run, line, {point.step for point in own}),
        steps={
            row["step"]: row for span in line for row in read_metrics(run, span.branch) if span.contains(row["step"])
        },
    )


def load_complete_outcomes(run: RunDir, line: Sequence[Span], steps: set[int]) -> dict[int, PromptResults]:
    """Results per prompt of every evaluation of the lineage, by step; none where one is missing or has other
    prompts."""
    found = {
        step: one
        for (owner, step), one in match_prompt_results(select_best_evals(run), run).items()
        if find_policy_owner(line, step) == owner
    }
    same = len({one.prompt_keys for one in found.values()}) == 1
    return found if same and set(found) == steps else {}
