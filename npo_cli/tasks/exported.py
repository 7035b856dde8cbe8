"""Verified answers as a parquet table for other trainers: the columns that TRL and verl read, and npo's own beside.

TRL reads `prompt` and `completion` (text, or chat messages where the prompt is a chat); verl reads `prompt` (always
messages), `data_source`, `ability`, `reward_model` and `extra_info`. Both read `images` (bytes, in Hugging
Face's form), which is there where prompts have any. Neither minds columns of others. `prompt_id`, `response`,
`response_ids` and `logps` are what `npo sample-guide --source file` reads back.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from npo_cli.errors import NpoError, quote_path
from npo_cli.guide_records import GuideRollout
from npo_cli.images import load_image_bytes
from npo_cli.records import Prompt

TableFormat = Literal["trl", "verl"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedResponse:
    """A prompt and one answer to it."""

    prompt: Prompt
    trajectory: GuideRollout
    data_source: str
    """Name of the data, by which verl chooses its reward function."""


def validate_table_path(path: Path) -> None:
    """A file that exists is never replaced, and its ending says what it is."""
    if path.suffix != ".parquet":
        raise NpoError(f"--out {path}: a table ends in .parquet", f"--out {quote_path(path)}.parquet")
    if path.exists():
        raise NpoError(f"--out {path} exists", "name another file, or remove that one")
    if not path.absolute().parent.is_dir():
        raise NpoError(f"--out {path}: there is no folder {path.parent}", f"mkdir -p {quote_path(path.parent)}")


def write_table(path: Path, answers: Sequence[ExportedResponse], *, table_format: TableFormat) -> bool:
    """Write the table whole. True where prompts that are plain text had to become chats."""
    validate_table_path(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise NpoError(
            f"writing {path} needs the package pyarrow, which is not installed", "pip install pyarrow"
        ) from error
    chats = table_format == "verl" or any(each.prompt.messages for each in answers)
    shown = any(each.prompt.images for each in answers)
    rows = [_row(each, number, chats=chats) for number, each in enumerate(answers)]
    turns = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    words = turns if chats else pyarrow.string()
    text, number = pyarrow.string(), pyarrow.int64()
    schema = pyarrow.schema(
        [
            *(("prompt", words), ("completion", words), ("reward", pyarrow.float32())),
            *(("data_source", text), ("ability", text)),
            ("reward_model", pyarrow.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", pyarrow.struct([("split", text), ("index", number), ("prompt_id", text)])),
            *(("prompt_id", text), ("answer", text), ("response", text)),
            *(("response_ids", pyarrow.list_(number)), ("logps", pyarrow.list_(pyarrow.float32()))),
            *(("verdict", text), ("source", text), ("guide_step", number), ("finished", pyarrow.bool_())),
            *(("num_sampled", number), ("num_correct", number)),
            *(
                [("images", pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])))]
                if shown
                else []
            ),
        ]
    )
    hidden = path.with_name(f".{path.name}.tmp")
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), hidden)
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)
    return chats and any(each.prompt.text is not None for each in answers)


def _row(each: ExportedResponse, number: int, *, chats: bool) -> dict[str, Any]:
    prompt, kept = each.prompt, each.trajectory
    said = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    asked = said or [{"role": "user", "content": prompt.text}]
    return {
        "prompt": asked if chats else prompt.text,
        "completion": [{"role": "assistant", "content": kept.text}] if chats else kept.text,
        "reward": float(kept.verdict == "correct"),
        "data_source": prompt.dataset or each.data_source,
        "ability": each.data_source,
        "reward_model": {"style": "rule", "ground_truth": prompt.answer},
        "extra_info": {"split": "train", "index": number, "prompt_id": prompt.prompt_id},
        "prompt_id": prompt.prompt_id,
        "answer": prompt.answer,
        "response": kept.text,
        "response_ids": list(kept.response_ids),
        "logps": None if kept.behavior_logps is None else list(kept.behavior_logps),
        "verdict": kept.verdict,
        "source": kept.source,
        "guide_step": kept.guide_step,
        "finished": kept.finished,
        "num_sampled": kept.num_sampled,
        "num_correct": kept.num_correct,
        "images": [{"bytes": load_image_bytes(image), "path": Path(image.location).name} for image in prompt.images],
    }
