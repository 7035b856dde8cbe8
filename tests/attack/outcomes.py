"""What the workflow's commands leave, however often they were killed or failed: files without clocks."""

import contextlib
import hashlib
import json
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.attack.workflow import DONE, WorkflowCommand
from tests.helpers.warm_process import ForkServer

CLOCKED_FILES = {"costs.jsonl", "timings.jsonl", "events.jsonl", "npo_run.json", "log.txt"}
CLOCKED_FOLDERS = {"clocks"}
CLOCKED_KEYS = {
    *("time", "created", "saved", "saved_at", "seconds", "run_id"),
    *("sequence", "logs", "checksum", "overrides"),  # numbers of saves and of starts, sums over clocks
}


def words_of(command: WorkflowCommand) -> list[str]:
    words = command.words()
    assert words is not None
    return [str(word) for word in words]


def run_npo(
    warm: ForkServer, args: Sequence[str], folder: Path, *, kill_after: float | None = None, **options: Any
) -> int:
    """Exit code; -9 if it was killed."""
    child = warm.npo(*args, err=folder / "err", **options)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    code = child.wait()
    if code == 2 and any(words in child.read_stderr() for words in DONE):
        return 0
    assert code in (0, -signal.SIGKILL), f"{args}: {child.read_stderr()}"
    return code


def outcome(root: Path) -> dict[str, str]:
    """Digest of every file that does not hold clocks, without the path of its folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        is_clock = path.name in CLOCKED_FILES or not CLOCKED_FOLDERS.isdisjoint(name.parts) or path.suffix == ".head"
        if path.is_file() and not is_clock and not path.name.startswith("."):
            content = read_content(path)
            for spelling in (str(root), json.dumps(str(root))[1:-1]):
                content = content.replace(spelling.encode(), b"")
            found[name.as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def read_content(path: Path) -> bytes:
    """The bytes; JSON without clocks and run ids."""
    if path.suffix == ".jsonl":
        lines = [json.dumps(timeless(json.loads(line))) for line in path.read_text().splitlines()]
        # every start of a branch is a line
        return "\n".join(dict.fromkeys(lines) if path.name == "segments.jsonl" else lines).encode()
    if path.suffix == ".json" and path.parent.name != "out":
        return json.dumps(timeless(json.loads(path.read_text()))).encode()
    return path.read_bytes()


def timeless(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: timeless(value) for key, value in found.items() if key not in CLOCKED_KEYS}
    return [timeless(each) for each in found] if isinstance(found, list) else found


def list_differences(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Names of files that only one of two outcomes has, or that differ."""
    return sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))
