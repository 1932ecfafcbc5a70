"""A DiT in the layout of diffusers' DiTPipeline, and read back from it.

DiTPipeline's class for no class is number 1000, whatever the model: the label table is filled up to
1,000 classes with that row. It divides latents by one number, so other shifts and scales go into
the convolutions at the VAE's door.
"""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from erw.encoders.vae import VAE
from erw.errors import CheckpointError
from erw.interop.convert import PLAIN
from erw.interop.layouts import Parts, to_layout
from erw.training.trained import Trained

LABELS = 1000  # DiTPipeline's own
TABLE = "y_embedder.embedding_table.weight"
CODE = {"transformer": ["erw_dit", "DiT"], "scheduler": ["erw_ddim", "ChainDDIM"]}
"""File and class of a part, as diffusers' index names them."""
SOURCES = {"transformer": "dit.py", "scheduler": "ddim.py"}
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def check_fits(model: Trained, vae: VAE | None) -> None:
    """Raises CheckpointError for a DiT that DiTPipeline cannot hold."""
    has = {name: getattr(model.run.model, name) for name in PLAIN if name != "class_token"}
    wrong = [f"{k} = {v}" for k, v in has.items() if v != PLAIN[k]]
    wrong += [f"{model.net.null_class} classes"] * (model.net.null_class > LABELS)
    if vae is None:
        wrong.append("no VAE")
    elif not _one_scale(vae) and getattr(vae.network, "post_quant_conv", None) is None:
        wrong.append(f"VAE {vae.name}, whose latents have a shift or a scale of each channel")
    if wrong:
        raise CheckpointError(
            f"diffusers' DiTPipeline has no place for {', '.join(wrong)}; export it with format "
            "safetensors"
        )


def write_dit(model: Trained, folder: Path) -> None:
    """Transformer and scheduler with their code."""
    from erw.interop.exported.ddim import ChainDDIM
    from erw.interop.exported.dit import DiT

    shape = model.run.model
    with torch.device("meta"):
        transformer = DiT(
            num_attention_heads=shape.heads,
            attention_head_dim=shape.width // shape.heads,
            in_channels=shape.channels,
            out_channels=model.net.out_channels,
            num_layers=shape.depth,
            sample_size=shape.input_size,
            patch_size=shape.patch,
            num_embeds_ada_norm=LABELS,
            norm_eps=1e-6,
        )
    net = {name: p.detach() for name, p in model.net.named_parameters()}
    table = net[TABLE]
    net[TABLE] = torch.cat([table[:-1], table[-1:].expand(LABELS + 2 - len(table), -1)])
    tensors = {k: v.clone() for k, v in to_layout(Parts(net, {}, {}), "diffusers-dit").items()}
    transformer.load_state_dict(tensors, assign=True)
    transformer.save_pretrained(folder / "transformer", max_shard_size="1TB")
    scheduler = ChainDDIM(**BETAS, clip_sample=False, timestep_spacing="trailing")
    scheduler.save_pretrained(folder / "scheduler")
    for part, source in SOURCES.items():
        code = Path(__file__).parent / "exported" / source
        shutil.copyfile(code, folder / part / f"{CODE[part][0]}.py")


def folded(vae: VAE) -> VAE:
    """The same VAE whose latents are to be divided by one number: shift and scale of each channel
    go into its first decoding and last encoding convolution."""
    if _one_scale(vae):
        return vae
    shift, scale = (x.flatten() for x in vae.scaling)
    network = copy.deepcopy(vae.network)
    with torch.no_grad():
        into, out = network.post_quant_conv, network.quant_conv
        into.bias += into.weight[:, :, 0, 0] @ shift
        into.weight /= scale[:, None, None]
        mean, deviation = slice(len(scale)), slice(len(scale), None)
        out.weight[mean] *= scale[:, None, None, None]
        out.bias[mean] = (out.bias[mean] - shift) * scale
        out.bias[deviation] += 2 * scale.log()  # a logarithm of the variance
    return replace(vae, network=network).scaled([0.0] * len(shift), [1.0] * len(scale))


def _one_scale(vae: VAE) -> bool:
    shift, scale = vae.scaling
    return not bool(shift.any()) and bool((scale == scale.flatten()[0]).all())
