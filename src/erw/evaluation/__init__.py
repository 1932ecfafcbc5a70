"""Evaluation: features, distances, manifold scores, alignment of representations."""

from erw.evaluation.alignment import cka as cka
from erw.evaluation.alignment import cknna as cknna
from erw.evaluation.distances import Moments as Moments
from erw.evaluation.distances import density_coverage as density_coverage
from erw.evaluation.distances import frechet as frechet
from erw.evaluation.distances import inception_score as inception_score
from erw.evaluation.distances import kid as kid
from erw.evaluation.distances import precision_recall as precision_recall
from erw.evaluation.evaluate import Scores as Scores
from erw.evaluation.inception import load_inception as load_inception
from erw.evaluation.memorization import nearest_images as nearest_images
