"""`npo scout`: train a disposable scout, a branch whose only products are guides and a teacher.

A scout is a branch like any other on disk, marked in its first segment, with the recipe of `Recipe.make_scout`. It is
killed and resumed like any other. What uses it, and when its checkpoints are dropped: `npo_cli.storage.scouts`.
"""

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from npo_cli.errors import NpoError, quote_path
from npo_cli.session.session import Session, load_checkpoint, open_session
from npo_cli.session.stop_signal import StopFlag, stop_between_steps
from npo_cli.storage.interrupted import list_finished_branches, record_finish
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lock import lock_run
from npo_cli.storage.scouts import drop_used_scouts
from npo_cli.training.resume import train_from
from npo_cli.training.scout_start import choose_scout
from npo_cli.types.guides import ScoutRequest
from npo_cli.types.rollouts import Notice, TrainingRecord


def scout_run(root: Path, scout: ScoutRequest, *, stop: StopFlag | None = None) -> Iterator[TrainingRecord]:
    """Train a scout, or what is left of it."""
    run = open_run(root)
    with lock_run(run), stop_between_steps(stop) as stop:
        drop_used_scouts(run)
        start = choose_scout(run, scout)
        if start is None:
            yield finish_scout(run, scout.name)
            return
        with open_session(run, start.recipe, checkpoint=start.loaded, trains=True) as session:
            yield from train_from(session, start, stop, overrides=scout.overrides)


def train_scout(session: Session, scout: ScoutRequest, stop: StopFlag) -> Iterator[TrainingRecord]:
    """The same in an open session of the run, whose lock the caller holds: how AutoNPO trains a scout.

    Task and engine are the session's. Its policy is left with the scout's weights: load a checkpoint before training
    anything else with it. A scout of that name that was begun before is finished; of one that has ended nothing is
    trained. A session holds one model and one producer: scout.lora.rank and train.staleness are refused. Then
    `scout:NAME` is a guide source and teacher like any other, and the branch that learns from it is charged for it.
    Raises StoppedEarly after a stop, saved.
    """
    run = session.run
    start = choose_scout(run, scout)
    if start is None:
        yield finish_scout(run, scout.name)
        return
    by_hand = f"{scout.format_command(quote_path(run.root), name=scout.name)} {shlex.join(scout.overrides)}"
    if start.recipe.model.lora.rank != session.recipe.model.lora.rank:
        raise NpoError("scout.lora.rank trains another model than the one of this session", by_hand)
    if session.producer is not None:
        raise NpoError("a scout is not trained in a session with train.staleness above 0", by_hand)
    assert start.checkpoint is not None, "a scout is forked"
    load_checkpoint(session.policy, start.checkpoint)
    yield from train_from(replace(session, recipe=start.recipe), start, stop, overrides=scout.overrides)


def finish_scout(run: RunDir, name: str) -> Notice:
    """Record the end of a scout that was killed after its last step; one line about it."""
    if name not in list_finished_branches(run):
        record_finish(run, name)
    return Notice(message=f"scout {name} is trained already")
