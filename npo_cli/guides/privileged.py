"""Privileged text: the prompt as the teacher of a dense target reads it, with an answer that the policy is not shown.

The teacher's pass is over `target.template`, filled with the prompt and with what `target.privileged` names, and the
policy's response. Log-probabilities and distributions are those of the response's tokens, as of the policy's pass.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.policy.model import Policy
from npo_cli.rollout.batch import ActiveGuide
from npo_cli.types.rollouts import IMAGE_PLACEHOLDER, Group, Prompt, Rollout

PLACEHOLDER = re.compile(r"\{(prompt|privileged)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivilegedText:
    """What the teacher of a branch is shown at one step."""

    recipe: Recipe
    policy: Policy
    """Its tokenizer and chat template render the teacher's prompts."""
    responses: Mapping[str, Sequence[Rollout]] = field(default_factory=dict)
    """Of the guide cache, by prompt id; the first correct one is shown."""

    @property
    def skips_unfilled(self) -> bool:
        """Whether responses to prompts without a privileged text have no target."""
        return self.recipe.target.unfilled == "skip"

    def encode(self, group: Group) -> tuple[int, ...] | None:
        """Token ids of the teacher's prompt for a group; None without a privileged text.

        A guide's response is shown for the groups that one may be injected into: guide.inject.max_accuracy.
        """
        accuracy = group.on_policy.accuracy if group.on_policy_accuracy is None else group.on_policy_accuracy
        if self.recipe.target.shows_response and accuracy > self.recipe.guide.inject.max_accuracy:
            return None
        return self.encode_prompt(group.prompt)

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...] | None:
        """The same of a prompt, whatever its group. Raises NpoError where the model does not support its length."""
        text = self.find_text(prompt)
        if not text:
            return None
        ids = self.policy.encode(fill_template(self.recipe.target.template, prompt, text))
        wanted = len(ids) + self.recipe.sampling.max_new_tokens
        if self.policy.max_tokens is not None and wanted > self.policy.max_tokens:
            raise NpoError(
                f"with prompt {prompt.prompt_id} and target.privileged={self.recipe.target.privileged} the teacher may "
                f"read {wanted} tokens; the model supports {self.policy.max_tokens}",
                "show shorter texts (guide.cache.select=shortest, target.template), or lower sampling.max_new_tokens",
            )
        return ids

    def find_text(self, prompt: Prompt) -> str:
        """What is shown beside the prompt; empty where there is nothing."""
        shown = self.recipe.target.privileged
        if shown == "answer":
            return prompt.answer
        if shown == "response":
            known = self.responses.get(prompt.prompt_id, ())
            return next((rollout.text for rollout in known if rollout.is_correct), "")
        if shown not in prompt.columns:
            columns = ", ".join(sorted(prompt.columns)) or "none"
            raise NpoError(
                f"target.privileged={shown}: prompt {prompt.prompt_id} has no such column (its columns: {columns})",
                "target.privileged=answer   # or response, or a column of the data",
            )
        value = prompt.columns[shown]
        return "" if value is None else str(value)


def fill_template(template: str, prompt: Prompt, privileged: str) -> Prompt:
    """The prompt with the filled template as its text, or of chat messages as content of the last one."""
    values = {
        "prompt": prompt.messages[-1].content if prompt.text is None else prompt.text,
        # Images belong to the placeholders of the prompt itself.
        "privileged": privileged.replace(IMAGE_PLACEHOLDER, "") if prompt.images else privileged,
    }
    text = PLACEHOLDER.sub(lambda match: values[match[1]], template)
    if prompt.text is not None:
        return replace(prompt, text=text)
    *before, last = prompt.messages
    return replace(prompt, messages=(*before, replace(last, content=text)))


def check_privileged_text(
    recipe: Recipe, policy: Policy, prompts: Sequence[Prompt], *, guide: ActiveGuide | None = None
) -> None:
    """Refuse, before training, a privileged text that no prompt has, or that is too long. Those of a guide cache that
    is sampled while training are checked when they are used."""
    target = recipe.target
    shows_response = recipe.has_target and target.shows_response
    if guide is not None and recipe.guide.inject.mode == "none" and not shows_response:
        raise NpoError(
            "guide.inject.mode=none injects no response, and no dense target shows one: the guide would not be used",
            "target.privileged=response with a dense target, or guide.inject.mode=replace",
        )
    if not recipe.has_target or target.privileged is None:
        return
    if shows_response and guide is None:
        raise NpoError(
            "target.privileged=response is a response of a guide cache, and the branch has none",
            "fork it with one: npo resume RUN --at STEP --guide NAME; or show the reference: target.privileged=answer",
        )
    shown = PrivilegedText(recipe=recipe, policy=policy, responses={} if guide is None else guide.rollouts)
    filled = [shown.encode_prompt(prompt) for prompt in prompts]
    if not any(filled) and not (shows_response and guide is not None and guide.sample_missing):
        raise NpoError(
            f"target.privileged={target.privileged}: none of the {len(prompts)} prompts has one",
            "target.privileged=answer   # or response, or another column of the data",
        )
