"""Pictures: found by reference, known by the digest of their bytes, decoded when somebody looks at them.

The only file that knows Pillow. What is decoded is upright, RGB and 8 bits a colour; what is transparent shows white.
Left out: animations, and formats that need a program of their own.
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
"""Pillow cuts these off at white instead of scaling them."""
ROW_GROUP_CACHE_SIZE = 2
"""Of parquet files, whose pictures are held encoded."""


def require_pillow() -> None:
    """Say what is missing before the first picture is looked for."""
    if find_spec("PIL") is None:
        raise NpoError("prompts with images need pillow, which is not installed", "pip install 'npo-cli[images]'")


def decode_image(data: bytes, *, label: str, max_pixels: int | None = None) -> "Image.Image":
    """The picture in these bytes. `what` begins an error; the size is checked before anything is decoded."""
    from PIL import Image, ImageOps

    if not data:
        raise NpoError(f"{label} is empty", "bring the picture, or remove the row")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures in its own way; the limit here is the recipe's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(BytesIO(data), formats=IMAGE_FORMATS)
            _refuse_unusable(picture, what=label, max_pixels=max_pixels)
            return _rgb(ImageOps.exif_transpose(picture))
    except Image.DecompressionBombError as error:
        raise NpoError(f"{label} is enormous: {error}", "make it smaller, or remove the row") from error
    except Image.UnidentifiedImageError as error:
        raise NpoError(
            f"{label} is no picture that can be read",
            f"write it as one of {', '.join(IMAGE_FORMATS)}, or remove the row",
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on damaged bytes
        raise NpoError(f"{label} is damaged: {error}", "write it again, or remove the row") from error


def _refuse_unusable(picture: "Image.Image", *, what: str, max_pixels: int | None) -> None:
    width, height = picture.size
    if max_pixels is not None and width * height > max_pixels:
        raise NpoError(
            f"{what} has {width} x {height} = {width * height:,} pixels; task.max_image_pixels is {max_pixels:,}",
            "make it smaller, raise task.max_image_pixels, or remove the row",
        )
    # A telephone's MPO is a JPEG with a second view behind it.
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        raise NpoError(f"{what} has {picture.n_frames} frames", "write one of them as a picture of its own")
    if picture.mode in HIGH_BIT_DEPTH_MODES:
        raise NpoError(f"{what} has more than 8 bits a colour (mode {picture.mode})", "write it with 8 bits")


def _rgb(picture: "Image.Image") -> "Image.Image":
    """Colours alone, on white."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    clear = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def make_image_ref(data: bytes, *, location: str, label: str, max_pixels: int, keep_bytes: bool = False) -> ImageRef:
    """A reference to these bytes, which were found at `place`, once they were decoded; `keep` holds them in memory."""
    width, height = decode_image(data, label=label, max_pixels=max_pixels).size
    digest = hashlib.sha256(data).hexdigest()
    return ImageRef(location=location, sha256=digest, width=width, height=height, data=data if keep_bytes else None)


def make_in_memory_image_ref(picture: "Image.Image", name: str) -> ImageRef:
    """A picture that is in no file. It is held as PPM, whose bytes depend on nothing but its pixels."""
    buffer = BytesIO()
    upright = _rgb(picture)
    upright.save(buffer, format="PPM")
    data = buffer.getvalue()
    return ImageRef(
        location=name,
        sha256=hashlib.sha256(data).hexdigest(),
        width=upright.width,
        height=upright.height,
        data=data,
    )


def open_image(ref: ImageRef) -> "Image.Image":
    """The picture itself, if it is still the one that was referred to."""
    data = load_image_bytes(ref)
    digest = hashlib.sha256(data).hexdigest()
    if digest != ref.sha256:
        raise NpoError(
            f"{ref.location} is not the picture that it was: its sha256 begins with {digest[:12]}, not {ref.sha256[:12]}",  # noqa: E501
            "bring the old one back, or start a new run with the new one",
        )
    return decode_image(data, label=ref.location)


def load_image_bytes(ref: ImageRef) -> bytes:
    """The encoded bytes, wherever they are."""
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
            f"{label} cannot be read: {error.strerror or error}", "bring the picture back, or mend the path"
        ) from error


def read_parquet_images(file: str, column: str, row: int) -> list[bytes]:
    """The pictures in one cell. A file is read a row group at a time."""
    group, place = _group_of(file, row)
    cell = _group_cells(file, column, group)[place]
    return [item if isinstance(item, bytes) else item["bytes"] for item in (cell if isinstance(cell, list) else [cell])]


@lru_cache(maxsize=64)
def _group_sizes(file: str) -> tuple[int, ...]:
    from pyarrow.parquet import read_metadata

    found = read_metadata(file)
    return tuple(found.row_group(group).num_rows for group in range(found.num_row_groups))


def _group_of(file: str, row: int) -> tuple[int, int]:
    """The row group, and the row's place in it."""
    for group, size in enumerate(_group_sizes(file)):
        if row < size:
            return group, row
        row -= size
    raise NpoError(f"{file} has no row {row}", "bring the file back as it was")


@lru_cache(maxsize=ROW_GROUP_CACHE_SIZE)
def _group_cells(file: str, column: str, group: int) -> list:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as opened:
        return opened.read_row_group(group, columns=[column]).column(0).to_pylist()
