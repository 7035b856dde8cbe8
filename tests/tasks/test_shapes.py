"""Shapes are drawn from the seed alone, and the answer is what is in the picture."""

import random

from npo_cli.config.recipe import TaskSettings
from npo_cli.images import open_image
from npo_cli.tasks.shapes import COLOURS, Shape, count_shapes, draw_image, noisy_count, sample_shapes, shapes_prompts
from npo_cli.tasks.task import load_task


def test_shapes_images_depend_on_the_seed_only():
    first, again, other = (shapes_prompts(20, seed) for seed in (1, 1, 2))
    assert first == again and [prompt.images[0].data for prompt in first] == [prompt.images[0].data for prompt in again]
    assert not {prompt.images[0].sha256 for prompt in first} & {prompt.images[0].sha256 for prompt in other}


def test_shapes_colours_can_be_counted_in_the_pixels():
    """A square fills 6 x 6 of its 8 x 8 pixels."""
    shapes = (
        Shape(cell=0, colour="red", form="squares"),
        Shape(cell=5, colour="red", form="squares"),
        Shape(cell=15, colour="blue", form="squares"),
    )
    seen = dict((colour, number) for number, colour in open_image(draw_image(shapes, "x")).getcolors())
    assert (seen[COLOURS["red"]], seen[COLOURS["blue"]]) == (2 * 36, 36)
    assert [count_shapes(shapes, asked) for asked in ("red", "blue", "discs", "squares")] == [2, 1, 0, 3]


def test_shapes_task_is_split_and_verified():
    task = load_task(TaskSettings(source="shapes", pool_size=12, heldout_size=3), seed=0)
    assert (len(task.train), len(task.heldout)) == (12, 3)
    right = [prompt.answer for prompt in task.train]
    wrong = [str(9 - int(answer)) for answer in right]
    assert [graded.reward for graded in task.grade(task.train, right)] == [1.0] * 12
    assert [graded.reward for graded in task.grade(task.train, wrong)] == [0.0] * 12


def test_shapes_training_data_has_squares_wrong_most_often():
    rng = random.Random(0)
    drawn = [sample_shapes(rng) for _ in range(4000)]
    right = {
        asked: sum(noisy_count(shapes, asked, rng) == count_shapes(shapes, asked) for shapes in drawn) / 4000
        for asked in ("red", "squares")
    }
    # red: 0.6 + 0.4 x 0.1 = 0.64. squares: of the 0.15 that are spared 0.64, so 0.096
    assert abs(right["red"] - 0.64) < 0.03 and abs(right["squares"] - 0.096) < 0.02
