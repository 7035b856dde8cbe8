"""A tiny Qwen3-VL for the shapes task: made on the spot, taught badly on purpose, saved as a Hugging Face folder.

    python recipes/tiny_vl.py tiny-vl
    npo train shapes runs/shapes model.path=tiny-vl

The architecture is transformers' Qwen3-VL, 0.5 M parameters: a vision tower of 2 layers, DeepStack, a language model
of 3. It learns to count shapes from answers of which two in five are random, and which are nearly always
one too low where squares are asked for: what reinforcement learning then finds is a pretrained model's imperfection.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from npo_cli.config.recipe import ModelSettings
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.packing import TokenRow
from npo_cli.tasks.shapes import CELL_PIXELS, QUESTIONS, generate_questions, noisy_count, shapes_prompt

WORDS = (*"0123456789 ?\n", "system", "user", "assistant", "how", "many", *QUESTIONS)
END, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL = (PAD, "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH = 96
PEAK_LR = 2e-3
WARMUP_STEPS = 50
BATCH_ROWS = 64


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, digit or blank, beside Qwen's special tokens; any other word is padding to it."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(WordLevel(vocabulary, unk_token=PAD))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.pre_tokenizer = Split(Regex(r"\d|[^\W\d]+|\W"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=PAD, chat_template=TEMPLATE)


def model(words: PreTrainedTokenizerFast, *, seed: int) -> Qwen3VLForConditionalGeneration:
    """Random weights: a patch is a cell of the shapes task, so an image token is four of them."""
    torch.manual_seed(seed)
    numbers = {token: words.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen3VLConfig(
        text_config=text_config(len(words), pad_id=numbers[PAD], eos_id=numbers[END]),
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": CELL_PIXELS,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=numbers["<|image_pad|>"],
        video_token_id=numbers["<|video_pad|>"],
        vision_start_token_id=numbers["<|vision_start|>"],
        vision_end_token_id=numbers["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    made = Qwen3VLForConditionalGeneration(config)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = numbers[END], numbers[PAD]
    return made


def text_config(num_words: int, *, pad_id: int, eos_id: int) -> dict[str, object]:
    """The language model's part of the configuration."""
    return {
        "vocab_size": num_words,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "pad_token_id": pad_id,
        "eos_token_id": eos_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
        },
    }


def save_untrained(out: Path, *, seed: int) -> None:
    """Model, tokenizer and image processor with random weights."""
    words = tokenizer()
    model(words, seed=seed).save_pretrained(out)
    words.save_pretrained(out)
    sizes = {"shortest_edge": 4 * CELL_PIXELS**2, "longest_edge": 64 * CELL_PIXELS**2}
    Qwen2VLImageProcessorPil(patch_size=CELL_PIXELS, size=sizes).save_pretrained(out)


def generate_training_rows(policy: Policy, *, seed: int) -> Iterator[TokenRow]:
    """Endless pictures, questions and answers, as wrong as they are meant to be."""
    rng = random.Random(f"tiny-vl:{seed}")
    for number, (shapes, question) in enumerate(generate_questions(rng)):
        prompt = shapes_prompt(shapes, question, f"lesson/{number}")
        said = policy.encode_response(str(noisy_count(shapes, question, rng)))
        yield policy.row(prompt, (*said, policy.end_id))


def train_supervised(policy: Policy, *, num_steps: int, seed: int) -> Iterator[float]:
    """Supervised learning of the answers, with a linear warm-up and decay; yields the loss of each step."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0)
    coming = generate_training_rows(policy, seed=seed)
    for step in range(1, num_steps + 1):
        rows = [next(coming) for _ in range(BATCH_ROWS)]
        logps_NT = policy.score(rows, temperature=1.0, chunk_tokens=4096).logps_NT
        loss = -logps_NT.sum() / sum(len(row.response_ids) for row in rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(step / WARMUP_STEPS, 1.0) * (1 - 0.9 * step / num_steps)
        optimizer.step()
        yield loss.item()


def main() -> None:
    """Make it, teach it, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already")
    save_untrained(args.out, seed=args.seed)
    policy = load_policy(ModelSettings(path=str(args.out)))
    for step, loss in enumerate(train_supervised(policy, num_steps=args.steps, seed=args.seed), start=1):
        if step % 100 == 0 or step == args.steps:
            print(f"step {step} of {args.steps}: loss {loss:.3f}", flush=True)
    policy.save(args.out)
    print(f"{args.out}: {sum(tensor.numel() for tensor in policy.model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
