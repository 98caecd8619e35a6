"""Files and folders that people keep weights in, written live: rows of tables, one a container.

    FILES["timm"]         # ("model_best.pth.tar", function) for torch.save
    PLACES["DeepSpeed"]   # writes a folder or file, gives its path

DeepSpeed's and Lightning's are in the layouts of `engine.py` (`_save_checkpoint`) and
`dump_checkpoint`. Every function takes `(folder, torch, state)` or `(torch, state)`.
"""

import argparse
import collections
import io
import json
import pathlib
import zipfile
from collections.abc import Callable

import numpy as np
import safetensors.numpy

CONFIG = {"model_type": "beit"}


def state() -> dict[str, np.ndarray]:
    """A few tensors under a BEiT's names."""
    rng = np.random.default_rng(0)
    shapes = {
        "cls_token": (1, 1, 8),
        "patch_embed.proj.weight": (8, 3, 2, 2),
        "blocks.0.attn.qkv.weight": (24, 8),
        "blocks.1.attn.qkv.weight": (24, 8),
        "head.bias": (5,),
    }
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def one_line(error) -> str:
    """An error's text, which is one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def other(state):
    """Another set of the same names, which must not be taken for the first."""
    return {key: array + 1 for key, array in state.items()}


def tensors(torch, state, prefix=""):
    return collections.OrderedDict(
        (f"{prefix}{key}", torch.from_numpy(array.copy())) for key, array in state.items()
    )


# Single files: name of the file → what torch.save gets.
def lightning(torch, state, prefix="model.", **more):
    return {
        "epoch": 3,
        "global_step": 400,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": tensors(torch, state, prefix) | more,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.ones(())}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"arch": "beit_base_patch16_224", "lr": 1e-3},
    }


def deepspeed(torch, module):
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [collections.OrderedDict((k, v.shape) for k, v in module.items())],
        "frozen_param_shapes": None,
        "sparse_tensor_module_names": set(),
        "global_steps": 10,
        "ds_config": {"train_batch_size": 8, "zero_optimization": {"stage": 1}},
        "ds_version": "0.15.4",
        "epoch": 1,
    }


FILES: dict[str, tuple[str, Callable]] = {
    "bare": ("x.pth", tensors),
    "official": ("x.pth", lambda t, s: {"model": tensors(t, s), "epoch": 3, "args": None}),
    "official, args": (
        "checkpoint-99.pth",
        lambda t, s: {
            "model": tensors(t, s),
            "optimizer": {"state": {0: {"exp_avg": t.ones(3)}}, "param_groups": []},
            "args": argparse.Namespace(model="beit_base_patch16_224", output_dir=pathlib.Path("x")),
        },
    ),
    "timm": (
        "model_best.pth.tar",
        lambda t, s: {
            "epoch": 1,
            "arch": "beit_base_patch16_224",
            "state_dict": tensors(t, s),
            "optimizer": {"state": {}, "param_groups": []},
            "version": 2,
            "args": argparse.Namespace(lr=0.1),
            "metric": np.float64(77.5),
        },
    ),
    "OpenMMLab": ("epoch_3.pth", lambda t, s: {"meta": {"epoch": 3}, "state_dict": tensors(t, s)}),
    "PyTorch's tutorial": ("x.pt", lambda t, s: {"model_state_dict": tensors(t, s), "loss": 0.5}),
    "pycls": ("x.pyth", lambda t, s: {"epoch": 3, "model_state": tensors(t, s)}),
    "an unknown key": ("x.pt", lambda t, s: {"network": tensors(t, s), "epoch": 1}),
    "facts that are tensors": (
        "x.pt",
        lambda t, s: {"net": tensors(t, s), "best_acc": t.tensor(81.0), "rng": t.get_rng_state()},
    ),
    "Composer": (
        "ep1-ba500-rank0.pt",
        lambda t, s: {
            "state": {
                "model": tensors(t, s, "model."),
                "optimizers": {"AdamW": {"state": {"model.head.bias": {"exp_avg": t.ones(5)}}}},
                "callbacks": [],
            },
            "rng": [{"python": (3, (1, 2), None), "torch": t.get_rng_state()}],
        },
    ),
    "wrapped twice": ("x.pt", lambda t, s: {"model": {"module": tensors(t, s)}}),
    "wrapped thrice": ("x.pt", lambda t, s: {"state_dict": {"model": {"module": tensors(t, s)}}}),
    "DeepSpeed's file": (
        "mp_rank_00_model_states.pt",
        lambda t, s: deepspeed(t, tensors(t, s)),
    ),
    "DataParallel": ("x.pth", lambda t, s: {"model": tensors(t, s, "module.")}),
    "torch.compile": ("x.pth", lambda t, s: {"model": tensors(t, s, "_orig_mod.")}),
    "DDP of torch.compile": ("x.pth", lambda t, s: tensors(t, s, "module._orig_mod.")),
    "torch.compile of DDP": ("x.pth", lambda t, s: tensors(t, s, "_orig_mod.module.")),
    "Accelerate": ("pytorch_model.bin", lambda t, s: tensors(t, s, "_forward_module.")),
    "compiled blocks": (
        "x.pth",
        lambda t, s: {
            k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in tensors(t, s).items()
        },
    ),
    "Lightning": ("epoch=3-step=400.ckpt", lightning),
    "Lightning, compiled": ("last.ckpt", lambda t, s: lightning(t, s, "model._orig_mod.")),
    "Lightning, its template": ("last.ckpt", lambda t, s: lightning(t, s, "net.")),
    "Lightning, with a loss": (
        "last.ckpt",
        lambda t, s: lightning(t, s, **{"criterion.weight": t.ones(5), "val_acc.tp": t.ones(1)}),
    ),
    "torchvision's average": (
        "model_1.pth",
        lambda t, s: {
            "model": tensors(t, other(s)),
            "model_ema": {"n_averaged": t.tensor(3), **tensors(t, s, "module.")},
        },
    ),
}


# Files and folders beyond one torch.save: a function writes them and gives the path.
def save_hf(folder, torch, state, names=("model.safetensors",), **files):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in names:
        safetensors.numpy.save_file(state, folder / name)
    for name, content in files.items():
        torch.save(content, folder / name)
    return folder


def sharded(folder, state, write, *, pattern, index, config=True):
    """Two shards and their index, as `save_pretrained(max_shard_size=...)` writes them."""
    folder.mkdir(exist_ok=True)
    keys = list(state)
    weight_map = {}
    for i, part in enumerate((keys[:2], keys[2:])):
        name = pattern.format(i + 1)
        write({key: state[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    size = sum(array.nbytes for array in state.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    (folder / index).write_text(text)
    if config:
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def sharded_safetensors(folder, state, variant="", **kwargs):
    dot = f".{variant}" if variant else ""
    return sharded(
        folder,
        state,
        safetensors.numpy.save_file,
        pattern=f"model{dot}-{{:05d}}-of-00002.safetensors",
        index=f"model.safetensors.index{dot}.json",
        **kwargs,
    )


def sharded_bin(folder, torch, state):
    return sharded(
        folder,
        state,
        lambda part, path: torch.save(tensors(torch, part), path),
        pattern="pytorch_model-{:05d}-of-00002.bin",
        index="pytorch_model.bin.index.json",
    )


def zip_of(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def torch_bytes(torch, whole):
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    return buffer.getvalue()


def renamed_zip(folder, torch, state):
    torch.save({"model": tensors(torch, state)}, folder / "beit_base_patch16_224_pt22k.zip")
    return folder / "beit_base_patch16_224_pt22k.zip"


def zipped_file(folder, torch, state):
    content = torch_bytes(torch, {"model": tensors(torch, state)})
    files = {"README.txt": b"text", "__MACOSX/._x.pth": b"", "beit/": b"", "beit/x.pth": content}
    return zip_of(folder / "beit.zip", files)


def zipped_safetensors(folder, torch, state):
    return zip_of(folder / "beit.zip", {"x.safetensors": safetensors.numpy.save(state)})


def prefixed_safetensors(folder, torch, state):
    path = folder / "x.safetensors"
    safetensors.numpy.save_file({f"module.{k}": v for k, v in state.items()}, path)
    return path


def misnamed_safetensors(folder, torch, state):
    (folder / "x.bin").write_bytes(safetensors.numpy.save(state))
    return folder / "x.bin"


def misnamed_pickle(folder, torch, state):
    torch.save(tensors(torch, state), folder / "x.safetensors")
    return folder / "x.safetensors"


def deepspeed_folder(folder, torch, state, tag="global_step10", optimizer=False):
    (folder / tag).mkdir(parents=True)
    (folder / "latest").write_text(tag)
    (folder / "zero_to_fp32.py").write_text("")
    torch.save(deepspeed(torch, tensors(torch, state)), folder / tag / "mp_rank_00_model_states.pt")
    if optimizer:
        name = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": {}}, folder / tag / name)
    return folder


def trainer_folder(folder, torch, state):
    return save_hf(
        folder / "checkpoint-500",
        torch,
        state,
        **{
            "optimizer.pt": {"state": {}},
            "scheduler.pt": {"last_epoch": 3},
            "rng_state.pth": {"cpu": torch.get_rng_state()},
            "training_args.bin": {"a": 1},
        },
    )


def accelerate_folder(folder, torch, state):
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    torch.save({"state": {}}, folder / "optimizer.bin")
    torch.save({}, folder / "random_states_0.pkl")
    return folder


def deepspeed_in_trainer(folder, torch, state):
    """The folder of a Trainer under DeepSpeed, with both: Hugging Face's file is the one."""
    deepspeed_folder(folder / "run", torch, other(state), tag="global_step500")
    return save_hf(folder / "run", torch, state)


PLACES: dict[str, Callable] = {
    "Hugging Face": lambda f, t, s: save_hf(f, t, s),
    "Hugging Face, .bin": lambda f, t, s: save_hf(
        f, t, s, names=(), **{"pytorch_model.bin": tensors(t, s)}
    ),
    "Hugging Face, both": lambda f, t, s: save_hf(
        f, t, s, **{"pytorch_model.bin": tensors(t, other(s))}
    ),
    "fp16": lambda f, t, s: save_hf(f, t, s, names=("model.fp16.safetensors",)),
    "fp16 .bin": lambda f, t, s: save_hf(
        f, t, s, names=(), **{"pytorch_model.fp16.bin": tensors(t, s)}
    ),
    "variant and main": lambda f, t, s: (
        save_hf(f, t, other(s), names=("model.fp16.safetensors",)),
        save_hf(f, t, s),
    )[1],
    "one file": lambda f, t, s: save_hf(f, t, s, names=("beit.safetensors",)),
    "one file, no config": lambda f, t, s: (t.save(tensors(t, s), f / "beit.pth"), f)[1],
    "shards": lambda f, t, s: sharded_safetensors(f, s),
    "shards, their index": lambda f, t, s: (
        sharded_safetensors(f, s) / "model.safetensors.index.json"
    ),
    "shards, variant": lambda f, t, s: sharded_safetensors(f, s, variant="bf16"),
    "shards, compiled": lambda f, t, s: sharded_safetensors(
        f, {f"_orig_mod.{k}": v for k, v in s.items()}
    ),
    "shards, .bin": lambda f, t, s: sharded_bin(f, t, s),
    "a zip that is a .pth": renamed_zip,
    "a zip of a .pth": zipped_file,
    "a zip of safetensors": zipped_safetensors,
    "prefixed safetensors": prefixed_safetensors,
    "safetensors named .bin": misnamed_safetensors,
    "a pickle named .safetensors": misnamed_pickle,
    "DeepSpeed": deepspeed_folder,
    "DeepSpeed, a tag": lambda f, t, s: deepspeed_folder(f, t, s) / "global_step10",
    "DeepSpeed, official BEiT": lambda f, t, s: deepspeed_folder(f, t, s, tag="checkpoint-99"),
    "DeepSpeed, ZeRO-1": lambda f, t, s: deepspeed_folder(f, t, s, optimizer=True),
    "DeepSpeed, zero_to_fp32.py": lambda f, t, s: (
        sharded_bin(f / "pytorch_model.bin", t, s),
        f,
    )[1],
    "Trainer": trainer_folder,
    "Trainer, DeepSpeed": deepspeed_in_trainer,
    "Accelerate": accelerate_folder,
}
