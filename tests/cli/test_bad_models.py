"""Models and devices that are not there or not whole: told before a run directory is made."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, T5Config, T5Model

from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from tests.helpers.cli_errors import SMALL, assert_refused, edit_file, set_fields

UP = "model.layers.0.mlp.up_proj.weight"
SIZES = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def training(folder: Path, *overrides: str) -> str:
    result = assert_refused("train", "micro", "new", *SMALL, *overrides, beside=folder)
    return f"{result.message} | {result.hint}"


def base(folder: Path, *without: str) -> Path:
    """A copy of the shipped model, some files left out."""
    shutil.copytree(MICRO_BASE_FOLDER, folder / "base", ignore=shutil.ignore_patterns(*without))
    return folder / "base"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_missing_gpu_is_refused(folder, device):
    assert training(folder, f"model.device={device}") == (
        f"model.device={device}, but torch finds no such GPU | set model.device=cpu (npo doctor lists the GPUs)"
    )


@pytest.mark.parametrize("device", ["gpu", "meta", "mps", "cuda:-1", "''"])
def test_unsupported_device_is_refused(folder, device):
    assert "is not supported | set model.device to auto, cpu" in training(folder, f"model.device={device}")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("./nowhere", "model.path=./nowhere: there is no folder "),
        ("/no/where", "model.path=/no/where: there is no folder /no/where | set it to"),
        ("''", "model.path= is not a folder"),
        ("file.txt", "model.path=file.txt is not a folder"),
        ("micro_base", "neither a folder nor a bundled model | set model.path=micro-base"),
        ("SmolLM2-135M", "neither a folder nor a bundled model | set model.path=smollm2-135m"),
        ("a b c", "model.path=a b c: there is no folder "),
    ],
)
def test_missing_model_is_refused_without_network(folder, path, words):
    (folder / "file.txt").write_text("no model")
    assert words in training(folder, f"model.path={path}")


@pytest.mark.parametrize(
    ("without", "words"),
    [
        ("tokenizer*", "base: the folder has no tokenizer"),
        ("config.json", "base: no causal language model could be loaded: Unrecognized model"),
        ("model.safetensors", "base has no model.safetensors | save the model with save_pretrained"),
    ],
)
def test_incomplete_model_folder_error_names_the_file(folder, without, words):
    base(folder, without)
    assert words in training(folder, "model.path=./base")


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors"])
def test_model_folder_with_truncated_file_is_refused(folder, file):
    path = base(folder) / file
    path.write_bytes(path.read_bytes()[:100])
    assert "base: no " in training(folder, "model.path=./base")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(UP), f"base: tensor missing: {UP}"),
        (lambda tensors: tensors.update({UP: torch.zeros(3, 5)}), f"base: tensor of another shape: {UP}"),
        (lambda tensors: tensors[UP].fill_(torch.nan), f"base: tensor not finite: {UP}"),
        (lambda tensors: tensors[UP].fill_(1e30), f"base: tensor with values above 1e+10: {UP}"),
        (lambda tensors: tensors.update({UP: tensors[UP].long()}), f"base: tensor of whole numbers: {UP}"),
    ],
)
def test_model_with_missing_weights_is_refused(folder: Path, change: Callable[[dict[str, Tensor]], object], words: str):
    path = base(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    assert words in training(folder, "model.path=./base")


def test_pickled_weights_are_never_opened(folder):
    home = base(folder, "model.safetensors")
    (home / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")  # opened, it makes a file
    assert "base has no model.safetensors, only .bin files, which can run code" in training(folder, "model.path=./base")
    assert not (folder / "opened").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_hidden_layers": 10**9, "layer_types": None},
            "describes 1000000000 layers, but the weights",
        ),
        ({"vocab_size": 10**11}, "describes a model of"),
        ({"intermediate_size": 10**11}, "describes a model of"),
        ({"num_attention_heads": 0}, "no causal language model could be loaded"),
        ({"hidden_size": "large"}, "base: no "),
        ({"hidden_size": -5}, "base: no "),
        ({"hidden_act": "nothing"}, "no causal language model could be loaded"),
    ],
)
def test_config_of_another_model_is_refused_before_memory_is_taken(folder, changes, words):
    set_fields(base(folder) / "config.json", **changes)
    assert words in training(folder, "model.path=./base")


def test_model_that_is_not_causal_is_refused(folder):
    home = base(folder, "model.safetensors", "config.json")
    BertModel(BertConfig(hidden_size=8, intermediate_size=8, **SIZES)).save_pretrained(home)
    assert "base: tensor missing: cls.predictions.bias" in training(folder, "model.path=./base")
    T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=40)).save_pretrained(home)
    assert "no causal language model could be loaded: Unrecognized configuration class" in training(
        folder, "model.path=./base"
    )


def test_engine_that_cannot_start_leaves_no_run_directory(folder, monkeypatch):
    # installed, but its import fails: only the start of the engine finds it
    (folder / "packages" / "vllm").mkdir(parents=True)
    (folder / "packages" / "vllm" / "__init__.py").write_text("raise RuntimeError('torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(folder / "packages"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    result = assert_refused("train", "micro", "new", *SMALL, "engine.kind=vllm", beside=folder)
    assert "vllm cannot be imported: RuntimeError: torchvision::nms does not exist" in result.message


def test_model_with_too_few_positions_is_refused(folder):
    home = base(folder, "model.safetensors", "config.json", "generation_config.json")
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=40, n_positions=16)).save_pretrained(home)
    # 12 tokens of prompt and 18 of answer
    assert f"and its response may have 30 tokens; {folder}/base supports 16" in training(folder, "model.path=./base")


def test_prompt_without_known_tokens_is_refused(folder):
    home = base(folder)
    (home / "chat_template.jinja").write_text("{{ '' }}")
    lines = [json.dumps({"prompt": f"{number}+1=", "answer": "1"}) for number in range(30)]
    (folder / "d.jsonl").write_text("\n".join(lines))
    task = ("task.source=file", "task.path=d.jsonl", "task.chat=true", "task.verifier=last_number")
    words = training(folder, "model.path=./base", *task)
    assert "d.jsonl line " in words
    assert "has no tokens: the model's tokenizer has none of its characters" in words


def test_remote_code_of_a_model_is_never_run(folder):
    home = base(folder)
    (home / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit_file(
        home / "config.json", lambda text: text.replace('"qwen3"', '"evil", "auto_map": {"AutoConfig": "evil.Evil"}')
    )
    assert "contains custom code" in training(folder, "model.path=./base")
    assert not (folder / "ran").exists()
