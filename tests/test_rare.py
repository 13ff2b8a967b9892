"""Rare classes: remix against its equation in a loop, the counts it reads, and what can't be counted."""
import copy
import pickle

import fastai.callback.progress  # noqa: F401  Learner.no_bar
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, TransformBlock
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import RandomSplitter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.data import Categorify, Normalize, TabularDataLoaders
from fastai.text.data import TextDataLoaders
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from fastai_mixup_ext import (Mix, MixCallback, Recipe, balanced, blend, class_counts, cutmix, fmix, mixed_loss, mixup, one_of, per_batch,
    regmixup, remix, resizemix)
from fastai_mixup_ext.embeddings import by_length
from fastai_mixup_ext.pairing import Counts

C = 4
counts = [100, 30, 10, 1]

def gen(seed=0): return torch.Generator().manual_seed(seed)

def label_share(lam, n_i, n_j, kappa, tau):
    "Equation 10 of arXiv 2007.03943, as it stands there"
    if n_i/n_j>=kappa and lam<tau: return 0.
    if n_i/n_j<=1/kappa and 1-lam<tau: return 1.
    return lam

class Fixed(Recipe):
    "The same mix each time"
    def __init__(self, mix): self.mix = mix
    def draw(self, batch): return self.mix

def fixed(lam, partner, **kw): return Fixed(Mix(tensor(partner), tensor(lam), **kw))


# ---- the equation

inner = {'mixup': mixup(1.), 'cutmix': cutmix(1.), 'fmix': fmix(1.), 'resizemix': resizemix(), 'regmixup': regmixup(1.),
    'rows': one_of(mixup(1.), cutmix(1.), per_row=True), 'per_batch': per_batch(cutmix(1.))}

@pytest.mark.parametrize('recipe', inner.values(), ids=inner)
@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([1., 2., 3., 10.]), st.sampled_from([0., .31, .49, .83, 1.]))  # no share of 20 positions
def test_against_the_equation_in_a_loop(recipe, seed, kappa, tau):
    "Values, shares and loss, in float64, row by row"
    g = gen(seed)
    n = 12
    x,y,pred = torch.randn(n, 2, 5, 4, generator=g),torch.randint(C, (n,), generator=g),torch.randn(n, C, generator=g)
    plain = recipe(x, y, generator=gen(seed))
    mix = remix(recipe, counts, kappa, tau)(x, y, generator=gen(seed))
    assert (mix.partner==plain.partner).all()
    assert_close(blend(x, mix), blend(x, plain), rtol=0, atol=0)
    total = 0.
    for i,j in enumerate(mix.partner.tolist()):
        lam = label_share(plain.lam[i].item(), counts[y[i]], counts[y[j]], kappa, tau)
        assert mix.lam[i].item()==lam
        log_p = pred[i].double().log_softmax(0)
        total -= lam*log_p[y[i]] + (1-lam)*log_p[y[j]]
    assert_close(mixed_loss(F.cross_entropy, pred, y, mix).double(), total/n, rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('lam', [0., .25, .5, .75, 1.])
@pytest.mark.parametrize('own,other', [(a, b) for a in range(C) for b in range(C)])
def test_every_pair_of_classes(lam, own, other):
    mix = remix(fixed([lam, 1.], [1, 1]), counts)(torch.zeros(2, 3), tensor([own, other]))
    assert mix.lam[0]==label_share(lam, counts[own], counts[other], 3., .5)
    assert mix.mask[0]==lam

def test_the_edges_of_the_rule():
    "A ratio of just kappa counts; a share of just tau doesn't; where both cases hold the first one does"
    x,y = torch.zeros(2, 3),tensor([0, 1])
    assert remix(fixed([.25, 1.], [1, 1]), [30, 10])(x, y).lam[0]==0
    assert remix(fixed([.25, 1.], [1, 1]), [29, 10])(x, y).lam[0]==.25
    assert remix(fixed([.5, 1.], [1, 1]), [30, 10])(x, y).lam[0]==.5
    assert remix(fixed([.5, 1.], [1, 1]), [5, 5], kappa=1, tau=1)(x, y).lam[0]==0

def test_a_class_without_rows_is_the_rarest():
    mix = remix(fixed([.75, .75], [1, 0]), [5, 0])(torch.zeros(2, 3), tensor([0, 1]))
    assert mix.lam.tolist()==[.75, 1.] and mix.lam.isfinite().all()

def test_tau_0_leaves_the_labels():
    x,y = torch.randn(20, 3),torch.randint(C, (20,))
    mix = remix(mixup(1.), counts, tau=0)(x, y, generator=gen())
    assert (mix.lam==mixup(1.)(x, y, generator=gen()).lam).all()

def test_a_row_of_its_own_passes_bit_for_bit():
    "Whatever its partner holds"
    x,y = tensor([[1.,2.], [torch.inf, torch.nan]]),tensor([3, 0])
    mix = remix(fixed([1., 1.], [1, 0]), counts)(x, y)
    assert (blend(x, mix)[0]==x[0]).all()

def test_no_target_is_forgotten():
    "All the shares of a batch: 1 for the rarer of a pair, and nothing else has changed"
    x,y = torch.randn(400, 3),torch.randint(C, (400,))
    mix = remix(mixup(1.), counts)(x, y, generator=gen())
    moved = mix.lam!=mix.mask
    assert moved.any() and (mix.lam[moved]==1).all()
    assert (tensor(counts)[y[mix.partner]][moved]>=3*tensor(counts)[y][moved]).all()

@pytest.mark.parametrize('y', [tensor([0,3,3,1]), tensor([[0],[3],[3],[1]], dtype=torch.int8), (torch.rand(4), tensor([0,3,3,1])),
    [torch.randint(9, (4,3)), tensor([0,3,3,1], dtype=torch.uint8)]], ids=['(n,)','(n,1) int8','behind a number','behind a table'])
def test_the_label(y): assert remix(fixed([.75]*4, [1,0,3,2]), counts)(torch.zeros(4, 2), y).lam.tolist()==[.75, 1., 1., .75]

def test_boolean_labels():
    y = tensor([False, True])
    assert remix(fixed([.75, .75], [1, 0]), [9, 1])(torch.zeros(2, 2), y).lam.tolist()==[.75, 1.]


# ---- a recipe like others

def test_a_value():
    a,b = remix(mixup(.4), counts),remix(mixup(.4), torch.tensor(counts))
    assert a==b and hash(a)==hash(b) and a!=remix(mixup(.4), [1, 1]) and a!=remix(mixup(.4), counts, tau=.4)
    for o in pickle.loads(pickle.dumps(a)),copy.deepcopy(a),copy.copy(a): assert o==a
    assert repr(a)==("remix(recipe=mixup(alpha=0.4), counts=Counts([100.0, 30.0, 10.0, 1.0]), kappa=3.0, tau=0.5)")

def test_counts_are_copied():
    given = torch.tensor(counts, dtype=torch.float32)
    recipe = remix(mixup(.4), given)
    given.zero_()
    assert recipe==remix(mixup(.4), counts)

@pytest.mark.parametrize('given', [tuple(counts), np.array(counts), torch.tensor(counts, dtype=torch.int32), [float(o) for o in counts],
    pd.Series(counts).to_numpy()], ids=['tuple','numpy','int32','floats','pandas'])
def test_counts_of_any_kind(given): assert Counts(given)==Counts(counts)

def test_a_copy_on_a_device_is_kept():
    "Also across the choices of a batch, which make recipes anew"
    recipe = remix(one_of(mixup(.4), cutmix()), counts)
    x,y = torch.randn(4, 1, 3, 3, device='meta'),torch.zeros(4, dtype=torch.int64, device='meta')
    recipe(x, y)
    first = recipe.counts.on(x.device)
    recipe(x, y)
    assert recipe.counts.on(x.device) is first and recipe.chosen(0.).counts.on(x.device) is first
    assert pickle.loads(pickle.dumps(recipe)).counts._copies=={}

def test_the_schedule_within():
    off = remix(mixup(lambda t: float(t<.5)), counts)
    assert off.active(.4) and not off.active(.6)

def test_the_mix_travels():
    mix = remix(mixup(1.), counts)(torch.zeros(8, 3), torch.randint(C, (8,)))
    assert type(mix.to('cpu')) is type(mix) and type(by_length(mix)[1]) is type(mix)


# ---- refusals

x4 = torch.zeros(4, 2)

@pytest.mark.parametrize('y', [(), torch.rand(4), torch.rand(4, 3), torch.randint(3, (4,5)), [torch.rand(4)]],
    ids=['none','numbers','soft','map','list'])
def test_no_label_is_refused(y):
    with pytest.raises(ValueError, match=r'remix needs an integer target with one label per row\. Use the recipe without remix'):
        remix(mixup(.4), counts)(x4, y)

@pytest.mark.parametrize('y', [tensor([0,1,2,4]), tensor([0,1,2,-1]), tensor([0,1,2,-100])])
def test_a_label_without_count_is_refused(y):
    with pytest.raises(ValueError, match=f'the labels run from {y.min()} to {y.max()}, but counts has 4 classes'):
        remix(mixup(.4), counts)(x4, y)
    with pytest.raises(ValueError, match='but counts has 4 classes'): balanced(counts)(x4, y)

@pytest.mark.parametrize('bad', [[], [[1,2]], [1,-1], [0,0], [1,float('nan')], [1,float('inf')], 'many', None, 3, tensor(3.), {0: 3},
    [1,'a']], ids=str)
@pytest.mark.parametrize('make', [lambda c: remix(mixup(.4), c), balanced], ids=['remix','balanced'])
def test_bad_counts_are_refused_at_once(make, bad):
    if bad is None and make is balanced: return
    with pytest.raises(ValueError, match=r'counts=.* must be a 1-D tensor or a sequence.*class_counts\(dls\)'): make(bad)

@pytest.mark.parametrize('kw', [dict(kappa=.9), dict(kappa='3'), dict(kappa=True), dict(kappa=float('inf')), dict(kappa=float('nan')),
    dict(tau=-.1), dict(tau=1.1), dict(tau=None), dict(tau=float('nan'))], ids=str)
def test_bad_numbers_are_refused_at_once(kw):
    name,value = *kw,*kw.values()
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a number.*the paper's is"): remix(mixup(.4), counts, **kw)

@pytest.mark.parametrize('bad', [.4, mixup, None], ids=str)
def test_what_is_no_recipe_is_refused(bad):
    with pytest.raises(TypeError, match='needs a recipe, such as'): remix(bad, counts)

def test_other_mixes_are_refused():
    class Odd(Mix): pass
    with pytest.raises(TypeError, match='draws a Odd.*plain Mix'):
        remix(Fixed(Odd(tensor([1,0]), tensor([.5,.5]))), counts)(torch.zeros(2, 2), tensor([0,1]))

def test_one_share_for_the_batch_is_refused_outside_and_right_inside():
    y = tensor([0,3,3,1])
    with pytest.raises(TypeError, match="one share for the batch.*by_row"): per_batch(remix(mixup(.4), counts))(x4, y)
    mix = remix(per_batch(mixup(1.)), counts)(x4, y)
    assert len({*mix.mask.tolist()})==1

def learner(recipe, loss_func=None, **kw):
    x,y = torch.randn(32, 3),torch.randint(C, (32,))
    dl = DataLoader(TensorDataset(x, y), batch_size=8)
    learn = Learner(DataLoaders(dl, dl), nn.Linear(3, C), loss_func=loss_func or CrossEntropyLossFlat(), cbs=MixCallback(recipe, **kw))
    for o in 'progress','recorder': learn.remove_cb(getattr(learn, o))
    return learn

def test_a_loss_without_rows_is_refused():
    with pytest.raises(TypeError, match="one share for the batch"), pytest.warns(UserWarning, match='not known by row'):
        learner(remix(mixup(.4), counts), lambda p, y: F.cross_entropy(p, y)).fit(1)

def test_class_weights_count_as_without_remix():
    "The loss of a step, with weights: the weighted mean over the shares"
    w = tensor([1., 2., 3., 4.])
    f = nn.CrossEntropyLoss(weight=w)
    x,y,pred = torch.randn(8, 3),torch.randint(C, (8,)),torch.randn(8, C)
    mix = remix(mixup(1.), counts)(x, y)
    up = down = 0.
    for i,j in enumerate(mix.partner.tolist()):
        for share,k in (mix.lam[i], y[i]), (1-mix.lam[i], y[j]):
            up,down = up-share*w[k]*pred[i].log_softmax(0)[k],down+share*w[k]
    assert_close(mixed_loss(f, pred, y, mix), up/down)

def test_trains():
    learn = learner(remix(mixup(1.), counts), pair=balanced(counts), seed=0)
    before = learn.model.weight.detach().clone()
    learn.fit(1, lr=.1)
    assert learn.model.weight.isfinite().all() and (learn.model.weight!=before).any()


# ---- counting

labels = [0,0,0,2,2,1,0,2]
expected = [4,1,3]

class Noted:
    "How often an input was read"
    def __init__(self): self.read = 0
    def __call__(self, i):
        self.read += 1
        return torch.full((2,), float(i))

def blocks(target, get_y):
    noted = Noted()
    block = DataBlock([TransformBlock, target], get_x=noted, get_y=get_y, splitter=RandomSplitter(valid_pct=.5, seed=0))
    return noted,block

def test_fastai_counts_without_opening_an_input():
    noted,block = blocks(CategoryBlock(vocab=['a','b','c','d']), lambda i: 'abc'[labels[i%8]])
    dls = block.dataloaders(list(range(16)), bs=4)
    train = [labels[i%8] for i in dls.train_ds.items]
    noted.read = 0
    assert class_counts(dls).tolist()==[train.count(k) for k in range(4)]  # a class without rows has a zero
    assert noted.read==0
    assert (class_counts(dls.train)==class_counts(dls)).all()

def table():
    df = pd.DataFrame(dict(a=range(40), b=list('xy')*20, y=[('u','v','w')[labels[i%8]] for i in range(40)]))
    return df,TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['b'], cont_names=['a'], y_names='y', bs=8,
        valid_idx=list(range(8)))

def test_a_table():
    df,dls = table()
    assert class_counts(dls).tolist()==df['y'][8:].value_counts().sort_index().tolist()

def test_texts():
    df = pd.DataFrame(dict(text=['a b c d']*24, label=[('u','v','w')[labels[i%8]] for i in range(24)], is_valid=[i<8 for i in range(24)]))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_col='is_valid', bs=4, num_workers=0)
    assert class_counts(dls).tolist()==df['label'][8:].value_counts().sort_index().tolist()

class Stream(IterableDataset):
    def __iter__(self): return iter(items)

items = [(torch.zeros(2), tensor(k)) for k in labels]
loaders = {'torch': DataLoader(items, batch_size=3, drop_last=True, shuffle=True),
    'TensorDataset': DataLoader(TensorDataset(torch.zeros(8, 2), tensor(labels)), batch_size=3),
    'stream': DataLoader(Stream(), batch_size=3), 'fastai over torch': DataLoaders.from_dsets(items, items, bs=3),
    'DataLoaders over torch': DataLoaders(DataLoader(items, batch_size=3), DataLoader(items[:1])),
    'ints': labels, 'numpy': np.array(labels), 'tensor': tensor(labels),
    '(n,1) int8': tensor(labels, dtype=torch.int8)[:,None], 'series': pd.Series(labels),
    'data set': TensorDataset(torch.zeros(8, 2), tensor(labels)), 'part of one': Subset([*items, *items], range(8)),
    "fastai's data set": Datasets(range(8), [[lambda i: i], [lambda i: labels[i]]])}

@pytest.mark.parametrize('data', loaders.values(), ids=loaders)
def test_every_row_counts_once(data):
    found = class_counts(data)
    assert found.tolist()==expected and found.dtype==torch.int64

class Bare:
    "A loader that is nothing but batches"
    def __iter__(self): return iter(DataLoader(items, batch_size=3))

def test_a_loader_without_data_set(): assert class_counts(Bare()).tolist()==expected

def test_counts_fit_in():
    assert remix(mixup(.4), class_counts(labels)).counts==balanced(class_counts(labels)).counts

@pytest.mark.parametrize('bad', [[.5, 1.], torch.rand(3, 2), tensor([[0,1],[1,0]]), tensor([0,-1]), 'abc', None, 3,
    DataLoader(TensorDataset(torch.zeros(3, 2), torch.rand(3))), DataLoader(TensorDataset(torch.zeros(3, 2), torch.zeros(3, 2).long())),
    TensorDataset(torch.zeros(3, 2), torch.zeros(3, 2).long())],
    ids=['floats','soft','map','negative','text','None','number','numbers','maps','maps of a data set'])
def test_what_has_no_labels_is_refused(bad):
    with pytest.raises(TypeError, match=r'class_counts found no class number.*class_counts\(labels\)'): class_counts(bad)

def test_many_labels_per_row_are_refused():
    _,block = blocks(MultiCategoryBlock(vocab=['a','b','c']), lambda i: ['a','b'])
    with pytest.raises(TypeError, match='class_counts found no class number'): class_counts(block.dataloaders(list(range(16)), bs=4))
