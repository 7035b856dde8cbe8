"""What a policy must have to read a task's prompts; said before anything is trained."""

from collections.abc import Sequence

from npo_cli.errors import NpoError
from npo_cli.policy.model import Policy
from npo_cli.types.rollouts import Prompt


def check_prompt_support(policy: Policy, prompts: Sequence[Prompt], path: str) -> None:
    """Eyes for pictures, a template for chats. `path` names the model in an error."""
    check_vision_support(policy, prompts, path)
    check_chat_template(policy, prompts, path)


def check_vision_support(policy: Policy, prompts: Sequence[Prompt], path: str) -> None:
    """Pictures need a vision-language model."""
    if policy.vision is None and any(prompt.images for prompt in prompts):
        raise NpoError(
            f"{path} reads text alone, and prompts have images",
            "name a vision-language model (model.path), or leave task.image_column out",
        )


def check_chat_template(policy: Policy, prompts: Sequence[Prompt], path: str) -> None:
    """Chat prompts need a template; say so before anything is trained."""
    if any(prompt.messages for prompt in prompts) and not policy.tokenizer.chat_template:
        raise NpoError(
            f"{path}: the tokenizer has no chat template, and prompts are chat messages",
            "use an instruct model, or plain prompts (strings, and task.chat=false)",
        )
