"""The format on disk, byte for byte, against tests/data/format_golden.json.

A change here is a change of format: update docs/reference/run-directory.md, then
`python -m tests.storage.test_format_golden` writes the golden file anew, and the difference is for review.
"""

import json
import re
import tempfile
from pathlib import Path

from npo_cli.storage.calibrations import Replay, open_calibration
from npo_cli.storage.costs import append_cost, append_fork_cost
from npo_cli.storage.evals import append_eval, append_prompt_results
from npo_cli.storage.guide_cache import finish_guide_cache, open_guide_cache
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import append_segment
from npo_cli.storage.lock import lock_run
from npo_cli.storage.metrics import StepLog, append_event
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.storage.sample_store import open_sample_store, save_scores
from npo_cli.types.rollouts import Segment, StepReport
from tests.storage.builders import (
    RECIPE,
    evaluation,
    group,
    guide_info,
    guide_samples,
    make_eval_results,
    new_run,
    score,
    write_checkpoint,
)

GOLDEN = Path(__file__).parents[1] / "data" / "format_golden.json"


def make_run_with_everything(folder: Path) -> RunDir:
    """A run with one of everything."""
    run = new_run(folder)
    with lock_run(run):
        metrics = {"tokens": 16, "reward": 0.5, "kl": float("nan")}
        StepLog(run, "main", updates_per_step=1).write(
            StepReport(branch="main", step=1, metrics=metrics, timings={"seconds": 1.0})
        )
        RolloutLog(run.rollouts_path("main")).write_step(1, [group("p0")])
        write_checkpoint(run, 40)
        append_prompt_results(run, make_eval_results(40))
        append_eval(run, evaluation(40))
        scoring = open_sample_store(run.scores_folder, "main", 20, checkpoints=[40], settings={"k": 8})
        append_cost(run, "score", branch="main", step=20, artifact=scoring.folder, piece="40:p0", tokens=3, seconds=0.5)
        scoring.append("checkpoint:40", [group("p0").samples])
        save_scores(scoring, [score(40)])
        store = open_guide_cache(run, guide_info(run))
        cache = run.guide_folder("g")
        append_cost(run, "guide_cache", branch="main", step=20, artifact=cache, piece="p0", tokens=12, seconds=1.5)
        store.append("checkpoint:40", [guide_samples("p0"), guide_samples("p1", num_correct=0)])
        finish_guide_cache(run, guide_info(run))
        open_calibration(run, "main", 20, settings={"num_steps": 4}).append(
            Replay(
                guide=None,
                seed=0,
                eval_steps=(24,),
                prompt_keys=("a", "b"),
                num_samples=2,
                num_correct=((0, 2),),
                num_tokens=16,
                num_injected=0,
            )
        )
        run.save_recipe("late", RECIPE)
        replay = Segment(branch="late", parent="main", fork_step=20, guide_cache="g", guide_until=40)
        append_fork_cost(run, replay)
        append_segment(run, replay, overrides=["train.lr=1"])
        append_event(run, "rolled_back", {"branch": "late", "learner_step": 20})
    return run


def read_without_times(path: Path, run_id: str) -> str:
    """The text of a file with times, the run's id and checksums of them replaced by words."""
    text = re.sub(r'"(crc32|checksum)": \d+', r'"\1": 0', path.read_text())
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", "TIME", text).replace(run_id, "RUN")


def read_all_files(run: RunDir) -> dict[str, str]:
    """Path in the run directory to text, weights, log.txt and the lock apart."""
    paths = sorted(
        path for path in run.root.rglob("*") if path.is_file() and path.suffix not in (".safetensors", ".txt")
    )
    return {path.relative_to(run.root).as_posix(): read_without_times(path, run.run_id) for path in paths}


def test_format_on_disk_is_the_golden_one(tmp_path):
    found, golden = read_all_files(make_run_with_everything(tmp_path)), json.loads(GOLDEN.read_text())
    assert sorted(found) == sorted(golden)
    for name, text in golden.items():
        assert found[name] == text, name


def test_format_on_disk_differs_between_two_runs_only_in_times_and_the_run_id(tmp_path):
    first, second = make_run_with_everything(tmp_path / "a"), make_run_with_everything(tmp_path / "b")
    assert read_all_files(first) == read_all_files(second)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        paths = [run.root / "branches" / "main" / name for run in (first, second)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        files = read_all_files(make_run_with_everything(Path(folder)))
    GOLDEN.write_text(json.dumps(files, indent=1) + "\n")
