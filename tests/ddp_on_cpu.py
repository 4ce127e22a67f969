"""Lets timm's unmodified train.py distribute on the CPU; it imports this through its own ``--device-modules``.

timm 1.0.31 hands ``device_ids=[cpu]`` to DistributedDataParallel, which PyTorch refuses for modules on the CPU: there
the argument must be left out. On a GPU nothing of this is needed. Beside that, each process leaves the weights and
buffers that it ends with in ``$RANK_WEIGHTS/<rank>.pth``: train.py itself writes those of the first process only.
"""

import atexit
import os

import torch


class CpuDistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, **kwargs)
        if 'RANK_WEIGHTS' in os.environ:
            atexit.register(self.leave_weights, f'{os.environ["RANK_WEIGHTS"]}/{os.environ["RANK"]}.pth')

    def leave_weights(self, path):
        torch.save(self.module.state_dict(), path)


torch.nn.parallel.DistributedDataParallel = CpuDistributedDataParallel
