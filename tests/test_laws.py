"""Two laws over sequences of batches, in `mixed_loss` and in a fit: lam=1 is the plain loss, lam=v is v*L(y) + (1-v)*L(y')."""
from collections import deque
from copy import copy, deepcopy
from functools import partial

import fastai.losses
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.losses import (BCELossFlat, BCEWithLogitsLossFlat, BaseLoss, CrossEntropyLossFlat, DiceLoss, FocalLoss, FocalLossFlat,
    L1LossFlat, LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat, MSELossFlat)
from fastai.basics import Callback, Learner, TrainEvalCallback, noop
from fastai.data.core import DataLoaders
from torch import nn, tensor
from torch.testing import assert_close

from fastai_mixup_ext import Mix, MixCallback, Recipe, cutmix, mixed_loss, mixup, one_of
from fastai_mixup_ext.losses import is_by_row

C = 6

# Batches: (prediction, targets), four of each kind; the first is the tamest, so that a rule learned from it is wrong later

def batches(make, rows=(6,6,4,6)):
    g = torch.Generator().manual_seed(1)
    return [make(n, i, g) for i,n in enumerate(rows)]

def logits(n, g, *size): return torch.randn(n, C, *size, generator=g)

def labels(n, i, g): return logits(n, g)*(1+i), torch.randint(C, (n,), generator=g)

def series(n, i, g): return logits(n, g, 3), torch.randint(C, (n,3), generator=g)

def void(n, i, g, *size):
    "A class per position, from the second batch on with positions that are void: 255"
    size = size or (4,3)
    y = torch.randint(C, (n,*size), generator=g)
    return logits(n, g, *size), y if i==0 else y.masked_fill(torch.rand(y.shape, generator=g)<.3, 255)

def maps(n, i, g): return logits(n, g, 4, 3), torch.randint(C, (n,4,3), generator=g)

def volumes(n, i, g): return logits(n, g, 2, 3, 4), torch.randint(C, (n,2,3,4), generator=g)

def signs(n, i, g): return torch.randn(n, C, generator=g), 2*torch.randint(2, (n,C), generator=g)-1

def several(n, i, g): return logits(n, g), torch.stack([torch.cat([torch.randperm(C, generator=g)[:3], tensor([-1]*3)]) for _ in range(n)])

def numbers(n, i, g): return torch.randn(n, C, generator=g), torch.randn(n, C, generator=g)

def shares(n, i, g): return torch.randn(n, C, generator=g).sigmoid(), torch.rand(n, C, generator=g)

def log_shares(n, i, g): return logits(n, g).log_softmax(1), logits(n, g).softmax(1)

def with_variance(n, i, g): return (*numbers(n, i, g), torch.rand(n, C, generator=g)+.5)

def two_and_sign(n, i, g): return (*numbers(n, i, g), 2*torch.randint(2, (n,), generator=g)-1)

def column_and_sign(n, i, g): return tuple(t[:,0] if t.dim()>1 else t for t in two_and_sign(n, i, g))

def three(n, i, g): return (*numbers(n, i, g), torch.randn(n, C, generator=g))

def sequence(n, i, g):
    "Time first; targets of several lengths"
    return (torch.randn(9, n, C, generator=g).log_softmax(-1), torch.randint(1, C, (n,4), generator=g), torch.full((n,), 9),
        torch.randint(1, 5, (n,), generator=g))

# Losses of the user's own

def void_cross_entropy(pred, y):
    "By hand, over the positions that are not void"
    keep = y!=255
    return F.cross_entropy(pred.movedim(1, -1)[keep], y[keep])

class FadedIn(nn.Module):
    "A penalty that counts nothing in the first step, and more in each"
    def __init__(self):
        super().__init__()
        self.step = 0
    def forward(self, pred, y):
        self.step += 1
        return F.cross_entropy(pred, y) + (self.step-1)*pred.square().mean()

class Running(nn.Module):
    "Divides by a running mean in a buffer"
    def __init__(self):
        super().__init__()
        self.register_buffer('scale', torch.ones(()))
    def forward(self, pred, y):
        loss = F.cross_entropy(pred, y)
        self.scale.lerp_(loss.detach(), .3)
        return loss/self.scale

class Within(nn.Module):
    "A loss whose part has the state"
    def __init__(self, cls):
        super().__init__()
        self.part = cls()
    def forward(self, pred, y): return self.part(pred, y)

class History:
    "Not a module; remembers what it has seen in a list"
    def __init__(self): self.seen = []
    def __call__(self, pred, y):
        self.seen.append(pred.detach().abs().mean())
        return F.cross_entropy(pred, y)/(1+sum(self.seen))

class Keeps(History):
    "Changes in place what it keeps: a tensor, an array, queues and lists of them, and a method of its own"
    def __init__(self):
        self.mean,self.array,self.queue,self.nested = torch.ones(()),np.ones(1),deque([0.]),{'a': [torch.ones(())]}
        self.impl = self.loss
    def loss(self, pred, y):
        self.mean.mul_(1.1)
        self.array *= 1.2
        self.queue.append(len(self.queue))
        self.nested['a'][0].mul_(1.3)
        return F.cross_entropy(pred, y)*self.mean.clone()*self.array.item()*len(self.queue)*self.nested['a'][0].clone()
    def __call__(self, pred, y): return self.impl(pred, y)

class ByMethod(History):
    "Its loss is a method"
    def loss(self, pred, y): return self(pred, y)

class BatchDice(nn.Module):
    "Over the whole batch: unreduced, one value for each class"
    def __init__(self, reduction='mean'):
        super().__init__()
        self.reduction = reduction
    def forward(self, pred, y):
        p,t = pred.softmax(1),F.one_hot(y.clamp(max=C-1), C).movedim(-1, 1).float()
        axes = [0, *range(2, p.dim())]
        loss = 1 - 2*(p*t).sum(axes)/(p+t).sum(axes)
        return loss if self.reduction=='none' else loss.mean()

class Attributed(nn.Module):
    "A stranger with torch's attributes, which mean something else here"
    def __init__(self, reduction='mean', **attributes):
        super().__init__()
        self.reduction = reduction
        for k,v in attributes.items(): setattr(self, k, v)
    def forward(self, pred, y):
        loss = F.cross_entropy(pred, y, reduction='none')
        return loss if self.reduction=='none' else loss.mean()

class OtherScale(Attributed):
    "Unreduced values in another unit than the mean"
    def forward(self, pred, y): return super().forward(pred, y)*(100 if self.reduction=='none' else 1)

class Derived(nn.CrossEntropyLoss):
    "Its `reduction` is worked out, and can't be set"
    @property
    def reduction(self): return 'mean'
    @reduction.setter
    def reduction(self, value): pass

class Fixed(nn.CrossEntropyLoss):
    "Its `reduction` can't be set at all"
    def __init__(self): nn.Module.__init__(self); self.weight,self.ignore_index,self.label_smoothing = None,-100,0.
    reduction = property(lambda self: 'mean')

hand_written = {
    'void': (lambda: void_cross_entropy, void), 'faded in': (FadedIn, labels), 'faded in, inside': (partial(Within, FadedIn), labels),
    'buffer': (Running, labels), 'buffer, inside': (partial(Within, Running), labels),
    'buffer in a BaseLoss': (partial(BaseLoss, Running), labels),
    'list': (History, labels), 'list, method': (lambda: ByMethod().loss, labels),
    'list, partial': (lambda: partial(History()), labels), 'what it keeps': (Keeps, labels),
    'dice, rows divide classes': (BatchDice, maps), 'dice, labels': (BatchDice, labels),
    'ignore_index None': (partial(Attributed, ignore_index=None), labels),
    'ignore_index list': (partial(Attributed, ignore_index=[0,1]), labels),
    'weight number': (partial(Attributed, weight=2.), labels), 'weight (1,)': (partial(Attributed, weight=tensor([2.])), labels),
    'weight per class': (partial(Attributed, weight=torch.arange(1., C+1)), labels), 'other scale': (OtherScale, labels),
    'derived reduction': (Derived, labels), 'fixed reduction': (Fixed, labels)}

weight = torch.arange(1., C+1)
torchs = {
    'CrossEntropyLoss': [(nn.CrossEntropyLoss, labels), (partial(nn.CrossEntropyLoss, weight=weight, label_smoothing=.1), maps),
        (partial(nn.CrossEntropyLoss, ignore_index=255), void), (partial(nn.CrossEntropyLoss, reduction='sum'), series)],
    'NLLLoss': [(nn.NLLLoss, lambda *a: (labels(*a)[0].log_softmax(1), labels(*a)[1])), (partial(nn.NLLLoss, weight=weight), maps)],
    'MultiMarginLoss': [(nn.MultiMarginLoss, labels), (partial(nn.MultiMarginLoss, weight=weight, p=2), labels)],
    'MultiLabelMarginLoss': [(nn.MultiLabelMarginLoss, several)], 'SoftMarginLoss': [(nn.SoftMarginLoss, signs)],
    'HingeEmbeddingLoss': [(nn.HingeEmbeddingLoss, signs)], 'CosineEmbeddingLoss': [(nn.CosineEmbeddingLoss, two_and_sign)],
    'MarginRankingLoss': [(nn.MarginRankingLoss, column_and_sign)], 'CTCLoss': [(nn.CTCLoss, sequence)],
    'TripletMarginLoss': [(nn.TripletMarginLoss, three)], 'TripletMarginWithDistanceLoss': [(nn.TripletMarginWithDistanceLoss, three)],
    'GaussianNLLLoss': [(nn.GaussianNLLLoss, with_variance)], 'KLDivLoss': [(partial(nn.KLDivLoss, reduction='batchmean'), log_shares)],
    'BCELoss': [(nn.BCELoss, shares)], 'BCEWithLogitsLoss': [(partial(nn.BCEWithLogitsLoss, pos_weight=weight), shares)],
    'MultiLabelSoftMarginLoss': [(nn.MultiLabelSoftMarginLoss, shares)],
    **{k: [(getattr(nn, k), numbers)] for k in ('L1Loss','MSELoss','SmoothL1Loss','HuberLoss','PoissonNLLLoss')}}

fastais = {
    'CrossEntropyLossFlat': [(CrossEntropyLossFlat, labels), (partial(CrossEntropyLossFlat, axis=1, weight=weight), maps),
        (partial(CrossEntropyLossFlat, axis=1), volumes), (partial(CrossEntropyLossFlat, axis=1, ignore_index=255), void)],
    'LabelSmoothingCrossEntropy': [(LabelSmoothingCrossEntropy, labels)],
    'LabelSmoothingCrossEntropyFlat': [(LabelSmoothingCrossEntropyFlat, labels),
        (partial(LabelSmoothingCrossEntropyFlat, axis=1), volumes)],
    'FocalLoss': [(FocalLoss, labels), (FocalLoss, maps)],
    'FocalLossFlat': [(partial(FocalLossFlat, axis=1), maps), (partial(FocalLossFlat, axis=1, weight=weight), volumes)],
    'DiceLoss': [(DiceLoss, maps), (DiceLoss, volumes)], 'BCEWithLogitsLossFlat': [(BCEWithLogitsLossFlat, shares)],
    'BCELossFlat': [(BCELossFlat, shares)], 'MSELossFlat': [(MSELossFlat, numbers)], 'L1LossFlat': [(L1LossFlat, numbers)],
    'BaseLoss': [(partial(BaseLoss, nn.CrossEntropyLoss), labels)]}

cases = {f'{k}-{i}': o for table in (torchs, fastais) for k,v in table.items() for i,o in enumerate(v)} | hand_written
whole = {k:v for k,v in cases.items() if not is_by_row(v[0]())}

def test_every_loss_is_here():
    "All that torch.nn has but the two that are layers, and all of fastai's"
    assert set(torchs)=={o for o in dir(nn) if o.endswith('Loss')} - {'AdaptiveLogSoftmaxWithLoss', 'LinearCrossEntropyLoss'}
    assert set(fastais)=={k for k,v in vars(fastai.losses).items() if getattr(v, '__module__', '')=='fastai.losses' and 'Loss' in k
        or 'LabelSmoothing' in k}
    assert set(hand_written)<=set(whole)

def valued(loss_of, pred):
    "The loss, and its gradient for the prediction"
    pred = pred.clone().requires_grad_()
    loss = loss_of(pred)
    return loss.detach(), torch.autograd.grad(loss, pred)[0]

def mix_of(n, lam, i=0):
    return Mix(torch.randperm(n, generator=torch.Generator().manual_seed(i)), torch.full((n,), lam))

def blended(f, pred, yb, partner, lam):
    "v*L(y) + (1-v)*L(y'), where floating targets are blended if all are floating; each L by a loss with the same past"
    g = deepcopy(f)
    other = tuple(y[partner] for y in yb)
    if all(y.is_floating_point() for y in yb): return f(pred, *(lam*y+(1-lam)*o for y,o in zip(yb, other)))
    return lam*f(pred, *yb) + (1-lam)*g(pred, *other)

def state_of(f):
    f = getattr(f, '__self__', getattr(f, 'func', f))
    attributes = {k:v for m in (f.modules() if isinstance(f, nn.Module) else [f]) for k,v in vars(m).items()
        if k[0]!='_' and not callable(v)}
    return attributes | (f.state_dict() if isinstance(f, nn.Module) else {})

@pytest.mark.parametrize('name', cases)
@pytest.mark.parametrize('after', [1., .3], ids=['after lam=1', 'after lam=.3'])
def test_lam_one_is_the_plain_loss(name, after):
    "To the last decimals of the dtype, whatever was mixed before"
    make,draw = cases[name]
    ours,plain = make(),make()
    for i,(pred,*yb) in enumerate(batches(draw)):
        n = len(yb[0])
        assert_close(valued(lambda p: mixed_loss(ours, p, yb, mix_of(n, 1., i)), pred), valued(lambda p: plain(p, *yb), pred),
            rtol=1e-6, atol=1e-7)
        if name in whole and not all(y.is_floating_point() for y in yb):
            assert torch.equal(mixed_loss(deepcopy(ours), pred, yb, mix_of(n, 1., i)), deepcopy(ours)(pred, *yb))
        if after<1:
            mixed_loss(ours, pred, yb, mix_of(n, after, i))
            plain(pred, *yb)

@pytest.mark.parametrize('name', [k for k in cases if k in whole or 'weight' not in str(cases[k][0]) and 'ignore' not in str(cases[k][0])])
@pytest.mark.parametrize('lam', [.3, .8])
def test_one_lam_for_all_is_the_papers_formula(name, lam):
    make,draw = cases[name]
    ours,plain = make(),make()
    for i,(pred,*yb) in enumerate(batches(draw)):
        mix = mix_of(len(yb[0]), lam, i)
        got = valued(lambda p: mixed_loss(ours, p, yb, mix), pred)
        want = valued(lambda p: blended(plain, p, yb, mix.partner, mix.lam[0]), pred)
        assert_close(got, want, rtol=2e-5, atol=2e-6)

@pytest.mark.parametrize('name', ['faded in', 'faded in, inside', 'buffer', 'buffer, inside', 'list', 'list, method', 'list, partial',
    'what it keeps'])
def test_a_state_moves_once_a_step(name):
    "A loss that is called for two targets is afterwards as if it had been called for the first"
    make,draw = cases[name]
    ours,plain = make(),make()
    for i,(pred,y) in enumerate(batches(draw)):
        mixed_loss(ours, pred, y, mix_of(len(y), .3, i))
        plain(pred, y)
        assert_close(state_of(ours), state_of(plain))

def test_a_loss_that_returns_a_tuple_is_refused():
    def parts(pred, y): return F.cross_entropy(pred, y), pred.mean()
    pred,y = labels(6, 0, torch.Generator())
    with pytest.raises(TypeError, match="parts returned a tuple.*one tensor"): mixed_loss(parts, pred, y, mix_of(6, .3))

# In a fit

class Every(Recipe):
    "The same share for every row"
    def __init__(self, lam): self.lam = lam
    def draw(self, batch): return Mix(batch.partner, torch.full((len(batch),), self.lam))

class Free(nn.Module):
    "Predicts its parameter, moved by the input: as many rows as the batch has"
    def __init__(self, batch_axis=0):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
    def forward(self, x): return x+self.bias

class Steps(Callback):
    "Notes prediction, targets, mix and loss, and the gradient at the prediction, of each step"
    order,run_valid = 50,False
    def __init__(self): self.seen = []
    def after_loss(self):
        grad, = torch.autograd.grad(self.loss_grad, self.pred, retain_graph=True)
        cb = self.learn.cbs.filter(lambda o: isinstance(o, MixCallback))[0]
        self.seen.append((self.pred.detach(), self.yb, cb.mix, self.loss, grad))

def fit(loss, data, recipe, **kw):
    "The steps of a fit over those batches in turn, whose predictions are the inputs"
    dls = DataLoaders(data, data)
    learn = Learner(dls, Free(), loss, lr=0., default_cbs=False, cbs=[TrainEvalCallback(), MixCallback(recipe, **kw), steps := Steps()])
    learn.dls.device,learn.logger = torch.device('cpu'),noop
    learn.n_inp = 1
    learn.fit(2)
    return steps.seen

class Batches(list):
    n_inp,device = 1,torch.device('cpu')
    dataset = ()
    def one_batch(self): return self[0]
    def to(self, device): return self

@pytest.mark.filterwarnings('ignore:.*is not known by row')
@pytest.mark.parametrize('name', [k for k in cases if k in whole or 'weight' not in str(cases[k][0]) and 'ignore' not in str(cases[k][0])])
@pytest.mark.parametrize('lam', [1., .3])
def test_in_a_fit(name, lam):
    "The laws hold for what the learner records and steps with, in every batch of two epochs, which validation divides"
    make,draw = cases[name]
    data = Batches((pred.transpose(0, 1), *yb) if draw is sequence else (pred, *yb) for pred,*yb in batches(draw))
    timed = (lambda f: lambda pred, *yb: f(pred.transpose(0, 1), *yb)) if draw is sequence else (lambda f: f)
    ours,plain = make(),make()
    seen = fit(timed(ours), data, Every(lam))
    assert len(seen)==2*len(data)
    for i,(pred,yb,mix,loss,grad) in enumerate(seen):
        own = data[i%len(data)][1:]
        if all(y.is_floating_point() for y in own): want = valued(lambda p: timed(plain)(p, *yb), pred)
        else: want = valued(lambda p: blended_timed(plain, timed, p, own, mix, lam), pred)
        assert_close((loss.detach(), grad), want, rtol=2e-5, atol=2e-6)
        if i==len(data)-1:
            with torch.no_grad():
                for pred,*yb in data: timed(plain)(pred, *yb)

def blended_timed(f, timed, pred, yb, mix, lam):
    if lam==1: return timed(f)(pred, *yb)
    g = deepcopy(f)
    return lam*timed(f)(pred, *yb) + (1-lam)*timed(g)(pred, *(y[mix.partner] for y in yb))

# Segmentation under the switch

def focal_by_hand(pred, y):
    ce = F.cross_entropy(pred, y, reduction='none')
    return ((1-(-ce).exp())**2*ce).mean()

def unreduced(f):
    f = copy(f)
    f.reduction = 'none'
    return f

def share_of(mix, y):
    "The share of own labels at each position"
    if mix.mask is None: return mix.lam.view(-1, 1, 1).expand(y.shape)
    return mix.mask[:,0].float().expand(y.shape)

@pytest.mark.filterwarnings('ignore:.*is not known by row')
@pytest.mark.parametrize('per_row', [False, True], ids=['per batch', 'per_row'])
@pytest.mark.parametrize('f', [DiceLoss(), BatchDice(), FocalLossFlat(axis=1), focal_by_hand, CrossEntropyLossFlat(axis=1),
    void_cross_entropy], ids=['fastai dice','batch dice','focal','focal by hand','cross-entropy','void'])
def test_segmentation_under_the_switch(f, per_row):
    "Labels that are pasted, and labels with shares, in any order"
    data = Batches(batches(maps, rows=(6,)*8))
    seen,kinds = fit(f, data, one_of(mixup(.4), cutmix(1.), per_row=per_row), seed=3),set()
    for (_,y),(pred,_,mix,loss,grad) in zip([*data, *data], seen):
        other,share = y[mix.partner],share_of(mix, y)
        kinds.add(None if mix.mask is None else mix.mask.dtype)
        def rows(p, t): return F.cross_entropy(p, t, reduction='none')
        def focal(p, t): return (1-(-rows(p, t)).exp())**2*rows(p, t)
        def want(p):
            if mix.mask is not None and mix.mask.dtype==torch.bool: return f(p, torch.where(mix.mask[:,0], y, other))
            if isinstance(f, FocalLossFlat): return (share*focal(p, y)+(1-share)*focal(p, other)).mean()
            if isinstance(f, CrossEntropyLossFlat): return (share*rows(p, y)+(1-share)*rows(p, other)).mean()
            if isinstance(f, DiceLoss):
                v = share.flatten(1).mean(1)[:,None]
                own,others = torch.where(share==0, other, y),torch.where(share==1, y, other)  # pasted in the rows that are cut
                return sum(getattr(s*unreduced(f)(p, t), f.reduction)() for s,t in ((v, own), (1-v, others)))
            v = share.mean()
            return v*f(p, y)+(1-v)*f(p, other)
        assert_close((loss.detach(), grad), valued(want, pred), rtol=2e-5, atol=2e-6)
    by_position = per_row and is_by_row(f)
    assert kinds==({torch.float32} if by_position else {None, torch.bool})
