"""The Trainer callback for models with per-epoch state."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length


class EndOfEpochCallback(TrainerCallback):
    """Calls the model's `end_of_epoch(batches)` after each epoch's last step, before evaluation and saving.

    Models without such a method are unaffected. `batches` is the Trainer's training dataloader. Training that
    stops within an epoch, by `max_steps` for example, keeps the state of the last whole epoch, if there was
    one, since that of a few batches is less reliable.

    Example:
        >>> trainer = Trainer(model, arguments, train_dataset=faces, callbacks=[EndOfEpochCallback()])
    """

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the epoch, or break it off."""
        is_part = control.should_training_stop and _is_broken_off(state, **kwargs)
        _tell("break_off_epoch" if is_part else "end_of_epoch", **kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the previous epoch, where training resumes from a checkpoint saved just after its last step.

        `on_epoch_begin` would be too late: after the last epoch none begins. Training from the start, perhaps
        a second time with smaller batches (`auto_find_batch_size`), forgets what an earlier try has gathered.
        """
        if not state.epoch:
            _tell("break_off_epoch", kwargs.get("model"))
        elif float(state.epoch).is_integer():
            _tell("end_of_epoch", **kwargs)


def _is_broken_off(state: TrainerState, train_dataloader: Any = None, **kwargs: Any) -> bool:
    """Whether this is a part of a second or later epoch; of unknown length, every epoch counts as whole."""
    epoch = float(state.epoch or 0)
    return epoch > 1 and not epoch.is_integer() and has_length(train_dataloader)


def _tell(what: str, model: Any = None, train_dataloader: Any = None, **kwargs: Any) -> None:
    if hasattr(model, what):
        getattr(model, what)(train_dataloader)


__all__ = ["EndOfEpochCallback"]
