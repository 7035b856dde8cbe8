"""`npo watch`."""

import sys
import time
from typing import Annotated, Any

import typer

from npo_cli.cli.options import JsonOpt, OnlyBranchOpt, RunArg
from npo_cli.cli.terminal import escape_for_terminal, has_color, is_terminal, open_console, print_data
from npo_cli.errors import NpoError

STYLES = ("cyan", "magenta", "yellow", "green", "blue", "red")
MIN_SECONDS = 0.2


def watch(
    run: RunArg,
    *,
    branch: OnlyBranchOpt = None,
    every: Annotated[float, typer.Option("--every", metavar="SECONDS", help="Time between two drawings.")] = 3.0,
    once: Annotated[bool, typer.Option("--once", help="Draw once and exit, as without a terminal.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Draw the curves of a run in the terminal while it trains.

    Reward, entropy and held-out accuracy of each branch, drawn again every few seconds until the command that writes
    to the run ends, or Ctrl-C. It only reads. With --json the curves are printed once.
    """
    from npo_cli.cli.output import to_json_line
    from npo_cli.report.watch import find_writer, read_curves
    from npo_cli.storage.layout import open_run

    if every < MIN_SECONDS:
        raise NpoError(f"--every must be at least {MIN_SECONDS:g} seconds, got {every:g}", "--every 3")
    opened = open_run(run)
    if as_json:
        for curve in read_curves(opened, branch):
            print_data(to_json_line(curve))
        return
    is_live = is_terminal(sys.stdout) and not once and find_writer(opened) is not None
    if not is_live:
        _print_frame(opened, branch)
        return
    try:
        _redraw(opened, branch, every=every)
    except KeyboardInterrupt:
        return


def _redraw(opened: Any, branch: str | None, *, every: float) -> None:
    """Draw in place until nothing writes to the run. One failed reading, as of a file being replaced, is ignored."""
    from rich.live import Live

    from npo_cli.report.watch import find_writer

    console, failure = open_console(), None
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            has_ended = find_writer(opened) is None
            try:
                live.update(_draw(opened, branch, console), refresh=True)
                failure = None
            except NpoError as error:
                if failure is not None or has_ended:
                    raise
                failure = error
            if has_ended:
                return
            time.sleep(every)


def _print_frame(opened: Any, branch: str | None) -> None:
    console = open_console()
    frame = _draw(opened, branch, console)
    if is_terminal(sys.stdout) or has_color(sys.stdout):
        console.print(frame)
    else:
        print_data(frame.plain)


def _draw(opened: Any, branch: str | None, console: Any) -> Any:
    """One frame, fitted to the terminal, each branch in its color."""
    from rich.text import Text

    from npo_cli.report.watch import draw_frame, find_writer, read_curves

    lines = draw_frame(
        opened, read_curves(opened, branch), find_writer(opened), width=console.width, height=console.height
    )
    frame = Text(no_wrap=True, overflow="crop")
    for number, line in enumerate(lines):
        frame.append("\n" if number else "")
        for text, owner in line:
            frame.append(escape_for_terminal(text), style="" if owner is None else STYLES[owner % len(STYLES)])
    return frame
