"""Bilinear resizing of 8-bit images as OpenCV does it, in NumPy."""

import numpy as np

# OpenCV's weights of 8-bit images are multiples of 2^-11 (modules/imgproc/src/resize.cpp).
_BITS = 11


def resize_bilinear(image: np.ndarray, *, size: tuple[int, int]) -> np.ndarray:
    """Resizes like cv2.INTER_LINEAR: half-pixel centres, clamped at the edges, no antialiasing.

    The official models were trained and evaluated on images resized like this (mmcv.imresize).

    Args:
      image: uint8 `[h, w, c]`.
      size: height and width of the result.

    Returns:
      uint8 `[*size, c]`, within one level of OpenCV's.
    """
    if size == image.shape[:2]:
        return image
    top, bottom, below = _neighbours(image.shape[0], size[0])
    left, right, beside = _neighbours(image.shape[1], size[1])
    beside = beside[:, None]
    # The rows that are needed, once each: an enlarged image reads the same row several times.
    rows = np.unique(np.concatenate([top, bottom]))
    needed = image[rows]
    wide = np.take(needed, left, axis=1).astype(np.int32) * ((1 << _BITS) - beside)
    wide += np.take(needed, right, axis=1) * beside
    below = below[:, None, None]
    mixed = wide[np.searchsorted(rows, top)] * ((1 << _BITS) - below)
    mixed += wide[np.searchsorted(rows, bottom)] * below
    mixed += 1 << (2 * _BITS - 1)
    mixed >>= 2 * _BITS
    return mixed.astype(np.uint8)


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each new pixel two old ones and the second one's weight, an int32 in units of 2^-11."""
    position = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    first = position.astype(np.int64)
    weight = np.rint((position - first) * (1 << _BITS)).astype(np.int32)
    return first, np.minimum(first + 1, old - 1), weight
