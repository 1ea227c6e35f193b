"""What one device can do at most: arithmetic and memory, from its maker's data sheet. Dense figures, without sparsity."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device."""

    kinds: tuple[str, ...]  # how `device.device_kind` begins
    bfloat16_flops: float  # FLOP/s
    float32_flops: float  # FLOP/s of float32 matmuls at JAX's default precision: TF32 on NVIDIA, bfloat16 passes on TPU
    memory_bytes: float
    bandwidth: float  # bytes/s of that memory
    source: str


CHIPS = {
    'h100': Chip(
        ('NVIDIA H100 80GB', 'NVIDIA H100'), 989.4e12, 494.7e12, 80e9, 3.35e12, 'NVIDIA H100 data sheet, SXM5'
    ),
    'h200': Chip(('NVIDIA H200',), 989.4e12, 494.7e12, 141e9, 4.8e12, 'NVIDIA H200 data sheet, SXM5'),
    'a100-40gb': Chip(('NVIDIA A100-SXM4-40GB',), 312e12, 156e12, 40e9, 1.555e12, 'NVIDIA A100 data sheet, SXM4'),
    'a100': Chip(('NVIDIA A100',), 312e12, 156e12, 80e9, 2.039e12, 'NVIDIA A100 data sheet, SXM4 80 GB'),
    'v4': Chip(('TPU v4',), 275e12, 275e12, 32e9, 1.228e12, 'Cloud TPU documentation, v4'),
    'v5e': Chip(('TPU v5 lite', 'TPU v5e'), 197e12, 197e12, 16e9, 0.819e12, 'Cloud TPU documentation, v5e'),
    'v5p': Chip(('TPU v5p', 'TPU v5'), 459e12, 459e12, 95e9, 2.765e12, 'Cloud TPU documentation, v5p'),
    'v6e': Chip(('TPU v6 lite', 'TPU v6e'), 918e12, 918e12, 32e9, 1.64e12, 'Cloud TPU documentation, v6e'),
    # A v7x chip (2,307 TFLOP/s, 192 GB, 7.37 TB/s) is two JAX devices.
    'v7x': Chip(
        ('TPU7x', 'TPU v7'), 1153.5e12, 1153.5e12, 96e9, 3.69e12, 'Cloud TPU documentation, TPU7x, half a chip'
    ),
}


def find(device_kind: str) -> Chip | None:
    """The chip of a `device.device_kind`; None for one that is not described here (a CPU is measured instead)."""
    for chip in CHIPS.values():
        if any(device_kind.startswith(kind) for kind in chip.kinds):
            return chip
    return None
