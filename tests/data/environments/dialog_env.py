"""An environment of several turns: `task` says what makes it one."""

from collections.abc import Iterable
from typing import Literal

import verifiers.v1 as vf

__all__ = ["DialogTaskset"]


class DialogTask(vf.Task[vf.TaskData]):
    @vf.reward
    async def any(self, trace: vf.Trace) -> float:
        return 1.0


class Stopped(DialogTask):
    @vf.stop
    async def after_three_turns(self, trace: vf.Trace) -> bool:
        return trace.num_turns == 3


class InRuntime(DialogTask):
    @vf.reward
    async def runs(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        return 1.0


class Prepared(DialogTask):
    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        pass


class Unrewarded(vf.Task[vf.TaskData]):
    pass


class DialogConfig(vf.TasksetConfig):
    kind: Literal["Stopped", "InRuntime", "Prepared", "Unrewarded", "DialogTask"] = "Stopped"
    prompt: str | None = "Hello"
    image: str | None = None


class DialogTaskset(vf.Taskset[DialogTask, DialogConfig]):
    def load(self) -> Iterable[DialogTask]:
        data = vf.TaskData(prompt=self.config.prompt, image=self.config.image)
        yield globals()[self.config.kind](data, self.config.task)
