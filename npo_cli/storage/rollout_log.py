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

from npo_cli.distributed.process_group import on_main_rank
from npo_cli.errors import NpoError
from npo_cli.storage.files import (
    damaged_file_error,
    decode_record,
    encode_record,
    explain_full_disk,
    make_folder,
    to_row,
)
from npo_cli.storage.jsonl import AppendResult, append_bytes, measure_complete_size, parse_line, sync_log, truncate_file
from npo_cli.types.rollouts import Group, ImageRef, Message, Prompt, Rollout

LINE_HEAD = re.compile(rb'\{"step":(\d+),"num_groups":(\d+),')


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteRange:
    """Where one whole step lies in the file."""

    start: int
    """Byte of its first line."""
    end: int
    """Byte after its last newline."""


@dataclass(slots=True)
class RolloutLog:
    """The groups of every step of one branch. A missing file reads as empty."""

    path: Path
    _repaired: bool = field(default=False, init=False)
    _places: dict[int, ByteRange] = field(default_factory=dict, init=False)
    """Whole steps found so far."""
    _scanned: int = field(default=0, init=False)
    """Byte up to which the file was looked through."""

    @on_main_rank
    def write_step(self, step: int, groups: Sequence[Group]) -> AppendResult:
        """Add all groups of a step in one write, or compare them with those already there."""
        if not self._repaired:
            self.repair()
        lines = [encode_record(encode_group(group, step=step, num_groups=len(groups))) for group in groups]
        data = "".join(line + "\n" for line in lines).encode("ascii")
        place = self._look().get(step)
        if place is not None:
            return "same" if self._bytes(place) == data else "differs"
        with explain_full_disk(self.path):
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
            groups.append(decode_group(self._row(line, end=end), self.path))
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

    @on_main_rank
    def repair(self) -> int:
        """Cut off a torn line and a step that is not whole; returns the number of bytes removed."""
        self._repaired = True
        if not self.path.exists():
            return 0
        return truncate_file(self.path, max((place.end for place in self._look().values()), default=0))

    def sync(self) -> None:
        """Force every line down to the disk."""
        sync_log(self.path)

    def _look(self) -> dict[int, ByteRange]:
        """Find the steps written since the last look, from the head of each line alone."""
        if not self.path.exists() or self.path.stat().st_size == self._scanned:
            return self._places
        end_of_whole = measure_complete_size(self.path, start=self._scanned)
        with self.path.open("rb") as file:
            file.seek(self._scanned)
            start, num_seen, open_step = self._scanned, 0, None
            while file.tell() < end_of_whole:
                step, num_groups = self._head(file.readline(), end=file.tell())
                if open_step not in (None, step) or step in self._places:
                    raise self._damaged(f"the groups of step {step} are not together", end=file.tell())
                open_step, num_seen = step, num_seen + 1
                if num_seen == num_groups:
                    self._places[step] = ByteRange(start=start, end=file.tell())
                    start, num_seen, open_step = file.tell(), 0, None
                    self._scanned = start
        return self._places

    def _head(self, line: bytes, *, end: int) -> tuple[int, int]:
        found = LINE_HEAD.match(line)
        if found:
            return int(found.group(1)), int(found.group(2))
        row = self._row(line, end=end)
        return int(row["step"]), int(row["num_groups"])

    def _row(self, line: bytes, *, end: int) -> dict[str, Any]:
        row = parse_line(line)
        if row is None or not isinstance(row.get("step"), int) or not isinstance(row.get("num_groups"), int):
            raise self._damaged("a line is not a group", end=end)
        return row

    def _damaged(self, detail: str, *, end: int) -> NpoError:
        """`end`: byte after the bad line; its number is only counted now."""
        with self.path.open("rb") as file:
            number = file.read(end).count(b"\n")
        return damaged_file_error(f"{self.path}, line {number}", detail)

    def _bytes(self, place: ByteRange) -> bytes:
        with self.path.open("rb") as file:
            file.seek(place.start)
            return file.read(place.end - place.start)


def encode_float32(logps_T: Sequence[float]) -> list[float]:
    """The shortest decimals that name these float32 numbers: -1.2345677614212036 becomes -1.2345678."""
    import numpy as np

    return [float(str(number)) for number in np.asarray(logps_T, dtype=np.float32)]


def decode_float32(logps_T: Sequence[float | None]) -> tuple[float, ...]:
    """The float32 numbers that these decimals name; null reads as NaN."""
    import numpy as np

    return tuple(np.asarray(logps_T, dtype=np.float32).tolist())


def encode_group(group: Group, *, step: int, num_groups: int) -> dict[str, Any]:
    """One group as one line of the journal."""
    row = {
        "step": step,
        "num_groups": num_groups,
        "prompt": to_row(group.prompt) | {"images": encode_images(group.prompt.images)},
        "mix": group.injection_status,
        "own_accuracy": group.on_policy_accuracy,
        "rollouts": [_rollout_row(rollout) for rollout in group.rollouts],
    }
    if group.unused_guide_rollouts:
        row["spare"] = [_rollout_row(rollout) for rollout in group.unused_guide_rollouts]
    return row


def encode_images(images: Sequence[ImageRef]) -> list[dict[str, Any]]:
    """Pictures as references: whatever bytes are held stay where they are."""
    return [{name: value for name, value in to_row(image).items() if name != "data"} for image in images]


def decode_images(rows: Sequence[dict[str, Any]], source: Path) -> tuple[ImageRef, ...]:
    """The references in these rows."""
    return tuple(decode_record(ImageRef, row, source) for row in rows)


def _rollout_row(rollout: Rollout) -> dict[str, Any]:
    logps = rollout.behavior_logps
    return to_row(rollout) | {"behavior_logps": None if logps is None else encode_float32(logps)}


def decode_group(row: dict[str, Any], source: Path) -> Group:
    """The group in one line. Unknown fields are ignored."""
    try:
        prompt, rollouts = row["prompt"], row["rollouts"]
        messages = tuple(decode_record(Message, message, source) for message in prompt.get("messages", ()))
        images = decode_images(prompt.get("images", ()), source)
        return Group(
            prompt=replace(decode_record(Prompt, prompt, source), messages=messages, images=images),
            rollouts=tuple(_rollout_of(rollout, source) for rollout in rollouts),
            injection_status=row.get("mix", "off"),
            on_policy_accuracy=row.get("own_accuracy"),
            unused_guide_rollouts=tuple(_rollout_of(rollout, source) for rollout in row.get("spare", ())),
        )
    except (KeyError, AttributeError, TypeError) as error:
        raise damaged_file_error(source, "a line is not a group") from error


def _rollout_of(row: dict[str, Any], source: Path) -> Rollout:
    found = decode_record(Rollout, row, source)
    logps = None if found.behavior_logps is None else decode_float32(found.behavior_logps)
    return replace(found, response_ids=tuple(found.response_ids), behavior_logps=logps)
