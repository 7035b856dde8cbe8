import pytest

from npo_cli.cli.progress import PlainProgress, format_time_left, to_progress
from npo_cli.types.rollouts import Notice, Progress, StepReport


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_prints_first_last_and_every_five_seconds(capsys):
    clock = Clock()
    lines = PlainProgress(clock)
    for done in range(1, 13):
        # one step a second from second 1 on: lines at 1, 6, 11 and at the end
        clock.now = float(done)
        lines.show(Progress(description="work", done=done, total=12, note=f"n{done}"))
    assert capsys.readouterr().err.splitlines() == [
        "work 1/12  n1",
        "work 6/12  n6  0:06 left",
        "work 11/12  n11  0:01 left",
        "work 12/12  n12",
    ]


def test_plain_progress_has_a_rate_per_description(capsys):
    lines = PlainProgress(Clock())
    lines.show(Progress(description="one", done=1, total=9))
    lines.show(Progress(description="two", done=1, total=9))
    lines.show(Notice(message="odd\x1b[0m", level="warning"))
    assert capsys.readouterr().err == "one 1/9\ntwo 1/9\nwarning: odd\\x1b[0m\n"


@pytest.mark.parametrize(
    ("done", "total", "seconds", "text"),
    [(10, 100, 10.0, "1:30 left"), (1, 3601, 1.0, "1:00:00 left"), (5, 5, 9.0, ""), (7, 0, 9.0, ""), (0, 5, 9.0, "")],
)
def test_time_left_follows_the_rate(done, total, seconds, text):
    assert format_time_left(Progress(description="w", done=done, total=total), seconds=seconds, num_done=done) == text


def test_progress_of_a_step_shows_reward_entropy_and_speed():
    report = StepReport(
        branch="main", step=7, metrics={"reward": 0.25, "entropy": 0.125}, timings={"tokens_per_second": 39_000.4}
    )
    assert to_progress(report, num_steps=300) == Progress(
        description="training main", done=7, total=300, note="reward 0.250  entropy 0.125  tok/s 39000"
    )
