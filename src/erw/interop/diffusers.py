"""A model as a folder that plain diffusers loads, with code that does not need erw.

DIR/model_index.json, pipeline.py
DIR/transformer/  config, weights, erw_transformer.py
DIR/vae/          AutoencoderKL or AutoencoderTiny, its config with the shift and scale of latents
"""

import copy
import re
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erw import __version__
from erw.encoders.vae import VAE
from erw.errors import CheckpointError
from erw.io import write_json
from erw.models import SiT
from erw.models.backbone import token_sizes
from erw.training.trained import Trained

PACKAGE = Path(__file__).parents[1]
CODE = "erw_transformer"
SOURCES = ("flow.py", "models/sit.py", "interop/exported/transformer.py")


def write_diffusers(model: Trained, vae: VAE | None, folder: Path) -> None:
    """Transformer, pipeline and VAE with their code.

    Raises:
        CheckpointError: the model works with class tokens.
    """
    import diffusers

    from erw.interop.exported.transformer import FlowTransformer

    run = model.run
    if run.model.needs_token:
        raise CheckpointError(f"{run.name} has class tokens; choose --format safetensors")
    sizes = {k: getattr(run.model, k) for k in signature(SiT).parameters if hasattr(run.model, k)}
    sizes |= token_sizes(run.model) | {"out_channels": model.net.out_channels}
    with torch.device("meta"):
        transformer = FlowTransformer(sizes, run.flow.objective, run.flow.prediction, run.flow.path)
    transformer.net = model.net
    transformer.save_pretrained(folder / "transformer", max_shard_size="1TB")
    (folder / "transformer" / f"{CODE}.py").write_text(transformer_code(), "utf-8")
    shutil.copyfile(PACKAGE / "interop" / "exported" / "pipeline.py", folder / "pipeline.py")
    index = {
        "_class_name": ["pipeline", "FlowPipeline"],
        "_diffusers_version": diffusers.__version__,
        "transformer": [CODE, "FlowTransformer"],
        "vae": ["diffusers", type(vae.network).__name__] if vae else [None, None],
        "id2label": {str(i): name for i, name in enumerate(model.class_names)},
        "shift": run.sample.shift,
    }
    write_json(folder / "model_index.json", index)


def transformer_code() -> str:
    """The network in one file: erw's sources one after another, without their imports of erw."""
    text = "\n\n".join((PACKAGE / name).read_text("utf-8") for name in SOURCES)
    text = re.sub(r"^from erw\.\S+ import (?:\([^)]*\)|.*)\n", "", text, flags=re.M)
    head = f"{', '.join(SOURCES)} of erw {__version__} (Apache-2.0); needs torch and diffusers."
    return f'"""{head}"""\n\nConfigError = ValueError\n\n{text}'


def save_vae(vae: VAE, folder: Path) -> None:
    """A VAE as diffusers has it, with the shift and scale of its latents in its config."""
    shift, scale = (
        [float(str(np.float32(x))) for x in value.flatten().tolist()]  # 0.18215, not 0.1821500063
        for value in vae.scaling
    )
    config: dict[str, Any] = {"shift_factor": None, "scaling_factor": 1.0}
    config |= {"latents_mean": shift, "latents_std": [1 / x for x in scale]}
    if len(set(shift)) == len(set(scale)) == 1:
        config = {"shift_factor": shift[0], "scaling_factor": scale[0]}
        config |= {k: None for k in ("latents_mean", "latents_std") if k in vae.network.config}
    network = copy.deepcopy(vae.network).to(memory_format=torch.contiguous_format)
    network.register_to_config(**config)
    network.save_pretrained(folder)
