"""The shapes task: how many shapes of one kind are in a picture? Drawn on the spot, from the seed alone.

A picture has 4 x 4 cells; up to nine of them hold a shape, red or blue, a disc or a square. The question names a colour
or a form, the answer is one digit. `noisy_count` is what a supervised base is taught: often wrong, and, for the
question that it was taught worst, nearly always.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from npo_cli.images import make_in_memory_image_ref, require_pillow
from npo_cli.types.rollouts import IMAGE_PLACEHOLDER, ImageRef, Message, Prompt

CELL_PIXELS = 8
NUM_CELLS = 4
"""In a row, and in a column."""
MAX_SHAPES = 9
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
FORMS = ("discs", "squares")
QUESTIONS = (*COLOURS, *FORMS)
NOISE = 0.4
"""Chance that the base is taught a random digit."""
MISCONCEIVED = "squares"
MISCONCEPTION = 0.85
"""Chance that the base is taught one too few of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One shape in a cell."""

    cell: int
    """Row by row, from 0."""
    colour: str
    form: str


def sample_shapes(rng: random.Random) -> tuple[Shape, ...]:
    """One to nine shapes in cells of their own."""
    cells = rng.sample(range(NUM_CELLS**2), rng.randint(1, MAX_SHAPES))
    return tuple(Shape(cell=cell, colour=rng.choice([*COLOURS]), form=rng.choice(FORMS)) for cell in sorted(cells))


def count_shapes(shapes: tuple[Shape, ...], asked: str) -> int:
    """How many have that colour or form."""
    return sum(asked in (shape.colour, shape.form) for shape in shapes)


def draw_image(shapes: tuple[Shape, ...], name: str) -> ImageRef:
    """The shapes on white."""
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
    """Endless pictures, each with what is asked of it."""
    while True:
        yield sample_shapes(rng), rng.choice(QUESTIONS)


def shapes_prompts(count: int, seed: int) -> list[Prompt]:
    """`count` different prompts, in the order drawn."""
    require_pillow()
    prompts: dict[object, Prompt] = {}
    for shapes, asked in generate_questions(random.Random(f"shapes:{seed}")):
        if len(prompts) == count:
            break
        name = f"shapes/{seed}/{len(prompts):06d}"
        prompts.setdefault((shapes, asked), shapes_prompt(shapes, asked, name))
    return list(prompts.values())


def shapes_prompt(shapes: tuple[Shape, ...], asked: str, name: str) -> Prompt:
    """The picture, then the question."""
    return Prompt(
        prompt_id=f"{name}/{asked}",
        answer=str(count_shapes(shapes, asked)),
        messages=(Message(role="user", content=f"{IMAGE_PLACEHOLDER}how many {asked}?"),),
        images=(draw_image(shapes, name),),
    )


def noisy_count(shapes: tuple[Shape, ...], asked: str, rng: random.Random) -> int:
    """What the supervised base is taught to say."""
    right = count_shapes(shapes, asked)
    if asked == MISCONCEIVED and rng.random() < MISCONCEPTION:
        return (right - 1) % 10
    return rng.randrange(10) if rng.random() < NOISE else right
