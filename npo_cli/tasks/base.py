"""The two interfaces of a task: a source of prompts, and a verifier of responses.

Each is one class with a `name`, listed in `npo_cli.registry` (`TASKS` for `task.source`, `VERIFIERS` for
`task.verifier`). A task from outside is added as an entry point and needs no change here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from npo_cli.errors import NpoError
from npo_cli.types.rollouts import Prompt, VerifierResult

if TYPE_CHECKING:
    from npo_cli.config.recipe import TaskSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedPrompts:
    """What a source of prompts loads."""

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    verifier_data: Any = None
    """For a verifier that belongs to this source; None if there is none."""


class TaskSource:
    """A source of prompts. Subclasses set the flags that apply and implement `load`."""

    name: ClassVar[str]
    """The value of `task.source`."""
    default_verifier: ClassVar[str] = "exact"
    """Meaning of `task.verifier=auto`. Never depends on what is installed: a recipe is graded in one way only."""
    formats_prompts: ClassVar[bool] = True
    """Applies task.suffix, task.chat and task.system; otherwise its prompts have a fixed form."""
    supports_images: ClassVar[bool] = False
    """Reads task.image_column."""

    @classmethod
    def validate(cls, settings: "TaskSettings") -> None:
        """Raise `NpoError` for settings that this source does not use, or lacks."""
        if settings.image_column is not None and not cls.supports_images:
            raise NpoError(
                f"task.image_column names a column of a file, but task.source is {cls.name}",
                "remove it, or set task.source=file",
            )
        unused = [name for name in ("suffix", "chat", "system") if getattr(settings, name)]
        if unused and not cls.formats_prompts:
            raise NpoError(
                f"task.{unused[0]} has no effect: the prompts of task.source={cls.name} have a fixed form",
                f"remove task.{unused[0]}, or choose another task.source",
            )

    @classmethod
    def list_code(cls, settings: "TaskSettings") -> tuple[str, ...]:
        """User code that `load` runs, as `file.py:function` or `module:function`."""
        return ()

    @classmethod
    def choose_verifier(cls, loaded: LoadedPrompts) -> str:
        """Meaning of `task.verifier=auto` for these prompts."""
        return cls.default_verifier

    @classmethod
    def load(cls, settings: "TaskSettings", *, seed: int) -> LoadedPrompts:
        """The prompts, a function of settings and seed; the pool does not depend on heldout_size."""
        raise NotImplementedError

    @classmethod
    def locate(cls, prompt: Prompt, settings: "TaskSettings") -> str:
        """Where a prompt comes from, to start an error with: `data.jsonl line 3: `; empty if from no file."""
        return ""

    @classmethod
    def explain(cls, prompt: Prompt) -> str:
        """What a prompt asks, in words, where its text is not made for people; empty where it explains itself."""
        return ""


class Verifier:
    """Verifies responses. Subclasses implement `grade`, and `open` if they need settings or data."""

    name: ClassVar[str]
    """The value of `task.verifier`."""
    sources: ClassVar[tuple[str, ...]] = ()
    """The values of `task.source` that it works with; empty: all."""
    needs_answer: ClassVar[bool] = True
    """Compares with the reference answer; otherwise rows of data may have none."""
    uses_threshold: ClassVar[bool] = False
    """Applies task.correct_threshold to the numbers that it returns."""

    @classmethod
    def open(cls, settings: "TaskSettings", loaded: LoadedPrompts) -> "Verifier":
        """A verifier for these prompts. Nothing slow is started before the first response."""
        return cls()

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[VerifierResult | None]:
        """The result for each response; response i answers prompt i. None: this verifier does not apply to it."""
        raise NotImplementedError

    def check_answers(self, prompts: Sequence[Prompt]) -> None:
        """Raise `UnusableAnswer` for a reference answer that no response could match."""

    def close(self) -> None:
        """End the verifier's processes. Grading again starts new ones."""


class UnusableAnswer(NpoError):
    """A reference answer that the verifier cannot read, or lacks."""

    def __init__(self, prompt: Prompt, expected: str = "") -> None:
        self.prompt = prompt
        if not prompt.answer:
            super().__init__(
                f"prompt {prompt.prompt_id} has no reference answer, but other prompts have one",
                "fill it in, or remove the column from all rows if the verifier does not ask for it",
            )
            return
        answer = prompt.answer if len(prompt.answer) <= 60 else f"{prompt.answer[:60]}..."
        super().__init__(
            f"the reference answer of prompt {prompt.prompt_id} is not {expected} the verifier can read: {answer!r}",
            "fix that answer, or choose another task.verifier (exact compares texts as they are)",
        )
