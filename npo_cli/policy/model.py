"""The policy: a Hugging Face causal language model with its tokenizer, and one way to compute log-probabilities."""

import hashlib
import json
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.utils import logging

from npo_cli.config.recipe import ModelSettings
from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError, damaged_checkpoint_hint
from npo_cli.losses.divergence import DivergenceName
from npo_cli.policy.device import choose_device, patch_with_liger
from npo_cli.policy.fsdp import ShardingContext
from npo_cli.policy.gguf import load_packaged, load_packaged_tokenizer
from npo_cli.policy.logprobs import (
    Column,
    Head,
    Teacher,
    TeacherStates,
    TokenScores,
    has_plain_head,
    mixed_precision,
    recompute_activations,
    remove_dropout,
    response_hidden,
    suppress_tokens,
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
from npo_cli.policy.model_folder import MODEL_HINT, find_model, is_packaged, model_load_error
from npo_cli.policy.packing import PackedRows, PackingCosts, TokenRow, pack_rows, packing_costs
from npo_cli.policy.prompt_tokens import PromptTokens
from npo_cli.policy.vision import Vision, choose_model_class, load_vision
from npo_cli.policy.weights_io import (
    check_loaded_weights,
    check_weight_files,
    copy_to_cpu,
    load_weights,
    tensors_digest,
)
from npo_cli.types.rollouts import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Model and tokenizer. Training changes the weights in place; everything else is fixed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plain_head: bool
    """The logits are the LM head's output, so responses can be scored in chunks (see `has_plain_head`)."""
    adapters: AdapterInfo | None
    """The trained LoRA adapters; None for full fine-tuning."""
    compute_dtype: torch.dtype
    """Precision of the forward pass."""
    packing: PackingCosts | None = None
    """What responses in one row with their prompt cost; None where the model cannot share prompts."""
    vision: Vision | None = None
    """Image processing; None for a text-only model."""
    is_base_only: bool = False
    """Score without the adapters."""
    sharding: ShardingContext | None = None
    """How its weights lie in shards over several ranks; None where this rank holds all of them."""
    prompt_tokens: PromptTokens = field(default_factory=PromptTokens, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the generation config's, else the tokenizer's."""
        ids = self.model.generation_config.eos_token_id
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return tuple(ids) if isinstance(ids, list) else (ids,)

    @property
    def pad_id(self) -> int:
        """Padding token; attention never reads it."""
        return self.eos_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    @property
    def tokenizer_digest(self) -> str:
        """sha256 of vocabulary and end tokens: the token ids of a guide cache are valid for one tokenizer only."""
        content = [sorted(self.tokenizer.get_vocab().items()), list(self.eos_ids)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def digest(self) -> str:
        """sha256 of the current weights. All ranks must call it together."""
        tensors = self.tensors
        return current_group().run_on_main(lambda: tensors_digest(tensors), phase="compute the digest")

    @property
    def digest_here(self) -> str:
        """sha256 of this rank's weights while they are whole."""
        return tensors_digest(self.model.state_dict())

    @property
    def num_bytes(self) -> int:
        """Size of the weights that `save` writes."""
        tensors = self.model.state_dict() if self.adapters is None else adapter_tensors(self.model)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every unsharded tensor by its name in the model; for a sharded model on rank 0 only."""
        return self.model.state_dict() if self.sharding is None else self.sharding.gather_weights(self.model, "all")

    @property
    def base_weights(self) -> dict[str, Tensor]:
        """The base weights under their own names, without adapters; for a sharded model on rank 0 only."""
        return base_tensors(self.model) if self.sharding is None else self.sharding.gather_weights(self.model, "base")

    @property
    def adapter_weights(self) -> dict[str, Tensor]:
        """The current adapters under the names in peft's files; for a sharded model on rank 0 only."""
        if self.sharding is None:
            return adapter_tensors(self.model)
        return self.sharding.gather_weights(self.model, "adapters")

    @property
    def base_policy(self) -> "Policy":
        """The frozen base of a policy with adapters: the same model, scored without them."""
        assert self.adapters is not None, "without adapters there is no base"
        return replace(self, is_base_only=True)

    @property
    def num_weight_changes(self) -> int:
        """Number of in-place changes of the weights, counted by torch and `mark_weights_changed`."""
        return sum(tensor._version for tensor in self.model.state_dict(keep_vars=True).values())

    def mark_weights_changed(self) -> None:
        """Call after an update: torch does not count the writes of a fused optimizer."""
        torch.autograd.graph.increment_version(list(self.model.parameters()))

    @property
    def max_tokens(self) -> int | None:
        """Maximum length of prompt and response together that the model supports; None if unknown."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt: plain text unchanged, messages through the chat template, images as image tokens."""
        return self.encode_all([prompt])[0]

    def encode_all(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """The same for several; each prompt goes through the tokenizer once."""
        return self.prompt_tokens.encode(prompts, self._tokenize)

    def _tokenize(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Plain texts go through the tokenizer together, in less than half of the time."""
        if self.vision is not None:
            return [self._tokenize_with_images(prompt) for prompt in prompts]
        if any(prompt.text is None for prompt in prompts):
            return [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        return [tuple(ids) for ids in self.tokenizer([prompt.text for prompt in prompts]).input_ids]

    def _tokenize_with_images(self, prompt: Prompt) -> tuple[int, ...]:
        assert self.vision is not None, "a text-only model has no images"
        text = self.vision.render_prompt(prompt)
        return tuple(self.tokenizer(text, add_special_tokens=prompt.text is not None).input_ids)

    def row(self, prompt: Prompt, response_ids: tuple[int, ...]) -> TokenRow:
        """Prompt and response as input of `score`."""
        return TokenRow(prompt_ids=self.encode(prompt), response_ids=response_ids, images=prompt.images)

    def encode_response(self, text: str) -> tuple[int, ...]:
        """Token ids of a response given as text, without an end token; special tokens in the text are split."""
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    @property
    def end_id(self) -> int:
        """The token to end a re-tokenized response with: the tokenizer's, if it is among `eos_ids`."""
        own = self.tokenizer.eos_token_id
        return own if own in self.eos_ids else self.eos_ids[0]

    def load(self, folder: Path) -> None:
        """Load the weights or adapters of a checkpoint folder, after a check of every tensor."""
        if self.sharding is not None:
            self.sharding.load(self.model, self.adapters, folder)
        elif self.adapters is None:
            load_weights(self.model, folder)
        else:
            load_adapters(self.model, self.adapters, folder)
        self.mark_weights_changed()

    def save(self, folder: Path) -> None:
        """Write a folder in the format of transformers, or with adapters of peft."""
        if self.adapters is not None:
            tensors: dict[str, Tensor] | None = self.adapter_weights
        else:
            tensors = None if self.sharding is None else self.tensors
        current_group().run_on_main(partial(self.write_folder, folder, tensors), phase="save the weights")

    def copy_saved_weights(self) -> dict[str, Tensor]:
        """Copies of what `save` writes, for `write_folder` later; of weights that are not in shards."""
        assert self.sharding is None, "sharded weights are saved by all ranks together"
        return copy_to_cpu(self.tensors if self.adapters is None else self.adapter_weights)

    def write_folder(self, folder: Path, tensors: dict[str, Tensor] | None) -> None:
        """Write the folder with these weights, None: the current ones; safe in a thread while the model trains."""
        if self.adapters is not None:
            assert tensors is not None, "adapters are saved from their own tensors"
            save_adapters(tensors, self.adapters, folder)
            return
        self.model.save_pretrained(folder, state_dict=tensors)
        self.tokenizer.save_pretrained(folder)
        if self.vision is not None:
            self.vision.save(folder)

    def pack(self, rows: Sequence[TokenRow], pack_sizes: Sequence[int] | None) -> PackedRows:
        """The rows as inputs of one forward pass, with their images."""
        packed = pack_rows(
            rows, pad_id=self.pad_id, device=self.device, pack_sizes=pack_sizes, mask_dtype=self.compute_dtype
        )
        return packed if self.vision is None else self.vision.attach_images(packed, rows)

    def compute_hidden(self, packed: PackedRows) -> tuple[Tensor, Head]:
        """Hidden states `(U, H)` at the positions that predict response tokens, and the head from them to logits."""
        states = response_hidden if self.sharding is None else self.sharding.response_hidden
        with mixed_precision(self.model, self.compute_dtype):
            hidden_UH, head = states(self.model, packed, plain_head=self.plain_head)
        return hidden_UH, suppress_tokens(head, packed.suppressed_ids)

    def score(
        self,
        rows: Sequence[TokenRow],
        *,
        temperature: float,
        chunk_tokens: int,
        columns: Collection[Column] = (),
        pack_sizes: Sequence[int] | None = None,
        distillation: "TeacherComparison | None" = None,
    ) -> TokenScores:
        """Log-probabilities of responses, and the requested columns; differentiable if gradients are on.

        `pack_sizes`: how many consecutive rows share their prompt's pass; None: none. `distillation`: adds the
        divergences from its teacher.
        """
        packed = self.pack(rows, pack_sizes)
        teacher = None
        if distillation is not None:
            teacher = distillation.compute_states(rows, pack_sizes, packed, temperature=temperature)
        scores = token_scores if self.sharding is None else self.sharding.token_scores
        without_adapters = disable_adapters(self.model) if self.is_base_only else nullcontext()
        precision = mixed_precision(self.model, self.compute_dtype)
        with recompute_activations(self.model), without_adapters, precision:
            return scores(
                self.model,
                packed,
                temperature=temperature,
                chunk_tokens=chunk_tokens,
                plain_head=self.plain_head,
                columns=columns,
                teacher=teacher,
            )


class TeacherComparison(Protocol):
    """What compares the policy with a teacher."""

    def compute_states(
        self, rows: Sequence[TokenRow], pack_sizes: Sequence[int] | None, packed: PackedRows, *, temperature: float
    ) -> Teacher:
        """The teacher at the positions of the policy's packed rows; `temperature`: the policy's."""


class DistributionModel(Protocol):
    """A model with a distribution at each position."""

    def pack(self, rows: Sequence[TokenRow], pack_sizes: Sequence[int] | None) -> PackedRows:
        """As `Policy.pack`."""

    def compute_hidden(self, packed: PackedRows) -> tuple[Tensor, Head]:
        """As `Policy.compute_hidden`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """A teacher whose distributions are compared with those of the policy that is scored; it gets no gradient."""

    teacher: DistributionModel
    divergence: DivergenceName
    top_k: int | None
    """As in `target.top_k`."""
    temperature: float | None = None
    """Of the teacher's distributions; None: the policy's."""

    @torch.no_grad()
    def compute_states(
        self, rows: Sequence[TokenRow], pack_sizes: Sequence[int] | None, packed: PackedRows, *, temperature: float
    ) -> TeacherStates:
        """One pass of the teacher over the policy's rows, which are `packed`, or over the same responses after prompts
        of its own. Either way position u predicts the same response tokens: prompts are shared by the same rows."""
        if any(row.privileged_ids is not None for row in rows):
            packed = self.teacher.pack([row.as_teacher_reads for row in rows], pack_sizes)
        hidden_UH, head = self.teacher.compute_hidden(packed)
        return TeacherStates(
            hidden_UH=hidden_UH,
            head=head,
            temperature=temperature if self.temperature is None else self.temperature,
            divergence=self.divergence,
            top_k=self.top_k,
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt without images: plain text unchanged, messages through the chat template."""
    if prompt.text is not None:
        return tuple(tokenizer(prompt.text).input_ids)
    turns = [{"role": message.role, "content": message.content} for message in prompt.messages]
    return tuple(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.path`, without the model."""
    if is_packaged(path):
        return load_packaged_tokenizer(path)
    return _load_tokenizer(str(find_model(path)), hint=MODEL_HINT)


def check_prompt_support(policy: Policy, prompts: Sequence[Prompt], path: str) -> None:
    """Raise if the policy cannot read the prompts: images without vision, or messages without a chat template."""
    if policy.vision is None and any(prompt.images for prompt in prompts):
        raise NpoError(
            f"{path} is a text-only model, but prompts have images",
            "choose a vision-language model (model.path), or remove task.image_column",
        )
    if any(prompt.messages for prompt in prompts) and not policy.tokenizer.chat_template:
        raise NpoError(
            f"{path}: the tokenizer has no chat template, but prompts are chat messages",
            "choose an instruct model, or use plain prompts (strings, and task.chat=false)",
        )


def load_policy(settings: ModelSettings, folder: Path | None = None) -> Policy:
    """The recipe's model, or the same architecture with the weights of a checkpoint `folder`.

    Dropout is removed, so that a response is scored under the distribution that sampled it. With LoRA the folder holds
    adapters, and the base is the recipe's model.
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
            f"{settings.path}: neither tokenizer nor generation config has an end token",
            "set eos_token_id in one of them",
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
        packing=packing_costs(model),
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
    hint = MODEL_HINT if folder is None else damaged_checkpoint_hint(folder)
    num_weights = check_weight_files(Path(source)) if folder is None and Path(source).is_dir() else None
    tokenizer = _load_tokenizer(source, hint=hint)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if num_weights is not None:
            check_model_size(config, num_weights, source)
        if settings.attention == "sdpa" and getattr(config.get_text_config(), "attn_logit_softcapping", None):
            # transformers below 5.20 leaves the cap out without a word, later ones refuse
            raise NpoError(f"{source}: sdpa attention cannot cap attention logits", "model.attention=eager")
        model, loading_info = choose_model_class(config).from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,  # never a pickle
            attn_implementation=settings.attention,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except NpoError:
        raise
    except Exception as error:  # a config that builds no model raises many kinds
        raise model_load_error(source, "no causal language model could be loaded", error, hint=hint) from error
    if folder is None:
        check_loaded_weights(
            model, missing=loading_info["missing_keys"], misshapen=loading_info["mismatched_keys"], source=source
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise NpoError(
            f"{source}: the tokenizer has more tokens than the model has embeddings", "use the model's own tokenizer"
        )
    return model, tokenizer


def check_model_size(config: PreTrainedConfig, num_weights: int, source: str) -> None:
    """Raise if the config describes a model of more than twice the weights of its files; no memory is taken."""
    with torch.device("meta"), no_init_weights():
        model = choose_model_class(config).from_config(config, trust_remote_code=False)
    model.tie_weights()
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > 2 * num_weights:
        raise NpoError(
            f"{source}/config.json describes a model of {described:,} weights, but the files have {num_weights:,}",
            "restore config.json from a copy of the model",
        )


def _load_tokenizer(source: str, *, hint: str) -> PreTrainedTokenizerBase:
    """The tokenizer; an empty one is an error, since transformers creates it for a folder without a tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        raise model_load_error(source, "no tokenizer could be loaded", error, hint=hint) from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise NpoError(f"{source}: the folder has no tokenizer", hint)
    return tokenizer
