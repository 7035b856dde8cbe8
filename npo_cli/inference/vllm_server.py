"""vLLM as a server process on this machine: its OpenAI server with the RL endpoints of vLLM 0.32.

Weight sync uses vLLM's own transports: `nccl` and `ipc` through its weight-transfer engines (init, start, update,
finish), `disk` through a folder that it reloads, the only one on a CPU. A sync pauses the server in mode `keep`, which
does not abort running requests, and sets the version. The server ends with this process, even after `kill -9`.
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
from torch import Tensor

from npo_cli.activity import open_meter
from npo_cli.config.engine import EngineSettings
from npo_cli.distributed.launch import strip_launch_variables
from npo_cli.errors import NpoError, RunFailed
from npo_cli.inference.base import AdapterHandle, EngineInput, ModelHandle
from npo_cli.inference.process import scratch_folder
from npo_cli.inference.sync_check import (
    RESUME_HINT,
    add_head,
    copy_to_cpu,
    named_tensors,
    tensor_shapes,
)
from npo_cli.inference.vllm_common import VLLM_HINT, BaseVllmEngine
from npo_cli.inference.vllm_http import find_free_port, lora_flags, max_connections, open_http_session, parse_output
from npo_cli.inference.vllm_images import IMAGE_SERVER_FLAGS, check_prompt_tokens, save_processor, server_prompts
from npo_cli.inference.vllm_local import save_untied_config, summarize_error

SERVED_MODEL_NAME = "policy"
SendWeights = Callable[[dict[str, Any], str], None]
"""Sends tensors by name, and their version, to the server."""


class VllmServer(BaseVllmEngine):
    """A server process and its client."""

    name = "vllm_server"
    runs_in_trainer = False

    def __init__(self, settings: EngineSettings, handle: ModelHandle) -> None:
        super().__init__(settings, handle)
        model, adapters, vision = handle.model, handle.adapters, handle.vision
        self._transport = choose_transport(settings, handle)
        # Dummy weights would also overwrite the image normalization, which is not among the weights sent.
        self._loads_weights = self._transport == "disk" or vision is not None
        tensors = named_tensors(model) if adapters is None else add_head(model, adapters.read_base())
        self._shapes = tensor_shapes(tensors) if adapters is None else adapters.read_shapes()
        self._scratch = ExitStack()
        self._folder = self._scratch.enter_context(scratch_folder())
        self._session = open_http_session(max_connections(settings))
        self._url, self._process = "", None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the server runs
        self._send: SendWeights = self._send_by_disk
        try:
            save_untied_config(model, self._folder)
            if vision is not None:
                save_processor(self._folder, handle.tokenizer, vision)
            if self._loads_weights:
                save_file(copy_to_cpu(tensors), self._folder / "model.safetensors")
            self._start()
            if self._transport != "disk":
                from npo_cli.inference.vllm_weight_transfer import open_weight_transfer

                with self._guarded("weight transfer setup"):
                    self._send = open_weight_transfer(self._transport, post=self._post, tensors=tensors, vllm=self.vllm)
        except BaseException:
            self.close()
            raise

    @classmethod
    def validate(cls, settings: EngineSettings, *, uses_adapters: bool, uses_images: bool) -> None:
        """Adapters are files, which only the transport `disk` sends."""
        transport = settings.vllm.weight_transfer
        if uses_adapters and transport not in ("auto", "disk"):
            raise NpoError(
                f"engine.vllm.weight_transfer={transport} does not support LoRA adapters (model.lora.rank)",
                "set engine.vllm.weight_transfer=auto",
            )
        super().validate(settings, uses_adapters=uses_adapters, uses_images=uses_images)

    def _replace_weights(self, tensors: dict[str, Tensor], version: str) -> None:
        """Running requests are paused, not aborted."""
        self._post("pause?mode=keep")
        self._wake("weights")
        self._send(tensors, version)
        self._wake("kv_cache")
        if not self._post("reset_prefix_cache")["success"]:
            raise RuntimeError("the prefix cache could not be reset")
        self._post("update_weight_version", {"new_version": version})
        self._post("resume")

    def _load_adapters(self, adapters: AdapterHandle, version: str) -> Path:
        """The folder that the server reads them from; they are served under the name of their version."""
        folder = Path(tempfile.mkdtemp(prefix="adapters-", dir=self._folder))
        adapters.save(folder)
        self._post("v1/load_lora_adapter", {"lora_name": version, "lora_path": str(folder)})
        return folder

    def _unload_adapters(self, version: str, loaded: Path) -> None:
        self._post("v1/unload_lora_adapter", {"lora_name": version})
        shutil.rmtree(loaded)

    def _sleep(self, level: int) -> None:
        self._post(f"sleep?level={level}")

    def _wake_up(self, tag: str) -> None:
        self._post(f"wake_up?tags={tag}")

    def close(self) -> None:
        """Stop the server and its child processes, and remove its folder."""
        process, self._process = self._process, None
        if process is not None:
            process.stdin.close()
            process.wait()
        self._session.close()
        self._log.close()
        self._scratch.close()

    def _start(self) -> None:
        port = find_free_port()
        self._url = f"http://127.0.0.1:{port}"
        supervisor = [sys.executable, "-m", "npo_cli.inference.process", str(self._folder)]
        command = [*supervisor, *self._command(port)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=self._environment(),
            start_new_session=True,
        )
        deadline = time.monotonic() + self.vllm.start_timeout
        while not self._healthy():
            if self._process.poll() is not None:
                raise RunFailed(f"the vLLM server could not start: {self._last_log_lines()}", VLLM_HINT)
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"the vLLM server did not start within engine.vllm.start_timeout = {self.vllm.start_timeout:g} s",
                    VLLM_HINT,
                )
            time.sleep(0.2)

    def _command(self, port: int) -> list[str]:
        vllm = self.vllm
        options = {
            "--model": str(self._folder),
            "--served-model-name": SERVED_MODEL_NAME,
            "--host": "127.0.0.1",
            "--port": str(port),
            "--dtype": self.dtype,
            "--logprobs-mode": "processed_logprobs",
            "--max-model-len": str(self.handle.max_model_len),
            "--max-num-seqs": str(self.settings.max_num_seqs),
            "--tensor-parallel-size": str(vllm.tensor_parallel_size),
            "--data-parallel-size": str(vllm.data_parallel_size),
            "--gpu-memory-utilization": str(vllm.gpu_memory_utilization),
            "--load-format": "safetensors" if self._loads_weights else "dummy",
            "--seed": "0",
            "--middleware": "npo_cli.inference.vllm_http.ApiKeyMiddleware",
        }
        flags = ["--disable-log-stats", "--enable-prefix-caching", "--enable-scale-out"]
        flags += ["--skip-tokenizer-init"] if self.handle.vision is None else IMAGE_SERVER_FLAGS
        if self.max_batched_tokens is not None:
            options["--max-num-batched-tokens"] = str(self.max_batched_tokens)
        flags += [] if self.chunked_prefill else ["--no-enable-chunked-prefill"]
        flags += ["--enforce-eager"] if self.enforce_eager else []
        flags += ["--enable-sleep-mode"] if self.can_sleep else []
        flags += [] if self.handle.adapters is None else lora_flags(self.handle.adapters, vllm)
        if self._transport != "disk":
            options["--weight-transfer-config"] = f'{{"backend": "{self._transport}"}}'
        pairs = [part for option in options.items() for part in option]
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *pairs, *flags]

    def _environment(self) -> dict[str, str]:
        return {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            # The server is not part of a distributed training job.
            **strip_launch_variables(os.environ),
            "VLLM_CPU_KVCACHE_SPACE": str(self.vllm.cpu_kv_cache_gb),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            **({"CUDA_VISIBLE_DEVICES": self.vllm.devices} if self.vllm.devices else {}),
            **({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if self._transport == "ipc" else {}),
            "VLLM_SERVER_DEV_MODE": "1",
            **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if self.handle.adapters else {}),
            "VLLM_API_KEY": self._session.headers["Authorization"].removeprefix("Bearer "),
        }

    def _healthy(self) -> bool:
        import requests

        try:
            # Another server on the same port would not accept this key.
            return self._session.get(f"{self._url}/v1/models", timeout=5).ok
        except requests.RequestException:
            return False

    def _last_log_lines(self) -> str:
        if self._log.closed:
            return "its log is closed"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        last = max((number for number, line in enumerate(lines) if "Error" in line), default=len(lines) - 1)
        return " ".join(line.strip() for line in lines[last : last + 3]) or "its log is empty"

    def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        response = self._session.post(f"{self._url}/{path}", json=body, timeout=self.vllm.timeout)
        response.raise_for_status()
        # The adapter endpoints answer in plain text.
        return response.json() if response.headers.get("content-type", "").startswith("application/json") else None

    def _run(
        self,
        prompts: Sequence[EngineInput],
        fields: Sequence[dict[str, Any]],
        versions: Sequence[str | None],
        *,
        phase: str,
    ) -> list[Any]:
        # Adapters are addressed by name; an unknown name is answered with 404.
        names = [SERVED_MODEL_NAME if self.handle.adapters is None else version for version in versions]
        bodies = [
            prompt | {"model": name, "sampling_params": each}
            for prompt, each, name in zip(server_prompts(prompts, self.handle.vision), fields, names, strict=True)
        ]
        with self._guarded(phase), ThreadPoolExecutor(max_connections(self.settings)) as pool:
            outputs, meter = [], open_meter(len(bodies)) if phase == "sample" else None
            for output in pool.map(lambda body: parse_output(self._post("inference/v1/generate", body)), bodies):
                outputs.append(output)
                if meter is not None:
                    meter.add(1, len(output.outputs[0].token_ids))
            check_prompt_tokens(prompts, outputs)
            return outputs

    def _send_by_disk(self, tensors: dict[str, Any], version: str) -> None:
        """Write the tensors to a folder, have the server reload it, and remove it."""
        folder = Path(tempfile.mkdtemp(prefix="weights-", dir=self._folder))
        try:
            shutil.copy(self._folder / "config.json", folder)
            save_file(copy_to_cpu(tensors), folder / "model.safetensors")
            self._post("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _guarded(self, phase: str) -> Iterator[None]:
        """Turn an exception into an error that names the phase and says whether the server is dead or hung."""
        import requests

        try:
            yield
        except NpoError:
            raise
        except requests.Timeout as error:
            message = (
                f"the vLLM server did not respond within engine.vllm.timeout={self.vllm.timeout:g} s (phase: {phase})"
            )
            raise RunFailed(message, RESUME_HINT) from error
        except Exception as error:  # requests and the server's responses raise many kinds
            is_dead = self._process is None or self._process.poll() is not None
            cause = f"it has ended: {self._last_log_lines()}" if is_dead else summarize_error(error)
            raise RunFailed(f"the vLLM server failed (phase: {phase}): {cause}", RESUME_HINT) from error


def choose_transport(settings: EngineSettings, handle: ModelHandle) -> str:
    """`engine.vllm.weight_transfer` with `auto` resolved: disk for adapters and from a CPU, else nccl."""
    transport = settings.vllm.weight_transfer
    if transport == "auto":
        return "disk" if handle.is_on_cpu or handle.adapters is not None else "nccl"
    if handle.is_on_cpu and transport != "disk":
        raise NpoError(
            f"engine.vllm.weight_transfer={transport} needs a GPU, but the model is on a CPU",
            "set engine.vllm.weight_transfer=auto",
        )
    return transport
