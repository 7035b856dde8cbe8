"""Train the base model of the micro tasks (`npo_cli/assets/micro-base`) again.

    python recipes/make_micro_base.py my-base
    npo train micro model.path=my-base

A Qwen3 of 0.28 M parameters with one token per character, trained on noisy scratchpads: it knows the format of a
response and is right only sometimes, as a policy has to be before reinforcement learning.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from npo_cli.storage.layout import check_unused
from npo_cli.tasks.micro import ALPHABET, FILL, Noise, additions, format_addition, misconceptions, noisy_response

PEAK_LR = 2e-3
WARMUP_STEPS = 20
FINAL_LR_FRACTION = 0.1
BATCH_ROWS = 128
NUM_SAMPLES = 20_000
END = "</s>"


def build_tokenizer(alphabet: str, fill: str) -> PreTrainedTokenizerFast:
    """One token per character, then the end token, then `fill`, which also pads."""
    vocabulary = {char: index for index, char in enumerate([*alphabet, END, fill])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=fill))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=fill)


def build_model(vocabulary_size: int, *, eos_id: int, pad_id: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 with 3 layers of width 96, tied head: 278,976 parameters at 17 tokens."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary_size,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=32,
            tie_word_embeddings=True,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
        )
    )


def pad_batch(rows: Sequence[list[int]], *, prompt_tokens: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets; the loss counts response tokens only (target -100 elsewhere)."""
    width = max(len(row) for row in rows)
    inputs_NL = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    targets_NL = inputs_NL.clone()
    targets_NL[:, :prompt_tokens] = -100
    for index, row in enumerate(rows):
        targets_NL[index, len(row) :] = -100
    return inputs_NL, targets_NL


def lr_factor(step: int, num_steps: int) -> float:
    """Linear warm-up, then linear decay to a tenth."""
    return min(1.0, step / WARMUP_STEPS) * (1 - (1 - FINAL_LR_FRACTION) * step / num_steps)


def pretrain(
    texts: Sequence[tuple[str, str]], *, alphabet: str, fill: str, num_steps: int, seed: int, out: Path
) -> Iterator[tuple[int, float]]:
    """Train on (prompt, response) pairs whose prompts are equally long; yields (step, loss); saves into `out`."""
    tokenizer = build_tokenizer(alphabet, fill)
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = build_model(len(tokenizer), eos_id=eos_id, pad_id=pad_id, seed=seed)
    rows = [[*tokenizer(prompt + response).input_ids, eos_id] for prompt, response in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0)
    rng = random.Random(seed)
    for step in range(1, num_steps + 1):
        batch = rng.sample(rows, BATCH_ROWS)
        inputs_NL, targets_NL = pad_batch(batch, prompt_tokens=len(texts[0][0]), pad_id=pad_id)
        logits_NLV = model(inputs_NL[:, :-1]).logits
        loss = cross_entropy(logits_NLV.flatten(0, 1), targets_NL[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * lr_factor(step, num_steps)
        optimizer.step()
        yield step, loss.item()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def sample_texts(*, seed: int) -> list[tuple[str, str]]:
    """Additions of every kind with noisy responses."""
    wrong, rng = misconceptions(), random.Random(f"base:{seed}")
    texts = []
    for (a, b, length), _ in zip(additions("any", rng), range(NUM_SAMPLES), strict=False):
        response = noisy_response(a, b, length, noise=Noise(), wrong=wrong, rng=rng)
        texts.append((format_addition(a, b, length), response))
    return texts


def main() -> None:
    """Train and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="new folder for the model")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps (default: 1200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of samples and weights (default: 0)")
    args = parser.parse_args()
    check_unused(args.out, flag="OUT")
    for step, loss in pretrain(
        sample_texts(seed=args.seed), alphabet=ALPHABET, fill=FILL, num_steps=args.steps, seed=args.seed, out=args.out
    ):
        if step % 100 == 0 or step == args.steps:
            print(f"step {step}/{args.steps}  loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
