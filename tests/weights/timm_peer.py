"""timm in a process of its own, run by `parity_test`: `python timm_peer.py jobs.json`.

timm imports torchvision everywhere, which has no CPU build beside a CPU torch on PyPI. BEiT uses
nothing of it, so an empty substitute is imported instead, in this process only, since transformers
would take it for the real one.
"""

import importlib.abc
import importlib.machinery
import json
import sys
import types


class _Names(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Hollow(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


class HollowTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Hollow(spec.name)

    def exec_module(self, module):
        pass


def main(jobs: str) -> None:
    """Runs every job of a JSON file: a list of `run`'s arguments."""
    sys.meta_path.insert(0, HollowTorchvision())
    with open(jobs) as file:
        for job in json.load(file):
            run(**job)


def run(
    *, command: str, weights: str, name: str, arguments: dict, images: str, output: str, hub: str
):
    """Loads (or randomises and saves) `weights` strictly and writes logits of `images`."""
    import numpy as np
    import safetensors.torch
    import timm
    import torch

    model = timm.create_model(name, **arguments)
    if command == "load":
        model.load_state_dict(safetensors.torch.load_file(weights), strict=True)
        # As users do it: strict as well, and it must not change the numbers.
        again = timm.create_model(name, checkpoint_path=weights, **arguments)
        for key, tensor in again.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key]), key
        # The files that a push uploads: the model is found by its config.json.
        pushed = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
        with torch.no_grad():
            pixels = torch.from_numpy(np.load(images).transpose(0, 3, 1, 2).copy())
            assert torch.equal(pushed(pixels), model.eval()(pixels))
    else:
        generator = torch.Generator().manual_seed(3)
        width = model.embed_dim
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key or "gamma" in key:
                noise = (1.0 if key.endswith("weight") or "gamma" in key else 0.0) + 0.2 * noise
            elif "table" not in key and "pos_embed" not in key:
                noise = 0.5 * noise / width**0.5
            parameter.data.copy_(noise)
        safetensors.torch.save_file(model.state_dict(), weights)
    with torch.no_grad():
        pixels = torch.from_numpy(np.load(images).transpose(0, 3, 1, 2).copy())
        np.save(output, model.eval()(pixels).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
