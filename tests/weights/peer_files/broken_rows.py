"""Files that are no BEiT of this layout, damaged files, and files that are something else."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from tests.weights.peer_files import files
from tests.weights.peer_files.official_rows import (
    Pack,
    State,
    classifier,
    packed,
    saved,
    training_arguments,
)
from tests.weights.peer_files.row import Built, Refused, Row


def _mm_names(state: State) -> State:
    """The names of OpenMMLab's BEiT."""
    renamed = {}
    for key, tensor in state.items():
        new = (
            key.replace("blocks.", "layers.")
            .replace(".norm1.", ".ln1.")
            .replace(".norm2.", ".ln2.")
        )
        new = new.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        new = new.replace("patch_embed.proj.", "patch_embed.projection.")
        new = new.replace("fc_norm.", "ln2.")
        if not key.startswith("head."):
            renamed[f"backbone.{new}"] = tensor
    return renamed


def _mmpretrain(state: State) -> Any:
    head = {f"head.fc.{leaf}": state[f"head.{leaf}"] for leaf in ("weight", "bias")}
    return {"meta": {"epoch": 1}, "state_dict": _mm_names(state) | head}


def _mmsegmentation(state: State) -> Any:
    head = {
        "decode_head.conv_seg.weight": state["patch_embed.proj.weight"],
        "auxiliary_head.conv_seg.weight": state["patch_embed.proj.weight"],
    }
    kept = {k: v for k, v in _mm_names(state).items() if ".ln2." not in k or "layers" in k}
    return {"meta": {"epoch": 1}, "state_dict": kept | head}


class _Unknown:
    """A class that no reader may look up."""


def _with_unknown(state: State) -> Any:
    arguments = training_arguments()
    arguments.callback = _Unknown()
    return {"model": state, "args": arguments}


def _text(name: str, content: str | bytes) -> Callable[[str], Built]:
    def build(folder: str) -> Built:
        path = pathlib.Path(folder, name)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return Built(path=str(path))

    return build


LFS = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 346293852\n"
)
HTML = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


def _broken(name: str, line: str, build: Callable[[str], Built], *, fast: bool = False) -> Row:
    return Row(name=f"file: {name}", build=build, outcome=Refused(line=line), fast=fast)


def _wrong(pack: Pack) -> Callable[[str], Built]:
    return functools.partial(packed, pack=pack)


def _whole_module(folder: str) -> Built:
    """`torch.save(model)`: a pickle of timm's own classes."""
    model, _ = classifier()
    return Built(path=files.write_pth(f"{folder}/model.pth", model))


def _torchscript(folder: str) -> Built:
    import torch

    model, _ = classifier()
    pixels = torch.zeros(1, 3, 64, 64)
    traced = torch.jit.trace(model, pixels)
    traced.save(f"{folder}/model.pt")
    return Built(path=f"{folder}/model.pt")


def _folder(*names: str) -> Callable[[str], Built]:
    """A folder of files that nothing here reads, perhaps beside BEiT's config.json."""

    def build(folder: str) -> Built:
        path = pathlib.Path(folder, "model")
        path.mkdir()
        for name in names:
            (path / name).write_text('{"model_type": "beit"}')
        return Built(path=str(path))

    return build


def _truncated(state: State, folder: str) -> str:
    path = pathlib.Path(files.write_pth(f"{folder}/beit.pth", {"model": state}))
    path.write_bytes(path.read_bytes()[:5000])
    return str(path)


ROWS = (
    _broken(
        "OpenMMLab's classifier",
        "mmpretrain|OpenMMLab|classifi",
        _wrong(saved("mm.pth", _mmpretrain)),
        fast=True,
    ),
    _broken(
        "OpenMMLab's segmentation model", "segmentation", _wrong(saved("mm.pth", _mmsegmentation))
    ),
    _broken(
        "an object that nobody knows",
        r"_Unknown",
        _wrong(saved("beit.pth", _with_unknown)),
        fast=True,
    ),
    _broken(
        "no tensors",
        "epoch",
        _wrong(saved("beit.pth", lambda s: {"epoch": 3, "loss": 0.5, "best": {"a": 1}})),
        fast=True,
    ),
    _broken("a list", "list", _wrong(saved("beit.pth", lambda s: [1, 2]))),
    _broken(
        "a tensor", "tensor|ndarray|array", _wrong(saved("beit.pth", lambda s: s["cls_token"]))
    ),
    _broken("a whole module of timm", r"it names timm\.", _whole_module),
    _broken("a TorchScript module", "(?i)torchscript|torch.jit", _torchscript),
    _broken(
        "weights of Flax",
        r"flax_model\.msgpack, which is not read",
        _folder("flax_model.msgpack", "config.json"),
    ),
    _broken(
        "weights of TensorFlow",
        r"tf_model\.h5, which is not read",
        _folder("tf_model.h5", "config.json"),
    ),
    _broken("an adapter", "adapter", _folder("adapter_model.safetensors")),
    _broken("shards of FSDP", "torch.distributed", _folder(".metadata", "__0_0.distcp")),
    _broken("an empty folder", "(no|not a) (weights|checkpoint)", _folder()),
    _broken("half a file", r"beit\.pth", _wrong(_truncated)),
    _broken(
        "integers for weights",
        "head.weight.*int",
        _wrong(saved("beit.pth", lambda s: {"model": s | {"head.weight": s["head.weight"].int()}})),
    ),
    _broken(
        "not a number",
        "head.weight.*(?i:nan|finite)",
        _wrong(
            saved(
                "beit.pth",
                lambda s: {"model": s | {"head.weight": s["head.weight"] * float("nan")}},
            )
        ),
    ),
    _broken("Git-LFS pointer, .pth", "(?i)lfs", _text("beit.pth", LFS), fast=True),
    _broken("Git-LFS pointer, safetensors", "(?i)lfs", _text("model.safetensors", LFS)),
    _broken("empty, .pth", "empty", _text("beit.pth", b"")),
    _broken("empty, safetensors", "empty", _text("model.safetensors", b""), fast=True),
    _broken("a web page, .pth", "(?i)html|web page", _text("beit.pth", HTML)),
    _broken("a web page, safetensors", "(?i)html|web page", _text("model.safetensors", HTML)),
    _broken("an error as text", "text", _text("beit.bin", "404: Not Found\n")),
)
