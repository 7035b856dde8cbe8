"""Token ids of prompts, so that each prompt goes through the tokenizer once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias

from npo_cli.types.rollouts import Message, Prompt

TokenIds: TypeAlias = tuple[int, ...]
Content: TypeAlias = tuple[str | None, tuple[Message, ...], tuple[str, ...]]
MAX_TOKENS = 4_000_000
"""Held at most, about 140 MB; the prompts used longest ago leave first."""


class PromptTokens:
    """Prompts and their token ids by content; safe to use from several threads."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self.max_tokens = max_tokens
        self._known: OrderedDict[Content, TokenIds] = OrderedDict()
        self._num_tokens = 0
        self._lock = threading.Lock()

    def encode(
        self, prompts: Sequence[Prompt], tokenize: Callable[[Sequence[Prompt]], Sequence[TokenIds]]
    ) -> list[TokenIds]:
        """The token ids of each prompt; `tokenize` is called once, with the distinct prompts that are not known."""
        contents = [_content(prompt) for prompt in prompts]
        with self._lock:
            found = {content: self._known[content] for content in contents if content in self._known}
            for content in found:
                self._known.move_to_end(content)
        missing = {content: prompt for content, prompt in zip(contents, prompts, strict=True) if content not in found}
        if missing:
            new = dict(zip(missing, tokenize(list(missing.values())), strict=True))
            found |= new
            self._add(new)
        return [found[content] for content in contents]

    def _add(self, new: dict[Content, TokenIds]) -> None:
        with self._lock:
            for content, ids in new.items():
                if content not in self._known:
                    self._known[content] = ids
                    self._num_tokens += len(ids)
            while self._num_tokens > self.max_tokens:
                self._num_tokens -= len(self._known.popitem(last=False)[1])


def _content(prompt: Prompt) -> Content:
    return prompt.text, prompt.messages, tuple(image.sha256 for image in prompt.images)
