"""One open run: recipe, run directory, task, policy and engine, and sampling of verified groups."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from npo_cli.config.recipe import Recipe
from npo_cli.distributed.process_group import ProcessGroup, current_group
from npo_cli.errors import NpoError
from npo_cli.inference.base import AdapterHandle, Engine, ModelHandle, Sample, SampleRequest, check_samples, open_engine
from npo_cli.inference.sync_check import tensor_shapes
from npo_cli.policy.lora import AdapterInfo, save_adapters, shapes_without_rank, share_base_weights
from npo_cli.policy.model import Policy, check_prompt_support, load_policy
from npo_cli.policy.model_folder import decide_chat
from npo_cli.registry import ENGINES
from npo_cli.seeds import derive_seed
from npo_cli.session.distributed import GatheredWeights, MainRankEngine, SplitEngine, prepare_distributed, shard_policy
from npo_cli.session.producer import Producer, ProducerEngine, check_producer
from npo_cli.session.startup import begin_session, measure_startup
from npo_cli.session.weight_sync import WeightSync, build_check_rows
from npo_cli.storage.checkpoints import Checkpoint, verify_checkpoint
from npo_cli.storage.layout import RunDir
from npo_cli.tasks.code_permission import Permissions, read_permissions, record_permissions, recorded_permissions
from npo_cli.tasks.custom_verifier import has_allow_code
from npo_cli.tasks.task import DataOrder, Task, format_location, list_code_files, load_task
from npo_cli.types.rollouts import Group, Prompt, Rollout, VerifierResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One open run. The policy holds the weights that were loaded or trained last."""

    recipe: Recipe
    run: RunDir
    policy: Policy
    engine: Engine
    sync: WeightSync | ProducerEngine
    """Sends the policy's weights to the engine, where they are verified."""
    task: Task
    order: DataOrder
    producer: Producer | None
    """Samples ahead; None with train.staleness=0, and in a session that does not train."""
    teacher: Any = None
    """`TeacherModel` of a dense target, in a session that trains; None without a target."""

    @property
    def distributed(self) -> ProcessGroup:
        """The ranks that hold this session together."""
        return current_group()

    def close(self) -> None:
        """Close the engine and the producer. `open_session` also closes the task."""
        if self.producer is not None:
            self.producer.close()
        self.engine.close()

    def prompts_between(self, first: int, last: int) -> list[Prompt]:
        """Distinct prompts at data positions first to last - 1, in the order of training."""
        # Two epochs hold every prompt, however far `last` is.
        count = min(last - first, 2 * len(self.task.train))
        indices = dict.fromkeys(self.order.indices(first, count))
        return [self.task.train[index] for index in indices]


@contextmanager
def open_session(
    run: RunDir, recipe: Recipe, *, checkpoint: Checkpoint | None, trains: bool = False
) -> Iterator[Session]:
    """A run's task, policy and engine, closed after the block; the base model where `checkpoint` is None."""
    with (
        open_task_and_policy(recipe, checkpoint, run=run) as (task, policy),
        closing(build_session(run, recipe, task=task, policy=policy, trains=trains)) as session,
    ):
        yield session


@contextmanager
def open_task_and_policy(
    recipe: Recipe, checkpoint: Checkpoint | None, *, run: RunDir | None = None
) -> Iterator[tuple[Task, Policy]]:
    """The same without an engine."""
    begin_session()
    with closing(open_task(recipe, run=run)) as task:
        yield task, open_policy(recipe, task, checkpoint)


@measure_startup("load", "the task")
def open_task(recipe: Recipe, *, run: RunDir | None = None) -> Task:
    """The recipe's task; its seed is the run's unless task.seed is set.

    `run`: the run whose permissions let a custom verifier run without --allow-code (None: those of the caller).
    """
    seed = recipe.train.seed if recipe.task.seed is None else recipe.task.seed
    with nullcontext() if run is None else recorded_permissions(read_code_permissions(run)):
        task = load_task(decide_chat(recipe).task, seed=seed)
    if run is not None:
        _check_data(run, task)
        record_code_permissions(run, recipe)
    if recipe.train.prompts_per_step > len(task.train):
        raise NpoError(
            f"the task has {len(task.train)} training prompts, but train.prompts_per_step is "
            f"{recipe.train.prompts_per_step}",
            f"set train.prompts_per_step={len(task.train)} or less, or bring more prompts",
        )
    return task


def _check_data(run: RunDir, task: Task) -> None:
    """Refuse to continue with other prompts: positions, prompt ids and logs mean those with which the run began."""
    recorded = run.info.prompts_sha256
    if recorded is None or recorded == task.compute_digest():
        return
    task.close()
    raise NpoError(
        f"the data of task.* has changed since {run.root} was made: its prompts, answers or columns are not the same",
        "restore the data of that time, or start a new run with: npo train RECIPE NEW_RUN",
    )


def read_code_permissions(run: RunDir) -> Permissions:
    """The custom verifiers that --allow-code allowed in a run, as rank 0 knows them."""
    return current_group().run_on_main(lambda: read_permissions(run.run_id), phase="read the permissions")


def record_code_permissions(run: RunDir, recipe: Recipe) -> None:
    """With --allow-code, later commands on this run need it no more as long as the files are the same."""
    files = list_code_files(recipe.task)
    if files and has_allow_code():
        current_group().run_on_main(lambda: record_permissions(run.run_id, files), phase="record the permissions")


@measure_startup("load", "the model")
def open_policy(recipe: Recipe, task: Task, checkpoint: Checkpoint | None) -> Policy:
    """The base model, or that of a checkpoint, after a check of every prompt of the task."""
    prepare_distributed(recipe)
    folder = checkpoint.path if checkpoint else None
    if checkpoint:
        verify_checkpoint(checkpoint, tensors=False)  # before a model is built from a damaged config
    policy = load_policy(recipe.model, folder)
    if checkpoint:
        load_checkpoint(policy, checkpoint)
    check_task_prompts(policy, task, recipe)
    return shard_policy(policy, recipe, folder=folder)


def check_task_prompts(policy: Policy, task: Task, recipe: Recipe) -> None:
    """Refuse a task with a prompt that the policy cannot read, or that leaves no room for a response."""
    check_producer(recipe)
    engine: type[Engine] = ENGINES.get(recipe.engine.kind)
    engine.validate(recipe.engine, uses_adapters=policy.adapters is not None, uses_images=policy.vision is not None)
    prompts = [*task.train, *task.heldout]
    check_prompt_support(policy, prompts, recipe.model.path)
    for prompt, length in zip(prompts, count_prompt_tokens(policy, prompts, recipe), strict=True):
        check_prompt_length(policy, prompt, recipe, length=length)


def load_checkpoint(policy: Policy, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights; shapes and digests are checked."""
    policy.load(checkpoint.path)
    verify_checkpoint(checkpoint)


def load_second_policy(session: Session, checkpoint: Checkpoint) -> Policy:
    """Another model beside the session's, never trained; adapters share the session's base weights."""
    verify_checkpoint(checkpoint)
    policy = load_policy(session.recipe.model, checkpoint.path)
    policy.model.requires_grad_(False)
    if policy.adapters is not None:
        share_base_weights(policy.model, session.policy.model)
    return policy


def check_prompt_length(policy: Policy, prompt: Prompt, recipe: Recipe, *, length: int) -> None:
    """Refuse an empty prompt, one longer than task.max_prompt_tokens, and one that leaves no room for a response."""
    limit = recipe.task.max_prompt_tokens
    wanted = length + recipe.sampling.max_new_tokens
    if length == 0:
        problem = "has no tokens: the model's tokenizer has none of its characters"
        fix = "fix the prompt, or choose another model.path"
    elif length > limit:
        problem = f"has {length} tokens; task.max_prompt_tokens is {limit}"
        fix = f"raise it (task.max_prompt_tokens={length}) or remove the prompt"
    elif policy.max_tokens is not None and wanted > policy.max_tokens:
        problem = f"and its response may have {wanted} tokens; {recipe.model.path} supports {policy.max_tokens}"
        fix = "lower sampling.max_new_tokens, remove the prompt, or choose another model.path"
    else:
        return
    raise NpoError(f"{format_location(prompt, recipe.task)}prompt {prompt.prompt_id} {problem}", fix)


def count_prompt_tokens(policy: Policy, prompts: Sequence[Prompt], recipe: Recipe) -> list[int]:
    """Tokens of each prompt, those of its images included."""
    try:
        return [len(ids) for ids in policy.encode_all(prompts)]
    except NpoError as error:
        if len(prompts) == 1:
            raise NpoError(f"{format_location(prompts[0], recipe.task)}{error.message}", error.hint) from error
        return [count for prompt in prompts for count in count_prompt_tokens(policy, [prompt], recipe)]


def build_session(
    run: RunDir,
    recipe: Recipe,
    *,
    task: Task,
    policy: Policy,
    trains: bool = False,
    extrapolates_weights: bool = False,
) -> Session:
    """Start the engine for an open task and policy; the caller closes the session, and the task.

    `trains`: with train.staleness batches are sampled ahead, by a producer; it alone opens an engine that holds a copy
    of the weights. `extrapolates_weights`: the policy will be extrapolated in weights although the recipe does not say
    so.
    """
    check_rows = build_check_rows(policy, task.train)
    producer = Producer(recipe, check_rows=check_rows) if trains and recipe.train.staleness else None
    sync: WeightSync | ProducerEngine
    if producer is not None and ENGINES.get(recipe.engine.kind).needs_weight_sync:
        engine = sync = open_producer_engine(producer, policy)
    else:
        engine = open_session_engine(recipe, policy, doubles_rank=extrapolates_weights or recipe.extrapolates_weights)
        sync = WeightSync(
            recipe=recipe,
            policy=policy,
            engine=engine,
            check_rows=check_rows,
            run_nonce=current_group().broadcast(secrets.token_hex(4), phase="open the session"),
        )
    return Session(
        recipe=recipe,
        run=run,
        policy=policy,
        engine=engine,
        sync=sync,
        task=task,
        order=DataOrder(num_prompts=len(task.train), seed=recipe.train.seed),
        producer=producer,
    )


@measure_startup("start", "the engine")
def open_producer_engine(producer: Producer, policy: Policy) -> ProducerEngine:
    """The producer, started, as the session's engine."""
    try:
        producer.start(policy)
        return ProducerEngine(producer, policy, reproducibility_warning=producer.wait_until_ready())
    except BaseException:
        producer.close()
        raise


@measure_startup("start", "the engine")
def open_session_engine(recipe: Recipe, policy: Policy, *, doubles_rank: bool) -> Engine:
    """The recipe's engine for this policy; of several ranks each samples its part, or rank 0 asks a server."""
    settings, is_alone = recipe.engine, not current_group().is_launched
    shares_weights = not ENGINES.get(settings.kind).needs_weight_sync
    weights = None if is_alone or shares_weights else GatheredWeights(policy)
    if weights is not None:
        # Gathered weights lie in rank 0's CPU memory: a server reads them from the disk.
        vllm = settings.vllm.model_copy(update={"weight_transfer": "disk"})
        settings = settings.model_copy(update={"vllm": vllm})
    handle = make_model_handle(policy, recipe)
    if policy.adapters is not None:
        adapters = make_adapter_port(policy, policy.adapters, doubles_rank=doubles_rank, weights=weights)
        handle = replace(handle, adapters=adapters)
    if weights is not None:
        return MainRankEngine(settings, replace(handle, model=weights), weights)
    engine = open_engine(settings, handle)
    return engine if is_alone else SplitEngine(engine, policy, recipe)


def make_model_handle(policy: Policy, recipe: Recipe) -> ModelHandle:
    """The policy's model for an engine that reads the trainer's weights."""
    longest = recipe.task.max_prompt_tokens + recipe.sampling.max_new_tokens
    return ModelHandle(
        model=policy.model,
        tokenizer=policy.tokenizer,
        eos_ids=policy.eos_ids,
        pad_id=policy.pad_id,
        max_model_len=min(longest, policy.max_tokens or longest),
        dtype=policy.compute_dtype,
        vision=policy.vision,
    )


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
    """Sample every prompt once per slot with the current weights, and verify; at sampling.temperature by default.

    A response's seed derives from (run seed, *seed_label, prompt id, slot).
    """
    version = session.sync.sync_weights(sampler_step)
    spec = SamplingSpec(seed_label=seed_label, sampler_step=sampler_step, version=version)
    (groups,) = sample_groups_per_version(session, prompts, [spec], slots=slots, temperature=temperature)
    return groups


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSpec:
    """One version of the weights that the engine holds, and how to sample from it."""

    seed_label: tuple[str | int, ...]
    sampler_step: int
    version: str


def sample_groups_per_version(
    session: Session,
    prompts: Sequence[Prompt],
    specs: Sequence[SamplingSpec],
    *,
    slots: Sequence[int],
    temperature: float | None = None,
) -> list[list[Group]]:
    """The same for several versions of the weights in one batch of the engine; one list of groups per version."""
    settings = session.recipe.sampling
    temperature = settings.temperature if temperature is None else temperature
    requests = [request for spec in specs for request in _requests(session, prompts, spec, slots=slots)]
    samples = session.engine.generate(requests, temperature=temperature, max_new_tokens=settings.max_new_tokens)
    check_samples(requests, samples, kind=session.recipe.engine.kind)
    graded = session.task.grade(
        [prompt for _ in specs for prompt in prompts for _ in slots],
        [one.text for one in samples],
        finished=[one.finished for one in samples],
    )
    results = iter(zip(samples, graded, strict=True))
    return [
        [
            Group(prompt=prompt, rollouts=tuple(_rollout(*next(results), spec.sampler_step) for _ in slots))
            for prompt in prompts
        ]
        for spec in specs
    ]


def _rollout(sample: Sample, result: VerifierResult, sampler_step: int) -> Rollout:
    return Rollout(
        prompt_id=sample.prompt_id,
        slot=sample.slot,
        response_ids=sample.response_ids,
        behavior_logps=sample.logps,
        text=sample.text,
        finished=sample.finished,
        sampler_step=sampler_step,
        mean_entropy=sample.mean_entropy,
        verdict=result.verdict,
        reward=result.reward,
        reward_parts=result.parts,
    )


def _requests(
    session: Session, prompts: Sequence[Prompt], spec: SamplingSpec, *, slots: Sequence[int]
) -> list[SampleRequest]:
    return [
        SampleRequest(
            prompt_id=prompt.prompt_id,
            prompt_ids=prompt_ids,
            slot=slot,
            seed=derive_seed(session.recipe.train.seed, *spec.seed_label, prompt.prompt_id, slot),
            version=spec.version,
            images=prompt.images,
        )
        for prompt, prompt_ids in zip(prompts, session.policy.encode_all(prompts), strict=True)
        for slot in slots
    ]


def count_generated_tokens(groups: Sequence[Group]) -> int:
    """Tokens that the policy generated for these groups; tokens of guides are charged elsewhere."""
    return sum(rollout.num_on_policy_tokens for group in groups for rollout in group.rollouts)
