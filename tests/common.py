"""Small learners of every kind, spies and faults: what several test files share."""
from __future__ import annotations
import contextlib
import re
import shutil
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from torch import nn
from torch.nn.modules import module as _global
from fastai.basics import (Callback, CrossEntropyLossFlat, Datasets, ItemGetter, Learner, Recorder, TrainEvalCallback, noop)
from fastai.learner import CastToTensor
from fastai_mixup_ext import MixUpCallback

torch_27 = pytest.mark.skipif(tuple(map(int, torch.__version__.split('.')[:2]))<(2, 7),
    reason="torch 2.6 and older can't compile all of it, watch every operation on fastai's tensors, or fake Apple's")

BS,N,WIDTH,CLASSES = 7,21,13,3   # no weight of a model has BS rows, so that a tensor that has is a batch

# Cases

def named(o):
    "How a case is called, the same in every process: without addresses"
    return re.sub(r' at 0x\w+', '', str(o))

def covering(cells, strength=2):
    "Of these tuples as few as it takes for any `strength` settings that occur together to do so: pairs cost far less than the product"
    cells = list(cells)
    def together(cell): return {tuple((i, cell[i]) for i in axes) for axes in combinations(range(len(cell)), strength)}
    new = {cell:together(cell) for cell in cells}
    left,res = set().union(*new.values()),[]
    while left:
        res.append(max(cells, key=lambda cell: len(new[cell]&left)))
        left -= new[res[-1]]
    return [cell for cell in cells if cell in set(res)]

# Faults

_armed = SimpleNamespace(where=None, exc=None)

def arm(where, exc): _armed.where,_armed.exc = where,exc
def armed(where): return _armed.where==where

def trip(where):
    "Raise what `arm` said, once, if this is where"
    if _armed.where!=where: return
    _armed.where = None
    raise _armed.exc

class _Trip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.view_as(x)
    @staticmethod
    def backward(ctx, g):
        trip('backward')
        return g

class Tripwire(nn.Module):
    "The identity, which fails in forward or backward when `arm` said so"
    def forward(self, x):
        trip('forward')
        return _Trip.apply(x)

class TripCE(CrossEntropyLossFlat):
    "Cross-entropy that a mixing callback can only call, and that fails when `arm` said so"
    def __call__(self, pred, *yb, **kw):
        trip('loss')
        return super().__call__(pred, *yb, **kw)

class TripMSE(nn.MSELoss):
    "The squared error, which fails when `arm` said so"
    def forward(self, pred, y):
        trip('loss')
        return super().forward(pred, y)

class Raise(Callback):
    "Raises `exc` in `event`, the `nth` time that it comes; a cancelling event is brought about first"
    lures = dict(batch='after_pred', train='after_loss', epoch='after_pred', fit='after_pred', backward='before_backward',
        step='before_step', validate='before_validate')
    def __init__(self, event, exc, order=0, nth=1):
        self.event,self.exc,self.order,self.nth = event,exc,order,nth
        kind = event.removeprefix('after_cancel_')
        self.lure = None if kind==event else (self.lures[kind], cancel(kind))

    def __call__(self, event_name):
        if event_name==self.event:
            self.nth -= 1
            if self.nth==0: raise self.exc
        if self.lure and event_name==self.lure[0] and self.learn.training!=('validate' in self.event): raise self.lure[1]

def cancel(kind):
    from fastai.callback import core
    return getattr(core, f"Cancel{'Valid' if kind=='validate' else kind.title()}Exception")('stop')

class Watch(Callback):
    "Notes `f(learn)` in `event`s of training, as the last callback or in another order"
    order,run_valid = 100,False
    def __init__(self, events, f, order=100):
        self.seen,self.order = [],order
        for e in events.split(): setattr(self, e, lambda: self.seen.append(f(self.learn)))

# Learners

class SpyLearner(Learner):
    "A Learner that notes every assignment to `loss_func`"
    def __init__(self, *args, **kwargs):
        self.__dict__['assigned'] = []
        super().__init__(*args, **kwargs)
        self.assigned.clear()

    def __setattr__(self, name, value):
        if name=='loss_func': self.assigned.append(value)
        super().__setattr__(name, value)

class Bag(nn.Module):
    "The mean of the embeddings of some ids"
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(WIDTH, 8)
    def forward(self, ids): return self.emb(ids).mean(1)

KINDS = 'labels','blended','ids','place'

def make_items(kind='labels', n=N, seed=0):
    "`n` pairs of one input and one target; what there is to learn is the class with the largest sum"
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(WIDTH, (n,5), generator=g) if kind=='ids' else torch.randn(n, WIDTH, generator=g)
    y = x[:,:CLASSES].argmax(1)
    return list(zip(x, torch.eye(CLASSES)[y] if kind=='blended' else y))

def make_dls(kind='labels', bs=BS, n=N):
    items = make_items(kind, n)
    split = n*2//3
    dsets = Datasets(items, [[ItemGetter(0)], [ItemGetter(1)]], splits=[range(split), range(split, n)])
    return dsets.dataloaders(bs=bs, device='cpu', num_workers=0)

def make_model(kind='labels'):
    body = Bag() if kind=='ids' else nn.Linear(WIDTH, 8)
    return nn.Sequential(body, Tripwire(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))

def make_learner(kind='labels', cbs=(), path='.', loss_func=None, dls=None, **kwargs):
    "A tiny learner: plain labels, targets that can be blended, token ids, or (for `place`) labels again"
    loss_func = loss_func or (TripMSE() if kind=='blended' else TripCE())
    learn = SpyLearner(dls or make_dls(kind), make_model(kind), loss_func, lr=.01, path=Path(path),
        default_cbs=False, cbs=[TrainEvalCallback(), Recorder(), CastToTensor(), *cbs], **kwargs)  # no progress bar
    learn.logger,learn.kind = noop,kind
    return learn

def make_mixer(kind='labels', **kwargs):
    "The callback for that kind; `place` mixes at the output of the first layer"
    return MixUpCallback(at=(lambda model: [model[2]]) if kind=='place' else None, **kwargs)

# What nobody may leave behind

def copied(folder):
    "A copy of the project in `folder`: what writes beside the sources, as a build and some notebooks do, does so there"
    root = Path(__file__).parents[1]
    made = ('.git', '.venv*', '__pycache__', '.*_cache', '.hypothesis', '*.egg-info', 'build', 'dist', 'models', 'mixup-demo',
        '_proc', '_docs', '_site')
    return shutil.copytree(root, folder/root.name, ignore=shutil.ignore_patterns(*made))

def hooks_on(model):
    "Names of all hooks on the modules and tensors of `model`"
    found = [(n, k) for n,m in model.named_modules() for k,v in vars(m).items() if k.endswith('_hooks') and v]
    return found + [(n, '_backward_hooks') for n,p in model.named_parameters() if p._backward_hooks]

def global_hooks():
    "Names of the kinds of global hooks that are set"
    return [k for k,v in vars(_global).items() if k.startswith('_global_') and k.endswith('_hooks') and v]

@contextlib.contextmanager
def loaded_shapes(monkeypatch):
    "Collects the shape of every tensor that is unpickled meanwhile"
    shapes,rebuild = [],torch._utils._rebuild_tensor_v2
    def spy(storage, offset, size, *args, **kw):
        shapes.append(tuple(size))
        return rebuild(storage, offset, size, *args, **kw)
    with monkeypatch.context() as m:
        m.setattr(torch._utils, '_rebuild_tensor_v2', spy)
        yield shapes
