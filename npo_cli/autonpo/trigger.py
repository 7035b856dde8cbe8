"""When to intervene: the reward stagnates while the entropy falls, each relative to its own noise.

The trigger reads one step after another. It counts no streak and decides nothing. It keeps W steps and 2 W values, so
a step costs the same late in a run as early. Formulas: `docs/explanation/autonpo.md`, Trigger.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import mul

from npo_cli.config.autonpo import TriggerSettings
from npo_cli.types.autonpo import TriggerReading

MIN_VALUES = 3
"""A least-squares line takes two degrees of freedom; fewer than three values leave no estimate of the noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TriggerInput:
    """Metrics of one step; None or a non-finite number is missing."""

    step: int
    reward: float | None
    """Accuracy of the on-policy rollouts."""
    entropy: float | None
    """Mean token entropy in nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    """Both averages after one record."""

    step: int
    reward: float
    entropy: float


class _Average:
    """Bias-corrected exponential average: m += (x - m)/w with w = 1 + lam + lam^2 + ..., one term per value.

    Equal to sum lam^i x_{k-i} (1 - lam)/(1 - lam^k), but exactly constant if x is.
    """

    __slots__ = ("decay", "value", "weight")

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weight = 0.0
        self.value: float | None = None

    def add(self, new: float) -> float:
        """Add a value; the new average."""
        self.weight = 1.0 + self.decay * self.weight
        old = 0.0 if self.value is None else self.value
        self.value = old + (new - old) / self.weight
        return self.value


class Trigger:
    """The trigger's memory of one branch's ancestry. Steps must come in order; gaps are allowed."""

    def __init__(self, settings: TriggerSettings) -> None:
        self.settings = settings
        self._reward, self._entropy = _Average(settings.ema_decay), _Average(settings.ema_decay)
        # From the newest record at or before t - W to the present one: at most W + 1 of them.
        self._points: deque[_Point] = deque()
        num_values = max(2 * settings.window, MIN_VALUES)
        self._steps: deque[int] = deque(maxlen=num_values)
        self._rewards: deque[float] = deque(maxlen=num_values)
        self._entropies: deque[float] = deque(maxlen=num_values)
        self._last_step: int | None = None

    def observe(self, signal: TriggerInput) -> TriggerReading:
        """Stagnation: m_t - m_{t-W} <= c_r SE_r; falling: h_{t-W} - h_t >= max(d_H h_{t-W}, c_H SE_h).

        A record with a missing value moves no average. An entropy of 0 cannot fall further.
        """
        assert self._last_step is None or signal.step > self._last_step, "steps increase"
        self._last_step = signal.step
        reward, entropy = _finite_or_none(signal.reward), _finite_or_none(signal.entropy)
        if reward is None or entropy is None:
            return TriggerReading(
                step=signal.step,
                verdict="no_signal",
                reward=reward,
                entropy=entropy,
                reward_ema=self._reward.value,
                entropy_ema=self._entropy.value,
            )
        self._add(signal.step, reward, entropy)
        return self._compare(signal.step, reward, entropy)

    def observe_if_new(self, signal: TriggerInput) -> None:
        """Observe a step unless it was observed already."""
        if self._last_step is None or signal.step > self._last_step:
            self.observe(signal)

    def _add(self, step: int, reward: float, entropy: float) -> None:
        self._steps.append(step)
        self._rewards.append(reward)
        self._entropies.append(entropy)
        self._points.append(_Point(step=step, reward=self._reward.add(reward), entropy=self._entropy.add(entropy)))
        while len(self._points) > 1 and self._points[1].step <= step - self.settings.window:
            self._points.popleft()

    def _compare(self, step: int, reward: float, entropy: float) -> TriggerReading:
        """The newest averages against those of the newest record at or before t - W."""
        then, now = self._points[0], self._points[-1]
        values = {"step": step, "reward": reward, "entropy": entropy}
        averages = {"reward_ema": now.reward, "entropy_ema": now.entropy}
        if then.step > step - self.settings.window or len(self._steps) < MIN_VALUES:
            return TriggerReading(verdict="short_history", **values, **averages)
        scale = error_of_difference(self.settings.ema_decay, len(self._points) - 1)
        spread_r, spread_h = residual_stds(self._steps, self._rewards, self._entropies)
        gain = now.reward - then.reward
        margin = self.settings.max_reward_gain_se * scale * spread_r
        drop = needed_drop = None
        if then.entropy > 0:
            drop = 1.0 - now.entropy / then.entropy
            noise = self.settings.min_entropy_drop_se * scale * spread_h / then.entropy
            needed_drop = max(self.settings.min_entropy_drop, noise)
        falls = drop is not None and needed_drop is not None and drop >= needed_drop
        return TriggerReading(
            verdict="rising" if gain > margin else "stagnant" if falls else "entropy_level",
            **values,
            **averages,
            reward_gain=gain,
            reward_margin=margin,
            entropy_drop=drop,
            required_entropy_drop=needed_drop,
        )


def error_of_difference(decay: float, num_apart: int) -> float:
    """Standard error of m_t - m_{t-n} per unit of noise: sqrt(2 (1 - lam)/(1 + lam) (1 - lam^n)); lam = 0: sqrt 2."""
    return math.sqrt(2.0 * (1.0 - decay) / (1.0 + decay) * (1.0 - decay**num_apart))


def residual_stds(steps: Sequence[float], *columns: Sequence[float]) -> Iterator[float]:
    """Standard deviation of each column around its least-squares line, sqrt((S_yy - S_xy^2/S_xx)/(n - 2)).

    Relative to the column's first value, so that a constant column gives exactly 0.
    """
    num, middle = len(steps), sum(steps) / len(steps)
    xs = [step - middle for step in steps]
    sum_xx = sum(map(mul, xs, xs))
    for values in columns:
        first = values[0]
        ys = [value - first for value in values]
        sum_xy, sum_y = sum(map(mul, xs, ys)), sum(ys)
        residual = sum(map(mul, ys, ys)) - sum_y * sum_y / num - sum_xy * sum_xy / sum_xx
        yield math.sqrt(max(residual, 0.0) / (num - 2))


def is_finite(value: float | None) -> bool:
    """Whether the value is present and finite."""
    return value is not None and math.isfinite(value)


def _finite_or_none(value: float | None) -> float | None:
    return value if is_finite(value) else None
