"""The pictures of a data file's rows: every one opened once before training, then kept by reference and digest.

A cell holds one picture or a list: a path beside the data file, bytes, or Hugging Face's `{"bytes": ..., "path": ...}`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from npo_cli.errors import NpoError
from npo_cli.images import make_image_ref, read_file_bytes, require_pillow
from npo_cli.tasks.table_io import TableRow, read_parquet_column
from npo_cli.types.rollouts import IMAGE_PLACEHOLDER, ImageRef, Prompt

IMAGE_HINT = 'write a path, or bytes (parquet), or {"bytes": ..., "path": ...}; several in a list'


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageColumn:
    """Where a data file's pictures are, and how large they may be."""

    file: Path
    column: str
    max_pixels: int

    def read_images(self, rows: Sequence[TableRow]) -> Iterator[tuple[ImageRef, ...]]:
        """The pictures of each row, in order. The bytes of a parquet file are looked at a few rows at a time."""
        require_pillow()
        if self.file.suffix == ".parquet":
            cells = read_parquet_column(self.file, self.column)
        else:
            cells = (row.values.get(self.column) for row in rows)
        for row, cell in zip(rows, cells, strict=True):
            if self.column not in row.values:
                raise NpoError(
                    f"{row.location} has no column {self.column!r} (task.image_column)",
                    f"set task.image_column to one of: {', '.join(map(str, row.values)) or '(it has none)'}; "
                    "a row without pictures holds an empty list",
                )
            yield self._refs(cell, row)

    def _refs(self, cell: Any, row: TableRow) -> tuple[ImageRef, ...]:
        items = [] if cell is None else cell if isinstance(cell, list) else [cell]
        return tuple(self._ref(item, row, number) for number, item in enumerate(items))

    def _ref(self, item: Any, row: TableRow, number: int) -> ImageRef:
        what = f"{row.location}, image {number + 1}"
        data, path = (item.get("bytes"), item.get("path")) if isinstance(item, dict) else (None, None)
        data, path = (item, None) if isinstance(item, bytes) else (data, item if isinstance(item, str) else path)
        if isinstance(data, bytes):
            place = f"{self.file.absolute()}#{self.column}/{row.position}/{number}"
            return make_image_ref(data, location=place, label=what, max_pixels=self.max_pixels)
        if data is not None or not isinstance(path, str) or not path:
            raise NpoError(f"{what} is neither a path nor bytes", IMAGE_HINT)
        if "://" in path or path.startswith("data:"):
            raise NpoError(
                f"{what} is an address ({path[:60]}): nothing is fetched", "bring the file, and name its path"
            )
        found = self.file.absolute().parent / Path(path).expanduser()
        what = f"{what} ({path})"
        return make_image_ref(
            read_file_bytes(found, label=what), location=str(found), label=what, max_pixels=self.max_pixels
        )


def join_parts(parts: Sequence[Any], place: str) -> str:
    """A message's parts as one text, with a mark where a picture stands."""
    return "".join(_part(part, f"{place}, part {number}") for number, part in enumerate(parts, start=1))


def _part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        own = [key for key in ("image", "url", "path", "base64") if part.get(key) is not None]
        if own:
            raise NpoError(f"{place} brings its own picture ({own[0]})", "put it into the column of task.image_column")
        return IMAGE_PLACEHOLDER
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise NpoError(
            f"{place} is neither text nor an image", 'write {"type": "text", "text": ...} or {"type": "image"}'
        )
    if IMAGE_PLACEHOLDER in text:
        raise NpoError(f"{place} spells {IMAGE_PLACEHOLDER} in a text", "write the picture as a part of its own")
    return text


def add_images(prompt: Prompt, images: tuple[ImageRef, ...], place: str) -> Prompt:
    """The prompt with its pictures, one for each mark."""
    texts = [prompt.text or "", *(message.content for message in prompt.messages)]
    num_marks = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if num_marks != len(images):
        raise NpoError(
            f"{place} has {len(images)} image{'s' * (len(images) != 1)} and {num_marks} {IMAGE_PLACEHOLDER} "
            f"mark{'s' * (num_marks != 1)}",
            f'write {IMAGE_PLACEHOLDER} once for each image, or a part {{"type": "image"}} in the message',
        )
    return replace(prompt, images=images)


def drop_image_locations(images: Sequence[ImageRef]) -> tuple[ImageRef, ...]:
    """The same pictures without the places where they are: equal for equal bytes."""
    return tuple(replace(ref, location="") for ref in images)
