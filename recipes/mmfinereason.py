"""The shards of MMFineReason-123K as the two files that `qwen3-vl-8b-mmfinereason` trains and is evaluated on.

    python recipes/mmfinereason.py SHARDS mmfinereason --model Qwen/Qwen3-VL-8B-Instruct

SHARDS is a folder of .parquet files with the columns question, answer and image ({bytes, path}). They are read in the
order of their names, a few rows at a time. Left out, and counted: rows that the recipe would refuse, and repeated
ones. A picture of more than --max-pixels is made smaller. Which rows are held out depends on what they hold alone.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from npo_cli.config.recipe import TaskSettings
from npo_cli.tasks.math_verify import MathVerifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "<image>"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ]
)
ROWS_AT_A_TIME = 64
PIXELS_PER_TOKEN = 32 * 32
"""Patches of 16 x 16, of which 2 x 2 become one token."""
LEAST_TOKENS = 64
"""Qwen3-VL's processor makes smaller pictures larger."""
TEMPLATE_TOKENS = 64
"""Room for the chat template and the recipe's task.suffix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionRules:
    """What a row must be to be taken."""

    tokenizer: "PreTrainedTokenizerBase"
    grader: MathVerifier
    max_tokens: int
    max_pixels: int
    heldout_one_in: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectedRow:
    """A row that is written."""

    row: dict[str, object]
    digest: str


def shard_rows(folder: Path) -> Iterator[list[dict[str, object]]]:
    """Rows of all shards, a few at a time, each with an id that says where it came from."""
    for shard in sorted(folder.glob("*.parquet")):
        number = 0
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=["question", "answer", "image"]):
                rows = batch.to_pylist()
                yield [row | {"id": f"{shard.stem}/{number + place:06d}"} for place, row in enumerate(rows)]
                number += len(rows)


def select_row(row: dict[str, object], wanted: SelectionRules) -> SelectedRow | str:
    """The row as it is written, or why it is left out. Its answer is looked at elsewhere, in company."""
    question, picture = str(row["question"] or "").strip(), (row["image"] or {}).get("bytes")
    if not question or not str(row["answer"] or "").strip():
        return "no question or no answer"
    if not picture:
        return "no picture"
    if question.count(MARK) > 1:
        return "several pictures"
    question = question if MARK in question else f"{MARK}\n{question}"
    try:
        picture, num_image_tokens = fit_image(picture, wanted.max_pixels)
    except (OSError, Image.DecompressionBombError):
        return "a picture that cannot be read"
    if len(wanted.tokenizer(question).input_ids) + num_image_tokens + TEMPLATE_TOKENS > wanted.max_tokens:
        return "a prompt that is too long"
    digest = hashlib.sha256(question.encode() + picture).hexdigest()
    return SelectedRow(row=row | {"question": question, "image": {"bytes": picture, "path": None}}, digest=digest)


def fit_image(picture: bytes, max_pixels: int) -> tuple[bytes, int]:
    """The picture, made smaller where it is too large, and the most tokens that it becomes."""
    opened = Image.open(BytesIO(picture))
    opened.load()
    width, height = opened.size
    if width * height > max_pixels:
        scale = sqrt(max_pixels / (width * height))
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
        kind = opened.format if opened.format in ("JPEG", "PNG", "WEBP") else "PNG"
        buffer = BytesIO()
        opened.resize((width, height), Image.Resampling.LANCZOS).save(buffer, format=kind)
        picture = buffer.getvalue()
    side = int(sqrt(PIXELS_PER_TOKEN))
    return picture, max(LEAST_TOKENS, ceil(width / side) * ceil(height / side))


def drop_unreadable_answers(
    taken: Sequence[SelectedRow], wanted: SelectionRules, left_out: Counter[str]
) -> list[SelectedRow]:
    """Those whose reference answer math_verify can compare."""
    readable = wanted.grader.are_readable([str(each.row["answer"]) for each in taken])
    left_out["an answer that math_verify cannot read"] += readable.count(False)
    return [each for each, is_read in zip(taken, readable, strict=True) if is_read]


def prepare(shards: Path, out: Path, wanted: SelectionRules) -> Counter[str]:
    """Write OUT/train.parquet and OUT/heldout.parquet; how many rows went where."""
    out.mkdir(parents=True)
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(pq.ParquetWriter(out / f"{name}.parquet", SCHEMA))
            for name in ("train", "heldout")
        }
        for rows in shard_rows(shards):
            found = [select_row(row, wanted) for row in rows]
            counts.update(each for each in found if isinstance(each, str))
            parts: dict[str, list[dict[str, object]]] = {name: [] for name in writers}
            for each in drop_unreadable_answers(
                [each for each in found if isinstance(each, SelectedRow)], wanted, counts
            ):
                if each.digest in seen:
                    counts["a repeated row"] += 1
                    continue
                seen.add(each.digest)
                parts["heldout" if int(each.digest, 16) % wanted.heldout_one_in == 0 else "train"].append(each.row)
            for name, some in parts.items():
                counts[name] += len(some)
                writers[name].write_table(pa.Table.from_pylist(some, schema=SCHEMA))
    return counts


def main() -> None:
    """Two files and a count of what was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--model", required=True, help="whose tokenizer counts the tokens of a question")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a prompt; the recipe's task.max_prompt_tokens")
    parser.add_argument("--max-pixels", type=int, default=1024 * 1024, help="of a picture")
    parser.add_argument("--heldout-one-in", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4, help="processes that read answers")
    args = parser.parse_args()
    if not any(args.shards.glob("*.parquet")):
        sys.exit(f"{args.shards} holds no .parquet file")
    if args.out.exists():
        sys.exit(f"{args.out} exists already: name a new folder")
    # Inside, because each process that reads answers imports this file again.
    from transformers import AutoTokenizer

    grader = MathVerifier.open(TaskSettings(verify_workers=args.workers))
    wanted = SelectionRules(
        tokenizer=AutoTokenizer.from_pretrained(args.model),
        grader=grader,
        max_tokens=args.max_tokens,
        max_pixels=args.max_pixels,
        heldout_one_in=args.heldout_one_in,
    )
    try:
        counts = prepare(args.shards, args.out, wanted)
    finally:
        grader.close()
    for what, number in sorted(counts.items()):
        if number:
            print(f"{number:8,} {what}")


if __name__ == "__main__":
    main()
