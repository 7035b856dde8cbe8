"""`npo.compare`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from npo_cli.api.checks import check_figure_path, check_results_path
from npo_cli.api.results import save_results
from npo_cli.api.run import Run
from npo_cli.api.stages import RecordStream, collect_records, returns
from npo_cli.errors import NpoError
from npo_cli.types.comparison import (
    MethodDifference,
    MethodHysteresis,
    MethodSummary,
    MethodTimeToThreshold,
    SeedPoint,
    SpeedUp,
)
from npo_cli.types.rollouts import Notice

if TYPE_CHECKING:
    import pandas

    from npo_cli.api.rows import Row

CompareRecord = (
    MethodSummary | MethodDifference | MethodTimeToThreshold | SpeedUp | MethodHysteresis | SeedPoint | Notice
)
Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class CompareResult:
    """A comparison of methods by held-out accuracy and by cost; the first method is the baseline."""

    records: tuple[CompareRecord, ...]
    """Everything that was computed, in order."""

    def __repr__(self) -> str:
        return f"CompareResult(methods={tuple(summary.method for summary in self.methods)})"

    @property
    def methods(self) -> tuple[MethodSummary, ...]:
        """Each method over the range that all have in common."""
        return self._of(MethodSummary)

    @property
    def differences(self) -> tuple[MethodDifference, ...]:
        """Each method minus the baseline, with intervals."""
        return self._of(MethodDifference)

    @property
    def time_to_threshold(self) -> tuple[MethodTimeToThreshold, ...]:
        """What each method had spent when it reached an accuracy."""
        return self._of(MethodTimeToThreshold)

    @property
    def speedups(self) -> tuple[SpeedUp, ...]:
        """Cost of the baseline divided by that of each method, on every axis."""
        return self._of(SpeedUp)

    @property
    def hysteresis(self) -> tuple[MethodHysteresis, ...]:
        """Steps from an accuracy to a higher one, unguided run minus replayed branch."""
        return self._of(MethodHysteresis)

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What makes the comparison less than fair."""
        return self._of(Notice)

    def points(self, *, as_list: bool = False) -> "pandas.DataFrame | list[Row]":
        """Every held-out evaluation with its costs on five axes, as a table."""
        from npo_cli.api.rows import list_columns, to_row, to_table

        return to_table(map(to_row, self._of(SeedPoint)), columns=list_columns(SeedPoint), as_list=as_list)

    def _of(self, kind: type[Kind]) -> tuple[Kind, ...]:
        return tuple(record for record in self.records if isinstance(record, kind))


def _collect_comparison(stream: RecordStream[CompareRecord]) -> CompareResult:
    return CompareResult(records=collect_records(stream))


@returns(_collect_comparison)
def compare(
    methods: "Sequence[str | Run | PathLike[str]] | Mapping[str, Any]",
    *,
    thresholds: Sequence[float] = (),
    baseline: str | None = None,
    out: "str | PathLike[str] | None" = None,
    figure: "str | PathLike[str] | None" = None,
) -> RecordStream[CompareRecord]:
    """Compare methods by held-out accuracy and by cost; returns a `CompareResult`.

    `methods`: runs as the command takes them, `[NAME=]RUN[:BRANCH]`, or a dict of NAME to a run or to a list of runs,
    one per seed. `thresholds`: accuracies whose costs are compared (chosen from the data). `baseline`: NAME of the
    method that the others are compared with (the first). `out`: file of every evaluation
    (.csv, .json or .jsonl); `figure`: the learning curves.
    """
    picture, table = (None if path is None else Path(path) for path in (figure, out))
    check_figure_path(picture)
    check_results_path(table)
    for level in thresholds:
        if not 0 < level <= 1:
            raise NpoError(f"--threshold must be above 0 and at most 1, got {level:g}", "--threshold 0.9")

    from npo_cli.experiments.compare import compare_runs

    records = compare_runs(list_methods(methods), thresholds=thresholds, baseline=baseline, figure=picture)
    if table is not None:
        records = _save_at_end(records, table)
    return RecordStream(records, name="compare")


def _save_at_end(records: Iterator[CompareRecord], path: Path) -> Iterator[CompareRecord]:
    every: list[CompareRecord] = []
    for record in records:
        every += [] if isinstance(record, Notice) else [record]
        yield record
    save_results(every, path, of=SeedPoint)
    yield Notice(message=f"results: {path}")


def list_methods(methods: "Sequence[str | Run | PathLike[str]] | Mapping[str, Any]") -> list[str]:
    """Methods in the form of the command's arguments."""
    if not isinstance(methods, Mapping):
        return [_to_text(one) for one in ([methods] if isinstance(methods, str | Run | PathLike) else methods)]
    return [
        f"{name}={_to_text(one)}"
        for name, runs in methods.items()
        for one in ([runs] if isinstance(runs, str | Run | PathLike) else runs)
    ]


def _to_text(run: "str | Run | PathLike[str]") -> str:
    return str(Path(run)) if isinstance(run, Run | PathLike) else run
