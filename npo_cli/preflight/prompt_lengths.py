"""Lengths of the prompts in tokens, and one prompt as the model reads it: the tokenizer is loaded, no weights are."""

from collections.abc import Iterator, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.policy.model import encode_prompt, load_tokenizer
from npo_cli.policy.model_folder import find_model, read_max_tokens
from npo_cli.types.rollouts import Prompt
from npo_cli.types.views import ProjectCheck

SHOWN_CHARS = 400
"""Of the prompt that is shown."""


def check_prompts(recipe: Recipe, prompts: Sequence[Prompt], *, places: Mapping[str, str]) -> Iterator[ProjectCheck]:
    """Every prompt against task.max_prompt_tokens and the model's own limit.

    `places`: prompt id -> where in a file it is.
    """
    path = recipe.model.path
    tokenizer = load_tokenizer(path)
    if any(prompt.messages for prompt in prompts) and not tokenizer.chat_template:
        yield ProjectCheck(
            part="prompts",
            state="fault",
            message=f"{path}: the tokenizer has no chat template, but prompts are chat messages",
            hint="choose an instruct model, or use plain prompts (strings, and task.chat=false)",
        )
        return
    lengths = [len(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    longest = prompts[lengths.index(max(lengths))].prompt_id
    faults = list(_find_faults(recipe, lengths, place=places.get(longest, f"prompt {longest}")))
    yield from (ProjectCheck(part="prompts", state="fault", message=one.message, hint=one.hint) for one in faults)
    if not faults:
        limit = recipe.task.max_prompt_tokens
        message = f"{min(lengths)} to {max(lengths)} tokens, of at most {limit}"
        yield ProjectCheck(part="prompts", state="ok", message=message)
    yield _show(tokenizer, prompts[0])


def _find_faults(recipe: Recipe, lengths: Sequence[int], *, place: str) -> Iterator[NpoError]:
    """`place`: of the longest prompt."""
    longest, limit = max(lengths), recipe.task.max_prompt_tokens
    empty, long = lengths.count(0), sum(1 for each in lengths if each > limit)
    if empty:
        yield NpoError(
            f"{_count(empty)} without tokens: the model's tokenizer has none of the characters",
            "fix the text, or choose another model.path",
        )
    if long:
        yield NpoError(
            f"{_count(long)} longer than task.max_prompt_tokens={limit}: {place} has {longest} tokens",
            f"set task.max_prompt_tokens={longest}, or remove what is longer",
        )
    source = find_model(recipe.model.path)
    supported = None if isinstance(source, str) else read_max_tokens(source)
    wanted = longest + recipe.sampling.max_new_tokens
    if supported is not None and wanted > supported > recipe.sampling.max_new_tokens:
        yield NpoError(
            f"{place} and its response may have {wanted} tokens; {recipe.model.path} supports {supported}",
            "lower sampling.max_new_tokens, remove the prompt, or choose another model.path",
        )


def _count(number: int) -> str:
    return "1 prompt is" if number == 1 else f"{number} prompts are"


def _show(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> ProjectCheck:
    text = tokenizer.decode(encode_prompt(tokenizer, prompt))
    shown = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."
    form = "chat messages, through the chat template" if prompt.messages else "plain text, without a chat template"
    return ProjectCheck(part="prompts", state="ok", message=f"{form}; the model reads: {shown!r}")
