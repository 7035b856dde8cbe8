"""`npo replay`: score guide candidates, sample the chosen one, and train a new branch with it, in one command.

Guide cache and branch have the same name, by which the same command, repeated after a kill, finds the stage that it was
in: a branch of that name is resumed, a cache of that name is finished, else candidates are scored. Each stage keeps its
own work.
"""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from npo_cli.config.loading import override_saved_recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.guides.build_cache import build_guide_cache
from npo_cli.guides.score import score_run
from npo_cli.guides.source import parse_spec
from npo_cli.session.stop_signal import StopFlag
from npo_cli.storage.guide_cache import cache_info_path, read_cache_info
from npo_cli.storage.interrupted import find_last_saved_step
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import find_first_segment, list_branches
from npo_cli.training.resume import resume_run
from npo_cli.types.guides import GuideCacheInfo, ReplayRequest
from npo_cli.types.rollouts import Notice, Progress, TrainingRecord
from npo_cli.types.scores import CandidateScore, GuideChoice

ReplayRecord = TrainingRecord | Progress | CandidateScore | GuideChoice | GuideCacheInfo


def replay_run(root: Path, replay: ReplayRequest, *, stop: StopFlag | None = None) -> Iterator[ReplayRecord]:
    """The stages that are left. Ends after the first where no guide is worth it; the last record is then its choice."""
    run, at, branch, name = open_run(root), replay.at, replay.branch, replay.name
    training = {"overrides": replay.overrides, "steps": None, "until": replay.until, "stop": stop}
    guide = find_replay_guide(run, replay)
    if name in list_branches(run):
        check_replay_branch(run, replay)
        if is_trained(run, name, replay.overrides):
            yield Notice(message=f"branch {name} is trained already, to step {find_last_saved_step(run, name)}")
            return
        yield Notice(message=f"stage 3 of 3: resume branch {name}")
        yield from resume_run(root, **training, at=None, guide=None, source_branch=name, new_branch=None)
        return
    spec = None if guide is None else guide.source
    if spec is None:
        yield Notice(message=f"stage 1 of 3: score the candidates for step {at} of {branch}")
        chosen = yield from _score(root, replay)
        if chosen is None:
            return
        spec = parse_spec(chosen)
    if guide is None or not guide.complete:
        yield Notice(message=f"stage 2 of 3: sample guide {name} from {spec.text}")
        yield from build_guide_cache(
            root, spec=spec, at=at, name=name, branch=branch, steps=replay.steps, overrides=replay.overrides
        )
    yield Notice(message=f"stage 3 of 3: train branch {name} from step {at} of {branch}")
    yield from resume_run(root, **training, at=at, guide=name, source_branch=branch, new_branch=name)


def is_trained(run: RunDir, name: str, overrides: Sequence[str]) -> bool:
    """Whether a branch has every step that its settings name."""
    recipe = override_saved_recipe(run.read_recipe(name), overrides, path=run.recipe_path(name), purpose="resume")
    return find_last_saved_step(run, name) >= recipe.train.num_steps


def _score(root: Path, replay: ReplayRequest) -> Generator[ReplayRecord, None, str | None]:
    """The scoring's records; returns the SPEC of the choice, None where no guide is worth it."""
    chosen = None
    for record in score_run(
        root, at=replay.at, sources=replay.sources, branch=replay.branch, overrides=replay.overrides
    ):
        if isinstance(record, GuideChoice):
            chosen = record.chosen
        yield record
    return chosen


def find_replay_guide(run: RunDir, replay: ReplayRequest) -> GuideCacheInfo | None:
    """The cache of its name, which an earlier call began; None before it. Refused where it is for another learner."""
    folder = run.guide_folder(replay.name)
    if not cache_info_path(folder).exists():
        return None
    info = read_cache_info(folder)
    if (info.branch, info.learner_step) != (replay.branch, replay.at):
        raise NpoError(
            f"guide {replay.name} is for step {info.learner_step} of {info.branch}, not step {replay.at} of "
            f"{replay.branch}",
            f"npo replay {quote_path(run.root)} --at {replay.at} --name NEW",
        )
    return info


def check_replay_branch(run: RunDir, replay: ReplayRequest) -> None:
    """Refuse a branch of its name that is no replay of this learner with the guide of the same name."""
    first = find_first_segment(run, replay.name)
    if (first.parent, first.fork_step, first.guide_cache) != (replay.branch, replay.at, replay.name):
        raise NpoError(
            f"{run.root} already has a branch {replay.name!r}, which is no replay of step {replay.at} of "
            f"{replay.branch} by guide {replay.name}",
            f"npo replay {quote_path(run.root)} --at {replay.at} --name NEW",
        )
