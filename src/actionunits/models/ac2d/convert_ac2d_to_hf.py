"""Convert a snapshot of AC2D's authors to a model folder.

    python -m actionunits.models.ac2d.convert_ac2d_to_hf --snapshot BP4D.pth --corpus bp4d --output ac2d-bp4d

Their training saves a state dict, or from the second epoch on a dictionary of `model`, `K_data` and `V_data`
(the prototypes as keys and values) and `P_data` (1 / N).
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actionunits.action_units import CORPUS_AUS
from actionunits.converting import misfits, read_weights
from actionunits.image_processing_au import AUImageProcessor
from actionunits.modeling_au import module_names

from .configuration_ac2d import Ac2dConfig
from .modeling_ac2d import Ac2dForAUDetection

# Ours -> theirs, applied in this order to every name of our state dict; {j} is the number of the action unit.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^trunk\.stem\.convs\.", "stem.proj."),
    (r"^trunk\.stem\.", "stem."),
    (r"^trunk\.embedding\.", "patch_2."),
    (r"^trunk\.(stage\d)\.", r"\1."),
    (r"^branches\.(\d+)\.embedding\.", r"aus_patch_3.\1."),
    (r"^branches\.(\d+)\.norm\.", r"aus_norm.\1."),
    (r"^branches\.(\d+)\.classifier\.", r"aus_head.\1."),
    (r"^branches\.(\d+)\.intervention\.query\.", r"aus_data_attention.\1.qmap."),
    (r"^branches\.(\d+)\.intervention\.key\.", r"aus_data_attention.\1.kmap."),
    (r"^branches\.(\d+)\.intervention\.feature_map\.", r"aus_data_attention.\1.xmap."),
    (r"^branches\.(\d+)\.intervention\.confounder_map\.", r"aus_data_attention.\1.smap."),
    (r"\.position\.conv\.", ".pos.pa_conv."),
    (r"^(patch_2|aus_patch_3\.\d+)\.conv\.", r"\1.proj."),
    (r"\.attention\.query\.", ".attn.q."),
    (r"\.attention\.key_value\.", ".attn.kv."),
    (r"\.attention\.reduction\.", ".attn.sr."),
    (r"\.attention\.reduction_norm\.", ".attn.sr_norm."),
    (r"\.attention\.upsample\.", ".attn.up.0."),
    (r"\.attention\.upsample_norm\.", ".attn.up_norm."),
    (r"\.attention\.output\.", ".attn.proj."),
    (r"\.mlp\.expand\.", ".mlp.fc1."),
    (r"\.mlp\.project\.", ".mlp.fc2."),
)
PROTOTYPES = ("prototype", "prototype_count", "feature_sum", "feature_count")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--snapshot", required=True, type=Path, help="file of the authors' training")
    parser.add_argument(
        "--corpus", required=True, choices=sorted(CORPUS_AUS), help="whose action units it has"
    )
    parser.add_argument("--output", required=True, type=Path, help="model folder to write")
    args = parser.parse_args(arguments)
    model = convert(read_snapshot(args.snapshot), Ac2dConfig(aus=list(CORPUS_AUS[args.corpus])))
    model.save_pretrained(args.output)
    AUImageProcessor(**model.config.processor_options).save_pretrained(args.output)


def read_snapshot(path: str | Path) -> Mapping[str, Any]:
    """Read a snapshot.

    Raises:
        ValueError: The file is not a snapshot.
    """
    return read_weights(path)


def convert(snapshot: Mapping[str, Any], config: Ac2dConfig) -> Ac2dForAUDetection:
    """Return the model of a snapshot.

    The snapshot overrides the configuration: without prototypes it is of the first epoch, which trains
    without the intervention (`deconfounding_start="second_epoch"`). With them, `prototype_value` follows from
    K and V: V = K is the paper's Eq. 13, V = K / N the authors' code.

    Args:
        snapshot: State dict, or dictionary with 'model', 'K_data' (m, c), 'V_data' (m, c) and 'P_data'.
        config: Configuration with the snapshot's architecture and its action units in order.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: Keys are missing or unexpected, or shapes differ from the configuration's.
    """
    state, labels = snapshot.get("model", snapshot), module_names(config)
    settings: dict[str, Any] = {"deconfounding": "dynamic"}
    tensors: dict[str, Tensor] = {}
    if state is snapshot:
        settings["deconfounding_start"] = "second_epoch"
    else:
        _check_same("entries", expected={"model", "K_data", "V_data", "P_data"}, found=set(snapshot))
        settings["prototype_value"], values, count = _prototype(snapshot)
        for label, value in zip(labels, values, strict=False):
            prefix = f"branches.{label}.intervention"
            tensors |= {f"{prefix}.prototype": value[None], f"{prefix}.prototype_count": count}
    model = Ac2dForAUDetection(Ac2dConfig(**{**config.to_diff_dict(), **settings}))
    ours = model.state_dict()
    names = {name: authors_name(name, config) for name in ours if not name.endswith(PROTOTYPES)}
    _check_same("keys", expected=set(names.values()), found=set(state))
    if state is not snapshot and len(values) != len(labels):
        raise ValueError(f"K_data of the snapshot has {len(values)} rows for {len(labels)} action units.")
    tensors |= {name: torch.as_tensor(state[theirs]) for name, theirs in names.items()}
    for name, tensor in tensors.items():
        if tensor.shape != ours[name].shape:
            raise ValueError(
                f"{names.get(name, 'K_data')} of the snapshot is {tuple(tensor.shape)}, but the "
                f"configuration makes it {tuple(ours[name].shape)}."
            )
    model.load_state_dict(ours | tensors)
    return model.eval()


def authors_name(name: str, config: Ac2dConfig) -> str:
    """Name of one of our tensors in a snapshot: branches.AU2.norm.weight -> aus_norm.1.weight."""
    for j, label in enumerate(module_names(config)):
        name = name.replace(f"branches.{label}.", f"branches.{j}.")
    if block := re.match(r"branches\.(\d+)\.blocks\.(\d+)\.", name):
        j, i = (int(number) for number in block.groups())
        # The branch's last block but one is `interm`, the last `end`, those before are a list.
        position = i - config.depths[2]
        theirs = {-1: f"aus_stage3_end.{j}.", -2: f"aus_stage3_interm.{j}."}.get(position)
        name = (theirs or f"aus_stage3_start.{j}.{i}.") + name[block.end() :]
    for ours, theirs in RENAMES:
        name = re.sub(ours, theirs, name)
    return name


def _prototype(snapshot: Mapping[str, Any]) -> tuple[str, Tensor, Tensor]:
    """Return `prototype_value`, the prototypes (m, c) and N."""
    keys, values = (torch.as_tensor(snapshot[name]).float() for name in ("K_data", "V_data"))
    share = float(snapshot["P_data"])
    count = torch.tensor(round(1 / share) if share > 0 else 0)
    if torch.allclose(values, keys * share, rtol=1e-4, atol=0):
        return "mean_over_n", keys, count
    # Keys have no effect, as the weight of a single prototype is 1.
    return "mean", values, count


def _check_same(what: str, expected: set[str], found: set[str]) -> None:
    """Check the names in a snapshot."""
    if problems := misfits(expected, found, what):
        raise ValueError(
            f"This is no AC2D snapshot for these action units; {problems}. "
            "Check the corpus: the number of action units must be the snapshot's."
        )


if __name__ == "__main__":
    main()
