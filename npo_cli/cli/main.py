"""The `npo` command: the one place where errors become messages and exit codes.

Exit codes: 0 success, 1 failure, 2 bad input, 130 stopped by a signal. With --json an error is one JSON line on stdout,
the last one. Heavy imports wait inside the commands.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextvars import copy_context
from functools import partial
from typing import Annotated, Any, NoReturn

import typer

from npo_cli.cli.commands import COMMANDS, DISTRIBUTED_COMMANDS, HELP_OPTIONS, GroupedCommands
from npo_cli.cli.options import JSON_FLAG, OLD_COMMANDS, suggest_new_option
from npo_cli.cli.terminal import (
    COMMAND_LINE,
    clear_loading,
    escape_for_terminal,
    is_terminal,
    print_data,
    print_status,
    show_loading,
)
from npo_cli.distributed.launch import read_launch_info
from npo_cli.distributed.process_group import current_group, join_job
from npo_cli.errors import NpoError, StoppedEarly
from npo_cli.session.startup import begin_process, ignore_deprecations

CommandLineError = typer.BadParameter.__mro__[2]
"""Base class of typer's errors about the command line, which typer does not export."""
BAD_PATH_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}

app = typer.Typer(
    name="npo",
    cls=GroupedCommands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP_OPTIONS,
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        from npo_cli import __version__

        print_data(f"npo {__version__}")
        raise typer.Exit


VersionOpt = Annotated[
    bool,
    typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
]


@app.callback()
def npo(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Near-Future Policy Optimization: GRPO that injects verified rollouts from later checkpoints of the same run.

    Workflow: train -> score-checkpoints -> sample-guide -> resume. Try `npo demo`; read `npo docs`.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; always leaves through SystemExit."""
    ignore_deprecations()
    begin_process()
    for name in ("stdout", "stderr"):
        # A closed stream discards its output: printing to None would go to the other stream.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        # Characters that the terminal's encoding lacks are printed as escapes instead of failing.
        with contextlib.suppress(AttributeError):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    args = sys.argv[1:] if args is None else list(args)
    if _shows_loading(args):
        show_loading()
    try:
        sys.exit(_run(args) or 0)
    except NpoError as error:
        _leave(error.message, error.hint, code=error.exit_code, args=args)
    except CommandLineError as error:
        if not args:
            error.show()  # `npo` alone prints the help page
            sys.exit(error.exit_code)
        _leave(*_describe_usage_error(error, args), code=error.exit_code, args=args)
    except OSError as error:
        code = 2 if error.errno in BAD_PATH_ERRNOS else 1
        hint = "check permissions, or choose another path"
        _leave(f"{error.strerror or error}: {error.filename}", hint, code=code, args=args)
    except Exception as error:  # a bug of npo or of a plug-in: one line, and how to see the traceback
        from npo_cli.registry import find_plug_in_line

        line = find_plug_in_line(error)
        hint = f"a plug-in took part: {line}" if line else "please report it"
        hint = f"NPO_DEBUG=1 shows where it happened; {hint}"
        _leave(f"{type(error).__name__}: {error}", hint, code=1, args=args)
    finally:
        clear_loading()
        current_group().finish()


def _shows_loading(args: Sequence[str]) -> bool:
    """Whether a command says that it is loading, which neither help pages nor JSON lines on a terminal do."""
    quiet = {*HELP_OPTIONS["help_option_names"], "--quiet", "-q"}
    if not args or args[0] not in COMMANDS or not quiet.isdisjoint(args):
        return False
    return not (JSON_FLAG in args and is_terminal(sys.stdout))


def _describe_usage_error(error: Any, args: Sequence[str]) -> tuple[str, str]:
    """Message and hint for a mistake on the command line; a renamed command or option is answered with the new one."""
    command, option = args[0], getattr(error, "option_name", None)
    if command in OLD_COMMANDS:
        return f"there is no command {command}: use {OLD_COMMANDS[command]}", OLD_COMMANDS[command]
    if command not in COMMANDS:
        return f"{error.format_message()}", "npo --help"
    new = suggest_new_option(command, option, args) if option else None
    if new:
        return f"npo {command} has no option {option}: use {new}", f"npo {command} --help"
    return f"{error.format_message()}", f"npo {command} --help"


def _run(args: Sequence[str]) -> int | None:
    """Run the command. Of several processes that a launcher started, each runs it, and rank 0 alone prints."""
    launch = read_launch_info()
    COMMAND_LINE.set(tuple(args))
    run = partial(typer.main.get_command(app).main, args, prog_name="npo", standalone_mode=False)
    command = partial(copy_context().run, run)  # --allow-code holds for this command only
    if launch is None:
        return command()
    if not args or args[0] not in DISTRIBUTED_COMMANDS:
        return command() if launch.rank == 0 else 0
    if launch.rank == 0:
        with join_job(launch):
            return command()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 ends the step and saves
    with (
        open(os.devnull, "w", encoding="utf-8") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
        join_job(launch),
    ):
        return command()


def _leave(message: str, hint: str, *, code: int, args: Sequence[str]) -> NoReturn:
    """Report an error, and leave: two lines on stderr, or with --json one line of JSON on stdout.

    That a signal stopped the command is on stderr in both cases: nobody may read stdout any more (SIGPIPE).
    """
    if current_group().reports_errors:
        if os.environ.get("NPO_DEBUG") == "1":
            print_status(traceback.format_exc())
        if JSON_FLAG in args:
            print_data(json.dumps({"record": "error", "error": message, "hint": hint, "exit_code": code}))
        if JSON_FLAG not in args or code == StoppedEarly.exit_code:
            label = "" if code == StoppedEarly.exit_code else "error: "
            print_status(f"{label}{_one_line(message)}", style="31")
            if hint:
                print_status(f"  try: {_one_line(hint)}", style="2", wraps=False)
    sys.exit(code)


def _one_line(text: str) -> str:
    return escape_for_terminal(" ".join(text.splitlines()))
