"""Rows from where people have them: one file, a folder, or a data set on the Hugging Face hub.

A folder is one that `datasets.save_to_disk` wrote, or holds parquet files whose names begin with their split, as on the
hub (`train-00000-of-00002.parquet`). Folders and hub ids have splits and subsets, a file has neither.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_cli.config.base import is_dataset_id
from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError, first_line
from npo_cli.tasks.table_io import TableRow, read_rows

SHARD = re.compile(r"-\d+(-of-\d+)?(-[0-9a-f]+)?$")
"""What follows the split in the name of a parquet file."""
SAVED_FILES = ("dataset_dict.json", "state.json")
"""Files by which a folder of `save_to_disk` is recognized."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPart:
    """The rows to read: a file, or a split of a data set."""

    path: str
    subset: str | None
    splits: tuple[str, ...]
    """Names that will do, the first that exists; a data set with one split needs none."""
    is_named: bool
    """Whether the recipe names the split, so that no other will do."""
    setting: str
    """In errors: `task.split`."""

    @property
    def file(self) -> Path:
        """The path, with `~` resolved."""
        return Path(self.path).expanduser()

    @property
    def has_splits(self) -> bool:
        """Whether it is a folder or on the hub."""
        return self.file.is_dir() or is_dataset_id(self.path)


def training_part(settings: TaskSettings) -> DataPart:
    """Where the training prompts are."""
    return _part(settings.path or "", settings, settings.split, default="train", setting="task.split")


def heldout_part(settings: TaskSettings) -> DataPart | None:
    """Where the held-out prompts are, if not among the rows of the training prompts."""
    path, split = settings.heldout_path, settings.heldout_split
    if path is None and split is None:
        return None
    return _part(path or settings.path or "", settings, split, default="test", setting="task.heldout_split")


def _part(path: str, settings: TaskSettings, split: str | None, *, default: str, setting: str) -> DataPart:
    return DataPart(
        path=path,
        subset=settings.subset,
        splits=(split or default,),
        is_named=split is not None,
        setting=setting,
    )


def check_parts(settings: TaskSettings) -> None:
    """Refuse splits and subsets of a file, which has none, and one split for training and held-out prompts."""
    train, heldout = training_part(settings), heldout_part(settings)
    for part in (train, heldout):
        if part is not None and part.is_named and part.file.is_file():
            raise NpoError(
                f"{part.setting}={part.splits[0]} has no effect: {part.path} is one file", f"remove {part.setting}"
            )
    if settings.subset is not None and train.file.is_file() and (heldout is None or heldout.file.is_file()):
        raise NpoError(f"task.subset has no effect: {train.path} is one file", "remove task.subset")
    if heldout is not None and (heldout.path, heldout.splits) == (train.path, train.splits) and train.has_splits:
        raise NpoError(
            f"task.heldout_split={heldout.splits[0]} is the split that is trained on",
            "name another one, or remove it: task.heldout_size rows of the split are then held out",
        )
    if settings.image_column is not None and any(part.has_splits for part in (train, heldout) if part is not None):
        raise NpoError(
            f"task.image_column needs a .parquet or .jsonl file, but {train.path} is a data set",
            "write the split to one file: split.to_parquet('rows.parquet')",
        )


def read_part(part: DataPart, *, without: str | None = None) -> list[TableRow]:
    """All rows, in order; `without` as in `read_rows`."""
    if is_dataset_id(part.path):
        return _rows_of(part, *_open_hub(part))
    if not part.file.is_dir():
        return read_rows(part.file, without=without)
    if any((part.file / name).is_file() for name in SAVED_FILES):
        return _rows_of(part, *_open_saved(part))
    rows = [row for file in _find_files(part) for row in read_rows(file, without=without)]
    return [TableRow(position=at, location=row.location, values=row.values) for at, row in enumerate(rows)]


def _find_files(part: DataPart) -> list[Path]:
    """The parquet files of a split, in the order of their names."""
    folder = part.file if part.subset is None else part.file / part.subset
    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
    if not files:
        found = sorted({file.parent.name for file in part.file.rglob("*.parquet")} - {part.file.name})
        if part.subset is not None and found:
            raise NpoError(f"{part.path} has no subset {part.subset!r}", f"set task.subset to {' or '.join(found)}")
        raise NpoError(
            f"the folder {folder} holds no data: no .parquet file, and datasets.save_to_disk did not write it",
            "set task.path to a file, or save the data set there: dataset.save_to_disk(FOLDER)",
        )
    by_subset: dict[str, dict[str, list[Path]]] = {}
    for file in files:
        # train-00000-of-00001.parquet, or train/0000.parquet as the hub converts data sets
        is_folder = file.stem.isdigit() and file.parent != folder
        split = file.parent.name if is_folder else SHARD.sub("", file.stem)
        subset = (file.parent.parent if is_folder else file.parent).relative_to(folder).as_posix()
        by_subset.setdefault(subset, {}).setdefault(split, []).append(file)
    if len(by_subset) > 1:
        raise NpoError(f"{part.path} has several subsets", f"set task.subset to one of: {', '.join(by_subset)}")
    return _choose_split(next(iter(by_subset.values())), part)[1]


def _choose_split(splits: Mapping[str, Any], part: DataPart) -> tuple[str, Any]:
    """Name and value of the split that was named; else `train` (held out: `test`), or the only one."""
    for name in part.splits:
        if name in splits:
            return name, splits[name]
    if len(splits) == 1 and not part.is_named:
        return next(iter(splits.items()))
    raise NpoError(
        f"{part.path} has no split {part.splits[0]!r}",
        f"set {part.setting} to one of: {', '.join(map(str, splits))}",
    )


def _open_saved(part: DataPart) -> tuple[str, Any]:
    """A split of a folder that `save_to_disk` wrote."""
    datasets = _require_datasets(part, "was saved by the package datasets, which is needed to read it")
    if part.subset is not None:
        raise NpoError(
            f"task.subset has no effect: {part.path} was saved by save_to_disk, without subsets", "remove task.subset"
        )
    with _explained(part):
        saved = datasets.load_from_disk(str(part.file))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    return _choose_split(splits, part)


def _open_hub(part: DataPart) -> tuple[str, Any]:
    """A split of a data set on the hub, or of its copy in the local cache."""
    datasets = _require_datasets(
        part,
        "is no file or folder here; to load it from the Hugging Face hub, the package datasets is needed",
    )
    with _explained(part):
        return _choose_split(datasets.load_dataset(part.path, part.subset), part)


def _require_datasets(part: DataPart, why: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise NpoError(f"{part.path} {why}", "pip install datasets, or fix task.path") from error
    return datasets


@contextmanager
def _explained(part: DataPart) -> Iterator[None]:
    """The library's errors as ours, without the retries that it logs and its bars."""
    import datasets

    log = logging.getLogger("huggingface_hub")
    level, has_bars = log.level, datasets.are_progress_bars_disabled()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    except NpoError:
        raise
    except ConnectionError as error:
        raise NpoError(
            f"{part.path} is no file or folder here, and the Hugging Face hub cannot be reached to look for it there",
            f"fix task.path, or download it where there is a network (hf download --repo-type dataset {part.path} "
            "--local-dir FOLDER) and set task.path=FOLDER",
        ) from error
    except Exception as error:  # the library raises many kinds
        text = first_line(error)
        hint = "fix task.path" if type(error).__name__ == "DatasetNotFoundError" else "fix task.path or task.subset"
        if "onfig name is missing" in str(error) or "BuilderConfig" in str(error):
            text, hint = " ".join(str(error).split("\nExample")[0].split()), "set task.subset to one of them"
        raise NpoError(f"the data set {part.path} cannot be loaded: {text}", hint) from error
    finally:
        log.setLevel(level)
        if not has_bars:
            datasets.enable_progress_bars()


def _rows_of(part: DataPart, split: str, dataset: Any) -> list[TableRow]:
    """Its rows; images stay encoded, so that nothing is decoded that is not used."""
    import datasets

    if isinstance(dataset, datasets.IterableDataset) or not len(dataset):
        raise NpoError(f"{part.path} has no rows", "it needs one row per prompt")
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return [
        TableRow(position=at, location=f"{part.path} {split} row {at + 1}", values=dict(values))
        for at, values in enumerate(dataset.with_format(None))
    ]
