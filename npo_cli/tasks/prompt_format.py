"""From a question to a prompt: suffix, chat wrapping, system message."""

from collections.abc import Sequence
from dataclasses import replace

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.types.rollouts import Message, Prompt


def format_prompt(question: str | Sequence[Message], *, settings: TaskSettings, prompt: Prompt) -> Prompt:
    """`prompt` with its text or messages filled in as task.suffix, task.chat and task.system say.

    Messages stay messages, whatever task.chat says; a system message of their own comes before task.system.
    """
    ending = f"\n{settings.suffix}" if settings.suffix else ""
    if isinstance(question, str):
        if not settings.chat:
            return replace(prompt, text=question + ending)
        return replace(prompt, messages=(*_system(settings), Message(role="user", content=question + ending)))
    *before, last = question
    told = before[0].role == "system" if before else False
    return replace(
        prompt, messages=(*(() if told else _system(settings)), *before, replace(last, content=last.content + ending))
    )


def validate_task_settings(settings: TaskSettings) -> None:
    """A setting that would change nothing is a misunderstanding: say so."""
    if settings.image_column is not None and settings.source != "file":
        raise NpoError(
            f"task.image_column names a column of a file, and task.source is {settings.source}",
            "leave it out, or set task.source=file",
        )
    if settings.source in ("micro", "shapes"):
        idle = [name for name in ("suffix", "chat", "system") if getattr(settings, name)]
        if idle:
            raise NpoError(
                f"task.{idle[0]} has no meaning for the {settings.source} task, whose prompts have one fixed form",
                f"leave task.{idle[0]} out, or choose another task.source",
            )
    elif settings.source == "reasoning_gym" and settings.system and not settings.chat:
        raise NpoError("task.system needs chat prompts, but task.chat is false", "set task.chat=true")


def _system(settings: TaskSettings) -> tuple[Message, ...]:
    return (Message(role="system", content=settings.system),) if settings.system else ()
