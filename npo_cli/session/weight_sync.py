"""The engine holds the weights that the trainer has: sent when they changed, and proved each time.

Sync is lazy: whoever wants answers calls `in_step` first, and weights travel only if something wrote to them since the
last time. An engine that samples from the trainer's own model has nothing to be sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from npo_cli.config.recipe import Recipe
from npo_cli.inference.base import Engine, LogprobRequest
from npo_cli.inference.sync_check import TOLERANCES, SyncCheck, TokenLogps, check_agreement
from npo_cli.policy.logprobs import TokenRow
from npo_cli.policy.model import Policy
from npo_cli.session.logprob_pass import run_logprob_pass
from npo_cli.types.rollouts import Prompt

NUM_CHECK_ROWS = 8
MAX_CHECK_TOKENS = 64
"""Tokens of a probe row: of a longer prompt the end, and nothing is ever asked with it."""


@dataclass(kw_only=True, slots=True)
class WeightSync:
    """Policy and engine, and the fixed probe that both score after each sync."""

    recipe: Recipe
    policy: Policy
    engine: Engine
    check_rows: tuple[TokenRow, ...]
    run_nonce: str
    """In every version: another run's weights have other names."""
    last_trainer_logps: Sequence[TokenLogps] | None = None
    """What the trainer said of the probe at the newest sync that could be told from this one; older than the last where
    steps are too small to be told one by one."""
    verified_version: str | None = None
    """The version that was sent and found to be what it should be."""

    def sync_weights(self, step: int) -> str:
        """Send the weights at hand, those of `step`, unless the engine holds them; then compare log-probabilities.

        Returns the version that they are called by.
        """
        version = f"step {step}, write {self.policy.num_weight_changes}, run {self.run_nonce}"
        if self.engine.version == self.verified_version == version:
            return version
        self.engine.update_weights(self.policy.model, version=version)
        if self.engine.needs_weight_sync:
            self.verify_sync(version)
        self.verified_version = version
        return version

    def verify_sync(self, version: str) -> None:
        """Stop where the engine does not score the probe as the trainer does, or as it did before."""
        scored = run_logprob_pass(self.policy, self.recipe, self.check_rows, temperature=1.0, uses_full_vocabulary=True)
        trainer = [tuple(scores.logps_T.tolist()) for scores in scored]
        asked = [
            LogprobRequest(prompt_ids=row.prompt_ids, response_ids=row.response_ids, images=row.images)
            for row in self.check_rows
        ]
        found = SyncCheck(
            engine_logps=self.engine.compute_logps(asked), trainer_logps=trainer, previous_logps=self.last_trainer_logps
        )
        tolerance = self.recipe.engine.sync_tolerance or TOLERANCES[self.recipe.model.precision]
        check_agreement(found, tolerance=tolerance, version=version)
        if self.last_trainer_logps is None or found.is_decisive:
            self.last_trainer_logps = trainer


def build_check_rows(policy: Policy, prompts: Sequence[Prompt]) -> tuple[TokenRow, ...]:
    """The ends of the task's first prompts, each token after the first predicted from those before it.

    Where they are too short to tell anything: the first tokens of the vocabulary in a row. Where they show pictures:
    whole ones, so that a vision tower that stayed behind is told too.
    """
    seeing = [build_image_check_row(policy, prompt) for prompt in prompts[:NUM_CHECK_ROWS] if prompt.images]
    if seeing:
        return tuple(seeing)
    encoded = dict.fromkeys(policy.encode(prompt)[-MAX_CHECK_TOKENS:] for prompt in prompts[: 4 * NUM_CHECK_ROWS])
    rows = [TokenRow(prompt_ids=ids[:1], response_ids=ids[1:]) for ids in encoded if len(ids) > 1]
    plain = tuple(range(min(8, len(policy.tokenizer))))
    return tuple(rows[:NUM_CHECK_ROWS]) or (TokenRow(prompt_ids=plain[:1], response_ids=plain[1:]),)


def build_image_check_row(policy: Policy, prompt: Prompt) -> TokenRow:
    """What follows the last picture of a prompt, predicted from that and all before it."""
    ids = policy.encode(prompt)
    first = len(ids) - ids[::-1].index(policy.vision.image_token_id)
    return TokenRow(prompt_ids=ids[:first], response_ids=ids[first:][:MAX_CHECK_TOKENS], images=prompt.images)
