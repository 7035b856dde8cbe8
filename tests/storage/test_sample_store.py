import math

from npo_cli.storage.sample_store import (
    append_eval,
    find_latest_scores,
    list_sample_stores,
    open_sample_store,
    read_all_scores,
    read_evals,
    save_scores,
)
from tests.storage.builders import evaluation, new_run, score


def test_the_same_question_finds_its_samples_and_another_does_not(tmp_path):
    run = new_run(tmp_path)
    first = open_sample_store(run, "main", 20, candidates=[60, 40], settings={"k": 8, "seed": 0})
    first.samples.append({"step": 40, "prompt_id": "a"})
    same = open_sample_store(run, "main", 20, candidates=[40, 60], settings={"seed": 0, "k": 8})
    assert same.folder == first.folder
    assert list(same.samples.iter_rows()) == [{"step": 40, "prompt_id": "a"}]
    assert (same.candidates, same.is_finished) == ((40, 60), False)
    other = open_sample_store(run, "main", 20, candidates=[40, 60], settings={"k": 4, "seed": 0})
    assert other.folder != first.folder
    assert list(other.samples.iter_rows()) == []
    assert len(list_sample_stores(run)) == 2
    assert first.folder.name.startswith("main_step_000020_") and len(first.folder.name) == 17 + 8


def test_scores_come_back_and_what_json_lacks_is_nan(tmp_path):
    run = new_run(tmp_path)
    assert find_latest_scores(run) is None
    scoring = open_sample_store(run, "main", 20, candidates=[40], settings={})
    save_scores(scoring, [score(40), score(60, variance_high=math.inf, variances={"tok2": math.nan, "ess": 2.0})])
    assert scoring.is_finished
    found = find_latest_scores(run)
    assert found is not None and (found.branch, found.learner_step) == ("main", 20)
    assert found.scores[0] == score(40)
    assert math.isnan(found.scores[1].variance_high)
    assert found.scores[1].variances == {"ess": 2.0}


def test_the_newest_answer_wins(tmp_path):
    run = new_run(tmp_path)
    old = open_sample_store(run, "main", 20, candidates=[40], settings={"k": 1})
    new = open_sample_store(run, "main", 40, candidates=[60], settings={"k": 2})
    save_scores(new, [score(60)])
    save_scores(old, [score(40)])
    assert [answer.learner_step for answer in read_all_scores(run)] == [40, 20]
    newest, of_learner_40 = find_latest_scores(run), find_latest_scores(run, learner_step=40)
    assert newest is not None and newest.learner_step == 20
    assert of_learner_40 is not None and of_learner_40.scores[0].step == 60
    assert find_latest_scores(run, branch="late") is None


def test_an_evaluation_made_again_leaves_one_line(tmp_path):
    run = new_run(tmp_path)
    append_eval(run, evaluation(20))
    append_eval(run, evaluation(20))
    append_eval(run, evaluation(20, accuracy=0.75))
    assert [report.accuracy for report in read_evals(run)] == [0.5, 0.75]
    assert read_evals(run)[0] == evaluation(20)
