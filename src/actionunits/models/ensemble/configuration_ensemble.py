"""Configuration of an ensemble of different networks."""

from typing import Any

from huggingface_hub.dataclasses import strict

from actionunits.configuration_au import LABEL_FIELDS, CompositeAUConfig
from actionunits.models.ac2d.configuration_ac2d import Ac2dConfig
from actionunits.models.auformer.configuration_auformer import AUFormerConfig
from actionunits.models.escda.configuration_escda import GdaConfig, LscConfig
from actionunits.models.geometry.configuration_geometry import GeometryConfig
from actionunits.models.gtlenet.configuration_gtlenet import GtleNetConfig
from actionunits.models.lac.configuration_lac import LacConfig


@strict
class EnsembleConfig(CompositeAUConfig):
    """Configuration of the mean of several networks, at most one of each kind.

    The networks share the action units, the occurrence rates and the picture, which has the largest input
    size and is downsampled for the others. So they must be trained on faces aligned, cropped and normalised
    alike.

    Args:
        lsc_config: `LscConfig`, its fields as a dictionary, or `None` for an ensemble without LSC; likewise
            for the other networks. If all are `None`, the ensemble is of LSC, GDA and AC2D.
        gda_config: GDA's; LSC and GDA together are ESCDA.
        gtlenet_config: GTLE-Net's.
        ac2d_config: AC2D's.
        auformer_config: AUFormer's.
        lac_config: LAC's.
        geometry_config: That of the network on AU centres.
        network_weights: Weights of the networks' logits in the mean, by name of the field without "_config";
            1 by default.
    """

    model_type = "au-ensemble"
    sub_configs = {
        "lsc_config": LscConfig,
        "gda_config": GdaConfig,
        "gtlenet_config": GtleNetConfig,
        "ac2d_config": Ac2dConfig,
        "auformer_config": AUFormerConfig,
        "lac_config": LacConfig,
        "geometry_config": GeometryConfig,
    }

    lsc_config: dict | LscConfig | None = None
    gda_config: dict | GdaConfig | None = None
    gtlenet_config: dict | GtleNetConfig | None = None
    ac2d_config: dict | Ac2dConfig | None = None
    auformer_config: dict | AUFormerConfig | None = None
    lac_config: dict | LacConfig | None = None
    geometry_config: dict | GeometryConfig | None = None
    network_weights: dict[str, float | int] | None = None

    def __post_init__(self, **kwargs):
        """Use LSC, GDA and AC2D by default."""
        if all(getattr(self, key) is None for key in self.sub_configs):
            self.lsc_config, self.gda_config, self.ac2d_config = {}, {}, {}
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Check the weights."""
        known = [key.removesuffix("_config") for key in self.sub_configs]
        for name, weight in (self.network_weights or {}).items():
            if name not in known or not 0 < weight < float("inf"):
                raise ValueError(
                    f"network_weights has {name!r}: {weight}; it takes positive numbers for some of {known}."
                )

    @property
    def image_size(self) -> int:
        """Height and width of the input in pixels: the largest of the networks'."""
        return max(input_size(network) for network in self.networks.values())

    @property
    def processor_options(self) -> dict[str, Any]:
        """Options of the image processor: the first network's, for the largest input."""
        size = {"height": self.image_size, "width": self.image_size}
        return super().processor_options | {"size": size}

    @classmethod
    def compact(cls, **kwargs) -> "EnsembleConfig":
        """Return the mean of compact LSC, GDA and AC2D; keywords replace its values."""
        labels = {name: kwargs[name] for name in LABEL_FIELDS if name in kwargs}
        networks = {
            "lsc_config": LscConfig.compact(**labels),
            "gda_config": GdaConfig.compact(**labels),
            "ac2d_config": Ac2dConfig.compact(**labels),
        }
        return cls(**(networks | kwargs))


def input_size(config: Any) -> int:
    """Return the height and width of a network's input in pixels."""
    return config.processor_options["size"]["height"]


__all__ = ["EnsembleConfig", "input_size"]
