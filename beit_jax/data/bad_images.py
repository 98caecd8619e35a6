"""Counts images that can't be decoded, and ends a run that meets too many of them.

bad_images = BadImages(source, max_share=config.max_bad_share)
for batch in batches:
    bad_images.count(batch)
"""

import itertools

import numpy as np
from absl import logging

from beit_jax.config import RunError
from beit_jax.data.sources import Source
from beit_jax.files import printable
from beit_jax.types import HostBatch

# Bad images end a run only once this many images, or a whole epoch, have been read.
MIN_READ = 100
# So many in a row end it whatever the share: the folder is gone, and what is left is grey.
MAX_IN_A_ROW = 1000
# Standard deviations, about, beyond which a share is no chance; it is tested after every batch.
DEVIATIONS = 5
NAMED = 3  # bad images in the error message


class TooManyBadImagesError(RunError):
    """More images than `config.data.max_bad_share` allows can't be read or decoded."""


class BadImages:
    """Counts the images that had to be replaced, names each once, and ends a run with too many.

    Counts are this host's own since the start of the process. Where one host raises, the cluster
    ends the others.

    Attributes:
      read: images read.
      bad: how many of them were replaced; an image counts again in each epoch.
      by_pillow: how many Pillow decoded, since TensorFlow can't; this is slower.
    """

    def __init__(self, source: Source, *, max_share: float, evaluation: bool = False):
        """Starts at zero.

        Args:
          source: whose images are counted.
          max_share: the share of images that may be bad, in 0..1.
          evaluation: images are evaluated on, in passes from `start_pass` to `end_pass`, and a bad
            one is left out. The share then matters only from 100 images on.
        """
        self.read = 0
        self.bad = 0
        self.by_pillow = 0
        self._source = source
        self._max_share = max_share
        self._min_read = MIN_READ if evaluation else min(MIN_READ, len(source))
        self._what = "evaluation images" if evaluation else "images"
        # A label map may also be of another size than its image, or hold a label of no class.
        maps = "segmentation" in source.fields and not source.reliable
        self._doing, self._fault = ("use", "used with its map") if maps else ("decode", "decoded")
        self._in_a_row = 0
        self._names: dict[int, str] = {}

    def count(self, batch: HostBatch) -> None:
        """Counts a batch of `pipeline.training_batches` or `pipeline.eval_batches`.

        Raises:
          TooManyBadImagesError: the share is too high, of all images or by more than chance of
            those read, or all are bad; not before 100 images or all of a smaller source have been
            read. Or the last 1000 images are all bad.
        """
        replaced = batch["replaced"]
        if "valid" in batch:  # what is not is padding
            replaced = replaced[batch["valid"]]
        self.read += replaced.size
        self.by_pillow += int(batch["by_pillow"].sum())
        good = np.flatnonzero(~replaced)
        self._in_a_row = (
            replaced.size - 1 - good[-1] if good.size else self._in_a_row + replaced.size
        )
        if batch["replaced"].any():
            self.bad += int(batch["replaced"].sum())
            for index in batch["index"][batch["replaced"]].tolist():
                if index not in self._names:
                    self._names[index] = printable(self._source.name(index))
                    logging.warning("Can't %s %s; replaced it.", self._doing, self._names[index])
        if (self._too_many() or self._all_bad()) and self.read >= self._min_read:
            raise self._error()
        if self._in_a_row >= MAX_IN_A_ROW:
            raise self._error(f"; the last {self._in_a_row} were all bad")

    def start_pass(self) -> None:
        """Counts from zero again; which images are known to be bad stays known."""
        self.read = self.bad = self._in_a_row = 0

    def end_pass(self) -> None:
        """Checks a whole pass.

        Raises:
          TooManyBadImagesError: all its images are bad, which leaves nothing to evaluate on.
        """
        if self._all_bad():
            raise self._error()

    def metrics(self) -> dict[str, float]:
        """Counts for the log of a run."""
        return {"replaced_images": float(self.bad), "images_by_pillow": float(self.by_pillow)}

    def _too_many(self) -> bool:
        """Whether the source's share is too high, and not only that of the images read so far.

        Early in an epoch, half the share that is allowed exceeds it by chance in every third run.
        """
        expected = self._max_share * self.read
        beyond_chance = self.bad > expected + DEVIATIONS * expected**0.5
        certain = len(self._names) > self._max_share * len(self._source)
        return self.bad > expected and (certain or beyond_chance)

    def _all_bad(self) -> bool:
        return self.bad == self.read > 0

    def _error(self, more: str = "") -> TooManyBadImagesError:
        allowed = f", more than config.data.max_bad_share allows ({self._max_share:.1%})"
        too_many = self._too_many()
        advice = "; take such files out, or raise --config.data.max_bad_share to replace more"
        return TooManyBadImagesError(
            f"{self.bad} of the {self.read} {self._what} read can't be {self._fault} "
            f"({self.bad / self.read:.1%})"
            + (allowed if too_many else "")
            + f"{more}; among them "
            + ", ".join(itertools.islice(self._names.values(), NAMED))
            + (advice if too_many and not self._all_bad() else "")
        )
