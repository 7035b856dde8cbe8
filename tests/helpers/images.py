"""Prompts with pictures, and a policy that sees them."""

from dataclasses import replace
from pathlib import Path

from npo_cli.config.recipe import LoraSettings, ModelSettings
from npo_cli.images import make_in_memory_image_ref, open_image
from npo_cli.policy.model import Policy, load_policy
from npo_cli.tasks.shapes import shapes_prompts
from npo_cli.types.rollouts import IMAGE_PLACEHOLDER, ImageRef, Message, Prompt


def load_vision_policy(folder: Path, *, lora: int | None = None) -> Policy:
    return load_policy(ModelSettings(path=str(folder), lora=LoraSettings(rank=lora)))


def resize_image(image: ImageRef, width: int, height: int) -> ImageRef:
    return make_in_memory_image_ref(open_image(image).resize((width, height)), f"{image.location}-{width}x{height}")


def mixed_prompts() -> list[Prompt]:
    """One picture, none, two of different sizes, one of another shape; texts of different lengths."""
    one, two, three, four = shapes_prompts(4, 0)
    both = Message(role="user", content=f"{IMAGE_PLACEHOLDER}many{IMAGE_PLACEHOLDER}?")
    none = Prompt(prompt_id="blind", answer="1", messages=(Message(role="user", content="how many?"),))
    several = (resize_image(two.images[0], 64, 32), three.images[0])
    return [
        one,
        none,
        replace(three, messages=(both,), images=several),
        replace(four, images=(resize_image(four.images[0], 48, 64),)),
    ]
