"""The user's reward functions: called with the arguments they ask for by name, and their results read.

Three signatures, told apart by their parameters:

- npo: `function(prompt, response, answer)`, text each
- TRL: `function(completions, prompts, **kwargs)`, lists, which returns a list of numbers or None
- verl: `function(data_source, solution_str, ground_truth, extra_info=None)`

Each also gets the columns of the data that it names (all of them with **kwargs), TRL's as lists. Every call is about
one response, so that its reward does not depend on the batch it was sampled in: TRL's lists have one item.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from npo_cli.errors import NpoError
from npo_cli.tasks.rewards import MAX_REWARD
from npo_cli.types.rollouts import Prompt, VerifierResult

Convention = Literal["npo", "trl", "verl"]
RESULTS: Mapping[Convention, str] = {
    "npo": 'a finite number, a bool or a dict {"reward": NUMBER, "correct": BOOL, "parts": {NAME: NUMBER}}',
    "trl": "a list with one finite number, or None, per completion",
    "verl": 'a finite number, a bool or a dict {"score": NUMBER, ...}',
}
SIGNATURE_HINT = "write def function(prompt, response, answer), or one of TRL's or verl's reward functions"


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardCall:
    """One response, and all that a reward function may ask for."""

    prompt_id: str
    text: str
    """The prompt as text; of a chat the contents of its messages, separated by blank lines."""
    messages: tuple[dict[str, str], ...]
    """Of a chat prompt, else empty."""
    response: str
    answer: str | None
    """None where the data has no reference answers: the function is then not given any."""
    data_source: str
    columns: Mapping[str, Any]

    def arguments(self, convention: Convention) -> dict[str, Any]:
        """Every argument that there is, by name."""
        own = {"prompt_id": self.prompt_id} | ({} if self.answer is None else {"answer": self.answer})
        if convention == "npo":
            return {**self.columns, **own, "prompt": self.text, "response": self.response}
        if convention == "verl":
            reward_model, extra_info = self.columns.get("reward_model"), self.columns.get("extra_info")
            truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
            truth = self.answer if truth is None else truth
            knows_truth = truth is not None or "reward_model" in self.columns
            return {
                **own,
                **self.columns,
                "data_source": self.columns.get("data_source") or self.data_source,
                "solution_str": self.response,
                **({"ground_truth": truth} if knows_truth else {}),
                "extra_info": extra_info if isinstance(extra_info, dict) else {**own, **self.columns},
            }
        columns = {name: [value] for name, value in {**own, **self.columns}.items() if name not in TRL_OWN_COLUMNS}
        completion = [{"role": "assistant", "content": self.response}] if self.messages else self.response
        return {**columns, "prompts": [list(self.messages) or self.text], "completions": [completion]}


TRL_OWN_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns that TRL never passes."""


def make_reward_call(
    prompt: Prompt, response: str, *, data_source: str, column_names: Sequence[str], has_answers: bool = True
) -> RewardCall:
    """The call for a response; a column that is not in the prompt's row is None."""
    return RewardCall(
        prompt_id=prompt.prompt_id,
        text=prompt.text if prompt.text is not None else "\n\n".join(turn.content for turn in prompt.messages),
        messages=tuple({"role": turn.role, "content": turn.content} for turn in prompt.messages),
        response=response,
        answer=prompt.answer if has_answers else None,
        data_source=prompt.dataset or data_source,
        columns={name: prompt.columns.get(name) for name in column_names},
    )


class InvalidReward(Exception):
    """What a function returned is not a reward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardFunction:
    """A user's function and how it is called."""

    name: str
    """`FILE: FUNCTION`, for errors."""
    function: Callable[..., Any]
    convention: Convention
    parameters: frozenset[str] | None
    """Arguments that it is given; None: all."""
    correct_threshold: float

    def __call__(self, call: RewardCall) -> VerifierResult | None:
        """The result, None where it does not apply. InvalidReward if what the function returned is none."""
        arguments = call.arguments(self.convention)
        if self.parameters is not None:
            arguments = {name: value for name, value in arguments.items() if name in self.parameters}
        value = self.function(**arguments)
        if inspect.isawaitable(value):
            value = asyncio.run(_wait_for(value))
        try:
            return self._read(value)
        except (TypeError, ValueError) as error:
            detail = f" ({error})" if str(error) else ""
            raise InvalidReward(
                f"{self.name} must return {RESULTS[self.convention]}, it returned {_shorten(value)}{detail}"
            ) from None

    def _read(self, value: Any) -> VerifierResult | None:
        if self.convention == "trl":
            (value,) = _read_list(value)
            return None if value is None else self._read_number(value)
        if not isinstance(value, Mapping):
            return self._read_number(value)
        if self.convention == "verl":
            score = self._read_number(value.get("score"))
            rest = {name: each for name, each in value.items() if name != "score"}
            is_correct = _read_bool(rest.pop("acc", None))
            parts = {str(name): _read_finite(each) for name, each in rest.items() if _is_number(each)}
            return self._combine(score, is_correct, parts)
        unknown = [name for name in value if name not in ("reward", "correct", "parts")]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no key of it")
        given = value.get("parts") or {}
        if not isinstance(given, Mapping) or not all(isinstance(name, str) and name for name in given):
            raise ValueError("parts are not numbers by name")
        parts = {name: _read_finite(each) for name, each in given.items()}
        return self._combine(self._read_number(value.get("reward")), _read_bool(value.get("correct")), parts)

    def _read_number(self, value: Any) -> VerifierResult:
        """A bool is a verdict; a number is a reward, correct from the threshold on."""
        if _is_bool(value):
            return VerifierResult(verdict="correct" if value else "wrong")
        number = _read_finite(value)
        return VerifierResult(verdict="correct" if number >= self.correct_threshold else "wrong", score=number)

    def _combine(self, result: VerifierResult, is_correct: bool | None, parts: Mapping[str, float]) -> VerifierResult:
        verdict = result.verdict if is_correct is None else "correct" if is_correct else "wrong"
        return VerifierResult(verdict=verdict, score=result.reward, parts=parts)


def wrap_function(
    function: object, name: str, *, correct_threshold: float, column_names: Sequence[str], missing_answers: str = ""
) -> RewardFunction:
    """Find out which signature a function has. A required parameter that nothing is known for is an error.

    `missing_answers`: the name of the answer column where the data has none.
    """
    if not callable(function):
        raise NpoError(f"{name} is not a function", SIGNATURE_HINT)
    try:
        signature = inspect.signature(function)
    except ValueError:  # a C function without a signature
        parameters = ["prompt", "response", "answer"]
        return RewardFunction(
            name=name,
            function=function,
            convention="npo",
            parameters=frozenset(parameters),
            correct_threshold=correct_threshold,
        )
    parameters = signature.parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    convention = _find_convention(parameters, takes_all=takes_all)
    if convention is None:
        raise NpoError(
            f"{name}{signature} takes no response: none of its parameters is response (npo), completions (TRL) or "
            "solution_str (verl)",
            SIGNATURE_HINT,
        )
    example = RewardCall(
        prompt_id="",
        text="",
        messages=(),
        response="",
        answer=None if missing_answers else "",
        data_source="",
        columns=dict.fromkeys(column_names),
    )
    known = example.arguments(convention)
    required = [
        one.name
        for one in parameters.values()
        if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]
    unknown = [one for one in required if one not in known or parameters[one].kind is inspect.Parameter.POSITIONAL_ONLY]
    if unknown and unknown[0] in ("answer", "ground_truth") and missing_answers:
        raise NpoError(
            f"{name} asks for {unknown[0]!r}, but the data has no column {missing_answers!r} (task.answer_column)",
            f"set task.answer_column to one of: {', '.join(column_names) or '(none)'}; or do not ask for it",
        )
    if unknown:
        columns = ", ".join(column_names) or "(none)"
        raise NpoError(
            f"{name} requires the parameter {unknown[0]!r}, which is neither an argument of its signature nor a column",
            f"give it a default, or use one of: {', '.join(sorted(known))}; columns of the data: {columns}",
        )
    return RewardFunction(
        name=name,
        function=function,
        convention=convention,
        parameters=None if takes_all else frozenset(parameters),
        correct_threshold=correct_threshold,
    )


def _find_convention(parameters: Mapping[str, Any], *, takes_all: bool) -> Convention | None:
    if "completions" in parameters:
        return "trl"
    if "solution_str" in parameters:
        return "verl"
    return "npo" if "response" in parameters or takes_all else None


async def _wait_for(value: Any) -> Any:
    return await value


def _read_list(value: Any) -> list[Any]:
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        raise ValueError
    items = list(value)
    if len(items) != 1:
        raise ValueError(f"{len(items)} rewards for 1 completion")
    return items


def _is_bool(value: Any) -> bool:
    """Whether it is true or false, numpy's included (whose name is `bool` or `bool_`)."""
    return type(value).__name__ in ("bool", "bool_")


def _read_bool(value: Any) -> bool | None:
    if value is None or _is_bool(value):
        return None if value is None else bool(value)
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise ValueError(f"{_shorten(value)} is neither true nor false")


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__")


def _read_finite(value: Any) -> float:
    if not _is_number(value):
        raise ValueError(f"{_shorten(value)} is not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    if abs(number) > MAX_REWARD:
        raise ValueError(f"more than {MAX_REWARD:g}")
    return number


def _shorten(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
