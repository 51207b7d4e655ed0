"Mean and std of an activation: how they are measured, what they rest on, and the loops that bring them to a target."
from .doubts import (ALIKE_SHARE, ALIKE_SPREAD, between_samples, doubt, mean_tolerance, n_samples, samples_alike,
                     unusual, varies)
from .loops import ORDERS, AffineMeter, Loops, Meter, parse_order, run_loops
from .moments import Evidence, Moments, channel_moments, first_tensor, flat, pool, whole_moments
from .observations import RECENT, Observation, Observations
from .pooling import pool_ranks
from .targets import Target

__all__ = ['ALIKE_SHARE', 'ALIKE_SPREAD', 'AffineMeter', 'Evidence', 'Loops', 'Meter', 'Moments', 'ORDERS',
           'Observation', 'Observations', 'RECENT', 'Target', 'between_samples', 'channel_moments', 'doubt',
           'first_tensor', 'flat', 'mean_tolerance', 'n_samples', 'parse_order', 'pool', 'pool_ranks', 'run_loops',
           'samples_alike', 'unusual', 'varies', 'whole_moments']
