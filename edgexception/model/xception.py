"""The Xception network family in torch: one class, every member of `Architecture`."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional

from edgexception.architecture import Architecture, SeparableSpec


class Add(nn.Module):
    """Sum of the two branches of a block: a module, so that the sum has a name in the graph."""

    def forward(self, main: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        return main + shortcut


class MaxPoolSame(nn.Module):
    """3x3 max-pool with stride 2: (N, C, H, W) -> (N, C, ceil(H/2), ceil(W/2)).

    Keras's "same" pads (1, 1) at an odd size and (0, 1) at an even one; the (0, 1) is a window that
    runs over the end, so no padding value enters the graph (a -inf there would end as
    a NaN quantization scale). timm pads (1, 1) at both.
    """

    def __init__(self, padding: str) -> None:
        super().__init__()
        self.padding = padding

    def pads(self, height: int, width: int) -> tuple[int, int]:
        """Return the leading padding (rows, columns) at an input size."""
        return (1, 1) if self.padding == "timm" else (height % 2, width % 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = self.pads(x.shape[2], x.shape[3])
        # With ceil_mode the window at an even size may run over the end by one: the (0, 1) pad.
        return functional.max_pool2d(x, 3, 2, padding=pads, ceil_mode=self.padding == "keras")


class GlobalAveragePool(nn.Module):
    """Mean over height and width: (N, C, H, W) -> (N, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


class SeparableConv2d(nn.Module):
    """Spatial 3x3 convolution per channel segment and pointwise 1x1 convolution, no bias.

    (N, in, H, W) -> (N, out, H, W), zero padding of 1 in both implementations' sense of "same".
    """

    def __init__(self, spec: SeparableSpec, architecture: Architecture) -> None:
        super().__init__()
        self.depthwise_first = architecture.order == "depthwise-first"
        spatial = spec.in_channels if self.depthwise_first else spec.out_channels
        groups = spatial if architecture.segments is None else architecture.segments
        self.depthwise = nn.Conv2d(spatial, spatial, 3, padding=1, groups=groups, bias=False)
        self.activation: nn.Module | None = {
            "none": None,
            "relu": nn.ReLU(),
            "elu": nn.ELU(),
        }[architecture.intermediate_activation]
        self.pointwise = nn.Conv2d(spec.in_channels, spec.out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (
            (self.depthwise, self.pointwise)
            if self.depthwise_first
            else (self.pointwise, self.depthwise)
        )
        x = first(x)
        if self.activation is not None:
            x = self.activation(x)
        return cast(torch.Tensor, second(x))


class Xception(nn.Module):
    """A network of the Xception family.

    Input: float32 (N, 3, H, W), normalized RGB. Output: logits (N, classes), or pooled features
    (N, channels) for an architecture without head. No softmax: it changes no decision.

    Layers are direct children with Keras's names (`block5_sepconv1`, `block5_sepconv1_bn`, ...).
    What Keras leaves unnamed gets such a name: `block2_shortcut`, `block2_add`, `dense1`.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self._stem()
        channels = architecture.stem[-1]
        separables = iter(tuple(architecture.separables()))
        for index, (block, widths, strided) in enumerate(architecture.blocks()):
            for position in range(1, len(widths) + 1):
                # The stem ends with its own ReLU, so the first block starts without one.
                if index or position > 1:
                    self.add_module(f"{block}_sepconv{position}_act", nn.ReLU())
                self._separable(next(separables))
            if strided:
                self.add_module(f"{block}_pool", MaxPoolSame(architecture.padding))
            if architecture.residual:
                if strided:
                    shortcut = nn.Conv2d(channels, widths[-1], 1, stride=2, bias=False)
                    self._convolution(f"{block}_shortcut", shortcut)
                self.add_module(f"{block}_add", Add())
            channels = widths[-1]
        for spec in separables:
            self._separable(spec)
            self.add_module(f"{spec.name}_act", nn.ReLU())
        self._head(architecture.tail[-1])

    def _convolution(self, name: str, convolution: nn.Module) -> None:
        self.add_module(name, convolution)
        channels = cast(int, convolution.out_channels)
        self.add_module(f"{name}_bn", nn.BatchNorm2d(channels, eps=self.architecture.bn_epsilon))

    def _separable(self, spec: SeparableSpec) -> None:
        self.add_module(spec.name, SeparableConv2d(spec, self.architecture))
        self.add_module(
            f"{spec.name}_bn", nn.BatchNorm2d(spec.out_channels, eps=self.architecture.bn_epsilon)
        )

    def _stem(self) -> None:
        first, second = self.architecture.stem
        self._convolution("block1_conv1", nn.Conv2d(3, first, 3, stride=2, bias=False))
        self.block1_conv1_act = nn.ReLU()
        self._convolution("block1_conv2", nn.Conv2d(first, second, 3, bias=False))
        self.block1_conv2_act = nn.ReLU()

    def _head(self, features: int) -> None:
        self.avg_pool = GlobalAveragePool()
        for index, width in enumerate(self.architecture.head, start=1):
            if index == len(self.architecture.head):
                self.dropout = nn.Dropout(self.architecture.dropout)
                self.predictions = nn.Linear(features, width)
            else:
                self.add_module(f"dense{index}", nn.Linear(features, width))
                self.add_module(f"dense{index}_act", nn.ReLU())
            features = width

    def _apply_layers(self, x: torch.Tensor, *names: str) -> torch.Tensor:
        for name in names:
            x = self._modules[name](x)  # type: ignore[misc]
        return x

    def _block(
        self, x: torch.Tensor, block: str, widths: tuple[int, ...], strided: bool
    ) -> torch.Tensor:
        entered = x
        for position in range(1, len(widths) + 1):
            name = f"{block}_sepconv{position}"
            if f"{name}_act" in self._modules:
                x = self._apply_layers(x, f"{name}_act")
            x = self._apply_layers(x, name, f"{name}_bn")
        if strided:
            x = self._apply_layers(x, f"{block}_pool")
        if not self.architecture.residual:
            return x
        if strided:
            entered = self._apply_layers(entered, f"{block}_shortcut", f"{block}_shortcut_bn")
        return cast(torch.Tensor, self._modules[f"{block}_add"](x, entered))  # type: ignore[misc]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in ("block1_conv1", "block1_conv2"):
            x = self._apply_layers(x, name, f"{name}_bn", f"{name}_act")
        for block, widths, strided in self.architecture.blocks():
            x = self._block(x, block, widths, strided)
        for index in range(1, len(self.architecture.tail) + 1):
            name = f"{self.architecture.tail_name}_sepconv{index}"
            x = self._apply_layers(x, name, f"{name}_bn", f"{name}_act")
        x = self._apply_layers(x, "avg_pool")
        for index in range(1, len(self.architecture.head)):
            x = self._apply_layers(x, f"dense{index}", f"dense{index}_act")
        if self.architecture.head:
            x = self._apply_layers(x, "dropout", "predictions")
        return x
