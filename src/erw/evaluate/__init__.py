"""Evaluation: features, distances, manifold scores, alignment of representations."""

from erw.evaluate.alignment import cka as cka
from erw.evaluate.alignment import cknna as cknna
from erw.evaluate.alignment import mutual_knn as mutual_knn
from erw.evaluate.comparable import differences as differences
from erw.evaluate.confidence import frechet_bootstrap as frechet_bootstrap
from erw.evaluate.confidence import frechet_infinity as frechet_infinity
from erw.evaluate.distances import Moments as Moments
from erw.evaluate.distances import frechet as frechet
from erw.evaluate.distances import frechet_moments as frechet_moments
from erw.evaluate.distances import inception_score as inception_score
from erw.evaluate.distances import kid as kid
from erw.evaluate.evaluate import Scores as Scores
from erw.evaluate.evaluate import evaluate as evaluate
from erw.evaluate.features import Statistics as Statistics
from erw.evaluate.inception_weights import load_inception as load_inception
from erw.evaluate.manifold import density_coverage as density_coverage
from erw.evaluate.manifold import precision_recall as precision_recall
from erw.evaluate.memory import memorisation as memorisation
