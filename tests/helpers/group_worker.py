"""One rank of a job that torchrun started in a test: tries the collectives, rank 0 prints the outcome as JSON."""

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from npo_cli.distributed.launch import read_launch_info
from npo_cli.distributed.process_group import current_group, join_job, on_main_rank
from npo_cli.errors import NpoError
from npo_cli.storage.files import write_text_atomic
from npo_cli.storage.jsonl import JsonlLog


@on_main_rank
def refuse() -> None:
    raise NpoError("the disk is full", "free some space")


def fail_on_rank_1(items: Sequence[int]) -> list[int]:
    if current_group().rank == 1:
        raise ValueError("unlucky")
    return list(items)


def message_of(call) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


def work_in_a_thread() -> dict[str, list[int]]:
    """Rank 0's thread works alone while both ranks meet in collectives."""
    group = current_group()
    alone: list[int] = []

    def work() -> None:
        with group.main_section():
            for number in range(100):
                alone.extend(group.map(list, [number, -number], phase="alone"))
                alone.append(group.run_on_main(lambda: group.broadcast(7, phase="alone"), phase="alone"))

    thread = threading.Thread(target=work)
    if group.is_main:
        thread.start()
    together = [sum(group.map(list, [number, number], phase="together")) for number in range(100)]
    if group.is_main:
        thread.join()
    return {"alone": alone, "together": together}


def try_collectives(folder: Path) -> dict[str, object]:
    group = current_group()
    log = JsonlLog(folder / "log.jsonl")
    for step in (1, 2, 2):
        log.append_once({"step": step, "rank": 0})
    write_text_atomic(folder / "text", f"rank {group.rank}")
    outcome = {
        "split": list(group.split(range(5))),
        "map": group.map(lambda part: [2 * item for item in part], [1, 2, 3], phase="double"),
        "map error": message_of(lambda: group.map(fail_on_rank_1, [1, 2], phase="fail")),
        "main error": message_of(refuse),
        "broadcast": group.broadcast(group.rank, phase="agree"),
        "steps": [row["step"] for row in log.iter_rows()],
        "text": (folder / "text").read_text(),
        "thread": work_in_a_thread(),
    }
    return {name: group.gather(value, phase="report") for name, value in outcome.items()}


def fail_alone() -> None:
    """Rank 1 fails while rank 0 waits for it."""
    group = current_group()
    group.context = "step 3"
    with group.phase("work"):
        if group.rank == 1:
            raise ValueError("unlucky")
        group.gather(None, phase="wait")


if __name__ == "__main__":
    launch = read_launch_info()
    assert launch is not None, "torchrun sets the environment"
    with join_job(launch) as joined:
        if sys.argv[1] == "fail":
            fail_alone()
        outcomes = try_collectives(Path(sys.argv[1]))
        if joined.is_main:
            sys.stdout.write(json.dumps(outcomes) + "\n")
