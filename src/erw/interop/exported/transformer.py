"""The network as a diffusers model: one forward, the velocity, or the noise that a DiT predicts."""

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from erw.flow import PATHS, PathName, Prediction, velocity_from
from erw.models.sit import SiT


class FlowTransformer(ModelMixin, ConfigMixin):
    """A SiT with the meaning of its output: `prediction` on `path`, or noise and variance on the
    chain where `objective` is "ddpm". `network`: arguments of `SiT`."""

    @register_to_config
    def __init__(
        self,
        network: dict[str, Any],
        objective: str = "flow",
        prediction: Prediction = "velocity",
        path: PathName = "linear",
    ) -> None:
        super().__init__()
        self.net = SiT(**network)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The velocity noise - data, or a DiT's noise, at x (B, C, h, w), times t (B,) in [0, 1]
        and classes y (B,). Step s of a DiT's chain is at t = (s + 1) / 1000."""
        if self.net.pos_embed.dtype != x.dtype:  # diffusers' dtype= leaves such tables in float32
            self.net.to(x.dtype)
        if self.config.objective == "ddpm":
            return self.net(x, (t * 1000).round().long() - 1, y).chunk(2, dim=1)[0]
        out = self.net(x, t, y)
        return velocity_from(self.config.prediction, out, x, t, path=PATHS[self.config.path])
