"""A language model from a PyPI package: SmolLM2-135M-Instruct, from its quantized GGUF file.

transformers dequantizes the file, but does not save such a model, because its config still says that it is quantized.
So the model is built again from the config without that entry.
"""

from contextlib import redirect_stderr
from io import StringIO

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from npo_cli.policy.model_folder import packaged_file


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
    return model, load_packaged_tokenizer(path)


def load_packaged_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a packaged model."""
    file = packaged_file(path)
    with redirect_stderr(StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.init_kwargs.pop("gguf_file", None)
    return tokenizer
