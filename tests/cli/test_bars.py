"""Bars on a terminal: what they show while a step runs, and what stays."""

import io

import pytest
from rich.console import Console

from npo_cli.activity import Activity
from npo_cli.cli.bars import BarDisplay
from npo_cli.types.rollouts import Notice, StepReport


class RecordedDisplay(BarDisplay):
    """Draws into a text of a terminal's width, and only when asked to."""

    def __init__(self, width: int) -> None:
        super().__init__(num_steps=140)
        self.clock = lambda: 100.0
        self.text = io.StringIO()
        console = Console(file=self.text, width=width, force_terminal=True, color_system=None, highlight=False)
        self.bars.live.console = self.bars.live._live_render.console = console
        self.bars.live.auto_refresh = False

    def frame(self) -> list[str]:
        """The bars as they stand."""
        console = Console(file=io.StringIO(), width=self.bars.console.width, color_system=None, highlight=False)
        console.print(self.bars.get_renderable())
        return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def step(number: int) -> StepReport:
    return StepReport(
        branch="main",
        step=number,
        metrics={"tokens": 2000, "reward": 0.25, "entropy": 0.125},
        timings={"seconds": 2.0, "tokens_per_second": 1000.0},
    )


@pytest.mark.parametrize("width", [80, 120])
def test_a_step_shows_its_rollouts_below_the_training_within_the_width(width):
    display = RecordedDisplay(width)
    display.show(step(1))
    display.hear(Activity(name="rollouts", done=37, total=128, tokens=500))
    training, rollouts = display.frame()
    assert training.startswith("training main")
    assert "1/140" in training
    assert "elapsed 0:02, left 4:38" in training
    assert "reward 0.250" in training
    assert rollouts.startswith("  rollouts")
    assert "37/128" in rollouts
    assert max(len(training), len(rollouts)) <= width
    assert ("entropy 0.125" in training) == (width == 120)
    display.hear(Activity(name="update", done=1, total=4))
    assert display.frame()[1].startswith("  update")
    display.show(step(2))
    assert len(display.frame()) == 1
    display.close()


def test_notices_and_finished_parts_stay_without_a_bar():
    display = RecordedDisplay(80)
    display.show(Notice(message="[bold]hello"))
    for number in range(1, 141):
        display.show(step(number))
    assert display.frame() == []
    display.close()
    shown = display.text.getvalue()
    assert "[bold]hello" in shown
    assert "trained main 1-140 in " in shown
    assert "280,000 tokens" in shown
