"""No value is waited for: on `meta` tensors, which have none; by counting what is read; and compiled, one graph for every lam and size."""
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import fastai.callback.progress  # noqa: F401  Learner.no_bar
import pytest
import torch
import torch._dynamo as dynamo
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLoss, FocalLossFlat
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from fastai_mixup_ext import (MixCallback, across_class, balanced, blend, by_target_distance, cutmix, deranged, fmix, mixed_accuracy,
    mixed_loss, mixup, one_of, per_batch, regmixup, remix, resizemix, shuffled, within_class)
from common import torch_27

recipes = {'mixup': mixup(.4), 'mixup tiny': mixup(1e-3), 'cutmix': cutmix(), 'fmix': fmix(), 'resizemix': resizemix(),
    'one_of': one_of(mixup(1.), cutmix()), 'one_of rows': one_of(mixup(.4), cutmix(), fmix(), resizemix(), per_row=True),
    'per_batch': per_batch(cutmix()), 'regmixup': regmixup(), 'remix': remix(one_of(mixup(.4), cutmix()), [9, 1, 1, 1, 1])}
policies = {'shuffled': shuffled, 'deranged': deranged, 'within_class': within_class, 'across_class': across_class,
    'by_target_distance': by_target_distance(1.), 'balanced': balanced(), 'balanced counts': balanced([9, 1, 1, 1, 1])}
each_recipe = pytest.mark.parametrize('recipe', recipes.values(), ids=recipes)
each_pairing = pytest.mark.parametrize('pair', policies.values(), ids=policies)

def batch(n=8, device='cpu', spatial=(8,6)):
    return torch.randn(n, 3, *spatial, device=device), (torch.zeros(n, dtype=torch.int64, device=device), torch.zeros(n, device=device))

losses = {  # the loss, the shape of a prediction, dtype and shape of a target
    'cross-entropy': (F.cross_entropy, (5,), torch.int64, ()),
    'weighted': (nn.CrossEntropyLoss(weight=torch.ones(5), label_smoothing=.1), (5,), torch.int64, ()),
    'flat': (CrossEntropyLossFlat(), (5,), torch.int64, ()),
    'focal': (FocalLossFlat(), (5,), torch.int64, ()),
    'maps': (CrossEntropyLossFlat(axis=1), (5,8,6), torch.int64, (8,6)),
    'bce': (BCEWithLogitsLossFlat(), (5,), torch.int64, (5,)),
    'mse': (F.mse_loss, (), torch.float32, ())}

def pred_and_target(pred, dtype, target, n, device):
    return torch.randn(n, *pred, device=device, requires_grad=True), torch.zeros(n, *target, dtype=dtype, device=device)


class Noted(TorchDispatchMode):
    "The names of the operators that `notes` is true of"
    def __init__(self):
        super().__init__()
        self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.notes(func.__name__, args, kwargs, out): self.seen.append(func.__name__)
        return out


# ---- tensors without values

@each_pairing
@each_recipe
def test_draw_and_blend_need_no_value(recipe, pair):
    x,yb = batch(device='meta')
    mix = recipe(x, yb, pair=pair)
    assert all(t is None or t.is_meta for t in vars(mix).values())
    assert blend(x, mix).shape==x.shape

@pytest.mark.parametrize('f,pred,dtype,target', losses.values(), ids=losses)
@each_recipe
def test_losses_need_no_value(recipe, f, pred, dtype, target):
    x,yb = batch(device='meta')
    p,y = pred_and_target(pred, dtype, target, 8, 'meta')
    if getattr(f, 'weight', None) is not None: f = nn.CrossEntropyLoss(weight=f.weight.to('meta'), label_smoothing=.1)
    loss = mixed_loss(f, p, y, recipe(x, yb))
    assert loss.is_meta
    loss.backward()


# ---- Apple's GPUs have no float64

class Wide(Noted):
    "What becomes float64"
    def notes(self, name, args, kwargs, out): return any(isinstance(t, torch.Tensor) and t.dtype==torch.float64 for t in tree_leaves(out))

@each_pairing
@each_recipe
def test_nothing_becomes_float64(recipe, pair):
    with Wide() as wide:
        x,yb = batch(device='meta')
        mix = recipe(x, yb, pair=pair)
        blend(x, mix)
        pred = torch.randn(8, 5, device='meta', requires_grad=True)
        for f in (F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=.1), FocalLoss()): mixed_loss(f, pred, yb[0], mix).backward()
    assert wide.seen==[]

@torch_27
def test_nor_does_the_metric():
    with FakeTensorMode(), Wide() as wide:  # fake tensors may be on devices that are not there
        metric = mixed_accuracy()
        metric.reset()
        metric.accumulate(SimpleNamespace(cbs=[], pred=torch.rand(8, 5, device='mps'), yb=(torch.zeros(8, device='mps').long(),)))
    assert wide.seen==[] and metric.hits.device.type=='mps'

def test_float64_is_seen():
    with Wide() as wide: torch.rand(3).double()
    assert wide.seen==['_to_copy.default']


# ---- what is read, counted

class Reads(Noted):
    "What would wait for an accelerator: values read by the host, shapes that depend on values, copies between devices"
    waits = {'_local_scalar_dense', 'item', 'nonzero', 'masked_select', 'is_nonzero', 'equal', '_unique2', 'unique_dim', 'bincount',
        'repeat_interleave.Tensor'}
    def notes(self, name, args, kwargs, out):
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.dim() or name=='_to_copy.default'}
        where = args[1] if name.startswith('index') else ()
        selects = isinstance(where, (tuple, list)) and any(isinstance(t, torch.Tensor) and t.dtype==torch.bool for t in where)
        return name.removesuffix('.default') in self.waits or len(devices)>1 or selects

@each_pairing
@each_recipe
def test_nothing_is_read(recipe, pair):
    "Here without values; test_cuda.py has the same with values"
    x,yb = batch(device='meta')
    p,y = torch.randn(8, 5, device='meta', requires_grad=True),yb[0]
    recipe = recipe.chosen(0.)  # on the host, before anything is drawn
    recipe(x, yb, pair=pair)  # given counts are copied to a device once
    with Reads() as reads:
        mix = recipe(x, yb, pair=pair)
        blend(x, mix)
        for f in (F.cross_entropy, FocalLoss()): mixed_loss(f, p, y, mix).backward()
        blend(yb[1], mix)
    assert reads.seen==[]

def test_the_count_counts():
    with Reads() as reads:
        t = torch.rand(3)
        t[0].item(), t[t>0], t.to('meta'), bool(t[0]>0)
    assert len(reads.seen)==4

class Count(Callback):
    "Counts what a training step reads, the callbacks' work of before_batch to after_loss"
    order = -1000
    def before_batch(self):
        self.reads = Reads()
        self.reads.__enter__()
    def before_backward(self):
        if self.training: self.stop()
    def after_batch(self): self.stop()
    def stop(self):
        if self.reads is None: return
        self.reads.__exit__(None, None, None)
        self.seen,self.reads = self.reads.seen,None

@torch_27
@each_recipe
def test_a_training_step_reads_nothing_more(recipe):
    x,(y,_) = batch(16)
    dl = DataLoader(TensorDataset(x, y), batch_size=8)
    def seen(*cbs):
        count = Count()
        learn = Learner(DataLoaders(dl, dl), nn.Sequential(nn.Flatten(), nn.Linear(144, 5)), loss_func=nn.CrossEntropyLoss(),
            cbs=[count,*cbs])
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return count.seen
    assert seen(MixCallback(recipe))==seen()


# ---- compiled

@contextmanager
def fresh():
    dynamo.reset()
    dynamo.utils.counters.clear()
    try: yield
    finally: dynamo.reset()

def compiled(f, backend='eager'):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(f, backend=counter, fullgraph=True), counter

def dynamic(*ts):
    for t in ts: dynamo.mark_dynamic(t, 0)
    return ts

def train(recipe, pair, f=F.cross_entropy):
    def step(x, y, v, w):
        mix = recipe(x, (y,v), pair=pair)
        return mixed_loss(f, blend(x, mix).flatten(1) @ w, y, mix)
    return step

def check_compiled(step, backend='eager', sizes=(8,8,5,7), device='cpu'):
    "One graph for every lam and batch size, and a gradient"
    with fresh():
        f,counter = compiled(step, backend)
        w = torch.randn(144, 5, requires_grad=True, device=device)
        values = []
        for n in sizes:
            x,(y,v) = batch(n, device)
            loss = f(*dynamic(x, y, v), w)
            loss.backward()
            values.append(loss.item())
        assert counter.frame_count==1 and not dynamo.utils.counters['graph_break']
        assert w.grad.isfinite().all() and len({*values})==len(values)

@torch_27
@each_recipe
def test_every_recipe_compiles_to_one_graph(recipe): check_compiled(train(recipe.chosen(0.), shuffled))

@torch_27
@pytest.mark.parametrize('recipe', [mixup(.4), recipes['one_of rows']], ids=['mixup','one_of rows'])
def test_with_its_gradient_too(recipe): check_compiled(train(recipe.chosen(0.), shuffled), 'aot_eager')

@torch_27
@each_pairing
def test_every_pairing_compiles_to_one_graph(pair): check_compiled(train(mixup(.4), pair))

@torch_27
@pytest.mark.parametrize('f', [nn.CrossEntropyLoss(weight=torch.rand(5), ignore_index=3, label_smoothing=.1), CrossEntropyLossFlat(),
    FocalLoss()], ids=str)
def test_losses_compile_to_one_graph(f): check_compiled(train(mixup(.4), shuffled, f))

@torch_27
def test_a_schedule_compiles():
    "alpha is a number in the graph: a new one may compile again, but not without end"
    recipe = mixup(lambda t: .1+t)
    def step(x, progress): return blend(x, recipe(x, progress=progress))
    with fresh():
        f,counter = compiled(step)
        for i in range(8): f(torch.randn(8, 3), .1*i)
        assert counter.frame_count<=3

@torch_27
@each_recipe
def test_a_given_mix_gives_the_same_compiled(recipe):
    x,(y,v) = batch()
    mix = recipe(x, (y,v))
    def step(x, mix): return blend(x, mix), mixed_loss(F.cross_entropy, x[:,:,0,0], y, mix)
    with fresh():
        f,_ = compiled(step)
        for a,b in zip(f(x, mix), step(x, mix)): assert_close(a, b)

@torch_27
@pytest.mark.skipif(not shutil.which('g++'), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize('recipe', [mixup(.4), one_of(mixup(.4), cutmix(1.)), fmix(1.), resizemix()], ids=repr)
def test_inductor(recipe): check_compiled(train(recipe.chosen(0.), shuffled), 'inductor', (8,5))
