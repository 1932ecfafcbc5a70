"""A flow model's network as a diffusers model: one forward, the velocity."""

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from erw.flow import PATHS, PathName, Prediction, velocity_from
from erw.models.sit import SiT


class FlowTransformer(ModelMixin, ConfigMixin):
    """A SiT with what its output means: `prediction` on `path`; `network` are SiT's arguments."""

    @register_to_config
    def __init__(
        self,
        network: dict[str, Any],
        prediction: Prediction = "velocity",
        path: PathName = "linear",
    ) -> None:
        super().__init__()
        self.net = SiT(**network)
        self.output, self.flow_path = prediction, PATHS[path]

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The velocity noise - data at x (B, C, h, w), times t (B,) in [0, 1], classes y (B,)."""
        if self.net.pos_embed.dtype != x.dtype:  # diffusers' dtype= leaves such tables in float32
            self.net.to(x.dtype)
        out = self.net(x, t, y)
        return velocity_from(self.output, out, x, t, path=self.flow_path)
