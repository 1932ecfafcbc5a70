from .base import Encoder as Encoder
from .own import ModuleEncoder as ModuleEncoder
from .registry import load_encoder as load_encoder
from .vae import VAE as VAE
from .vae import load_vae as load_vae
