"""Training: the step, the loop, checkpoints, and loading what came out."""

from erw.train.load import Trained as Trained
from erw.train.load import load as load
from erw.train.loop import Result as Result
from erw.train.loop import train as train
from erw.train.start import Init as Init
from erw.train.step import Diffusion as Diffusion
from erw.train.step import FlowMatching as FlowMatching
from erw.train.step import Losses as Losses
