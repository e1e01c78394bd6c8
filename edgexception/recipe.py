"""A recipe as typed, frozen data: every section is the spec of one stage.

Specs hold what the user asked for, never a resolved value; stages read them and do not edit them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from edgexception.architecture import Architecture
from edgexception.preprocess import Preprocess, PreprocessChanges
from edgexception.recipe_data import (
    Batch,
    CalibrationSpec,
    ClassName,
    Count,
    Decay,
    EvaluationSpec,
    LearningRate,
    Milliseconds,
    Seed,
    Share,
    Source,
    Spec,
    Threads,
    Width,
)
from edgexception.recipe_prune import PruneSpec
from edgexception.targets import Activations, Precision, find_target

AUTO = ("auto",)
"""Runtimes of a target that are not named: all of them."""


# --- stages -------------------------------------------------------------------------------------


class CheckpointModel(Spec):
    """A trained network from a file: .keras, .h5, .pth or .safetensors."""

    kind: Literal["checkpoint"]
    path: Path
    classes: Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=65536)] | None = None
    """Class names in the order of the logits, when the file does not carry them."""
    preprocess: PreprocessChanges | None = None
    """How photos become inputs, where it differs from what the file says or, if it says nothing,
    from its format's convention. What is left out stays as it is there."""


class _Training(Spec):
    """How a network learns from labelled images: cross-entropy, AdamW, a cosine after a warm-up."""

    source: Source
    epochs: Annotated[float, Field(gt=0.0, le=1_000_000.0)] = 10.0
    """How often every image is seen; 0.5 is half of them once."""
    batch_size: Count = 64
    learning_rate: LearningRate = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-4
    ema: Decay = 0.0
    """Decay of a moving average of the weights, which the network ends with; 0 is none."""
    bfloat16: bool = False
    """Compute layers in bfloat16, weights in float32: 1.7 times as fast where the processor or GPU
    has it; an x86 processor that has not is refused."""
    threads: Threads = 1
    """Of the processor. Every number of threads has its own last bits, so it must be said; the same
    number ends with the same bytes."""
    seed: Seed = 0


class TrainedHereModel(_Training):
    """A network that the recipe trains itself, from nothing."""

    kind: Literal["train"]
    architecture: Architecture
    preprocess: Preprocess


class FineTunedModel(_Training):
    """A trained network that learns other classes: its backbone, with a new head."""

    kind: Literal["fine-tune"]
    path: Path
    """The checkpoint: .keras, .h5, .pth or .safetensors."""
    head: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)]
    """Output features of the new dense layers; the last is the number of classes of the source."""
    preprocess: PreprocessChanges | None = None
    """Where it differs from the checkpoint's, as for a checkpoint."""
    epochs: Annotated[float, Field(gt=0.0, le=1_000_000.0)] = 1.0
    batch_size: Count = 32
    learning_rate: LearningRate = 5e-4


ModelSpec = Annotated[
    CheckpointModel | TrainedHereModel | FineTunedModel, Field(discriminator="kind")
]


class AutoPrecision(Spec):
    """Take layers out of INT8 until a bound holds, as few as it takes.

    Bounds are measured on calibration images against the float network, never on evaluation images,
    and without labels: an agreement of 0.99 also bounds the accuracy lost there at 0.01.
    """

    sqnr_db_min: Annotated[float, Field(ge=-200.0, le=200.0)] | None = None
    """Least signal-to-quantization-noise ratio of the logits."""
    agreement_min: Share | None = None
    """Least share of images on which the quantized network decides like the float network."""
    exceptions_max: Count = 8
    """Most exceptions (a separable convolution, or a layer of the stem, a shortcut or the head)."""
    weigh: Literal["count", "macs"] = "count"
    """What exceptions cost. count: each the same. macs: by their multiply-accumulates."""
    times: Path | None = None
    """Costs as measured on the target instead: a JSON file, layer name -> what the layer takes
    longer in float than in INT8, in ms."""


class PrecisionSpec(Spec):
    """The layers that are not INT8; all others are.

    A name is a layer (`block5_sepconv1_pointwise`), a separable convolution (`block5_sepconv1`), a
    block (`block5`) or a glob over any of them.
    """

    fp32: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()
    fp16: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()
    """Only the tensorrt dialect has float16 layers."""
    auto: AutoPrecision | None = None
    """fp16 where every dialect asked for has it, else fp32."""


class PtqSpec(Spec):
    """INT8 post-training quantization."""

    method: Literal["ptq"]
    activations: Activations = "asymmetric"
    """asymmetric: uint8 with a zero point. symmetric: int8, zero point 0, as TensorRT needs."""
    ranges: Literal["auto", "minmax", "percentile", "mse", "entropy"] = "auto"
    """auto: chosen per tensor by its measured effect on the logits. The others: one method for
    all tensors, as NNCF computes it; entropy as TensorRT's calibrator did."""
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.99
    """The upper percentile of `ranges: percentile`; the lower one mirrors it."""
    weight_bits: Literal["auto", 7, 8] = "auto"
    """7 avoids the int16 saturation of OpenVINO on x86 processors without VNNI; auto is 7 where a
    target has both, else 8."""
    equalization: bool = True
    """Rescale channels where that is exact and measurably helps."""
    bias_correction: bool = True
    """Bring the mean of every layer's output back to the float network's."""
    rounding: Literal["nearest", "learned"] = "learned"
    """learned: every weight takes the one of its neighbouring levels with which the layer best
    repeats its float outputs on calibration images, given the inputs that quantized layers make."""
    precision: PrecisionSpec | None = None
    """The layers that are not INT8; None is none."""


class QatSpec(PtqSpec):
    """INT8 quantization-aware training: the post-training result learns on."""

    method: Literal["qat"]  # type: ignore[assignment]
    source: Source | None = None
    """Images to learn from; None takes the calibration images. Labels count only where
    `distillation` is below 1."""
    steps: Count = 300
    batch_size: Count = 16
    learning_rate: LearningRate = 0.004
    """The peak, in levels: the most that a step moves a weight along its INT8 grid, about.
    Full-size Xception, 26.5 dB before, 60 steps: 28.7 dB with 0.003, 28.2 with 0.01, 25.6 with
    0.03."""
    distillation: Share = 1.0
    """Share of the loss that is the distance to the float network's logits; it needs no label. The
    rest is cross-entropy with the labels of `source`."""
    ema: Decay = 0.0
    """Decay of a moving average of the weights, which the network ends with; 0 is none."""
    threads: Threads = 1
    """Of the processor, as for training."""
    seed: Seed = 0

    @property
    def ptq(self) -> PtqSpec:
        """What the training starts from."""
        fields = {name: getattr(self, name) for name in PtqSpec.model_fields}
        return PtqSpec(**{**fields, "method": "ptq"})


QuantizeSpec = Annotated[PtqSpec | QatSpec, Field(discriminator="method")]


class ExportSpec(Spec):
    """How the network is written as ONNX."""

    dialects: tuple[Literal["onnxruntime", "openvino", "tensorrt"], ...] = ()
    """Dialects to write the network in beside those that the targets read."""
    precisions: Annotated[tuple[Literal["fp16", "int8", "int8-fp16"], ...], Field(min_length=1)] = (
        "int8",
    )
    """In which precisions `dialects` are written; fp32 always is. Only the tensorrt dialect has
    float16."""
    batch: Batch | None = None
    """A fixed batch size; None leaves it open, and each engine fixes its own."""


class TensorRtSpec(Spec):
    """How TensorRT builds. What its version cannot do is refused with the version that can."""

    workspace_mib: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    """Most scratch memory of a layer; None is what the device has."""
    version_compatible: bool = False
    """The engine opens in later versions of the same major version, too."""
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    """The GPUs that the engine opens on beside the one it is built on; may cost speed."""
    sparse_weights: bool = False
    """Use kernels for weights with 2 zeros in every 4. `prune: {sparsity: "2:4"}` sets it, too."""
    dla_core: Annotated[int, Field(ge=0, le=15)] | None = None
    """Run on this core of the Deep Learning Accelerator."""
    gpu_fallback: bool = False
    """What the DLA cannot run goes to the GPU, and the build record names it."""


class TargetSpec(Spec):
    """One device, and which of its runtimes and precisions to build and measure."""

    target: str
    runtimes: Annotated[tuple[str, ...], Field(min_length=1)]
    """[auto] is every runtime of the target: the report and the output folder name the fastest."""
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = ("fp32", "int8")
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads of the runtime; None is one per physical core the process may use."""
    dynamic_batch: bool = False
    """One engine takes every batch from 1 to the largest of `bench.batch_sizes`, and is best at the
    first of them. False: each of them has an engine of its own."""
    tensorrt: TensorRtSpec | None = None

    @property
    def runtime_names(self) -> tuple[str, ...]:
        """The runtimes by name. Raises UsageError where they are [auto] of an unknown target."""
        return tuple(find_target(self.target).runtimes) if self.runtimes == AUTO else self.runtimes


class BenchSpec(Spec):
    """How latency is measured. Engines take turns, round by round, so that noise hits all alike."""

    batch_sizes: Annotated[tuple[Batch, ...], Field(min_length=1)] = (1,)
    warmup_ms: Milliseconds = 500
    duration_ms: Milliseconds = 2000
    """Measured time per engine, batch size and round."""
    min_iterations: Count = 30
    rounds: Annotated[int, Field(ge=1, le=100)] = 3


class Gates(Spec):
    """Bounds on measured values; one that is missed ends the run with exit code 1."""

    top1_min: Share | None = None
    """Least top-1 accuracy of every INT8 engine."""
    top1_drop_max: Share | None = None
    """Most top-1 accuracy that an INT8 engine may lose against FP32 of the same runtime."""
    agreement_min: Share | None = None
    """Least share of images on which an INT8 engine decides like the float network."""
    sqnr_db_min: Annotated[float, Field(ge=-200.0, le=200.0)] | None = None
    """Least signal-to-quantization-noise ratio of the logits of an INT8 engine."""
    executed_int8_share_min: Share | None = None
    """Least share of the convolutions' multiply-accumulates that an INT8 engine runs in INT8, as
    its runtime tells of the optimized network."""
    speedup_min: Annotated[float, Field(gt=0.0, le=1000.0)] | None = None
    """Least FP32 latency / INT8 latency of a runtime at the first batch size: the geometric mean
    over the rounds of the ratio of the medians in that round."""
    pruned_top1_drop_max: Share | None = None
    """Most top-1 accuracy that the pruned network may lose against the unpruned one, both in torch;
    the other gates compare with the pruned network."""
    pruned_agreement_min: Share | None = None
    """Least share of images on which the pruned network decides like the unpruned one."""


class Recipe(Spec):
    """The whole way of one network to its devices. An absent section is a stage that is not run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    """Lower-case letters, digits and hyphens: it names the output folder."""
    model: ModelSpec
    calibration: CalibrationSpec | None = None
    evaluation: EvaluationSpec | None = None
    prune: PruneSpec | None = None
    quantize: QuantizeSpec | None = None
    export: ExportSpec = ExportSpec()
    targets: tuple[TargetSpec, ...] = ()
    bench: BenchSpec | None = None
    gates: Gates = Gates()
