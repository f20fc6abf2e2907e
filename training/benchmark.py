"""Measure what the fast implementations save against the plain ones that the tests check them with.

    python training/benchmark.py                              # all methods, batches of 1 and 8, two threads
    python training/benchmark.py --methods ac2d --batches 8   # less
    python training/benchmark.py --bf16 --compile             # autocast; the fast model compiled

Each figure comes from a process of its own. It builds the model and its inputs, notes the peak memory so far
(`ru_maxrss` of getrusage; on a GPU the allocator's peak), runs once, and takes the growth of the peak as the
run's memory; then it runs again for the times, of which the shortest counts. CPU time, of all threads,
still tells something where other programs keep the machine busy. Ratios are fast over plain.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(
    str(Path(__file__).parents[1] / "tests")
)  # the plain implementations are the tests' references


def ac2d(plain: bool) -> tuple[nn.Module, int]:
    """AC2D at the paper's size: the model and its input size in pixels."""
    from actionunits.models.ac2d import Ac2dConfig, Ac2dForAUDetection
    from references.ac2d import Ac2dPlain

    return (Ac2dPlain(image_size=176) if plain else Ac2dForAUDetection(Ac2dConfig())), 176


def auformer(plain: bool) -> tuple[nn.Module, int]:
    """AUFormer with ViT-B/16, which is the same for both."""
    from actionunits.models.auformer import AUFormerConfig, AUFormerForAUDetection
    from references.auformer import FastContextExpert, PlainAUFormer

    model = AUFormerForAUDetection(AUFormerConfig())
    return (PlainAUFormer(model, FastContextExpert) if plain else model), 224


def auformer_experts(plain: bool) -> tuple[nn.Module, int]:
    """Only what AUFormer adds to the transformer: the experts of all its blocks."""
    from actionunits.models.auformer import AUFormerConfig, AUFormerForAUDetection
    from references.auformer import ExpertsAlone

    return ExpertsAlone(AUFormerForAUDetection(AUFormerConfig()), plain), 224


METHODS: dict[str, Callable[[bool], tuple[nn.Module, int]]] = {
    "ac2d": ac2d,
    "auformer": auformer,
    "auformer-experts": auformer_experts,
}
"""For each method what builds its fast or its plain model, of twelve action units, with its input size."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each method, or with `--measure` one measurement as JSON."""
    args = parse_arguments(arguments)
    if args.measure:
        method, variant, mode, batch = args.measure
        print(json.dumps(measure(args, method, variant == "plain", mode == "train", int(batch))))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{args.threads} CPU threads"
    for method in args.methods:
        print(f"\n## {method} ({device}, torch {torch.__version__})\n")
        print("| figure | fast | plain | ratio |\n|---|--:|--:|--:|", flush=True)
        for name, fast, plain, unit in figures(args, method):
            ratio = f"{fast / plain:.2f}" if plain else "-"  # no growth: below the peak of building the model
            print(f"| {name} | {fast:,.4g} {unit} | {plain:,.4g} {unit} | {ratio} |", flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs, of which the shortest counts")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the fast model")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def figures(args: argparse.Namespace, method: str):
    """Yield name, fast value, plain value and unit of each row."""
    sizes = [count(method, plain) for plain in (False, True)]
    yield "parameters", sizes[0][0] / 1e6, sizes[1][0] / 1e6, "M"
    yield "multiply-adds a picture (matrices, convolutions)", sizes[0][1] / 1e9, sizes[1][1] / 1e9, "G"
    for mode, what in (("forward", "forward"), ("train", "training step")):
        for batch in args.batches:
            fast, plain = (measure_apart(args, method, variant, mode, batch) for variant in ("fast", "plain"))
            yield f"{what}, batch {batch}", fast["seconds"] * 1e3, plain["seconds"] * 1e3, "ms"
            yield (
                f"{what}, batch {batch}, CPU time",
                fast["cpu_seconds"] * 1e3,
                plain["cpu_seconds"] * 1e3,
                "ms",
            )
            yield f"{what}, batch {batch}, peak memory", fast["megabytes"], plain["megabytes"], "MB"


def count(method: str, plain: bool) -> tuple[int, float]:
    """Return parameters and multiply-adds of one picture."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model, size = METHODS[method](plain)
        model.eval()(pixel_values=torch.empty(1, 3, size, size))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2


def measure_apart(args: argparse.Namespace, method: str, variant: str, mode: str, batch: int) -> dict:
    """Measure in a fresh process."""
    options = ["--threads", str(args.threads), "--repeats", str(args.repeats)]
    options += ["--bf16"] * args.bf16 + ["--compile"] * args.compile
    command = [sys.executable, __file__, *options, "--measure", method, variant, mode, str(batch)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return json.loads(lines[-1])


def measure(args: argparse.Namespace, method: str, plain: bool, train: bool, batch: int) -> dict[str, float]:
    """Return the shortest times [seconds] of a run, and the peak memory [megabytes] that the first adds."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, size = METHODS[method](plain)
    model = model.to(device).train(train)
    model = torch.compile(model, fullgraph=True) if args.compile and not plain else model
    inputs: dict[str, Any] = {"pixel_values": torch.randn(batch, 3, size, size, device=device)}
    if train:
        inputs["au_centers"] = torch.rand(batch, 12, 2, 2, device=device) * size
        inputs["labels"] = torch.randint(0, 2, (batch, 12), device=device).float()

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16), torch.set_grad_enabled(train):
            output = model(**inputs)
        if train:
            getattr(output, "loss", output).backward()
            model.zero_grad()

    before = peak_megabytes(device)
    first = timed(run, device)
    peak = peak_megabytes(device) - before
    times = [timed(run, device) for _ in range(args.repeats)] or [first]
    wall, cpu = (min(column) for column in zip(*times, strict=True))
    return {"seconds": wall, "cpu_seconds": cpu, "megabytes": peak}


def timed(run: Callable[[], None], device: str) -> tuple[float, float]:
    """Return the seconds that a run takes, by the clock and of CPU time."""
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    synchronize()
    started, cpu_started = time.perf_counter(), time.process_time()
    run()
    synchronize()
    return time.perf_counter() - started, time.process_time() - cpu_started


def peak_megabytes(device: str) -> float:
    """Return the peak memory of this process so far, on its device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    main()
