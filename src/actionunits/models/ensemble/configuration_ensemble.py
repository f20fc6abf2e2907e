"""Configuration of several methods that answer together."""

from typing import Any

from huggingface_hub.dataclasses import strict

from actionunits.configuration_au import LABEL_FIELDS, CompositeAUConfig
from actionunits.models.ac2d.configuration_ac2d import Ac2dConfig
from actionunits.models.auformer.configuration_auformer import AUFormerConfig
from actionunits.models.escda.configuration_escda import EscdaConfig
from actionunits.models.gtlenet.configuration_gtlenet import GtleNetConfig
from actionunits.models.lac.configuration_lac import LacConfig


@strict
class EnsembleConfig(CompositeAUConfig):
    """Configuration of the mean of several methods, at most one network of each.

    The networks share the action units, the occurrence rates and the picture, which is that of the network
    with the largest input; the others see it reduced. So they must be trained on faces aligned, cropped and
    normalised alike.

    Args:
        escda_config: `EscdaConfig`, its fields as a dictionary, or `None` for an ensemble without ESCDA. The
            other fields likewise. Where all are `None`, it is the mean of ESCDA and AC2D.
        gtlenet_config: GTLE-Net's.
        ac2d_config: AC2D's.
        auformer_config: AUFormer's.
        lac_config: LAC's.
    """

    model_type = "au-ensemble"
    sub_configs = {
        "escda_config": EscdaConfig,
        "gtlenet_config": GtleNetConfig,
        "ac2d_config": Ac2dConfig,
        "auformer_config": AUFormerConfig,
        "lac_config": LacConfig,
    }

    escda_config: dict | EscdaConfig | None = None
    gtlenet_config: dict | GtleNetConfig | None = None
    ac2d_config: dict | Ac2dConfig | None = None
    auformer_config: dict | AUFormerConfig | None = None
    lac_config: dict | LacConfig | None = None

    def __post_init__(self, **kwargs):
        """Take ESCDA and AC2D where no network is named."""
        if all(getattr(self, key) is None for key in self.sub_configs):
            self.escda_config, self.ac2d_config = {}, {}
        super().__post_init__(**kwargs)

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
        """Return the mean of compact ESCDA and AC2D; keywords replace its values."""
        labels = {name: kwargs[name] for name in LABEL_FIELDS if name in kwargs}
        escda, ac2d = EscdaConfig.compact(**labels), Ac2dConfig.compact(**labels)
        return cls(**({"escda_config": escda, "ac2d_config": ac2d} | kwargs))


def input_size(config: Any) -> int:
    """Return the height and width of a network's input in pixels."""
    return config.processor_options["size"]["height"]


__all__ = ["EnsembleConfig", "input_size"]
