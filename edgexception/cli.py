"""The `edgex` command: parse, call one function, print, exit code."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgexception import __version__
from edgexception.console import Console, exit_codes

if TYPE_CHECKING:
    from edgexception.pipeline import Last
    from edgexception.recipe import Recipe

app = typer.Typer(
    name="edgex",
    help="Deploy trained Xception image classifiers on edge devices.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (.yaml).")]
Source = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE|CHECKPOINT",
        help="A recipe (.yaml), or a trained network (.keras, .h5, .pth, .safetensors) with flags.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="Output folder. Default: build/<name of the recipe>."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Device = Annotated[
    str | None, typer.Option(help="ssh://user@host[:port], or a name in devices.yaml.")
]
PowerMode = Annotated[
    str | None,
    typer.Option(help="Time a Jetson in this mode of nvpmodel, then put back the mode it had."),
]
LockClocks = Annotated[
    bool, typer.Option("--lock-clocks", help="Hold a Jetson's clocks at their highest while timed.")
]
Keep = Annotated[
    bool, typer.Option("--keep", help="Leave on the device what was sent there, for the next time.")
]


def _option(kind: Any, text: str, *names: str) -> Any:
    return Annotated[kind, typer.Option(*names, help=text)]


_MODEL: dict[str, Any] = {
    "classes": _option(str | None, "Class names in the order of the logits: cup,fork,glass."),
    "input_size": _option(int | None, "Side of the network's square input in pixels."),
    "resize": _option(str | None, "stretch or shortest-side."),
    "interpolation": _option(str | None, "nearest, bilinear, bicubic or lanczos."),
}
_PRUNE: dict[str, Any] = _MODEL | {
    "macs": _option(float | None, "Share of the multiply-accumulates that is left: 0.5."),
    "parameters": _option(float | None, "Share of the parameters that is left."),
    "size": _option(float | None, "Share of the bytes of the weights that is left."),
    "latency": _option(float | None, "Share of the latency on --target that is left."),
    "target": _option(str | None, "A device of `edgex targets`: its latency, its alignment."),
    "runtime": _option(list[str], "Of the engines that are timed. Default: the target's first."),
    "precision": _option(list[str], "Of the engines that are timed. Default: fp32."),
    "threads": _option(int | None, "Of the engines that are timed. Default: one a core."),
    "importance": _option(
        str | None, "taylor (default) or activation, both on photos; magnitude or batchnorm."
    ),
    "ranking": _option(str | None, "global (default) or local: every layer loses the same share."),
    "align": _option(
        int | None, "Cut widths are multiples of this. Default: the target's, else 8."
    ),
    "calibration": _option(Path | None, "Photos to measure importance on."),
    "images": _option(int | None, "How many calibration images to take. Default: 128."),
    "evaluation": _option(Path | None, "Other photos, to compare with the unpruned network on."),
    "device": Device,
    "keep": Keep,
    "plan_only": _option(bool, "Say which widths would be cut, and cut nothing.", "--plan-only"),
}
_QUANTIZE: dict[str, Any] = _MODEL | {
    "calibration": _option(Path | None, "Photos to calibrate on: a folder, .csv or .jsonl."),
    "images": _option(int | None, "How many calibration images to take. Default: 128."),
    "crops": _option(int | None, "Random crops of each photo. Default: 1, the whole photo."),
    "evaluation": _option(Path | None, "Other photos: to compare on; labelled for accuracy."),
    "activations": _option(
        str | None, "asymmetric or symmetric. Default: symmetric for TensorRT alone."
    ),
    "ranges": _option(str | None, "auto (default), minmax, percentile, mse or entropy."),
    "weight_bits": _option(str | None, "auto (default), 7 or 8."),
}
_EXPORT: dict[str, Any] = _QUANTIZE | {
    "dialect": _option(list[str], "onnxruntime, openvino or tensorrt; may be repeated."),
}
_FORMS: dict[str, Any] = _EXPORT | {
    "precision": _option(
        list[str], "int8 (default), fp16 or int8-fp16; may be repeated. fp16: tensorrt only."
    ),
}
_ENGINE: dict[str, Any] = _QUANTIZE | {
    "target": _option(str | None, "A device of `edgex targets`."),
    "runtime": _option(
        list[str], "A runtime of the target; may be repeated. Default: auto, all of them."
    ),
    "precision": _option(
        list[str],
        "auto (default: float and INT8 side by side, FP16 where there is), fp32, fp16, int8 or "
        "int8-fp16; may be repeated.",
    ),
    "batch": _option(
        str | None, "Batch sizes separated by commas. Default: 1; with --dynamic 1,8."
    ),
    "dynamic": _option(
        bool | None,
        "One engine for all batches from 1 to the largest, best at the first, instead of one each.",
        "--dynamic",
    ),
    "threads": _option(int | None, "Threads of the runtime. Default: one a core."),
    "device": Device,
    "keep": Keep,
}
_BENCH = _ENGINE | {"power_mode": PowerMode, "lock_clocks": LockClocks}
_WHERE = ("device", "keep", "power_mode", "lock_clocks")


def _stage_command(name: str, last: Last, flags: dict[str, Any], text: str) -> None:
    """Add the command that runs a recipe, or a checkpoint with flags, up to one stage."""

    def command(source: Path, out: Path | None, json_: bool, quiet: bool, **given: Any) -> None:
        with exit_codes():
            from edgexception.short_form import Flags, recipe_of

            where = {name: given.pop(name) for name in _WHERE if name in given}
            end: Last = "prune-plan" if given.pop("plan_only", False) else last
            said: dict[str, Any] = {
                key: tuple(v) if isinstance(v, list) else v for key, v in given.items()
            }
            recipe = recipe_of(source, Flags(**said), last)
            _run(recipe, end, out, json_, quiet, **where)

    command.__doc__ = text
    annotations = {"source": Source, **flags, "out": Out, "json_": Json, "quiet": Quiet}
    command.__annotations__ = annotations
    switches = ("json_", "quiet", "keep", "plan_only", "lock_clocks")
    defaults: dict[str, Any] = dict.fromkeys(switches, False)
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                key,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if key == "source" else defaults.get(key),
                annotation=kind,
            )
            for key, kind in annotations.items()
        ]
    )
    app.command(name)(command)


@app.command("run")
def run_recipe(
    recipe: RecipeFile,
    out: Out = None,
    json_: Json = False,
    quiet: Quiet = False,
    device: Device = None,
    keep: Keep = False,
    power_mode: PowerMode = None,
    lock_clocks: LockClocks = False,
) -> None:
    """Run a whole recipe: import, prune, quantize, export, build, measure, report, gates."""
    with exit_codes():
        from edgexception.recipe_file import load_recipe

        where = {"power_mode": power_mode, "lock_clocks": lock_clocks}
        _run(load_recipe(recipe), "bench", out, json_, quiet, device=device, keep=keep, **where)


_stage_command("import", "import", _MODEL, "Read a trained network and check it.")
_stage_command("prune", "prune", _PRUNE, "Take out the channels that matter least.")
_stage_command("quantize", "quantize", _QUANTIZE, "Quantize to INT8 on calibration photos.")
_stage_command(
    "sensitivity", "sensitivity", _EXPORT, "Measure what each edge and weight costs in INT8."
)
_stage_command("export", "export", _FORMS, "Write ONNX, in float and in INT8, and compare.")
_stage_command("build-engine", "build", _ENGINE, "Build engines for a target.")
_stage_command("bench", "bench", _BENCH, "Build engines, and measure latency and accuracy.")


def _run(
    recipe: Recipe,
    last: Last,
    out: Path | None,
    json_: bool,
    quiet: bool,
    **where: Any,
) -> None:
    from edgexception.errors import GateFailed, UsageError
    from edgexception.pipeline import Listener, Where, run
    from edgexception.recipe_file import dump_recipe
    from edgexception.report.render import gate_lines, to_text

    if where.get("keep") and where["device"] is None:
        raise UsageError("--keep has no effect without --device")
    console = Console(quiet)
    folder = out or Path("build") / recipe.name
    with console.data_only():
        listener = Listener(console.stage, console.progress, console.warn, console.tell)
        report, fault = run(recipe, folder, last, listener, Where(**where))
    if not fault and all(line.reused for line in report.stages):
        console.say(f"nothing to do: all {len(report.stages)} stages were done before")
    with console.reader_may_leave():
        if json_:
            typer.echo(report.model_dump_json(indent=1))
        else:
            typer.echo(f"# the recipe that was used\n{dump_recipe(recipe)}")
            typer.echo(to_text(report))
            typer.echo(f"results: {folder} (report.md, report.json)")
    if fault:
        raise fault
    if report.failed_gates:
        raise GateFailed("; ".join(gate_lines(report.failed_gates)))


@app.command("import-results")
def import_results(
    results: Annotated[Path, typer.Argument(help="The folder `results` of a kit.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The run that made the kit. Default: build/<its name>."),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take what a kit built and measured on its device back into the run that made the kit."""
    with exit_codes():
        from edgexception.device import RecordedDevice
        from edgexception.recipe_file import load_recipe

        folder = out or Path("build") / RecordedDevice(results).results.name
        _run(load_recipe(folder / "recipe.yaml"), "bench", folder, json_, quiet, results=results)


@app.command()
def check(recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...")]) -> None:
    """Check recipes without running them; every fault is named with file and line."""
    with exit_codes():
        from edgexception.errors import UsageError
        from edgexception.recipe_file import load_recipe

        faults = []
        for path in recipes:
            try:
                load_recipe(path)
            except UsageError as error:  # noqa: PERF203 - a few files
                faults.append(str(error))
            else:
                typer.echo(f"{path}: ok")
        if faults:
            raise UsageError("\n".join(faults))


@app.command()
def targets(
    name: Annotated[str | None, typer.Argument(help="All that is known of one target.")] = None,
    json_: Json = False,
    device: Device = None,
) -> None:
    """List the targets, and what each can do here or on a device now, and why not."""
    with exit_codes():
        from edgexception.doctor import target_lines, target_rows

        rows = target_rows(device, name)
        typer.echo(json.dumps(rows, indent=1) if json_ else "\n".join(target_lines(rows)))


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what is installed, what is missing, and how to get it."""
    with exit_codes():
        from edgexception.doctor import examine, finding_lines

        findings = examine()
        typer.echo(json.dumps(findings, indent=1) if json_ else "\n".join(finding_lines(findings)))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    with exit_codes():
        from edgexception.recipe_file import recipe_schema

        typer.echo(json.dumps(recipe_schema(), indent=1))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgex {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; as one of several processes, run it or help to train."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        app(prog_name="edgex")
        return
    from edgexception.train.processes import leading, serve

    if os.environ["RANK"] == "0":
        with leading():
            app(prog_name="edgex")
    else:
        with exit_codes(), Console(quiet=True).data_only():
            serve()
