"""Slips on purpose: `npo` in this process, and what every refusal owes its user."""

import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from npo_cli.cli.main import main
from npo_cli.storage.layout import TEXT_LOG_FILE
from npo_cli.storage.log_head import rewrite_head

SMALL = (
    *("train.num_steps=4", "train.save_every=2", "train.prompts_per_step=4", "train.group_size=4"),
    *("task.pool_size=16", "task.heldout_size=4", "eval.every=0", "model.threads=1"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandResult:
    """What one command left."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error, without its label."""
        return self.err.splitlines()[-2].removeprefix("error: ")

    @property
    def hint(self) -> str:
        return self.err.splitlines()[-1].removeprefix("  try: ")


def npo(*args: object) -> CommandResult:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main([str(arg) for arg in args])
    return CommandResult(code=left.value.code, out=out.getvalue(), err=err.getvalue())


def json_rows(text: str) -> list[dict]:
    """The records that `--json` prints, without the verdict."""
    rows = [json.loads(line) for line in text.splitlines()]
    return [row for row in rows if row["record"] != "conclusion"]


def assert_refused(*args: object, beside: Path, code: int = 2) -> CommandResult:
    """A command that must be refused: two lines, its exit code, no data, and nothing written in `beside`.

    Before them `resume` and `replay` name the branch."""
    before = folder_digests(beside)
    result = npo(*args)
    assert (result.code, result.out) == (code, "")
    *named, first, second = result.err.splitlines()
    assert len(named) <= (args[0] in ("resume", "replay")), named  # which branch it is
    assert first.startswith("error: ")
    assert second.startswith("  try: ")
    assert len(second) > len("  try: ")
    assert "Traceback" not in result.err
    assert not re.search(r"\b(npo \S+ RUN\b|please report)", result.err)
    assert folder_digests(beside) == before
    return result


def folder_digests(folder: Path) -> dict[str, str]:
    """Every file by name with a digest, folders included; the lock is no content, log.txt has the error."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if path.name not in (".lock", TEXT_LOG_FILE)
    }


def copy_run(run: Path, folder: Path, name: str = "run") -> Path:
    """A copy to damage."""
    shutil.copytree(run, folder / name)
    return folder / name


def damage_file(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text(encoding="utf-8")
    after = change(before)
    assert after != before, f"the edit of {path} changed nothing"
    path.write_text(after, encoding="utf-8")


def edit_file(path: Path, change: Callable[[str], str]) -> None:
    """A file as if it had been written so: a log's head fits, a recipe has no checksum."""
    if path.suffix == ".yaml":
        damage_file(path, lambda text: text.partition("# checksum")[0])
    damage_file(path, change)
    if path.suffix == ".jsonl":
        rewrite_head(path, is_accepted=True)


def set_fields(path: Path, **fields: object) -> None:
    """A JSON document with other values."""
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | fields), encoding="utf-8")
