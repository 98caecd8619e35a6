"""The first batch is read in the background, while the state is initialised or restored."""

import concurrent.futures
import threading
from collections.abc import Callable, Iterator

from beit_jax.types import HostBatch

_PATIENCE = 60.0  # seconds


class FirstBatch:
    """Reads the first batch in a thread of its own.

    Args:
      training: `Feed.training`.
      step: where the run will most likely start.
    """

    def __init__(self, training: Callable[[int], Iterator[HostBatch]], *, step: int):
        self._training, self._step = training, step
        self._read: concurrent.futures.Future[tuple[HostBatch, Iterator[HostBatch]]] = (
            concurrent.futures.Future()
        )
        # A daemon thread: a read that hangs must not keep a process that is to end.
        self._thread = threading.Thread(target=self._start, name="first batch", daemon=True)
        self._thread.start()

    def _start(self) -> None:
        try:
            batches = self._training(self._step)
            self._read.set_result((next(batches), batches))
        except BaseException as error:  # raised where the batch is asked for
            self._read.set_exception(error)

    def leave(self) -> None:
        """Waits for the read to end, where nobody wants the batch any more.

        TensorFlow aborts a process that ends while a thread is inside it. A read that takes longer
        than anybody would wait is left to itself.
        """
        self._thread.join(_PATIENCE)

    def batches(self, step: int) -> Iterator[HostBatch]:
        """The batches from `step` on; raises what went wrong with the first."""
        if step != self._step:  # the newest checkpoint was unreadable
            yield from self._training(step)
            return
        batch, batches = self._read.result()
        yield batch
        yield from batches
