"""`.pth` files in the official layout, packed as the programs that train BEiT pack them."""

import argparse
import collections
import dataclasses
import datetime
import functools
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.weights.peer_files import files, hugging_face, timm_rows
from tests.weights.peer_files.row import Accepted, Built, Refused, Row

State = dict[str, Any]
Pack = Callable[[State, str], str]

SILENT = timm_rows.SILENT


def classifier(**arguments: Any) -> tuple[Any, State]:
    """The official fine-tuned model: timm's names are its names, and it also saves the indices."""
    model = timm_rows.model_of(timm_rows.BEIT, **arguments)
    state = {}
    for key, tensor in model.state_dict().items():
        state[key] = tensor
        if key.endswith("relative_position_bias_table"):
            module = model.get_submodule(key.rpartition(".")[0])
            state[key.replace("bias_table", "index")] = module.relative_position_index
    return model, state


def masked_model(**config: Any) -> tuple[Any, State]:
    """The official pre-trained model: transformers' under the official names."""
    import torch

    model = hugging_face.model_of("BeitForMaskedImageModeling", use_mask_token=True, **config)
    old = model.state_dict()
    renamed = {
        "beit.embeddings.cls_token": "cls_token",
        "beit.embeddings.mask_token": "mask_token",
        "beit.embeddings.position_embeddings": "pos_embed",
        "beit.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "beit.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "beit.shared_position_bias.relative_position_bias_table": (
            "rel_pos_bias.relative_position_bias_table"
        ),
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
        "lm_head.weight": "lm_head.weight",
        "lm_head.bias": "lm_head.bias",
    }
    state = {new: old[key] for key, new in renamed.items() if key in old}
    inside = {
        "lambda_1": "gamma_1",
        "lambda_2": "gamma_2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "relative_position_bias": "attn",
    }
    for i in range(model.config.num_hidden_layers):
        block = f"beit.layers.{i}"
        for key, tensor in old.items():
            for name, new in inside.items():
                if key.startswith(f"{block}.{name}"):
                    state[f"blocks.{i}.{new}{key.removeprefix(f'{block}.{name}')}"] = tensor
        attention = f"{block}.attention"
        parts = [old[f"{attention}.{part}_proj.weight"] for part in "qkv"]
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
        state[f"blocks.{i}.attn.q_bias"] = old[f"{attention}.q_proj.bias"]
        state[f"blocks.{i}.attn.v_bias"] = old[f"{attention}.v_proj.bias"]
    shared = model.beit.shared_position_bias
    if shared is not None:
        index = shared.generate_relative_position_index(shared.window_size)
        state["rel_pos_bias.relative_position_index"] = index
    return model, state


def packed(folder: str, *, pack: Pack, what: str = "classifier", **arguments: Any) -> Built:
    """A model in the container that `pack` writes."""
    if what == "classifier":
        model, state = classifier(**arguments)
        forward, kind = timm_rows.forward_of(model), "classify" if model.num_classes else "encoder"
    else:
        model, state = masked_model(**arguments)
        forward, kind = hugging_face.forward_of(model), "pretrain"
    return Built(
        path=pack(state, folder), kind=kind, model=model, forward=forward, state=dict(state)
    )


def _other_weights(state: State) -> State:
    """What lies beside the right weights: the same names, other numbers."""
    return {k: v * 1.5 if v.is_floating_point() else v for k, v in state.items()}


def saved(name: str, content: Callable[[State], Any], **arguments: Any) -> Pack:
    return lambda state, folder: files.write_pth(f"{folder}/{name}", content(state), **arguments)


def training_arguments() -> argparse.Namespace:
    """`args` as training scripts save them: harmless objects of many kinds."""
    import torch

    return argparse.Namespace(
        model="beit_base_patch16_224",
        output_dir=pathlib.PurePosixPath("runs/1"),
        data=pathlib.Path("data"),
        lr=np.float64(5e-4),
        betas=np.array([0.9, 0.98]),
        epochs=np.int64(30),
        dtype=torch.float16,
        device=torch.device("cpu"),
        shape=torch.Size([3, 224, 224]),
        started=datetime.datetime(2024, 5, 17, 12, 30),
        took=datetime.timedelta(hours=3),
        skip=frozenset({"cls_token"}),
        seen={1, 2},
        meters=collections.defaultdict(list, loss=[0.5]),
        counts=collections.Counter("abca"),
        ordered=collections.OrderedDict(a=1),
        nothing=None,
    )


def _class_token_layers(state: State) -> State:
    """The blocks that BEiT v2 pre-trains its class token with, and then throws away."""
    return {
        f"cls_pt_layers.{k.removeprefix('blocks.')}": v
        for k, v in state.items()
        if k.startswith("blocks.0")
    }


def _official(state: State) -> dict[str, Any]:
    return {
        "model": state,
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "epoch": 29,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": training_arguments(),
    }


def _of_timm_training(state: State) -> dict[str, Any]:
    return {
        "epoch": 9,
        "arch": "beit_base_patch16_224",
        "state_dict": _other_weights(state),
        "optimizer": {"state": {}, "param_groups": []},
        "version": 2,
        "args": training_arguments(),
        "amp_scaler": {"scale": 65536.0},
        "state_dict_ema": state,
        "metric": 81.3,
    }


def _lightning(state: State) -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 400,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": files.prefixed(state, "model."),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_path": "x.ckpt"}},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "folder": pathlib.Path("runs")},
    }


def _deepspeed(state: State, folder: str) -> str:
    """A folder as DeepSpeed's `save_checkpoint` leaves it, stages 0 to 2: the weights are whole."""
    content = {
        "module": state,
        "ds_config": {"train_batch_size": 64},
        "ds_version": "0.15.0",
        "param_shapes": None,
        "global_steps": 10,
        "dp_world_size": 1,
        "mp_world_size": 1,
    }
    files.write_pth(f"{folder}/run/global_step10/mp_rank_00_model_states.pt", content)
    files.write_pth(
        f"{folder}/run/global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        {"optimizer_state_dict": {"state": {}}},
    )
    pathlib.Path(folder, "run", "latest").write_text("global_step10")
    pathlib.Path(folder, "run", "zero_to_fp32.py").write_text("print()\n")
    return f"{folder}/run"


def _accelerate(state: State, folder: str) -> str:
    """A folder as Accelerate's `save_state` leaves it."""
    path = f"{folder}/checkpoint_0"
    files.write_pth(f"{path}/optimizer.bin", {"state": {}, "param_groups": []})
    files.write_pth(f"{path}/scheduler.bin", {"last_epoch": 3})
    files.write_pth(f"{path}/random_states_0.pkl", {"step": 3})
    files.write_safetensors(f"{path}/model.safetensors", state)
    return path


def _alone_in_a_folder(state: State, folder: str) -> str:
    files.write_pth(f"{folder}/download/beit.pth", {"model": state})
    pathlib.Path(folder, "download", "README.md").write_text("# BEiT")
    return f"{folder}/download"


def _renamed_zip(state: State, folder: str) -> str:
    """What `torch.save` wrote, under the name that a browser gave the download."""
    return files.write_pth(f"{folder}/beit_base_patch16_224_pt22k.zip", {"model": state})


def _zipped(state: State, folder: str) -> str:
    """A zip with one checkpoint inside."""
    inner = files.write_pth(f"{folder}/inner/beit.pth", {"model": state})
    path = f"{folder}/download.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "beit.pth")
    return path


def _parameters(state: State) -> State:
    """Tensors as `nn.Parameter`s, which pickle differently."""
    import torch

    return {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()}


def _as_state_dict(state: State) -> State:
    """What `module.state_dict()` gives: an ordered dict with the modules' versions beside it."""
    ordered: Any = collections.OrderedDict(state)
    ordered._metadata = collections.OrderedDict({"": {"version": 1}, "norm": {"version": 1}})
    return ordered


def _views(state: State) -> State:
    """Matrices that lie transposed in memory, and vectors that are parts of one storage."""
    import torch

    vectors = [key for key, tensor in state.items() if tensor.ndim == 1]
    storage = torch.cat([state[key] for key in vectors])
    parts = storage.split([len(state[key]) for key in vectors])
    views = dict(zip(vectors, parts, strict=True))
    for key, tensor in state.items():
        if tensor.ndim == 2:
            views[key] = tensor.t().contiguous().t()
    return {key: views.get(key, tensor) for key, tensor in state.items()}


KEPT = Accepted(format="unilm", guessed=SILENT)
# Beside the weights is the name of the architecture, with which epsilon and activation are known.
NAMED = Accepted(format="unilm", guessed=("normalization", "pooling"))


def _container(
    name: str, pack: Pack, *, fast: bool = False, outcome: Accepted = KEPT, **how: Any
) -> Row:
    return Row(
        name=f"pth: {name}",
        build=functools.partial(packed, pack=pack, **how),
        outcome=outcome,
        fast=fast,
        container=True,
    )


def _note(*says: str, flags: tuple[str, ...] = ()) -> Accepted:
    return Accepted(format="unilm", guessed=SILENT, says=says, flags=flags)


CONTAINERS = (
    _container("bare state dict", saved("beit.pth", lambda s: s)),
    _container("model", saved("beit.pth", lambda s: {"model": s}), fast=True),
    _container("module", saved("beit.pth", lambda s: {"module": s})),
    _container("model in a module", saved("beit.pth", lambda s: {"model": {"module": s}})),
    _container(
        "model_state_dict, .pt", saved("beit.pt", lambda s: {"model_state_dict": s, "epoch": 3})
    ),
    _container(
        "training checkpoint with args",
        saved("checkpoint-29.pth", _official),
        # The official model of that name has fc_norm where it pools the mean, and only there.
        outcome=dataclasses.replace(NAMED, guessed=("normalization",)),
        fast=True,
    ),
    _container(
        "container of old PyTorch",
        saved("beit.pth", lambda s: {"model": s}, _use_new_zipfile_serialization=False),
    ),
    _container("parameters, not tensors", saved("beit.pth", lambda s: {"model": _parameters(s)})),
    _container(
        "model_ema beside model",
        saved("beit.pth", lambda s: {"model": _other_weights(s), "model_ema": s}),
        outcome=_note("model_ema"),
        fast=True,
    ),
    _container(
        "model_ema that is None", saved("beit.pth", lambda s: {"model": s, "model_ema": None})
    ),
    _container(
        "state_dict_ema of timm's training",
        saved("model_best.pth.tar", _of_timm_training),
        # timm's name of the model stands for its mean and deviation, too.
        outcome=dataclasses.replace(NAMED, guessed=(), says=("state_dict_ema",)),
    ),
    _container(".pth.tar", saved("beit.pth.tar", lambda s: {"state_dict": s})),
    _container(
        "Lightning's .ckpt", saved("last.ckpt", _lightning), outcome=_note(r"model\."), fast=True
    ),
    _container("DeepSpeed's folder", _deepspeed),
    _container(
        "compiled",
        saved("beit.pth", lambda s: {"model": files.prefixed(s, "_orig_mod.")}),
        outcome=_note("_orig_mod"),
    ),
    _container(
        "DataParallel",
        saved("beit.pth", lambda s: {"model": files.prefixed(s, "module.")}),
        outcome=_note("module"),
    ),
    _container(
        "compiled in DataParallel",
        saved("beit.pth", lambda s: files.prefixed(s, "module._orig_mod.")),
        outcome=_note("_orig_mod"),
    ),
    _container(
        "compiled, safetensors",
        lambda s, folder: files.write_safetensors(
            f"{folder}/beit.safetensors", files.prefixed(s, "_orig_mod.")
        ),
        outcome=Accepted(guessed=SILENT, says=("_orig_mod",)),
    ),
    _container(
        "FSDP",
        saved("beit.pth", lambda s: {"model": files.prefixed(s, "_fsdp_wrapped_module.")}),
        outcome=_note("_fsdp_wrapped_module"),
    ),
    _container(
        "under a name of its own", saved("beit.pth", lambda s: {"epoch": 3, "weights_of_mine": s})
    ),
    _container("Accelerate's folder", _accelerate),
    _container("alone in a folder", _alone_in_a_folder),
    _container("a .pth renamed to .zip", _renamed_zip),
    _container("zip with a checkpoint inside", _zipped),
    _container("ordered dict of a module", saved("beit.pth", _as_state_dict)),
    _container("views of storages", saved("beit.pth", lambda s: {"model": _views(s)})),
    _container(".bin", saved("beit.bin", lambda s: s)),
)


def _flagged(
    name: str, pack: Pack, outcome: Accepted | Refused, *, fast: bool = False, **how: Any
) -> Row:
    build = functools.partial(packed, pack=pack, **how)
    return Row(name=f"pth: {name}", build=build, outcome=outcome, fast=fast)


KINDS = (
    _flagged(
        "pre-trained, shared table",
        saved("pt22k.pth", lambda s: {"model": s}),
        KEPT,
        what="masked",
        **hugging_face.SHARED,
        fast=True,
    ),
    _flagged(
        "pre-trained, absolute positions, heads given",
        saved("pt.pth", lambda s: {"model": s}),
        Accepted(format="unilm", guessed=SILENT, flags=("--heads", "4")),
        what="masked",
        intermediate_size=256,
        **hugging_face.ABSOLUTE,
    ),
    _flagged(
        "pre-trained, absolute positions",
        saved("pt.pth", lambda s: {"model": s}),
        Accepted(
            format="unilm", guessed=("heads", *SILENT), wrong=True, right_flags=("--heads", "4")
        ),
        what="masked",
        intermediate_size=256,
        **hugging_face.ABSOLUTE,
    ),
    _flagged(
        "classifier of the class token",
        saved("beit.pth", lambda s: {"model": s}),
        KEPT,
        global_pool="token",
    ),
    _flagged(
        "classifier, shared table",
        saved("beit.pth", lambda s: {"model": s}),
        KEPT,
        use_rel_pos_bias=False,
        use_shared_rel_pos_bias=True,
    ),
    _flagged(
        "classifier, everything given",
        saved("beit.pth", lambda s: {"model": s}),
        Accepted(
            format="unilm",
            guessed=("activation",),
            flags=("--normalization", "imagenet", "--epsilon", "1e-6"),
        ),
    ),
    _flagged(
        "epsilon 1e-3 that nobody gave",
        saved("pt.pth", lambda s: {"model": s}),
        Accepted(guessed=SILENT, wrong=True, right_flags=("--epsilon", "1e-3")),
        what="masked",
        layer_norm_eps=1e-3,
        **hugging_face.SHARED,
        fast=True,
    ),
    _flagged(
        "the model beside its EMA",
        saved("beit.pth", lambda s: {"model": s, "model_ema": _other_weights(s)}),
        _note("model_ema", flags=("--weights", "model")),
        fast=True,
    ),
    _flagged(
        "an EMA that is not there",
        saved("beit.pth", lambda s: {"model": s}),
        Refused(line="(?i)ema", flags=("--weights", "ema")),
    ),
    _flagged(
        "heads that do not divide the width",
        saved("beit.pth", lambda s: {"model": s}),
        Refused(line="heads|multiple", flags=("--heads", "5")),
    ),
    _flagged(
        "heads that the table contradicts",
        saved("beit.pth", lambda s: {"model": s}),
        Refused(line="heads", flags=("--heads", "8")),
    ),
    _flagged(
        "a key left over",
        saved("beit.pth", lambda s: {"model": s | {"extra.weight": s["head.weight"]}}),
        Refused(line=r"unused extra\.weight", hint=True),
    ),
    _flagged(
        "a key left over and allowed",
        saved("beit.pth", lambda s: {"model": s | {"extra.weight": s["head.weight"]}}),
        Accepted(
            format="unilm",
            guessed=SILENT,
            flags=("--allow-unused", "extra"),
            says=(r"extra\.weight",),
        ),
    ),
    _flagged(
        "a token head left over",
        saved(
            "beit.pth",
            lambda s: {
                "model": s | {"lm_head.weight": s["head.weight"], "lm_head.bias": s["head.bias"]}
            },
        ),
        _note(r"lm_head\.weight"),
    ),
    _flagged(
        "sizes of EVA",
        saved("eva.pth", lambda s: {"model": s}),
        Refused(line="EVA"),
        what="masked",
        intermediate_size=320,
        **hugging_face.ABSOLUTE,
    ),
    _flagged(
        "version 2, layers of its class token",
        saved("beitv2.pth", lambda s: {"model": s | _class_token_layers(s)}),
        _note("left out .*cls_pt_layers"),
        what="masked",
        **hugging_face.SHARED,
    ),
    _flagged(
        "a block left out",
        saved(
            "beit.pth",
            lambda s: {"model": {k.replace("blocks.1", "blocks.2"): v for k, v in s.items()}},
        ),
        Refused(line="block"),
    ),
    _flagged(
        "a block missing",
        saved(
            "beit.pth",
            lambda s: {"model": {k: v for k, v in s.items() if not k.startswith("blocks.0.mlp")}},
        ),
        Refused(line=r"mlp\.fc1"),
    ),
)


ROWS = (*CONTAINERS, *KINDS)
