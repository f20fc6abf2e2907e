"""Train the landmark network of the default face detector on the open synthetic corpus.

python training/train_landmarks.py --data corpora/synthetic --photos FACES --output runs/landmarks

The pictures are cropped anew in every epoch as a detector might have cropped them; one crop in four shows no
face: clutter, a face much too near or too far, upside down, or in shuffled pieces. With `--photos` (see
synthesize.py) the neutral photographs of the training people join in; those of the test people are an honest
check on real pictures. Writes a model folder with `metrics.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from actionunits.face_landmarks import FaceLandmarker, FaceLandmarkerConfig
from actionunits.landmarks import SCHEMES
from actionunits.synthesis.person import read_people, read_template

MIRROR = list(SCHEMES["ibug68"].mirror)
NO_FACE_SHARE = 0.25
PHOTO_SHARE = 0.08
PICTURE_SIZE = 160


def main() -> None:
    """Train, check after every epoch, save."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    people = json.loads((args.data / "manifest.json").read_text())["people"]
    train, test = (read_split(args.data, split) for split in ("train", "test"))
    photos = {s: read_photos(args.photos, people[s]) if args.photos else None for s in ("train", "test")}
    clutter = read_clutter()
    model = FaceLandmarker.from_pretrained(args.init, dtype=torch.float32) if args.init else None
    model = model or FaceLandmarker(FaceLandmarkerConfig())
    model = model.to(device, memory_format=torch.channels_last)
    steps = args.epochs * (len(train[0]) // args.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    start, metrics = time.time(), {}
    for epoch in range(args.epochs):
        loss = train_epoch(model, optimizer, schedule, train, photos["train"], clutter, args.batch, epoch)
        metrics = {
            "epoch": epoch,
            "loss": loss,
            "seconds": round(time.time() - start),
            "pictures": len(train[0]),
        }
        metrics["synthetic test people"] = check(model, *test)
        if photos["test"]:
            metrics["photographs of test people"] = check(model, *photos["test"])
        print(json.dumps(metrics), flush=True)
        save(model, metrics, args.output)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the synthetic corpus")
    parser.add_argument("--photos", type=Path, help="folder of the photographs and people.csv")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="folder of a landmark network to start from")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All pictures (N, 160, 160, 3) uint8 and points (N, 68, 2) of a split."""
    rows = load_dataset(
        "parquet", data_files=sorted(str(p) for p in folder.glob(f"{split}-*.parquet")), split="train"
    )
    pictures = torch.empty(len(rows), PICTURE_SIZE, PICTURE_SIZE, 3, dtype=torch.uint8)
    for i, image in enumerate(tqdm(rows["image"], f"reading {split}", unit="picture")):
        pictures[i] = torch.from_numpy(np.array(image))
    return pictures, torch.from_numpy(np.asarray(rows.with_format("numpy")["landmarks"], dtype=np.float32))


def read_photos(folder: Path, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The neutral photographs of some people, the face in half of a square, and their points."""
    pictures, points = [], []
    for row in read_people(folder):
        if row["name"] not in names:
            continue
        marks = read_template(row["picture"].with_suffix(".tem"))
        low, high = marks.min(0), marks.max(0)
        side = 1.8 * float((high - low).max())
        left, top = (low + high) / 2 - side / 2
        image = Image.open(row["picture"]).convert("RGB")
        box = (left, top, left + side, top + side)
        image = image.transform(
            (PICTURE_SIZE * 4,) * 2, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR
        )
        pictures.append(np.array(image.reduce(4)))
        points.append((marks + 0.5 - [left, top]) * (PICTURE_SIZE / side) - 0.5)
    return torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(points).astype(np.float32))


def read_clutter() -> torch.Tensor:
    """Pictures without a face (N, 160, 160, 3) uint8: tiles of scikit-image's sample pictures."""
    import skimage.data

    folder, tiles = Path(skimage.data.__file__).parent, []
    for path in sorted([*folder.glob("*.png"), *folder.glob("*.jpg")]):
        if path.stem == "astronaut":
            continue
        image = np.array(Image.open(path).convert("RGB"))
        for size in (160, 320):
            for y in range(0, image.shape[0] - size + 1, size // 2):
                for x in range(0, image.shape[1] - size + 1, size // 2):
                    tile = Image.fromarray(image[y : y + size, x : x + size])
                    tiles.append(np.array(tile.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(tiles))


def train_epoch(model, optimizer, schedule, train, photos, clutter, batch: int, epoch: int) -> float:
    """One pass; returns the mean loss."""
    model.train()
    order, total = torch.randperm(len(train[0])), 0.0
    steps = len(order) // batch
    for step in tqdm(range(steps), f"epoch {epoch}", unit="batch"):
        chosen = order[step * batch : (step + 1) * batch]
        pictures, points = train[0][chosen], train[1][chosen].clone()
        if photos is not None:
            swap = torch.randint(len(photos[0]), (math.ceil(PHOTO_SHARE * batch),))
            pictures[: len(swap)], points[: len(swap)] = photos[0][swap], photos[1][swap]
        is_face = torch.ones(batch)
        quarter = math.ceil(NO_FACE_SHARE * batch / 4)
        pictures[-quarter:] = clutter[torch.randint(len(clutter), (quarter,))]
        fits = torch.arange(batch) < batch - 2 * quarter
        crops, labels = random_crops(pictures, points, fits, model.config.image_size)
        scrambled = slice(batch - 4 * quarter, batch - 2 * quarter)
        pieces, upside_down = crops[scrambled].chunk(2)
        crops[scrambled] = torch.cat([shuffled(pieces), upside_down.flip(2)])
        is_face[-4 * quarter :] = 0
        crops = crops.to(model.device).contiguous(memory_format=torch.channels_last)
        loss = model(crops, labels=labels.to(model.device), is_face=is_face.to(model.device)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
    return total / steps


def random_crops(pictures: torch.Tensor, points: torch.Tensor, fits: torch.Tensor, size: int):
    """Crops (B, 3, size, size) in -1..1 as a detector might cut them, and their points in parts of the side.

    Where `fits` is false the crop shows the picture much too near or too far.
    """
    count = len(pictures)
    low, high = points[:, 17:].amin(1), points[:, 17:].amax(1)
    side = (high - low).amax(1) * torch.empty(count).uniform_(1.3, 2.1)
    center = (low + high) / 2 + torch.empty(count, 2).uniform_(-0.11, 0.11) * side[:, None]
    misfit = torch.where(
        torch.rand(count) < 0.5, torch.empty(count).uniform_(0.15, 0.4), torch.empty(count).uniform_(2.2, 4)
    )
    side = torch.where(fits, side, side * misfit)
    center = torch.where(fits[:, None], center, torch.rand(count, 2) * PICTURE_SIZE)
    angle = torch.randn(count) * 0.2
    flip = torch.rand(count) < 0.5
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(
        -1, 2, 2
    )  # crop -> picture
    turn[flip, :, 0] *= -1
    scale = side[:, None, None] / 2 * turn  # crop coordinates -1..1 -> picture pixels
    theta = torch.cat([scale, center[..., None] + 0.5], 2) * (2 / PICTURE_SIZE)
    theta[:, :, 2] -= 1
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    crops = F.grid_sample(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, grid, align_corners=False)
    labels = torch.linalg.solve(scale, (points - center[:, None]).mT).mT / 2 + 0.5
    labels[flip] = labels[flip][:, MIRROR]
    return disturb(crops), labels


def shuffled(crops: torch.Tensor) -> torch.Tensor:
    """The crops cut into 4 x 4 pieces, put together in another order."""
    side = crops.shape[-1] // 4
    pieces = crops.unfold(2, side, side).unfold(3, side, side).flatten(2, 3)[:, :, torch.randperm(16)]
    return pieces.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(crops.shape)


def disturb(crops: torch.Tensor) -> torch.Tensor:
    """Contrast, brightness, and for a quarter of the crops a grey block before the face."""
    count, _, size, _ = crops.shape
    gain, offset = (
        torch.empty(count, 1, 1, 1).uniform_(0.7, 1.3),
        torch.empty(count, 1, 1, 1).uniform_(-0.2, 0.2),
    )
    crops = (crops * gain + offset).clamp(-1, 1)
    for i in torch.nonzero(torch.rand(count) < 0.25).flatten().tolist():
        x, y, w, h = (int(v) for v in torch.randint(size // 3, (4,)) * torch.tensor([2.5, 2.5, 1, 1]))
        crops[i, :, y : y + h, x : x + w] = float(torch.empty(1).uniform_(-1, 1))
    return crops


@torch.inference_mode()
def check(
    model: FaceLandmarker, pictures: torch.Tensor, points: torch.Tensor, limit: int = 1000
) -> dict[str, float]:
    """Error of `locate` from a rough box: distance of the inner points in outer-eye distances."""
    model.eval()
    errors, scores = [], []
    for picture, truth in zip(pictures[:limit].numpy(), points[:limit].numpy(), strict=True):
        low, high = truth[17:].min(0), truth[17:].max(0)
        margin = 0.35 * (high - low).max()
        [(found, score)] = model.locate(Image.fromarray(picture), [(*(low - margin), *(high + margin))])
        eyes = np.linalg.norm(truth[36] - truth[45])
        errors.append(np.linalg.norm(found - truth, axis=1)[17:].mean() / eyes)
        scores.append(score)
    return {
        "pictures": len(errors),
        "inner error mean": round(float(np.mean(errors)), 4),
        "inner error median": round(float(np.median(errors)), 4),
        "worse than 10 %": round(float(np.mean(np.array(errors) > 0.1)), 4),
        "face score below 0.5": round(float(np.mean(np.array(scores) < 0.5)), 4),
    }


def save(model: FaceLandmarker, metrics: dict, output: Path) -> None:
    """Half-precision weights, configuration and metrics."""
    copy = FaceLandmarker(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(output)
    temporary = output / "metrics.tmp"
    temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    temporary.replace(output / "metrics.json")


if __name__ == "__main__":
    main()
