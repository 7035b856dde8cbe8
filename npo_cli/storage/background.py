"""Writing in a thread while the caller computes; waiting for it raises its error."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Result = TypeVar("Result")


class BackgroundWrite(Generic[Result]):
    """One piece of writing in a thread of its own, which begins at once. A process that ends waits for it."""

    def __init__(self, function: Callable[[], Result], *, name: str) -> None:
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._future = thread.submit(function)
        thread.shutdown(wait=False)

    def wait(self) -> Result:
        """What the function returned, once it has ended. An error in the thread is raised here."""
        return self._future.result()
