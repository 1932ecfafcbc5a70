from .flops import Ledger as Ledger
from .loop import Result as Result
from .loop import train as train
from .objective import Diffusion as Diffusion
from .objective import FlowMatching as FlowMatching
from .objective import Losses as Losses
from .trained import Trained as Trained
from .trained import load as load
