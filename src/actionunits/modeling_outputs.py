"""Output of the action unit models."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class AUDetectionOutput(ModelOutput):
    """Output of the action unit models; fields that a model does not have, or was not asked for, are `None`.

    B is the batch size, m the number of action units, h x w the size of the model's last feature map, rows
    from the top; it covers the model's input evenly. All tensors but the loss have the batch first.

    Attributes:
        loss: Scalar, float32; given labels.
        logits: (B, m); the occurrence probabilities are their sigmoid.
        branch_logits: (B, branches, m) of a model with several detectors, in the order that it documents.
        au_attentions: (B, m, h, w) attention map of every action unit, values in [0, 1]; given
            `output_au_attentions=True`, like the next three.
        au_attentions_unconstrained: (B, m, h, w) the same before a prior of the method acted on it.
        au_masks: (B, m, h, w) the prior itself, in (0, 1].
        au_evidence: (B, m, h, w) signed contribution of each position to the logit.
        hidden_states: Feature maps (B, C, H, W), one per stage; given `output_hidden_states=True`.
        attentions: Attention matrices as the method defines them; given `output_attentions=True`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    branch_logits: torch.Tensor | None = None
    au_attentions: torch.Tensor | None = None
    au_attentions_unconstrained: torch.Tensor | None = None
    au_masks: torch.Tensor | None = None
    au_evidence: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


__all__ = ["AUDetectionOutput"]
