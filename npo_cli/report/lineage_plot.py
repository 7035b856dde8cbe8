"""The lineage of a run as a picture: a lane a branch, logical steps from left to right.

A whole line was kept, a dotted one was left behind. An arrow runs from the checkpoint that was the guide back to the
step from which its branch was trained again.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from npo_cli.report.plotting import MUTED, Plot, get_line_style
from npo_cli.types.autonpo import Transition
from npo_cli.types.views import BranchSpan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINEAGE_PLOT_WIDTH = 13.0
EVENT_MARKERS = (
    (("warning",), "v", "warning"),
    (("probe_accepted", "early_bootstrap"), "D", "trigger, accepted"),
    (("rung_chosen",), "^", "trigger, rung chosen"),
)


def make_lineage_plot(limbs: Sequence[BranchSpan], moves: Sequence[Transition], *, prefix: str) -> Plot:
    """Branches, guides and the moves of AutoNPO."""
    says = "; ".join(
        f"{one.branch} from step {one.fork_step} to {one.last_step}"
        + (f", guided until step {one.guide_until}" if one.guide_until is not None else "")
        for one in limbs
    )
    return Plot(
        name=f"{prefix}lineage",
        alt_text=f"lineage: {says}",
        draw=partial(_draw_tree, limbs=limbs, moves=moves),
        width=LINEAGE_PLOT_WIDTH,
        height=1.3 + 0.62 * len(limbs),
    )


def _draw_tree(panel: "Axes", *, limbs: Sequence[BranchSpan], moves: Sequence[Transition]) -> None:
    lanes = {limb.branch: lane for lane, limb in enumerate(limbs)}
    for lane, limb in enumerate(limbs):
        _draw_limb(panel, limb, lane)
        if limb.parent in lanes:
            _draw_fork(panel, limb, start=lanes[limb.parent], lane=lane)
    rejected = ([move for move in moves if move.is_rejection], "x", "trigger, no lasting replay")
    found = [([move for move in moves if move.event in events], *style) for events, *style in EVENT_MARKERS]
    for marked, marker, label in (*found, rejected):
        # The branch after a rollback is not the one on which it was decided: these moves are made before it.
        places = [(move.step, lanes[move.state.branch]) for move in marked]
        if places:
            style = {"color": MUTED, "ms": 6, "mew": 1.5, "lw": 0, "zorder": 6}
            panel.plot(*zip(*places, strict=True), marker=marker, label=label, **style)
    for move in moves:
        if move.event == "rung_applied" and move.state.branch in lanes:
            _draw_window(panel, move, lanes[move.state.branch])
    panel.set_ylim(len(limbs) - 0.4, -0.75)
    panel.set_yticks(range(len(limbs)), [limb.branch for limb in limbs])
    panel.tick_params(axis="y", length=0, labelcolor="black")
    panel.grid(axis="x", color="#e6e6e6")
    panel.grid(False, axis="y")
    panel.spines["left"].set_visible(False)
    panel.set_xlim(left=0)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("logical step")
    if panel.get_legend_handles_labels()[0]:
        panel.figure.legend(loc="outside lower center", ncols=len(EVENT_MARKERS) + 1, frameon=False, fontsize=9)


def _draw_limb(panel: "Axes", limb: BranchSpan, lane: int) -> None:
    colour = get_line_style(lane).colour
    kept = limb.fork_step if limb.lineage_until is None else limb.lineage_until
    panel.plot([limb.fork_step, kept], [lane, lane], color=colour, lw=4, solid_capstyle="butt")
    panel.plot([kept, limb.last_step], [lane, lane], color=colour, lw=2, ls=":")
    if limb.guide_until is not None:
        until = min(limb.guide_until, limb.last_step)
        panel.plot([limb.fork_step, until], [lane, lane], color=colour, lw=13, alpha=0.22, solid_capstyle="butt")
    panel.annotate(
        str(limb.last_step), (limb.last_step, lane), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
    )


def _draw_window(panel: "Axes", move: Transition, lane: int) -> None:
    """The window of a rung, with its name."""
    first, last, colour = move.evidence["to_step"], move.evidence["until_step"], get_line_style(lane).colour
    panel.plot([first, last], [lane, lane], color=colour, lw=13, alpha=0.22, solid_capstyle="butt")
    panel.annotate(
        move.evidence["rung"], (first, lane), xytext=(4, 9), textcoords="offset points", fontsize=9, color=colour
    )


def _draw_fork(panel: "Axes", limb: BranchSpan, *, start: int, lane: int) -> None:
    """Down from the parent; where a guide is known, back from its checkpoint."""
    colour = get_line_style(lane).colour
    origin = limb.fork_step if limb.guide_step is None else limb.guide_step
    arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.5, "shrinkA": 3, "shrinkB": 3}
    panel.annotate("", xy=(limb.fork_step, lane), xytext=(origin, start), arrowprops=arrow, zorder=4)
    if limb.guide_step is not None:
        panel.plot(limb.guide_step, start, marker="o", ms=7, color="white", mec=colour, mew=2, zorder=5)
    if limb.guide_cache is not None:
        where = (limb.fork_step, lane)
        panel.annotate(
            f"guide {limb.guide_cache}", where, xytext=(4, -16), textcoords="offset points", fontsize=9, color=colour
        )
