"""vLLM in a process of its own, asked over HTTP on this machine: its OpenAI server with the RL endpoints of vLLM 0.32.

Weights travel by vLLM's own means: `nccl` and `ipc` by its weight-transfer engines (init, start, update, finish),
`disk` by a folder that it reloads, which is the one that works on a CPU. A sync pauses with mode keep, so nothing that
is under way is cut, and stamps the version. The server dies with this process, however this process dies.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npo_cli.distributed.launch import strip_launch_variables
from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.base import AdapterHandle, EngineInput, VisionProcessor
from npo_cli.inference.process import scratch_folder
from npo_cli.inference.sync_check import (
    RESUME_HINT,
    add_head,
    check_sent_tensors,
    copy_to_cpu,
    named_tensors,
    tensor_shapes,
)
from npo_cli.inference.vllm_common import BaseVllmEngine, VllmLimits
from npo_cli.inference.vllm_http import find_free_port, lora_flags, max_connections, open_http_session, parse_output
from npo_cli.inference.vllm_images import IMAGE_SERVER_FLAGS, check_prompt_tokens, save_processor, server_prompts
from npo_cli.inference.vllm_local import VLLM_HINT, save_untied_config, summarize_error

SERVED_MODEL_NAME = "policy"
SendWeights = Callable[[dict[str, Any], str], None]
"""Tensors by name and the version they are called by, to the server."""


class VllmServer(BaseVllmEngine):
    """A server process and a client of it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limits: VllmLimits,
        transport: str,
        adapters: AdapterHandle | None = None,
        vision: VisionProcessor | None = None,
    ) -> None:
        self.tokenizer, self.limits, self.adapters, self.vision = tokenizer, limits, adapters, vision
        self.version: str | None = None
        self._transport = transport
        # Made-up weights would also make up how a picture is normalised, which is never sent.
        self._starts_real = transport == "disk" or vision is not None
        tensors = named_tensors(model) if adapters is None else add_head(model, adapters.read_base())
        self._shapes = tensor_shapes(tensors) if adapters is None else adapters.read_shapes()
        self._held: dict[str, Path] = {}
        self._scratch = ExitStack()
        self._folder = self._scratch.enter_context(scratch_folder())
        self._session = open_http_session(limits)
        self._url, self._process, self._asleep = "", None, False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        self._send: SendWeights = self._send_by_disk
        try:
            save_untied_config(model, self._folder)
            if vision is not None:
                save_processor(self._folder, tokenizer, vision)
            if self._starts_real:
                save_file(copy_to_cpu(tensors), self._folder / "model.safetensors")
            self._start()
            if transport != "disk":
                from npo_cli.inference.vllm_weight_transfer import open_weight_transfer

                with self._working("meet for the first weights"):
                    self._send = open_weight_transfer(transport, post=self._post, tensors=tensors, limits=limits)
        except BaseException:
            self.close()
            raise

    def update_weights(self, model: PreTrainedModel, *, version: str) -> None:
        """Pause without cutting anything, send, forget every cached prefix, stamp, go on; adapters need no pause."""
        if self.adapters is not None:
            self._take_adapters(self.adapters, version)
            return
        tensors = named_tensors(model)
        check_sent_tensors(self._shapes, tensors)
        with self._working("take weights"):
            self.version = None
            self._post("pause?mode=keep")
            if self._asleep:
                self._post("wake_up?tags=weights")
            self._send(tensors, version)
            if self._asleep:
                self._post("wake_up?tags=kv_cache")
                self._asleep = False
            if not self._post("reset_prefix_cache")["success"]:
                raise RuntimeError("the prefix cache of the old weights could not be dropped")
            self._post("update_weight_version", {"new_version": version})
            self._post("resume")
        self.version = version

    def _take_adapters(self, port: AdapterHandle, version: str) -> None:
        """Loaded beside the others under the version as their name; the oldest make room."""
        check_sent_tensors(self._shapes, port.read_adapters(), shapes=port.read_shapes())
        with self._working("take adapters"):
            if self._asleep:
                self._post("wake_up")
                self._asleep = False
            self.version = None
            while len(self._held) >= self.limits.max_loras:
                oldest = next(iter(self._held))
                self._post("v1/unload_lora_adapter", {"lora_name": oldest})
                shutil.rmtree(self._held.pop(oldest))
            folder = Path(tempfile.mkdtemp(prefix="adapters-", dir=self._folder))
            port.save(folder)
            self._post("v1/load_lora_adapter", {"lora_name": version, "lora_path": str(folder)})
            self._held[version] = folder
        self.version = version

    def release_memory(self) -> None:
        """Drop weights and cache from the GPU; they are sent again anyway. Nothing on a CPU, where vLLM cannot.

        The base beside adapters is never sent again: it waits in the CPU's memory.
        """
        if self.limits.can_sleep and not self._asleep:
            with self._working("go to sleep"):
                self._post(f"sleep?level={2 if self.adapters is None else 1}")
            self._asleep, self.version = True, None

    def close(self) -> None:
        """End the server with everything it started, and remove its folder."""
        process, self._process = self._process, None
        if process is not None:
            process.stdin.close()
            process.wait()
        self._session.close()
        self._log.close()
        self._scratch.close()

    # The process

    def _start(self) -> None:
        port = find_free_port()
        self._url = f"http://127.0.0.1:{port}"
        keeper = [sys.executable, "-m", "npo_cli.inference.process", str(self._folder)]
        command = [*keeper, *self._command(port)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=self._environment(),
            start_new_session=True,
        )
        deadline = time.monotonic() + self.limits.start_timeout
        while not self._healthy():
            if self._process.poll() is not None:
                raise RunFailed(f"the vLLM server could not start: {self._last_words()}", VLLM_HINT)
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"the vLLM server did not start within engine.vllm.start_timeout = {self.limits.start_timeout:g} s",
                    VLLM_HINT,
                )
            time.sleep(0.2)

    def _command(self, port: int) -> list[str]:
        limits = self.limits
        options = {
            "--model": str(self._folder),
            "--served-model-name": SERVED_MODEL_NAME,
            "--host": "127.0.0.1",
            "--port": str(port),
            "--dtype": limits.dtype,
            "--logprobs-mode": "processed_logprobs",
            "--max-model-len": str(limits.max_model_len),
            "--max-num-seqs": str(limits.max_num_seqs),
            "--tensor-parallel-size": str(limits.tensor_parallel_size),
            "--data-parallel-size": str(limits.data_parallel_size),
            "--gpu-memory-utilization": str(limits.gpu_memory_utilization),
            "--load-format": "safetensors" if self._starts_real else "dummy",
            "--seed": "0",
        }
        options["--middleware"] = "npo_cli.inference.vllm_http.ApiKeyMiddleware"
        flags = ["--disable-log-stats", "--enable-prefix-caching", "--enable-scale-out"]
        flags += ["--skip-tokenizer-init"] if self.vision is None else IMAGE_SERVER_FLAGS
        if limits.max_batched_tokens is not None:
            options["--max-num-batched-tokens"] = str(limits.max_batched_tokens)
        flags += [] if limits.chunked_prefill else ["--no-enable-chunked-prefill"]
        flags += ["--enforce-eager"] if limits.enforce_eager else []
        flags += ["--enable-sleep-mode"] if limits.can_sleep else []
        flags += [] if self.adapters is None else lora_flags(self.adapters, limits)
        if self._transport != "disk":
            options["--weight-transfer-config"] = f'{{"backend": "{self._transport}"}}'
        pairs = [part for option in options.items() for part in option]
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *pairs, *flags]

    def _environment(self) -> dict[str, str]:
        return {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            # The server has no part in a job of several trainers.
            **strip_launch_variables(os.environ),
            "VLLM_CPU_KVCACHE_SPACE": str(self.limits.cpu_kv_cache_gb),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            **({"CUDA_VISIBLE_DEVICES": self.limits.devices} if self.limits.devices else {}),
            **({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if self._transport == "ipc" else {}),
            "VLLM_SERVER_DEV_MODE": "1",
            **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if self.adapters else {}),
            "VLLM_API_KEY": self._session.headers["Authorization"].removeprefix("Bearer "),
        }

    def _healthy(self) -> bool:
        import requests

        try:
            # Nobody else's server knows this key.
            return self._session.get(f"{self._url}/v1/models", timeout=5).ok
        except requests.RequestException:
            return False

    def _last_words(self) -> str:
        if self._log.closed:
            return "it was closed"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        last = max((place for place, line in enumerate(lines) if "Error" in line), default=len(lines) - 1)
        return " ".join(line.strip() for line in lines[last : last + 3]) or "it said nothing"

    # Asking

    def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._session.post(f"{self._url}/{path}", json=body, timeout=self.limits.deadline)
        answer.raise_for_status()
        # Doors for adapters say their success in plain words.
        return answer.json() if answer.headers.get("content-type", "").startswith("application/json") else None

    def _answers(
        self,
        prompts: Sequence[EngineInput],
        fields: Sequence[dict[str, Any]],
        versions: Sequence[str | None],
        *,
        phase: str,
    ) -> list[Any]:
        # Adapters are asked by their name; the server knows no other and answers 404.
        names = [SERVED_MODEL_NAME if self.adapters is None else version for version in versions]
        bodies = [
            asked | {"model": name, "sampling_params": each}
            for asked, each, name in zip(server_prompts(prompts, self.vision), fields, names, strict=True)
        ]
        with self._working(phase), ThreadPoolExecutor(max_connections(self.limits)) as pool:
            outputs = list(pool.map(lambda body: parse_output(self._post("inference/v1/generate", body)), bodies))
            check_prompt_tokens(prompts, outputs)
            return outputs

    def _send_by_disk(self, tensors: dict[str, Any], version: str) -> None:
        """A folder beside the one it started from, gone once it was read."""
        folder = Path(tempfile.mkdtemp(prefix="weights-", dir=self._folder))
        try:
            shutil.copy(self._folder / "config.json", folder)
            save_file(copy_to_cpu(tensors), folder / "model.safetensors")
            self._post("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _working(self, phase: str) -> Iterator[None]:
        """A dead or hung server is told by phase and cause."""
        import requests

        try:
            yield
        except NpoError:
            raise
        except requests.Timeout as error:
            message = f"the vLLM server hung while it was to {phase}: nothing after {self.limits.deadline:g} s"
            raise RunFailed(message, RESUME_HINT) from error
        except Exception as error:  # whatever a foreign engine dies of is the finding
            dead = self._process is None or self._process.poll() is not None
            cause = f"it has ended: {self._last_words()}" if dead else summarize_error(error)
            raise RunFailed(f"the vLLM server failed while it was to {phase}: {cause}", RESUME_HINT) from error
