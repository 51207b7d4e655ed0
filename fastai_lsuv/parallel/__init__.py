"What the processes of `torch.distributed` tell each other, and what each holds of a model spread over several."
from .ranks import (any_rank, arrays_of_all_ranks, in_step, mean_of_ranks, meet, numbers_of_ranks, of_all_ranks,
                    several_ranks)
from .shards import (class_of, digest, drawn_alike, forwards, from_rank_0, is_engine_hook, is_sharded, local,
                     numbers_for, portion, reduced, refuse, reshard, shares_batches, slices_of, whole)

__all__ = ['any_rank', 'arrays_of_all_ranks', 'class_of', 'digest', 'drawn_alike', 'forwards', 'from_rank_0',
           'in_step', 'is_engine_hook', 'is_sharded', 'local', 'mean_of_ranks', 'meet', 'numbers_for',
           'numbers_of_ranks', 'of_all_ranks', 'portion', 'reduced', 'refuse', 'reshard', 'several_ranks',
           'shares_batches', 'slices_of', 'whole']
