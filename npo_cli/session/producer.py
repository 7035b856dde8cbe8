"""The producer: a process with a model of its own that samples while the learner learns (`train.staleness`).

It receives the weights to sample from and the responses to sample, and nothing else. Weights go through a
safetensors file in shared memory, with a checksum; requests and samples go through a pipe. The process ends with the
learner, however that ends (`producer_process.py` is its side). A dead producer is an error with its exit code and last
output.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.base import Engine, Sample, SampleRequest
from npo_cli.inference.process import scratch_folder
from npo_cli.inference.sync_check import RESUME_HINT
from npo_cli.policy.device import choose_device
from npo_cli.policy.model import Policy
from npo_cli.registry import ENGINES

SHARED_MEMORY = Path("/dev/shm")
POLL_SECONDS = 0.1
"""How soon a thread that waits for samples notices that they are not wanted any more."""
LAST_OUTPUT_LINES = 3
END_SECONDS = 5.0
"""Between the end of a process's pipe and of the process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedWeights:
    """Weights in a file that the producer loads."""

    version: str
    path: Path
    crc32: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProducerStart:
    """The first message to the process."""

    recipe: dict[str, Any]
    folder: Path
    """Of published weights; removed by whichever process ends last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleJob:
    """Every later message; the answer is a list of samples."""

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
    """Refuse asynchronous sampling with an engine that cannot be opened a second time in another process."""
    if not recipe.train.staleness:
        return
    engine: type[Engine] = ENGINES.get(recipe.engine.kind)
    if engine.needs_weight_sync:
        raise NpoError(
            f"train.staleness={recipe.train.staleness} is not available with engine.kind={engine.name}",
            "set engine.kind=transformers, or train.staleness=0",
        )
    if recipe.engine.producer.device is not None:
        choose_device(recipe.engine.producer.device, setting="engine.producer.device")


class Producer:
    """The learner's side of the process, which starts when it is first needed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._process: ProducerProcess | None = None
        self._channel: Connection | None = None
        self._lifeline: Connection | None = None
        self._output: BinaryIO | None = None
        self._resources = ExitStack()
        self._folder: Path | None = None
        self._published: dict[str, PublishedWeights] = {}
        self._lock = threading.Lock()
        self._jobs: list[ProducerStart | SampleJob] = []
        """Unanswered ones, oldest first."""
        self._loaded: str | None = None
        """Version that the process holds after its newest answer."""
        self._num_published = 0

    def start(self, policy: Policy) -> None:
        """Start the process, unless it runs; it loads the model meanwhile."""
        if self._process is not None:
            return
        size = sum(tensor.nbytes for tensor in select_weights(policy).values())
        inside = choose_weights_folder(size * (self.recipe.train.staleness + 2))
        self._folder = self._resources.enter_context(scratch_folder(inside))
        self._output = self._resources.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed with these
        (self._channel, theirs), (their_lifeline, self._lifeline) = Pipe(), Pipe(duplex=False)
        self._resources.enter_context(self._channel)
        self._resources.enter_context(self._lifeline)
        with theirs, their_lifeline:
            self._process = start_process(theirs, their_lifeline, self._output)
        self._send(ProducerStart(recipe=recipe_to_dict(self.recipe), folder=self._folder))

    def wait_until_ready(self) -> None:
        """Return when the process has loaded its model."""
        with self._lock:
            while self._jobs:
                self._receive(threading.Event())

    def publish(self, step: int, policy: Policy) -> str:
        """Write the policy's current weights, those of `step`, for the process; returns their version."""
        assert self._folder is not None, "the producer runs"
        version = f"step {step}, write {policy.num_weight_changes}"
        if version not in self._published:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in select_weights(policy).items()}
            self._num_published += 1
            path = self._folder / f"weights-{self._num_published}.safetensors"
            save_file(tensors, path)
            self._published[version] = PublishedWeights(version=version, path=path, crc32=compute_checksum(tensors))
        return version

    def sample(
        self,
        requests: Sequence[SampleRequest],
        *,
        temperature: float,
        max_new_tokens: int,
        aborted: threading.Event,
    ) -> list[Sample]:
        """One sample per request, all of one published version; raises SamplingAborted once `aborted` is set."""
        version = requests[0].version
        assert version is not None and {request.version for request in requests} == {version}, "one version per job"
        with self._lock:
            while self._jobs:  # answers that were not waited for
                self._receive(aborted)
            weights = None if version == self._loaded else self._published[version]
            self._send(
                SampleJob(requests=requests, temperature=temperature, max_new_tokens=max_new_tokens, weights=weights)
            )
            return self._receive(aborted)

    def close(self) -> None:
        """Kill the process and remove its files."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        self._resources.close()
        self._published.clear()

    def _send(self, job: ProducerStart | SampleJob) -> None:
        assert self._channel is not None, "the producer runs"
        try:
            self._channel.send(job)
        except ConnectionError as error:
            raise self._describe_death() from error
        self._jobs.append(job)

    def _receive(self, aborted: threading.Event) -> Any:
        """The answer to the oldest job; weights that the process holds then, and older ones, lose their files."""
        assert self._channel is not None, "the producer runs"
        try:
            while not self._channel.poll(POLL_SECONDS):
                if aborted.is_set():
                    raise SamplingAborted
            answer = self._channel.recv()
        except (EOFError, OSError) as error:
            raise self._describe_death() from error
        job = self._jobs.pop(0)
        if isinstance(job, SampleJob) and job.weights is not None:
            self._loaded = job.weights.version
            self._remove_files(until=job.weights)
        return answer

    def _remove_files(self, *, until: PublishedWeights) -> None:
        for version in list(self._published):
            weights = self._published[version]
            weights.path.unlink(missing_ok=True)
            if weights is until:
                return
            del self._published[version]

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ProducerEngine:
    """In the place of a session's engine and of its weight sync, for one queue of rollouts."""

    producer: Producer
    aborted: threading.Event
    versions: dict[int, str]
    """Of the published weights, by step."""

    def sync_weights(self, step: int) -> str:
        """The version of weights that were published."""
        return self.versions[step]

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample per request, in order."""
        return self.producer.sample(
            requests, temperature=temperature, max_new_tokens=max_new_tokens, aborted=self.aborted
        )


def start_process(channel: Connection, lifeline: Connection, output: BinaryIO) -> ProducerProcess:
    """The process, out of reach of the terminal's signals: the learner alone stops it."""
    numbers = (channel.fileno(), lifeline.fileno())
    code = f"from npo_cli.session.producer_process import serve; serve{numbers}"
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
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
    """What may differ between two policies of a run, by name: all parameters, or the adapters."""
    has_adapters = policy.adapters is not None
    return {
        name: parameter
        for name, parameter in policy.model.named_parameters()
        if parameter.requires_grad or not has_adapters
    }


def compute_checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names and bytes: against a file that is torn or of other weights, not against an attacker."""
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum
