"""The peers' libraries in a process of their own: `python -m tests.weights.peer_files.peer`.

Requests come as lines of JSON on stdin and are answered by lines of JSON on stdout. timm needs the
hollow torchvision of `timm_peer`; transformers, which would take it for the real one, is imported
before. Neither may be imported beside TensorFlow, so no test imports them itself.
"""

import contextlib
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.weights import timm_peer
from tests.weights.peer_files.row import Built
from tests.weights.peer_files.table import ROWS

_LIVE: dict[str, Built] = {}
# Fields of a Hugging Face config that say nothing about the model.
_OF_THE_FILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def build(*, row: str, folder: str) -> dict[str, Any]:
    """Builds a row's file, and runs its model on seeded pixels.

    Returns:
      The path and kind of the file; `expected` is an .npz with pixels (channels last), a mask where
      the model takes one, and its output; "" where the model is not run.
    """
    built = ROWS[row].build(folder)
    _LIVE[row] = built
    if built.forward is None:
        return {"path": built.path, "kind": built.kind, "expected": ""}
    inputs = _inputs(built)
    path = f"{folder}/expected.npz"
    np.savez(path, **inputs, output=_run(built.forward, inputs))
    return {"path": built.path, "kind": built.kind, "expected": path}


def again(*, row: str, line: str, path: str) -> dict[str, Any]:
    """Runs the printed line that loads an export of `row`, and compares with the live model.

    Returns:
      Everything that differs: `tensors` are sentences; `config` are fields with the peer's value
      and the export's; `data` has what timm's `resolve_data_config` gives for either; `error` is
      the relative error of the logits, None where the line gives only tensors.
    """
    import timm
    import torch
    import transformers

    built, outcome = _LIVE[row], ROWS[row].outcome
    loaded = eval(line, {"timm": timm, "torch": torch, "transformers": transformers})
    is_model = isinstance(loaded, torch.nn.Module)
    wanted = built.state if built.state is not None else built.model.state_dict()
    wanted = {key: tensor for key, tensor in wanted.items() if key not in outcome.lost}
    found = loaded.state_dict() if is_model else loaded
    compare = _bags if outcome.renamed else _differences
    reply: dict[str, Any] = {"tensors": compare(wanted, found), "config": [], "data": {}}
    if isinstance(loaded, transformers.PreTrainedModel):
        reply["tensors"] += _not_strict(loaded, path)
        reply["config"] = _config_differences(built.model.config, loaded.config)
    elif is_model:
        reply["data"] = {"peer": _data(_original(built)), "export": _data(loaded)}
    reply["error"] = None
    if is_model and built.forward is not None:
        inputs = _inputs(built)
        expected = _run(built.forward, inputs)
        # The same method of another object: `forward` is a function of the model and its inputs.
        actual = _run(lambda *given: built.forward(*given, model=loaded.eval()), inputs)
        reply["error"] = float(np.abs(actual - expected).max() / np.abs(expected).max())
    return reply


def _original(built: Built) -> Any:
    """timm's model of a folder, with the folder's settings; the live one's are of its name."""
    import timm

    config = f"{built.path}/config.json"
    if os.path.exists(config):
        with open(config) as file:
            if "pretrained_cfg" in json.load(file):
                return timm.create_model(f"local-dir:{built.path}", pretrained=True)
    return built.model


def _data(model: Any) -> dict[str, Any]:
    import timm

    return dict(timm.data.resolve_data_config(model=model))


def _inputs(built: Built) -> dict[str, np.ndarray]:
    rng, size = np.random.default_rng(11), built.image_size
    inputs = {"pixels": rng.normal(size=(2, size, size, 3)).astype(np.float32)}
    if built.kind == "pretrain":
        inputs["mask"] = rng.random((2, (size // built.patch_size) ** 2)) < 0.4
    return inputs


def _run(forward: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    import torch

    pixels = torch.from_numpy(inputs["pixels"].transpose(0, 3, 1, 2).copy())
    masks = [torch.from_numpy(inputs["mask"])] if "mask" in inputs else []
    with torch.no_grad():
        return forward(pixels, *masks).numpy()


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    import torch

    said = [f"{key} is missing" for key in wanted if key not in found]
    said += [f"{key} is unexpected" for key in found if key not in wanted]
    for key in wanted:
        if key in found and not torch.equal(_float(wanted[key]), _float(found[key])):
            said.append(f"{key} differs")
    return said


def _bags(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Compares tensors whatever their names are."""
    bags = [
        sorted(
            (str(tuple(t.shape)), hashlib.sha256(_float(t).contiguous().numpy()).hexdigest())
            for t in state.values()
        )
        for state in (wanted, found)
    ]
    return [] if bags[0] == bags[1] else ["the tensors are not the same ones"]


def _float(tensor: Any) -> Any:
    return tensor.detach().float()


def _not_strict(loaded: Any, path: str) -> list[str]:
    """What transformers itself says about names when it loads the folder as this class."""
    bare = {"add_pooling_layer": False} if getattr(loaded, "pooler", True) is None else {}
    _, info = type(loaded).from_pretrained(path, output_loading_info=True, **bare)
    return [f"{kind}: {keys}" for kind, keys in info.items() if keys]


def _config_differences(wanted: Any, found: Any) -> list[tuple[str, Any, Any]]:
    """Fields of the peer's config that the export does not have with the same value."""
    found = found.to_dict()
    return [
        (field, value, found.get(field))
        for field, value in wanted.to_dict().items()
        if field not in _OF_THE_FILE and found.get(field) != value
    ]


_COMMANDS = {"build": build, "again": again}


def main() -> None:
    """Answers requests until stdin ends."""
    # Progress bars and prints of the libraries go to stderr, answers alone to stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import transformers
    import transformers.models.beit.modeling_beit
    import transformers.models.data2vec.modeling_data2vec_vision

    transformers.utils.logging.disable_progress_bar()
    sys.meta_path.insert(0, timm_peer.HollowTorchvision())
    torch.set_num_threads(1)
    for request in sys.stdin:
        asked = json.loads(request)
        with contextlib.redirect_stdout(sys.stderr):
            try:
                answer = _COMMANDS[asked.pop("command")](**asked)
            except Exception:  # said to the test that asked, which fails with it
                answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
