"""`npo base`: make the embedded micro base again."""

import random
from collections.abc import Iterator
from pathlib import Path

from npo_cli.policy.pretrain import pretrain
from npo_cli.records import Notice, Progress
from npo_cli.run_dir.paths import check_unused
from npo_cli.tasks.micro import ALPHABET, FILL, Noise, additions, misconceptions, noisy_response, format_addition

NUM_SAMPLES = 20_000


def make_base(out: Path, *, steps: int, seed: int) -> Iterator[Progress | Notice]:
    """Supervised training on noisy scratchpads; the result is a Hugging Face folder."""
    check_unused(out, flag="--out")
    wrong, rng = misconceptions(), random.Random(f"base:{seed}")
    texts = []
    for (a, b, length), _ in zip(additions("any", rng), range(NUM_SAMPLES), strict=False):
        texts.append((format_addition(a, b, length), noisy_response(a, b, length, noise=Noise(), wrong=wrong, rng=rng)))
    for step, loss in pretrain(texts, alphabet=ALPHABET, fill=FILL, num_steps=steps, seed=seed, out=out):
        yield Progress(description="supervised base", done=step, total=steps, note=f"loss {loss:.3f}")
    yield Notice(message=f"the base is in {out}; use it with model.path={out}")
