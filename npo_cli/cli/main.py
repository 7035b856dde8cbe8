"""The `npo` command: doors by name, and the one place where errors become words and exit codes.

Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped by a signal. Heavy imports wait inside the doors.
"""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from contextvars import copy_context
from functools import partial
from typing import Annotated

import typer

from npo_cli.cli.autonpo import autonpo
from npo_cli.cli.bench import bench
from npo_cli.cli.compare import compare
from npo_cli.cli.demo import demo
from npo_cli.cli.doctor import doctor
from npo_cli.cli.evaluate import evaluate
from npo_cli.cli.export import export
from npo_cli.cli.index import index
from npo_cli.cli.plan import plan
from npo_cli.cli.recipes import recipes
from npo_cli.cli.report import report
from npo_cli.cli.resume import resume
from npo_cli.cli.sample_guide import sample_guide
from npo_cli.cli.score_checkpoints import score_checkpoints
from npo_cli.cli.score_sources import score_sources
from npo_cli.cli.show import show
from npo_cli.cli.terminal import escape_for_terminal, print_data, print_status
from npo_cli.cli.train import train
from npo_cli.distributed.launch import read_launch_info
from npo_cli.errors import NpoError, StoppedEarly

COMMANDS = {
    "train": train,
    "index": index,
    "score-checkpoints": score_checkpoints,
    "score-sources": score_sources,
    "sample-guide": sample_guide,
    "resume": resume,
    "autonpo": autonpo,
    "bench": bench,
    "eval": evaluate,
    "show": show,
    "compare": compare,
    "export": export,
    "report": report,
    "recipes": recipes,
    "plan": plan,
    "doctor": doctor,
    "demo": demo,
}
CommandLineError = typer.BadParameter.__mro__[2]
"""What every slip on a command line is to typer, which exports no name for it."""
BAD_PATH_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
app = typer.Typer(name="npo", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
for _name, _door in COMMANDS.items():
    app.command(_name)(_door)


def _version(wanted: bool) -> None:
    if wanted:
        from npo_cli import __version__

        print_data(f"npo {__version__}")
        raise typer.Exit


@app.callback()
def npo(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Near-Future Policy Optimization: a training run's own future teaches its past.

    The circle: train, index, score-checkpoints, sample-guide, resume. `npo demo` goes round it once.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; always leaves through SystemExit."""
    for name in ("stdout", "stderr"):
        # A closed stream swallows: printing to none at all would go to the other one.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open to the end
        # A terminal of few letters shows the others as escapes instead of failing.
        with contextlib.suppress(AttributeError):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    args = sys.argv[1:] if args is None else list(args)
    try:
        sys.exit(_run(args) or 0)
    except NpoError as error:
        label = "" if isinstance(error, StoppedEarly) else "error: "
        _explain(f"{label}{error.message}", error.hint)
        sys.exit(error.exit_code)
    except CommandLineError as error:
        if not args:  # the bare command asks what there is
            error.show()
        else:
            door = f" {args[0]}" if args[0] in COMMANDS else ""
            _explain(f"error: {error.format_message()}", f"npo{door} --help")
        sys.exit(error.exit_code)
    except OSError as error:  # the world's, where no room had better words
        _explain(f"error: {error.strerror or error}: {error.filename}", "mend its rights, or name another path")
        sys.exit(2 if error.errno in BAD_PATH_ERRNOS else 1)
    except Exception as error:  # the house's own fault: one line, and how to see more
        _explain(f"error: {type(error).__name__}: {error}", "NPO_DEBUG=1 shows where it happened; please report it")
        sys.exit(1)


def _run(args: Sequence[str]) -> int | None:
    """The command; where a launcher started several processes, rank 0 runs it and the others follow."""
    place = read_launch_info()
    main = partial(typer.main.get_command(app).main, args, prog_name="npo", standalone_mode=False)
    command = partial(copy_context().run, main)  # --allow-code holds for this command only
    if place is None:
        return command()
    from npo_cli.session.worker_main import run_leader, run_worker

    return run_leader(place, command) if place.rank == 0 else run_worker(place)


def _explain(message: str, hint: str) -> None:
    if os.environ.get("NPO_DEBUG") == "1":
        print_status(traceback.format_exc())
    print_status(_one_line(message), style="31")
    if hint:
        print_status(f"  try: {_one_line(hint)}", style="2")


def _one_line(text: str) -> str:
    return escape_for_terminal(" ".join(text.splitlines()))
