"""The loss of a mix with other people's losses: its laws over sequences of batches, in `mixed_loss` and in a fit."""
from dataclasses import replace

import pytest
import torch
from common import Watch
from looking import blends_inputs, fit
from losses import N, cases, libraries, public
from tape import close, lerped, loaders
from torch import nn
from torch.testing import assert_close

from fastai.basics import Learner
from fastai_mixup_ext import Mix, MixCallback, Recipe, cutmix, mixed_loss, mixup, one_of

every_loss = pytest.mark.parametrize('name', cases)
partner = torch.tensor([1,0,3,3,5,4])

@pytest.mark.parametrize('library', libraries)
def test_no_loss_is_forgotten(library):
    module,table,without = libraries[library]
    assert not public(module) - {o.split()[0] for o in table} - set(without)

# in `mixed_loss`

def batches(name):
    "The loss, and for three different batches: a prediction, the leaf that it was made of, and targets"
    make,data = cases[name]
    for kind in range(3):
        leaf,y = data.batch(kind)
        yield data.act(leaf), leaf, y

def tolerance(loss):
    "Some losses cast what they are given to float32"
    return 1e-10 if loss.dtype==torch.float64 else 2e-5

def by_the_law(loss_func, pred, y, v):
    "`loss_func` of blended numbers, or blended losses"
    if y.is_floating_point(): return loss_func(pred, v*y + (1-v)*y[partner])
    return v*loss_func(pred, y) + (1-v)*loss_func(pred, y[partner])

@every_loss
@pytest.mark.parametrize('v', [1.,.7])
def test_one_share_for_all_rows(name, v):
    "Of values and gradients; with a share of 1 the loss is the plain one"
    loss_func,mix = cases[name][0](),Mix(partner, torch.full((N,), v, dtype=torch.float64))
    for pred,leaf,y in batches(name):
        plain = cases[name][0]()
        want = plain(pred, y) if v==1 else by_the_law(plain, pred, y, v)
        got = mixed_loss(loss_func, pred, y, mix)
        if v==1: assert torch.equal(got, want)
        tol = tolerance(plain(pred, y))
        assert_close(got, want, rtol=tol, atol=tol, check_dtype=False)
        a,b = (torch.autograd.grad(o, leaf, retain_graph=True)[0] for o in (got, want))
        assert_close(a, b, rtol=tol, atol=tol)

@every_loss
def test_pasted_targets(name):
    "Under a mask over the positions, targets of these positions are pasted, whatever they are, and the loss is called"
    make,data = cases[name]
    size = data.shape[1:]
    if not size: size = 2,2
    mask = torch.rand(N, 1, *size)<.6
    loss_func,mix = make(),Mix(partner, mask.flatten(1).double().mean(1).mean().expand(N), mask)
    for pred,_,y in batches(name):
        over = y.shape[2:]==size or y.shape[1:]==size
        keep = mask if y.dim()==mask.dim() else mask[:,0]
        if over: want = make()(pred, torch.where(keep, y, y[partner]))
        else: want = by_the_law(make(), pred, y, mix.lam[0])
        tol = tolerance(make()(pred, y))
        assert_close(mixed_loss(loss_func, pred, y, mix), want, rtol=tol, atol=tol, check_dtype=False)

# in a fit

class Pointwise(nn.Module):
    "From one channel, position by position, to what a loss takes"
    def __init__(self, data):
        super().__init__()
        self.data,self.maps = data,len(data.shape)>1
        self.lin = nn.Linear(1 if self.maps else 64, data.shape[0]).to(data.dtype)
        nn.init.normal_(self.lin.weight)
    def forward(self, x):
        out = self.lin(x.movedim(1, -1)).movedim(-1, 1) if self.maps else self.lin(x.flatten(1))
        return self.data.act(out)

def learner(name, rows=4*N):
    make,data = cases[name]
    data = replace(data, dtype=torch.float32)  # fastai's Recorder can't take a loss in float64
    ys = torch.cat([data.batch(kind)[1] for kind in (0, 1, 0, 0)])
    x = torch.rand(rows, 1, *(data.shape[1:] or (8,8)), dtype=data.dtype)
    return Learner(loaders(list(zip(x, ys)), bs=N, shuffle=False), Pointwise(data), loss_func=make(), lr=1e-3)

def formula(step, loss_func):
    "The loss that a step should have had, from the prediction, the targets as loaded and the mix"
    (y,),mix,pred = step.y,step.mix,step.pred
    mask = mix.mask
    over = mask is not None and mask.shape[2:] in (y.shape[2:], y.shape[1:])
    if over: return loss_func(pred, torch.where(mask if y.dim()==mask.dim() else mask[:,0], y, y[mix.partner]))
    if y.is_floating_point(): return loss_func(pred, lerped(y, mix).to(y.dtype))
    lam = mix.lam[0].item()
    assert (mix.lam==lam).all()
    return lam*loss_func(pred, y) + (1-lam)*loss_func(pred, y[mix.partner])

@every_loss
def test_training(name):
    "Under a switch of two recipes every loss trains, each step's loss is the formula, and the learner is afterwards as before"
    learn,cb = learner(name),MixCallback(one_of(mixup(.4), cutmix(1.)), seed=1)
    before = learn.model.lin.weight.detach().clone()
    steps = fit(learn, cb, epochs=3)
    assert len(steps)==12 and {o.mix.mask is None for o in steps}=={True, False}
    blends_inputs(steps)
    for o in steps: close(o.loss, formula(o, cases[name][0]()))
    weight = learn.model.lin.weight
    assert weight.isfinite().all() and not torch.equal(weight, before)

class KeepAll(Recipe):
    "Partners whose share is 0"
    def draw(self, batch): return Mix(batch.partner, torch.ones(len(batch)))

@every_loss
def test_a_share_of_one_is_plain_training(name):
    "Step by step to the last decimal"
    def losses(*cbs):
        torch.manual_seed(3)
        learn,seen = learner(name),Watch('before_backward', lambda learn: learn.loss.detach().clone())
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[seen, *cbs])
        return torch.stack(seen.seen)
    assert torch.equal(losses(), losses(MixCallback(KeepAll(), seed=1)))
