"""Configuration of the network on AU centres."""

from typing import Any

from huggingface_hub.dataclasses import strict

from actionunits.action_units import check_aus
from actionunits.au_regions import have_centers
from actionunits.configuration_au import AUConfig

PLACES = (1, 2, 4, 5, 6, 7, 9, 10, 12, 17, 25)
"""One action unit for each pair of centres of "shao": 14, 15, 20 have those of 12, and 23, 24 those of 25."""


@strict
class GeometryConfig(AUConfig):
    """Configuration of a multilayer perceptron on the centres of action units.

    Args:
        image_size: Height and width in pixels of the picture of the centres; its pixels are not used.
        places: FACS numbers whose centres are inputs, independently of `aus`; `PLACES` by default.
        hidden_sizes: Units of each layer.
        dropout: Dropout probability.
        initializer_range: Standard deviation of the initial weights, relative to 1 / sqrt(inputs).
    """

    model_type = "au-geometry"

    image_size: int = 32
    places: Any = None  # type: ignore[assignment]
    hidden_sizes: list[int] | tuple[int, ...] = (128, 128)
    dropout: float | int = 0.1
    initializer_range: float | int = 1.0

    def __post_init__(self, **kwargs):
        """Check the places, and convert tuples to lists, as JSON does."""
        self.places = check_aus(PLACES if self.places is None else self.places)
        self.hidden_sizes = list(self.hidden_sizes)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Check the fields."""
        if not self.places or not have_centers(self.places):
            raise ValueError(
                f"places={self.places} must be action units that have centres, see `au_regions`."
            )
        if not self.hidden_sizes or min(self.hidden_sizes) < 1 or self.image_size < 1:
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes} must be at least one layer of at least one unit, and "
                f"image_size={self.image_size} at least 1."
            )
        if not 0 <= self.dropout < 1 or self.initializer_range <= 0:
            raise ValueError(
                f"dropout={self.dropout} must lie in [0, 1), "
                f"initializer_range={self.initializer_range} above 0."
            )


__all__ = ["PLACES", "GeometryConfig"]
