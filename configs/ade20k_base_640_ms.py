"""Evaluates a segmenter over six scales and mirrored, as the official `_ms` configs do.

upernet_beit_base_12_640_slide_160k_ade20k_pt2ft_ms.py. Published: mIoU 54.26, mAcc 65.28,
aAcc 84.9. Scales 0.5, 0.75 and 1 come out the same, since a side is never less than a window.

    python main.py --config=configs/ade20k_base_640_ms.py --config.run.init_from=WEIGHTS

WEIGHTS: a segmenter, of this project (a run's directory) or of any format that the library reads.
"""

from ml_collections import ConfigDict

from configs import ade20k_base_640


def get_config() -> ConfigDict:
    """A diff of `ade20k_base_640`."""
    return several_scales(ade20k_base_640.get_config(), weights="beit_base_640_ade20k.pth")


def several_scales(config: ConfigDict, *, weights: str) -> ConfigDict:
    """The config with evaluation alone, over several scales."""
    config.reference = "mIoU 54.26, mAcc 65.28, aAcc 84.9 (unilm/beit README)"
    config.evaluate_only = True
    config.run.init_from = weights
    config.run.init_allow_missing = ()
    config.run.init_allow_unused = ()
    config.run.init_allow_different = ()
    config.inference.scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    config.inference.flip = True
    config.inference.fill_window = True
    return config
