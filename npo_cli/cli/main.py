"""The `npo` command: the table of commands, and the one place where errors become messages and exit codes.

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
import warnings
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from npo_cli.api.stages import DEPRECATED
from npo_cli.cli.autonpo import autonpo
from npo_cli.cli.bench import bench
from npo_cli.cli.calibrate import calibrate
from npo_cli.cli.compare import compare
from npo_cli.cli.config_command import config
from npo_cli.cli.demo import demo
from npo_cli.cli.docs import docs
from npo_cli.cli.doctor import doctor
from npo_cli.cli.evaluate import evaluate
from npo_cli.cli.export import export
from npo_cli.cli.index import index
from npo_cli.cli.init import init
from npo_cli.cli.options import JSON_FLAG, OLD_COMMANDS, suggest_new_option
from npo_cli.cli.plan import plan
from npo_cli.cli.recipes import recipes
from npo_cli.cli.report import report
from npo_cli.cli.resume import resume
from npo_cli.cli.sample_guide import sample_guide
from npo_cli.cli.score_checkpoints import score_checkpoints
from npo_cli.cli.show import show
from npo_cli.cli.terminal import escape_for_terminal, print_data, print_status
from npo_cli.cli.train import train
from npo_cli.cli.verify import verify
from npo_cli.distributed.launch import read_launch_info
from npo_cli.distributed.process_group import current_group, join_job
from npo_cli.errors import NpoError, StoppedEarly
from npo_cli.session.startup import begin_process


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command, the group that it is listed in, and an example for its help page."""

    function: Callable[..., None]
    group: str
    example: str


START, WORKFLOW, AUTONPO, INSPECT = "Start a project", "Workflow", "AutoNPO", "Inspect a run"
COMPARE, TOOLS = "Compare", "Tools"
GROUPS = (START, WORKFLOW, AUTONPO, INSPECT, COMPARE, TOOLS)
COMMANDS = {
    "init": Command(function=init, group=START, example="npo init my-project"),
    "config": Command(function=config, group=START, example="npo config train.lr"),
    "train": Command(function=train, group=WORKFLOW, example="npo train micro runs/first train.num_steps=200"),
    "index": Command(function=index, group=WORKFLOW, example="npo index runs/first"),
    "score-checkpoints": Command(
        function=score_checkpoints,
        group=WORKFLOW,
        example="npo score-checkpoints runs/first --at 40 --candidates 60,80",
    ),
    "sample-guide": Command(
        function=sample_guide, group=WORKFLOW, example="npo sample-guide runs/first --at 40 --source 80 --name late"
    ),
    "resume": Command(
        function=resume, group=WORKFLOW, example="npo resume runs/first --at 40 --guide late --new-branch late"
    ),
    "autonpo": Command(function=autonpo, group=AUTONPO, example="npo autonpo runs/first --explain"),
    "show": Command(function=show, group=INSPECT, example="npo show runs/first rollouts --step 40"),
    "eval": Command(function=evaluate, group=INSPECT, example="npo eval runs/first --all"),
    "report": Command(function=report, group=INSPECT, example="npo report runs/first --out report.html"),
    "verify": Command(function=verify, group=INSPECT, example="npo verify runs/first"),
    "bench": Command(
        function=bench, group=COMPARE, example="npo bench micro --methods grpo,npo --seeds 3 --out runs/bench"
    ),
    "calibrate": Command(
        function=calibrate, group=COMPARE, example="npo calibrate runs/first --at 0,40 --candidates self,+20,+40,+100"
    ),
    "compare": Command(function=compare, group=COMPARE, example="npo compare runs/bench --threshold 0.8"),
    "recipes": Command(function=recipes, group=TOOLS, example="npo recipes micro"),
    "plan": Command(function=plan, group=TOOLS, example="npo plan smollm2-135m --gpus 2 --gpu-mem 24"),
    "export": Command(function=export, group=TOOLS, example="npo export runs/first --step 40 --out step-40"),
    "doctor": Command(function=doctor, group=TOOLS, example="npo doctor"),
    "demo": Command(function=demo, group=TOOLS, example="npo demo --out npo-demo"),
    "docs": Command(function=docs, group=TOOLS, example="npo docs glossary"),
}
DISTRIBUTED_COMMANDS = ("train", "score-checkpoints", "sample-guide", "resume", "eval")
"""Commands that several processes run together; rank 0 runs any other one alone."""
CommandLineError = typer.BadParameter.__mro__[2]
"""Base class of typer's errors about the command line, which typer does not export."""
BAD_PATH_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
COMMAND_WIDTH = 17


class GroupedCommands(TyperGroup):
    """Lists the commands of `npo --help` by group."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """One section per group, with aligned columns."""
        for group in GROUPS:
            with formatter.section(group):
                formatter.write_dl(
                    [
                        (name.ljust(COMMAND_WIDTH), self.commands[name].get_short_help_str(formatter.width))
                        for name, command in COMMANDS.items()
                        if command.group == group
                    ]
                )


app = typer.Typer(
    name="npo", cls=GroupedCommands, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)
for _name, _command in COMMANDS.items():
    app.command(_name, epilog=f"Example: {_command.example}")(_command.function)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        from npo_cli import __version__

        print_data(f"npo {__version__}")
        raise typer.Exit


@app.callback()
def npo(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Near-Future Policy Optimization: GRPO that injects verified rollouts from later checkpoints of the same run.

    Workflow: train -> score-checkpoints -> sample-guide -> resume. Try `npo demo`; read `npo docs`.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; always leaves through SystemExit."""
    warnings.filterwarnings("ignore", DEPRECATED, FutureWarning)
    begin_process()
    for name in ("stdout", "stderr"):
        # A closed stream discards its output: printing to None would go to the other stream.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        # Characters that the terminal's encoding lacks are printed as escapes instead of failing.
        with contextlib.suppress(AttributeError):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    args = sys.argv[1:] if args is None else list(args)
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
    except Exception as error:  # a bug of npo: one line, and how to see the traceback
        hint = "NPO_DEBUG=1 shows where it happened; please report it"
        _leave(f"{type(error).__name__}: {error}", hint, code=1, args=args)
    finally:
        current_group().finish()


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
    """Report an error, and leave: two lines on stderr, or with --json one line of JSON on stdout."""
    if current_group().reports_errors:
        if os.environ.get("NPO_DEBUG") == "1":
            print_status(traceback.format_exc())
        if JSON_FLAG in args:
            print_data(json.dumps({"record": "error", "error": message, "hint": hint, "exit_code": code}))
        else:
            label = "" if code == StoppedEarly.exit_code else "error: "
            print_status(f"{label}{_one_line(message)}", style="31")
            if hint:
                print_status(f"  try: {_one_line(hint)}", style="2")
    sys.exit(code)


def _one_line(text: str) -> str:
    return escape_for_terminal(" ".join(text.splitlines()))
