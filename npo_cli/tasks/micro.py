"""The micro task: additions with a scratchpad, for a base model that learned some table entries wrong.

A prompt is `12345+67890=` with both numbers written least significant digit first, padded with dots on the left to a
fixed length. A response writes, digit by digit, the sum digit and the carry (`_` none, `^` one), then `#` and the sum,
most significant digit first. Only what follows `#` is verified.

A fixed 15 % of the 200 table entries (digit, digit, carry) are *misconceived*: the supervised base learned one
particular wrong digit for each. `kind` sets how many of them a prompt needs, and thus how sparse the reward is.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npo_cli.tasks.base import LoadedPrompts, TaskSource
from npo_cli.tasks.verifiers import FunctionVerifier
from npo_cli.types.rollouts import Prompt, VerifierResult

if TYPE_CHECKING:
    from npo_cli.config.recipe import TaskSettings

ALPHABET = "0123456789_^+=#"
FILL = "."
PROMPT_CHARS = 12
MAX_RESPONSE = 18
MISCONCEIVED_SHARE = 0.15
TASK_SEED = 20733


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """Error rates of the supervised base's training data."""

    digit: float = 0.20
    """Probability that a sum digit is replaced by a random one."""
    carry: float = 0.10
    """Probability that a carry is flipped."""
    misconception: float = 0.93
    """Probability that a misconceived entry gets its wrong digit."""


def misconceptions() -> dict[tuple[int, int, int], int]:
    """The wrong digit of each misconceived (digit, digit, carry) entry; the same in every run."""
    rng = random.Random(TASK_SEED)
    entries = [(a, b, c) for a in range(10) for b in range(10) for c in range(2)]
    chosen = rng.sample(entries, round(MISCONCEIVED_SHARE * len(entries)))
    return {(a, b, c): (a + b + c + rng.randint(1, 9)) % 10 for a, b, c in chosen}


def digits(number: int, length: int) -> list[int]:
    """The decimal digits of `number`, least significant first."""
    return [int(char) for char in reversed(str(number).zfill(length))]


def num_misconceived(a: int, b: int, length: int, *, wrong: dict[tuple[int, int, int], int]) -> int:
    """Number of misconceived entries that the exact calculation of a + b needs."""
    carry, count = 0, 0
    for _ in range(length):  # tried on thousands of pairs: plain arithmetic is twice as fast as digits in lists
        (a, x), (b, y) = divmod(a, 10), divmod(b, 10)
        count += (x, y, carry) in wrong
        carry = (x + y + carry) // 10
    return count


def format_addition(a: int, b: int, length: int) -> str:
    """The prompt text of a + b, always PROMPT_CHARS long."""
    text = f"{str(a).zfill(length)[::-1]}+{str(b).zfill(length)[::-1]}="
    return text.rjust(PROMPT_CHARS, FILL)


def final_answer(response: str) -> str | None:
    """The text after the `#`; None unless there is exactly one `#`."""
    _, mark, tail = response.partition("#")
    return tail if mark and "#" not in tail else None


def noisy_response(
    a: int, b: int, length: int, *, noise: Noise, wrong: dict[tuple[int, int, int], int], rng: random.Random
) -> str:
    """One scratchpad from the supervised base's training data, with its errors."""
    carry, written, pad = 0, [], ""
    for x, y in zip(digits(a, length), digits(b, length), strict=True):
        total = x + y + carry
        digit, next_carry = total % 10, total // 10
        if (x, y, carry) in wrong:
            digit = wrong[x, y, carry] if rng.random() < noise.misconception else digit
        elif rng.random() < noise.digit:
            digit = rng.randrange(10)
        if rng.random() < noise.carry:
            next_carry = 1 - next_carry
        carry = next_carry
        written.append(str(digit))
        pad += f"{digit}{'_^'[carry]}"
    number = ("1" if carry else "") + "".join(reversed(written))
    return f"{pad}#{number}"


def additions(kind: str, rng: random.Random, *, hard_share: float) -> Iterator[tuple[int, int, int]]:
    """Endless (a, b, number of digits) of one kind.

    `any`: 3 to 5 digits. `addhN`: 5 digits with at least N misconceived entries. `mix3`: 3 digits with none, and, as a
    share `hard_share` spread evenly, 5 digits with at least 3.
    """
    wrong = misconceptions()
    easy, hard = {
        "any": (None, (None, 0, 99)),
        "addh1": (None, (5, 1, 99)),
        "addh2": (None, (5, 2, 99)),
        "addh4": (None, (5, 4, 99)),
        "mix3": ((3, 0, 0), (5, 3, 99)),
    }[kind]
    turn = 0
    while True:
        is_hard = easy is None or int((turn + 1) * hard_share) > int(turn * hard_share)
        length, low, high = hard if is_hard else easy
        size = length or rng.randint(3, 5)
        a, b = (rng.randrange(10 ** (size - 1), 10**size) for _ in range(2))
        if low <= num_misconceived(a, b, size, wrong=wrong) <= high:
            yield a, b, size
            turn += 1


def micro_prompts(kind: str, count: int, seed: int, *, hard_share: float = 0.5) -> list[Prompt]:
    """`count` distinct prompts of one kind, in the order generated."""
    rng = random.Random(f"micro:{kind}:{seed}")
    prompts: dict[str, Prompt] = {}
    for a, b, size in additions(kind, rng, hard_share=hard_share):
        if len(prompts) == count:
            break
        text = format_addition(a, b, size)
        prompts.setdefault(text, Prompt(prompt_id=f"{kind}/{a}+{b}", text=text, answer=str(a + b)))
    return list(prompts.values())


def grade_micro(answer: str, response: str) -> VerifierResult:
    """The text after the `#` equals the answer, digit for digit. No `#`, or several: unparseable."""
    text = final_answer(response)
    if text is None:
        return VerifierResult(verdict="unparseable")
    return VerifierResult(verdict="correct" if text == answer else "wrong", extracted=text)


class MicroVerifier(FunctionVerifier):
    """The text after the `#`."""

    name = "micro"
    sources = ("micro",)
    grade_response = staticmethod(grade_micro)


class MicroTask(TaskSource):
    """Additions of one kind (`task.kind`)."""

    name = "micro"
    default_verifier = "micro"
    formats_prompts = False

    @classmethod
    def load(cls, settings: "TaskSettings", *, seed: int) -> LoadedPrompts:
        """The pool comes first, so that it does not depend on the size of the held-out split."""
        prompts = micro_prompts(
            settings.kind, settings.pool_size + settings.heldout_size, seed, hard_share=settings.hard_share
        )
        return LoadedPrompts(train=tuple(prompts[: settings.pool_size]), heldout=tuple(prompts[settings.pool_size :]))

    @classmethod
    def explain(cls, prompt: Prompt) -> str:
        """`80675 + 42164, both written least significant digit first`; empty for a text of another form."""
        found = re.fullmatch(r"\.*(\d+)\+(\d+)=", prompt.text or "")
        if found is None:
            return ""
        first, second = (number[::-1] for number in found.groups())
        return f"{first} + {second}, each number written least significant digit first; the answer stands after #"
