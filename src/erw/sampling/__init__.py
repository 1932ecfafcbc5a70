"""Sampling: solvers, guidance, generation by seed, images on disk."""

from erw.sampling.generation import Generation as Generation
from erw.sampling.generation import Samples as Samples
from erw.sampling.generation import generate as generate
from erw.sampling.guidance import classifier_free as classifier_free
from erw.sampling.guidance import guided as guided
from erw.sampling.save import read_images as read_images
from erw.sampling.save import write as write
from erw.sampling.solvers import SOLVERS as SOLVERS
