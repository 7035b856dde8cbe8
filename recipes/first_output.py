"""Time from Enter to the first output of every command on a terminal, beside that of importing typer and rich.

    python recipes/first_output.py [--turns 5] [COMMAND ...]

Each turn starts `python -c "import typer, rich"` and then every command, in a terminal of its own and an empty folder,
and kills the command at its first byte. Quoted are medians over the turns of wall clock and of CPU seconds of the
process, and of the difference to the import of the same turn; CPU seconds are the ones to read on a busy machine. One
turn before the first is not counted: it writes byte code and fills the cache of files.
"""

import argparse
import contextlib
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from npo_cli.cli.commands import COMMANDS

BASELINE = "import typer, rich"
ENDED = "print('ended', flush=True)"


Times = tuple[float, float]
"""Wall clock and CPU seconds."""


def time_first_output(code: str, args: Sequence[str]) -> Times:
    """Until `python -c CODE ARGS` writes something to its terminal."""
    ours, theirs = pty.openpty()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", code, *args],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env=os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"},
        )
        os.close(theirs)
        with contextlib.closing(os.fdopen(ours, "rb", buffering=0)) as terminal:
            first = terminal.read(1)
            seconds = time.perf_counter() - began
            process.kill()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if not first:
        raise SystemExit(f"no output: {code} {' '.join(args)}")
    return seconds, usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure, and print a line per command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", default=list(COMMANDS))
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    run = "from npo_cli.cli.main import main; main()"
    seconds: dict[str, list[Times]] = {name: [] for name in ("import", *given.commands)}
    for turn in range(given.turns + 1):
        for name, times in seconds.items():
            taken = (
                time_first_output(f"{BASELINE}; {ENDED}", ())
                if name == "import"
                else time_first_output(run, (name, "nowhere"))
            )
            if turn:
                times.append(taken)
    print(f"{'':18} {'wall':>7} {'more':>7} {'CPU':>7} {'more':>7}")
    for name, times in seconds.items():
        cells = []
        for kind in range(2):
            own, base = ([one[kind] for one in each] for each in (times, seconds["import"]))
            more = statistics.median(one - other for one, other in zip(own, base, strict=True))
            cells += [f"{statistics.median(own):7.3f}", f"{more:7.3f}"]
        print(f"{name:18} {' '.join(cells)}")


if __name__ == "__main__":
    main()
