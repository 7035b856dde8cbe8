"""The policy: a Hugging Face causal LM with its tokenizer, on one device, scored in one way."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from npo_cli.config.recipe import ModelSettings
from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError, damaged_checkpoint_hint
from npo_cli.policy.device import choose_device, mixed_precision, patch_with_liger
from npo_cli.policy.fsdp import ShardingContext
from npo_cli.policy.gguf import GGUF_PACKAGES, is_packaged, load_packaged
from npo_cli.policy.logprobs import (
    TokenRow,
    TokenScores,
    has_plain_head,
    pack_rows,
    recompute_activations,
    remove_dropout,
    token_scores,
)
from npo_cli.policy.lora import (
    AdapterInfo,
    adapter_tensors,
    attach_adapters,
    base_tensors,
    disable_adapters,
    load_adapters,
    save_adapters,
)
from npo_cli.policy.vision import Vision, find_model_class, load_vision
from npo_cli.policy.weights_io import check_loaded_weights, load_weights, tensors_digest
from npo_cli.types.rollouts import Prompt

MICRO_BASE_FOLDER = Path(__file__).parent.parent / "assets" / "micro-base"
BUNDLED_MODELS = ("micro-base", *GGUF_PACKAGES)
MODEL_HINT = "set model.path to a folder or hub id of a causal language model with its weights and tokenizer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Model and tokenizer together; weights change in place, everything else stays."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plain_head: bool
    """Logits are the head's output as it is, so responses can be scored in chunks."""
    adapters: AdapterInfo | None
    """What is trained in place of the weights; None where every weight is."""
    compute_dtype: torch.dtype
    """Of the forward pass."""
    vision: Vision | None = None
    """What it sees with; None where it reads text alone."""
    is_base_only: bool = False
    """Score without the adapters."""
    sharding: ShardingContext | None = None
    """How its weights lie in shards over several ranks; None where this rank holds all of them."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the generation config's, else the tokenizer's."""
        found = self.model.generation_config.eos_token_id
        found = self.tokenizer.eos_token_id if found is None else found
        return tuple(found) if isinstance(found, list) else (found,)

    @property
    def pad_id(self) -> int:
        """A token for padding, which is never attended to."""
        return self.eos_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    @property
    def tokenizer_digest(self) -> str:
        """sha256 of vocabulary and special tokens: guides are token ids, so they belong to one tokenizer."""
        content = [sorted(self.tokenizer.get_vocab().items()), list(self.eos_ids)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def digest(self) -> str:
        """sha256 of the weights as they are now. All ranks call it together."""
        tensors = self.tensors
        return current_group().run_on_main(lambda: tensors_digest(tensors), phase="compute the digest")

    @property
    def digest_here(self) -> str:
        """sha256 of this rank's weights while they are whole."""
        return tensors_digest(self.model.state_dict())

    @property
    def num_bytes(self) -> int:
        """What `save` writes of weights."""
        tensors = self.model.state_dict() if self.adapters is None else adapter_tensors(self.model)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every whole tensor of the model under its name there; of a sharded model on rank 0 alone."""
        return self.model.state_dict() if self.sharding is None else self.sharding.gather_weights(self.model, "all")

    @property
    def base_weights(self) -> dict[str, Tensor]:
        """The base's weights under their own names, adapters left out; of a sharded model on rank 0 alone."""
        return base_tensors(self.model) if self.sharding is None else self.sharding.gather_weights(self.model, "base")

    @property
    def adapter_weights(self) -> dict[str, Tensor]:
        """The adapters as they are now, under the names of peft's files; of a sharded model on rank 0 alone."""
        if self.sharding is None:
            return adapter_tensors(self.model)
        return self.sharding.gather_weights(self.model, "adapters")

    @property
    def base_policy(self) -> "Policy":
        """The frozen base of a policy with adapters: the same model, scored without them."""
        assert self.adapters is not None, "there is no base beside the weights that are trained"
        return replace(self, is_base_only=True)

    @property
    def num_weight_changes(self) -> int:
        """How often weights were written to: torch counts writes in place, `mark_written` those that it misses."""
        return sum(tensor._version for tensor in self.model.state_dict(keep_vars=True).values())

    def mark_weights_changed(self) -> None:
        """After an update: a fused optimiser writes past torch's counter."""
        torch.autograd.graph.increment_version(list(self.model.parameters()))

    @property
    def max_tokens(self) -> int | None:
        """Prompt and response together: positions beyond this are strange to the model, or crash it."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt: plain text as it is, messages through the chat template, pictures as image tokens."""
        if self.vision is not None:
            special = prompt.text is not None
            return tuple(self.tokenizer(self.vision.render_prompt(prompt), add_special_tokens=special).input_ids)
        if prompt.text is not None:
            return tuple(self.tokenizer(prompt.text).input_ids)
        turns = [{"role": message.role, "content": message.content} for message in prompt.messages]
        return tuple(
            self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        )

    def row(self, prompt: Prompt, response_ids: tuple[int, ...]) -> TokenRow:
        """A response to a prompt, ready to be scored."""
        return TokenRow(prompt_ids=self.encode(prompt), response_ids=response_ids, images=prompt.images)

    def encode_response(self, text: str) -> tuple[int, ...]:
        """Token ids of a response that somebody else wrote, without an end token: no text can name one."""
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    @property
    def end_id(self) -> int:
        """The token that a response is ended with: the tokenizer's own where it is one of those that end it."""
        own = self.tokenizer.eos_token_id
        return own if own in self.eos_ids else self.eos_ids[0]

    def load(self, folder: Path) -> None:
        """Swap in the weights or the adapters of a checkpoint folder, checked tensor by tensor."""
        if self.sharding is not None:
            self.sharding.load(self.model, self.adapters, folder)
        elif self.adapters is None:
            load_weights(self.model, folder)
        else:
            load_adapters(self.model, self.adapters, folder)
        self.mark_weights_changed()

    def save(self, folder: Path) -> None:
        """Write a folder that `from_pretrained` opens as it is: transformers', or with adapters peft's."""
        if self.adapters is not None:
            tensors: dict[str, Tensor] | None = self.adapter_weights
        else:
            tensors = None if self.sharding is None else self.tensors
        current_group().run_on_main(partial(self._write, folder, tensors), phase="save the weights")

    def _write(self, folder: Path, tensors: dict[str, Tensor] | None) -> None:
        if self.adapters is not None:
            assert tensors is not None, "adapters are saved from their own tensors"
            save_adapters(tensors, self.adapters, folder)
            return
        self.model.save_pretrained(folder, state_dict=tensors)
        self.tokenizer.save_pretrained(folder)
        if self.vision is not None:
            self.vision.save(folder)

    def score(self, rows: Sequence[TokenRow], *, temperature: float, chunk_tokens: int) -> TokenScores:
        """Score responses; differentiable where gradients are on."""
        packed = pack_rows(rows, pad_id=self.pad_id, device=self.device)
        packed = packed if self.vision is None else self.vision.attach_images(packed, rows)
        scores = token_scores if self.sharding is None else self.sharding.token_scores
        bare = disable_adapters(self.model) if self.is_base_only else nullcontext()
        with recompute_activations(self.model), bare, mixed_precision(self.model, self.compute_dtype):
            return scores(
                self.model, packed, temperature=temperature, chunk_tokens=chunk_tokens, plain_head=self.plain_head
            )


def load_policy(settings: ModelSettings, folder: Path | None = None) -> Policy:
    """The recipe's model, or the same architecture with the weights of a checkpoint `folder`.

    Dropout is off for good: a response is scored by the distribution that sampled it. With LoRA the folder holds
    adapters, and the base is the recipe's.
    """
    with_lora = settings.lora.rank is not None
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, tokenizer = _load_parts(settings, None if with_lora else folder)
    vision = load_vision(model, tokenizer)
    if tokenizer.eos_token_id is None and model.generation_config.eos_token_id is None:
        raise NpoError(
            f"{settings.path}: neither tokenizer nor generation config names an end token", "set eos_token_id there"
        )
    remove_dropout(model)
    adapters = attach_adapters(model, settings.lora, path=settings.path) if with_lora else None
    model = model.to(device).eval()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.liger:
        patch_with_liger(model)
    policy = Policy(
        model=model,
        tokenizer=tokenizer,
        plain_head=has_plain_head(model),
        adapters=adapters,
        compute_dtype=getattr(torch, settings.precision),
        vision=vision,
    )
    if with_lora and folder is not None:
        policy.load(folder)
    return policy


def _load_parts(settings: ModelSettings, folder: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    dtype = getattr(torch, settings.dtype)
    if folder is None and is_packaged(settings.path):
        return load_packaged(settings.path, dtype=dtype, attention=settings.attention)
    source = str(folder or find_model(settings.path))
    mend = MODEL_HINT if folder is None else damaged_checkpoint_hint(folder)
    tokenizer = _load_tokenizer(source, mend=mend)
    try:
        model, found = find_model_class(source).from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=settings.attention,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise NpoError(f"{source}: no causal language model could be loaded: {_first_line(error)}", mend) from error
    if folder is None:
        check_loaded_weights(model, missing=found["missing_keys"], misshapen=found["mismatched_keys"], source=source)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise NpoError(
            f"{source}: the tokenizer has more tokens than the model has embeddings", "use the model's own tokenizer"
        )
    return model, tokenizer


def find_model(path: str) -> str | Path:
    """The folder that `model.path` means, or the hub id it is; a slip is told before the hub is asked."""
    if path == "micro-base":
        return MICRO_BASE_FOLDER
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    if not path or path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists():
        raise NpoError(
            f"model.path={path} is not a folder", f"name a model folder, a hub id, or {' or '.join(BUNDLED_MODELS)}"
        )
    near = get_close_matches(path.lower(), BUNDLED_MODELS, n=1, cutoff=0.8)
    if near:
        raise NpoError(f"model.path={path} is neither a folder nor a model that npo knows", f"set model.path={near[0]}")
    return path


def _load_tokenizer(source: str, *, mend: str) -> PreTrainedTokenizerBase:
    """transformers makes up an empty tokenizer where a folder has none: one that knows no token of its own is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        raise NpoError(f"{source}: no tokenizer could be loaded: {_first_line(error)}", mend) from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise NpoError(f"{source}: no tokenizer could be loaded: the folder has none", mend)
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
