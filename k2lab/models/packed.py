"""Parametrizations of weights that stay packed in 4 bits: the weight is made anew at each access, and never kept"""

import torch
from torch import nn

from .quantized import dequantised_int4


class Int4(nn.Module):
    """Weights [*, rows, columns] from packed int32 [*, rows, columns/8], K2-Thinking's experts in compressed-tensors.

    `scale` [*, rows, columns/group] in bfloat16; `sizes` is the stored `weight_shape` of one matrix; `way` the
    checkpoint's `quantization_config`. One matrix is unpacked at a time."""

    def __init__(self, scale, sizes, group: int, way: dict, dtype):
        super().__init__()
        self.scale, self.sizes, self.group, self.way, self.dtype = scale, sizes, group, way, dtype

    @property
    def columns(self) -> int:
        "Columns of a matrix; of its rows a stack holds those of gate and up."
        return int(self.sizes[1])

    @torch.no_grad()
    def forward(self, packed):
        whole = packed.new_empty((*packed.shape[:-1], self.columns), dtype=self.dtype)
        for one, codes, scale in zip(whole, packed, self.scale):
            one.copy_(dequantised_int4(codes, scale, one.shape, self.group))
        return whole


class Cast(nn.Module):
    "A weight in the shape and the dtype that the model computes with, where it was quantised in others."

    def __init__(self, dtype, shape=None):
        super().__init__()
        self.dtype, self.shape = dtype, shape

    @torch.no_grad()
    def forward(self, weight):
        return weight.view(self.shape or weight.shape).to(self.dtype)
