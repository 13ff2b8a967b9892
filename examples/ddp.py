"""Train on pictures of digits in several processes, and go on where a broken run stopped:

    accelerate launch --multi_gpu --num_processes 2 examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py --resume
"""
import os
from pathlib import Path
import torch
from accelerate.utils import gather_object
from fastai.basics import (Callback, CrossEntropyLossFlat, DataLoaders, L, Learner,
    RandomSplitter, accuracy, get_model, nn, num_distrib, patch, rank_distrib, set_seed)
from fastai.callback.schedule import fit_one_cycle  # noqa: F401 patched onto Learner
from fastai.distributed import DistributedDL, teardown_distrib
from fastai.layers import ConvLayer, Flatten
from fastcore.script import call_parse, store_true
from sklearn.datasets import load_digits
from fastai_mixup_ext import MixUpCallback

gpu = torch.cuda.is_available()

@patch
def _broadcast(self:DistributedDL, t, rank):
    "Rank 0's order of the rows, for all; fastai would always use CUDA"
    t = torch.tensor(t, device=self.device)
    torch.distributed.broadcast(t, rank)
    return t.tolist()

class Checkpoint(Callback):
    "After each epoch, all that a resumed run needs, in one file that is always whole"
    def __init__(self, file): self.file = Path(file)
    def after_create(self): self.dl = self.dls.train  # before the processes share it

    def after_train(self):
        mixes = gather_object([self.mix_up.state_dict()])
        if rank_distrib(): return
        state = dict(epoch=self.epoch+1, model=get_model(self.model).state_dict(),
            opt=self.opt.state_dict(), mixes=mixes, rows=self.dl.rng.getstate())
        torch.save(state, tmp := self.file.with_suffix('.tmp'))
        os.replace(tmp, self.file)

    def load(self):
        "Put back what was saved, if anything, and say which epoch comes next"
        if not self.file.exists(): return 0
        state = torch.load(self.file, map_location='cpu', weights_only=False)
        self.model.load_state_dict(state['model'])
        self.learn.create_opt()
        self.opt.load_state_dict(state['opt'])
        self.dl.rng.setstate(state['rows'])
        if len(state['mixes'])==num_distrib():
            self.mix_up.load_state_dict(state['mixes'][rank_distrib()])
        return state['epoch']

def make_learner(file, seed=0, cbs=()):
    "A small network that reads digits, with mixing and checkpoints"
    set_seed(seed)
    x,y = load_digits(return_X_y=True)
    items = L(zip(torch.tensor(x).float().view(-1, 1, 8, 8)/16, torch.tensor(y)))
    train,valid = RandomSplitter(seed=0)(items)
    dls = DataLoaders.from_dsets(items[train], items[valid], bs=64, drop_last=False,
        device=None if gpu else 'cpu')
    convs = ConvLayer(1, 16, stride=2), ConvLayer(16, 32, stride=2)
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(32, 10))
    ours = MixUpCallback(seed=seed),Checkpoint(file)
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy,
        cbs=[*ours, *cbs])

def train(learn, epochs, resume=False):
    "Train in all the processes that the launcher started"
    start = learn.checkpoint.load() if resume else 0
    with learn.distrib_ctx(sync_bn=gpu, cpu=not gpu), learn.no_bar():
        learn.fit_one_cycle(epochs, 1e-2, start_epoch=start)

def leave():
    "Leave together: in PyTorch 2.3 who leaves early may keep the others waiting"
    if not torch.distributed.is_initialized(): return
    torch.distributed.barrier()
    teardown_distrib()

@call_parse
def main(
    epochs:int=5, # Epochs of the whole run
    file:Path=Path('ddp.pth'), # The checkpoint
    seed:int=0, # Seed of the weights, the order of the rows and the mixes
    resume:store_true=False # Go on from the checkpoint, if there is one?
):
    train(make_learner(file, seed), epochs, resume)
    leave()
