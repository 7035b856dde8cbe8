"""The shapes task: count the shapes of one colour or form in an image that is generated from the seed.

An image has 4 x 4 cells; up to nine of them hold a red or blue disc or square. The question names a colour or a form,
the answer is one digit. `noisy_count` gives the answers in the supervised base's training data: often wrong, and nearly
always for one of the questions.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npo_cli.images import make_in_memory_image_ref, require_pillow
from npo_cli.tasks.base import LoadedPrompts, TaskSource
from npo_cli.types.rollouts import IMAGE_PLACEHOLDER, ImageRef, Message, Prompt

if TYPE_CHECKING:
    from npo_cli.config.recipe import TaskSettings

CELL_PIXELS = 8
NUM_CELLS = 4
"""Per row and per column."""
MAX_SHAPES = 9
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
FORMS = ("discs", "squares")
QUESTIONS = (*COLOURS, *FORMS)
NOISE = 0.4
"""Probability of a random digit in the base's training data."""
MISCONCEIVED = "squares"
MISCONCEPTION = 0.85
"""Probability that the base's training data has one too few of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One shape in a cell."""

    cell: int
    """Index, row by row, from 0."""
    colour: str
    form: str


def sample_shapes(rng: random.Random) -> tuple[Shape, ...]:
    """One to nine shapes in different cells."""
    cells = rng.sample(range(NUM_CELLS**2), rng.randint(1, MAX_SHAPES))
    return tuple(Shape(cell=cell, colour=rng.choice([*COLOURS]), form=rng.choice(FORMS)) for cell in sorted(cells))


def count_shapes(shapes: tuple[Shape, ...], kind: str) -> int:
    """Number of shapes with this colour or form."""
    return sum(kind in (shape.colour, shape.form) for shape in shapes)


def draw_image(shapes: tuple[Shape, ...], name: str) -> ImageRef:
    """The shapes on a white background."""
    from PIL import Image, ImageDraw

    side = CELL_PIXELS * NUM_CELLS
    canvas = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(canvas)
    for shape in shapes:
        top, left = (CELL_PIXELS * place for place in divmod(shape.cell, NUM_CELLS))
        box = (left + 1, top + 1, left + CELL_PIXELS - 2, top + CELL_PIXELS - 2)
        (pen.ellipse if shape.form == "discs" else pen.rectangle)(box, fill=COLOURS[shape.colour])
    return make_in_memory_image_ref(canvas, name)


def generate_questions(rng: random.Random) -> Iterator[tuple[tuple[Shape, ...], str]]:
    """Endless (shapes, colour or form to count)."""
    while True:
        yield sample_shapes(rng), rng.choice(QUESTIONS)


def shapes_prompts(count: int, seed: int) -> list[Prompt]:
    """`count` distinct prompts, in the order generated."""
    require_pillow()
    prompts: dict[object, Prompt] = {}
    for shapes, kind in generate_questions(random.Random(f"shapes:{seed}")):
        if len(prompts) == count:
            break
        name = f"shapes/{seed}/{len(prompts):06d}"
        prompts.setdefault((shapes, kind), shapes_prompt(shapes, kind, name))
    return list(prompts.values())


def shapes_prompt(shapes: tuple[Shape, ...], kind: str, name: str) -> Prompt:
    """The image, then the question."""
    return Prompt(
        prompt_id=f"{name}/{kind}",
        answer=str(count_shapes(shapes, kind)),
        messages=(Message(role="user", content=f"{IMAGE_PLACEHOLDER}how many {kind}?"),),
        images=(draw_image(shapes, name),),
    )


def noisy_count(shapes: tuple[Shape, ...], kind: str, rng: random.Random) -> int:
    """The answer in the supervised base's training data."""
    correct = count_shapes(shapes, kind)
    if kind == MISCONCEIVED and rng.random() < MISCONCEPTION:
        return (correct - 1) % 10
    return rng.randrange(10) if rng.random() < NOISE else correct


class ShapesTask(TaskSource):
    """Questions about generated images."""

    name = "shapes"
    default_verifier = "exact"
    formats_prompts = False

    @classmethod
    def load(cls, settings: "TaskSettings", *, seed: int) -> LoadedPrompts:
        """The pool comes first, so that it does not depend on the size of the held-out split."""
        prompts = shapes_prompts(settings.pool_size + settings.heldout_size, seed)
        return LoadedPrompts(train=tuple(prompts[: settings.pool_size]), heldout=tuple(prompts[settings.pool_size :]))
