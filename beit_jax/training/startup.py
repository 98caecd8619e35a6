"""From the command to the first step: compiled programs are kept, and it's said where time went.

startup.keep_compiled("auto", workdir=workdir)  # once, before anything is compiled
begun = startup.Startup()
...
begun.done("data")
...
begun.finish()  # {"start": 7.1, "data": 0.4, ..., "total": 31.0}
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

_HIT = "/jax/compilation_cache/cache_hits"


def keep_compiled(
    setting: str, *, workdir: str, environment: Mapping[str, str] = os.environ
) -> str:
    """Has JAX keep compiled programs on disk, so that the same run's next start reads its step.

    JAX's rules hold: programs that took less than a second are not kept, of several processes the
    first writes and all read (on CPUs only the first: there jax 0.10.2's key differs between
    processes), what can't be read is a warning and compiled again, and nothing is ever deleted.
    Who can write to the folder can run code in whoever reads it.

    JAX's key knows the program, the versions, the flags and the chips. On a CPU the folder is one
    for each kind of processor besides: code made for one may hold instructions another lacks, and
    homes are shared between machines.

    Args:
      setting: `RunConfig.compilation_cache`. "auto": what JAX_COMPILATION_CACHE_DIR says; else, for
        runs of several processes or with a remote workdir, a folder in it, since all processes must
        see it and a preempted machine comes back with an empty disk; else one in the user's cache
        directory.
      workdir: the run's directory.
      environment: variables.

    Returns:
      The folder; "" where nothing was set.
    """
    if not setting or (setting == "auto" and environment.get("JAX_COMPILATION_CACHE_DIR")):
        return ""
    folder = os.path.expanduser(setting)
    if setting == "auto":
        shared = jax.process_count() > 1 or "://" in workdir
        folder = f"{workdir}/compiled" if shared else _user_folder(environment)
    if jax.default_backend() == "cpu":
        folder = f"{folder}/cpu_{_processor()}"
    if "://" not in folder:
        folder = os.path.abspath(folder)
        try:
            pathlib.Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            logging.warning("%s: can't be written, so compiled programs are not kept", folder)
            return ""
    elif jax.default_backend() == "gpu":
        # XLA's own caches lie in the same folder, written by code that knows local files only.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if jax.config.jax_compilation_cache_dir != folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # another folder may be in use already
    logging.info("compiled programs are kept in %s", folder)
    return folder


def _user_folder(environment: Mapping[str, str]) -> str:
    caches = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return f"{caches}/beit_jax/compiled"


def _processor() -> str:
    """The processor's instructions as 12 hexadecimal digits; its architecture where unknown."""
    said = {platform.machine()}
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features", "model name"):
                said.add(value.strip())
    return hashlib.sha256("\n".join(sorted(said)).encode()).hexdigest()[:12]


@contextlib.contextmanager
def cache_hits() -> Iterator[Callable[[], int]]:
    """Counts the programs that are read instead of compiled while the context lasts."""
    hits = 0

    def count(event: str, **_: Any) -> None:
        nonlocal hits
        hits += event == _HIT

    jax.monitoring.register_event_listener(count)
    try:
        yield lambda: hits
    finally:
        jax.monitoring.unregister_event_listener(count)


class Startup:
    """The time from the start to the first step, by what it went into.

    Starts with the process the first time, where the system tells when that was; later jobs of the
    same process start now.
    """

    _process_taken = False

    def __init__(self):
        now = time.perf_counter()
        age = 0.0 if Startup._process_taken else _process_age()
        Startup._process_taken = True
        self._began = self._last = now - age
        self._seconds: dict[str, float] = {}
        if age:
            self.done("start")

    def done(self, name: str) -> None:
        """What was done since the last call was this; times of the same name add up."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def finish(self) -> dict[str, float]:
        """Logs a line; returns seconds by name, and their sum as "total"."""
        seconds = self._seconds | {"total": self._last - self._began}
        logging.info(
            "first step after %.1f s: %s",
            seconds["total"],
            ", ".join(f"{name} {value:.1f}" for name, value in self._seconds.items()),
        )
        return seconds


def _process_age() -> float:
    """Seconds since this process was started; 0 where the system doesn't tell (not Linux)."""
    try:
        # Fields are counted from behind the name, which may hold anything.
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
