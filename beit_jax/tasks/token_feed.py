"""Pre-training batches with token ids, from the token cache or from the tokenizer.

with open_cache(folder, facts=facts, rows=rows, images=local_batch, tokens=196) as cache:
    feed = known_tokens(full, lean=lean, cache=cache, encode=local_encoder(tokenizer, params))
    batch = next(feed.training(0))
    batch["token_ids"]  # uint16 [local_batch, 196]; there is no token_image
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from beit_jax.preprocessing import JITTER_FIELDS
from beit_jax.tasks.token_cache import TokenCache
from beit_jax.tokenizers.tokenizer import Tokenizer
from beit_jax.training.device_jitter import jitter_batch
from beit_jax.training.job import Feed
from beit_jax.types import Batch, HostBatch, Params

Encode = Callable[[HostBatch], jax.Array]


def local_encoder(tokenizer: Tokenizer, params: Params) -> Encode:
    """Tokenises this host's images on this host's devices, without waiting for the result.

    Args:
      tokenizer: the tokenizer.
      params: what encoding needs; placed on the devices here, beside the train step's own copy.

    Returns:
      A function from a batch with `token_image`, uint8 `[b, s, s, 3]`, and its jitter where that is
      left to the device (`training.device_jitter`), to uint16 `[b, tokens]`. b must be a multiple
      of the host's devices.
    """
    mesh = Mesh(np.array(jax.local_devices()), ("images",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("images"))
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def token_ids(params: Params, batch: Batch) -> jax.Array:
        ids = tokenizer.encode(params, jitter_batch(batch)["token_image"])
        return ids.reshape(ids.shape[0], -1).astype(jnp.uint16)

    encode = jax.jit(token_ids, out_shardings=split)

    def dispatch(batch: HostBatch) -> jax.Array:
        needed = {name: batch[name] for name in ("token_image", *JITTER_FIELDS) if name in batch}
        return encode(placed, jax.device_put(needed, split))

    return dispatch


class _Tokenised(NamedTuple):
    """A step's batch; `ids` are the cache's, or (`new`) may still be in computation."""

    step: int
    batch: HostBatch
    ids: np.ndarray | jax.Array
    new: bool


def known_tokens(full: Feed, *, lean: Feed, cache: TokenCache, encode: Encode) -> Feed:
    """Replaces `token_image` of a feed by `token_ids`, uint16 `[b, tokens]`.

    Ids come from the cache, or from `encode`, which is dispatched one batch ahead so that a device
    computes them before it gets to the step that needs them. While the cache has the ids, `lean` is
    read in place of `full`: it need not make the tokenizer's view.

    Args:
      full: batches with `image` and `token_image`.
      lean: the same batches without `token_image`.
      cache: this host's.
      encode: from `local_encoder`.
    """
    counts = {"tokenized_images": 0.0, "images_with_known_tokens": 0.0}

    def tokenised(start_step: int) -> Iterator[_Tokenised]:
        step, reads_lean, lean_failed_at, lean_works = start_step, False, -1, True
        while True:
            for batch in (lean if reads_lean else full).training(step):
                known = cache.read(step, images=batch["image"])
                if reads_lean and known is None:
                    reads_lean, lean_failed_at = False, step
                    break  # reads this batch again, with the tokenizer's view
                ids = encode(batch) if known is None else known
                new = known is None
                counts["tokenized_images" if new else "images_with_known_tokens"] += len(ids)
                batch.pop("token_image", None)
                yield _Tokenised(step, batch, ids, new)
                if not new and not reads_lean and step == lean_failed_at:
                    logging.warning(
                        "token cache: view 1 depends on view 2, so both are made for every batch"
                    )
                    lean_works = False
                step += 1
                if not new and not reads_lean and lean_works:
                    reads_lean = True
                    break

    def training(start_step: int) -> Iterator[HostBatch]:
        ahead: collections.deque[_Tokenised] = collections.deque()
        for newest in tokenised(start_step):
            ahead.append(newest)
            if len(ahead) < 2:
                continue
            due = ahead.popleft()
            ids = np.asarray(due.ids)
            if due.new:
                cache.write(due.step, images=due.batch["image"], ids=ids)
            yield due.batch | {"token_ids": ids}

    def metrics() -> dict[str, float]:
        of_full, of_lean = full.metrics(), lean.metrics()
        return {name: value + of_lean[name] for name, value in of_full.items()} | counts

    return dataclasses.replace(full, training=training, metrics=metrics)
