"""Checks for the pool's tests. They live in a module of their own because worker processes import them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable


def build_double() -> Callable[[int], int]:
    return lambda item: item * 2


def build_trouble() -> Callable[[str], object]:
    """A check that does whatever harm the item names."""

    def check(item: str) -> object:
        if item == "loop":
            while True:
                pass
        if item == "loop in C":
            return len(str(7 ** (10**9)))
        if item == "exit":
            os._exit(3)
        if item == "segfault":
            import ctypes

            ctypes.string_at(0)
        if item == "raise":
            raise ValueError("no such item")
        if item == "sleeping child":
            subprocess.Popen([sys.executable, "-c", "__import__('time').sleep(60)"]).wait()
        if item == "print":
            sys.stdout.write("noise\n")
        if item == "pid":
            time.sleep(0.05)  # long enough for every worker to get one
            return os.getpid()
        return item.upper()

    return check


def build_failure() -> Callable[[str], str]:
    raise ImportError("nothing to import")


def build_death() -> Callable[[str], str]:
    os._exit(9)
