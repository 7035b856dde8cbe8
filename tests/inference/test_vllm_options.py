"""vLLM options that need no vLLM: the server's command line, its environment, the transport, names in strings."""

import importlib
from itertools import pairwise
from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.inference.vllm_http import ApiKeyMiddleware, parse_output
from npo_cli.inference.vllm_server import VllmServer, choose_transport
from tests.inference.vllm_models import make_handle, make_settings, tied_policy


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmServer:
    """A server that was not started."""
    monkeypatch.setattr(VllmServer, "_start", lambda self: None)
    return VllmServer(make_settings("vllm_server", max_loras=2), make_handle(tied_policy()))


def test_vllm_server_command_has_the_models_limits_and_the_key_middleware(server: VllmServer):
    command = server._command(8000)
    options = dict(pairwise(command))
    assert (options["--port"], options["--max-model-len"], options["--max-num-seqs"]) == ("8000", "64", "64")
    assert options["--dtype"] == "float32"
    assert {"--enforce-eager", "--no-enable-chunked-prefill", "--skip-tokenizer-init"} <= set(command)
    assert "--enable-sleep-mode" not in command
    module, _, name = options["--middleware"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is ApiKeyMiddleware
    key = server._environment()["VLLM_API_KEY"]
    assert len(key) == 32 and key not in command
    server.close()


def test_vllm_server_reads_its_first_weights_from_a_file(server: VllmServer):
    assert server._transport == "disk"
    assert (server._folder / "model.safetensors").is_file()
    folder = server._folder
    server.close()
    assert not folder.exists()


def test_vllm_weight_transfer_from_a_cpu_is_disk_only():
    handle = make_handle(tied_policy())
    assert choose_transport(make_settings("vllm_server"), handle) == "disk"
    with pytest.raises(NpoError, match="weight_transfer=nccl needs a GPU"):
        choose_transport(make_settings("vllm_server", weight_transfer="nccl"), handle)


def test_vllm_response_is_parsed_into_the_in_process_form():
    body = {
        "choices": [
            {
                "token_ids": [4, 5],
                "finish_reason": "stop",
                "logprobs": {"content": [{"token_id": 4, "logprob": -0.5}, {"token_id": 5, "logprob": -1.5}]},
                "weight_versions": [{"version": "step 3"}],
            }
        ],
        "prompt_logprobs": [None, {"7": {"logprob": -2.0}}],
        "model": "step 3",
    }
    output = parse_output(body)
    (completion,) = output.outputs
    assert [entry[token].logprob for entry, token in zip(completion.logprobs, (4, 5), strict=True)] == [-0.5, -1.5]
    assert [span.version for span in completion.weight_versions] == ["step 3"]
    assert output.prompt_logprobs[0] is None and output.prompt_logprobs[1][7].logprob == -2.0
    assert output.lora_request.lora_name == "step 3"
