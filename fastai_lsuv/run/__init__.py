"One run of LSUV: mini-batches, passes, the loss check, the rows of the report."
from .blame import explained, warn_caller
from .feed import Feed, join
from .gradients import gradients_of
from .kept import Kept
from .loss import LOSS_TAKES, LooksTrained, UnlessTrained, own_loss
from .options import Options, check_whole
from .passes import Passes
from .results import rows_of
from .run import Run
from .signs import learned_layer, learned_norm

__all__ = ['Feed', 'Kept', 'LOSS_TAKES', 'LooksTrained', 'Options', 'Passes', 'Run', 'UnlessTrained',
           'check_whole', 'explained', 'gradients_of', 'join', 'learned_layer', 'learned_norm', 'own_loss', 'rows_of',
           'warn_caller']
