"""Sampling: solvers, guidance, generation by seed, and its files."""

from erw.sample.files import read_images as read_images
from erw.sample.files import write as write
from erw.sample.generate import Generation as Generation
from erw.sample.generate import Samples as Samples
from erw.sample.generate import generate as generate
from erw.sample.guidance import classifier_free as classifier_free
from erw.sample.guidance import conditional as conditional
from erw.sample.guidance import guided as guided
from erw.sample.solvers import SOLVERS as SOLVERS
from erw.sample.solvers import adams as adams
from erw.sample.solvers import euler as euler
from erw.sample.solvers import euler_maruyama as euler_maruyama
from erw.sample.solvers import heun as heun
from erw.sample.solvers import sde_times as sde_times
from erw.sample.solvers import uniform_times as uniform_times
