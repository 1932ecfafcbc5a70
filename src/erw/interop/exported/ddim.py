"""DDIM on evenly spaced steps of the chain, its ends among them."""

from itertools import accumulate
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor


class ChainDDIM(DDIMScheduler):
    """DDIM without noise, from each of the steps asked for to the next one.

    diffusers' own takes 1000 // steps off the number of a step, which is the next one only where
    that divides; its `DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)` is a good
    alternative for few steps.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the steps, most noise first. Raises ValueError for fewer than 2."""
        total = self.config.num_train_timesteps
        if not 2 <= num_inference_steps <= total:
            raise ValueError(f"{num_inference_steps} steps; expected 2 to {total}")
        stride = (total - 1) / (num_inference_steps - 1)
        places = accumulate([stride] * (num_inference_steps - 1), initial=0.0)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor([round(p) for p in places][::-1], device=device)
        first, last = self.config.beta_start, self.config.beta_end
        betas = torch.linspace(first, last, total, dtype=torch.float64)
        self.abar = (1 - betas).cumprod(0)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *_: Any,
        return_dict: bool = True,
        **__: Any,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From a step to the one before it (arXiv 2010.02502, Eq. 12, without noise)."""
        later = self.timesteps[self.timesteps < int(timestep)]
        abar = self.abar[int(timestep)]
        before = self.abar[int(later[0])] if len(later) else torch.ones_like(abar)
        eps, x = model_output.double(), sample.double()
        clean = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
        x = (before.sqrt() * clean + (1 - before).sqrt() * eps).to(sample.dtype)
        clean = clean.to(sample.dtype)
        return DDIMSchedulerOutput(x, clean) if return_dict else (x, clean)
