"""What `npo watch` draws: the curves of a run that another process may be writing, and whether it does."""

import os
import platform
from collections.abc import Sequence

from npo_cli.errors import NpoError
from npo_cli.report.terminal_plot import Curve, Line, draw_curves
from npo_cli.storage.evals import read_evals
from npo_cli.storage.files import decode_record, read_json
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import find_first_segment, list_branches
from npo_cli.storage.lock import LockHolder
from npo_cli.storage.metrics import read_metrics
from npo_cli.types.views import BranchCurve

PLOTS = (
    ("reward (moving average)", "rewards"),
    ("entropy (moving average)", "entropies"),
    ("held-out accuracy", "accuracies"),
)
NUM_FRAME_LINES = 3
"""Lines of a plot besides its dots, and the line between two plots."""
MIN_HEIGHT, MAX_HEIGHT = 3, 16


def read_curves(run: RunDir, branch: str | None = None) -> list[BranchCurve]:
    """The recorded curves of one branch, or of all."""
    if branch is not None:
        find_first_segment(run, branch)
    evals = read_evals(run)
    found = []
    for name in list_branches(run) if branch is None else [branch]:
        rows = list(read_metrics(run, name))
        found.append(
            BranchCurve(
                branch=name,
                num_steps=int(run.read_recipe(name)["train"]["num_steps"]),
                rewards=_points(rows, "reward"),
                entropies=_points(rows, "entropy"),
                accuracies=tuple((one.step, one.accuracy) for one in evals if one.branch == name),
            )
        )
    return found


def _points(rows: Sequence[dict], name: str) -> tuple[tuple[int, float], ...]:
    """A metric by step: its moving average, or where an imported run has none, the metric."""
    values = ((row["step"], row.get(f"{name}_ema", row.get(name))) for row in rows)
    return tuple((step, float(value)) for step, value in values if value is not None)


def find_writer(run: RunDir) -> LockHolder | None:
    """The process that writes to the run; None if there is none. On another machine it counts as alive."""
    try:
        holder = decode_record(LockHolder, read_json(run.holder_path), run.holder_path)
    except NpoError:
        return None
    if holder.host != platform.node():
        return holder
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it is another user's
    return holder


def draw_frame(
    run: RunDir, curves: Sequence[BranchCurve], writer: LockHolder | None, *, width: int, height: int
) -> list[Line]:
    """One screen: what runs, then reward, entropy and held-out accuracy of each branch."""
    state = "no command is writing to it" if writer is None else f"process {writer.pid} since {writer.since[11:19]} UTC"
    steps = ", ".join(f"{one.branch} {one.last_step}/{one.num_steps}" for one in curves)
    lines: list[Line] = [((f"{steps}; {state}; {run.root}"[:width], None),)]
    dots = min(MAX_HEIGHT, max(MIN_HEIGHT, (height - 2) // len(PLOTS) - NUM_FRAME_LINES))
    across = (0, max((one.last_step for one in curves), default=0))
    for title, name in PLOTS:
        series = [Curve(name=one.branch, points=getattr(one, name)) for one in curves]
        lines += [((" ", None),), *draw_curves(title, series, width=width, height=dots, across=across)]
    return lines
