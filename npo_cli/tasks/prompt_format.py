"""From a question to a prompt: task.suffix, task.chat, task.system."""

from collections.abc import Sequence
from dataclasses import replace

from npo_cli.config.recipe import TaskSettings
from npo_cli.types.rollouts import Message, Prompt


def format_prompt(question: str | Sequence[Message], *, settings: TaskSettings, prompt: Prompt) -> Prompt:
    """`prompt` with its text or messages, with task.suffix, task.chat and task.system applied.

    Messages stay messages even if task.chat is false; a system message of their own replaces task.system.
    """
    ending = f"\n{settings.suffix}" if settings.suffix else ""
    if isinstance(question, str):
        if not settings.chat:
            return replace(prompt, text=question + ending)
        return replace(prompt, messages=(*_system(settings), Message(role="user", content=question + ending)))
    *before, last = question
    has_system = before[0].role == "system" if before else False
    return replace(
        prompt,
        messages=(*(() if has_system else _system(settings)), *before, replace(last, content=last.content + ending)),
    )


def _system(settings: TaskSettings) -> tuple[Message, ...]:
    return (Message(role="system", content=settings.system),) if settings.system else ()
