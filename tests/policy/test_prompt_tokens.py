from collections import Counter

from transformers import PreTrainedTokenizerBase

from npo_cli.policy.prompt_tokens import PromptTokens
from npo_cli.types.rollouts import ImageRef, Message, Prompt
from tests.helpers.runs import train


def text(content: str, *images: str) -> Prompt:
    shown = tuple(ImageRef(location="a.png", sha256=image, width=1, height=1) for image in images)
    return Prompt(prompt_id="any", answer="1", text=content, images=shown)


def lengths(calls: list[list[str]]):
    """A tokenizer that records what it was given: one token per character."""

    def tokenize(prompts):
        calls.append([prompt.text or prompt.messages[0].content for prompt in prompts])
        return [tuple(range(len(name))) for name in calls[-1]]

    return tokenize


def test_prompt_tokens_are_computed_once_per_content():
    tokens, calls = PromptTokens(), []
    tokenize = lengths(calls)
    chat = Prompt(prompt_id="any", answer="1", messages=(Message(role="user", content="ab"),))
    assert tokens.encode([text("ab"), text("c"), text("ab")], tokenize) == [(0, 1), (0,), (0, 1)]
    # The same text as a message or with an image is another prompt; so is one with another image.
    tokens.encode([text("c"), chat, text("ab", "x"), text("ab", "y"), text("ab")], tokenize)
    assert calls == [["ab", "c"], ["ab", "ab", "ab"]]


def test_prompt_tokens_of_those_used_longest_ago_leave_first():
    tokens, calls = PromptTokens(max_tokens=5), []
    tokenize = lengths(calls)
    for content in ("aa", "bb", "aa", "cc", "aa", "bb"):
        assert tokens.encode([text(content)], tokenize) == [(0, 1)]
    assert calls == [["aa"], ["bb"], ["cc"], ["bb"]]
    assert tokens.encode([text("a" * 9)], tokenize) == [tuple(range(9))]  # longer than all that is held


def test_a_run_tokenizes_each_prompt_once(tmp_path, monkeypatch):
    counts = Counter()
    call = PreTrainedTokenizerBase.__call__

    def count_and_call(self, texts, *args, **names):
        counts.update([texts] if isinstance(texts, str) else texts)
        return call(self, texts, *args, **names)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", count_and_call)
    train(tmp_path / "run", "train.num_steps=6", "eval.every=3")  # its 16 prompts are seen in 4 steps
    assert len(counts) == 16 + 4
    assert set(counts.values()) == {1}
