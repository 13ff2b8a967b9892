"""Recipes x pairings x schedules x places in a Learner: the loss of each step recomputed from the live mix; rates, seeds and refusals."""
import inspect
import itertools

import fastai.callback.progress  # noqa: F401  Learner.no_bar
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SchedCos, SchedLin
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from scipy.stats import binomtest
from torch import nn, tensor
from torch.testing import assert_close

import fastai_mixup_ext
from common import covering, named
from fastai_mixup_ext import (CutMixCallback, FMixCallback, MixCallback, MixUpCallback, ResizeMixCallback, across_class,
    by_target_distance, cutmix, deranged,
                              fmix, mixup, one_of, per_batch, resizemix, shuffled, until, within_class)

C = 3

class Net(nn.Module):
    "A small network with places of three shapes: maps, a vector, and a block in between"
    def __init__(self, out=C):
        super().__init__()
        self.stem,self.block,self.flat,self.head = nn.Conv2d(2, 3, 3, padding=1),nn.Sequential(nn.ReLU(),
            nn.Conv2d(3, 3, 3, padding=1)),nn.Flatten(),nn.Linear(3*8*6, out)
    def forward(self, x): return self.head(self.flat(self.block(self.stem(x))))

def learner(*cbs, n=16, bs=8, loss=None, y=None, x=None, model=None, **kw):
    x = torch.randn(n, 2, 8, 6) if x is None else x
    y = torch.arange(n)%C if y is None else y
    items = [*zip(x, y)]
    dls = DataLoaders(*(DataLoader(items, bs=bs, shuffle=False, num_workers=0) for _ in range(2)))
    learn = Learner(dls, Net() if model is None else model, loss_func=CrossEntropyLossFlat() if loss is None else loss, cbs=[*cbs], **kw)
    for name in ('recorder','progress'): learn.remove_cb(getattr(learn, name))
    return learn

class Watch(Callback):
    "Keeps what the step did, and recomputes its loss by hand"
    order = 100
    def __init__(self, cb): self.cb,self.steps = cb,[]
    def after_loss(self):
        if not self.training: return
        mix,p,y,f = self.cb.mix,self.learn.pred,self.learn.yb[0],F.cross_entropy
        if mix is None: expected = f(p, y) if not y.is_floating_point() else F.mse_loss(p[:,0], y)
        elif y.is_floating_point(): expected = F.mse_loss(p[:,0], y)  # the learner's targets are blended already
        else: expected = torch.stack([l*f(p[i:i+1], y[i:i+1])+(1-l)*f(p[i:i+1],
            y[j:j+1]) for i,(l,j) in enumerate(zip(mix.lam, mix.partner))]).mean()
        assert_close(self.learn.loss.detach().as_subclass(torch.Tensor), expected.detach().as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6)
        assert self.learn.loss.isfinite()
        self.steps.append(mix)


# ---- every two settings together

recipes = {'mixup': lambda a: mixup(a), 'cutmix': lambda a: cutmix(a), 'fmix': lambda a: fmix(a), 'resizemix': lambda a: resizemix(),
    'one_of': lambda a: one_of(mixup(a), cutmix(1.), weights=[SchedLin(1, 0),1]),
           'one_of rows': lambda a: one_of(mixup(a), cutmix(a), resizemix(), per_row=True), 'per_batch': lambda a: per_batch(cutmix(a))}
pairings = {'shuffled': shuffled, 'deranged': deranged, 'within_class': within_class, 'across_class': across_class,
    'by_target_distance': by_target_distance(1.)}
schedules = {'numbers': dict(p=1., alpha=1.), 'alpha': dict(p=1., alpha=SchedCos(.1, 8.)), 'p until': dict(p=until(.6), alpha=1.),
    'alpha until': dict(p=1, alpha=until(.6, 2))}
places = {'input': None, 'module': lambda m: m.stem, 'list': lambda m: [None,m.stem,m.block], 'vector': lambda m: m.flat}
cells = [(r, q, s, a) for r,q,s,a in itertools.product(recipes, pairings, schedules, places) if not (a=='vector' and r!='mixup')]

@pytest.mark.parametrize('recipe,pair,schedule,place', covering(cells))
def test_every_two_together(recipe, pair, schedule, place):
    kw = schedules[schedule]
    regression = pair=='by_target_distance'
    cb = MixCallback(recipes[recipe](kw['alpha']), p=kw['p'], pair=pairings[pair], at=places[place])
    watch = Watch(cb)
    loss = (lambda p, y: F.mse_loss(p[:,0], y)) if regression else None
    learn = learner(cb, watch, loss=loss, y=torch.randn(24) if regression else None, n=24)
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1, lr=.01)
    mixed = [o is not None for o in watch.steps]
    off = schedule=='p until' or schedule=='alpha until' and recipe in ('mixup','cutmix','fmix','per_batch')
    if (schedule,recipe)==('alpha until','one_of'): assert mixed[:2]==[True,True]  # at the end it may have chosen mixup, which is off
    else: assert mixed==([True,True,False] if off else [True,True,True])
    assert all((p!=b).any() for p,b in zip(learn.model.parameters(), before))
    assert cb.mix is None and not any(m._forward_hooks for m in learn.model.modules())


# ---- refusals

@pytest.mark.parametrize('cb', [CutMixCallback(), FMixCallback(), ResizeMixCallback(), MixCallback(one_of(mixup(), cutmix()))],
    ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('at', [None,lambda m: m[0]], ids=['input','place'])
def test_a_vector_can_not_be_cut(cb, at):
    cb.at = at
    learn = learner(cb, x=torch.randn(16, 5), model=nn.Sequential(nn.Linear(5, 4), nn.Linear(4, C)))
    with pytest.raises(ValueError, match=r'needs positions.*use mixup'): learn.fit(1)
    assert len(learn.yb)==0 or isinstance(learn.yb[0], torch.Tensor)

others = MixUp,CutMix,MixUpCallback,CutMixCallback,FMixCallback,ResizeMixCallback,lambda: MixCallback(mixup())
@pytest.mark.parametrize('other', others, ids=lambda o: getattr(o, '__name__', 'MixCallback'))
def test_a_second_mixer_is_refused(other):
    for in_fit in (False,True):
        b = other()
        learn = learner(FMixCallback(), *([] if in_fit else [b]))
        with pytest.raises(ValueError, match=f"FMixCallback and {type(b).__name__}.*one_of"): learn.fit(1, cbs=[b] if in_fit else None)
    learner(FMixCallback()).fit(1)

@pytest.mark.parametrize('kw,error,says', [(dict(recipe=mixup), TypeError, 'recipe='), (dict(recipe=.4), TypeError, 'recipe=0.4'),
    (dict(pair='deranged'), TypeError, "pair='deranged'"), (dict(p=1.5), ValueError, 'p=1.5'),
    (dict(seed=.5), TypeError, 'seed=0.5'), (dict(seed=True), TypeError, 'seed=True'), (dict(seed='1'), TypeError,
        "seed='1'"), (dict(at=3), TypeError, 'at=3'), (dict(at='stem'), TypeError, "at='stem'")])
def test_bad_arguments_are_refused_at_once(kw, error, says):
    with pytest.raises(error, match=says): MixCallback(**(dict(recipe=mixup()) | kw))

@pytest.mark.parametrize('at', [nn.Linear(1, 1), [], lambda m: [], [None,nn.Linear(1, 1)], lambda m: 'stem', [3]], ids=named)
def test_a_place_that_is_none_of_the_models_is_refused(at):
    with pytest.raises(ValueError, match=r'\tat[: ]'): learner(MixUpCallback(at=at)).fit(1)

@pytest.mark.parametrize('pair,y', [(within_class,torch.randn(16)), (across_class,torch.randn(16)),
    (by_target_distance(1.),torch.arange(16)%C)], ids=['within_class','across_class','by_target_distance'])
def test_a_policy_that_does_not_fit_the_targets_is_refused(pair, y):
    with pytest.raises(ValueError, match='needs a'): learner(MixUpCallback(pair=pair), y=y, loss=lambda p, y: p.mean()).fit(1)


# ---- how often

class Steps(Callback):
    "Was the batch mixed? At which point of training?"
    order = 1
    def __init__(self, cb): self.cb,self.mixed,self.at = cb,[],[]
    def before_batch(self):
        if not self.training: return
        self.mixed.append(self.cb.mix is not None)
        self.at.append(self.learn.pct_train)
    def after_batch(self): assert not self.training or (self.cb.mix is not None)==self.mixed[-1]

class Skip(Callback):
    "Makes training quick: a batch ends once it is mixed"
    order = 2
    def before_batch(self): raise CancelBatchException

def quick(p, n=600, **kw):
    "A learner of `n` batches an epoch, and what happened in them"
    cb = MixUpCallback(p=p, **kw)
    steps = Steps(cb)
    learn = learner(cb, steps, Skip(), x=torch.randn(2*n, 1, 1, 1), n=2*n, bs=2)
    return learn,steps

@pytest.mark.parametrize('seed', [None,7], ids=['global','own'])
@pytest.mark.parametrize('p', [.1,.5,.9])
def test_the_rate_is_p(p, seed):
    learn,steps = quick(p, seed=seed)
    learn.fit(2)
    assert len(steps.mixed)==1200 and binomtest(sum(steps.mixed), 1200, p).pvalue>1e-4

@pytest.mark.parametrize('p,expected', [(0,0),(1,1)])
def test_never_and_always(p, expected):
    learn,steps = quick(p, n=20)
    learn.fit(1)
    assert sum(steps.mixed)==20*expected

def test_the_rate_follows_its_schedule():
    learn,steps = quick(SchedLin(0., 1.))
    learn.fit(3)
    for third in range(3): assert binomtest(sum(steps.mixed[600*third:600*(third+1)]), 600, (2*third+1)/6).pvalue>1e-4

def test_a_schedule_begins_anew_with_each_fit():
    learn,steps = quick(until(.5), n=10)
    learn.fit(2)
    learn.fit(1)
    assert steps.mixed==[True]*10+[False]*10 + [True]*5+[False]*5

def test_a_resumed_fit_goes_on_where_it_was():
    learn,steps = quick(until(.5), n=10)
    learn.fit(4, start_epoch=1)
    assert steps.mixed==[True]*10+[False]*20

def test_fine_tune_schedules_each_of_its_fits():
    "fine_tune fits twice: the head first, then all"
    learn,steps = quick(until(.5), n=4)
    learn.splitter = lambda m: [[*m.stem.parameters()], [*m.block.parameters()], [*m.head.parameters()]]
    learn.fine_tune(2, freeze_epochs=1)
    assert steps.mixed==[True]*2+[False]*2 + [True]*4+[False]*4

def test_lr_find_mixes_and_leaves_nothing(tmp_path):
    cb = MixUpCallback(p=until(.5))
    steps = Steps(cb)
    learn = learner(cb, steps, n=32, path=tmp_path)
    learn.add_cb(fastai.learner.Recorder())
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=12)
    assert any(steps.mixed) and len(steps.mixed)>=6 and all(0<=t<1 for t in steps.at)
    assert cb.mix is None and type(learn.loss_func) is CrossEntropyLossFlat

def test_a_point_beyond_the_end_is_the_end():
    "A callback may set pct_train to anything"
    class Far(Callback):
        order = -100
        def before_batch(self): self.learn.pct_train = 1.2
    learn,steps = quick(lambda t: t, n=4)
    learn.add_cb(Far())
    learn.fit(1)
    assert all(steps.mixed)

def test_a_schedule_out_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r'p\(0\)=2.0 must be a number from 0 to 1'): learner(MixUpCallback(p=lambda t: 2.)).fit(1)


# ---- randomness

class Draws(Callback):
    order = 1
    def __init__(self, cb, noise=False): self.cb,self.noise,self.seen = cb,noise,[]
    def before_batch(self):
        if self.training: self.seen.append(None if self.cb.mix is None else (self.cb.mix.lam.tolist(), self.cb.mix.partner.tolist()))
        if self.noise: torch.rand(int(torch.randint(9, (1,))))

def draws(noise=False, epochs=2, state=None, state_of=None, recipe=None, **kw):
    cb = MixCallback(recipe or one_of(mixup(1.), cutmix(), per_row=True), **(dict(seed=3, p=.7, at=lambda m: [None,m.stem]) | kw))
    if state is not None: cb.load_state_dict(state)
    d = Draws(cb, noise)
    learn = learner(cb, d, n=40)
    torch.manual_seed(99 if noise else 0)
    learn.fit(epochs)
    if state_of is not None: state_of.update(cb.state_dict())
    return d.seen

def test_a_seed_repeats_whatever_else_draws():
    a = draws()
    assert a==draws(noise=True) and a!=draws(seed=4)
    assert None in a and any(a)

def test_a_seed_leaves_the_global_generator_alone():
    def state(*cbs):
        learn = learner(*cbs, n=24)
        torch.manual_seed(0)
        learn.fit(1)
        return torch.get_rng_state()
    assert (state(MixCallback(one_of(mixup(), fmix(), per_row=True), p=.5, seed=1, pair=across_class))==state()).all()

def test_ranks_draw_their_own(monkeypatch):
    "Under distributed training each process has its rank"
    seen = []
    for rank in range(3):
        monkeypatch.setenv('RANK', str(rank))
        seen.append(draws(at=None))
    assert seen[0]!=seen[1]!=seen[2]!=seen[0]

def test_the_state_continues_the_draws():
    whole,state = draws(epochs=4),{}
    assert draws(epochs=2, state_of=state)==whole[:len(whole)//2]
    assert draws(state=state)==whole[len(whole)//2:]

def test_the_state_travels_through_a_checkpoint(tmp_path):
    state = {}
    draws(state_of=state)
    torch.save(state, tmp_path/'state.pth')
    assert draws(state=torch.load(tmp_path/'state.pth', weights_only=True))==draws(state=state)

def test_saving_the_state_draws_nothing():
    state = {}
    a = draws(state_of=state)
    assert state and a==draws()

def test_without_a_seed_there_is_no_state():
    cb = MixUpCallback()
    learner(cb).fit(1)
    assert cb.state_dict()=={}

def test_no_seed_follows_the_global_generator():
    def once(seed):
        cb = MixUpCallback()
        d = Draws(cb)
        learn = learner(cb, d)
        torch.manual_seed(seed)
        learn.fit(1)
        return d.seen
    assert once(5)==once(5)!=once(6)


# ---- what is public

@pytest.mark.parametrize('name', fastai_mixup_ext.__all__)
def test_at_most_five_parameters(name):
    o = getattr(fastai_mixup_ext, name)
    try: sig = inspect.signature(o)
    except ValueError: return
    assert len(sig.parameters)<=5

def test_the_callbacks_share_their_keywords():
    "Each is MixCallback with one recipe"
    kinds = MixUpCallback,CutMixCallback,FMixCallback,ResizeMixCallback
    keywords = [[p for p in inspect.signature(o).parameters.values() if p.kind is p.KEYWORD_ONLY] for o in (MixCallback,*kinds)]
    assert all([(p.name,p.default) for p in k]==[(p.name,p.default) for p in keywords[0]] for k in keywords)
    assert [type(o().recipe) for o in kinds]==[mixup,cutmix,fmix,resizemix]
    assert [o().recipe for o in kinds]==[mixup(.4),cutmix(1.),fmix(1.),resizemix((.1,.8))]

def test_one_row_passes():
    cb = CutMixCallback()
    watch = Watch(cb)
    learner(cb, watch, n=9).fit(1)
    assert [o is None for o in watch.steps]==[False,True]
    cb = CutMixCallback()
    watch = Watch(cb)
    learner(cb, watch, n=3, bs=1).fit(1)
    assert watch.steps==[None]*3

def test_unmixed_rows_count_in_full():
    "across_class in a batch of one class: nothing is mixed, and the loss is the plain one"
    cb = MixUpCallback(8., pair=across_class)
    seen = []
    class See(Callback):
        order = 50
        def after_loss(self):
            if self.training: seen.append((self.learn.loss.item(), F.cross_entropy(self.learn.pred, self.learn.y).item()))
    learner(cb, See(), y=torch.zeros(16, dtype=torch.int64)).fit(1)
    assert len(seen)==2 and all(abs(a-b)<1e-6 for a,b in seen)
    assert_close(tensor(seen)[:,0], tensor(seen)[:,1])
