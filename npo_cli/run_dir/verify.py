"""Is this the checkpoint of this model? Compares tensor names, shapes and types with what the model expects, and
looks for NaN and infinity, from the safetensors files alone: no torch, one tensor in memory at a time.

The safetensors format: 8 bytes little-endian length, that many bytes of JSON header, then the data.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_cli.errors import NpoError

SINGLE = "model.safetensors"
SHARDS = "model.safetensors.index.json"
NUM_NAMED = 5
NAN_BLOCK = 1 << 22
"""Numbers looked at in one go."""
HINT = "choose another step (see npo index RUN --verify), or restore the folder from a copy"

SAFETENSORS_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
}  # fmt: skip
FLOAT_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""How numpy reads each floating type; bfloat16 as its bare bits."""
NUMBER_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlace:
    """One tensor as its file's header describes it."""

    name: str
    dtype: str
    """safetensors' name: F32, BF16..."""
    shape: tuple[int, ...]
    path: Path
    start: int
    """First byte in the file."""
    end: int


def weight_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype (safetensors' names: F32, BF16) of every tensor of a checkpoint."""
    return {place.name: (place.shape, place.dtype) for place in tensor_places(folder)}


def check_weights(folder: Path, expected: Mapping[str, tuple[Sequence[int], str | None]]) -> None:
    """Refuse a checkpoint with a missing, extra, misshapen, mistyped, NaN or infinite tensor, naming each.

    `expected`: shape and dtype by tensor name. A dtype is torch's name (`torch.float32`) or safetensors' (`F32`);
    None accepts any. Tensors that the model ties are expected once, under the name that is saved.
    """
    places = {place.name: place for place in tensor_places(folder)}
    problems = [
        *_named("missing", sorted(expected.keys() - places.keys())),
        *_named("extra", sorted(places.keys() - expected.keys())),
        *_named("misshapen", [_mismatch(places[name], expected[name]) for name in sorted(expected) if name in places]),
        *_named("NaN or infinite", [name for name in sorted(places) if not _is_finite(places[name])]),
    ]
    if problems:
        raise NpoError(f"{folder} does not hold this model's weights: {'; '.join(problems)}", HINT)


def _named(what: str, names: Sequence[str | None]) -> list[str]:
    said = [name for name in names if name]
    if not said:
        return []
    rest = f" and {len(said) - NUM_NAMED} more" if len(said) > NUM_NAMED else ""
    return [f"{what}: {', '.join(said[:NUM_NAMED])}{rest}"]


def _mismatch(place: TensorPlace, wanted: tuple[Sequence[int], str | None]) -> str | None:
    shape, dtype = tuple(wanted[0]), wanted[1]
    if place.shape != shape:
        return f"{place.name} {list(place.shape)} for {list(shape)}"
    plain = str(dtype).removeprefix("torch.")
    if dtype is not None and place.dtype != SAFETENSORS_NAMES.get(plain, plain):
        return f"{place.name} {place.dtype} for {SAFETENSORS_NAMES.get(plain, plain)}"
    return None


def tensor_places(folder: Path) -> list[TensorPlace]:
    """Every tensor of a checkpoint, of the single weights file or of the shards that its index names."""
    if (folder / SINGLE).is_file():
        return list(_places_in(folder / SINGLE))
    if not (folder / SHARDS).is_file():
        raise NpoError(f"{folder} holds no weights: neither {SINGLE} nor {SHARDS}", HINT)
    weight_map = _weight_map(folder / SHARDS)
    places = [place for shard in sorted(set(weight_map.values())) for place in _places_in(folder / shard)]
    lost = sorted(set(weight_map) - {place.name for place in places})
    if lost:
        raise NpoError(f"{folder / SHARDS} names tensors that no shard holds: {', '.join(lost[:NUM_NAMED])}", HINT)
    return places


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        names = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NpoError(f"{path} is damaged: no weight_map", HINT) from error
    for shard in names.values():
        if Path(shard).name != shard:
            raise NpoError(f"{path} names a shard outside its folder: {shard}", HINT)
    return names


def _places_in(path: Path) -> Iterator[TensorPlace]:
    header, data_start, size = read_header(path)
    for name, said in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = said["data_offsets"]
            dtype, shape = str(said["dtype"]), tuple(int(length) for length in said["shape"])
        except (KeyError, TypeError, ValueError) as error:
            raise NpoError(f"{path} is damaged: the header entry of {name} is not whole", HINT) from error
        place = TensorPlace(
            name=name, dtype=dtype, shape=shape, path=path, start=data_start + begin, end=data_start + end
        )
        if not 0 <= begin <= end or place.end > size or not _fills(place):
            raise NpoError(f"{path} is damaged: the data of {name} is cut off", HINT)
        yield place


def _fills(place: TensorPlace) -> bool:
    """Whether the bytes are as many as the shape needs; true for a type unknown here."""
    num_bytes = NUMBER_BYTES.get(place.dtype)
    for length in place.shape:
        num_bytes = None if num_bytes is None else num_bytes * length
    return num_bytes is None or num_bytes == place.end - place.start


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, the byte where its data starts, and the file's size in bytes."""
    if not path.is_file():
        raise NpoError(f"{path} is missing", HINT)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise NpoError(f"{path} is damaged: it ends inside its header", HINT)
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise NpoError(f"{path} is damaged: its header is not JSON", HINT) from error
    if not isinstance(header, dict):
        raise NpoError(f"{path} is damaged: its header is not a JSON object", HINT)
    return header, 8 + length, size


def _is_finite(place: TensorPlace) -> bool:
    """Whether no number is NaN or infinite; true for whole numbers.

    numpy has no bfloat16: there the bits are looked at, as such numbers have all 8 exponent bits set.
    """
    import numpy as np

    kind = FLOAT_KINDS.get(place.dtype)
    if kind is None:
        return True
    with place.path.open("rb") as file:
        file.seek(place.start)
        left = (place.end - place.start) // np.dtype(kind).itemsize
        while left:
            numbers = np.fromfile(file, dtype=kind, count=min(left, NAN_BLOCK))
            left -= len(numbers)
            broken = (numbers & 0x7F80) == 0x7F80 if place.dtype == "BF16" else ~np.isfinite(numbers)
            if broken.any():
                return False
    return True
