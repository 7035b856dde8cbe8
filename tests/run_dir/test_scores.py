import math

from npo_cli.run_dir.scores import (
    all_scores,
    append_eval,
    evals,
    latest_scores,
    open_scoring,
    save_scores,
    scorings,
)
from tests.run_dir.making import evaluation, new_run, score


def test_the_same_question_finds_its_samples_and_another_does_not(tmp_path):
    run = new_run(tmp_path)
    first = open_scoring(run, "main", 20, candidates=[60, 40], settings={"k": 8, "seed": 0})
    first.samples.append({"step": 40, "prompt_id": "a"})
    same = open_scoring(run, "main", 20, candidates=[40, 60], settings={"seed": 0, "k": 8})
    assert same.folder == first.folder
    assert list(same.samples.records()) == [{"step": 40, "prompt_id": "a"}]
    assert (same.candidates, same.finished) == ((40, 60), False)
    other = open_scoring(run, "main", 20, candidates=[40, 60], settings={"k": 4, "seed": 0})
    assert other.folder != first.folder
    assert list(other.samples.records()) == []
    assert len(scorings(run)) == 2
    assert first.folder.name.startswith("main_step_000020_") and len(first.folder.name) == 17 + 8


def test_scores_come_back_and_what_json_lacks_is_nan(tmp_path):
    run = new_run(tmp_path)
    assert latest_scores(run) is None
    scoring = open_scoring(run, "main", 20, candidates=[40], settings={})
    save_scores(scoring, [score(40), score(60, variance_high=math.inf, variances={"tok2": math.nan, "ess": 2.0})])
    assert scoring.finished
    found = latest_scores(run)
    assert found is not None and (found.branch, found.at) == ("main", 20)
    assert found.scores[0] == score(40)
    assert math.isnan(found.scores[1].variance_high)
    assert found.scores[1].variances == {"ess": 2.0}


def test_the_newest_answer_wins(tmp_path):
    run = new_run(tmp_path)
    old = open_scoring(run, "main", 20, candidates=[40], settings={"k": 1})
    new = open_scoring(run, "main", 40, candidates=[60], settings={"k": 2})
    save_scores(new, [score(60)])
    save_scores(old, [score(40)])
    assert [answer.at for answer in all_scores(run)] == [40, 20]
    newest, of_learner_40 = latest_scores(run), latest_scores(run, at=40)
    assert newest is not None and newest.at == 20
    assert of_learner_40 is not None and of_learner_40.scores[0].step == 60
    assert latest_scores(run, branch="late") is None


def test_an_evaluation_made_again_leaves_one_line(tmp_path):
    run = new_run(tmp_path)
    append_eval(run, evaluation(20))
    append_eval(run, evaluation(20))
    append_eval(run, evaluation(20, accuracy=0.75))
    assert [report.accuracy for report in evals(run)] == [0.5, 0.75]
    assert evals(run)[0] == evaluation(20)
