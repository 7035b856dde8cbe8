"""Weight sync: the engine samples from the trainer's current weights, which is verified after each update.

Sync is lazy: weights are sent before sampling, and only if they changed since the last time. An engine that samples
from the trainer's own model needs none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from npo_cli.config.recipe import Recipe
from npo_cli.inference.base import Engine, LogprobRequest
from npo_cli.inference.sync_check import TOLERANCES, SyncCheck, TokenLogps, check_agreement
from npo_cli.policy.model import Policy
from npo_cli.policy.packing import TokenRow
from npo_cli.session.logprob_pass import run_logprob_pass
from npo_cli.types.rollouts import Prompt

NUM_CHECK_ROWS = 8
MAX_CHECK_TOKENS = 64
"""Tokens of a check row, the last ones of a longer prompt."""


@dataclass(kw_only=True, slots=True)
class WeightSync:
    """Policy, engine, and the fixed check rows that both score after each sync."""

    recipe: Recipe
    policy: Policy
    engine: Engine
    check_rows: tuple[TokenRow, ...]
    run_nonce: str
    """Part of every version: weights of another run have other versions."""
    last_trainer_logps: Sequence[TokenLogps] | None = None
    """The trainer's log-probabilities of the check rows at the newest sync that differs measurably from this one; older
    than the last sync where single steps are too small to measure."""
    verified_version: str | None = None
    """The version that was sent and passed the check."""

    def sync_weights(self, step: int) -> str:
        """Send the current weights, those of `step`, unless the engine holds them; then compare log-probabilities.

        Returns their version.
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
        """Raise if the engine's log-probabilities of the check rows are not the trainer's current ones."""
        scored = run_logprob_pass(self.policy, self.recipe, self.check_rows, temperature=1.0, uses_full_vocabulary=True)
        trainer = [tuple(scores.logps_T.tolist()) for scores in scored]
        requests = [
            LogprobRequest(prompt_ids=row.prompt_ids, response_ids=row.response_ids, images=row.images)
            for row in self.check_rows
        ]
        found = SyncCheck(
            engine_logps=self.engine.compute_logps(requests),
            trainer_logps=trainer,
            previous_logps=self.last_trainer_logps,
        )
        tolerance = self.recipe.engine.sync_tolerance or TOLERANCES[self.recipe.model.precision]
        check_agreement(found, tolerance=tolerance, version=version)
        if self.last_trainer_logps is None or found.is_decisive:
            self.last_trainer_logps = trainer


def build_check_rows(policy: Policy, prompts: Sequence[Prompt]) -> tuple[TokenRow, ...]:
    """The ends of the task's first prompts, each token after the first predicted from those before it.

    Prompts of one token: the first tokens of the vocabulary. Prompts with images: whole ones, so that the vision tower
    is checked too.
    """
    with_images = [build_image_check_row(policy, prompt) for prompt in prompts[:NUM_CHECK_ROWS] if prompt.images]
    if with_images:
        return tuple(with_images)
    encoded = dict.fromkeys(policy.encode(prompt)[-MAX_CHECK_TOKENS:] for prompt in prompts[: 4 * NUM_CHECK_ROWS])
    rows = [TokenRow(prompt_ids=ids[:1], response_ids=ids[1:]) for ids in encoded if len(ids) > 1]
    plain = tuple(range(min(8, len(policy.tokenizer))))
    return tuple(rows[:NUM_CHECK_ROWS]) or (TokenRow(prompt_ids=plain[:1], response_ids=plain[1:]),)


def build_image_check_row(policy: Policy, prompt: Prompt) -> TokenRow:
    """The tokens after a prompt's last image, predicted from all before them."""
    ids = policy.encode(prompt)
    first = len(ids) - ids[::-1].index(policy.vision.image_token_id)
    return TokenRow(prompt_ids=ids[:first], response_ids=ids[first:][:MAX_CHECK_TOKENS], images=prompt.images)
