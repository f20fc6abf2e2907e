"""A recipe small enough for tests, and the scripts of training/ as modules."""

import scripts
from scripts import ROOT

TINY = {
    "stem_channels": 8,
    "stage_channels": [8, 16, 16],
    "stage_depths": [0, 1, 0],
    "downsample_expansion": [16, 16, 32],
    "residual_expansion": [16, 16, 32],
    "hidden_size": 32,
}
TINY_LSC = {
    **TINY,
    "attention_channels": 16,
    "attention_head_dim": 8,
    "convolution_channels": 8,
    "mlp_channels": 16,
}
TINY_AC2D = {
    "stem_channels": 4,
    "hidden_sizes": [8, 8, 8],
    "depths": [1, 1, 2],
    "num_heads": [1, 2, 2],
    "mlp_ratio": 2,
    "query_ratio": 2,
}
RECIPE = {
    "name": "tiny",
    "networks": {
        "lsc": {"model_type": "au-lsc", "config": TINY_LSC},
        "gda": {"model_type": "au-gda", "config": TINY},
    },
    "aus": [1, 12, 26],
    "target": "intensity",
    "geometry": {"aligned_size": 200, "crop_size": 176, "input_size": 48},
    "epochs": 2,
    "warmup_epochs": 0.5,
    "batch_size": 8,
    "checkpoint_every": 2,
    "log_every": 1,
}
AUFORMER = {
    "backbone_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 48,
        "patch_size": 16,
    },
    "freeze_backbone": False,
}
# Nothing depends on who computes it, or in how many parts: no batch normalisation, dropout or augmentation.
SAME_FOR_ALL = {
    "networks": {"auformer": {"model_type": "au-auformer", "config": AUFORMER}},
    "target": "occurrence",
    "base_learning_rate": 1e-2,
    "augmentation": {"random_crop": False, "mirror": 0.0, "brightness": 0.0, "contrast": 0.0},
}


def load_script(name: str):
    """Import training/NAME.py under a name of its own."""
    return scripts.load_script(ROOT / "training" / f"{name}.py", f"training_{name}")
