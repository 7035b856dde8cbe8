import pytest

from npo_cli.activity import Activity
from npo_cli.cli.progress import ProgressDisplay, format_clock, open_progress, to_progress
from npo_cli.cli.terminal import VERBOSITY
from npo_cli.types.rollouts import Notice, Progress, StepReport


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_prints_first_last_and_every_five_seconds(capsys):
    clock = Clock()
    lines = ProgressDisplay(clock=clock)
    for done in range(1, 13):
        # one step a second from second 1 on: lines at 1, 6, 11 and at the end
        clock.now = float(done)
        lines.show(Progress(description="work", done=done, total=12, note=f"n{done}"))
    assert capsys.readouterr().err.splitlines() == [
        "work 1/12  n1",
        "work 6/12  n6  elapsed 0:05, left 0:06",
        "work 11/12  n11  elapsed 0:10, left 0:01",
        "work 12/12  n12  elapsed 0:11",
    ]


def test_a_part_whose_last_record_comes_late_ends_with_one_line(capsys):
    clock = Clock()
    lines = ProgressDisplay(clock=clock)
    for done in (1, 2):
        clock.now += 9.0
        lines.show(Progress(description="work", done=done, total=2))
    assert capsys.readouterr().err.splitlines() == ["work 1/2", "work 2/2  elapsed 0:09"]


def test_plain_progress_has_a_rate_per_description(capsys):
    lines = ProgressDisplay(clock=Clock())
    lines.show(Progress(description="one", done=1, total=9))
    lines.show(Progress(description="two", done=1, total=9))
    lines.show(Notice(message="odd\x1b[0m", level="warning"))
    assert capsys.readouterr().err == "one 1/9\ntwo 1/9\nwarning: odd\\x1b[0m\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (90, "1:30"), (3600, "1:00:00")])
def test_times_are_clocks(seconds, text):
    assert format_clock(seconds) == text


def step(number: int, *, branch: str = "main", tokens: int = 100) -> StepReport:
    return StepReport(branch=branch, step=number, metrics={"tokens": tokens}, timings={"seconds": 2.0})


def test_each_stretch_of_training_ends_with_one_line(capsys):
    clock = Clock()
    display = ProgressDisplay(num_steps=3, clock=clock)
    for report in (step(1), step(2), step(2, branch="late"), step(3, branch="late")):
        clock.now += 2.0
        display.show(report)
    display.close()
    ends = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trained")]
    # main: steps 1 and 2 of 2 s each, reported when the next branch begins 2 s later
    assert ends == ["trained main 1-2 in 0:06, 200 tokens", "trained late 2-3 in 0:04, 200 tokens"]


def test_steps_that_are_repeated_are_another_stretch(capsys):
    display = ProgressDisplay(num_steps=9, clock=Clock())
    for number in (1, 2, 1):
        display.show(step(number))
    display.close()
    ends = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trained")]
    assert ends == ["trained main 1-2 in 0:02, 200 tokens", "trained main step 1 in 0:02, 100 tokens"]


def test_a_long_step_shows_its_rollouts_every_five_seconds(capsys):
    clock = Clock()
    display = ProgressDisplay(clock=clock)
    for second in range(13):
        clock.now = float(second)
        display.hear(Activity(name="rollouts", done=10 * second, total=128, tokens=1000 * second))
    assert capsys.readouterr().err.splitlines() == ["rollouts 50/128  1,000 tok/s", "rollouts 100/128  1,000 tok/s"]


@pytest.fixture
def verbosity():
    token = VERBOSITY.set("normal")
    yield VERBOSITY
    VERBOSITY.reset(token)


def test_quiet_leaves_warnings(capsys, verbosity):
    verbosity.set("quiet")
    with open_progress(bars=False) as display:
        display.show(Notice(message="hello"))
        display.show(Notice(message="odd", level="warning"))
        display.show(step(1))
        display.hear(Activity(name="load the model", seconds=1.0))
    assert capsys.readouterr().err == "warning: odd\n"


def test_verbose_has_a_line_per_step_and_the_times_of_loading(capsys, verbosity):
    verbosity.set("verbose")
    with open_progress(bars=False, num_steps=3) as display:
        display.hear(Activity(name="load the model", seconds=1.25))
        for number in (1, 2, 3):
            display.show(step(number))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "load the model: 1.25 s"
    assert [line.split("  ")[0] for line in lines[1:4]] == [f"training main {number}/3" for number in (1, 2, 3)]


def test_progress_of_a_step_shows_reward_entropy_and_speed():
    report = StepReport(
        branch="main", step=7, metrics={"reward": 0.25, "entropy": 0.125}, timings={"tokens_per_second": 39_000.4}
    )
    assert to_progress(report, num_steps=300) == Progress(
        description="training main", done=7, total=300, note="reward 0.250  entropy 0.125  tok/s 39,000"
    )
