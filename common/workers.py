"""Processes that share work. One that is killed ends the run instead of being waited for; Ctrl-C is answered by the
main process alone; and no process outlives the main one, however that ends."""
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
    """Starts `count` processes; yields a function like map(), whose results come in the order of the items."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, initializer=start_worker, initargs=(os.getpid(),))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        pool.submit(os.getpid).result()  # starts the processes, which inherit that Ctrl-C does not reach them
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield lambda function, items: pool.map(function, items, chunksize=4)
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise RunError("a worker process was killed, perhaps because memory ran out; the same command goes on from "
                           "where it was, with fewer --workers in less memory") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(main):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with, args=(main,), daemon=True).start()


def leave_with(main):
    """Ends this process once its parent is no longer `main`: a killed process leaves its children to the system."""
    while os.getppid() == main:
        time.sleep(0.2)
    os._exit(1)
