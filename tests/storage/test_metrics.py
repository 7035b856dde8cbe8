import json

from npo_cli.storage.metrics import StepLog, append_event
from npo_cli.types.rollouts import StepReport
from tests.storage.builders import new_run


def report(step: int, *, reward: float = 0.5, seconds: float = 1.0) -> StepReport:
    return StepReport(branch="main", step=step, metrics={"tokens": 16, "reward": reward}, timings={"seconds": seconds})


def test_measurements_hold_no_clock_so_that_two_runs_can_be_compared_with_cmp(tmp_path):
    run = new_run(tmp_path)
    logs = StepLog(run, "main", updates_per_step=1)
    assert logs.write(report(1)) == "written"
    assert run.metrics_path("main").read_bytes() == b'{"step":1,"branch":"main","tokens":16,"reward":0.5}\n'
    timing = json.loads(run.timings_path("main").read_text())
    assert timing.pop("time").endswith("+00:00")
    assert timing == {"step": 1, "branch": "main", "seconds": 1.0}


def test_a_step_done_again_is_compared_and_its_time_recorded_again(tmp_path):
    run = new_run(tmp_path)
    StepLog(run, "main", updates_per_step=1).write(report(1))
    again = StepLog(run, "main", updates_per_step=1)
    assert again.write(report(1, seconds=2.0)) == "same"
    assert again.write(report(1, reward=0.75)) == "differs"
    again.sync()
    assert run.metrics_path("main").read_text().count("\n") == 1
    assert run.timings_path("main").read_text().count("\n") == 3


def test_events_are_noted_with_their_details(tmp_path):
    run = new_run(tmp_path)
    append_event(run, "differs", {"branch": "main", "step": 3})
    event = json.loads(run.events_path.read_text())
    assert event.pop("time").endswith("+00:00")
    assert event == {"kind": "differs", "branch": "main", "step": 3}
