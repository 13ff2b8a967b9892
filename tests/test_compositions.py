"""Every recipe in choices and with one share a batch, under any two of pairing, schedule and place: each step is made by hand.

A recipe gets one line in `cases`; one that wants another input than pictures brings its own `Data`."""
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

from common import covering
from fastai_mixup_ext import (MixCallback, Recipe, balanced, class_counts, cutmix, deranged, fmix, mixup, one_of, per_batch,
    regmixup, remix, resizemix, shuffled, spanmix, until, without_hesitation)

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

class Words(nn.Module):
    "The mean of the embeddings"
    def __init__(self):
        super().__init__()
        self.stem,self.head = nn.Embedding(30, 5),nn.Linear(5, C)
    def forward(self, ids):
        out = self.stem(ids)
        self.left = out.detach()
        return self.head(out.mean(1))

def blended(x, mix):
    "Row by row in float64; nan where a shrunk partner lies, which test_mix.py checks"
    rows = []
    for i,j in enumerate(mix.partner.tolist()):
        own,other,mask = x[i].double(),x[j].double(),mix.mask
        share = mix.lam[i] if mask is None else mask[i] if mask.dim()==1 else mask[i if len(mask)>1 else 0]
        share = share.double()
        if share.dim()==2: share = share.T  # over words: (T,1) beside embeddings (T,e)
        row = torch.where(share==1, own, share*own + (1-share)*other)
        rows.append(row if mix.box is None else torch.where(share==1, own, torch.nan))
    return torch.stack(rows)

def of_pictures(model, x, mix, inside):
    "Pairs of what came or left and what should have; by hand"
    def stem(x): return F.conv2d(x, model.stem.weight, model.stem.bias, padding=1).detach()
    yield model.came, x if mix is None or inside else blended(x, mix)
    yield model.left, blended(stem(x), mix) if inside and mix is not None else stem(model.came)

def of_words(model, x, mix, inside):
    "Words are pasted or mixed where they become numbers: the embeddings of both"
    vectors = model.stem.weight.detach()[x]
    yield model.left, vectors if mix is None else blended(vectors, mix)

@dataclass
class Data:
    "What a recipe mixes: the inputs of `N` rows, a model, what its first layer should see and give, and who else may be chosen"
    x:Callable
    model:Callable
    expected:Callable
    other:Recipe
    places:tuple = ('input', 'module', 'either')
    wrappers:tuple = ('alone', 'per_batch', 'in_choice', 'in_choice_of_rows')

def gen(): return torch.Generator().manual_seed(0)

pictures = Data(lambda: torch.randn(N, 2, 6, 4, generator=gen()), Net, of_pictures, cutmix(1.))
words = Data(lambda: torch.randint(30, (N, 7), generator=gen()), Words, of_words, mixup(1.), ('input',),
    ('alone', 'per_batch', 'in_choice'))
padded = Data(words.x, Words, of_words, mixup(1.), ('input',), ('alone', 'in_choice'))
cases = {  # name: (data, function from alpha and a wrapper to a recipe; the wrapper goes around what draws the values)
    'mixup': (pictures, lambda alpha, wrap: wrap(mixup(alpha))),
    'cutmix': (pictures, lambda alpha, wrap: wrap(cutmix(alpha))),
    'fmix': (pictures, lambda alpha, wrap: wrap(fmix(alpha))),
    'resizemix': (pictures, lambda alpha, wrap: wrap(resizemix())),
    'regmixup': (pictures, lambda alpha, wrap: wrap(regmixup(alpha))),
    'remix': (pictures, lambda alpha, wrap: remix(wrap(mixup(alpha)), counts)),
    'remix of cutmix': (pictures, lambda alpha, wrap: remix(wrap(cutmix(alpha)), counts, kappa=1.5, tau=.8)),
    'mixup of words': (words, lambda alpha, wrap: wrap(mixup(alpha))),
    'spans': (words, lambda alpha, wrap: wrap(spanmix(alpha))),
    'spans beside padding': (padded, lambda alpha, wrap: wrap(spanmix(alpha, pad=3))),
    'remix of spans': (words, lambda alpha, wrap: remix(wrap(spanmix(alpha)), counts)),
}

def alone(recipe): return recipe
def in_choice(recipe): return one_of(recipe, mixup(.4), weights=[SchedLin(1, .5), .5])
def in_choice_of_rows(recipe): return one_of(recipe, mixup(.4), per_row=True)
wrappers = {o.__name__: o for o in (alone, per_batch, in_choice, in_choice_of_rows)}
pairings = {'shuffled': shuffled, 'deranged': deranged, 'balanced': balanced(counts)}
schedules = {'numbers': dict(alpha=1., p=1.), 'schedules': dict(alpha=SchedLin(.5, 5.), p=without_hesitation(.5, .7)),
    'until': dict(alpha=1., p=until(.5))}
places = {'input': None, 'module': lambda m: m.stem, 'either': lambda m: [None, m.stem]}

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
    def __init__(self, cb, data): self.cb,self.data,self.x,self.mixed,self.places = cb,data,data.x(),0,set()

    def after_pred(self):
        at = self.learn.train_iter*BS
        inside = self.cb.place is not None
        for got,expected in self.data.expected(self.learn.model, self.x[at:at+BS], self.cb.mix, inside):
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
    watch = ByHand(cb, data)
    learn = Learner(DataLoaders(dl, [next(iter(dl))]), data.model(), loss_func=CrossEntropyLossFlat(), cbs=[cb, watch])
    for o in 'progress','recorder': learn.remove_cb(getattr(learn, o))
    return learn,cb,watch

cells = [(case, wrap, around) for case,(data,_) in cases.items() for wrap in data.wrappers for around in ('alone', 'chosen')]

@pytest.mark.parametrize('case,wrap,around', cells)
def test_compositions(case, wrap, around):
    "One share a batch can't go around remix, whose labels are moved by row: it goes inside"
    data,make_recipe = cases[case]
    for pair,when,place in covering(product(pairings, schedules, data.places)):
        kw = schedules[when]
        torch.manual_seed(0)
        recipe = make_recipe(kw['alpha'], wrappers[wrap])
        recipe = recipe if around=='alone' else one_of(recipe, data.other)
        learn,cb,watch = make(data, recipe, p=kw['p'], pair=pairings[pair], at=places[place])
        learn.fit(1, lr=.01)
        assert cb.mix is None, (pair, when, place)
        assert watch.mixed if when!='until' else 1<=watch.mixed<=2
        assert watch.places<={place!='input', place=='module'}
        assert not any(m._forward_hooks for m in learn.model.modules())
