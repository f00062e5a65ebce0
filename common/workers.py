"""Processes that share work. If one is killed, the run ends with an error instead of waiting for it. Only the main
process reacts to Ctrl-C, and no other process outlives it, however it ends."""
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from common.cli import RunError


@contextlib.contextmanager
def worker_pool(count):
    """Starts `count` processes; yields a function like map(): results come in the order of the items."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, initializer=start_worker, initargs=(os.getpid(),))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        pool.submit(os.getpid).result()  # starts the processes, which inherit the blocked Ctrl-C
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield lambda function, items: pool.map(function, items, chunksize=4)
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise RunError("a worker process was killed, perhaps because memory ran out; the same command continues, "
                           "and with fewer --workers it needs less memory") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(main):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with, args=(main,), daemon=True).start()


def leave_with(main):
    """Ends this process once its parent is no longer `main`: children of a killed process get another parent."""
    while os.getppid() == main:
        time.sleep(0.2)
    os._exit(1)
