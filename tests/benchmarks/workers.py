"""A stand-in for the process that measures. It imports nothing heavy: each test starts some of them."""

import os
import time
from multiprocessing.connection import Connection

READING = {"pairs_per_second": 100.0, "cpu_seconds_per_pair": 0.01}


def behave(pipe: Connection, group: list[tuple[str, str]], setting: object) -> None:
    """Does what a job's name says."""
    for _, name in group:
        if name == "dies":
            os._exit(7)
        if name == "hangs":
            time.sleep(600)
        pipe.send("RuntimeError: no" if name == "fails" else READING)
