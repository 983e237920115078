"""Weights of one byte each, for decoding where reading weights takes the time: rows of a matrix share a scale."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

WeightFormat = Literal["model", "int8", "float8"]
STORED = {"int8": (torch.int8, 127.0), "float8": (torch.float8_e4m3fn, 448.0)}  # dtype, its largest value


class QuantizedWeight(NamedTuple):
    """A matrix [N, K], in about half the bytes of half precision."""

    values: Tensor
    """[N, K] int8, or float8_e4m3fn; every one of them is exact in bfloat16 and float16."""
    scale: Tensor
    """[N] float32, with which the values of a row are multiplied."""


Weight = Tensor | QuantizedWeight


def quantize(weight: Tensor, weight_format: WeightFormat) -> Weight:
    """Return the matrix [N, K] with values rounded to the nearest of the format's, or as it is for format model."""
    if weight_format == "model":
        return weight
    dtype, largest = STORED[weight_format]
    exact = weight.float()
    scale = exact.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / largest
    values = exact / scale[:, None]
    return QuantizedWeight((values.round() if dtype == torch.int8 else values).to(dtype), scale)


def check_format(weight_format: WeightFormat, device: torch.device) -> None:
    """Raise ValueError for float8 on a GPU of the Ampere generation, where Triton runs and cannot read it."""
    if weight_format == "float8" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if (8, 0) <= capability < (8, 9):
            raise ValueError(
                f"weight_format float8 needs a GPU of compute capability 8.9 or more, this one has "
                f"{capability[0]}.{capability[1]}; take int8."
            )


def values_and_scale(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """Return what is stored [N, K], and the scale of its rows, None if there is none."""
    return (weight, None) if isinstance(weight, Tensor) else weight
