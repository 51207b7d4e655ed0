"Runs cases in several processes, as tests of `torch.distributed` do."
import os
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def run(script, ranks, names, folder):
    "What each case of a module gave on each rank, as a function of its name. All of them run in one go."
    path = Path(script.__file__)
    command = [sys.executable, '-W', 'ignore', str(path), ','.join(names)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=path.parent)
    processes = [subprocess.Popen([*command, str(r), str(ranks), str(folder)], **options) for r in range(ranks)]
    try: said = [p.communicate(timeout=400)[0] for p in processes]
    finally:
        for p in processes: p.kill()
    def results(name):
        files = [folder/f'{name}-{r}.pt' for r in range(ranks)]
        assert all(f.exists() for f in files), '\n'.join(said)
        return [torch.load(f, weights_only=False) for f in files]
    return results


def serve(cases):
    "What such a module does as a script: run functions of the rank, and save what they give."
    names,rank,ranks,folder = sys.argv[1:]
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    # As torchrun and `accelerate launch` would.
    os.environ.update(RANK=rank, WORLD_SIZE=ranks, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR='127.0.0.1',
                      MASTER_PORT='29511')
    meet,patience = f'file://{folder}/meet',timedelta(seconds=40)
    dist.init_process_group('gloo', rank=int(rank), world_size=int(ranks), init_method=meet, timeout=patience)
    for name in names.split(','):
        torch.save(cases[name](int(rank)), f'{folder}/{name}-{rank}.pt')
        dist.barrier()
    dist.destroy_process_group()
