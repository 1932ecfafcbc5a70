from .generation import Generation as Generation
from .generation import Samples as Samples
from .generation import generate as generate
from .guidance import classifier_free as classifier_free
from .guidance import guided as guided
from .save import read_images as read_images
from .save import write as write
from .solvers import SOLVERS as SOLVERS
