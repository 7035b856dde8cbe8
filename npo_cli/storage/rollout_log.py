"""rollouts.jsonl: one line per group, the groups of a step together, with every token and log-probability.

T tokens. Log-probabilities are a column: base64 of float32 numbers. A step counts when all its `num_groups` lines are
there: a step cut short by a killed writer is ignored by readers and removed by the next writer.
"""

import base64
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from typing import Any, get_args

from npo_cli.distributed.process_group import current_group, on_main_rank
from npo_cli.errors import NpoError
from npo_cli.storage.background import BackgroundWrite
from npo_cli.storage.files import (
    cached_by_file,
    check_range,
    damaged_file_error,
    decode_record,
    encode_record,
    explain_write_error,
    to_row,
)
from npo_cli.storage.jsonl import AppendResult, append_bytes, cut_log, measure_complete_size
from npo_cli.storage.log_head import check_log, parse_line, start_log
from npo_cli.types.rollouts import (
    Group,
    GroupOutcome,
    ImageRef,
    InjectionStatus,
    Message,
    Prompt,
    Rollout,
    TokenSpan,
)

TOKEN_FIELDS = re.compile(rb'"response_ids":\[[^\]]*\],(?:"behavior_logps":"[^"]*",)?')
"""Within a JSON string the quotes would be escaped. Fields in another order are parsed for nothing."""
LINE_START = re.compile(rb'\{"step":(\d+),"num_groups":(\d+),')
ROLLOUT_FIELDS = tuple(spec.name for spec in fields(Rollout))
LOGP_SLACK = 0.01
"""Rounding may lift the log-probability of a certain token above 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteRange:
    """Position of one complete step in the file."""

    start: int
    """Byte of its first line."""
    end: int
    """Byte after its last newline."""
    line: int
    """Number of its first line, from 1."""


@dataclass(slots=True)
class RolloutLog:
    """The groups of every step of one branch. A missing file reads as empty."""

    path: Path
    _repaired: bool = field(default=False, init=False)
    _ranges: dict[int, ByteRange] = field(default_factory=dict, init=False)
    """Complete steps found so far."""
    _num_lines: int = field(default=0, init=False)
    """Lines of these steps."""
    _scanned: int = field(default=0, init=False)
    """Byte up to which the file was scanned."""
    _writing: BackgroundWrite[AppendResult] | None = field(default=None, init=False)

    def start_writing(self, step: int, groups: Sequence[Group]) -> None:
        """`write_step` in a thread. Every other call waits for it first, and raises its error.

        Several ranks write together, without a thread.
        """
        self.wait()
        if current_group().world_size > 1:
            self.write_step(step, groups)
        else:
            self._writing = BackgroundWrite(lambda: self._write(step, groups), name="rollout writer")

    def wait(self) -> None:
        """The step that is being written is in the file when this returns, or its error is raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.wait()

    @on_main_rank
    def write_step(self, step: int, groups: Sequence[Group]) -> AppendResult:
        """Append all groups of a step in one write, or compare them with the recorded ones."""
        self.wait()
        return self._write(step, groups)

    def _write(self, step: int, groups: Sequence[Group]) -> AppendResult:
        if not self._repaired:
            self._repair()
        lines = [encode_record(encode_group(group, step=step, num_groups=len(groups))) for group in groups]
        data = "".join(line + "\n" for line in lines).encode("ascii")
        recorded = self._scan_new().get(step)
        if recorded is not None:
            return "same" if self._bytes(recorded) == data else "differs"
        with explain_write_error(self.path):
            start_log(self.path)
            append_bytes(self.path, data)
        return "written"

    def read_step(self, step: int) -> tuple[Group, ...] | None:
        """The groups of a step; None if the step is not complete."""
        if step not in self._scan():
            return None
        return tuple(self._decode(line, number) for line, number in self._lines(step))

    def steps(self) -> tuple[int, ...]:
        """Steps whose groups are all there, in the order written."""
        return tuple(self._scan())

    def iter_groups(self, step: int | None = None, prompt_id: str | None = None) -> Iterator[tuple[int, Group]]:
        """Pairs (step, group) of complete steps, oldest first; of one step or one prompt if given."""
        spelled = b"" if prompt_id is None else json.dumps(prompt_id).encode("ascii")
        for found in self.steps() if step is None else (step,):
            for line, number in self._lines(found):
                # Decoding a line takes far longer than searching it.
                if spelled in line:
                    group = self._decode(line, number)
                    if prompt_id in (None, group.prompt.prompt_id):
                        yield found, group

    def iter_outcomes(self, step: int) -> Iterator[GroupOutcome]:
        """The groups of a complete step without tokens and log-probabilities, which are not even parsed."""
        for line, number in self._lines(step):
            row = self._row(TOKEN_FIELDS.sub(b"", line), number)
            try:
                own = [rollout for rollout in row["rollouts"] if not _is_off_policy(rollout)]
                yield GroupOutcome(
                    prompt_id=row["prompt"]["prompt_id"],
                    step=step,
                    num_rollouts=len(own),
                    num_correct=sum(rollout["verdict"] == "correct" and rollout["finished"] for rollout in own),
                    has_guide=len(own) < len(row["rollouts"]),
                )
            except (KeyError, TypeError, AttributeError) as error:
                raise self._damaged("a line is not a group", number) from error

    @on_main_rank
    def repair(self) -> int:
        """Remove a torn line and an incomplete step; returns the number of bytes removed."""
        self.wait()
        return self._repair()

    def _repair(self) -> int:
        self._repaired = True
        recorded = self._scan_new().values()
        return cut_log(self.path, max((step.end for step in recorded), default=0)) if self.path.exists() else 0

    def _scan(self) -> dict[int, ByteRange]:
        self.wait()
        return self._scan_new()

    def _scan_new(self) -> dict[int, ByteRange]:
        """Find the steps written since the last scan, from the start of each line alone."""
        if not self._scanned:
            check_log(self.path)
        if not self.path.exists() or self.path.stat().st_size == self._scanned:
            return self._ranges
        end_of_complete = measure_complete_size(self.path, start=self._scanned)
        with self.path.open("rb") as file:
            file.seek(self._scanned)
            start, num_seen, open_step = self._scanned, 0, None
            while file.tell() < end_of_complete:
                number = self._num_lines + num_seen + 1
                step, num_groups = self._numbers(file.readline(), number)
                if open_step not in (None, step) or step in self._ranges:
                    raise self._damaged(f"the groups of step {step} are not together", number)
                open_step, num_seen = step, num_seen + 1
                if num_seen == num_groups:
                    self._ranges[step] = ByteRange(start=start, end=file.tell(), line=self._num_lines + 1)
                    self._num_lines += num_groups
                    start, num_seen, open_step = file.tell(), 0, None
                    self._scanned = start
        return self._ranges

    def _numbers(self, line: bytes, number: int) -> tuple[int, int]:
        found = LINE_START.match(line)
        if found:
            return int(found.group(1)), int(found.group(2))
        row = self._row(line, number)
        return int(row["step"]), int(row["num_groups"])

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        row = parse_line(line)
        if row is None or not isinstance(row.get("step"), int) or not isinstance(row.get("num_groups"), int):
            raise self._damaged("a line is not a group", number)
        return row

    def _decode(self, line: bytes, number: int) -> Group:
        return decode_group(self._row(line, number), f"{self.path}, line {number}")

    def _damaged(self, detail: str, number: int) -> NpoError:
        return damaged_file_error(f"{self.path}, line {number}", detail)

    def _lines(self, step: int) -> Iterator[tuple[bytes, int]]:
        """Each line of a complete step, with its number in the file; none of another step."""
        recorded = self._scan().get(step)
        if recorded is not None:
            yield from zip(self._bytes(recorded).splitlines(keepends=True), count(recorded.line))

    def _bytes(self, lines: ByteRange) -> bytes:
        with self.path.open("rb") as file:
            file.seek(lines.start)
            return file.read(lines.end - lines.start)


def _is_off_policy(row: dict[str, Any]) -> bool:
    """`Rollout.is_off_policy` of a rollout that is not decoded."""
    return any(part.get("source", "own") != "own" for part in row.get("spans") or (row,))


@cached_by_file(lambda path: path)
def open_rollouts(path: Path) -> RolloutLog:
    """A log to read from, whose steps are looked for once."""
    return RolloutLog(path)


def encode_float32(logps_T: Sequence[float]) -> str:
    """Base64 of these numbers as float32, little-endian."""
    import numpy as np

    return base64.b64encode(np.asarray(logps_T, dtype="<f4").tobytes()).decode("ascii")


def decode_float32(column: str) -> tuple[float, ...]:
    """The float32 numbers in a column. Raises ValueError for another text."""
    import numpy as np

    return tuple(np.frombuffer(base64.b64decode(column, validate=True), dtype="<f4").tolist())


def encode_group(group: Group, *, step: int, num_groups: int) -> dict[str, Any]:
    """One group as one line of the log."""
    row = {
        "step": step,
        "num_groups": num_groups,
        "prompt": _encode_prompt(group.prompt),
        "injection_status": group.injection_status,
        "on_policy_accuracy": group.on_policy_accuracy,
        "rollouts": [encode_rollout(rollout) for rollout in group.rollouts],
    }
    if group.unused_guide_rollouts:
        row["unused_guide_rollouts"] = [encode_rollout(rollout) for rollout in group.unused_guide_rollouts]
    return row


def _encode_prompt(prompt: Prompt) -> dict[str, Any]:
    row = to_row(replace(prompt, columns={})) | {"images": encode_images(prompt.images)}
    del row["columns"]
    return row


def encode_images(images: Sequence[ImageRef]) -> list[dict[str, Any]]:
    """Images as references, without their bytes."""
    return [{name: value for name, value in to_row(image).items() if name != "data"} for image in images]


def decode_images(rows: Sequence[dict[str, Any]], source: Path | str) -> tuple[ImageRef, ...]:
    """The references in these rows."""
    return tuple(decode_record(ImageRef, row, source) for row in rows)


def encode_rollout(rollout: Rollout) -> dict[str, Any]:
    """A rollout as JSON; the spans of a plain on-policy one are left out, and reward_parts where there are none."""
    logps = rollout.behavior_logps
    row = {name: getattr(rollout, name) for name in ROLLOUT_FIELDS}
    row["behavior_logps"] = None if logps is None else encode_float32(logps)
    for name in ("spans", "reward_parts"):
        if not row[name]:
            del row[name]
    return row


def decode_group(row: dict[str, Any], source: Path | str) -> Group:
    """The group in one line. Unknown fields are ignored."""
    try:
        prompt, rollouts = row["prompt"], row["rollouts"]
        messages = tuple(decode_record(Message, message, source) for message in prompt.get("messages", ()))
        images = decode_images(prompt.get("images", ()), source)
        group = Group(
            prompt=replace(decode_record(Prompt, prompt, source), messages=messages, images=images),
            rollouts=tuple(decode_rollout(rollout, source) for rollout in rollouts),
            injection_status=row.get("injection_status", "off"),
            on_policy_accuracy=row.get("on_policy_accuracy"),
            unused_guide_rollouts=tuple(
                decode_rollout(rollout, source) for rollout in row.get("unused_guide_rollouts", ())
            ),
        )
        if group.injection_status not in get_args(InjectionStatus):
            raise damaged_file_error(source, f"injection_status is {group.injection_status!r}")
        check_range(group, ["on_policy_accuracy"], source, high=1)
        return group
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise damaged_file_error(source, "a line is not a group") from error


def check_rewards(rollout: Rollout, source: Path | str) -> None:
    """Refuse a reward, or part of one, that is not a finite number."""
    for name, value in {"reward": rollout.reward, **rollout.reward_parts}.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and math.isfinite(value)):
            raise damaged_file_error(source, f"{name} is {value!r}")


def decode_rollout(row: dict[str, Any], source: Path | str) -> Rollout:
    """The rollout in one row, checked: rewards are finite, log-probabilities one per token and at most 0."""
    spans = tuple(decode_record(TokenSpan, span, source) for span in row.get("spans", ()))
    for span in spans:
        check_range(span, ("sampler_step",), source)
        check_range(span, ("weight",), source, high=1)
    logps = _decode_logps(row, source)
    rollout = decode_record(Rollout, row | {"spans": (), "behavior_logps": logps}, source)
    if logps is not None and len(logps) != len(rollout.response_ids):
        raise damaged_file_error(source, f"{len(logps)} log-probabilities for {len(rollout.response_ids)} tokens")
    check_rewards(rollout, source)
    if logps and max(logps) > LOGP_SLACK:
        raise damaged_file_error(source, f"a log-probability is {max(logps)}")
    check_range(rollout, ("slot", "sampler_step", "mean_entropy"), source)
    return replace(rollout, response_ids=tuple(rollout.response_ids), spans=spans)


def _decode_logps(row: dict[str, Any], source: Path | str) -> tuple[float, ...] | None:
    column = row["behavior_logps"]
    try:
        return None if column is None else decode_float32(column)
    except (TypeError, ValueError) as error:
        raise damaged_file_error(source, "behavior_logps is not a column of float32 numbers") from error
