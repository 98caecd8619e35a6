"""The compilation cache, and a timer for the phases before the first step.

startup.keep_compiled("auto", workdir=workdir)  # once, before anything is compiled
timer = startup.Startup()
...
timer.done("data")
...
timer.finish()  # {"start": 7.1, "data": 0.4, ..., "total": 31.0}
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

from beit_jax.config import check
from beit_jax.files import is_elsewhere

_HIT = "/jax/compilation_cache/cache_hits"


def keep_compiled(
    setting: str, *, workdir: str, environment: Mapping[str, str] = os.environ
) -> str:
    """Keeps compiled programs on disk, so that the next start of the same run reads its step.

    JAX's rules apply: a program that compiled in under a second is not kept; of several processes
    the first writes and all read (on CPUs only the first reads, since jax 0.10.2's key differs
    between processes there); an unreadable entry is a warning and compiled again; nothing is ever
    deleted. Anyone who can write to the folder can run code in the processes that read it.

    JAX's key covers the program, the versions, the flags and the chips. On a CPU the folder is also
    split by processor model: code compiled for one may use instructions that another lacks, and
    home directories are shared between machines.

    Args:
      setting: `RunConfig.compilation_cache`. "auto" means JAX_COMPILATION_CACHE_DIR where it is
        set; else a folder in the workdir, for runs of several processes or with a remote workdir,
        since all processes must see it and a preempted machine comes back with an empty disk; else
        a folder in the user's cache directory.
      workdir: the run's directory.
      environment: environment variables.

    Returns:
      The folder; "" where JAX's own settings are left alone.

    Raises:
      ConfigError: the setting is an address that JAX can't write to, such as "https://...".
    """
    if not setting or (setting == "auto" and environment.get("JAX_COMPILATION_CACHE_DIR")):
        return ""
    check(
        not is_elsewhere(setting),
        "config.run.compilation_cache",
        f"{setting} is neither a folder nor gs://",
    )
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
            logging.warning("%s is not writable: compiled programs are not kept", folder)
            return ""
    elif jax.default_backend() == "gpu":
        # XLA's own caches would go to the same folder, and their code writes local files only.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # JAX adds the attributes of its settings at run time.
    if jax.config.jax_compilation_cache_dir != folder:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # another folder may be in use already
    logging.info("compiled programs are kept in %s", folder)
    return folder


def _user_folder(environment: Mapping[str, str]) -> str:
    caches = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return f"{caches}/beit_jax/compiled"


def _processor() -> str:
    """Hash of the processor's model and instruction set, or of its architecture where unknown."""
    facts = {platform.machine()}
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features", "model name"):
                facts.add(value.strip())
    return hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()[:12]


@contextlib.contextmanager
def cache_hits() -> Iterator[Callable[[], int]]:
    """Counts the programs read from the cache instead of compiled, inside the context."""
    hits = 0

    def count(event: str, **_: Any) -> None:
        nonlocal hits
        hits += event == _HIT

    jax.monitoring.register_event_listener(count)
    try:
        yield lambda: hits
    finally:
        jax.monitoring.unregister_event_listener(count)


def count_from(began: float) -> None:
    """Sets the moment that the first `Startup` of this process counts from.

    The kernel's start time of a process survives `exec`: a launcher that installs packages and then
    replaces itself with Python would be counted in. So the program says when Python started.

    Args:
      began: `time.perf_counter()` in the program's first lines.
    """
    Startup.process_began = began


class Startup:
    """Splits the time to the first step into named phases.

    The first timer of a process starts with the process, its first phase being "start"; the timers
    of later jobs start when they are made.

    Attributes:
      process_began: from `count_from`; None asks the system when the process started.
    """

    process_began: float | None = None
    _process_taken = False

    def __init__(self) -> None:
        now = time.perf_counter()
        self._began = self._last = now
        self._seconds: dict[str, float] = {}
        if not Startup._process_taken:
            Startup._process_taken = True
            began = Startup.process_began
            self._began = self._last = now - _process_age() if began is None else began
            if self._began < now:  # the system may not know
                self.done("start")

    def done(self, name: str) -> None:
        """Ends the phase `name`, which started at the last call; phases of the same name add up."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def finish(self) -> dict[str, float]:
        """Logs a line and returns the seconds of each phase, and their sum as "total"."""
        seconds = self._seconds | {"total": self._last - self._began}
        logging.info(
            "first step after %.1f s: %s",
            seconds["total"],
            ", ".join(f"{name} {value:.1f}" for name, value in self._seconds.items()),
        )
        return seconds


def _process_age() -> float:
    """Seconds since the kernel started this process; 0 where it is not known (not on Linux)."""
    try:
        # The fields are counted from behind the name, which may contain spaces and brackets.
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
