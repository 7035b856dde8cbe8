"""`npo.score` and `npo.sample_guide`."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npo_cli.api.checks import Overrides, check_figure_path, list_overrides, load_run_recipe
from npo_cli.api.run import Run, resolve_root
from npo_cli.api.stages import RecordStream, collect_records, returns
from npo_cli.guides.source import parse_spec
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Notice, Progress
from npo_cli.types.scores import CandidateScore, GuideChoice

if TYPE_CHECKING:
    import pandas

    from npo_cli.api.rows import Row
    from npo_cli.types.views import PlannedWork


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreResult:
    """Q, V and S of guide candidates for one learner, and the choice."""

    scores: tuple[CandidateScore, ...]
    """One per candidate, then one of "no guide" (`none`)."""
    choice: GuideChoice
    notices: tuple[Notice, ...]

    @property
    def chosen(self) -> str | None:
        """SPEC of the selected guide, for `npo.sample_guide(source=...)`; None: no guide is worth it."""
        return self.choice.chosen

    def table(self, *, as_list: bool = False) -> "pandas.DataFrame | list[Row]":
        """One row per candidate, as `npo.Run.scores` gives them."""
        from npo_cli.api.rows import list_columns, to_row, to_table

        return to_table(map(to_row, self.scores), columns=list_columns(CandidateScore), as_list=as_list)


def _collect_scores(stream: "RecordStream[CandidateScore | GuideChoice | Progress | Notice]") -> ScoreResult:
    records = collect_records(stream)
    return ScoreResult(
        scores=tuple(record for record in records if isinstance(record, CandidateScore)),
        choice=next(record for record in records if isinstance(record, GuideChoice)),
        notices=tuple(record for record in records if isinstance(record, Notice)),
    )


@returns(_collect_scores)
def score(
    run: "Run | str | PathLike[str]",
    *,
    at: int | None = None,
    candidates: Sequence[int | str] | None = None,
    branch: str | None = None,
    overrides: Overrides = (),
    figure: "str | PathLike[str] | None" = None,
    allow_code: bool = False,
) -> RecordStream[CandidateScore | GuideChoice | Progress | Notice]:
    """Rank guide candidates for the learner at step `at` by S = Q_net/V; returns a `ScoreResult`.

    `candidates`: steps of later checkpoints and SPECs of other guide sources (`self`, `model:FOLDER`), None: all later
    checkpoints. `figure`: file of a plot of Q, V and S.
    """
    picture = None if figure is None else Path(figure)
    check_figure_path(picture)
    root, overrides = resolve_root(run), list_overrides(overrides)
    specs = None if candidates is None else [parse_spec(str(candidate)) for candidate in candidates]
    load_run_recipe(root, overrides, branch=branch)
    from npo_cli.guides.candidates import find_candidates
    from npo_cli.storage.layout import open_run

    arguments: dict[str, Any] = {"at": at, "sources": specs, "branch": branch, "overrides": overrides}
    find_candidates(open_run(root), **arguments)

    def work() -> Generator[CandidateScore | GuideChoice | Progress | Notice, None, None]:
        from npo_cli.guides.score import score_run

        yield from score_run(root, **arguments, figure=picture)

    def plan() -> Iterator["PlannedWork | Notice"]:
        from npo_cli.guides.dry_run import plan_scoring

        return plan_scoring(root, **arguments)

    return RecordStream(work(), name="score", root=root, allow_code=allow_code, plan=plan)


def _collect_guide(stream: "RecordStream[GuideCacheInfo | Progress | Notice]") -> GuideCacheInfo:
    return next(record for record in collect_records(stream) if isinstance(record, GuideCacheInfo))


@returns(_collect_guide)
def sample_guide(
    run: "Run | str | PathLike[str]",
    *,
    at: int | None = None,
    source: int | str | None = None,
    name: str | None = None,
    steps: int | None = None,
    branch: str | None = None,
    overrides: Overrides = (),
    allow_code: bool = False,
) -> RecordStream[GuideCacheInfo | Progress | Notice]:
    """Build a guide cache for a replay from step `at`; returns its `GuideCacheInfo`, which `npo.resume` takes.

    `source`: step of a checkpoint or SPEC, None: the choice of the newest scoring of this learner. `name`: of the
    cache. `steps`: length of the replay. The prompts are those that training visits after `at`; verified-correct
    responses are kept.
    """
    spec = None if source is None else parse_spec(str(source))
    root, overrides = resolve_root(run), list_overrides(overrides)
    load_run_recipe(root, overrides, branch=branch)
    from npo_cli.guides.candidates import choose_source
    from npo_cli.storage.layout import open_run

    arguments: dict[str, Any] = {"at": at, "spec": spec, "name": name, "branch": branch, "steps": steps}
    arguments["overrides"] = overrides
    choose_source(open_run(root), **arguments)

    def work() -> Generator[GuideCacheInfo | Progress | Notice, None, None]:
        from npo_cli.guides.build_cache import build_guide_cache

        yield from build_guide_cache(root, **arguments)

    def plan() -> Iterator["PlannedWork | Notice"]:
        from npo_cli.guides.dry_run import plan_guide_cache

        return plan_guide_cache(root, **arguments)

    return RecordStream(work(), name="sample_guide", root=root, allow_code=allow_code, plan=plan)
