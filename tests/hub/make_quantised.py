"""tests/hub/quantised.npz: packed tensors and what transformers unpacks them to; run by an interpreter that has it and torch.

python tests/hub/make_quantised.py
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.families.weights import integers


def bytes_of(key: int, *shape: int) -> torch.Tensor:
    return torch.tensor(integers(key, int(np.prod(shape))).astype(np.uint8).reshape(shape))


def bits(x: torch.Tensor) -> np.ndarray:
    return x.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)


weight = bytes_of(1, 32, 96)
weight[(weight & 0x7F) == 0x7F] = 0  # NaN
scale = (bytes_of(2, 2, 3).float() + 1) / 777
unpack: Any = Fp8Dequantize(None)
whole = unpack._dequantize_one(weight.view(torch.float8_e4m3fn), scale, torch.bfloat16)
blocks, scales = bytes_of(3, 2, 6, 3, 16), bytes_of(4, 2, 6, 3)
scales[0] = scales[0] % 20 + 118  # as in published weights; the others are of any size
path = Path(__file__).with_suffix('').with_name('quantised.npz')
np.savez_compressed(
    path,
    transformers=transformers.__version__,
    fp8_weight=weight.numpy(),
    fp8_scale=scale.numpy(),
    fp8=bits(whole),
    mxfp4_blocks=blocks.numpy(),
    mxfp4_scales=scales.numpy(),
    mxfp4=bits(convert_moe_packed_tensors(blocks, scales)),
)
print(path.stat().st_size)
