"""The host's part of segmenting a whole image: resized, cut into windows, packed into a batch.

    prepared = prepare_image(image_uint8, config=InferenceConfig(), crop=512)
    rooms = Rooms(tile=256)
    batch = pack([prepared], [label_map], images=1, crop=512, rooms=rooms)  # sliding.py takes it

A pass is one scale, mirrored or not: a resized image and the windows that cover it. The device
(`sliding.py`) works on the original image in square tiles; which windows reach a tile is settled
here, so that everything the device is given has a fixed shape.

Shapes: b images, k windows, t tiles, s the side of a window in pixels.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from beit_jax.config import check
from beit_jax.config.segment import IGNORE, InferenceConfig
from beit_jax.segmentation.resize import resize_bilinear
from beit_jax.types import HostBatch

Size = tuple[int, int]  # height, width, in pixels

# Coordinates are exact fractions: numerators up to 2 · (original side) · (resized side) in int32.
_LARGEST_PRODUCT = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """Where a window lies.

    Attributes:
      index: of its pass.
      resized: size of the image in this pass.
      corner: its top and left in the resized (and mirrored) image.
      mirrored: whether the pass sees the image mirrored left to right.
    """

    index: int
    resized: Size
    corner: Size
    mirrored: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """An image as windows.

    Attributes:
      size: height and width of the original image.
      pixels: uint8 `[k, s, s, 3]`; zero beyond an image that is smaller than a window.
      windows: one for each of `pixels`, pass after pass.
      shares: float32 `[k, 2, s]`: what a row and a column of a window count: 1 / (how many windows
        of the pass have that row), 0 beyond the image.
    """

    size: Size
    pixels: np.ndarray
    windows: tuple[Window, ...]
    shares: np.ndarray


def check_windows(config: InferenceConfig, *, crop: int) -> None:
    """Raises ConfigError where windows of `crop` pixels would leave gaps or cannot be scaled."""
    if config.mode == "slide":
        check(
            config.stride <= crop,
            "stride",
            f"{config.stride} leaves gaps between windows of {crop}",
        )
    else:
        check(config.scales == (1.0,), "scales", "mode 'whole' has one window, which has one scale")


def passes(config: InferenceConfig) -> int:
    """How many times an image is segmented: for every scale, and mirrored."""
    return len(config.scales) * (2 if config.flip else 1)


def resized_sizes(
    size: Size, *, config: InferenceConfig, crop: int, shorter: int, longer: int
) -> list[Size]:
    """To what an image is resized at each of the scales.

    mmseg's rule: the largest size of the same shape whose sides are within both limits
    (mmcv.rescale_size, which rounds halves up); with `fill_window` the shorter side alone is set,
    to at least a window (SETR_Resize of unilm's semantic_segmentation/mmcv_custom).

    Args:
      size: of the image.
      config: how it is segmented.
      crop: side of a window.
      shorter: limit of the shorter side at scale 1.
      longer: limit of the longer side at scale 1.
    """
    if config.mode == "whole":
        return [(crop, crop)]
    low, high = min(size), max(size)
    sizes = []
    for scale in config.scales:
        limit = int(shorter * scale)
        if config.fill_window:
            factor = max(crop, limit) / low
        else:
            # Limits are of the longer and of the shorter side, whichever way they were given.
            both = (limit, int(longer * scale))
            factor = min(max(both) / high, min(both) / low)
        # An image of one row and many columns would have no row left.
        height, width = (max(1, int(side * factor + 0.5)) for side in size)
        sizes.append((height, width))
    return sizes


def starts(side: int, *, crop: int, stride: int) -> list[int]:
    """Where windows begin along a side; the last is shifted back to end with the image.

    mmseg's slide_inference (models/segmentors/encoder_decoder.py).
    """
    room = max(side - crop, 0)
    return [min(k * stride, room) for k in range(-(-room // stride) + 1)]


def prepare_image(
    image: np.ndarray,
    *,
    config: InferenceConfig,
    crop: int,
    shorter: int | None = None,
    longer: int | None = None,
) -> Prepared:
    """Resizes an image as often as it is segmented and cuts it into windows.

    Args:
      image: uint8 `[h, w, 3]`, RGB, of any size.
      config: stride, scales, mirroring.
      crop: s, side of a window: what the model takes.
      shorter: `SegmentDataConfig.shorter`; None: the crop.
      longer: `SegmentDataConfig.longer`; None: four times the shorter one.

    Raises:
      ConfigError: no RGB image, windows that leave gaps, or an image that is scaled to more than
        2^30 / (its own side) pixels.
    """
    check_windows(config, crop=crop)
    hint = "np.asarray(picture.convert('RGB')) makes one of Pillow's"
    check(
        hasattr(image, "dtype") and hasattr(image, "ndim"),  # NumPy's, JAX's
        "image",
        f"must be a uint8 array [h, w, 3], not {type(image).__name__}; {hint}",
    )
    rgb = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size > 0
    check(rgb, "image", f"must be uint8 [h, w, 3], not {image.dtype} {image.shape}")
    size: Size = (image.shape[0], image.shape[1])
    shorter = shorter or crop
    stride = config.stride if config.mode == "slide" else crop
    pixels: list[np.ndarray] = []
    shares: list[tuple[np.ndarray, np.ndarray]] = []
    windows: list[Window] = []
    index = 0
    for resized in resized_sizes(
        size, config=config, crop=crop, shorter=shorter, longer=longer or 4 * shorter
    ):
        for old, new in zip(size, resized, strict=True):
            check(old * new < _LARGEST_PRODUCT, "image", f"{size} is too large for size {resized}")
        whole = resize_bilinear(image, size=resized)
        rows, columns = (starts(side, crop=crop, stride=stride) for side in resized)
        row_shares = _shares(rows, side=resized[0], crop=crop)
        column_shares = _shares(columns, side=resized[1], crop=crop)
        corners = list(itertools.product(rows, columns))
        for mirrored in (False, True) if config.flip else (False,):
            seen = whole[:, ::-1] if mirrored else whole
            pixels += [_window_pixels(seen, corner, crop=crop) for corner in corners]
            shares += itertools.product(row_shares, column_shares)
            windows += [
                Window(index=index, resized=resized, corner=corner, mirrored=mirrored)
                for corner in corners
            ]
            index += 1
    return Prepared(
        size=size, pixels=np.stack(pixels), windows=tuple(windows), shares=np.asarray(shares)
    )


def _window_pixels(image: np.ndarray, corner: Size, *, crop: int) -> np.ndarray:
    """The window at a corner: uint8 `[crop, crop, 3]`, zero beyond the image."""
    top, left = corner
    cut = image[top : top + crop, left : left + crop]
    pixels = np.zeros((crop, crop, 3), np.uint8)
    pixels[: cut.shape[0], : cut.shape[1]] = cut
    return pixels


def _shares(first: list[int], *, side: int, crop: int) -> np.ndarray:
    """1 / hits of every pixel of every window along one side: float32 `[len(first), crop]`."""
    hits = np.zeros(side, np.int64)
    for start in first:
        hits[start : start + crop] += 1
    shares = np.zeros((len(first), crop), np.float32)
    for row, start in zip(shares, first, strict=True):
        part = hits[start : start + crop]
        row[: len(part)] = 1 / part
    return shares


class Rooms:
    """The fixed shape of batches: for how many windows and tiles there is room.

    It grows by powers of two and never shrinks, so that a whole data set compiles a few times at
    most; the device's loops end with the windows that there are, so free room costs no time. It
    costs memory: 4 · K · c · q² bytes of logits for each image of a batch (`sliding.py`), 80 MB for
    8 windows of the official base model at 512, 4 GB for 256 of its multi-scale test at 640.

    Args:
      tile: side of a tile in pixels (`InferenceConfig.tile`).
      agree: this host's needs → the largest of all hosts (`[windows, tiles]`), where several hosts
        make one global batch; called once per batch.
    """

    def __init__(
        self, *, tile: int, agree: Callable[[list[int]], list[int]] = lambda needed: needed
    ) -> None:
        self.tile = tile
        self._agree = agree
        self._largest = (1, 1)

    def grow(self, prepared: Sequence[Prepared]) -> tuple[int, int]:
        """Windows and tiles that a batch with these images has room for."""
        windows = max([len(each.windows) for each in prepared], default=1)
        tiles = max([_count_tiles(each.size, tile=self.tile) for each in prepared], default=1)
        needed = self._agree([windows, tiles])
        larger = [
            max(old, 1 << (new - 1).bit_length())
            for old, new in zip(self._largest, needed, strict=True)
        ]
        self._largest = (larger[0], larger[1])
        return self._largest


def _count_tiles(size: Size, *, tile: int) -> int:
    return (-(-size[0] // tile)) * (-(-size[1] // tile))


def pack(
    prepared: Sequence[Prepared],
    labels: Sequence[np.ndarray | None] | None = None,
    *,
    images: int,
    crop: int,
    rooms: Rooms,
) -> HostBatch:
    """One batch of fixed shape.

    Args:
      prepared: at most `images`; the rest of the batch is padding, which counts nowhere.
      labels: for each a class map uint8 `[h, w]` at the original size, or None, which counts
        nowhere; None in their place: the batch is not to be compared with labels.
      images: b, this host's images.
      crop: s; also known where no image is left.
      rooms: K windows and T tiles of side tile that there is room for.

    Returns:
      "windows" uint8 `[b, K, s, s, 3]`, "shares" float32 `[b, K, 2, s]`, "resized", "corner" int32
      `[b, K, 2]`, "mirrored" bool `[b, K]`, "window_count" int32 `[b]`; "size" int32 `[b, 2]`;
      "tile_corner" int32 `[b, T, 2]`, "tile_count" int32 `[b]`, "reaching" int32 `[b, T, K]`, the
      windows that reach a tile, pass after pass, "reaching_count" int32 `[b, T]`, "closes" bool
      `[b, T, K]`, whether one is its pass' last at this tile; with labels "labels" uint8
      `[b, T, tile, tile]`, 255 (ignored) outside an image.

    Raises:
      ConfigError: a label map is not 8-bit or not of its image's size.
    """
    slots, tiles = rooms.grow(prepared)
    batch = _empty_batch(images=images, slots=slots, tiles=tiles, crop=crop)
    for i, each in enumerate(prepared):
        count = len(each.windows)
        batch["windows"][i, :count] = each.pixels
        batch["shares"][i, :count] = each.shares
        batch["resized"][i, :count] = [window.resized for window in each.windows]
        batch["corner"][i, :count] = [window.corner for window in each.windows]
        batch["mirrored"][i, :count] = [window.mirrored for window in each.windows]
        batch["window_count"][i] = count
        batch["size"][i] = each.size
        _add_tiles(batch, i, each, tile=rooms.tile)
    if labels is not None:
        batch["labels"] = np.full((images, tiles, rooms.tile, rooms.tile), IGNORE, np.uint8)
        for i, (each, classes) in enumerate(zip(prepared, labels, strict=True)):
            if classes is not None:
                fits = classes.shape == each.size and classes.dtype == np.uint8
                found = f"{classes.dtype} {classes.shape}"
                check(fits, "labels", f"must be uint8 {each.size} as the image is, not {found}")
                _cut(classes, batch["labels"][i], tile=rooms.tile)
    return batch


def _empty_batch(*, images: int, slots: int, tiles: int, crop: int) -> HostBatch:
    """A batch of padding; see `pack`."""
    return {
        "windows": np.zeros((images, slots, crop, crop, 3), np.uint8),
        "shares": np.zeros((images, slots, 2, crop), np.float32),
        "resized": np.ones((images, slots, 2), np.int32),
        "corner": np.zeros((images, slots, 2), np.int32),
        "mirrored": np.zeros((images, slots), bool),
        "window_count": np.zeros(images, np.int32),
        "size": np.ones((images, 2), np.int32),
        "tile_corner": np.zeros((images, tiles, 2), np.int32),
        "tile_count": np.zeros(images, np.int32),
        "reaching": np.zeros((images, tiles, slots), np.int32),
        "reaching_count": np.zeros((images, tiles), np.int32),
        "closes": np.zeros((images, tiles, slots), bool),
    }


def _add_tiles(batch: HostBatch, i: int, prepared: Prepared, *, tile: int) -> None:
    """Which windows reach each tile of image `i`, pass after pass."""
    rows, columns = (_reach(prepared, axis=axis, tile=tile) for axis in (0, 1))
    index = np.asarray([window.index for window in prepared.windows])
    for t, (top, left) in enumerate(_tile_corners(prepared.size, tile=tile)):
        reaching = np.flatnonzero(rows[:, top // tile] & columns[:, left // tile])
        count = len(reaching)
        batch["tile_corner"][i, t] = top, left
        batch["reaching"][i, t, :count] = reaching
        batch["reaching_count"][i, t] = count
        # The last of a pass is followed by one of another pass, or by none.
        batch["closes"][i, t, :count] = np.diff(index[reaching], append=-1) != 0
        batch["tile_count"][i] = t + 1


def _reach(prepared: Prepared, *, axis: int, tile: int) -> np.ndarray:
    """Whether pixels of a row (axis 0) or column (1) of tiles are interpolated from a window.

    Returns:
      bool `[k, tiles along the axis]`.
    """
    side = prepared.size[axis]
    first = np.arange(0, side, tile)
    last = np.minimum(first + tile, side) - 1
    resized = np.asarray([window.resized[axis] for window in prepared.windows])[:, None]
    begin = np.asarray([window.corner[axis] for window in prepared.windows])[:, None]
    end = begin + np.count_nonzero(prepared.shares[:, axis], axis=-1)[:, None]

    def position(pixel: np.ndarray) -> np.ndarray:  # in the resized image
        return np.clip((pixel + 0.5) * (resized / side) - 0.5, 0, resized - 1)

    low, high = position(first), position(last)
    if axis == 1:
        mirrored = np.asarray([window.mirrored for window in prepared.windows])[:, None]
        # A mirrored pass begins with the image's last column.
        low, high = (
            np.where(mirrored, resized - 1 - high, low),
            np.where(mirrored, resized - 1 - low, high),
        )
    return (high > begin - 1) & (low < end)


def _tile_corners(size: Size, *, tile: int) -> list[Size]:
    """Top and left of the tiles that cover an image, row after row."""
    return [(top, left) for top in range(0, size[0], tile) for left in range(0, size[1], tile)]


def _cut(classes: np.ndarray, tiles: np.ndarray, *, tile: int) -> None:
    """Copies a class map `[h, w]` into its tiles `[T, tile, tile]`."""
    size: Size = (classes.shape[0], classes.shape[1])
    for t, (top, left) in enumerate(_tile_corners(size, tile=tile)):
        part = classes[top : top + tile, left : left + tile]
        tiles[t, : part.shape[0], : part.shape[1]] = part


def assemble(tiles: np.ndarray, *, size: Size) -> np.ndarray:
    """Puts the tiles of one image together again.

    Args:
      tiles: `[T, tile, tile]`, at least as many as the image has; of `sliding.predict`.
      size: height and width of the original image.

    Returns:
      `[h, w]`, of the same dtype.
    """
    tile = tiles.shape[1]
    whole = np.empty(size, tiles.dtype)
    for t, (top, left) in enumerate(_tile_corners(size, tile=tile)):
        height, width = min(tile, size[0] - top), min(tile, size[1] - left)
        whole[top : top + height, left : left + width] = tiles[t, :height, :width]
    return whole
