"""Verdicts on responses: the interface every grader has, and the graders that need no other process.

A judge compares one response with one reference answer. A grader does so for a batch; those that may hang or
crash do it elsewhere (`math_pool`, `user_code`, `gym`). *Wrong* means read and different, *unparseable* means
that there was nothing to compare.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from npo_cli.errors import NpoError
from npo_cli.records import VerifierResult, Prompt
from npo_cli.tasks.micro import final_answer
from npo_cli.tasks.numerals import last_numeral, read_number

GradeFunction = Callable[[str, str], VerifierResult]
"""(reference answer, response) -> verdict."""


class UnusableAnswer(NpoError):
    """A reference answer that the chosen verifier cannot read."""

    def __init__(self, prompt: Prompt, wanted: str) -> None:
        shown = prompt.answer if len(prompt.answer) <= 60 else f"{prompt.answer[:60]}..."
        super().__init__(
            f"the reference answer of prompt {prompt.prompt_id} is not {wanted} the verifier can read: {shown!r}",
            "mend that answer, or choose another task.verifier (exact compares texts as they are)",
        )
        self.prompt = prompt


class Verifier(Protocol):
    """Verifies responses, in the order given. `close` ends its processes; one that has none does nothing."""

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]: ...

    def check_answers(self, prompts: Sequence[Prompt]) -> None:
        """Refuse reference answers that no response could ever match."""

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionVerifier:
    """Grades in this process, one response at a time."""

    grade_response: GradeFunction
    is_readable: Callable[[str], bool] = bool
    """Whether a reference answer can be compared at all."""

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]:
        return [self.grade_response(prompt.answer, response) for prompt, response in zip(prompts, responses, strict=True)]

    def check_answers(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not self.is_readable(prompt.answer):
                raise UnusableAnswer(prompt, "a number")

    def close(self) -> None:
        pass


def grade_exact(answer: str, response: str) -> VerifierResult:
    """Equal texts, blanks at both ends apart. An empty response is unparseable."""
    said = response.strip()
    if not said:
        return VerifierResult(verdict="unparseable")
    return VerifierResult(verdict="correct" if said == answer.strip() else "wrong", extracted=said)


def grade_number(answer: str, response: str) -> VerifierResult:
    """The whole response is one number, of exactly the answer's value: 0.50, 1/2 and .5 are one answer."""
    return _compare_numbers(answer, response.strip())


def grade_last_number(answer: str, response: str) -> VerifierResult:
    """As `judge_number`, for the last number written in the response."""
    return _compare_numbers(answer, last_numeral(response))


def grade_micro(answer: str, response: str) -> VerifierResult:
    """What follows the one `#` of a scratchpad is the answer, digit for digit. No `#`, or several: unparseable."""
    said = final_answer(response)
    if said is None:
        return VerifierResult(verdict="unparseable")
    return VerifierResult(verdict="correct" if said == answer else "wrong", extracted=said)


def _compare_numbers(answer: str, numeral: str | None) -> VerifierResult:
    value = None if numeral is None else read_number(numeral)
    if value is None:
        return VerifierResult(verdict="unparseable")
    return VerifierResult(verdict="correct" if value == read_number(answer) else "wrong", extracted=numeral)


def is_number(answer: str) -> bool:
    """Whether an answer has an exact numeric value."""
    return read_number(answer) is not None


BUILTIN_VERIFIERS = {
    "exact": FunctionVerifier(grade_response=grade_exact, is_readable=lambda answer: bool(answer.strip())),
    "number": FunctionVerifier(grade_response=grade_number, is_readable=is_number),
    "last_number": FunctionVerifier(grade_response=grade_last_number, is_readable=is_number),
    "micro": FunctionVerifier(grade_response=grade_micro),
}
"""The graders that work in this process, by their name in a recipe."""
