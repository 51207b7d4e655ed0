"LSUV in a Learner: `LSUVCallback`, the mini-batches as the Learner feeds them, which weights are new."
from .callback import LSUVCallback

__all__ = ['LSUVCallback']
