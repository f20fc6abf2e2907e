"""Measure every method, and what its fast implementation saves against a plain one.

    python training/benchmark.py                                    # all methods, two CPU threads
    python training/benchmark.py --methods ac2d --batches 8         # less
    python training/benchmark.py --device cuda --dtype bf16 --compile
    python training/benchmark.py --methods gda --onnx               # ONNX Runtime against PyTorch, too

It prints a table a method: parameters, multiply-adds, and for each batch size time and peak memory of a
forward pass and of a training step (forward and backward). Ratios are fast over plain, both measured in the
same run; they tell more than the times where other programs keep the machine busy, and so does the CPU time
of all threads. The plain implementations are the references of the tests, or the same network with its
attention written out; a method without one has no ratios. Batches of LAC are of clips of 16 frames. What
normalises pooled features over the batch cannot train on one picture, so its rows begin with two.

Each figure comes from a process of its own: it builds model and inputs, runs once to warm up, runs for the
memory, then for the times, of which the shortest counts. Memory is what a run needs beyond what is there
before it, by the CUDA allocator or, on a CPU, by the resident set (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModel

import actionunits
from actionunits.onnx_model import OnnxAUModel, export_onnx
from number_options import from_one

sys.path.append(str(Path(__file__).parents[1] / "tests"))

MODES = {"forward": "forward", "train": "training step"}
VARIANTS = ("fast", "plain")


@dataclass(frozen=True)
class Method:
    """What is measured of a method, at the paper's size and with its twelve action units.

    Attributes:
        build: Makes the fast model, or given true the plain one, on the device that is the default.
        inputs: Makes a training batch of so many pictures: keywords of the model, `labels` among them.
        has_plain: Whether there is a plain model.
        least_training_batch: Smallest batch that it can be trained on.
    """

    build: Callable[[bool], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    has_plain: bool = True
    least_training_batch: int = 1


def faces(size: int) -> Callable[[int], dict[str, Tensor]]:
    """Batches of aligned faces of size x size pixels, with centres and labels."""

    def make(batch: int) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.randn(batch, 3, size, size),
            "au_centers": torch.rand(batch, 12, 2, 2) * size,
            "labels": torch.randint(0, 2, (batch, 12)).float(),
        }

    return make


def clips(size: int, channels: int = 3, frames: int = 16) -> Callable[[int], dict[str, Tensor]]:
    """Batches of clips of such faces, or of their feature maps."""

    def make(batch: int) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.randn(batch, frames, channels, size, size),
            "au_centers": torch.rand(batch, frames, 12, 2, 2) * size,
            "labels": torch.randint(0, 2, (batch, frames, 12)).float(),
        }

    return make


def written_out(config_class: type) -> Callable[[bool], nn.Module]:
    """Models whose plain form has its attention written out."""

    def build(plain: bool) -> nn.Module:
        return AutoModel.from_config(config_class(), attn_implementation="eager" if plain else "sdpa")

    return build


def ac2d(plain: bool) -> nn.Module:
    """AC2D; the plain one keeps every attention matrix."""
    from references.ac2d import Ac2dPlain

    return Ac2dPlain() if plain else actionunits.Ac2dForAUDetection(actionunits.Ac2dConfig())


def auformer(plain: bool) -> nn.Module:
    """AUFormer with ViT-B/16, which is the same for both."""
    from references.auformer import FastContextExpert, PlainAUFormer

    model = actionunits.AUFormerForAUDetection(actionunits.AUFormerConfig())
    return PlainAUFormer(model, FastContextExpert) if plain else model


def auformer_experts(plain: bool) -> nn.Module:
    """Only what AUFormer adds to the transformer: the experts of all its blocks."""
    from references.auformer import ExpertsAlone

    return ExpertsAlone(actionunits.AUFormerForAUDetection(actionunits.AUFormerConfig()), plain)


def gtlenet(plain: bool) -> nn.Module:
    """GTLE-Net; the plain one has classifiers, heads and maps one after the other, all of them always."""
    from references.gtlenet import PlainGtleNet

    config = actionunits.GtleNetConfig()
    return PlainGtleNet(config) if plain else actionunits.GtleNetForAUDetection(config)


def lac(plain: bool) -> nn.Module:
    """LAC with ResNet-50, which is the same for both."""
    from references.lac import PlainLac, fast_roi_align

    model = actionunits.LacForAUDetection(actionunits.LacConfig())
    return PlainLac(model, fast_roi_align) if plain else model


def lac_head(plain: bool) -> nn.Module:
    """Only what LAC adds to the backbone: maps, vectors, graph, LSTM and losses."""
    from references.lac import Features

    model = lac(plain)
    (model.model if plain else model).resnet = Features()
    return model


METHODS = {
    "gda": Method(lambda plain: actionunits.GdaForAUDetection(actionunits.GdaConfig()), faces(112), False, 2),
    "lsc": Method(written_out(actionunits.LscConfig), faces(112), least_training_batch=2),
    "ac2d": Method(ac2d, faces(176)),
    "auformer": Method(auformer, faces(224)),
    "auformer-experts": Method(auformer_experts, faces(224)),
    "lac": Method(lac, clips(224)),
    "lac-head": Method(lac_head, clips(7, channels=2048)),
    "gtlenet": Method(gtlenet, faces(256)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each method, or with `--measure` one measurement as JSON."""
    args = parse_arguments(arguments)
    if args.measure:
        method, variant, mode, batch = args.measure
        print(json.dumps(measure(args, method, variant == "plain", mode == "train", int(batch))))
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU threads"
    how = f"{args.dtype}, compiled" if args.compile else args.dtype
    for method in args.methods:
        rows = list(figures(args, method))
        print(f"\n## {method} ({where}, {how}, torch {torch.__version__})\n")
        print("| figure | fast | plain | ratio |\n|---|--:|--:|--:|")
        for name, unit, fast, plain in rows:
            shown = "- | -" if plain is None else f"{plain:,.4g} {unit} | {fast / plain:.2f}"
            print(f"| {name} | {fast:,.4g} {unit} | {shown} |", flush=True)
        if args.onnx:
            print_onnx(args, method)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batches", nargs="+", type=from_one, default=[1, 8])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16 by autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the fast model")
    parser.add_argument("--onnx", action="store_true", help="also run the model's ONNX export, on the CPU")
    parser.add_argument("--threads", type=from_one, default=2, help="of the CPU")
    parser.add_argument(
        "--repeats", type=from_one, default=5, help="timed runs, of which the shortest counts"
    )
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; leave it out to measure on the CPU")
    return args


def figures(args: argparse.Namespace, method: str) -> Iterator[tuple[str, str, float, float | None]]:
    """Yield name, unit, fast value and plain value (if any) of each row."""
    variants = VARIANTS if METHODS[method].has_plain else VARIANTS[:1]
    sizes = [count(method, variant == "plain") for variant in variants]
    rows = [
        (mode, batch)
        for mode in MODES
        for batch in args.batches
        if mode == "forward" or batch >= METHODS[method].least_training_batch
    ]
    runs = [(*row, variant) for row in rows for variant in variants]
    with tqdm(runs, desc=method, unit="run", leave=False, disable=None) as bar:
        results = {run: measure_apart(args, method, *run) for run in bar}

    def row(name: str, unit: str, values: list[float]) -> tuple[str, str, float, float | None]:
        return name, unit, values[0], values[1] if len(values) > 1 else None

    yield row("parameters", "M", [size[0] / 1e6 for size in sizes])
    yield row("multiply-adds, batch 1 (matrices, convolutions)", "G", [size[1] / 1e9 for size in sizes])
    for mode, batch in rows:
        what = f"{MODES[mode]}, batch {batch}"
        found = [results[mode, batch, variant] for variant in variants]
        yield row(what, "ms", [1e3 * f["seconds"] for f in found])
        yield row(f"{what}, CPU time", "ms", [1e3 * f["cpu_seconds"] for f in found])
        yield row(f"{what}, peak memory", "MB", [f["megabytes"] for f in found])


def count(method: str, plain: bool) -> tuple[int, float]:
    """Return parameters, and multiply-adds of one picture or clip."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model, inputs = METHODS[method].build(plain).eval(), METHODS[method].inputs(1)
        model(pixel_values=inputs["pixel_values"], au_centers=inputs["au_centers"])
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2


def measure_apart(
    args: argparse.Namespace, method: str, mode: str, batch: int, variant: str
) -> dict[str, float]:
    """Measure in a fresh process."""
    options = [f"--{name}={getattr(args, name)}" for name in ("device", "dtype", "threads", "repeats")]
    options += ["--compile"] * args.compile
    command = [sys.executable, __file__, *options, "--measure", method, variant, mode, str(batch)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return json.loads(lines[-1])


def measure(args: argparse.Namespace, method: str, plain: bool, train: bool, batch: int) -> dict[str, float]:
    """Return the shortest times [seconds] of a run, and the memory [megabytes] that it needs."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = METHODS[method].build(plain).to(args.device).train(train)
    model = torch.compile(model, fullgraph=True) if args.compile and not plain else model  # type: ignore[assignment]
    inputs = {name: value.to(args.device) for name, value in METHODS[method].inputs(batch).items()}
    if not train:
        del inputs["labels"]

    def run() -> None:
        with (
            torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"),
            torch.set_grad_enabled(train),
        ):
            output = model(**inputs)
        if train:
            getattr(output, "loss", output).backward()
            model.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()

    run()
    memory = needed_megabytes(run, args.device)
    wall, cpu = (min(times) for times in zip(*(timed(run) for _ in range(args.repeats)), strict=True))
    return {"seconds": wall, "cpu_seconds": cpu, "megabytes": memory}


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds that a run takes, by the clock and of CPU time."""
    started, cpu_started = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - started, time.process_time() - cpu_started


def needed_megabytes(run: Callable[[], None], device: str) -> float:
    """Return how far memory grows while a run lasts."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, to be counted when used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    before = resident_megabytes("VmRSS")
    run()
    return resident_megabytes("VmHWM") - before


def resident_megabytes(which: str) -> float:
    """Return the memory of this process: VmRSS, as it is, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+) kB", status)[1]) * 1024 / 1e6  # type: ignore[index]


def print_onnx(args: argparse.Namespace, method: str) -> None:
    """Print a table of forward passes by ONNX Runtime and by PyTorch, both in this process, in fp32."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = settled(METHODS[method].build(False), METHODS[method].inputs(2))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        onnx_model = OnnxAUModel(export_onnx(folder), model.config, args.threads)
    print("\n| figure | ONNX Runtime | PyTorch | ratio |\n|---|--:|--:|--:|")
    for batch in args.batches:
        drawn = METHODS[method].inputs(batch)
        inputs = {name: drawn[name] for name in onnx_model.input_names}
        with torch.inference_mode():
            runs = [functools.partial(run, **inputs) for run in (onnx_model, model)]
            fast, plain = (min(timed(run) for _ in range(args.repeats + 1))[0] * 1e3 for run in runs)
        print(
            f"| forward, batch {batch} | {fast:,.4g} ms | {plain:,.4g} ms | {fast / plain:.2f} |", flush=True
        )


@torch.no_grad()
def settled(model: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    """Return a new model with the batch statistics of its inputs, in evaluation mode.

    Without them the logits of random weights are so large, and rounded so coarsely, that exports seem wrong.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over batches
    model.train()(**{name: value for name, value in inputs.items() if name != "labels"})
    return model.eval()


if __name__ == "__main__":
    main()
