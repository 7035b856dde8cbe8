"""Images: references with location and digest, decoded when they are needed.

The only module that uses Pillow. Decoded images are upright, RGB, 8 bits per channel, on white where transparent. Not
supported: animations, and formats that need an external program.
"""

import hashlib
import warnings
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.errors import NpoError
from npo_cli.types.rollouts import ImageRef

if TYPE_CHECKING:
    from PIL import Image

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
PARQUET_MARKER = ".parquet#"
HIGH_BIT_DEPTH_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow clips these at white instead of scaling them."""
ROW_GROUP_CACHE_SIZE = 2
"""Number of parquet row groups held in memory, with encoded images."""


def require_pillow() -> None:
    """Raise if Pillow is not installed."""
    if find_spec("PIL") is None:
        raise NpoError("prompts with images need pillow, which is not installed", "pip install 'npo-cli[images]'")


def decode_image(data: bytes, *, label: str, max_pixels: int | None = None) -> "Image.Image":
    """The image in these bytes. `label` starts an error; the size is checked before decoding."""
    from PIL import Image, ImageOps

    if not data:
        raise NpoError(f"{label} is empty", "add the image, or remove the row")
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images; the limit here is task.max_image_pixels.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(data), formats=IMAGE_FORMATS)
            _check_usable(image, label=label, max_pixels=max_pixels)
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise NpoError(f"{label} is too large: {error}", "make it smaller, or remove the row") from error
    except Image.UnidentifiedImageError as error:
        raise NpoError(
            f"{label} is not an image in a supported format",
            f"convert it to one of {', '.join(IMAGE_FORMATS)}, or remove the row",
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # raised by Pillow's decoders for damaged data
        raise NpoError(f"{label} is damaged: {error}", "replace it, or remove the row") from error


def _check_usable(image: "Image.Image", *, label: str, max_pixels: int | None) -> None:
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise NpoError(
            f"{label} has {width} x {height} = {width * height:,} pixels; task.max_image_pixels is {max_pixels:,}",
            "make it smaller, raise task.max_image_pixels, or remove the row",
        )
    # MPO, from phones, is a JPEG followed by a second view.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise NpoError(f"{label} has {image.n_frames} frames", "extract one of them as an image")
    if image.mode in HIGH_BIT_DEPTH_MODES:
        raise NpoError(f"{label} has more than 8 bits per channel (mode {image.mode})", "convert it to 8 bits")


def _to_rgb(image: "Image.Image") -> "Image.Image":
    """RGB, on white where transparent."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def make_image_ref(data: bytes, *, location: str, label: str, max_pixels: int, keep_bytes: bool = False) -> ImageRef:
    """A reference to the image in these bytes, from `location`; decodes them once as a check."""
    width, height = decode_image(data, label=label, max_pixels=max_pixels).size
    digest = hashlib.sha256(data).hexdigest()
    return ImageRef(location=location, sha256=digest, width=width, height=height, data=data if keep_bytes else None)


def make_in_memory_image_ref(image: "Image.Image", name: str) -> ImageRef:
    """A reference that holds the image itself, as PPM, whose bytes depend on the pixels only."""
    buffer = BytesIO()
    rgb = _to_rgb(image)
    rgb.save(buffer, format="PPM")
    data = buffer.getvalue()
    return ImageRef(
        location=name,
        sha256=hashlib.sha256(data).hexdigest(),
        width=rgb.width,
        height=rgb.height,
        data=data,
    )


def open_image(ref: ImageRef) -> "Image.Image":
    """The decoded image; an error if its bytes changed since the reference was made."""
    data = load_image_bytes(ref)
    digest = hashlib.sha256(data).hexdigest()
    if digest != ref.sha256:
        raise NpoError(
            f"the image {ref.location} has changed: its sha256 starts with {digest[:12]} instead of {ref.sha256[:12]}",
            "restore the old image, or start a new run",
        )
    return decode_image(data, label=ref.location)


def load_image_bytes(ref: ImageRef) -> bytes:
    """The encoded bytes, from memory, a file, or a parquet cell."""
    if ref.data is not None:
        return ref.data
    file, is_cell, cell = ref.location.rpartition(PARQUET_MARKER)
    if not is_cell:
        return read_file_bytes(Path(ref.location), label=ref.location)
    column, row, number = cell.rsplit("/", 2)
    found = read_parquet_images(f"{file}{PARQUET_MARKER[:-1]}", column, int(row))
    return found[int(number)]


def read_file_bytes(path: Path, *, label: str) -> bytes:
    """A file's bytes."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise NpoError(
            f"{label} cannot be read: {error.strerror or error}", "restore the image, or fix the path"
        ) from error


def read_parquet_images(file: str, column: str, row: int) -> list[bytes]:
    """The images in one cell. A file is read one row group at a time."""
    group, index = _find_row_group(file, row)
    cell = _read_row_group(file, column, group)[index]
    return [item if isinstance(item, bytes) else item["bytes"] for item in (cell if isinstance(cell, list) else [cell])]


@lru_cache(maxsize=64)
def _group_sizes(file: str) -> tuple[int, ...]:
    from pyarrow.parquet import read_metadata

    metadata = read_metadata(file)
    return tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))


def _find_row_group(file: str, row: int) -> tuple[int, int]:
    """The row group, and the row's index in it."""
    for group, size in enumerate(_group_sizes(file)):
        if row < size:
            return group, row
        row -= size
    raise NpoError(f"{file} has no row {row}", "restore the file as it was")


@lru_cache(maxsize=ROW_GROUP_CACHE_SIZE)
def _read_row_group(file: str, column: str, group: int) -> list:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as opened:
        return opened.read_row_group(group, columns=[column]).column(0).to_pylist()
