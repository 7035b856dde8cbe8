"""`npo.train`, `npo.resume` and `npo.evaluate`."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from npo_cli.api.callbacks import Callback
from npo_cli.api.checks import Overrides, list_overrides, load_run_recipe, resolve_last_step
from npo_cli.api.run import Run, resolve_root
from npo_cli.api.stages import RecordStream, collect_records, returns
from npo_cli.errors import NpoError, quote_path
from npo_cli.session.stop_signal import StopFlag
from npo_cli.types.autonpo import Transition
from npo_cli.types.costs import RunCosts
from npo_cli.types.guides import GuideCacheInfo, ReplayRequest, ScoutRequest
from npo_cli.types.rollouts import CheckpointSaved, EvalReport, Notice, Progress, StepReport, TrainingRecord

if TYPE_CHECKING:
    from npo_cli.config.loading import Purpose
    from npo_cli.config.recipe import Recipe
    from npo_cli.types.guides import SourceSpec
    from npo_cli.types.views import PlannedWork

T = TypeVar("T")
StreamRecord = TrainingRecord | Progress | Transition | RunCosts
"""What training yields; transitions and costs only under AutoNPO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """What a training did; everything is also on disk (`result.run`)."""

    run: Run
    branch: str
    """Branch that was trained last; AutoNPO may have made new ones."""
    step: int
    """Its last step, which is saved."""
    stopped_by: str | None = None
    """The callback that stopped it; None: it ran to its last step."""
    records: tuple[StreamRecord, ...] = field(repr=False)
    """Everything that was reported, in order, without progress."""

    @property
    def steps(self) -> tuple[StepReport, ...]:
        """The training steps."""
        return self._select(StepReport)

    @property
    def evals(self) -> tuple[EvalReport, ...]:
        """The held-out evaluations."""
        return self._select(EvalReport)

    @property
    def checkpoints(self) -> tuple[CheckpointSaved, ...]:
        """The checkpoints that were saved; some may have been removed since (`train.keep_full_checkpoints`)."""
        return self._select(CheckpointSaved)

    @property
    def transitions(self) -> tuple[Transition, ...]:
        """AutoNPO's decisions."""
        return self._select(Transition)

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What was restored, saved or looks odd; warnings have `level="warning"`."""
        return self._select(Notice)

    def _select(self, kind: type[T]) -> tuple[T, ...]:
        return tuple(record for record in self.records if isinstance(record, kind))

    @property
    def accuracy(self) -> float | None:
        """Held-out accuracy of the newest evaluation; None without one (`eval.every`)."""
        return self.evals[-1].accuracy if self.evals else None


def _collect_training(stream: RecordStream[StreamRecord]) -> TrainingResult:
    records = collect_records(stream)
    last = next(record for record in reversed(records) if isinstance(record, StepReport | CheckpointSaved | RunCosts))
    return TrainingResult(
        run=Run(stream.root), branch=last.branch, step=last.step, stopped_by=stream.stopped_by, records=records
    )


def _resolve_recipe(recipe: "Recipe | str | PathLike[str]", method: str | None) -> "Recipe":
    from npo_cli.config.loading import apply_method, load_recipe
    from npo_cli.config.recipe import Recipe

    if not isinstance(recipe, Recipe):
        return load_recipe(str(recipe), method=method)
    return recipe if method is None else apply_method(recipe, method)


@returns(_collect_training)
def train(
    recipe: "Recipe | str | PathLike[str]",
    run: str | PathLike[str],
    *,
    method: str | None = None,
    until: int | None = None,
    autonpo: bool = False,
    callbacks: Sequence[Callback] = (),
    allow_code: bool = False,
) -> RecordStream[StreamRecord]:
    """Train a recipe into a new run directory; returns a `TrainingResult`.

    `recipe`: a `Recipe`, or the name or path of one. `method`: a method's name, applied on top. `until`: stop after
    this step, saved. `autonpo`: AutoNPO decides when to roll back. `allow_code`: run the recipe's custom verifier.
    A signal, such as the interrupt of a notebook, ends the step, saves it and raises `StoppedEarly`.
    """
    resolved, root, stop = _resolve_recipe(recipe, method), resolve_root(run), StopFlag()
    last = resolve_last_step(until, resolved, after=-1, autonpo=autonpo)

    def work() -> Generator[StreamRecord, None, None]:  # its imports take seconds
        records: Iterator[StreamRecord]
        if autonpo:
            from npo_cli.autonpo.run import train_autonpo

            records = train_autonpo(root, resolved, stop=stop)
        else:
            from npo_cli.training.train import train_run

            records = train_run(root, resolved, until=until, stop=stop)
        yield from _track(root, resolved, records)

    def plan() -> Iterator["PlannedWork | Notice"]:
        if autonpo:
            from npo_cli.autonpo.dry_training import plan_autonpo_training

            return plan_autonpo_training(root, resolved)
        from npo_cli.training.dry_run import plan_training

        return plan_training(root, resolved, until=until)

    return RecordStream(
        work(),
        name="train",
        root=root,
        callbacks=callbacks,
        stop=stop,
        last_step=last,
        allow_code=allow_code,
        plan=plan,
    )


def _track(root: Path, recipe: "Recipe", records: Iterator[Any]) -> Iterator[Any]:
    from npo_cli.training.tracking import track_records

    return track_records(root, recipe, records)


@returns(_collect_training)
def resume(
    run: "Run | str | PathLike[str]",
    *,
    at: int | None = None,
    guide: "str | GuideCacheInfo | None" = None,
    no_guide: bool = False,
    branch: str | None = None,
    new_branch: str | None = None,
    steps: int | None = None,
    until: int | None = None,
    autonpo: bool = False,
    fresh_optimizer: bool = False,
    merge: str | None = None,
    overrides: Overrides = (),
    callbacks: Sequence[Callback] = (),
    allow_code: bool = False,
) -> RecordStream[StreamRecord]:
    """Resume a run, or fork a new branch at step `at`; returns a `TrainingResult`.

    Without `at`, training continues on the branch that was interrupted, else on main; the first record names it. With
    `at`, a new branch is trained with the responses of a guide cache (`guide`) for `steps` steps, or without one
    (`no_guide=True`). `overrides`: settings that may change on resume or at a fork. `fresh_optimizer`: fork from
    weights only. `merge`: start from merged weights, `BRANCH:STEP[,minus=BRANCH:STEP],weight=W`.
    """
    root, overrides, stop = resolve_root(run), list_overrides(overrides), StopFlag()
    guide = guide.name if isinstance(guide, GuideCacheInfo) else guide
    from npo_cli.storage.layout import open_run

    forked, first_line = _choose_branch(root, branch, at=at, guide=guide, autonpo=autonpo)
    purpose: Purpose = "fork" if at is not None else "resume"
    hint = "" if branch is None or at is None else f"--new-branch {quote_path(Path(branch))}   # names a new branch"
    recipe = load_run_recipe(root, overrides, branch=forked, purpose=purpose, hint=hint)
    last = resolve_last_step(until, recipe, after=at or 0, autonpo=autonpo)
    has_guide, has_new_branch = any(one is not None for one in (guide, steps, merge)), new_branch is not None
    _check_combination(
        root, at=at, autonpo=autonpo, fresh=fresh_optimizer, has_guide=has_guide, has_new_branch=has_new_branch
    )
    if no_guide or (at is not None and guide is None and not autonpo):
        _check_guide_choice(root, recipe, at=at, guide=guide, no_guide=no_guide, autonpo=autonpo)
    where: dict[str, Any] = {"overrides": overrides, "at": at, "source_branch": branch, "new_branch": new_branch}
    replay: dict[str, Any] = {"guide": guide, "steps": steps, "until": until, "fresh": fresh_optimizer, "merge": merge}
    if autonpo:
        from npo_cli.autonpo.preflight import find_start

        find_start(open_run(root), **where)
    else:
        from npo_cli.training.start_point import choose_start

        choose_start(open_run(root), **where, **replay)

    def work() -> Generator[StreamRecord, None, None]:
        yield Notice(message=first_line)  # before the imports, which take seconds
        records: Iterator[StreamRecord]
        if autonpo:
            from npo_cli.autonpo.run import resume_autonpo

            records = resume_autonpo(root, **where, stop=stop)
        else:
            from npo_cli.training.resume import resume_run

            records = resume_run(root, **where, **replay, stop=stop)
        yield from _track(root, recipe, records)

    def plan() -> Iterator["PlannedWork | Notice"]:
        yield Notice(message=first_line)
        if autonpo:
            from npo_cli.autonpo.dry_training import plan_autonpo_resume

            yield from plan_autonpo_resume(root, **where)
        else:
            from npo_cli.training.dry_run import plan_resume

            yield from plan_resume(root, **where, **replay)

    return RecordStream(
        work(),
        name="resume",
        root=root,
        callbacks=callbacks,
        stop=stop,
        last_step=last,
        allow_code=allow_code,
        plan=plan,
    )


def _choose_branch(
    root: Path, branch: str | None, *, at: int | None, guide: str | None, autonpo: bool
) -> tuple[str, str]:
    """The branch to continue or to fork, and one line that names it."""
    from npo_cli.storage.guide_cache import cache_info_path, read_cache_info
    from npo_cli.storage.interrupted import find_autonpo_branch, find_resume_target
    from npo_cli.storage.layout import FIRST_BRANCH, open_run
    from npo_cli.storage.lineage import list_branches

    run = open_run(root)
    if branch is not None and branch not in list_branches(run):
        return branch, ""  # refused with the names of the branches
    if at is None:
        target = find_resume_target(run, branch or (find_autonpo_branch(run) if autonpo else None))
        return target.branch, target.describe()
    if branch is None and guide is not None and cache_info_path(run.guide_folder(guide)).exists():
        branch = read_cache_info(run.guide_folder(guide)).branch
    branch = branch or FIRST_BRANCH
    return branch, f"fork branch {branch} at step {at}"


def _collect_replay(stream: RecordStream[Any]) -> TrainingResult | None:
    records = collect_records(stream)
    last = [record for record in records if isinstance(record, StepReport | CheckpointSaved)]
    if not last:
        return None
    return TrainingResult(
        run=Run(stream.root), branch=last[-1].branch, step=last[-1].step, stopped_by=stream.stopped_by, records=records
    )


@returns(_collect_replay)
def replay(
    run: "Run | str | PathLike[str]",
    *,
    at: int,
    candidates: Sequence[int | str] | None = None,
    name: str | None = None,
    branch: str | None = None,
    steps: int | None = None,
    until: int | None = None,
    overrides: Overrides = (),
    callbacks: Sequence[Callback] = (),
    allow_code: bool = False,
) -> RecordStream[Any]:
    """Score guide candidates for step `at`, sample the chosen one and train a branch with it: `score`, `sample_guide`
    and `resume` in one; returns a `TrainingResult`, or None where no guide is worth it.

    `candidates`: as for `score`. `name`: of guide cache and branch (None: `replay-AT`); called again with the same name
    after an interruption, it continues where it stopped. `steps`: length of the replay.
    """
    from npo_cli.guides.source import parse_spec
    from npo_cli.storage.checkpoints import find_checkpoint
    from npo_cli.storage.layout import FIRST_BRANCH, open_run, validate_name
    from npo_cli.storage.lineage import choose_replay_name

    root, overrides, stop = resolve_root(run), list_overrides(overrides), StopFlag()
    specs = None if candidates is None else [parse_spec(str(candidate)) for candidate in candidates]
    recipe = load_run_recipe(root, overrides, branch=branch, purpose="fork")
    last = resolve_last_step(until, recipe, after=at, autonpo=False)
    parent = branch or FIRST_BRANCH
    find_checkpoint(open_run(root), parent, at)
    chosen = validate_name(choose_replay_name(parent, at) if name is None else name)
    _check_same_source(root, chosen, specs)
    request = ReplayRequest(
        at=at, branch=parent, sources=specs, name=chosen, steps=steps, until=until, overrides=overrides
    )
    first_line = Notice(message=f"replay step {at} of branch {parent}")

    def work() -> Generator[Any, None, None]:
        yield first_line
        from npo_cli.training.replay import replay_run

        yield from _track(root, recipe, replay_run(root, request, stop=stop))

    def plan() -> Iterator["PlannedWork | Notice"]:
        yield first_line
        from npo_cli.training.dry_run import plan_replay

        yield from plan_replay(root, request)

    return RecordStream(
        work(),
        name="replay",
        root=root,
        callbacks=callbacks,
        stop=stop,
        last_step=last,
        allow_code=allow_code,
        plan=plan,
    )


def _collect_scout(stream: RecordStream[StreamRecord]) -> TrainingResult:
    from npo_cli.storage.interrupted import find_last_saved_step
    from npo_cli.storage.layout import open_run

    records, branch = collect_records(stream), stream.branch
    assert branch is not None, "a scout has a name"
    step = find_last_saved_step(open_run(stream.root), branch)
    return TrainingResult(run=Run(stream.root), branch=branch, step=step, stopped_by=stream.stopped_by, records=records)


@returns(_collect_scout)
def scout(
    run: "Run | str | PathLike[str]",
    *,
    at: int,
    steps: int | None = None,
    name: str | None = None,
    branch: str | None = None,
    overrides: Overrides = (),
    callbacks: Sequence[Callback] = (),
    allow_code: bool = False,
) -> RecordStream[StreamRecord]:
    """Train a disposable scout from step `at` for `steps` steps (None: `scout.num_steps`); returns a `TrainingResult`.

    Its only products are guides (`npo.sample_guide(source="scout:NAME")`) and a teacher (`target.teacher=scout:NAME`);
    the branch that learns from it pays for it, and its checkpoints are dropped when used. `overrides`: `scout.*`, and
    settings that may change at a fork. `name`: of its branch (None: `scout-AT`); called again with the same name after
    an interruption, it continues where it stopped.
    """
    from npo_cli.storage.layout import FIRST_BRANCH, open_run, validate_name
    from npo_cli.storage.lineage import choose_scout_name
    from npo_cli.training.scout_start import choose_scout

    root, overrides, stop = resolve_root(run), list_overrides(overrides), StopFlag()
    parent = branch or FIRST_BRANCH
    recipe = load_run_recipe(root, overrides, branch=branch, purpose="fork")
    chosen = validate_name(choose_scout_name(parent, at) if name is None else name)
    request = ScoutRequest(at=at, branch=parent, steps=steps, name=chosen, overrides=overrides)
    start = choose_scout(open_run(root), request)

    def work() -> Generator[StreamRecord, None, None]:
        yield Notice(message=f"scout {chosen} from step {at} of branch {parent}")
        from npo_cli.training.scout import scout_run

        yield from _track(root, recipe, scout_run(root, request, stop=stop))

    def plan() -> Iterator["PlannedWork | Notice"]:
        from npo_cli.training.dry_run import plan_scout

        return plan_scout(root, request)

    return RecordStream(
        work(),
        name="scout",
        root=root,
        branch=chosen,
        callbacks=callbacks,
        stop=stop,
        last_step=None if start is None else start.recipe.train.num_steps,
        allow_code=allow_code,
        plan=plan,
    )


def _check_same_source(root: Path, name: str, sources: "Sequence[SourceSpec] | None") -> None:
    """Refuse other candidates than the guide that an earlier call of the same name chose: they would have no effect."""
    from npo_cli.storage.guide_cache import cache_info_path, format_source_option, read_cache_info
    from npo_cli.storage.layout import open_run

    folder = open_run(root).guide_folder(name)
    if sources is None or not cache_info_path(folder).exists():
        return
    info = read_cache_info(folder)
    if info.source.text not in {spec.text for spec in sources}:
        raise NpoError(
            f"{root} already has guide {name}, from {info.source.text}, which is none of these candidates",
            f"--name NEW, or continue it: npo replay {quote_path(root)} --at {info.learner_step} --name {name} "
            f"{format_source_option(info)}",
        )


def _check_combination(
    run: Path, *, at: int | None, autonpo: bool, fresh: bool, has_guide: bool, has_new_branch: bool
) -> None:
    if fresh and (at is None or autonpo):
        raise NpoError(
            "--fresh-optimizer needs --at STEP, and is not available with --autonpo",
            f"npo resume {quote_path(run)} --at STEP --no-guide --fresh-optimizer",
        )
    if autonpo and at is None and has_new_branch:
        raise NpoError("--new-branch needs --at STEP", f"npo resume {quote_path(run)} --autonpo --at STEP")
    if autonpo and has_guide:
        raise NpoError(
            "--guide, --steps and --merge are not available with --autonpo, which builds its own guide caches",
            f"npo resume {quote_path(run)} --autonpo",
        )


def _check_guide_choice(
    run: Path, recipe: "Recipe", *, at: int | None, guide: str | None, no_guide: bool, autonpo: bool
) -> None:
    """A fork says whether it has a guide: a forgotten --guide would train a whole branch without one."""
    samples_online = recipe.guide.source != "cache"
    if not no_guide:
        if not samples_online:
            again = f"npo resume {quote_path(run)} --at {at}"
            raise NpoError(
                f"--at {at} forks a new branch: say whether it has a guide. --guide NAME injects the responses of a "
                "guide cache; --no-guide trains on without one",
                f"{again} --guide NAME, or {again} --no-guide",
            )
        return
    other = "--at STEP is missing" if at is None else "--guide is given" if guide else "--autonpo is given"
    if at is None or guide is not None or autonpo:
        raise NpoError(
            f"--no-guide forks a branch without a guide cache, but {other}",
            f"npo resume {quote_path(run)} --at STEP --no-guide",
        )
    if samples_online:
        raise NpoError(
            f"--no-guide, but guide.source={recipe.guide.source} samples a guide during training",
            f"npo resume {quote_path(run)} --at {at} --no-guide guide.source=cache",
        )


def _collect_evals(stream: "RecordStream[EvalReport | Progress | Notice]") -> tuple[EvalReport, ...]:
    return tuple(record for record in collect_records(stream) if isinstance(record, EvalReport))


@returns(_collect_evals)
def evaluate(
    run: "Run | str | PathLike[str]",
    *,
    step: int | None = None,
    every_step: bool = False,
    branch: str | None = None,
    overrides: Overrides = (),
    allow_code: bool = False,
) -> RecordStream[EvalReport | Progress | Notice]:
    """Evaluate the newest checkpoint of a branch, that of `step`, or all; returns `EvalReport` records.

    avg@k and pass@k on the held-out prompts, with 95 % intervals over prompts.
    """
    if every_step and step is not None:
        raise NpoError("--step and --all cannot be combined", "give one of them, or neither for the newest checkpoint")
    from npo_cli.storage.checkpoints import find_checkpoint
    from npo_cli.storage.layout import open_run
    from npo_cli.storage.lineage import find_main_branch, refuse_scout

    root, overrides = resolve_root(run), list_overrides(overrides)
    load_run_recipe(root, overrides, branch=branch)
    if branch is not None:
        refuse_scout(open_run(root), branch, "is not evaluated: it is no result of the run")
    if step is not None:
        find_checkpoint(open_run(root), branch or find_main_branch(open_run(root)), step)

    def work() -> Generator[EvalReport | Progress | Notice, None, None]:
        from npo_cli.training.evaluate import evaluate_run

        yield from evaluate_run(root, step=step, every_step=every_step, branch=branch, overrides=overrides)

    return RecordStream(work(), name="evaluate", root=root, allow_code=allow_code)
