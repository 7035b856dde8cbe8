"""The KV cache of a changing set of rows that each get one token per forward pass.

Rows are aligned at their newest token, as with left padding: column `end` is the next one of every row, and a row that
entered later begins further right. So a pass writes one column, and reads the columns since the first token of the
longest row only. A row takes over the columns of its prompt from a prefill, which its group shares.

Models whose every layer caches plain attention get `InPlaceRows`: one preallocated buffer per layer. Others (sliding
windows, linear attention, shared or compressed caches) get `GrowingRows`, transformers' own cache for them, which rows
can leave but not join.

Axes: N rows, P prompts, H attention heads, C columns, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

SMALLEST_CAPACITY = 256
"""Columns of the first allocation, unless fewer can be needed."""


@dataclass(slots=True, kw_only=True)
class Window:
    """Which rows and columns of the caches are in use; the caches of several models share it."""

    max_columns: int
    """No row ever gets longer."""
    num_rows: int = 0
    first: int = 0
    """Column of the first token of the longest row."""
    end: int = 0
    """Column that is written next."""
    capacity: int = 0
    """Allocated columns."""

    @property
    def width(self) -> int:
        """Columns that a pass reads, the new one included."""
        return self.end + 1 - self.first

    def make_room(self, num_columns: int) -> bool:
        """Change `end` and `capacity` so that rows of that many tokens lie left of `end`; False if they do already.

        The allocation grows by half, to at most `max_columns`; where a third of it lies left of all rows it is kept,
        and the rows move to its left end.
        """
        if num_columns <= self.end < self.capacity:
            return False
        if self.capacity < self.max_columns and 2 * self.capacity < 3 * (num_columns + 1):
            self.capacity = min(self.max_columns, max(SMALLEST_CAPACITY, num_columns + num_columns // 2 + 1))
        self.first, self.end = 0, num_columns
        return True


class CachedRows(Protocol):
    """The cache of all rows of one model."""

    accepts_new_rows: bool
    """Rows may enter while others are in use."""
    cache: Cache
    """As the model takes it."""

    def enter(self, prefilled: DynamicCache, sources: Sequence[int], rows: Sequence[int]) -> None:
        """Copy columns of prompts (rows of the prefill) to rows, so that they end left of `Window.end`."""

    def move(self, sources: Sequence[int], rows: Sequence[int]) -> None:
        """Copy rows over others, and keep the first `Window.num_rows`."""

    def relocate(self, num_columns: int, old_end: int) -> None:
        """Move the last columns from left of `old_end` to left of `Window.end`, after `Window.make_room`."""


class InPlaceLayer(DynamicLayer):
    """Keys and values of one layer, in a buffer `(N, H, C, D)` that is written in place."""

    def __init__(self, window: Window, num_rows: int) -> None:
        super().__init__()
        self.window, self.num_rows = window, num_rows

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the newest column, and return those in use."""
        self.allocate(key_states, value_states)
        window = self.window
        for buffer, new_NH1D in ((self.keys, key_states), (self.values, value_states)):
            buffer[: window.num_rows, :, window.end : window.end + 1] = new_NH1D
        return self.in_use(self.keys), self.in_use(self.values)

    def allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        """The buffers, for states like these. Zeros, because masked columns are multiplied by 0."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self._empty(key_states), self._empty(value_states)

    def _empty(self, like_NHCD: Tensor) -> Tensor:
        heads, size = like_NHCD.shape[1], like_NHCD.shape[3]
        return like_NHCD.new_zeros((self.num_rows, heads, self.window.capacity, size))

    def in_use(self, buffer_NHCD: Tensor) -> Tensor:
        """Rows and columns that a pass reads."""
        window = self.window
        return buffer_NHCD[: window.num_rows, :, window.first : window.end + 1]

    def get_seq_length(self) -> int:
        """Columns before the newest."""
        return self.window.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns, and the first of them, for transformers' mask functions."""
        return self.window.width, 0

    def relocate(self, num_columns: int, old_end: int) -> None:
        """See `CachedRows`."""
        if self.is_initialized:
            self.keys = self._relocated(self.keys, num_columns, old_end)
            self.values = self._relocated(self.values, num_columns, old_end)

    def _relocated(self, buffer_NHCD: Tensor, num_columns: int, old_end: int) -> Tensor:
        window = self.window
        held = buffer_NHCD[: window.num_rows, :, old_end - num_columns : old_end]
        if window.capacity == buffer_NHCD.shape[2]:
            target, held = buffer_NHCD, held.clone()
        else:
            target = self._empty(buffer_NHCD)
        target[: window.num_rows, :, window.end - num_columns : window.end] = held
        return target


class InPlaceRows:
    """Rows in preallocated buffers."""

    accepts_new_rows = True

    def __init__(self, window: Window, *, num_rows: int, num_layers: int) -> None:
        self.window = window
        self.layers = [InPlaceLayer(window, num_rows) for _ in range(num_layers)]
        self.cache = Cache(layers=self.layers)

    def enter(self, prefilled: DynamicCache, sources: Sequence[int], rows: Sequence[int]) -> None:
        """See `CachedRows`. Shorter prompts of the prefill are padded on the left, and bring that padding along."""
        if not prefilled.layers[0].is_initialized:
            return  # prompts of one token
        end, device = self.window.end, prefilled.layers[0].keys.device
        sources_N, rows_N = (torch.tensor(places, device=device) for places in (sources, rows))
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            layer.allocate(source.keys, source.values)
            for buffer, prompts_PHCD in ((layer.keys, source.keys), (layer.values, source.values)):
                start = max(0, end - prompts_PHCD.shape[2])
                copied = prompts_PHCD[:, :, start - end :].index_select(0, sources_N)
                buffer[:, :, start:end].index_copy_(0, rows_N, copied)

    def move(self, sources: Sequence[int], rows: Sequence[int]) -> None:
        """See `CachedRows`."""
        if not rows:
            return
        for layer in self.layers:
            for buffer_NHCD in (layer.keys, layer.values):
                used = buffer_NHCD[:, :, self.window.first : self.window.end]
                used[rows] = used[sources]

    def relocate(self, num_columns: int, old_end: int) -> None:
        """See `CachedRows`."""
        for layer in self.layers:
            layer.relocate(num_columns, old_end)


class GrowingRows:
    """Rows in the cache that transformers makes for the model; all enter together."""

    accepts_new_rows = False

    def __init__(self, config: PreTrainedConfig, window: Window) -> None:
        self.window, self.cache = window, DynamicCache(config=config)
        # Columns cannot move.
        window.capacity = window.max_columns

    def enter(self, prefilled: DynamicCache, sources: Sequence[int], rows: Sequence[int]) -> None:
        """See `CachedRows`; the prefill itself becomes the cache."""
        self.cache = prefilled
        self.cache.reorder_cache(torch.tensor(sources))

    def move(self, sources: Sequence[int], rows: Sequence[int]) -> None:
        """See `CachedRows`."""
        order = list(range(self.window.num_rows))
        for source, row in zip(sources, rows, strict=True):
            order[row] = source
        self.cache.reorder_cache(torch.tensor(order))

    def relocate(self, num_columns: int, old_end: int) -> None:
        """Nothing lies in fixed columns."""


def open_rows(config: PreTrainedConfig, window: Window, *, num_rows: int) -> CachedRows:
    """The cache of up to `num_rows` rows of a model."""
    layers = DynamicCache(config=config).layers
    if layers and all(type(layer) is DynamicLayer for layer in layers):
        return InPlaceRows(window, num_rows=num_rows, num_layers=len(layers))
    return GrowingRows(config, window)
