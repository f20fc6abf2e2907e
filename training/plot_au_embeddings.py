r"""Draw AU embeddings by t-SNE: Fig. 6 of GTLE-Net, with and without masks, and Fig. 5 of AUFormer.

    python training/plot_au_embeddings.py --models runs/gtlenet/model runs/gtlenet-no-masks/model \
        --data corpora/synthetic --output fig6.png
    python training/plot_au_embeddings.py --models runs/auformer-unsupervised/model runs/auformer/model \
        --data corpora/synthetic --together --pictures 100 --output fig5.png

Rows are models, columns action units, dots pictures: orange where the action unit occurs, blue where not.
With `--together` all action units share a panel: dots are action units of pictures, coloured by action unit,
whose number is at the middle of its dots.
Below each panel is the mean share of a dot's ten nearest neighbours, before t-SNE, with the same label (or
action unit), and in parentheses the share by chance.
"""

from __future__ import annotations

import argparse
import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from tqdm import tqdm
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import actionunits  # noqa: F401  (registers the models)
from actionunits.action_units import au_label
from actionunits.data import AlignedFaces, prepare_synthetic
from actionunits.data.preparing import is_prepared, open_prepared
from actionunits.files import whole_file
from number_options import from_one, from_zero

SIDE, GAP, CAPTION = 200, 10, 24  # of a panel, between panels, and below them [pixels]
SCALE = 2  # supersampling
OCCURS, ABSENT = "#d55e00", "#0072b2"
NEIGHBOURS = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw all panels into one PNG file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", required=True, help="folders of GTLE-Net or AUFormer, one per row"
    )
    parser.add_argument("--data", required=True, help="prepared corpus, or the synthetic one")
    parser.add_argument("--split", default="test")
    parser.add_argument("--fold", default="", help="of a prepared corpus, such as 1 or part3")
    parser.add_argument("--pictures", type=from_one, default=1000)
    parser.add_argument("--together", action="store_true", help="all action units in one panel")
    parser.add_argument("--cache", type=Path, help="decoded pictures (default: beside the output)")
    parser.add_argument("--seed", type=from_zero, default=0)
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    args = parser.parse_args(arguments)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    faces = read_faces(args)
    make = together if args.together else one_by_one
    rows = [make(name, faces, args.seed) for name in args.models]
    image = draw_rows(rows)
    with whole_file(args.output) as part:
        image.save(part, "PNG")
    print(f"wrote {args.output}")


def read_faces(args: argparse.Namespace) -> AlignedFaces:
    """A random sample of the split's faces."""
    if is_prepared(args.data):
        faces = open_prepared(args.data).part(args.split, args.fold)
    else:
        cache = args.cache or args.output.parent / "prepared"
        faces = prepare_synthetic(args.data, args.split, cache)
    chosen = np.random.default_rng(args.seed).permutation(len(faces))[: args.pictures]
    return faces.select(np.sort(chosen))


def one_by_one(name: str, faces: AlignedFaces, seed: int) -> list[dict[str, Any]]:
    """A panel for each action unit of model and corpus: `title`, `dots` (n, 2) and `colours` (n,)."""
    embeddings, aus = embed(name, faces)
    panels = []
    for i, au in enumerate(tqdm(aus, desc=name, unit="AU", disable=None)):
        labels = faces.occurrence[:, faces.aus.index(au)]
        known = labels >= 0
        occurs, vectors = labels[known] == 1, embeddings[known, i]
        chance = occurs.mean() ** 2 + (1 - occurs.mean()) ** 2
        title = f"{au_label(au)}  {same_label_share(vectors, occurs):.2f} ({chance:.2f})"
        colours = np.where(occurs, OCCURS, ABSENT)
        panels.append({"title": title, "dots": project(vectors, seed), "colours": colours})
    return panels


def together(name: str, faces: AlignedFaces, seed: int) -> list[dict[str, Any]]:
    """One panel of all action units of model and corpus, each in its own colour, and `marks` (AU, place)."""
    embeddings, aus = embed(name, faces)
    vectors, units = embeddings.reshape(-1, embeddings.shape[-1]), np.tile(np.arange(len(aus)), len(faces))
    hues = [colorsys.hsv_to_rgb(i / len(aus), 0.8, 0.85) for i in range(len(aus))]
    names = np.array(["#" + "".join(f"{round(255 * part):02x}" for part in hue) for hue in hues])
    title = f"{len(aus)} AUs  {same_label_share(vectors, units):.2f} ({1 / len(aus):.2f})"
    dots = project(vectors, seed)
    marks = [(str(au), np.median(dots[units == i], axis=0)) for i, au in enumerate(aus)]
    return [{"title": title, "dots": dots, "colours": names[units], "marks": marks}]


def project(vectors: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE of vectors (n, D), as (n, 2) in [0, 1]."""
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    dots = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(vectors)
    return (dots - dots.min(0)) / np.maximum(np.ptp(dots, axis=0), 1e-9)


@torch.no_grad()
def embed(name: str, faces: AlignedFaces, batch_size: int = 50) -> tuple[np.ndarray, list[int]]:
    """AU embeddings (n, m, D) of a model, and its m action units that the corpus has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
    columns = [i for i, au in enumerate(model.config.aus) if au in faces.aus]
    if not hasattr(model, "au_embeddings"):
        raise ValueError(f"{name} is a {type(model).__name__}, which has no AU embeddings.")
    processor = AutoImageProcessor.from_pretrained(name)
    results = []
    for start in range(0, len(faces), batch_size):
        rows = range(start, min(start + batch_size, len(faces)))
        pictures, landmarks = [faces.picture(row) for row in rows], [faces.landmarks[row] for row in rows]
        inputs = processor(pictures, landmarks=landmarks, return_tensors="pt")  # preprocessed as in use
        results.append(model.au_embeddings(inputs["pixel_values"].to(device)).cpu())
    return torch.cat(results)[:, columns].numpy(), [model.config.aus[i] for i in columns]


def same_label_share(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Mean share of a vector's nearest neighbours with its label."""
    count = min(NEIGHBOURS, len(vectors) - 1)
    nearest = NearestNeighbors(n_neighbors=count).fit(vectors).kneighbors(return_distance=False)
    return float((labels[nearest] == labels[:, None]).mean())


def draw_rows(rows: list[list[dict[str, Any]]]) -> Image.Image:
    """Draw a grid of panels."""
    width, height = SIDE + GAP, SIDE + CAPTION + GAP
    columns = max(len(row) for row in rows)
    image = Image.new("RGB", (SCALE * (columns * width + GAP), SCALE * (len(rows) * height + GAP)), "white")
    draw = ImageDraw.Draw(image)
    for y, row in enumerate(rows):
        for x, panel in enumerate(row):
            draw_panel(draw, panel, left=SCALE * (x * width + GAP), top=SCALE * (y * height + GAP))
    return image.reduce(SCALE)


def draw_panel(draw: ImageDraw.ImageDraw, panel: dict[str, Any], left: int, top: int) -> None:
    """Draw a panel with its upper left corner at a pixel."""
    side, reach, font = SCALE * SIDE, 1.6 * SCALE, ImageFont.load_default(size=13 * SCALE)
    draw.rectangle([left, top, left + side, top + side], outline="#bbbbbb", width=SCALE)
    corner, inside = np.array([left, top]) + 0.04 * side, 0.92 * side
    for dot, colour in zip(panel["dots"], panel["colours"], strict=True):
        x, y = corner + inside * dot
        draw.ellipse([x - reach, y - reach, x + reach, y + reach], fill=str(colour))
    for text, place in panel.get("marks", []):
        x, y = corner + inside * place
        draw.text((x, y), text, "black", font, anchor="mm", stroke_width=SCALE, stroke_fill="white")
    draw.text((left + side / 2, top + side + SCALE * 4), panel["title"], "black", font, anchor="ma")


if __name__ == "__main__":
    main()
