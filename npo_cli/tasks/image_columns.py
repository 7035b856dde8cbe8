"""The image column of a data file: each image is decoded once before training, and referenced by location and digest.

A cell holds one image or a list: a path relative to the data file, bytes, or Hugging Face's
`{"bytes": ..., "path": ...}`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.images import make_image_ref, read_file_bytes, require_pillow
from npo_cli.tasks.data_sets import DataPart
from npo_cli.tasks.table_io import TableRow, read_parquet_column
from npo_cli.types.rollouts import IMAGE_PLACEHOLDER, ImageRef, Prompt

IMAGE_HINT = 'write a path, or bytes (parquet), or {"bytes": ..., "path": ...}; several in a list'


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageColumn:
    """The column with images, and their maximum size."""

    file: Path
    column: str
    max_pixels: int

    @classmethod
    def open(cls, part: DataPart, settings: TaskSettings) -> "ImageColumn":
        """The column that task.image_column names; Pillow is there."""
        assert settings.image_column is not None
        require_pillow()
        return cls(file=part.file, column=settings.image_column, max_pixels=settings.max_image_pixels)

    def read_cells(self, rows: Sequence[TableRow]) -> Iterator[Any]:
        """The cell of each row, in order; a parquet file is read a few rows at a time."""
        if self.file.suffix == ".parquet":
            return read_parquet_column(self.file, self.column)
        return (row.values.get(self.column) for row in rows)

    def read_images(self, cell: Any, row: TableRow) -> tuple[ImageRef, ...]:
        """The images of a cell, each decoded once as a check."""
        if self.column not in row.values:
            raise NpoError(
                f"{row.location} has no column {self.column!r} (task.image_column)",
                f"set task.image_column to one of: {', '.join(map(str, row.values)) or '(it has none)'}; "
                "a row without images holds an empty list",
            )
        items = [] if cell is None else cell if isinstance(cell, list) else [cell]
        return tuple(self._ref(item, row, number) for number, item in enumerate(items))

    def _ref(self, item: Any, row: TableRow, number: int) -> ImageRef:
        label = f"{row.location}, image {number + 1}"
        data, path = (item.get("bytes"), item.get("path")) if isinstance(item, dict) else (None, None)
        data, path = (item, None) if isinstance(item, bytes) else (data, item if isinstance(item, str) else path)
        if isinstance(data, bytes):
            location = f"{self.file.absolute()}#{self.column}/{row.position}/{number}"
            return make_image_ref(data, location=location, label=label, max_pixels=self.max_pixels)
        if data is not None or not isinstance(path, str) or not path:
            raise NpoError(f"{label} is neither a path nor bytes", IMAGE_HINT)
        if "://" in path or path.startswith("data:"):
            raise NpoError(
                f"{label} is a URL ({path[:60]}), which is not downloaded", "download it, and write its path"
            )
        found = self.file.absolute().parent / Path(path).expanduser()
        label = f"{label} ({path})"
        data = read_file_bytes(found, label=label)
        return make_image_ref(data, location=str(found), label=label, max_pixels=self.max_pixels)


def join_parts(parts: Sequence[Any], location: str) -> str:
    """The parts of a message as one text, with a placeholder for each image."""
    return "".join(_part(part, f"{location}, part {number}") for number, part in enumerate(parts, start=1))


def _part(part: Any, location: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        own = [key for key in ("image", "url", "path", "base64") if part.get(key) is not None]
        if own:
            raise NpoError(f"{location} contains an image ({own[0]})", "move it to the column of task.image_column")
        return IMAGE_PLACEHOLDER
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise NpoError(
            f"{location} is neither text nor an image", 'write {"type": "text", "text": ...} or {"type": "image"}'
        )
    if IMAGE_PLACEHOLDER in text:
        raise NpoError(f"{location} has {IMAGE_PLACEHOLDER} in a text", "write the image as a separate part")
    return text


def add_images(prompt: Prompt, images: tuple[ImageRef, ...], location: str) -> Prompt:
    """The prompt with its images, one per placeholder."""
    texts = [prompt.text or "", *(message.content for message in prompt.messages)]
    num_placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if num_placeholders != len(images):
        raise NpoError(
            f"{location} has {len(images)} images, but {num_placeholders} placeholders {IMAGE_PLACEHOLDER}",
            f'write {IMAGE_PLACEHOLDER} once for each image, or a part {{"type": "image"}} in the message',
        )
    return replace(prompt, images=images)


def drop_image_locations(images: Sequence[ImageRef]) -> tuple[ImageRef, ...]:
    """References without locations: equal for equal image bytes."""
    return tuple(replace(ref, location="") for ref in images)
