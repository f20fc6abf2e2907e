"""Draw Fig. 3 of AUFormer with the package's losses: gradients of a non-occurrence by its prediction.

    python training/plot_mdwa.py fig3.png

Left (Fig. 3a): weighted cross-entropy, WA, and MWA (gamma 1) at several margins. Right (Fig. 3b): MDWA at
margin 0.1 for AU2, AU17 and AU7, whose exponents follow from their occurrence rates in BP4D.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from actionunits.losses import (
    difficulty_exponents,
    mdwa_loss,
    weighted_asymmetric_loss,
    weighted_au_loss,
)

BP4D_RATES = {"AU2": 0.1710, "AU17": 0.3433, "AU7": 0.5490}
"""Occurrence rates in all coded frames of BP4D."""

PANEL, MARGIN = (620, 460), (70, 46, 24, 62)  # width, height; left, top, right, bottom [pixels]
SCALE = 2  # supersampling
COLOURS = ("#7f7f7f", "#1f77b4", "#2ca02c", "#d62728", "#9467bd")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw both panels into one PNG file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="PNG file")
    args = parser.parse_args(arguments)
    p = torch.arange(0.0005, 1, 0.0005, dtype=torch.float64)
    width, height = (SCALE * length for length in PANEL)
    image = Image.new("RGB", (2 * width, height), "white")
    for column, (title, curves) in enumerate((("a", losses_panel(p)), ("b", difficulties_panel(p)))):
        panel = draw_panel(f"({title}) gradient of a non-occurrence", p, curves)
        image.paste(panel, (column * width, 0))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    image.resize((2 * PANEL[0], PANEL[1]), Image.Resampling.LANCZOS).save(args.output)
    print(f"wrote {args.output}")


def losses_panel(p: Tensor) -> dict[str, Tensor]:
    """The curves of Fig. 3a, by name."""
    losses: dict[str, Callable] = {"WCE": weighted_au_loss, "WA": weighted_asymmetric_loss}
    for margin in (0.1, 0.2, 0.3):
        losses[f"MWA, m = {margin}"] = lambda x, y, margin=margin: mdwa_loss(x, y, margin=margin)
    return {name: gradient(p, loss) for name, loss in losses.items()}


def difficulties_panel(p: Tensor) -> dict[str, Tensor]:
    """The curves of Fig. 3b, by name."""
    curves = {}
    for label, rate in BP4D_RATES.items():
        gamma = difficulty_exponents([rate])
        curves[f"{label}, gamma = {gamma.item():.2f}"] = gradient(
            p, lambda x, y, gamma=gamma: mdwa_loss(x, y, gamma=gamma, margin=0.1)
        )
    return curves


def gradient(p: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Derivative of the loss of a non-occurrence by its logit, at predicted probabilities p (n,)."""
    logits = torch.logit(p).unsqueeze(1).requires_grad_()
    (slope,) = torch.autograd.grad(len(p) * loss(logits, torch.zeros_like(logits)), logits)
    return slope[:, 0]


def draw_panel(title: str, p: Tensor, curves: dict[str, Tensor]) -> Image.Image:
    """Draw curves over p in [0, 1] with axes, grid and legend, at `SCALE` times the size."""
    width, height = (SCALE * length for length in PANEL)
    left, top, right, bottom = (SCALE * length for length in MARGIN)
    highest = 1.05 * max(float(curve.max()) for curve in curves.values())
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=15 * SCALE)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x * (width - left - right), height - bottom - y / highest * (height - top - bottom)

    for tick in range(11):
        x, y = tick / 10, tick / 10 * highest
        draw.line([place(x, 0), place(x, highest)], "#e6e6e6", SCALE)
        draw.line([place(0, y), place(1, y)], "#e6e6e6", SCALE)
        if tick % 2 == 0:
            draw.text(_shift(place(x, 0), 0, 8), f"{x:.1f}", "black", font, anchor="ma")
            draw.text(_shift(place(0, y), -8, 0), f"{y:.2f}", "black", font, anchor="rm")
    draw.rectangle([place(0, highest), place(1, 0)], outline="black", width=SCALE)
    draw.text(_shift(place(0.5, highest), 0, -12), title, "black", font, anchor="ms")
    draw.text(_shift(place(0.5, 0), 0, 32), "predicted probability p", "black", font, anchor="ma")
    for number, ((name, curve), colour) in enumerate(zip(curves.items(), COLOURS, strict=False)):
        points = [place(x, y) for x, y in zip(p.tolist(), curve.tolist(), strict=True)]
        draw.line(points, colour, 3 * SCALE, joint="curve")
        corner = _shift(place(0, highest), 16, 20 + 24 * number)
        draw.line([corner, _shift(corner, 30, 0)], colour, 3 * SCALE)
        draw.text(_shift(corner, 38, 0), name, "black", font, anchor="lm")
    return image


def _shift(point: tuple[float, float], x: float, y: float) -> tuple[float, float]:
    return point[0] + SCALE * x, point[1] + SCALE * y


if __name__ == "__main__":
    main()
