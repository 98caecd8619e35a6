"""Ends processes together: a watcher for lost hosts, SIGTERM, and an orderly or a hard exit.

The watcher and the signal handler run in threads of their own, since the main thread may be stuck
for good in a collective whose other end is gone.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from beit_jax.distributed.collectives import barrier
from beit_jax.distributed.session import (
    EXIT_LOST,
    EXIT_PREEMPTED,
    KEYS,
    ClusterError,
    Preempted,
    coordination_client,
    name_processes,
    session,
)

_POLL = 1.0  # seconds between looks at the other processes
# What XLA and gloo raise in Python when the other end of a collective is gone.
_LOST_PEER = re.compile(r"gloo|connection|socket|unavailable|deadline|aborted|cancelled", re.I)
_CHandler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def set_running(running: bool) -> None:
    """Says whether a SIGTERM must wait for a checkpoint; until then it ends the process at once."""
    session.running = running


def preemption_point() -> bool:
    """Whether to save and leave now.

    All processes must call it equally often between the same steps and evaluation batches; then
    they all get True at the same call, a few calls after SIGTERM came to any of them.
    """
    session.preemption_points += 1
    if session.distributed:
        return multihost_utils.reached_preemption_sync_point(session.preemption_points)
    return session.told_to_stop


def end(*, code: int, error: BaseException | None = None, message: str = "") -> int:
    """Leaves the cluster together with the others, or tells them why this process cannot go on.

    After a failure, a process of a cluster does not return from here: the others may be waiting for
    it in a collective, and JAX's own exit would wait for them.

    Args:
      code: the exit code.
      error: what went wrong, if anything did.
      message: one line about it; "" prints the traceback.

    Returns:
      `code`.
    """
    orderly = error is None or isinstance(error, Preempted)
    if session.distributed and orderly:
        try:
            barrier("at the end")
        except ClusterError as late:
            leave(str(late), EXIT_LOST)
        session.stop_watching.set()
        jax.distributed.shutdown()
        session.distributed = False
    elif session.distributed and not message and _LOST_PEER.search(str(error)):
        # More likely the other end is gone than this one at fault. The watcher will know which, and
        # ends the process.
        time.sleep(session.settings.heartbeat_timeout + 5 * _POLL)
    session.stop_watching.set()
    with contextlib.suppress(OSError):  # stderr may lie on a disk that is full
        if message:
            print(message if orderly else f"error: {message}", file=sys.stderr, flush=True)
        elif error is not None:
            traceback.print_exception(error)
    if session.distributed:
        reason = message or f"{type(error).__name__}: {error}".splitlines()[0]
        _tell_others(f"{session.process_name()} ended: {reason}", code)
        leave("", code)
    return code


def leave(message: str, code: int) -> NoReturn:
    """Ends the process at once, from any thread, with at most one line on stderr."""
    if not session.leaving.acquire(blocking=False):
        time.sleep(60)  # another thread is ending it already
    if message:
        with contextlib.suppress(OSError):
            print(f"error: {message}" if code != EXIT_PREEMPTED else message, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def start_watching() -> None:
    """Starts the thread that ends this process when another one fails or falls silent."""
    threading.Thread(target=_watch, name="cluster watcher", daemon=True).start()


def _tell_others(message: str, code: int) -> None:
    with contextlib.suppress(Exception):  # where the service is gone there is nobody to tell
        coordination_client().key_value_set(
            f"{KEYS}end/{session.index}", json.dumps({"message": message, "code": code})
        )
        if session.index == 0:
            # The others hear it from the service, which ends with this process.
            time.sleep(3 * _POLL)


def _watch() -> None:
    """Until the end: reports that this process is alive and checks that the others are."""
    client, index, hosts = coordination_client(), session.index, session.hosts
    limit = session.settings.heartbeat_timeout
    poll = min(_POLL, limit / 5)
    beat, beat_due = 0, 0.0
    heard = {i: ("", time.monotonic()) for i in range(len(hosts))}
    while not session.stop_watching.wait(poll):
        now = time.monotonic()
        try:
            for _, text in client.key_value_dir_get(f"{KEYS}end/"):
                ended = json.loads(text)  # another process': this one stops watching first
                leave(ended["message"], ended["code"])
            if now >= beat_due:
                beat, beat_due = beat + 1, now + limit / 5
                client.key_value_set(f"{KEYS}alive/{index}", str(beat), allow_overwrite=True)
            # Process 0 checks all, all check process 0: hosts² requests would be too many.
            if index == 0 and heard:
                for key, text in client.key_value_dir_get(f"{KEYS}alive/"):
                    i = int(key.rsplit("/", 1)[1])
                    if heard[i][0] != text:
                        heard[i] = (text, now)
        except Exception as error:  # any error: a watcher that has died would watch nothing
            if session.stop_watching.is_set():
                return
            leave(_lost_coordinator(str(error).split("\n")[0]), EXIT_LOST)
        silent = [i for i, (_, since) in heard.items() if now - since > limit]
        if index == 0 and silent:
            message = (
                f"lost {name_processes(silent, hosts)}: not heard of for {limit:.0f} s;"
                " it was killed, or its machine or network is gone"
            )
            _tell_others(message, EXIT_LOST)
            leave(message, EXIT_LOST)


def _lost_coordinator(reason: str) -> str:
    return (
        f"lost process 0 ({session.hosts[0]}), or the connection to it, at"
        f" {session.process_name()}: {reason}"
    )


def take_sigterm() -> None:
    """Installs the SIGTERM handler; its own thread reacts even while the main one compiles."""
    if session.signals_taken or threading.current_thread() is not threading.main_thread():
        return
    session.signals_taken = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # Python writes to the wakeup file descriptor only for signals that have a handler.
    signal.signal(signal.SIGTERM, lambda number, frame: None)

    def listen() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM:
                _on_sigterm()

    threading.Thread(target=listen, name="SIGTERM", daemon=True).start()


def chain_sigterm() -> None:
    """Puts this package's handler before JAX's, which tells the other processes when called."""
    jax_handler = _install_c_handler(signal.SIGTERM, None)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    if jax_handler:
        session.forward_signal = _CHandler(jax_handler)


def _on_sigterm() -> None:
    """Runs in the thread that listens for SIGTERM."""
    name = session.process_name()
    if session.told_to_stop:
        leave(f"{name}: second SIGTERM, leaving without saving", EXIT_PREEMPTED)
    session.told_to_stop = True
    if not session.running:
        message = f"{name}: SIGTERM with nothing to save; the same command continues"
        if session.distributed:
            _tell_others(message, EXIT_PREEMPTED)
        leave(message, EXIT_PREEMPTED)
    print(f"{name}: SIGTERM, saving before the next step", file=sys.stderr, flush=True)
    if session.forward_signal is not None:
        session.forward_signal(signal.SIGTERM)


def explain_abort() -> None:
    """Gives XLA's abort() a readable last line and an exit code that a launcher understands.

    XLA ends a process by abort(), from a thread of its own, when process 0 is gone.
    """

    @_CHandler
    def say_why(number: int) -> None:
        # abort() allows a handler no second chance, but unlimited time.
        del number
        leave(
            _lost_coordinator("JAX's coordination service ended this process, see above"),
            EXIT_LOST,
        )

    session.c_callbacks.append(say_why)
    _install_c_handler(signal.SIGABRT, say_why)


def _install_c_handler(number: int, handler: "ctypes._CFunctionType | None") -> int | None:
    """signal(2) itself, beneath Python's: returns the previous handler's address."""
    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return library.signal(number, ctypes.cast(handler, ctypes.c_void_p) if handler else None)
