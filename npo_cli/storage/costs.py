"""costs.jsonl: what everything in a run cost, written where the work is done.

Each line is one piece of work: a training step, a chunk of samples for a scoring, a guide cache or a probe, a held-out
evaluation, an acceptance test, a replay of a calibration. A piece that is executed again after a kill has a second line
with the same key (kind, branch, step, artifact, piece): its tokens count once, the seconds of both count. `save` (a
checkpoint), `load` (task and weights) and `start` (a process, an engine) have seconds only. `ahead` is a batch that
asynchronous sampling recorded before its step; once the step has a line, only its seconds count. A branch that is
forked starts with a line of kind `fork`, which names what the branch is charged with; `guide_empty` names a guide cache
without a response, with which AutoNPO did not roll back. Order is the order of the lines; no clock decides anything.
The sums are in `cost_sums.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from npo_cli.storage.files import damaged_file_error, to_row
from npo_cli.storage.guide_cache import list_guide_caches, load_guide
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import ancestry, find_first_segment, is_scout
from npo_cli.storage.sample_store import list_sample_stores
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Segment

WorkKind = Literal["train", "score", "guide_cache", "probe", "acceptance_test", "evaluate", "calibration"]
CostKind = Literal[WorkKind, "ahead", "save", "load", "start", "guide_empty", "fork"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CostLine:
    """One piece of work."""

    kind: CostKind
    branch: str
    """Whose costs these are: the branch that was trained, evaluated, scored for or probed."""
    step: int
    """Logical step of the policy at work; of a fork the step that it leaves its parent at."""
    artifact: str = ""
    """Folder of what was made, relative to the run directory: `guides/late`, `scores/...`, `probes/...`."""
    piece: str = ""
    """Which part of the artifact, so that a part made again is recognized."""
    updates: int = 0
    """Optimizer updates."""
    tokens: int = 0
    """Tokens generated."""
    forwards: int = 0
    """Forward passes of sampling: one per token, two where a second model is read along."""
    teacher_tokens: int = 0
    """Tokens of own rollouts that the teacher of a dense target scored, in one pass over each response."""
    seconds: float = 0.0
    charged: tuple[str, ...] = ()
    """Artifacts and branches whose costs the branch also pays from here on."""
    until: tuple[str, int] | None = None
    """Fork with a guide or teacher: the line of descent (branch, step) that had to be trained for it. A scout is in
    `charged`."""

    @property
    def key(self) -> tuple[str, str, int, str, str]:
        """Identity of a piece of work."""
        return self.kind, self.branch, self.step, self.artifact, self.piece


def costs_path(run: RunDir) -> Path:
    """One line per piece of work."""
    return run.root / "costs.jsonl"


def append_cost(
    run: RunDir,
    kind: CostKind,
    *,
    branch: str,
    step: int,
    seconds: float,
    updates: int = 0,
    tokens: int = 0,
    forwards: int | None = None,
    artifact: Path | None = None,
    piece: str = "",
    charged: Sequence[Path] = (),
) -> None:
    """Charge one piece of sampling or scoring. Call it before the artifact is written: a piece that is lost in
    between is executed again, and its tokens still count once.

    `forwards` is the number of tokens by default.
    """
    line = CostLine(
        kind=kind,
        branch=branch,
        step=step,
        artifact="" if artifact is None else relative_artifact(run, artifact),
        piece=piece,
        updates=updates,
        tokens=tokens,
        forwards=tokens if forwards is None else forwards,
        seconds=seconds,
        charged=tuple(relative_artifact(run, one) for one in charged),
    )
    JsonlLog(costs_path(run)).append(encode_cost(line))


def relative_artifact(run: RunDir, folder: Path) -> str:
    """`guides/late` for that folder of the run."""
    return folder.relative_to(run.root).as_posix()


def encode_cost(line: CostLine) -> dict[str, object]:
    """The line of costs.jsonl; fields without content are left out."""
    row = to_row(line)
    always = ("kind", "branch", "step")
    return {name: value for name, value in row.items() if name in always or value not in ("", 0, 0.0, [], (), None)}


def append_fork_cost(run: RunDir, segment: Segment) -> None:
    """What a new branch is charged with before its first step: its guide cache, earlier caches for its learner that
    found nothing, finished scorings for its learner, the line of descent up to every guide, scored candidate and
    teacher, and every scout among these with all that it cost, once on a line of descent.

    Call it before the branch exists, so that no branch is without it. Without a guide the parent's costs at the fork
    are all.
    """
    folders: list[Path] = []
    until = None
    scouts: list[str] = []
    if segment.guide_cache is not None:
        info, _ = load_guide(run, segment.guide_cache)
        scorings = [
            one
            for one in list_sample_stores(run.scores_folder)
            if one.is_finished and (one.spec.branch, one.spec.step) == (info.branch, info.learner_step)
        ]
        caches = [info, *(one for one in list_empty_caches(run, info) if one.name != info.name)]
        trained = [cache.guide_step for cache in caches if cache.guide_step is not None]
        scored = [step for scoring in scorings for step in scoring.spec.checkpoints]
        folders = [*(run.guide_folder(cache.name) for cache in caches), *(scoring.folder for scoring in scorings)]
        until = (info.branch, max([segment.fork_step, *trained, *scored]))
        scouts += [cache.scout[0] for cache in caches if cache.scout is not None]
    if segment.teacher is not None:
        branch, step = segment.teacher
        if is_scout(run, branch):
            scouts.append(branch)
        else:
            # A guide and a teacher are of the same line.
            until = (branch, max(step, segment.fork_step, until[1] if until else 0))
    assert segment.parent is not None, "a first branch is not forked"
    paid = _list_charged(run, segment.parent)
    scouts = [name for name in dict.fromkeys(scouts) if relative_artifact(run, run.branch_folder(name)) not in paid]
    folders += [run.branch_folder(name) for name in scouts]
    # A scout may have left the line after the fork.
    left = max((find_first_segment(run, name).fork_step for name in scouts), default=0)
    if left > (until[1] if until else segment.fork_step):
        until = (segment.parent, left)
    line = CostLine(
        kind="fork",
        branch=segment.branch,
        step=segment.fork_step,
        charged=tuple(relative_artifact(run, folder) for folder in folders),
        until=until,
    )
    log = JsonlLog(costs_path(run))
    log.append(encode_cost(line))
    log.seal()


def _list_charged(run: RunDir, branch: str) -> set[str]:
    """What the branches on a line of descent were charged with when they were forked."""
    line = {span.branch for span in ancestry(run, branch)}
    return {name for one in read_cost_lines(run) if one.kind == "fork" and one.branch in line for name in one.charged}


def list_empty_caches(run: RunDir, info: GuideCacheInfo) -> list[GuideCacheInfo]:
    """Complete caches for the learner of `info` that found nothing and that no branch was charged with when AutoNPO
    went on without them."""
    charged = {name for line in read_cost_lines(run) if line.kind == "guide_empty" for name in line.charged}
    return [
        one
        for one in list_guide_caches(run)
        if one.complete
        and not one.lazy_settings
        and not one.num_prompts_with_rollouts
        and (one.branch, one.learner_step) == (info.branch, info.learner_step)
        and relative_artifact(run, run.guide_folder(one.name)) not in charged
    ]


def read_cost_lines(run: RunDir) -> Iterator[CostLine]:
    """Every line, oldest first, checked."""
    path = costs_path(run)
    for number, line in enumerate(JsonlLog(path).read_records(CostLine), start=1):
        counts = (line.step, line.updates, line.tokens, line.forwards, line.teacher_tokens, line.seconds)
        if any(isinstance(count, bool) or not isinstance(count, int | float) or not count >= 0 for count in counts):
            raise damaged_file_error(f"{path}, line {number}", "a cost is negative or no number")
        yield line
