"What LSUV must leave as it was is remembered before, and put back after."
from .generators import Generators
from .snapshot import Snapshot
from .weights import Weights, gradients_aside, memory, uninterrupted, write_back

__all__ = ['Generators', 'Snapshot', 'Weights', 'gradients_aside', 'memory', 'uninterrupted', 'write_back']
