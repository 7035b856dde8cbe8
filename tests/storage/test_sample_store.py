import math
from pathlib import Path
from typing import Any

import pytest

import npo_cli.storage.files as files_module
from npo_cli.storage.evals import append_eval, read_evals
from npo_cli.storage.layout import RunDir
from npo_cli.storage.sample_store import (
    SampleStore,
    find_latest_scores,
    list_sample_stores,
    open_sample_store,
    read_all_scores,
    save_scores,
)
from tests.storage.builders import evaluation, group, new_run, score


def open_store(run: RunDir, step: int = 20, **options: Any) -> SampleStore:
    return open_sample_store(run.scores_folder, "main", step, **({"settings": {}} | options))


def test_sample_store_is_found_by_its_settings(tmp_path):
    run = new_run(tmp_path)
    first = open_store(run, checkpoints=[60, 40], settings={"k": 8, "seed": 0})
    first.append("checkpoint:40", [group("a").samples])
    same = open_store(run, checkpoints=[40, 60], settings={"seed": 0, "k": 8})
    assert same.folder == first.folder
    assert same.read() == {("checkpoint:40", "a"): group("a").samples}
    assert (tuple(same.spec.checkpoints), same.is_finished) == ((40, 60), False)
    other = open_store(run, checkpoints=[40, 60], settings={"k": 4, "seed": 0})
    assert other.folder != first.folder
    assert other.read() == {}
    assert open_store(run, 30, checkpoints=[40, 60], settings={"k": 8, "seed": 0}).folder != first.folder
    assert len(list_sample_stores(run.scores_folder)) == 3
    assert first.folder.name.startswith("main_step_000020_") and len(first.folder.name) == 17 + 8


def test_sample_store_drops_a_torn_chunk_and_keeps_the_whole_ones(tmp_path):
    store = open_store(new_run(tmp_path))
    store.append("self", [group("a").samples, group("b").samples])
    store.append("checkpoint:40", [group("a").samples])
    path = store.folder / "rollouts.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert list(store.read()) == [("self", "a"), ("self", "b")]
    store = SampleStore(store.folder)  # the next process
    store.append("checkpoint:40", [group("a").samples])
    assert list(store.read()) == [("self", "a"), ("self", "b"), ("checkpoint:40", "a")]
    assert store.count_tokens() == 3 * sum(len(rollout.response_ids) for rollout in group("a").rollouts)


def test_sample_store_killed_while_it_is_deleted_is_gone(tmp_path, monkeypatch):
    run = new_run(tmp_path)
    store = open_store(run)
    store.append("self", [group("a").samples])
    store.seal()

    def die(folder: Path, ignore_errors: bool) -> None:
        for path in folder.glob("*.jsonl"):
            path.unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(files_module.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        store.delete()
    assert list_sample_stores(run.scores_folder) == []
    assert store.path not in run.list_logs()


def test_saved_scores_are_read_back_and_non_finite_numbers_are_nan(tmp_path):
    run = new_run(tmp_path)
    assert find_latest_scores(run) is None
    scoring = open_store(run)
    save_scores(scoring, [score(40), score(60, variance_high=math.inf, variances={"tok2": math.nan, "ess": 2.0})])
    assert scoring.is_finished
    found = find_latest_scores(run)
    assert found is not None and (found.branch, found.learner_step) == ("main", 20)
    assert found.scores[0] == score(40)
    assert math.isnan(found.scores[1].variance_high)
    assert found.scores[1].variances == {"ess": 2.0}


def test_latest_scores_are_the_newest_whatever_the_clock_says(tmp_path, monkeypatch):
    run = new_run(tmp_path)
    clock = iter(["2030-01-01T00:00:00+00:00", "1970-01-01T00:00:00+00:00"])
    monkeypatch.setattr("npo_cli.storage.sample_store.now_utc", lambda: next(clock))
    old = open_store(run, settings={"k": 1})
    new = open_store(run, 40, settings={"k": 2})
    save_scores(new, [score(60)])
    save_scores(old, [score(40)])
    assert [answer.learner_step for answer in read_all_scores(run)] == [40, 20]
    newest, of_learner_40 = find_latest_scores(run), find_latest_scores(run, learner_step=40)
    assert newest is not None and newest.learner_step == 20
    assert of_learner_40 is not None and of_learner_40.scores[0].step == 60
    assert find_latest_scores(run, branch="late") is None


def test_eval_repeated_has_one_line(tmp_path):
    run = new_run(tmp_path)
    append_eval(run, evaluation(20))
    append_eval(run, evaluation(20))
    append_eval(run, evaluation(20, accuracy=0.75))
    assert [report.accuracy for report in read_evals(run)] == [0.5, 0.75]
    assert read_evals(run)[0] == evaluation(20)
