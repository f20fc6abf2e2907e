"""ONNX: export a model to a file, and run the file in place of the model.

    export_onnx("folder")                             # writes folder/model.onnx, checked against PyTorch
    model = OnnxAUModel.from_pretrained("folder")     # pip install "actionunits[onnx]"
    detect = pipeline("au-detection", model=model)

The graph takes `pixel_values` (B, 3, S, S) and, for models that need them, `au_centers` (B, p, 2, 2); it
returns `logits` (B, m), for any B, but no attention maps or hidden states.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from actionunits.files import whole_file
from actionunits.modeling_outputs import AUDetectionOutput

FILE = "model.onnx"
TOLERANCE = 1e-4
"""Largest difference of a logit from PyTorch's, relative to the largest logit where that exceeds 1."""
_INSTALL = 'ONNX needs `pip install "actionunits[onnx]"`.'


def export_onnx(folder: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """Export a saved model, in single precision, and compare the file's logits with PyTorch's.

    Args:
        folder: Folder of the model (or its name on the Hub, with `output`).
        output: File to write; by default `model.onnx` in the folder.

    Returns:
        The file.

    Raises:
        ImportError: ONNX is not installed.
        ValueError: The weights are broken or incomplete, or the model detects no action units.
        RuntimeError: The logits differ by more than `TOLERANCE`; no file is written.
    """
    _import_onnx("onnx", "onnxscript")
    target = Path(output) if output is not None else Path(folder) / FILE
    model = _load_whole(folder)
    inputs = example_inputs(model, batch_size=2)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    with whole_file(target) as part:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Logits(model),
                tuple(inputs.values()),
                str(part),
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_shapes={name: {0: batch} for name in inputs},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        difference = largest_difference(OnnxAUModel(part, model.config), model)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"ONNX Runtime's logits differ from PyTorch's by {difference:.2g}, more than {TOLERANCE}; "
                "nothing was written."
            )
    return target


def largest_difference(onnx_model: Any, model: Any) -> float:
    """Return the largest difference of a logit, as for `TOLERANCE`, over batches of 1 and 3 pictures."""
    differences = []
    for batch_size in (1, 3):
        inputs = example_inputs(model, batch_size)
        with torch.inference_mode():
            expected = model(**inputs).logits.float()
        difference = (onnx_model(**inputs).logits - expected).abs().max()
        differences.append(float(difference / expected.abs().max().clamp(min=1)))
    return float(np.max(differences))  # NaN if there is one


def example_inputs(model: Any, batch_size: int) -> dict[str, Tensor]:
    """Return random inputs of a model: pictures, and centres if it needs them."""
    generator = torch.Generator().manual_seed(batch_size)
    side = model.config.processor_options["size"]["height"]
    pictures = torch.rand(batch_size, 3, side, side, generator=generator) * 2 - 1
    places = len(model.config.places or model.config.id2label)
    centers = torch.rand(batch_size, places, 2, 2, generator=generator) * (side - 1)
    try:
        with torch.inference_mode():
            model(pixel_values=pictures)
    except ValueError:
        return {"pixel_values": pictures, "au_centers": centers}
    return {"pixel_values": pictures}


class OnnxAUModel:
    """An exported model, run by ONNX Runtime on the CPU; called like a model, it returns logits only.

    Args:
        file: File of `export_onnx`.
        config: Configuration of the model.
        threads: Threads of a run; 0 for one per core.
        name_or_path: Folder or name on the Hub, where the pipeline finds the image processor.

    Example:
        >>> model = OnnxAUModel.from_pretrained(folder)
        >>> model(**processor("photo.jpg", landmarks=points, return_tensors="pt")).logits.shape
        torch.Size([1, 12])
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, file: str | os.PathLike, config: Any, threads: int = 0, name_or_path: str = ""):
        runtime = _import_onnx()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.input_names = [entry.name for entry in self.session.get_inputs()]
        self.config = config
        self.name_or_path = name_or_path
        self._made_of = (os.path.abspath(file), config, threads, name_or_path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and other processes reopen the file, since a session cannot be pickled."""
        return type(self), self._made_of

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, revision: str | None = None, threads: int = 0
    ) -> OnnxAUModel:
        """Load `model.onnx` and the configuration of a folder, or of a repository on the Hub.

        Raises:
            ImportError: ONNX Runtime is not installed.
            FileNotFoundError: The folder has no `model.onnx`.
        """
        _import_onnx()
        name = str(name_or_path)
        if Path(name).is_dir():
            file = Path(name) / FILE
            if not file.is_file():
                raise FileNotFoundError(
                    f"{name} has no {FILE}; write it with `actionunits export {name} --onnx`."
                )
        else:
            file = Path(hf_hub_download(name, FILE, revision=revision))
        config = AutoConfig.from_pretrained(name, **({} if revision is None else {"revision": revision}))
        return cls(file, config, threads, name)

    def __call__(
        self,
        pixel_values: Tensor,
        au_centers: Tensor | None = None,
        output_au_attentions: bool = False,
        **kwargs: Any,
    ) -> AUDetectionOutput:
        """Run a batch.

        Args:
            pixel_values: (B, 3, S, S).
            au_centers: (B, p, 2, 2) of `config.places`, for models that need them.
            output_au_attentions: Ignored; there are none.
            **kwargs: Ignored, as by every model.

        Raises:
            ValueError: The model needs `au_centers` and got none.
        """
        inputs = {"pixel_values": pixel_values, "au_centers": au_centers}
        if "au_centers" in self.input_names and au_centers is None:
            raise ValueError("This model reads the centres of action units; pass the processor's au_centers.")
        if not len(pixel_values):  # ONNX Runtime's LSTM crashes Python on an empty batch
            return AUDetectionOutput(logits=torch.zeros(0, len(self.config.id2label)))
        feed = {name: inputs[name].detach().cpu().float().numpy() for name in self.input_names}  # type: ignore[union-attr]
        return AUDetectionOutput(logits=torch.from_numpy(self.session.run(["logits"], feed)[0]))

    def eval(self) -> OnnxAUModel:
        """Return itself, for callers that expect a PyTorch model."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> OnnxAUModel:
        """Return itself: it stays on the CPU."""
        return self

    def can_generate(self) -> bool:
        """Return False, for transformers' pipelines."""
        return False

    def __repr__(self) -> str:
        inputs = json.dumps(self.input_names)
        return f"{type(self).__name__}({self.config.model_type}, inputs={inputs}, from={self.name_or_path!r})"


def _load_whole(folder: str | os.PathLike) -> Any:
    """Load a model of this package, with all its weights: transformers would initialise missing ones."""
    try:
        model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"The weights in {folder} are broken: {error}") from error
    if not type(model).__name__.endswith("ForAUDetection"):
        raise ValueError(f"{folder} holds a {type(model).__name__}, which detects no action units.")
    if info["missing_keys"]:
        raise ValueError(f"The weights in {folder} lack {sorted(info['missing_keys'])}.")
    return model.eval()


class _Logits(nn.Module):
    """A model with tensors as its only inputs and outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, au_centers: Tensor | None = None) -> Tensor:
        return self.model(pixel_values=pixel_values, au_centers=au_centers).logits


def _import_onnx(*others: str) -> Any:
    """Import ONNX Runtime, and check that `others` can be imported."""
    try:
        for name in others:
            importlib.import_module(name)
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ImportError(_INSTALL) from error


__all__ = ["OnnxAUModel", "example_inputs", "export_onnx", "largest_difference"]
