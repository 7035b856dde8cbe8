"""One open run: recipe, run directory, task, policy and engine, and sampling of verified groups."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from torch import Tensor

from npo_cli.config.recipe import Recipe
from npo_cli.distributed.process_group import ProcessGroup, current_group
from npo_cli.errors import NpoError
from npo_cli.inference.base import AdapterHandle, Engine, ModelHandle, Sample, SampleRequest, open_engine
from npo_cli.inference.sync_check import tensor_shapes
from npo_cli.policy.lora import AdapterInfo, save_adapters, shapes_without_rank
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.prompt_checks import check_prompt_support
from npo_cli.registry import ENGINES
from npo_cli.seeds import derive_seed
from npo_cli.session.distributed import GatheredWeights, MainRankEngine, SplitEngine, prepare_distributed, shard_policy
from npo_cli.session.weight_sync import WeightSync, build_check_rows
from npo_cli.storage.checkpoints import Checkpoint, verify_checkpoint
from npo_cli.storage.layout import RunDir
from npo_cli.tasks.registry import format_location, load_task
from npo_cli.tasks.task import DataOrder, Task
from npo_cli.types.rollouts import Group, Prompt, Rollout, VerifierResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One open run. The policy holds the weights that were loaded or trained last."""

    recipe: Recipe
    run: RunDir
    policy: Policy
    engine: Engine
    sync: WeightSync
    """Sends the policy's weights to the engine and verifies them there."""
    task: Task
    order: DataOrder

    @property
    def distributed(self) -> ProcessGroup:
        """The ranks that hold this session together."""
        return current_group()

    def close(self) -> None:
        """Close the engine. `open_session` also closes the task."""
        self.engine.close()

    def prompts_between(self, first: int, last: int) -> list[Prompt]:
        """Distinct prompts at data positions first .. last - 1, in the order in which training meets them."""
        # Two epochs hold every prompt, however far `last` is.
        count = min(last - first, 2 * len(self.task.train))
        indices = dict.fromkeys(self.order.indices(first, count))
        return [self.task.train[index] for index in indices]


@contextmanager
def open_session(run: RunDir, recipe: Recipe, *, checkpoint: Checkpoint | None) -> Iterator[Session]:
    """A run's task, policy and engine, closed after the block; the base model where `checkpoint` is None."""
    with (
        open_task_and_policy(recipe, checkpoint) as (task, policy),
        closing(build_session(run, recipe, task=task, policy=policy)) as session,
    ):
        yield session


@contextmanager
def open_task_and_policy(recipe: Recipe, checkpoint: Checkpoint | None) -> Iterator[tuple[Task, Policy]]:
    """The same without an engine."""
    with closing(open_task(recipe)) as task:
        yield task, open_policy(recipe, task, checkpoint)


def open_task(recipe: Recipe) -> Task:
    """The recipe's task; the pool's seed is the run's unless the recipe fixes it."""
    seed = recipe.train.seed if recipe.task.seed is None else recipe.task.seed
    task = load_task(recipe.task, seed=seed)
    if recipe.train.prompts_per_step > len(task.train):
        raise NpoError(
            f"the task has {len(task.train)} training prompts, but train.prompts_per_step is "
            f"{recipe.train.prompts_per_step}",
            f"set train.prompts_per_step={len(task.train)} or less, or bring more prompts",
        )
    return task


def open_policy(recipe: Recipe, task: Task, checkpoint: Checkpoint | None) -> Policy:
    """The base model, or a checkpoint's, after a check that it can read every prompt of the task."""
    prepare_distributed(recipe)
    folder = checkpoint.path if checkpoint else None
    policy = load_policy(recipe.model, folder)
    if checkpoint:
        load_checkpoint(policy, checkpoint)
    check_task_prompts(policy, task, recipe)
    return shard_policy(policy, recipe, folder=folder)


def check_task_prompts(policy: Policy, task: Task, recipe: Recipe) -> None:
    """Every prompt, held-out ones included, can be read and leaves room for an answer."""
    engine: type[Engine] = ENGINES.get(recipe.engine.kind)
    engine.validate(recipe.engine, uses_adapters=policy.adapters is not None, uses_images=policy.vision is not None)
    prompts = [*task.train, *task.heldout]
    check_prompt_support(policy, prompts, recipe.model.path)
    for prompt in prompts:
        check_prompt(policy, prompt, recipe)


def load_checkpoint(policy: Policy, checkpoint: Checkpoint) -> None:
    """Swap in a checkpoint's weights: every tensor fits, and every byte is what was saved."""
    policy.load(checkpoint.path)
    verify_checkpoint(checkpoint)


def check_prompt(policy: Policy, prompt: Prompt, recipe: Recipe) -> None:
    """A prompt of no tokens, of more than allowed, or that leaves the model no room to answer."""
    length, limit = count_prompt_tokens(policy, prompt, recipe), recipe.task.max_prompt_tokens
    wanted = length + recipe.sampling.max_new_tokens
    if length == 0:
        problem = "has no tokens: the model's tokenizer knows none of its characters"
        mend = "mend the prompt, or choose another model.path"
    elif length > limit:
        problem = f"has {length} tokens; task.max_prompt_tokens is {limit}"
        mend = f"raise it (task.max_prompt_tokens={length}) or leave the prompt out"
    elif policy.max_tokens is not None and wanted > policy.max_tokens:
        problem = f"and its answer may have {wanted} tokens; {recipe.model.path} was made for {policy.max_tokens}"
        mend = "lower sampling.max_new_tokens, leave the prompt out, or choose another model.path"
    else:
        return
    raise NpoError(f"{format_location(prompt, recipe.task)}prompt {prompt.prompt_id} {problem}", mend)


def count_prompt_tokens(policy: Policy, prompt: Prompt, recipe: Recipe) -> int:
    """Tokens of a prompt, those of its pictures included."""
    try:
        return len(policy.encode(prompt))
    except NpoError as error:
        raise NpoError(f"{format_location(prompt, recipe.task)}{error.message}", error.hint) from error


def build_session(
    run: RunDir, recipe: Recipe, *, task: Task, policy: Policy, extrapolates_weights: bool = False
) -> Session:
    """Start the engine for an open task and policy; the caller closes the session, and the task.

    `extrapolates_weights`: the policy will be extrapolated in weights although the recipe does not say so.
    """
    engine = open_session_engine(recipe, policy, doubles_rank=extrapolates_weights or recipe.pushes_weights)
    return Session(
        recipe=recipe,
        run=run,
        policy=policy,
        engine=engine,
        sync=WeightSync(
            recipe=recipe,
            policy=policy,
            engine=engine,
            check_rows=build_check_rows(policy, task.train),
            run_nonce=current_group().broadcast(secrets.token_hex(4), phase="open the session"),
        ),
        task=task,
        order=DataOrder(num_prompts=len(task.train), seed=recipe.train.seed),
    )


def open_session_engine(recipe: Recipe, policy: Policy, *, doubles_rank: bool) -> Engine:
    """The recipe's engine for this policy; of several ranks each samples its part, or rank 0 asks a server."""
    settings, is_alone = recipe.engine, current_group().world_size == 1
    shares_weights = not ENGINES.get(settings.kind).needs_weight_sync
    longest = recipe.task.max_prompt_tokens + recipe.sampling.max_new_tokens
    weights = None if is_alone or shares_weights else GatheredWeights(policy)
    if weights is not None:
        # Gathered weights lie in rank 0's CPU memory: a server reads them from the disk.
        vllm = settings.vllm.model_copy(update={"weight_transfer": "disk"})
        settings = settings.model_copy(update={"vllm": vllm})
    adapters = policy.adapters
    handle = ModelHandle(
        model=policy.model if weights is None else weights,
        tokenizer=policy.tokenizer,
        eos_ids=policy.eos_ids,
        pad_id=policy.pad_id,
        max_model_len=min(longest, policy.max_tokens or longest),
        dtype=policy.compute_dtype,
        adapters=None
        if adapters is None
        else make_adapter_port(policy, adapters, doubles_rank=doubles_rank, weights=weights),
        vision=policy.vision,
    )
    if weights is not None:
        return MainRankEngine(settings, handle, weights)
    engine = open_engine(settings, handle)
    return engine if is_alone else SplitEngine(engine, policy, recipe)


def make_adapter_port(
    policy: Policy, adapters: AdapterInfo, *, doubles_rank: bool = False, weights: GatheredWeights | None = None
) -> AdapterHandle:
    """Access to a policy's adapters for an engine, or to gathered ones.

    `doubles_rank`: joined with those of an older copy their rank is twice.
    """

    def read_adapters() -> Mapping[str, Tensor]:
        return policy.adapter_weights if weights is None else weights.trained

    def read_shapes() -> Mapping[str, tuple[int, ...]]:
        return shapes_without_rank(read_adapters()) if doubles_rank else tensor_shapes(read_adapters())

    return AdapterHandle(
        max_rank=2 * adapters.rank if doubles_rank else adapters.rank,
        target_modules=tuple(adapters.config["target_modules"]),
        read_base=lambda: policy.base_weights if weights is None else weights.base,
        read_adapters=read_adapters,
        read_shapes=read_shapes,
        save=lambda folder: save_adapters(read_adapters(), adapters, folder),
    )


def sample_groups(
    session: Session,
    prompts: Sequence[Prompt],
    *,
    seed_label: tuple[str | int, ...],
    slots: Sequence[int],
    sampler_step: int,
    temperature: float | None = None,
) -> list[Group]:
    """Sample every prompt once a slot with the weights at hand, at sampling.temperature unless told, and verify.

    The seed of a response is that of (run seed, *label, prompt id, slot).
    """
    version = session.sync.sync_weights(sampler_step)
    asked = SamplingSpec(seed_label=seed_label, sampler_step=sampler_step, version=version)
    (groups,) = sample_groups_per_version(session, prompts, [asked], slots=slots, temperature=temperature)
    return groups


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSpec:
    """Weights that are asked, which the engine holds."""

    seed_label: tuple[str | int, ...]
    sampler_step: int
    version: str


def sample_groups_per_version(
    session: Session,
    prompts: Sequence[Prompt],
    asked: Sequence[SamplingSpec],
    *,
    slots: Sequence[int],
    temperature: float | None = None,
) -> list[list[Group]]:
    """The same of several weights at once, in one batch of the engine; the groups of each in the order asked."""
    settings = session.recipe.sampling
    heat = settings.temperature if temperature is None else temperature
    requests = [request for each in asked for request in _requests(session, prompts, each, slots=slots)]
    samples = session.engine.generate(requests, temperature=heat, max_new_tokens=settings.max_new_tokens)
    graded = session.task.grade(
        [prompt for _ in asked for prompt in prompts for _ in slots], [one.text for one in samples]
    )
    verdicts = iter(zip(samples, mark_truncated_wrong(samples, graded), strict=True))
    return [
        [
            Group(prompt=prompt, rollouts=tuple(_rollout(*next(verdicts), each.sampler_step) for _ in slots))
            for prompt in prompts
        ]
        for each in asked
    ]


def _rollout(sample: Sample, verdict: VerifierResult, sampler_step: int) -> Rollout:
    return Rollout(
        prompt_id=sample.prompt_id,
        slot=sample.slot,
        response_ids=sample.response_ids,
        behavior_logps=sample.logps,
        text=sample.text,
        finished=sample.finished,
        sampler_step=sampler_step,
        mean_entropy=sample.mean_entropy,
        verdict=verdict.verdict,
        reward=verdict.reward,
    )


def _requests(
    session: Session, prompts: Sequence[Prompt], asked: SamplingSpec, *, slots: Sequence[int]
) -> list[SampleRequest]:
    return [
        SampleRequest(
            prompt_id=prompt.prompt_id,
            prompt_ids=session.policy.encode(prompt),
            slot=slot,
            seed=derive_seed(session.recipe.train.seed, *asked.seed_label, prompt.prompt_id, slot),
            version=asked.version,
            images=prompt.images,
        )
        for prompt in prompts
        for slot in slots
    ]


def mark_truncated_wrong(samples: Sequence, graded: Sequence[VerifierResult]) -> list[VerifierResult]:
    """A response that hit the length limit keeps its verdict unless that was correct by luck of the cut."""
    return [
        verdict
        if sample.finished or verdict.verdict != "correct"
        else VerifierResult(verdict="wrong", extracted=verdict.extracted)
        for sample, verdict in zip(samples, graded, strict=True)
    ]


def count_generated_tokens(groups: Sequence[Group]) -> int:
    """Tokens that the policy generated for these groups; tokens of guides are charged elsewhere."""
    return sum(rollout.num_on_policy_tokens for group in groups for rollout in group.rollouts)
