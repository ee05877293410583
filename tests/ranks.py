"""Starts programs in several processes on this machine, like torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import TCPStore


class Rank(subprocess.Popen):
    """One of the processes; its output goes to files, so that it never waits for a reader."""

    def __init__(self, number: int, command: list[str], folder: Path, variables: dict[str, str]):
        self._out, self._err = folder / f"rank-{number}.out", folder / f"rank-{number}.err"
        with self._out.open("w") as out, self._err.open("w") as err:
            super().__init__(command, env=variables, stdout=out, stderr=err)

    def said(self) -> str:
        """What it wrote to its standard output so far."""
        return self._out.read_text()

    def complained(self) -> str:
        """What it wrote to its standard error so far."""
        return self._err.read_text()


@contextmanager
def started(
    command: list[str], folder: Path, size: int = 2, **variables: str
) -> Iterator[list[Rank]]:
    """A context with processes that run Python with these arguments; kills those alive at its end.

    This process is the server of their store, as torchrun is: a port that is found free now could be in use
    when rank 0 opened it seconds later.

    Args:
        command: what follows "python".
        folder: exists; holds what they write.
        size: how many.
        variables: more of their environment.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        **os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        # Works whatever this machine's name resolves to.
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path), **variables,
    }  # fmt: skip
    ranks = []
    try:
        for number in range(size):
            own = {**common, "RANK": str(number), "LOCAL_RANK": str(number)}
            ranks.append(Rank(number, [sys.executable, *command], folder, own))
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def finish(ranks: list[Rank], timeout: float = 300) -> list[str]:
    """Their standard output, after all have ended successfully."""
    for rank in ranks:
        rank.wait(timeout)
    assert [r.returncode for r in ranks] == [0] * len(ranks), [r.complained() for r in ranks]
    return [rank.said() for rank in ranks]
