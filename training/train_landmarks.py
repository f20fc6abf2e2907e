"""Train the landmark network of the default face detector on the open synthetic corpus.

python training/train_landmarks.py --data corpora/synthetic --photos FACES --output runs/landmarks

All pictures are kept on the device, where each step crops and degrades them (`landmark_batches.py`). With
`--photos` (see synthesize.py) training includes the neutral photographs of the training people. To adapt to
photographs, the mean error on those of the validation people is subtracted from the trained network; those of
the test people are for evaluation on real pictures. It writes a model folder with `metrics.json`, and
`state.pt`, from which repeating the command resumes.
"""

from __future__ import annotations

import argparse
import copy
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

from actionunits.data.synthetic import read_manifest
from actionunits.face_landmarks import GAPS, FaceLandmarker, FaceLandmarkerConfig
from actionunits.files import whole_file
from actionunits.model_card import weights_hashes
from actionunits.synthesis.person import read_people, read_template
from landmark_batches import MIRROR, LandmarkBatches, Pictures
from network_training import read_state, seeded_generator
from number_options import from_one, from_zero, not_negative, positive

PICTURE_SIZE = 160
# Offsets of MediaPipe's points, as landmarks.py reads them, from those of the same number in the templates
# and renderings: across (from the outer corner of the right eye, 36, to that of the left eye, 45) and down,
# in units of the distance of these corners. The mean over the training people's portraits and both sides. The
# contour (0-16) keeps iBUG's equal distances.
MEDIAPIPE_OFFSETS = {
    **{17: (0.009, -0.051), 18: (-0.033, -0.023), 19: (0.018, -0.036), 20: (0.013, -0.033)},
    **{21: (-0.010, -0.058)},
    **{27: (0.0, -0.008), 28: (0.0, 0.003), 29: (0.0, 0.044), 30: (0.0, 0.027)},
    **{31: (-0.014, 0.022), 32: (-0.023, -0.015), 33: (0.0, 0.017)},
    **{36: (0.001, 0.002), 37: (-0.030, 0.009), 38: (0.002, 0.0), 39: (0.006, 0.003), 40: (0.016, 0.003)},
    **{41: (-0.015, 0.004), 48: (0.001, 0.001), 49: (0.020, -0.012), 50: (0.003, 0.002), 51: (0.0, 0.001)},
    **{57: (0.0, 0.001), 58: (0.031, 0.007), 59: (-0.010, -0.008)},
    **{60: (-0.028, 0.005), 61: (0.024, 0.009), 62: (0.0, 0.004), 66: (0.0, 0.005), 67: (0.024, 0.011)},
}
UPRIGHT = 0.78  # height of the outer eye corners above the mouth's, in the distance of the eye corners
PARTS = {"brows": slice(17, 27), "nose": slice(27, 36), "eyes": slice(36, 48), "lips": slice(48, 68)}
SHAPE = {"hidden_sizes": [32, 48, 96, 160, 160], "map_size": 48}  # 1.9 million parameters


def main() -> None:
    """Train, evaluate every few epochs, and save."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    start = time.time()
    splits = ("train", "test")
    photos: dict[str, Pictures | None] = dict.fromkeys((*splits, "validation"))
    if args.photos:
        people = people_of(args.data, tuple(photos))
        photos = {split: read_photos(args.photos, people[split]) for split in photos}
    train, test = (read_split(args.data, split) for split in splits)
    if args.points == "mediapipe":
        train, test = with_mediapipe_points(train), with_mediapipe_points(test)
        photos = {split: faces and with_mediapipe_points(faces) for split, faces in photos.items()}
    print(f"{len(train[0])} pictures read in {time.time() - start:.0f} s", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = LandmarkBatches(train, photos["train"], read_clutter(), device, args.fine)
    training = Training(args, len(train[0]) // args.batch, device)
    while training.epoch < args.epochs:
        figures = training.run_epoch(batches)
        if training.epoch % args.check_every == 0 or training.epoch == args.epochs:
            model = centred(training.result(), photos["validation"])
            limit = 1000 if training.epoch == args.epochs else 200
            tests = {"synthetic test people": test, "photographs of test people": photos["test"]}
            for name, faces in tests.items():
                figures |= compare_looks(model, name, faces, limit) if faces else {}
            save(model, figures, args.output)
        training.save_if_due()  # last, as resuming goes on behind what precedes it
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
    parser.add_argument("--fine", action="store_true", help="train the network of the fine looks")
    parser.add_argument(
        "--points", choices=("mediapipe", "template"), default="mediapipe", help="definition of the points"
    )
    parser.add_argument("--epochs", type=from_one, default=60)
    parser.add_argument(
        "--map-size",
        type=from_zero,
        help=f"see FaceLandmarkerConfig; default: that of --init, else {SHAPE['map_size']}",
    )
    parser.add_argument("--batch", type=from_one, default=512)
    parser.add_argument("--lr", type=positive, default=4e-3)
    parser.add_argument("--check-every", type=from_one, default=10, metavar="EPOCHS")
    parser.add_argument(
        "--save-every", type=not_negative, default=20, metavar="SECONDS", help="between states"
    )
    parser.add_argument("--seed", type=from_zero, default=0)
    args = parser.parse_args()
    if args.fine and not args.init:
        parser.error("--fine needs --init, the folder of the network whose points are refined")
    if args.init and not (args.init / "config.json").is_file():
        parser.error(f"--init {args.init} holds no network: it has no config.json")
    return args


class Training:
    """Network, its exponential moving average (the result), optimiser and schedule; resumes from `state.pt`.

    Args:
        args: The command line.
        steps: Steps per epoch.
        device: Device of the training.
    """

    def __init__(self, args: argparse.Namespace, steps: int, device: torch.device):
        if steps < 1:
            raise ValueError(f"the corpus has fewer training pictures than a batch of {args.batch}")
        self.whole = first_weights(args).to(device, memory_format=torch.channels_last)
        self.model = trained_part(self.whole, args.fine)
        mean_of = max(10, min(1000, steps * args.epochs // 20))  # time constant of the average [steps]
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
        self.epoch, self.seconds, self.saved = 0, 0.0, 0.0  # saved: the time of the last state
        self.file = args.output / "state.pt"
        args.output.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            self._resume()

    def run_epoch(self, batches: LandmarkBatches) -> dict:
        """Train an epoch, whose random numbers depend on seed and epoch only; return figures for the log."""
        torch.manual_seed(seeded_generator(self.args.seed, self.epoch).initial_seed())
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
        return figures | {"seconds": round(self.seconds, 1), "pictures": len(batches)}

    def save_if_due(self) -> None:
        """Save the state after the last epoch, and where `--save-every` has passed since the last one."""
        if self.epoch < self.args.epochs and time.time() - self.saved <= self.args.save_every:
            return
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"epoch": self.epoch, "seconds": self.seconds, "plan": self._plan()}
        with whole_file(self.file) as part:
            torch.save(state, part)
        self.saved = time.time()

    def result(self) -> FaceLandmarker:
        """The whole network with the averaged weights of the trained part."""
        whole = copy.deepcopy(self.whole)
        trained_part(whole, self.args.fine).load_state_dict(self.averaged.module.state_dict())
        return whole

    def _parts(self) -> dict:
        return {k: getattr(self, k) for k in ("model", "averaged", "optimizer", "schedule")}

    def _resume(self) -> None:
        state = read_state(self.file, self.device)
        plan = self._plan()
        if plan != plan | state["plan"]:  # an older one may have fewer keys
            raise ValueError(
                f"{self.file} belongs to another training, {state['plan']}, not to {plan}; "
                "choose an empty folder"
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        print(f"resuming after epoch {self.epoch - 1}", flush=True)

    def _plan(self) -> dict:
        """Settings that resuming must not change; `begin` has the hashes of the weights of `--init`."""
        return {k: getattr(self.args, k) for k in ("epochs", "batch", "lr", "seed", "points", "fine")} | {
            "steps": self.steps,
            "photos": bool(self.args.photos),
            "map_size": self.whole.config.map_size,
            "begin": weights_hashes(self.args.init) if self.args.init else None,
        }


def people_of(corpus: Path, splits: tuple[str, ...]) -> dict[str, list[str]]:
    """Names of the people in each split, by the corpus' manifest.

    Raises:
        ValueError: The manifest lacks them.
    """
    people = read_manifest(corpus).get("people")
    if not isinstance(people, dict) or not all(isinstance(people.get(split), list) for split in splits):
        raise ValueError(
            f"{corpus / 'manifest.json'} does not name the people of {', '.join(splits)} for --photos, but "
            f"has {people!r:.60}; use a corpus of synthesize.py, or leave --photos out."
        )
    return people


def first_weights(args: argparse.Namespace) -> FaceLandmarker:
    """The initial network: a new one, or that of `--init`, with a copy for `--fine`."""
    changes = {} if args.map_size is None else {"map_size": args.map_size}
    if not args.init:
        return FaceLandmarker(FaceLandmarkerConfig(**SHAPE | changes))
    before = FaceLandmarker.from_pretrained(args.init, dtype=torch.float32, **changes)
    if not args.fine or before.fine is not None:
        return before
    before.config.fine_look = True
    both = FaceLandmarker(before.config)
    weights = before.state_dict()
    both.load_state_dict(weights | {f"fine.{name}": weight for name, weight in weights.items()})
    return both


def trained_part(whole: FaceLandmarker, fine: bool) -> FaceLandmarker:
    """The trained network: that of the fine looks, or the first one."""
    return whole.fine if fine and whole.fine is not None else whole


def with_mediapipe_points(faces: Pictures) -> Pictures:
    """The same pictures with points moved by `MEDIAPIPE_OFFSETS` along the face's axes."""
    pictures, points = faces[0], faces[1].clone()
    offsets = torch.zeros(points.shape[1:])
    for point, (across, down) in MEDIAPIPE_OFFSETS.items():
        offsets[point] = torch.tensor([across, down])
        offsets[MIRROR[point]] = torch.tensor([-across, down])
    across = points[:, 45] - points[:, 36]
    down = (points[:, [48, 54]] - points[:, [36, 45]]).mean(1) / UPRIGHT
    return pictures, points + offsets @ torch.stack([across, down], 1)


@torch.no_grad()
def centred(model: FaceLandmarker, faces: Pictures | None) -> FaceLandmarker:
    """A copy whose last look's biases subtract the mean error on faces, averaged with its mirror image."""
    model = copy.deepcopy(model).eval()
    if faces is None:
        return model
    errors = []
    for picture, truth in zip(*(part.numpy() for part in faces), strict=True):
        [(found, _)] = model.locate(Image.fromarray(picture), [rough_box(truth)])
        crop = model._crop_of_points(found)  # of the last look, except for its correction
        errors.append(crop.transform(found) - crop.transform(truth))
    error = torch.from_numpy(np.mean(errors, axis=0) / model.config.image_size)
    error = (error + error[MIRROR] * torch.tensor([-1, 1])) / 2
    last = trained_part(model, fine=True)
    last.points.bias -= error.flatten().to(last.points.bias)
    return model


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
    points = getattr(points, "storage", points)  # `datasets` wraps it in an extension type, if imported
    points = points.flatten().flatten().to_numpy()
    return pictures, points.astype(np.float32).reshape(len(pictures), -1, 2)


def read_photos(folder: Path, names: list[str]) -> Pictures:
    """Neutral photographs of these people, square crops around the face, and their points.

    Raises:
        ValueError: There are none.
    """
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
    if not pictures:
        raise ValueError(
            f"{folder} has no photograph of {len(names)} people of the corpus, such as {names[:2]}; pass "
            "the folder that the corpus was rendered from as --photos."
        )
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


def rough_box(points: np.ndarray) -> tuple[float, ...]:
    """A box around a face like a detector's: (xmin, ymin, xmax, ymax) from points (68, 2)."""
    low, high = points[17:].min(0), points[17:].max(0)
    margin = 0.35 * (high - low).max()
    return (*(low - margin), *(high + margin))


def compare_looks(model: FaceLandmarker, name: str, faces: Pictures, limit: int) -> dict[str, dict]:
    """The figures of `check`, and those without fine looks if the network has them."""
    figures = {name: check(model, *faces, limit)}
    if model.fine is not None:
        model = copy.deepcopy(model)
        model.fine = None
        figures[f"{name}, no fine looks"] = check(model, *faces, limit)
    return figures


@torch.inference_mode()
def check(
    model: FaceLandmarker, pictures: torch.Tensor, points: torch.Tensor, limit: int = 1000
) -> dict[str, float]:
    """Errors of `locate` from a rough box, in units of the distance of the outer eye corners.

    They are of the inner points and of parts of the face; `GAPS` are compared by their correlation with the
    ground truth (0 if constant).
    """
    model.eval()
    errors, scores, gaps = [], [], []
    for picture, truth in zip(pictures[:limit].numpy(), points[:limit].numpy(), strict=True):
        [(found, score)] = model.locate(Image.fromarray(picture), [rough_box(truth)])
        eyes = np.linalg.norm(truth[36] - truth[45])
        errors.append(np.linalg.norm(found - truth, axis=1) / eyes)
        gaps.append([gap_widths(truth) / eyes, gap_widths(found) / eyes])
        scores.append(score)
    parts, inner = np.array(errors), np.mean(np.array(errors)[:, 17:], axis=1)
    true_gaps, found_gaps = np.array(gaps).transpose(1, 2, 0)
    figures = {
        "inner error mean": np.mean(inner),
        "inner error median": np.median(inner),
        "worse than 10 %": np.mean(inner > 0.1),
        "face score below 0.5": np.mean(np.array(scores) < 0.5),
        **{f"{part} error mean": parts[:, span].mean() for part, span in PARTS.items()},
    }
    for gap, *both in zip(GAPS, true_gaps, found_gaps, strict=True):
        figures[f"{gap} gap correlation"] = np.corrcoef(both)[0, 1] if np.ptp(both, axis=1).all() else 0.0
    return {"pictures": len(errors), **{name: round(float(value), 4) for name, value in figures.items()}}


def gap_widths(points: np.ndarray) -> np.ndarray:
    """Mean width of each of `GAPS`, (G,) in the unit of points (68, 2)."""
    pairs = (points[np.array(gap)] for gap in GAPS.values())  # (pairs, 2, 2): start and end, x and y
    return np.array([np.linalg.norm(p[:, 0] - p[:, 1], axis=1).mean() for p in pairs])


def save(model: FaceLandmarker, metrics: dict, output: Path) -> None:
    """Save weights in half precision, configuration and metrics."""
    copy = FaceLandmarker(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(output)
    with whole_file(output / "metrics.json") as part:
        part.write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main()
