from .export import push_to_hub as push_to_hub
from .init_from import adopt as adopt
from .init_from import starting_point as starting_point
from .pretrained import from_pretrained as from_pretrained
from .pretrained import kind_of as kind_of
from .pretrained import load_pretrained as load_pretrained
from .pretrained import open_model as open_model
