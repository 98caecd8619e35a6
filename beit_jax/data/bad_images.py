"""Counts images that can't be decoded, and ends a run that meets too many of them.

bad_images = BadImages(source, max_share=config.max_bad_share)
for batch in batches:
    bad_images.count(batch)
"""

import itertools

from absl import logging

from beit_jax.config import RunError
from beit_jax.data.sources import Source
from beit_jax.types import HostBatch

# Bad images end a run only once this many images, or a whole epoch, have been read.
MIN_READ = 100
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
    """

    def __init__(self, source: Source, *, max_share: float):
        """Starts at zero; `max_share`, in 0..1, is the share of images that may be bad."""
        self.read = 0
        self.bad = 0
        self._source = source
        self._max_share = max_share
        self._names: dict[int, str] = {}

    def count(self, batch: HostBatch) -> None:
        """Counts a batch of `pipeline.training_batches` or `pipeline.eval_batches`.

        Raises:
          TooManyBadImagesError: the share is too high, or all images are bad; not before 100 images
            or all of a smaller source have been read.
        """
        valid = batch.get("valid")
        self.read += int(batch["replaced"].size if valid is None else valid.sum())
        if batch["replaced"].any():
            self.bad += int(batch["replaced"].sum())
            for index in batch["index"][batch["replaced"]].tolist():
                if index not in self._names:
                    self._names[index] = self._source.name(index)
                    logging.warning("Can't decode %s; replaced it.", self._names[index])
        too_many = self.bad > self._max_share * self.read or self.bad == self.read > 0
        if too_many and self.read >= min(MIN_READ, len(self._source)):
            raise TooManyBadImagesError(
                f"{self.bad} of the {self.read} images read can't be decoded "
                f"({self.bad / self.read:.1%}), more than config.data.max_bad_share allows "
                f"({self._max_share:.1%}); among them "
                + ", ".join(itertools.islice(self._names.values(), NAMED))
            )
