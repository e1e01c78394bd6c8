"""The Xception family as data: widths, repeats and the paper's variations, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

Width = Annotated[int, Field(ge=1, le=8192)]
Widths = Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)]

MAX_PARAMETERS = 500_000_000
"""Bound on a whole network, 20 times the paper's: bounds on its fields alone allow terabytes."""


class SeparableSpec(NamedTuple):
    """One separable convolution: its Keras layer name and its channels."""

    name: str
    in_channels: int
    out_channels: int


class Architecture(BaseModel):
    """One network of the Xception family; the defaults are the network of the paper.

    F. Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017:
    figure 5 gives the default widths and repeats, section 1.2 the orders of the two steps,
    section 5 the spectrum of `segments`, section 4.7 `intermediate_activation` and section 4.6
    `residual`.

    Blocks are numbered as in Keras: the stem is block 1, `entry`, `middle` and `exit` blocks
    follow, and `tail` is the last one (blocks 2-4, 5-12, 13 and 14 of the default network).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    stem: tuple[Width, Width] = (32, 64)
    """Output channels of the two dense 3x3 convolutions of block 1."""
    entry: Annotated[tuple[Widths, ...], Field(max_length=8)] = ((128, 128), (256, 256), (728, 728))
    """Per strided entry block, the output channels of its separable convolutions."""
    middle: Annotated[tuple[Widths, ...], Field(max_length=64)] = ((728, 728, 728),) * 8
    """Per middle block, the output channels of its separable convolutions."""
    exit: Widths = (728, 1024)
    """Output channels of the separable convolutions of the strided exit block."""
    tail: Widths = (1536, 2048)
    """Output channels of the last separable convolutions, which have no shortcut."""
    head: Annotated[tuple[Annotated[int, Field(ge=1, le=65536)], ...], Field(max_length=8)] = (
        1000,
    )
    """Output features of the dense layers, ReLU between them; the last are the classes.
    Empty: the network ends with the pooled features."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Rate of the dropout before the last dense layer; only training sees it."""
    segments: Annotated[int, Field(ge=1)] | None = None
    """Channel segments (groups) of every spatial convolution; None is one per channel."""
    order: Literal["depthwise-first", "pointwise-first"] = "depthwise-first"
    """Which of the two steps of a separable convolution comes first."""
    intermediate_activation: Literal["none", "relu", "elu"] = "none"
    """The activation between the two steps."""
    residual: bool = True
    """Whether blocks have shortcuts."""
    padding: Literal["keras", "timm"] = "keras"
    """Padding of the 3x3/2 max-pools: Keras's "same" ((0, 1) at even sizes, (1, 1) at odd ones),
    or timm's and Cadene's (1, 1) at every size."""
    bn_epsilon: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-3
    """Epsilon of every BatchNorm: Keras's Xception has 1e-3, timm's 1e-5."""

    @model_validator(mode="after")
    def _consistent(self) -> Architecture:
        if self.order == "pointwise-first" and self.intermediate_activation != "relu":
            raise ValueError(
                "order 'pointwise-first' is the paper's extreme Inception, which has a ReLU after "
                "both steps: set intermediate_activation to 'relu'"
            )
        if self.residual:
            previous = self.entry[-1][-1] if self.entry else self.stem[-1]
            for number, widths in enumerate(self.middle, start=2 + len(self.entry)):
                if widths[-1] != previous:
                    raise ValueError(
                        f"block{number} ends with {widths[-1]} channels but its shortcut carries "
                        f"{previous}: a middle block must keep the residual width"
                    )
        if self.segments is not None:
            for spec in self.separables():
                channels = (
                    spec.in_channels if self.order == "depthwise-first" else spec.out_channels
                )
                if channels % self.segments:
                    raise ValueError(
                        f"segments {self.segments} does not divide the {channels} channels of "
                        f"the spatial convolution of {spec.name}"
                    )
        return self

    @model_validator(mode="after")
    def _bounded(self) -> Architecture:
        if self.parameters > MAX_PARAMETERS:
            raise ValueError(
                f"the network would have {self.parameters:,} parameters, more than the "
                f"{MAX_PARAMETERS:,} that are allowed (the paper's has 22,855,952): set smaller "
                "widths, fewer blocks, or more segments"
            )
        return self

    @property
    def outputs(self) -> int:
        """Number of logits, or of pooled features for a network without a head."""
        return self.head[-1] if self.head else self.tail[-1]

    @property
    def parameters(self) -> int:
        """Number of trainable parameters, from the widths alone: nothing is allocated."""
        # A convolution has no bias; its BatchNorm has a factor and an offset per output channel.
        count = 3 * 9 * self.stem[0] + self.stem[0] * 9 * self.stem[1] + 2 * sum(self.stem)
        for spec in self.separables():
            spatial = spec.in_channels if self.order == "depthwise-first" else spec.out_channels
            groups = spatial if self.segments is None else self.segments
            count += spatial * (spatial // groups) * 9
            count += spec.in_channels * spec.out_channels + 2 * spec.out_channels
        if self.residual:
            entered = self.stem[-1]
            for _, widths, strided in self.blocks():
                if strided:
                    count += entered * widths[-1] + 2 * widths[-1]
                entered = widths[-1]
        features = self.tail[-1]
        for width in self.head:
            count += (features + 1) * width
            features = width
        return count

    @property
    def classes(self) -> int | None:
        """Number of classes, or None for a network without head."""
        return self.head[-1] if self.head else None

    def blocks(self) -> Iterator[tuple[str, Widths, bool]]:
        """Yield (name, widths, strided) of every block with a shortcut, in order."""
        number = 2
        for group, strided in ((self.entry, True), (self.middle, False), ((self.exit,), True)):
            for widths in group:
                yield f"block{number}", widths, strided
                number += 1

    @property
    def tail_name(self) -> str:
        """Name of the tail block ("block14" in the default network)."""
        return f"block{3 + len(self.entry) + len(self.middle)}"

    def separables(self) -> Iterator[SeparableSpec]:
        """Yield every separable convolution in order, tail included."""
        channels = self.stem[-1]
        for block, widths, _ in (*self.blocks(), (self.tail_name, self.tail, False)):
            for index, width in enumerate(widths, start=1):
                yield SeparableSpec(f"{block}_sepconv{index}", channels, width)
                channels = width
