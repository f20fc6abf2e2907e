r"""Convert weights of facenet-pytorch's InceptionResnetV1 to the folder of a `GlobalExpressionEncoder`.

    python -m actionunits.models.gtlenet.convert_facenet_to_hf --weights 20180402-114759-vggface2.pt \
        --pretraining faces --output encoders/vggface2

Weights trained on ImageNet or on emotions give two rows of the paper's Table 6 (`--pretraining`). The last
layers, `last_linear`, `last_bn` and `logits`, are replaced by the embedding.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from actionunits.converting import misfits, read_weights
from actionunits.image_processing_au import AUImageProcessor

from .configuration_gtlenet import GlobalExpressionEncoderConfig, Pretraining
from .modeling_gtlenet import GlobalExpressionEncoder

# Ours -> theirs, applied in this order to every name of our state dict.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^trunk\.stem\.0\.", "conv2d_1a."),
    (r"^trunk\.stem\.1\.", "conv2d_2a."),
    (r"^trunk\.stem\.2\.", "conv2d_2b."),
    (r"^trunk\.stem\.4\.", "conv2d_3b."),
    (r"^trunk\.stem\.5\.", "conv2d_4a."),
    (r"^trunk\.stem\.6\.", "conv2d_4b."),
    (r"^trunk\.stage1\.", "repeat_1."),
    (r"^trunk\.reduction\.", "mixed_6a."),
    (r"^trunk\.stage2\.", "repeat_2."),
    (r"^reduction\.", "mixed_7a."),
    (r"^stage3\.", "repeat_3."),
    (r"^(repeat_\d\.\d+|mixed_6a)\.branches\.0\.0\.", r"\1.branch0."),  # branches of one layer are not lists
    (r"\.branches\.(\d)\.", r".branch\1."),
    (r"\.project\.", ".conv2d."),
    (r"\.norm\.", ".bn."),
)
LEFT_BEHIND = ("last_linear.", "last_bn.", "logits.")
NEW = ("embedding.", "norm.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, type=Path, help="state dict of an InceptionResnetV1")
    parser.add_argument(
        "--pretraining", default="faces", choices=get_args(Pretraining), help="what it was trained for"
    )
    parser.add_argument("--output", required=True, type=Path, help="model folder to write")
    args = parser.parse_args(arguments)
    model = convert(read_weights(args.weights), GlobalExpressionEncoderConfig(pretraining=args.pretraining))
    model.save_pretrained(args.output)
    AUImageProcessor(**model.config.processor_options).save_pretrained(args.output)


def convert(state: Mapping[str, Tensor], config: GlobalExpressionEncoderConfig) -> GlobalExpressionEncoder:
    """Return the encoder with these weights and a new embedding layer.

    Args:
        state: State dict of facenet-pytorch's InceptionResnetV1, with or without its last layers.
        config: Configuration with the same architecture.

    Returns:
        The encoder in evaluation mode.

    Raises:
        ValueError: Keys are missing or unexpected, or shapes differ from the configuration's.
    """
    model = GlobalExpressionEncoder(config)
    ours = model.state_dict()
    names = {name: facenet_name(name, config) for name in ours if not name.startswith(NEW)}
    # Old versions of PyTorch did not count batches.
    found = {name for name in state if not name.startswith(LEFT_BEHIND)}
    expected = {name for name in names.values() if not name.endswith("num_batches_tracked") or name in found}
    if problems := misfits(expected, found):
        raise ValueError(
            f"These are not weights of facenet-pytorch's InceptionResnetV1; {problems}. Pass the state dict "
            "itself, torch.save(model.state_dict(), path)."
        )
    tensors = {name: torch.as_tensor(state[theirs]) for name, theirs in names.items() if theirs in expected}
    for name, tensor in tensors.items():
        if tensor.shape != ours[name].shape:
            raise ValueError(
                f"{names[name]} is {tuple(tensor.shape)}, but the configuration makes it "
                f"{tuple(ours[name].shape)}."
            )
    model.load_state_dict(ours | tensors)
    return model.eval()


def facenet_name(name: str, config: GlobalExpressionEncoderConfig) -> str:
    """Name of one of our tensors there: trunk.stage1.2.project.weight -> repeat_1.2.conv2d.weight."""
    name = name.replace(f"stage3.{config.depths[2]}.", "block8.", 1)  # the last block has its own name
    name = name.replace("block8.branches.0.0.", "block8.branch0.")
    for ours, theirs in RENAMES:
        name = re.sub(ours, theirs, name)
    return name


if __name__ == "__main__":
    main()
