"""Every recipe in choices, with one share a batch, schedules, pairings and places: values, shares and loss of each step by hand.

A recipe gets one line in `cases`; one that wants another input than pictures (tokens, say) brings its own `Data`."""
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.schedule import SchedLin
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from fastai_mixup_ext import (MixCallback, balanced, class_counts, cutmix, deranged, fmix, mixup, one_of, per_batch, regmixup, remix,
    resizemix, shuffled, until, without_hesitation)

C,BS,N = 3,8,24
y = (torch.arange(N)**2//40).clamp(max=C-1)  # unequal classes
counts = class_counts(y)

class Net(nn.Module):
    "Notes what comes into its first layer, and what comes out behind it"
    def __init__(self):
        super().__init__()
        self.stem,self.head = nn.Conv2d(2, 3, 3, padding=1),nn.Linear(3*6*4, C)
    def forward(self, x):
        self.came = x.detach()
        out = self.stem(x)
        self.left = out.detach()
        return self.head(F.relu(out).flatten(1))
    def plain_left(self): return F.conv2d(self.came, self.stem.weight, self.stem.bias, padding=1).detach()

@dataclass
class Data:
    "What a recipe mixes: the inputs of `N` rows, and a model with a module `stem` that notes what `came` and what `left`"
    x:Callable
    model:Callable

pictures = Data(lambda: torch.randn(N, 2, 6, 4, generator=torch.Generator().manual_seed(0)), Net)
cases = {  # name: (data, function from alpha and a wrapper to a recipe; the wrapper goes around what draws the values)
    'mixup': (pictures, lambda alpha, wrap: wrap(mixup(alpha))),
    'cutmix': (pictures, lambda alpha, wrap: wrap(cutmix(alpha))),
    'fmix': (pictures, lambda alpha, wrap: wrap(fmix(alpha))),
    'resizemix': (pictures, lambda alpha, wrap: wrap(resizemix())),
    'regmixup': (pictures, lambda alpha, wrap: wrap(regmixup(alpha))),
    'remix': (pictures, lambda alpha, wrap: remix(wrap(mixup(alpha)), counts)),
    'remix of cutmix': (pictures, lambda alpha, wrap: remix(wrap(cutmix(alpha)), counts, kappa=1.5, tau=.8)),
}

def alone(recipe): return recipe
def in_choice(recipe): return one_of(recipe, mixup(.4), weights=[SchedLin(1, .5), .5])
def in_choice_of_rows(recipe): return one_of(recipe, mixup(.4), per_row=True)
wrappers = alone,per_batch,in_choice,in_choice_of_rows
outer = {'alone': alone, 'chosen': lambda recipe: one_of(recipe, cutmix(1.))}
pairings = {'shuffled': shuffled, 'deranged': deranged, 'balanced': balanced(counts)}
schedules = {'numbers': dict(alpha=1., p=1.), 'schedules': dict(alpha=SchedLin(.5, 5.), p=without_hesitation(.5, .7)),
    'until': dict(alpha=1., p=until(.5))}
places = {'input': None, 'module': lambda m: m.stem, 'either': lambda m: [None, m.stem]}

def blended(x, mix):
    "Row by row in float64; nan where a shrunk partner lies, which test_mix.py checks"
    rows = []
    for i,j in enumerate(mix.partner.tolist()):
        own,other,mask = x[i].double(),x[j].double(),mix.mask
        share = mix.lam[i] if mask is None else mask[i] if mask.dim()==1 else mask[i if len(mask)>1 else 0]
        share = share.double()
        row = torch.where(share==1, own, share*own + (1-share)*other)
        rows.append(row if mix.box is None else torch.where(share==1, own, torch.nan))
    return torch.stack(rows)

def loss_of(pred, labels, mix):
    "Cross-entropy with two labels, row by row in float64"
    total = 0.
    for i,j in enumerate(mix.partner.tolist()):
        log_p,lam = pred[i].double().log_softmax(0),mix.lam[i].double()
        total -= lam*log_p[labels[i]] + (1-lam)*log_p[labels[j]]
    return total/len(pred)

class ByHand(Callback):
    "Makes each step by hand, and compares"
    order,run_valid = 50,False
    def __init__(self, cb): self.cb,self.mixed,self.places = cb,0,set()

    def before_train(self): self.whole = self.learn.dls.train.dataset.tensors[0]

    def after_pred(self):
        mix,model = self.cb.mix,self.learn.model
        at = self.learn.train_iter*BS
        x = self.whole[at:at+BS]
        inside = self.cb.place is not None
        came,left = (x, blended(model.plain_left(), mix)) if mix is not None and inside else (
            x if mix is None else blended(x, mix), model.plain_left())
        for got,expected in (model.came, came), (model.left, left):
            known = ~expected.isnan()
            assert_close(got.double()[known], expected.double()[known], rtol=1e-4, atol=1e-5)

    def after_loss(self):
        mix = self.cb.mix
        if mix is None: return
        self.mixed += 1
        self.places.add(self.cb.place is not None)
        assert_close(self.learn.loss.detach().double(), loss_of(self.learn.pred.detach(), self.learn.y, mix), rtol=1e-4, atol=1e-5)

def make(data, recipe, **kw):
    dl = DataLoader(TensorDataset(data.x(), y), batch_size=BS)
    cb = MixCallback(recipe, seed=0, **kw)
    watch = ByHand(cb)
    learn = Learner(DataLoaders(dl, [next(iter(dl))]), data.model(), loss_func=CrossEntropyLossFlat(), cbs=[cb, watch])
    for o in 'progress','recorder': learn.remove_cb(getattr(learn, o))
    return learn,cb,watch

@pytest.mark.parametrize('case,wrap,around', product(cases, wrappers, outer), ids=lambda o: getattr(o, '__name__', o))
def test_compositions(case, wrap, around):
    "One share a batch can't go around remix, whose labels are moved by row: it goes inside"
    data,recipe = cases[case]
    for (pair,policy),(words,kw),(place,at) in product(pairings.items(), schedules.items(), places.items()):
        torch.manual_seed(0)
        learn,cb,watch = make(data, outer[around](recipe(kw['alpha'], wrap)), p=kw['p'], pair=policy, at=at)
        learn.fit(1, lr=.01)
        assert cb.mix is None, (pair, words, place)
        assert watch.mixed if words!='until' else 1<=watch.mixed<=2
        assert watch.places<={place!='input', place=='module'}
        assert not any(m._forward_hooks for m in learn.model.modules())
