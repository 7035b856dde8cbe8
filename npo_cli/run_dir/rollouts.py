"""rollouts.jsonl: one line a group, the groups of a step together, every token and log-probability kept.

Letters: P groups of a step, T tokens. Log-probabilities are float32, written as the shortest decimal that names
that float32 and read back as the same float32. A step counts when all its `num_groups` lines are there: a step
cut short by a dead writer is ignored by readers and cut off by the next writer.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from npo_cli.errors import NpoError
from npo_cli.records import Group, ImageRef, Message, Prompt, Rollout
from npo_cli.run_dir.files import build, damaged, encode, full_disk_explained, make_folder, row_of
from npo_cli.run_dir.journal import Outcome, append_bytes, cut_at, parsed, sync_lines, whole_size

HEAD = re.compile(rb'\{"step":(\d+),"num_groups":(\d+),')


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one whole step lies in the file."""

    start: int
    """Byte of its first line."""
    end: int
    """Byte after its last newline."""


@dataclass(slots=True)
class RolloutJournal:
    """The groups of every step of one branch. A missing file reads as empty."""

    path: Path
    _repaired: bool = field(default=False, init=False)
    _places: dict[int, Place] = field(default_factory=dict, init=False)
    """Whole steps found so far."""
    _scanned: int = field(default=0, init=False)
    """Byte up to which the file was looked through."""

    def write_step(self, step: int, groups: Sequence[Group]) -> Outcome:
        """Add all groups of a step in one write, or compare them with those already there."""
        if not self._repaired:
            self.repair()
        lines = [encode(group_row(group, step=step, num_groups=len(groups))) for group in groups]
        data = "".join(line + "\n" for line in lines).encode("ascii")
        place = self._look().get(step)
        if place is not None:
            return "same" if self._bytes(place) == data else "differs"
        with full_disk_explained(self.path):
            make_folder(self.path.parent)
            append_bytes(self.path, data)
        return "written"

    def read_step(self, step: int) -> tuple[Group, ...] | None:
        """The groups of a step as they were written; None if the step is not whole."""
        place = self._look().get(step)
        if place is None:
            return None
        groups, end = [], place.start
        for line in self._bytes(place).splitlines(keepends=True):
            end += len(line)
            groups.append(group_of(self._row(line, end=end), self.path))
        return tuple(groups)

    def steps(self) -> tuple[int, ...]:
        """Steps whose groups are all there, in the order written."""
        return tuple(self._look())

    def iter_groups(self, step: int | None = None, prompt_id: str | None = None) -> Iterator[tuple[int, Group]]:
        """Pairs (step, group) of whole steps, oldest first, where asked of one step or one prompt only."""
        for found in self.steps() if step is None else (step,):
            for group in self.read_step(found) or ():
                if prompt_id is None or group.prompt.prompt_id == prompt_id:
                    yield found, group

    def repair(self) -> int:
        """Cut off a torn line and a step that is not whole; returns the number of bytes removed."""
        self._repaired = True
        if not self.path.exists():
            return 0
        return cut_at(self.path, max((place.end for place in self._look().values()), default=0))

    def sync(self) -> None:
        """Force every line down to the disk."""
        sync_lines(self.path)

    def _look(self) -> dict[int, Place]:
        """Find the steps written since the last look, from the head of each line alone."""
        if not self.path.exists() or self.path.stat().st_size == self._scanned:
            return self._places
        end_of_whole = whole_size(self.path, start=self._scanned)
        with self.path.open("rb") as file:
            file.seek(self._scanned)
            start, num_seen, open_step = self._scanned, 0, None
            while file.tell() < end_of_whole:
                step, num_groups = self._head(file.readline(), end=file.tell())
                if open_step not in (None, step) or step in self._places:
                    raise self._damaged(f"the groups of step {step} are not together", end=file.tell())
                open_step, num_seen = step, num_seen + 1
                if num_seen == num_groups:
                    self._places[step] = Place(start=start, end=file.tell())
                    start, num_seen, open_step = file.tell(), 0, None
                    self._scanned = start
        return self._places

    def _head(self, line: bytes, *, end: int) -> tuple[int, int]:
        found = HEAD.match(line)
        if found:
            return int(found.group(1)), int(found.group(2))
        row = self._row(line, end=end)
        return int(row["step"]), int(row["num_groups"])

    def _row(self, line: bytes, *, end: int) -> dict[str, Any]:
        row = parsed(line)
        if row is None or not isinstance(row.get("step"), int) or not isinstance(row.get("num_groups"), int):
            raise self._damaged("a line is not a group", end=end)
        return row

    def _damaged(self, detail: str, *, end: int) -> NpoError:
        """`end`: byte after the bad line; its number is only counted now."""
        with self.path.open("rb") as file:
            number = file.read(end).count(b"\n")
        return damaged(f"{self.path}, line {number}", detail)

    def _bytes(self, place: Place) -> bytes:
        with self.path.open("rb") as file:
            file.seek(place.start)
            return file.read(place.end - place.start)


def shortest_float32(logps_T: Sequence[float]) -> list[float]:
    """The shortest decimals that name these float32 numbers: -1.2345677614212036 becomes -1.2345678."""
    import numpy as np

    return [float(str(number)) for number in np.asarray(logps_T, dtype=np.float32)]


def exact_float32(logps_T: Sequence[float | None]) -> tuple[float, ...]:
    """The float32 numbers that these decimals name; null reads as NaN."""
    import numpy as np

    return tuple(np.asarray(logps_T, dtype=np.float32).tolist())


def group_row(group: Group, *, step: int, num_groups: int) -> dict[str, Any]:
    """One group as one line of the journal."""
    row = {
        "step": step,
        "num_groups": num_groups,
        "prompt": row_of(group.prompt) | {"images": image_rows(group.prompt.images)},
        "mix": group.mix,
        "own_accuracy": group.own_accuracy,
        "rollouts": [_rollout_row(rollout) for rollout in group.rollouts],
    }
    if group.spare:
        row["spare"] = [_rollout_row(rollout) for rollout in group.spare]
    return row


def image_rows(images: Sequence[ImageRef]) -> list[dict[str, Any]]:
    """Pictures as references: whatever bytes are held stay where they are."""
    return [{name: value for name, value in row_of(image).items() if name != "data"} for image in images]


def images_of(rows: Sequence[dict[str, Any]], source: Path) -> tuple[ImageRef, ...]:
    """The references in these rows."""
    return tuple(build(ImageRef, row, source) for row in rows)


def _rollout_row(rollout: Rollout) -> dict[str, Any]:
    logps = rollout.behavior_logps
    return row_of(rollout) | {"behavior_logps": None if logps is None else shortest_float32(logps)}


def group_of(row: dict[str, Any], source: Path) -> Group:
    """The group in one line. Unknown fields are ignored."""
    try:
        prompt, rollouts = row["prompt"], row["rollouts"]
        messages = tuple(build(Message, message, source) for message in prompt.get("messages", ()))
        images = images_of(prompt.get("images", ()), source)
        return Group(
            prompt=replace(build(Prompt, prompt, source), messages=messages, images=images),
            rollouts=tuple(_rollout_of(rollout, source) for rollout in rollouts),
            mix=row.get("mix", "off"),
            own_accuracy=row.get("own_accuracy"),
            spare=tuple(_rollout_of(rollout, source) for rollout in row.get("spare", ())),
        )
    except (KeyError, AttributeError, TypeError) as error:
        raise damaged(source, "a line is not a group") from error


def _rollout_of(row: dict[str, Any], source: Path) -> Rollout:
    found = build(Rollout, row, source)
    logps = None if found.behavior_logps is None else exact_float32(found.behavior_logps)
    return replace(found, response_ids=tuple(found.response_ids), behavior_logps=logps)
