"""Settings of the order of prompts: which prompts a step trains on. See `docs/explanation/without-rollback.md`."""

import math

from pydantic import ConfigDict, Field

from npo_cli.config.base import FORK_TRAINING, IS_SET, Count, Decay, Settings, Share, applies_when, find_window_place

WITH_MISTAKES = applies_when({"order.mistakes": IS_SET})
WITH_REVIEW = applies_when({"order.review.fraction": IS_SET})


class ReviewSettings(Settings):
    """A review queue of prompts whose group was all correct (ReMind, arXiv 2606.03087)."""

    model_config = ConfigDict(json_schema_extra=FORK_TRAINING | WITH_REVIEW)

    fraction: Share = Field(
        0.0,
        description="Fraction of a batch's prompts taken from the review queue in a review step, rounded down, but at "
        "least one prompt; the others come from the data order (0: off).",
        json_schema_extra=applies_when({}),
    )
    every: Count = Field(5, description="Reviews are in the steps that this number divides.")
    first_step: Count = Field(50, description="No reviews before this step.")
    enqueue_probability: Share = Field(
        0.25, description="Probability that a prompt of the data order whose group is all correct enters the queue."
    )
    max_size: Count = Field(20000, description="Prompts that the queue holds; the oldest leave first.")

    def count_reviews(self, step: int, *, num_prompts: int) -> int:
        """Prompts of a training step's batch that are to be reviews; 0 in the other steps."""
        if not self.fraction or step < self.first_step or step % self.every:
            return 0
        return max(1, math.floor(self.fraction * num_prompts))


class OrderSettings(Settings):
    """Which prompts a step trains on: the data order, and mistakes first or a review queue."""

    model_config = ConfigDict(json_schema_extra=FORK_TRAINING | WITH_MISTAKES)

    mistakes: Share = Field(
        0.0,
        description="Fraction of a batch's prompts drawn from standing mistakes, groups that will probably be partly "
        "solved first; the others come from the data order (0: off).",
        json_schema_extra=applies_when({}),
    )
    threshold: Share | None = Field(
        None,
        description="A prompt is a standing mistake while the on-policy accuracy of its newest group is <= this "
        "(null: guide.inject.max_accuracy).",
    )
    visit_decay: Decay = Field(
        0.5,
        description="Weight of a prompt's group relative to its next newer one in the estimate of its pass rate (0: "
        "the newest group alone).",
    )
    start_step: int | None = Field(
        None, ge=0, description="The window begins after this step (null: where the branch was forked)."
    )
    num_steps: int | None = Field(
        None,
        ge=1,
        description="Length of the window in steps; then all prompts come from the data order (null: to the end).",
    )

    review: ReviewSettings = ReviewSettings()

    def count_mistakes(self, step: int, *, fork_step: int, num_prompts: int) -> int:
        """Prompts of a training step's batch that are drawn from standing mistakes; 0 outside the window."""
        place = find_window_place(step, fork_step if self.start_step is None else self.start_step, self.num_steps)
        return 0 if place is None else round(self.mistakes * num_prompts)
