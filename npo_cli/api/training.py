"""`npo.train`, `npo.resume` and `npo.evaluate`."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npo_cli.api.callbacks import Callback
from npo_cli.api.checks import Overrides, list_overrides, load_run_recipe, resolve_last_step
from npo_cli.api.run import Run, resolve_root
from npo_cli.api.stages import RecordStream, collect_records, returns
from npo_cli.errors import NpoError, quote_path
from npo_cli.session.stop_signal import StopFlag
from npo_cli.types.autonpo import Transition
from npo_cli.types.costs import RunCosts
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import CheckpointSaved, EvalReport, Notice, Progress, StepReport, TrainingRecord

if TYPE_CHECKING:
    from npo_cli.config.recipe import Recipe

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
        return tuple(record for record in self.records if isinstance(record, StepReport))

    @property
    def evals(self) -> tuple[EvalReport, ...]:
        """The held-out evaluations."""
        return tuple(record for record in self.records if isinstance(record, EvalReport))

    @property
    def checkpoints(self) -> tuple[CheckpointSaved, ...]:
        """The checkpoints that were saved; some may have been removed since (`train.keep_full_checkpoints`)."""
        return tuple(record for record in self.records if isinstance(record, CheckpointSaved))

    @property
    def transitions(self) -> tuple[Transition, ...]:
        """AutoNPO's decisions."""
        return tuple(record for record in self.records if isinstance(record, Transition))

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What was restored, saved or looks odd; warnings have `level="warning"`."""
        return tuple(record for record in self.records if isinstance(record, Notice))

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
    if autonpo:
        from npo_cli.autonpo.run import train_autonpo

        records = train_autonpo(root, resolved, stop=stop)
    else:
        from npo_cli.training.train import train_run

        records = train_run(root, resolved, until=until, stop=stop)
    from npo_cli.training.tracking import track_records

    return RecordStream(
        track_records(root, resolved, records),
        name="train",
        root=root,
        callbacks=callbacks,
        stop=stop,
        last_step=last,
        allow_code=allow_code,
    )


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
    overrides: Overrides = (),
    callbacks: Sequence[Callback] = (),
    allow_code: bool = False,
) -> RecordStream[StreamRecord]:
    """Resume a run, or fork a new branch at step `at`; returns a `TrainingResult`.

    Without `at`, training continues on the branch that was interrupted, else on main; the first record names it. With
    `at`, a new branch is trained with the responses of a guide cache (`guide`) for `steps` steps, or without one
    (`no_guide=True`). `overrides`: settings that may change on resume or at a fork. `fresh_optimizer`: fork from
    weights only.
    """
    checked = check_resume(
        run,
        at=at,
        guide=guide,
        no_guide=no_guide,
        branch=branch,
        new_branch=new_branch,
        steps=steps,
        until=until,
        autonpo=autonpo,
        fresh_optimizer=fresh_optimizer,
        overrides=overrides,
    )
    root, stop = checked.root, StopFlag()
    where = checked.where(at=at)
    replay: dict[str, Any] = {"guide": checked.guide, "steps": steps, "until": until, "fresh": fresh_optimizer}

    def work() -> Generator[StreamRecord, None, None]:
        yield Notice(message=checked.first_line)  # before the imports, which take seconds
        if autonpo:
            from npo_cli.autonpo.run import resume_autonpo

            records = resume_autonpo(root, **where, stop=stop)
        else:
            from npo_cli.training.resume import resume_run

            records = resume_run(root, **where, **replay, stop=stop)
        from npo_cli.training.tracking import track_records

        yield from track_records(root, checked.recipe, records)

    return RecordStream(
        work(),
        name="resume",
        root=root,
        callbacks=callbacks,
        stop=stop,
        last_step=checked.last_step,
        allow_code=allow_code,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedResume:
    """Arguments of `resume` that passed its checks."""

    root: Path
    recipe: "Recipe"
    branch: str | None
    """As given; None: `first_line` names the branch that is continued or forked."""
    guide: str | None
    new_branch: str | None
    overrides: list[str]
    first_line: str
    """Names the branch."""
    last_step: int

    def where(self, *, at: int | None) -> dict[str, Any]:
        """Arguments of the functions that train: where it continues."""
        return {"overrides": self.overrides, "at": at, "source_branch": self.branch, "new_branch": self.new_branch}


def check_resume(
    run: "Run | str | PathLike[str]",
    *,
    at: int | None,
    guide: "str | GuideCacheInfo | None",
    no_guide: bool,
    branch: str | None,
    new_branch: str | None,
    steps: int | None,
    until: int | None,
    autonpo: bool,
    fresh_optimizer: bool,
    overrides: Overrides,
) -> CheckedResume:
    """The checks of `resume` that need no model."""
    root, overrides = resolve_root(run), list_overrides(overrides)
    guide = guide.name if isinstance(guide, GuideCacheInfo) else guide
    hint = "" if branch is None or at is None else f"--new-branch {quote_path(Path(branch))}   # names a new branch"
    acted_on, first_line = _choose_branch(root, branch, at=at, guide=guide, autonpo=autonpo)
    purpose = "fork" if at is not None else "resume"
    recipe = load_run_recipe(root, overrides, branch=acted_on, purpose=purpose, hint=hint)
    last = resolve_last_step(until, recipe, after=at or 0, autonpo=autonpo)
    has_guide = guide is not None or steps is not None
    _check_combination(
        root,
        at=at,
        autonpo=autonpo,
        fresh=fresh_optimizer,
        has_guide=has_guide,
        has_new_branch=new_branch is not None,
    )
    if no_guide or (at is not None and guide is None and not autonpo):
        _check_guide_choice(root, recipe, at=at, guide=guide, no_guide=no_guide, autonpo=autonpo)
    return CheckedResume(
        root=root,
        recipe=recipe,
        branch=branch,
        guide=guide,
        new_branch=new_branch,
        overrides=overrides,
        first_line=first_line,
        last_step=last,
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
    from npo_cli.storage.layout import FIRST_BRANCH, validate_name

    root, overrides, stop = resolve_root(run), list_overrides(overrides), StopFlag()
    specs = None if candidates is None else [parse_spec(str(candidate)) for candidate in candidates]
    recipe = load_run_recipe(root, overrides, branch=branch, purpose="fork")
    last = resolve_last_step(until, recipe, after=at, autonpo=False)
    parent = branch or FIRST_BRANCH

    def work() -> Generator[Any, None, None]:
        yield Notice(message=f"replay step {at} of branch {parent}")
        from npo_cli.storage.lineage import choose_replay_name
        from npo_cli.training.replay import check_same_source, replay_run
        from npo_cli.training.tracking import track_records

        chosen = validate_name(name or choose_replay_name(parent, at))
        check_same_source(root, chosen, specs)
        records = replay_run(
            root,
            at=at,
            branch=parent,
            sources=specs,
            name=chosen,
            steps=steps,
            until=until,
            overrides=overrides,
            stop=stop,
        )
        yield from track_records(root, recipe, records)

    return RecordStream(
        work(),
        name="replay",
        root=root,
        callbacks=callbacks,
        stop=stop,
        last_step=last,
        allow_code=allow_code,
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
            "--guide and --steps are not available with --autonpo, which builds its own guide caches",
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
    root, overrides = resolve_root(run), list_overrides(overrides)
    load_run_recipe(root, overrides, branch=branch)

    from npo_cli.training.evaluate import evaluate_run

    records = evaluate_run(root, step=step, every_step=every_step, branch=branch, overrides=overrides)
    return RecordStream(records, name="evaluate", root=root, allow_code=allow_code)
