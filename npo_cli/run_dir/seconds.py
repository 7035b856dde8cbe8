"""Wall clock: what sampling took, in timings.jsonl of a guide cache, a scoring or a probe, and what each step took.

A second is spent where it is spent: what was done again after a kill is there again. Work without such a file
(made by an npo that kept none) counts nothing.
"""

from collections import defaultdict
from pathlib import Path

from npo_cli.run_dir.files import damaged_file_error, now_utc
from npo_cli.run_dir.journal import JsonlLog
from npo_cli.run_dir.paths import RunDir


def sampling_timings_path(folder: Path) -> Path:
    """One line a chunk that was sampled or scored."""
    return folder / "timings.jsonl"


def append_sampling_time(folder: Path, seconds: float, *, num_tokens: int) -> None:
    """Note how long a chunk took, and how many tokens were generated in that time (0: they were only scored)."""
    line = {"time": now_utc(), "seconds": seconds, "num_tokens": num_tokens}
    JsonlLog(sampling_timings_path(folder)).append(line)


def sum_sampling_seconds(folder: Path) -> float:
    """Everything noted in that folder; 0 where nothing was."""
    return sum(seconds for _, seconds in _lines(sampling_timings_path(folder)))


def read_step_seconds(run: RunDir, branch: str) -> dict[int, float]:
    """Seconds of each step of the branch; a step executed again after a kill has the sum."""
    spent: dict[int, float] = defaultdict(float)
    for step, seconds in _lines(run.timings_path(branch)):
        if step is not None:
            spent[step] += seconds
    return dict(spent)


def _lines(path: Path) -> list[tuple[int | None, float]]:
    """Step, where the line has one, and seconds of every line; a line without seconds took none."""
    found = []
    for number, row in enumerate(JsonlLog(path).iter_rows(), start=1):
        seconds = row.get("seconds", 0.0)
        if not isinstance(seconds, int | float):
            raise damaged_file_error(f"{path}, line {number}", f"seconds is {seconds!r}")
        found.append((row.get("step"), float(seconds)))
    return found
