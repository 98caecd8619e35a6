"""Facts about accelerators that planning and measuring share."""

import jax

# Dense bfloat16 peak, FLOP/s per device as JAX counts them (v2 and v3 count cores), by the device
# kind that JAX reports. Google's and NVIDIA's data sheets.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops() -> float | None:
    """Peak bfloat16 FLOP/s of one device; None where the chip is unknown, a CPU for instance."""
    return PEAK_FLOPS.get(jax.devices()[0].device_kind)
