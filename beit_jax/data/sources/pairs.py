"""Images with label maps: two folders of files that are matched by name, local or gs://."""

import os
import posixpath
from collections.abc import Iterable

import tensorflow as tf

from beit_jax.config import ConfigError, check
from beit_jax.config.parse import shown
from beit_jax.config.segment import LARGEST_CLASSES
from beit_jax.data.decode import EXTENSIONS, Window, decode_element
from beit_jax.data.label_maps import decode_labels
from beit_jax.data.sources.folder import is_folder, list_files
from beit_jax.data.sources.source import Element, Request, Source, select_split
from beit_jax.files import open_regular, printable

IMAGES = "images"
LABELS = ("labels", "annotations")  # the folder of the maps is called one of these
CLASSES = "classes.txt"
MAP = ".png"
NAMED = 5  # files in an error message
_LARGEST_CLASSES_FILE = 1 << 16  # bytes


def open_pairs(request: Request) -> Source:
    """Opens "pairs:FOLDER" or "pairs:IMAGES,LABELS".

    FOLDER holds `images` and `labels` (or `annotations`). An image and its map have the same path
    in the two folders, whatever comes after the last dot; where both are one folder, its PNGs are
    the maps. The names of the classes are the lines of FOLDER/classes.txt (LABELS/classes.txt of
    two folders), where there is such a file.

    Raises:
      ConfigError: a folder is missing or empty, an image or a map has no partner or more than one,
        `classes.txt` can't be read, or the split leaves no images.
    """
    config, setting = request.config, request.setting
    images, labels, beside = _folders(request)
    pictures: tuple[str, ...] = EXTENSIONS
    if posixpath.normpath(images) == posixpath.normpath(labels):
        pictures = tuple(ending for ending in EXTENSIONS if ending != MAP)
    pairs = _match(
        list_files(images, pictures), list_files(labels, (MAP,)), setting=setting, of=request
    )
    class_names = _class_names(posixpath.join(beside, CLASSES), setting=setting)
    split = select_split(len(pairs), identity=lambda index: pairs[index][0], request=request)

    # Tensors, as in `folder.py` and for the same reasons.
    chosen = [pairs[index] for index in split.tolist()]
    tables = [tf.constant([os.fsencode(pair[side]) for pair in chosen]) for side in (0, 1)]
    starts = os.fsencode(images), os.fsencode(labels)

    def read(index: tf.Tensor, side: int) -> tf.Tensor:
        path = tf.strings.join([starts[side], tables[side][index]], separator="/")
        return tf.io.read_file(path)

    def load(index: tf.Tensor, *, window: Window | None = None) -> Element:
        element = decode_element(
            read(index, 0),
            window=window,
            exif_orientation=config.exif_orientation,
            max_pixels=config.max_pixels,
        )
        if request.label_maps:
            element["segmentation"] = decode_labels(read(index, 1), max_pixels=config.max_pixels)
        return element

    return Source(
        size=len(chosen),
        name=lambda index: printable(os.fsdecode(tables[0][index].numpy())),
        load=load,
        fields=("image", "segmentation") if request.label_maps else ("image",),
        segmentation_classes=class_names,
    )


def _folders(request: Request) -> tuple[str, str, str]:
    """The folders of the images and of the maps, and the one where `classes.txt` may be."""
    value, setting = request.value, request.setting

    def whole(path: str) -> str:
        return path if "://" in path else os.path.expanduser(path)

    root = whole(value)
    if is_folder(root):
        images = posixpath.join(root, IMAGES)
        found = [name for name in LABELS if is_folder(posixpath.join(root, name))]
        check(
            is_folder(images) and len(found) == 1,
            setting,
            f"{shown(value)} must hold a folder {IMAGES} and one of {', '.join(LABELS)}",
        )
        return images, posixpath.join(root, found[0]), root
    commas = [position for position, letter in enumerate(value) if letter == ","]
    for position in commas:  # a name may itself hold commas
        images, labels = whole(value[:position]), whole(value[position + 1 :])
        if images and labels and is_folder(images) and is_folder(labels):
            return images, labels, labels
    if len(commas) == 1:
        parts = value.split(",")
        missing = [part for part in parts if not part or not is_folder(whole(part))]
        raise ConfigError(f"{setting}: no such folder: {' or '.join(map(shown, missing))}")
    raise ConfigError(f"{setting}: no such folder, or two with a comma between: {shown(value)}")


def _match(
    images: list[str], labels: list[str], *, setting: str, of: Request
) -> list[tuple[str, str]]:
    """Pairs of relative paths, in the order of the images."""
    check(bool(images), setting, f"no images in {shown(of.value)} at any depth")
    check(bool(labels), setting, f"no label maps in {shown(of.value)}: there are no {MAP} files")
    by_stem = {}
    for what, names in (("images", images), ("label maps", labels)):
        stems: dict[str, list[str]] = {}
        for name in names:
            stems.setdefault(posixpath.splitext(name)[0], []).append(name)
        double = [" and ".join(map(printable, same)) for same in stems.values() if len(same) > 1]
        check(
            not double,
            setting,
            f"{len(double)} names in {shown(of.value)} have several {what}: {_few(double)}",
        )
        by_stem[what] = {stem: same[0] for stem, same in stems.items()}
    pictures, maps = by_stem["images"], by_stem["label maps"]
    alone = [f"no map for {_few(map(printable, lone))}" for lone in [_lone(pictures, maps)] if lone]
    alone += [
        f"no image for {_few(map(printable, lone))}" for lone in [_lone(maps, pictures)] if lone
    ]
    check(
        not alone,
        setting,
        f"{len(_lone(pictures, maps))} of {len(images)} images and {len(_lone(maps, pictures))} of "
        f"{len(labels)} label maps in {shown(of.value)} have no partner: {'; '.join(alone)}",
    )
    return [(name, maps[stem]) for stem, name in pictures.items()]


def _lone(these: dict[str, str], those: dict[str, str]) -> list[str]:
    return [name for stem, name in these.items() if stem not in those]


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _class_names(path: str, *, setting: str) -> tuple[str, ...]:
    """The lines of `classes.txt`; none where there is no such file."""
    remote = "://" in path
    if not (tf.io.gfile.exists(path) if remote else os.path.lexists(path)):
        return ()
    try:
        with tf.io.gfile.GFile(path, "rb") if remote else open_regular(path) as file:
            text = file.read(_LARGEST_CLASSES_FILE + 1).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{setting}: {shown(path)} is not UTF-8") from None
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(f"{setting}: {shown(path)} can't be read: {reason}") from error
    names = [line.strip() for line in text.rstrip().split("\n")]
    check(
        len(text) <= _LARGEST_CLASSES_FILE
        and len(names) <= LARGEST_CLASSES
        and all(name and name.isprintable() for name in names),
        setting,
        f"{shown(path)} must have the name of one class in each line, at most {LARGEST_CLASSES}",
    )
    return tuple(names)
