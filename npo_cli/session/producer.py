"""The producer: a process with a model and an engine of its own that samples while the learner learns
(`train.staleness`).

It receives the weights to sample from and the responses to sample, and nothing else, one job after the other: no
weights change while responses are sampled. Weights go through a safetensors file in shared memory, with a checksum;
requests and samples go through a pipe. The process ends with the learner, however that ends (`producer_process.py` is
its side). A dead producer is an error with its exit code and last output.

An engine that holds a copy of the weights, such as a vLLM server, is opened by the producer alone: the learner samples
evaluations and probes through it too (`ProducerEngine`). Of several ranks, rank 0 has the producer.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from npo_cli.config.loading import recipe_to_dict
from npo_cli.config.recipe import Recipe
from npo_cli.distributed.launch import strip_launch_variables
from npo_cli.distributed.process_group import current_group, on_main_rank
from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.base import Engine, Sample, SampleRequest
from npo_cli.inference.process import scratch_folder
from npo_cli.inference.sync_check import RESUME_HINT
from npo_cli.policy.device import choose_device
from npo_cli.policy.model import Policy
from npo_cli.policy.packing import TokenRow
from npo_cli.registry import ENGINES

SHARED_MEMORY = Path("/dev/shm")
POLL_SECONDS = 0.1
"""How soon a thread that waits for samples notices that they are not wanted any more."""
LAST_OUTPUT_LINES = 3
END_SECONDS = 15.0
"""Between the end of a process's pipe and of the process, which ends its engine first."""


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)
class PublishedWeights:
    """Weights in a file that the producer loads. Rank 0 removes the file when it holds this record no longer."""

    step: int
    version: str
    path: Path
    crc32: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProducerStart:
    """The first message to the process."""

    recipe: dict[str, Any]
    check_rows: tuple[TokenRow, ...]
    """By which a weight sync of its engine is verified."""
    folder: Path
    """Of published weights; removed by whichever process ends last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleJob:
    """Every later message; the answer is a list of samples, or an NpoError."""

    requests: Sequence[SampleRequest]
    temperature: float
    max_new_tokens: int
    weights: PublishedWeights | None
    """To load first; None: it holds them."""


class ProducerProcess(Protocol):
    """What is used of `subprocess.Popen`."""

    def poll(self) -> int | None:
        """Exit code; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended."""

    def kill(self) -> None:
        """SIGKILL."""


class SamplingAborted(Exception):
    """The samples that a thread waits for are not wanted any more."""


def check_producer(recipe: Recipe) -> None:
    """Refuse a device that the producer cannot use."""
    device = recipe.engine.producer.device
    if not recipe.train.staleness or device is None:
        return
    engine: type[Engine] = ENGINES.get(recipe.engine.kind)
    if engine.needs_weight_sync and engine.runs_in_trainer:
        raise NpoError(
            f"engine.producer.device={device} is not available with engine.kind={engine.name}, which takes the first "
            "visible GPU",
            "leave it out, or set engine.kind=vllm_server with engine.vllm.devices",
        )
    choose_device(device, setting="engine.producer.device")


class Producer:
    """The learner's side of the process, which starts when it is first needed. All ranks call the methods together."""

    def __init__(self, recipe: Recipe, *, check_rows: tuple[TokenRow, ...]) -> None:
        self.recipe, self.check_rows = recipe, check_rows
        self._process: ProducerProcess | None = None
        self._channel: Connection | None = None
        self._lifeline: Connection | None = None
        self._output: BinaryIO | None = None
        self._resources = ExitStack()
        self._folder: Path | None = None
        self._lock = threading.Lock()
        self._jobs: list[ProducerStart | SampleJob] = []
        """Unanswered ones, oldest first."""
        self._loaded: str | None = None
        """Version that the process holds after its newest answer."""
        self._failure: NpoError | None = None
        """The error that was its last answer."""
        self._warning = ""
        self._num_published = 0

    @on_main_rank
    def start(self, policy: Policy) -> None:
        """Start the process, unless it runs; it loads the model meanwhile."""
        if self._process is not None:
            return
        inside = choose_weights_folder(policy.num_bytes * (self.recipe.train.staleness + 2))
        self._folder = self._resources.enter_context(scratch_folder(inside))
        self._output = self._resources.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed with these
        (self._channel, theirs), (their_lifeline, self._lifeline) = Pipe(), Pipe(duplex=False)
        self._resources.enter_context(self._channel)
        self._resources.enter_context(self._lifeline)
        with theirs, their_lifeline:
            self._process = start_process(theirs, their_lifeline, self._output)
        recipe = recipe_to_dict(self.recipe)
        self._send(ProducerStart(recipe=recipe, check_rows=self.check_rows, folder=self._folder))

    @on_main_rank
    def wait_until_ready(self) -> str:
        """Return when the process has loaded its model and opened its engine: the engine's reproducibility warning."""
        with self._lock:
            while self._jobs:
                self._receive(threading.Event())
        return self._warning

    def publish(self, step: int, policy: Policy) -> PublishedWeights:
        """Write the policy's current weights, those of `step`, for the process."""
        tensors = select_weights(policy)
        version = describe_version(step, policy)
        return current_group().run_on_main(lambda: self._write(step, version, tensors), phase="publish the weights")

    @on_main_rank
    def sample(
        self,
        requests: Sequence[SampleRequest],
        weights: PublishedWeights,
        *,
        temperature: float,
        max_new_tokens: int,
        aborted: threading.Event,
    ) -> list[Sample]:
        """One sample per request from these weights; raises SamplingAborted once `aborted` is set."""
        with self._lock:
            while self._jobs:  # answers that were not waited for
                self._receive(aborted)
            self._send(
                SampleJob(
                    requests=requests,
                    temperature=temperature,
                    max_new_tokens=max_new_tokens,
                    weights=None if weights.version == self._loaded else weights,
                )
            )
            return self._receive(aborted)

    def close(self) -> None:
        """End the process, which ends its engine, and remove its files."""
        process, self._process = self._process, None
        if process is not None and self._lifeline is not None:
            with suppress(OSError):
                os.write(self._lifeline.fileno(), b"\0")  # a forked child may keep the pipe open
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            process.kill()
            process.wait()
        self._resources.close()

    def _write(self, step: int, version: str, tensors: Mapping[str, Tensor]) -> PublishedWeights:
        assert self._folder is not None, "the producer runs"
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._num_published += 1
        path = self._folder / f"weights-{self._num_published}.safetensors"
        save_file(on_cpu, path)
        weights = PublishedWeights(step=step, version=version, path=path, crc32=compute_checksum(on_cpu))
        weakref.finalize(weights, path.unlink, missing_ok=True)
        return weights

    def _send(self, job: ProducerStart | SampleJob) -> None:
        assert self._channel is not None, "the producer runs"
        if self._failure is not None:
            raise self._failure
        try:
            self._channel.send(job)
        except ConnectionError as error:
            raise self._describe_death() from error
        self._jobs.append(job)

    def _receive(self, aborted: threading.Event) -> Any:
        """The answer to the oldest job."""
        assert self._channel is not None, "the producer runs"
        try:
            while not self._channel.poll(POLL_SECONDS):
                if aborted.is_set():
                    raise SamplingAborted
            answer = self._channel.recv()
        except (EOFError, OSError) as error:
            raise self._describe_death() from error
        job = self._jobs.pop(0)
        if isinstance(answer, NpoError):
            self._failure = answer
            raise answer
        if isinstance(job, ProducerStart):
            self._warning = answer
        elif job.weights is not None:
            self._loaded = job.weights.version
        return answer

    def _describe_death(self) -> RunFailed:
        if self._process is None or self._output is None:
            return RunFailed("the producer was stopped", RESUME_HINT)
        try:
            code = self._process.wait(END_SECONDS)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            how = "closed its pipe"
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()[-LAST_OUTPUT_LINES:]
        said = f"; its last output: {' '.join(line.strip() for line in lines)}" if lines else ""
        return RunFailed(f"the producer (train.staleness={self.recipe.train.staleness}) {how}{said}", RESUME_HINT)


class ProducerEngine(Engine):
    """The producer in the place of a session's engine and of its weight sync. Its jobs and those of a queue take turns;
    each brings its weights.
    """

    def __init__(self, producer: Producer, policy: Policy, *, reproducibility_warning: str = "") -> None:
        self.producer, self.policy = producer, policy
        self.reproducibility_warning = reproducibility_warning
        self.aborted = threading.Event()
        self._published: dict[str, PublishedWeights] = {}
        """By version."""

    def sync_weights(self, step: int) -> str:
        """The version of the current weights, those of `step`, which are published unless they were."""
        version = describe_version(step, self.policy)
        if version not in self._published:
            self._published.clear()
            self._published[version] = self.producer.publish(step, self.policy)
        return version

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample per request, in order, all from one published version."""
        if not requests:
            return []
        (version,) = {request.version for request in requests}
        return self.producer.sample(
            requests,
            self._published[str(version)],
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            aborted=self.aborted,
        )

    def close(self) -> None:
        """Let go of the weights; what is sampled is not waited for any more."""
        self.aborted.set()
        self._published.clear()


class QueueEngine(ProducerEngine):
    """The same for a queue of rollouts: its thread samples from weights that the learner published before."""

    def publish(self, step: int) -> None:
        """Publish the current weights, those of `step`, unless they were; none older than staleness steps are kept."""
        oldest = step - self.producer.recipe.train.staleness
        kept = {version: weights for version, weights in self._published.items() if weights.step >= oldest}
        self._published = kept
        if all(weights.step != step for weights in kept.values()):
            weights = self.producer.publish(step, self.policy)
            self._published = kept | {weights.version: weights}

    def sync_weights(self, step: int) -> str:
        """The version of the weights of `step`."""
        return next(weights.version for weights in self._published.values() if weights.step == step)


def describe_version(step: int, policy: Policy) -> str:
    """The current weights among those of a process."""
    return f"step {step}, write {policy.num_weight_changes}"


def start_process(channel: Connection, lifeline: Connection, output: BinaryIO) -> ProducerProcess:
    """The process, out of reach of the terminal's signals: the learner alone stops it."""
    numbers = (channel.fileno(), lifeline.fileno())
    code = f"from npo_cli.session.producer_process import serve; serve{numbers}"
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        env={**strip_launch_variables(os.environ), "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=numbers,
        start_new_session=True,
    )


def choose_weights_folder(num_bytes: int) -> Path | None:
    """Shared memory where it has room for that much; None: the temporary directory."""
    is_usable = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
    return SHARED_MEMORY if is_usable and shutil.disk_usage(SHARED_MEMORY).free >= num_bytes else None


def select_weights(policy: Policy) -> dict[str, Tensor]:
    """What may differ between two policies of a run, by name: all weights, or the adapters; a tied one has one name.

    Of a sharded model whole tensors, which all ranks gather, on rank 0 only.
    """
    tensors = policy.tensors if policy.adapters is None else policy.adapter_weights
    found: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    return dict(found.values())


def compute_checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names and bytes: against a file that is torn or of other weights, not against an attacker."""
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum
