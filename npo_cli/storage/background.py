"""Writing in a thread while the caller computes: whoever needs the files waits, and gets the error if there was one."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Result = TypeVar("Result")


class BackgroundWrite(Generic[Result]):
    """One piece of writing in a thread of its own, which begins at once. A process that ends waits for it."""

    def __init__(self, function: Callable[[], Result], *, name: str) -> None:
        self._future: Future[Result] = Future()
        threading.Thread(target=self._run, args=(function,), name=name, daemon=False).start()

    def wait(self) -> Result:
        """What the function returned, once it has ended. An error in the thread is raised here."""
        return self._future.result()

    def _run(self, function: Callable[[], Result]) -> None:
        try:
            self._future.set_result(function())
        except BaseException as error:  # raised by whoever waits
            self._future.set_exception(error)
