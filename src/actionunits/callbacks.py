"""The Trainer callback for models with per-epoch state."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EndOfEpochCallback(TrainerCallback):
    """Calls the model's `end_of_epoch(batches)` after each epoch's last step, before evaluation and saving.

    Models without such a method are unaffected. `batches` is the Trainer's training dataloader.

    Example:
        >>> trainer = Trainer(model, arguments, train_dataset=faces, callbacks=[EndOfEpochCallback()])
    """

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the epoch."""
        _end_epoch(**kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the previous epoch, where training resumes from a checkpoint saved just after its last step.

        `on_epoch_begin` would be too late: after the last epoch none begins.
        """
        if state.epoch and float(state.epoch).is_integer():
            _end_epoch(**kwargs)


def _end_epoch(model: Any = None, train_dataloader: Any = None, **kwargs: Any) -> None:
    if hasattr(model, "end_of_epoch"):
        model.end_of_epoch(train_dataloader)


__all__ = ["EndOfEpochCallback"]
