"""A run directory for programs and notebooks: what was recorded, as tables."""

from collections.abc import Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from npo_cli.api.rows import Row, list_columns, to_row, to_table

if TYPE_CHECKING:
    import pandas

    from npo_cli.config.recipe import Recipe
    from npo_cli.storage.layout import RunDir

    Table: TypeAlias = pandas.DataFrame | list[Row]

SCORING_COLUMNS = ("branch", "learner_step", "sequence")
"""Of the scoring that a candidate is part of; `sequence` counts the scorings of the run."""


class Run:
    """A run directory, which is only read. `NpoError` if it is none.

    The tables are pandas DataFrames where pandas is installed, else lists of dicts; `as_list=True` always gives lists.
    Their columns are the keys of `--json`. Each call reads the files again, so a run can be watched while it trains.
    """

    def __init__(self, path: "str | PathLike[str]") -> None:
        from npo_cli.storage.layout import open_run

        self.path = Path(path)
        """The run directory."""
        open_run(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def __fspath__(self) -> str:
        return fspath(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and other.path.absolute() == self.path.absolute()

    def __hash__(self) -> int:
        return hash(self.path.absolute())

    @property
    def _dir(self) -> "RunDir":
        from npo_cli.storage.layout import open_run

        return open_run(self.path)

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches, oldest first."""
        from npo_cli.storage.lineage import list_branches

        return tuple(list_branches(self._dir))

    def recipe(self, branch: str = "main") -> "Recipe":
        """The recipe in force on a branch."""
        from npo_cli.api.checks import load_run_recipe

        return load_run_recipe(self.path, (), branch=branch)

    def checkpoint(self, step: int, branch: str = "main") -> Path:
        """Folder of a checkpoint on the branch or its ancestors, for `from_pretrained`."""
        from npo_cli.storage.checkpoints import find_checkpoint

        return find_checkpoint(self._dir, branch, step).path

    def metrics(self, branch: str | None = None, *, as_list: bool = False) -> "Table":
        """Metrics and timings of every training step of a branch, or of all: columns `branch`, `step`, `reward`, ..."""
        from npo_cli.report.show import show_run

        records = show_run(self.path, "metrics", branch=branch, step=None, prompt_id=None, limit=None)
        return to_table(map(to_row, records), columns=("branch", "step"), as_list=as_list)

    def evals(self, branch: str | None = None, *, as_list: bool = False) -> "Table":
        """Held-out evaluations, oldest first: `accuracy` (avg@k), `pass_at_k` and their 95 % intervals."""
        from npo_cli.storage.evals import read_evals
        from npo_cli.types.rollouts import EvalReport

        return self._table(EvalReport, read_evals(self._dir), branch, as_list=as_list)

    def checkpoints(self, branch: str | None = None, *, as_list: bool = False) -> "Table":
        """Checkpoints with their path, size, reward, accuracy, and the newest quality, variance and signal."""
        from npo_cli.storage.index import index_run
        from npo_cli.types.rollouts import CheckpointEntry

        return self._table(CheckpointEntry, index_run(self.path), branch, as_list=as_list)

    def scores(self, branch: str | None = None, *, as_list: bool = False) -> "Table":
        """Guide candidates of every scoring, oldest first: `branch` and `learner_step` of the learner, then Q, V, S."""
        from npo_cli.storage.sample_store import read_all_scores
        from npo_cli.types.scores import CandidateScore

        self._check_branch(branch)
        rows = (
            {**{name: getattr(scoring, name) for name in SCORING_COLUMNS}, **to_row(one)}
            for scoring in read_all_scores(self._dir)
            if branch in (None, scoring.branch)
            for one in scoring.scores
        )
        return to_table(rows, columns=(*SCORING_COLUMNS, *list_columns(CandidateScore)), as_list=as_list)

    def costs(self, branch: str | None = None, *, as_list: bool = False) -> "Table":
        """Every piece of work in the order done: `kind`, `branch`, `step`, `tokens`, `seconds`, ...

        A piece that was executed again after a kill is one row: its tokens count once, all its seconds count.
        """
        from npo_cli.storage.cost_sums import merge_cost_lines
        from npo_cli.storage.costs import CostLine

        return self._table(CostLine, merge_cost_lines(self._dir), branch, as_list=as_list)

    def learning_curve(self, branch: str = "main", *, as_list: bool = False) -> "Table":
        """Held-out accuracy of a branch by step, with everything that it had cost by then."""
        from npo_cli.storage.cost_sums import learning_curve
        from npo_cli.types.costs import CurvePoint

        self._check_branch(branch)
        points = learning_curve(self._dir, branch, name=branch)
        return to_table(map(to_row, points), columns=list_columns(CurvePoint), as_list=as_list)

    def guides(self, branch: str | None = None, *, as_list: bool = False) -> "Table":
        """Guide caches: their source, the learner's `branch` and `learner_step`, and what they hold."""
        from npo_cli.storage.guide_cache import list_guide_caches
        from npo_cli.types.guides import GuideCacheInfo

        return self._table(GuideCacheInfo, list_guide_caches(self._dir), branch, as_list=as_list)

    def transitions(self, branch: str | None = None, *, as_list: bool = False) -> "Table":
        """AutoNPO's decisions with their evidence; empty without AutoNPO."""
        from npo_cli.storage.autonpo_log import read_transitions

        self._check_branch(branch)
        rows = [row for row in map(to_row, read_transitions(self._dir)) if branch in (None, row["branch"])]
        columns = ("step", "branch", "phase", "event", "phase_before", "state", "evidence")
        return to_table(rows, columns=columns, as_list=as_list)

    def _table(self, kind: type, records: Iterable[Any], branch: str | None, *, as_list: bool) -> "Table":
        self._check_branch(branch)
        rows = (to_row(record) for record in records if branch in (None, record.branch))
        return to_table(rows, columns=list_columns(kind), as_list=as_list)

    def _check_branch(self, branch: str | None) -> None:
        from npo_cli.storage.lineage import find_first_segment

        if branch is not None:
            find_first_segment(self._dir, branch)


def resolve_root(run: "Run | str | PathLike[str]") -> Path:
    """The path of a run directory."""
    return Path(run)
