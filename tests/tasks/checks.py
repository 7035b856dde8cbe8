"""Checks for the pool's tests. They live in a module of their own because worker processes import them."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress


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
            print("time to go")
            os._exit(3)
        if item == "alarm":
            signal.raise_signal(signal.SIGALRM)
        if item == "segfault":
            import ctypes

            ctypes.string_at(0)
        if item == "interrupt":
            raise KeyboardInterrupt
        if item == "close":
            os.closerange(3, 256)
        if item == "garbage":
            for number in range(3, 64):
                with suppress(OSError):
                    if stat.S_ISSOCK(os.fstat(number).st_mode):
                        os.write(number, b"\0\0\0\5hello")
        if item == "raise":
            raise ValueError("no such item")
        if item == "sleeping child":
            subprocess.Popen([sys.executable, "-c", "__import__('time').sleep(60)"]).wait()
        if item == "print":
            sys.stdout.write("noise\n")
        if item == "print and loop":
            print("late noise")
            while True:
                pass
        if item == "pid":
            time.sleep(0.05)  # long enough for every worker to get one
            return os.getpid()
        return item.upper()

    return check


def build_failure() -> Callable[[str], str]:
    raise ImportError("nothing to import")


def build_death() -> Callable[[str], str]:
    print("no license found")
    os._exit(9)


def build_interrupt() -> Callable[[str], str]:
    raise KeyboardInterrupt


def build_short_life() -> Callable[[str], str]:
    """It dies soon after the start, while it waits for its first item."""
    print("watchdog: time is up")
    threading.Timer(0.05, os._exit, (7,)).start()
    return str.upper


def build_greeting() -> Callable[[str], str]:
    print("hello")
    return str.upper
