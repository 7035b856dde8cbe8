"""Pictures as they are stored: what is shown of them, and what is refused before it is decoded."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from npo_cli.errors import NpoError
from npo_cli.images import decode_image, make_image_ref, make_in_memory_image_ref, open_image

LIMIT = 1000


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A header, and nothing to decode behind it: whoever tries finds damage."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (head, b"IDAT")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


RED = Image.new("RGB", (4, 2), (255, 0, 0))
FRAMES = [Image.new("L", (4, 4), grey) for grey in (0, 255)]
BAD = {
    "is empty": b"",
    "is not an image in a supported format": b"not a picture",
    "is damaged": encoded(Image.effect_noise((30, 30), 50))[:-300],
    "is damaged: image file is truncated": encoded(Image.effect_noise((30, 30), 50), "JPEG")[:-100],
    "has 40 x 30 = 1,200 pixels; task.max_image_pixels is 1,000": png_of_claimed_size(40, 30),
    "has 10000 x 10000 = 100,000,000 pixels": png_of_claimed_size(10_000, 10_000),
    "is too large": png_of_claimed_size(20_000, 20_000),
    "has 2 frames": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "has more than 8 bits per channel": encoded(Image.new("I;16", (4, 4), 40_000)),
}


@pytest.mark.parametrize("problem", BAD)
def test_image_that_cannot_be_decoded_is_named(problem: str):
    with pytest.raises(NpoError) as refusal:
        make_image_ref(BAD[problem], location="x.png", label="data.jsonl line 3, image 1", max_pixels=LIMIT)
    assert refusal.value.message.startswith("data.jsonl line 3, image 1 ")
    assert problem in refusal.value.message


def test_image_exif_orientation_is_applied():
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side: a quarter turn clockwise
    left_red = Image.new("RGB", (4, 2), (0, 0, 255))
    left_red.paste((255, 0, 0), (0, 0, 2, 2))
    data = encoded(left_red, "PNG", exif=turned)
    ref = make_image_ref(data, location="x.png", label="x.png", max_pixels=LIMIT, keep_bytes=True)
    shown = open_image(ref)
    assert (ref.width, ref.height) == shown.size == (2, 4)
    assert [shown.getpixel((0, y)) for y in range(4)] == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2


@pytest.mark.parametrize(
    ("picture", "colour"),
    [
        # half of red over white: 255, and 255 - 255 x 128/255 = 127 twice
        (Image.new("RGBA", (2, 2), (255, 0, 0, 128)), (255, 127, 127)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (RED.quantize(2), (255, 0, 0)),
    ],
)
def test_image_modes_become_rgb_on_white(picture: Image.Image, colour: tuple[int, int, int]):
    shown = decode_image(encoded(picture), label="x")
    assert shown.mode == "RGB" and shown.getpixel((0, 0)) == colour


def test_image_that_changed_is_refused(tmp_path: Path):
    file = tmp_path / "red.png"
    file.write_bytes(encoded(RED))
    ref = make_image_ref(file.read_bytes(), location=str(file), label="red.png", max_pixels=LIMIT)
    assert ref.data is None and open_image(ref).getpixel((0, 0)) == (255, 0, 0)
    file.write_bytes(encoded(RED.rotate(180)) + b"!")
    with pytest.raises(NpoError, match="has changed: its sha256"):
        open_image(ref)
    file.unlink()
    with pytest.raises(NpoError, match=r"red.png cannot be read: No such file"):
        open_image(ref)


def test_in_memory_image_depends_on_its_pixels_only():
    ref = make_in_memory_image_ref(RED, "one")
    assert ref.sha256 == make_in_memory_image_ref(decode_image(encoded(RED), label="x"), "two").sha256
    assert ref.data is not None and ref.data.startswith(b"P6\n4 2\n255\n") and "data" not in repr(ref)
    assert open_image(ref).tobytes() == bytes((255, 0, 0)) * 8
