"""A folder of image files at any depth, on a disk or in an object store."""

import os
from collections.abc import Iterator

import tensorflow as tf
from absl import logging

from beit_jax import progress
from beit_jax.config import ConfigError
from beit_jax.config.parse import shown
from beit_jax.data.decode import EXTENSIONS, Window, decode_element
from beit_jax.data.sources.source import Element, Request, Source, select_split
from beit_jax.files import printable, visible_files

NAMED = 5  # skipped folders and files in the warning


def open_folder(request: Request) -> Source:
    """Opens "folder:PATH". The first folder under PATH is an image's class.

    Raises:
      ConfigError: there is no such folder, it holds no images, or the split leaves none.
    """
    path, config = request.value, request.config
    root = path if "://" in path else os.path.expanduser(path)
    if not path or not is_folder(root):
        raise ConfigError(f"{request.setting}: no such folder: {shown(path)}")
    found = list_files(root, EXTENSIONS)
    if not found:
        raise ConfigError(
            f"{request.setting}: no images in {shown(path)} at any depth; looked for"
            f" {', '.join(EXTENSIONS)}"
        )
    classes = _class_folders(found)
    split = select_split(len(found), identity=lambda index: found[index], request=request)
    names = [found[index] for index in split.tolist()]

    # One tensor and not a Python list, which at 14 million names would take memory on every host.
    # Bytes, since a file system may hold names that are not UTF-8.
    table = tf.constant([os.fsencode(name) for name in names])
    start = os.fsencode(root)
    size = len(names)
    number = {class_name: index for index, class_name in enumerate(classes)}
    labels = tf.constant([number[_top(name)] for name in names] if classes else [], tf.int32)

    def name(index: int) -> str:
        return printable(os.fsdecode(table[index].numpy()))

    def load(index: tf.Tensor, *, window: Window | None = None) -> Element:
        data = tf.io.read_file(tf.strings.join([start, table[index]], separator="/"))
        decoded = decode_element(
            data,
            window=window,
            exif_orientation=config.exif_orientation,
            max_pixels=config.max_pixels,
        )
        return decoded | ({"label": labels[index]} if classes else {})

    fields = ("image", "label") if classes else ("image",)
    return Source(size=size, name=name, load=load, fields=fields, classes=classes)


def _class_folders(names: list[str]) -> tuple[str, ...]:
    """The top folders, sorted, as the classes; none where images lie beside them."""
    if any("/" not in name for name in names):
        return ()
    return tuple(sorted({_top(name) for name in names}))


def _top(name: str) -> str:
    return name.split("/")[0]


def is_folder(path: str) -> bool:
    """Whether there is such a folder, local or in an object store."""
    # (TensorFlow's isdir takes only paths that are UTF-8.)
    return bool(tf.io.gfile.isdir(path) if "://" in path else os.path.isdir(path))


def list_files(root: str, extensions: tuple[str, ...]) -> list[str]:
    """Paths of all images under a folder, at any depth, sorted so that all hosts agree.

    Args:
      root: the folder, local or in an object store.
      extensions: what counts as an image, in small letters.

    Returns:
      Paths relative to `root`, with "/" between folders.
    """
    names: list[str] = []
    others: list[str] = []
    doing = f"listing {printable(root)}"
    for name in progress.over(_walk(root, extensions), doing=doing, unit="files"):
        (names if name.lower().endswith(extensions) else others).append(name)
    if others:
        logging.info(
            "%s: %d files are not images by their extension and are skipped, such as %s",
            printable(root),
            len(others),
            ", ".join(printable(name) for name in sorted(others)[:3]),
        )
    return sorted(names)


def _walk(root: str, extensions: tuple[str, ...] = EXTENSIONS) -> Iterator[str]:
    """All files under `root` except hidden ones, as relative paths with "/"; follows links.

    Folders that can't be listed, and what is named like an image but is no regular file, are left
    out with a warning.
    """
    if "://" in root:
        yield from _walk_remote(root, "", extensions)
        return
    skipped: list[str] = []

    def note(path: str, reason: str) -> None:
        if not path or path.lower().endswith(("/", *extensions)):
            skipped.append(f"{printable(path)} ({reason})")

    yield from visible_files(root, skipped=note)
    if skipped:
        logging.warning(
            "%s: %d folders or files can't be read as such and are left out: %s%s",
            printable(root),
            len(skipped),
            ", ".join(sorted(skipped)[:NAMED]),
            ", ..." if len(skipped) > NAMED else "",
        )


def _walk_remote(root: str, prefix: str, extensions: tuple[str, ...]) -> Iterator[str]:
    """`_walk` for object stores. tf.io.gfile.walk would make a request for every file."""
    for entry in tf.io.gfile.listdir(f"{root.rstrip('/')}/{prefix}"):
        name = prefix + entry.rstrip("/")
        if not entry.rstrip("/") or entry.startswith("."):
            continue
        is_image = entry.lower().endswith(extensions)
        if entry.endswith("/") or (
            not is_image and tf.io.gfile.isdir(f"{root.rstrip('/')}/{name}")
        ):
            yield from _walk_remote(root, name + "/", extensions)
        else:
            yield name
