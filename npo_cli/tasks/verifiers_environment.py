"""One-turn environments of the package `verifiers` as a task: its tasks are the prompts, its rewards the verifier.

An environment is an installed package that exports a `Taskset` (verifiers 0.4). It is loaded and scored in processes of
its own, so nothing here imports `verifiers`. A response is scored as the only turn of a rollout: the reward is the
weighted sum of the task's `@reward` functions and judges. Whatever needs more than one turn, tools or a container is
refused before the first step.
"""

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import Any

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.base import LoadedPrompts, TaskSource
from npo_cli.tasks.custom_verifier import CustomVerifier
from npo_cli.tasks.file_dataset import check_disjoint, check_num_rows, check_unique_ids
from npo_cli.tasks.prompt_format import format_prompt
from npo_cli.tasks.reward_functions import RewardCall
from npo_cli.tasks.verifier_pool import VerifierPool, describe_error
from npo_cli.types.rollouts import Message, Prompt, VerifierResult

LOAD_SECONDS = 600.0
"""Timeout for loading an environment and its tasks."""
ONE_TURN = "choose an environment that ends with the first response, without tools or a container"


class VerifiersTask(TaskSource):
    """The tasks of an environment, in its order."""

    name = "verifiers"
    default_verifier = "verifiers"

    @classmethod
    def validate(cls, settings: TaskSettings) -> None:
        """The package is installed, and an environment is named."""
        super().validate(settings)
        if find_spec("verifiers") is None:
            raise NpoError("task.source=verifiers needs the package verifiers", "pip install 'npo-cli[verifiers]'")
        if not settings.environment:
            raise NpoError("task.source=verifiers needs an environment", "set task.environment to an installed one")
        if settings.system and settings.chat is False:
            raise NpoError("task.system needs chat prompts, but task.chat is false", "remove task.chat")

    @classmethod
    def load(cls, settings: TaskSettings, *, seed: int) -> LoadedPrompts:
        """The first tasks are trained on, the next task.heldout_size held out; of fewer tasks the last ones."""
        rows = _read_tasks(settings)
        check_num_rows(
            len(rows), settings.heldout_size, source=f"the environment {settings.environment} has", unit="tasks"
        )
        num_train = len(rows) - settings.heldout_size
        located = [(_make_prompt(row, at, settings), f"task {at} of {settings.environment}") for at, row in rows]
        check_unique_ids(located)
        check_disjoint(located[:num_train], located[num_train:])
        prompts = tuple(prompt for prompt, _ in located)
        return LoadedPrompts(train=prompts[:num_train], heldout=prompts[num_train:])

    @classmethod
    def locate(cls, prompt: Prompt, settings: TaskSettings) -> str:
        """`task 3 of my-env: `, counted from 0 as verifiers does."""
        return f"task {prompt.row} of {settings.environment}: "


class EnvironmentVerifier(CustomVerifier):
    """The environment's rewards, each logged as a part of the reward, as are its metrics."""

    name = "verifiers"
    sources = ("verifiers",)

    @classmethod
    def open(cls, settings: TaskSettings, loaded: LoadedPrompts) -> "EnvironmentVerifier":
        """Its processes load the environment when the answers are checked."""
        columns = tuple(dict.fromkeys(name for prompt in (*loaded.train, *loaded.heldout) for name in prompt.columns))
        build = partial(build_scorer, settings.environment, dict(settings.environment_args), settings.correct_threshold)
        pool = VerifierPool(build=build, num_workers=settings.verify_workers, timeout=settings.verify_timeout)
        return cls(pool, data_source=settings.environment or "", column_names=columns)


def _read_tasks(settings: TaskSettings) -> list[tuple[int, dict[str, Any]]]:
    """(index, data) of the tasks that are needed."""
    build = partial(build_reader, settings.environment, dict(settings.environment_args))
    pool = VerifierPool(build=build, num_workers=1, timeout=LOAD_SECONDS)
    try:
        (result,) = pool.run([settings.pool_size + settings.heldout_size])
    finally:
        pool.close()
    if result.timed_out:
        raise NpoError(
            f"the environment {settings.environment} was not loaded in {LOAD_SECONDS:g} s",
            "see its output above",
        )
    if result.error:
        raise NpoError(
            f"the environment {settings.environment} cannot be loaded: {result.error}",
            "fix it, or task.environment_args",
        )
    kind, payload = result.value
    if kind == "refused":
        raise NpoError(*payload)
    return list(enumerate(json.loads(payload)))


def _make_prompt(data: Mapping[str, Any], index: int, settings: TaskSettings) -> Prompt:
    answer = data.get("answer")
    is_scalar = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    bare = Prompt(
        prompt_id=f"{settings.environment}/{index:06d}",
        answer=str(answer) if is_scalar else "",
        dataset=settings.environment or "",
        row=index,
        columns=data,
    )
    question, system = data["prompt"], data.get("system_prompt")
    if isinstance(question, str) and not system:
        return format_prompt(question, settings=settings, prompt=bare)
    turns = [Message(role="system", content=system)] if system else []
    if isinstance(question, str):
        turns.append(Message(role="user", content=question))
    else:
        turns += [Message(role=turn["role"], content=turn["content"]) for turn in question]
    return format_prompt(turns, settings=settings, prompt=bare)


# In the environment's processes


class _UnusableEnvironment(Exception):
    """(message, hint) of what an environment needs that a training step has not."""


def build_reader(environment: str, arguments: dict[str, Any]) -> Callable[[int], tuple[str, Any]]:
    """A function count -> ("tasks", JSON of the first tasks' data) or ("refused", (message, hint))."""

    def read(count: int) -> tuple[str, Any]:
        try:
            taskset = _load_taskset(environment, arguments)
            tasks = list(islice(iter(taskset), count))
            for task in tasks:
                _check_task(task, environment)
            return "tasks", json.dumps([task.data.model_dump(mode="json") for task in tasks])
        except _UnusableEnvironment as error:
            return "refused", error.args

    return read


def build_scorer(
    environment: str, arguments: dict[str, Any], correct_threshold: float
) -> Callable[[RewardCall], VerifierResult | str]:
    """A function that scores a response as the only turn of a rollout; a text says what failed."""
    taskset = _load_taskset(environment, arguments)
    kind = type(taskset).task_type()

    def score(call: RewardCall) -> VerifierResult | str:
        try:
            task = kind(kind.data_type().model_validate(dict(call.columns)), taskset.config.task)
            trace = _make_trace(task, call)
            asyncio.run(task.score(trace))
        except Exception as error:
            return describe_error(error.__cause__ or error)
        parts = {name: each.score for name, each in trace.rewards.items() if each is not None}
        parts |= {name: float(each) for name, each in trace.metrics.items() if each is not None}
        reward = float(trace.reward)
        if reward - reward != 0:
            return f"the rewards {parts} add up to {reward}"
        verdict = "correct" if reward >= correct_threshold - 1e-9 else "wrong"
        return VerifierResult(verdict=verdict, score=reward, parts=parts)

    return score


def _load_taskset(environment: str, arguments: Mapping[str, Any]) -> Any:
    """The environment's taskset, refused if it needs more than one turn."""
    try:
        import verifiers.v1 as vf
        from verifiers.v1.utils import loaders
    except ImportError as error:
        raise NpoError(
            f"task.source=verifiers needs verifiers 0.4 or newer: {error}", "pip install -U 'npo-cli[verifiers]'"
        ) from error
    try:
        module = loaders.import_taskset(environment)
        config = loaders.taskset_config_type(environment).model_validate({**arguments, "id": environment})
    except ModuleNotFoundError as error:
        raise _UnusableEnvironment(
            f"task.environment={environment} is not installed: {str(error).split(' A taskset is')[0]}",
            "install its package (prime env install OWNER/NAME, or pip install PACKAGE)",
        ) from error
    except (AttributeError, TypeError) as error:
        if "module" in locals() and hasattr(module, "load_environment"):
            raise _UnusableEnvironment(
                f"{environment} is an environment of verifiers before 0.4: it has load_environment() and no Taskset",
                "install a version of it that exports a Taskset",
            ) from error
        raise _UnusableEnvironment(f"{environment} is no environment: {error}", "fix task.environment") from error
    except ValueError as error:
        text = " ".join(str(error).split())
        raise _UnusableEnvironment(
            f"{environment} does not take task.environment_args={dict(arguments)}: {text}", "fix task.environment_args"
        ) from error
    taskset = loaders.taskset_class(environment)(config)
    own = loaders.environment_class(environment)
    if own is not vf.SingleAgentEnv:
        raise _UnusableEnvironment(f"{environment} has an environment of several turns ({own.__name__})", ONE_TURN)
    if loaders.default_harness_id(environment) == environment:
        raise _UnusableEnvironment(f"{environment} has a harness of its own, which takes several turns", ONE_TURN)
    if type(taskset).toolsets(config):
        raise _UnusableEnvironment(f"{environment} has tools, which take several turns", ONE_TURN)
    return taskset


def _check_task(task: Any, environment: str) -> None:
    """Refuse a task that is not one prompt and one response."""
    import verifiers.v1 as vf
    from verifiers.v1.utils.decorators import discover_decorated

    kind, data = type(task), task.data
    functions = [*task.hooks("reward"), *(judge.score for judge in task.plugged_judges())]
    needs_runtime = [each.__name__ for each in (*functions, *task.hooks("metric")) if _needs_runtime(each)]
    own = [name for name in ("setup", "finalize") if getattr(kind, name) is not getattr(vf.Task, name)]
    contents = [turn.content for turn in data.prompt] if isinstance(data.prompt, list) else [data.prompt]
    reasons = {
        "has tools, which take several turns": bool(kind.toolsets(task.config)),
        "has a stop condition, so it takes several turns": bool(task.hooks("stop")),
        "intercepts the model's turns": bool(discover_decorated(task, "intercept")),
        "lets the user open the conversation, which takes several turns": data.prompt is None,
        "needs a container": kind.NEEDS_CONTAINER or data.image is not None,
        f"has {' and '.join(own)} in a runtime": bool(own),
        f"scores in a runtime ({', '.join(needs_runtime)})": bool(needs_runtime),
        "has no rewards": not functions,
        "has images in its prompt": not all(isinstance(text, str) for text in contents if text is not None),
    }
    for reason, applies in reasons.items():
        if applies:
            raise _UnusableEnvironment(f"task {data.idx} of {environment} {reason}", ONE_TURN)


def _needs_runtime(function: Callable[..., Any]) -> bool:
    parameter = inspect.signature(function).parameters.get("runtime")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _make_trace(task: Any, call: RewardCall) -> Any:
    """A rollout of one turn: the prompt's messages, and the response."""
    import verifiers.v1 as vf
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.state import state_cls
    from verifiers.v1.trace import TraceTask

    turns: Sequence[Mapping[str, str]] = call.messages or ({"role": "user", "content": call.text},)
    kinds = {"system": vf.SystemMessage, "user": vf.UserMessage, "assistant": vf.AssistantMessage}
    messages = [kinds[turn["role"]](content=turn["content"]) for turn in turns]
    nodes = [
        MessageNode(parent=at - 1 if at else None, message=message, sampled=at == len(messages))
        for at, message in enumerate([*messages, vf.AssistantMessage(content=call.response)])
    ]
    described = TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    return vf.Trace(
        task=described,
        state=state_cls(type(task))(),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=nodes,
        is_completed=True,
        ok=True,
    )
