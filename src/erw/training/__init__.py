"""Training: the objective, the loop, checkpoints, cost, and loading what came out."""

from erw.training.flops import Ledger as Ledger
from erw.training.loop import Result as Result
from erw.training.loop import train as train
from erw.training.objective import Diffusion as Diffusion
from erw.training.objective import FlowMatching as FlowMatching
from erw.training.objective import Losses as Losses
from erw.training.trained import Trained as Trained
from erw.training.trained import load as load
