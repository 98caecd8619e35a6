"""Randomised models, and tensors in the containers that other programs write them in."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any


def randomize(model: Any, seed: int = 7) -> Any:
    """Draws every parameter anew, so that none is zero or one and each changes the output."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith((".weight", "lambda_1", "lambda_2", "gamma_1", "gamma_2"))
            if parameter.ndim == 1 and is_scale:
                parameter.copy_(1 + 0.2 * noise)
            elif any(part in name for part in ("table", "pos", "token")):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(0.7 * noise / parameter[0].numel() ** 0.5)
        for name, buffer in model.named_buffers():  # BatchNorm's statistics
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(20_000)
    return model.eval()


def read_safetensors(path: str) -> dict[str, Any]:
    """The tensors of a file."""
    import safetensors.torch

    return safetensors.torch.load_file(path)


def write_safetensors(path: str, state: Mapping[str, Any], metadata: Any = None) -> str:
    """Writes a file, whose metadata says "pt" as transformers' does; returns its path."""
    import safetensors.torch

    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
    safetensors.torch.save_file(tensors, path, metadata or {"format": "pt"})
    return path


def write_pth(path: str, content: Any, **arguments: Any) -> str:
    """What `torch.save` writes; returns its path."""
    import torch

    os.makedirs(os.path.dirname(path), exist_ok=True)
    torch.save(content, path, **arguments)
    return path


def write_json(path: str, value: Any) -> None:
    """Writes a JSON file as the libraries do."""
    pathlib.Path(path).write_text(json.dumps(value, indent=2) + "\n")


def change_json(path: str, change: Callable[[dict], Any]) -> None:
    """Changes a JSON file in place: `change` gets its content and gives the new one."""
    value = json.loads(pathlib.Path(path).read_text())
    write_json(path, change(value))


def prefixed(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The same tensors, every name behind a prefix."""
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}
