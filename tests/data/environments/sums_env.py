"""Sums as an environment of `verifiers`: asynchronous rewards with weights, a metric, an argument."""

import asyncio
from collections.abc import Iterable

import verifiers.v1 as vf

__all__ = ["SumsTaskset"]


class SumsData(vf.TaskData):
    answer: str


class SumsTask(vf.Task[SumsData]):
    @vf.reward
    async def is_right(self, trace: vf.Trace) -> float:
        await asyncio.sleep(0)
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def is_long(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) > 5)

    @vf.metric
    async def num_characters(self, trace: vf.Trace) -> float:
        if trace.last_reply == "raise":
            raise ValueError("cannot count")
        return float(len(trace.last_reply))


class SumsConfig(vf.TasksetConfig):
    first: int = 0
    system: str | None = None


class SumsTaskset(vf.Taskset[SumsTask, SumsConfig]):
    def load(self) -> Iterable[SumsTask]:
        for n in range(self.config.first, self.config.first + 40):
            data = SumsData(prompt=f"{n}+1=", answer=str(n + 1), system_prompt=self.config.system)
            yield SumsTask(data, self.config.task)
