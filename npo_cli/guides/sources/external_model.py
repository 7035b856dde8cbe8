"""Another model as guide, sampled with its own tokenizer and chat template: a folder, a hub id, or another run.

Its weights and the learner's are in memory together. With the learner's tokenizer its token ids are kept, with their
log-probabilities; otherwise its text is re-tokenized, without log-probabilities.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from npo_cli.errors import NpoError, quote_path
from npo_cli.guides.source import (
    GuideSource,
    OptionValue,
    Pairs,
    PromptResponses,
    compute_logprobs,
    compute_mean_logprobs,
    make_spec,
    responses_per_prompt,
    sample_in_rounds,
)
from npo_cli.types.rollouts import Prompt, Rollout

if TYPE_CHECKING:
    from npo_cli.config.recipe import Recipe
    from npo_cli.policy.model import Policy
    from npo_cli.session.session import Session
    from npo_cli.storage.checkpoints import Checkpoint
    from npo_cli.storage.layout import RunDir
    from npo_cli.tasks.task import Task


class ExternalModelSource(GuideSource):
    """A model from a folder or the hub."""

    name = "model"
    usage = "model:FOLDER_OR_ID"
    example = "model:Qwen/Qwen3-8B"
    summary = "a model from a folder or the Hugging Face hub"
    options: ClassVar[Mapping[str, str]] = {"model": "folder, or id on the Hugging Face hub"}
    has_logprobs = None
    has_distribution = True

    @classmethod
    def parse(cls, argument: str) -> dict[str, OptionValue]:
        """A folder or hub id."""
        return {"model": argument} if argument else {}

    @classmethod
    def format(cls, options: Mapping[str, OptionValue]) -> str:
        """The folder or hub id."""
        return str(options["model"])

    def fingerprint(self) -> str:
        """Of the weights and tokenizer files in a folder; empty for a hub id."""
        from npo_cli.storage.files import hash_file

        folder = Path(str(self.spec.options["model"])).expanduser()
        if not folder.is_dir():
            return ""
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer*")])
        lines = "".join(f"{hash_file(file)}  {file.name}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def check(self, task: Task, policy: Policy) -> Sequence[str]:
        """Load the model once, without an engine, and check that it can read every prompt."""
        self._fit_recipe(self._load_or_refuse(), task)
        return ()

    def open(self, session: Session) -> None:
        """Load the model, in the device and precision of the recipe, behind the configured engine."""
        from npo_cli.guides.sources.retokenize import Retokenizer
        from npo_cli.session.session import build_session

        super().open(session)
        model = self._load_or_refuse()
        recipe = self._fit_recipe(model, session.task)
        self.learner = session.policy
        self.guide_session = build_session(self.target.run, recipe, task=session.task, policy=model)
        self.retokenizer = Retokenizer(session=session, learner=self.learner)

    def close(self) -> None:
        """End the model's engine."""
        if hasattr(self, "guide_session"):
            self.guide_session.close()

    def _load(self) -> Policy:
        from npo_cli.policy.model import load_policy

        settings = self.target.learner.recipe.model
        return load_policy(settings.model_copy(update={"path": str(self.spec.options["model"])}))

    def load_teacher(self) -> Policy:
        """The model without a session; of a recipe with LoRA without adapters."""
        from npo_cli.config.recipe import LoraSettings
        from npo_cli.policy.model import load_policy

        settings, path = self.target.learner.recipe.model, str(self.spec.options["model"])
        return load_policy(settings.model_copy(update={"path": path, "lora": LoraSettings()}))

    def _load_or_refuse(self) -> Policy:
        try:
            return self._load()
        except NpoError as error:
            hint = "choose another folder, hub id or run with --source"
            raise NpoError(f"--source {self.spec.text} cannot be loaded: {error.message}", hint) from error

    def _fit_recipe(self, model: Policy, task: Task) -> Recipe:
        """The learner's recipe with task.max_prompt_tokens raised to what the prompts take in the model's tokens."""
        from npo_cli.policy.model import check_prompt_support

        recipe, spec = self.target.learner.recipe, self.spec.text
        check_prompt_support(model, task.train, spec)
        lengths = {prompt.prompt_id: len(model.encode(prompt)) for prompt in task.train}
        longest = max(lengths, key=lengths.__getitem__)
        num_tokens = lengths[longest] + recipe.sampling.max_new_tokens
        if min(lengths.values()) == 0:
            blank = min(lengths, key=lengths.__getitem__)
            raise NpoError(f"--source {spec}: prompt {blank} has no token of its tokenizer", "choose another model")
        if model.max_tokens is not None and num_tokens > model.max_tokens:
            raise NpoError(
                f"--source {spec}: prompt {longest} and its response may take {num_tokens} tokens; "
                f"the model's context is {model.max_tokens}",
                "choose another model, or lower sampling.max_new_tokens",
            )
        return recipe.model_copy(
            update={"task": recipe.task.model_copy(update={"max_prompt_tokens": max(lengths.values())})}
        )

    @property
    def shares_tokenizer(self) -> bool:
        """Whether the model's token ids mean the same to the learner."""
        return self.guide_session.policy.tokenizer_digest == self.learner.tokenizer_digest

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """In rounds, until a prompt is solved or all samples are drawn."""
        return sample_in_rounds(self.guide_session.recipe.guide, prompts, self._draw)

    def _draw(self, prompts: Sequence[Prompt], slots: range) -> list[PromptResponses]:
        from npo_cli.session.session import sample_groups

        groups = sample_groups(
            self.guide_session,
            prompts,
            seed_label=(self.target.purpose, self.name),
            slots=slots,
            sampler_step=0,
            temperature=self.guide_session.recipe.guide.cache.temperature,
        )
        rollouts = iter(self._to_learner([(group.prompt, rollout) for group in groups for rollout in group.rollouts]))
        return [
            replace(response, rollouts=tuple(next(rollouts) for _ in response.rollouts))
            for response in responses_per_prompt(groups)
        ]

    def _to_learner(self, pairs: Pairs) -> list[Rollout]:
        from npo_cli.guides.sources.retokenize import TextResponse

        if self.shares_tokenizer:
            return [replace(rollout, sampler_step=None, source="teacher") for _, rollout in pairs]
        return self.retokenizer.retokenize(
            [
                TextResponse(prompt=prompt, slot=rollout.slot, text=rollout.text, finished=rollout.finished)
                for prompt, rollout in pairs
            ]
        )

    def logprobs(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """From a forward pass of the model; None for re-tokenized responses."""
        if not self.shares_tokenizer:
            return [None] * len(pairs)
        temperature = self.guide_session.recipe.guide.cache.temperature
        return [*compute_logprobs(self.guide_session, pairs, temperature=temperature)]

    def learner_logprob(self, pairs: Pairs) -> list[float]:
        """Under the learner, which is in memory too."""
        return compute_mean_logprobs(self.guide_session, pairs, policy=self.learner)

    def warnings(self) -> list[str]:
        """Another tokenizer, and truncated responses."""
        from npo_cli.losses.importance_ratio import name_ratios_without_logprobs

        if self.shares_tokenizer:
            return self.retokenizer.warnings()
        other_tokenizer = (
            "the guide's tokenizer differs from the learner's: its responses are re-tokenized and have no "
            f"log-probabilities, so guide.inject.ratio must be {name_ratios_without_logprobs()}"
        )
        return [other_tokenizer, *self.retokenizer.warnings()]

    @property
    def digest(self) -> str:
        """Digest of the loaded weights."""
        return self.guide_session.policy.digest


class OtherRunSource(ExternalModelSource):
    """A checkpoint of another run (RLEP's converged seed run)."""

    name = "run"
    usage = "run:DIR[@[BRANCH:]STEP]"
    example = "run:runs/other@100"
    summary = "a checkpoint of another run (default: its last)"
    options: ClassVar[Mapping[str, str]] = {
        "dir": "run directory",
        "branch": "branch of that run (default: main)",
        "step": "step of the checkpoint (default: the branch's last)",
    }
    differs_by_seed = True
    optional = frozenset({"branch", "step"})

    @classmethod
    def parse(cls, argument: str) -> dict[str, OptionValue]:
        """`DIR`, `DIR@STEP`, `DIR@BRANCH` or `DIR@BRANCH:STEP`; what holds a slash is part of DIR."""
        match = re.fullmatch(r"(?P<dir>.+)@(?:(?P<branch>[^@/:]*[^@/:\d][^@/:]*):?)?(?P<step>\d+)?", argument)
        if match is None:
            return {"dir": argument} if argument else {}
        options: dict[str, OptionValue] = {"dir": match["dir"]}
        options |= {} if match["branch"] is None else {"branch": match["branch"]}
        return options | ({} if match["step"] is None else {"step": int(match["step"])})

    @classmethod
    def format(cls, options: Mapping[str, OptionValue]) -> str:
        """`DIR[@[BRANCH:]STEP]`."""
        place = ":".join(str(options[name]) for name in ("branch", "step") if name in options)
        return f"{options['dir']}@{place}" if place else str(options["dir"])

    def validate(self) -> None:
        """The checkpoint exists, and belongs to another run."""
        from npo_cli.storage.checkpoints import find_checkpoint, list_ancestry_checkpoints
        from npo_cli.storage.layout import open_run
        from npo_cli.storage.lineage import find_main_branch

        options = self.spec.options
        other = open_run(Path(str(options["dir"])))
        if self.target.run.exists and other.run_id == self.target.run.run_id:
            raise NpoError(
                f"{options['dir']} is this run itself",
                f"its own checkpoints: npo sample-guide {quote_path(self.target.run.root)} --source STEP",
            )
        branch = str(options.get("branch") or find_main_branch(other))
        if "step" in options:
            checkpoint = find_checkpoint(other, branch, int(options["step"]))
        else:
            found = list_ancestry_checkpoints(other, branch)
            if not found:
                raise NpoError(
                    f"{options['dir']} has no complete checkpoint on {branch}", f"npo index {quote_path(other.root)}"
                )
            checkpoint = found[-1]
        self.other: RunDir = other
        self.checkpoint: Checkpoint = checkpoint
        self.spec = make_spec(self.name, {"dir": options["dir"], "branch": branch, "step": checkpoint.step})

    def fingerprint(self) -> str:
        """Digest of the checkpoint's weights."""
        return self.checkpoint.digest

    digest = property(fingerprint)

    def _load(self) -> Policy:
        from npo_cli.policy.model import load_policy
        from npo_cli.storage.checkpoints import verify_checkpoint

        verify_checkpoint(self.checkpoint)
        return load_policy(self.target.learner.recipe.model, self.checkpoint.path)

    def load_teacher(self) -> Policy:
        """The checkpoint's weights, or with LoRA its adapters on the learner's base."""
        return self._load()

    @property
    def guide_training_tokens(self) -> int:
        """Tokens that the other run generated up to this checkpoint."""
        from npo_cli.storage.cost_sums import cost_at

        return cost_at(self.other, str(self.spec.options["branch"]), self.checkpoint.step).tokens
