"""Run the commands of README.md and the tutorial, and put what they print into the pages.

    python docs/shown.py FOLDER [NAME ...]

Runs are made in FOLDER and reused if they exist. Every block after `<!-- shown: NAME -->` is replaced; with NAMEs only
those. Takes some ten minutes on one core; on a busy machine the seconds in the tables say so.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs/tutorial").glob("*.md")))
WIDTH = "80"
Lines = list[str]


def table(title: str, *, first: int | None = None, last: int = 0, with_title: bool = True) -> Callable[[Lines], Lines]:
    """The printed table whose title begins so, up to the next empty line: header, `first` rows, dots, `last` rows."""

    def pick(lines: Lines) -> Lines:
        begin = next(index for index, line in enumerate(lines) if line.startswith(title))
        end = next((index for index in range(begin + 1, len(lines)) if not lines[index].strip()), len(lines))
        head, rows = lines[begin : begin + 2], lines[begin + 2 : end]
        if first is not None and len(rows) > first + last:
            rows = [*rows[:first], "...", *rows[len(rows) - last :]]
        return [*head[0 if with_title else 1 :], *rows]

    return pick


def ends(pick: Callable[[Lines], Lines]) -> Callable[[Lines], Lines]:
    """The sentence, what `pick` takes of the rest, and the next command."""

    def picked(lines: Lines) -> Lines:
        gap = lines.index("")
        return [*lines[:gap], "", *pick(lines[gap + 1 : -1]), "", lines[-1]]

    return picked


COMMANDS: dict[str, tuple[str, Callable[[Lines], Lines]]] = {
    "demo": ("demo", table("Cost of reaching")),
    "train": ("train micro runs/a", ends(table("Training"))),
    "index": ("index runs/a", ends(table("Checkpoints", first=5, last=1))),
    "score": ("score-checkpoints runs/a --at 40 --candidates 60,80", ends(table("Guide candidates"))),
    "sample": ("sample-guide runs/a --at 40 --source 80 --name late", ends(table("Guide caches"))),
    "resume": ("resume runs/a --at 40 --guide late --new-branch late", ends(table("Training"))),
    "costs": ("show runs/a costs", ends(table("Cost of reaching"))),
    "train-autonpo": ("train micro-auto runs/b --autonpo", ends(table("Training"))),
    "autonpo": ("autonpo runs/b", ends(table("What AutoNPO did", first=10))),
    "rollback": ("autonpo runs/b --full", table("Rollback distances")),
    "explain": (
        "autonpo runs/a --explain autonpo.trigger.max_reward_gain_se=2 autonpo.trigger.min_entropy_drop_se=1",
        lambda lines: lines[:14],
    ),
}


def output_of(name: str, folder: Path) -> Lines:
    """What the command prints on stdout; kept in a file beside the runs, so that a second call is free."""
    command, _ = COMMANDS[name]
    path = folder / (re.sub(r"[^\w.=-]+", "_", command) + ".txt")
    if not path.exists():
        print("npo", command, flush=True)
        made = subprocess.run(
            [sys.executable, "-m", "npo_cli", *command.split()],
            cwd=folder,
            env={**os.environ, "COLUMNS": WIDTH, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        path.write_text(made.stdout, encoding="utf-8")
    return [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]


def fill(page: Path, shown: dict[str, Lines]) -> None:
    """Replace the blocks of a page."""

    def block(found: re.Match[str]) -> str:
        if found[1] not in shown:
            return found[0]
        body = "\n".join(shown[found[1]])
        return f"<!-- shown: {found[1]} -->\n```text\n{body}\n```\n"

    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<!-- shown: ([a-z-]+) -->\n(?:```text\n.*?```\n)?", block, text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(COMMANDS)}")
    options = parser.parse_args(args)
    options.folder.mkdir(parents=True, exist_ok=True)
    names = options.names or list(COMMANDS)
    shown = {name: COMMANDS[name][1](output_of(name, options.folder)) for name in names}
    for page in PAGES:
        fill(page, shown)


if __name__ == "__main__":
    main()
