"""Train the landmark network of the default face detector on the open synthetic corpus.

python training/train_landmarks.py --data corpora/synthetic --photos FACES --output runs/landmarks

All pictures lie on the device, where every step cuts and disturbs them anew (`landmark_batches.py`). With
`--photos` (see synthesize.py) the neutral photographs of the training people join in; those of the test
people are an honest check on real pictures. Writes a model folder with `metrics.json`, and `state.pt`, from
which the same command goes on if it was stopped.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from actionunits.face_landmarks import FaceLandmarker, FaceLandmarkerConfig
from actionunits.synthesis.person import read_people, read_template
from landmark_batches import LandmarkBatches, Pictures

PICTURE_SIZE = 160
# The templates, and so the renderings, have the brow's points 17-26 in its middle, MediaPipe's points on its
# upper edge, as landmarks.py reads them. How much higher that is, in distances of the outer eye corners: the
# mean of the templates' own upper edge and of MediaPipe's points, over the portraits of the training people.
BROW_LIFT = (0.026, 0.023, 0.042, 0.041, 0.048, 0.048, 0.041, 0.042, 0.023, 0.026)
SHAPE = {"hidden_sizes": [32, 48, 96, 160, 160], "map_size": 48}  # 1.9 million parameters


def main() -> None:
    """Train, check now and then, save."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    start = time.time()
    splits = ("train", "test")
    train, test = (read_split(args.data, split) for split in splits)
    photos: dict[str, Pictures | None] = dict.fromkeys(splits)
    if args.photos:
        people = json.loads((args.data / "manifest.json").read_text())["people"]
        photos = {split: read_photos(args.photos, people[split]) for split in splits}
    if args.brows == "upper":
        train, test = lift_brows(train), lift_brows(test)
        photos = {split: faces and lift_brows(faces) for split, faces in photos.items()}
    print(f"{len(train[0])} pictures read in {time.time() - start:.0f} s", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = LandmarkBatches(train, photos["train"], read_clutter(), device)
    training = Training(args, len(train[0]) // args.batch, device)
    while training.epoch < args.epochs:
        figures = training.run_epoch(batches)
        if training.epoch % args.check_every == 0 or training.epoch == args.epochs:
            model = training.averaged.module
            limit = 1000 if training.epoch == args.epochs else 200
            figures["synthetic test people"] = check(model, *test, limit)
            if photos["test"]:
                figures["photographs of test people"] = check(model, *photos["test"], limit)
            save(model, figures, args.output)
        print(json.dumps(figures), flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the synthetic corpus")
    parser.add_argument("--photos", type=Path, help="folder of the photographs and people.csv")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="folder of a landmark network to start from")
    parser.add_argument(
        "--brows", choices=("upper", "middle"), default="upper", help="where the points of the brows lie"
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--map-size", type=int, default=SHAPE["map_size"], help="see FaceLandmarkerConfig")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--check-every", type=int, default=10, metavar="EPOCHS")
    parser.add_argument("--save-every", type=float, default=20, metavar="SECONDS", help="the state")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Training:
    """Network, its running mean (which is what is kept), optimiser, schedule; goes on from `state.pt`.

    Args:
        args: the command line's.
        steps: in an epoch.
        device: to train on.
    """

    def __init__(self, args: argparse.Namespace, steps: int, device: torch.device):
        if steps < 1:
            raise ValueError(f"the corpus has fewer training pictures than a batch of {args.batch}")
        model = FaceLandmarker.from_pretrained(args.init, dtype=torch.float32) if args.init else None
        model = model or FaceLandmarker(FaceLandmarkerConfig(**SHAPE | {"map_size": args.map_size}))
        self.model = model.to(device, memory_format=torch.channels_last)
        mean_of = max(10, min(1000, steps * args.epochs // 20))  # steps that the running mean looks back
        self.averaged = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / mean_of), use_buffers=True
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, weight_decay=1e-2, fused=device.type == "cuda"
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, args.lr, total_steps=steps * args.epochs, pct_start=0.15
        )
        self.args, self.steps, self.device = args, steps, device
        self.epoch, self.seconds = 0, 0.0
        self.file = args.output / "state.pt"
        args.output.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            self._resume()

    def run_epoch(self, batches: LandmarkBatches) -> dict:
        """One pass over the pictures; returns what to log. The state is saved between epochs."""
        self.model.train()
        start, total = time.time(), torch.zeros((), device=self.device)
        for chosen in tqdm(batches.order(self.args.batch), f"epoch {self.epoch}", unit="batch"):
            crops, labels, is_face = batches.draw(chosen, self.model.config.image_size)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                crops = crops.contiguous(memory_format=torch.channels_last)
                loss = self.model(crops, labels=labels, is_face=is_face).loss
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.optimizer.step()
            self.schedule.step()
            self.averaged.update_parameters(self.model)
            total += loss.detach()
        figures = {"epoch": self.epoch, "loss": round(float(total) / self.steps, 5)}
        self.epoch += 1
        self.seconds += time.time() - start
        if self.epoch == self.args.epochs or time.time() - self.saved > self.args.save_every:
            self._save()
        return figures | {"seconds": round(self.seconds, 1), "pictures": len(batches)}

    saved = 0.0  # time

    def _parts(self) -> dict:
        return {k: getattr(self, k) for k in ("model", "averaged", "optimizer", "schedule")}

    def _save(self) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"epoch": self.epoch, "seconds": self.seconds, "plan": self._plan()}
        temporary = self.file.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.file)
        self.saved = time.time()

    def _resume(self) -> None:
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        if state["plan"] != self._plan():
            raise ValueError(
                f"{self.file} belongs to another training, {state['plan']}, not to {self._plan()}; "
                "choose an empty folder"
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        torch.manual_seed(self.args.seed + self.epoch)  # not the first epochs' crops once more
        print(f"going on after epoch {self.epoch - 1}", flush=True)

    def _plan(self) -> dict:
        return {k: getattr(self.args, k) for k in ("epochs", "batch", "lr", "seed", "brows")} | {
            "steps": self.steps
        }


def lift_brows(faces: Pictures) -> Pictures:
    """The same pictures, the brows' points moved by `BROW_LIFT` from the mouth towards the eyes."""
    pictures, points = faces[0], faces[1].clone()
    up = (points[:, [36, 45]] - points[:, [48, 54]]).mean(1)
    upright = 0.78  # height of the outer eye corners above the mouth's, in their distance
    points[:, 17:27] += torch.tensor(BROW_LIFT)[:, None] * up[:, None] / upright
    return pictures, points


def read_split(folder: Path, split: str) -> Pictures:
    """All pictures (N, 160, 160, 3) uint8 and points (N, 68, 2) of a split."""
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no {split}-*.parquet; synthesize.py writes them")
    with ThreadPoolExecutor() as pool:
        shards = list(tqdm(pool.map(_read_shard, files), f"reading {split}", len(files), unit="file"))
    pictures, points = (np.concatenate(part) for part in zip(*shards, strict=True))
    return torch.from_numpy(pictures), torch.from_numpy(points)


def _read_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    table = pyarrow.parquet.read_table(path, columns=["image", "landmarks"]).combine_chunks()
    encoded = table["image"].combine_chunks().field("bytes").to_pylist()
    pictures = np.stack([np.array(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in encoded])
    points = table["landmarks"].combine_chunks()
    points = getattr(points, "storage", points)  # datasets, once imported, wraps it in a type of its own
    points = points.flatten().flatten().to_numpy()
    return pictures, points.astype(np.float32).reshape(len(pictures), -1, 2)


def read_photos(folder: Path, names: list[str]) -> Pictures:
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
