"""`mixed_loss` against formulas in float64 loops: losses x reductions x weights x ignored labels x smoothing x ranks; and its laws."""
import pickle
import warnings
from copy import deepcopy
from functools import partial, wraps
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.losses import (BCEWithLogitsLossFlat, BaseLoss, CrossEntropyLossFlat, DiceLoss, FocalLoss, FocalLossFlat, L1LossFlat,
                           LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat, MSELossFlat)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, tensor
from torch.testing import assert_close

from common import covering, named
from fastai_mixup_ext import Mix, mixed_loss
from fastai_mixup_ext.losses import by_row, is_by_row, loss_name

C = 5
weight = tensor([.1,3.,1.,.5,2.]).double()
w32 = weight.float()
reductions = 'mean','sum','none'
lams = tensor([.9,.25,1.,.6,0.,.75])
n = len(lams)
mix = Mix(tensor([1,0,3,3,2,4]), lams)
one,zero,even = (Mix(mix.partner, torch.full((n,), v)) for v in (1.,0.,.7))

# shape of the prediction, axis of its classes, shape of the labels
ranks = {'n': ((n,C), 1, (n,)), 'flat': ((n,C), -1, (n,)), 'series': ((n,C,3), 1, (n,3)), 'map': ((n,C,4,3), 1, (n,4,3)),
         'text': ((n,3,C), -1, (n,3)), 'column': ((n,C), -1, (n,1))}

def draw(rank, ignore=None, dtype=torch.float64):
    shape,_,labels = ranks[rank]
    y = torch.randint(C, labels)
    if ignore is not None: y.view(n, -1)[::2,0] = ignore
    return (3*torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_(), y

def numpy(t): return t.detach().double().as_subclass(torch.Tensor).numpy()

def soft_targets(own, other, lam, w, ignore, eps):
    "For labels (positions,), what -log p of each class counts for in each position's loss, and what the position counts for"
    q,count = np.zeros((len(own), C)),np.zeros(len(own))
    for i in range(len(own)):
        for y,share in ((own[i], lam[i]), (other[i], 1-lam[i])):
            if y==ignore: continue
            count[i] += share*w[y]
            q[i,y] += share*(1-eps)*w[y]
            for c in range(C): q[i,c] += share*eps/C*w[c]
    return q, count

def smoothed_fastai(own, other, lam, w, ignore, eps, reduction):
    "fastai's: every position is smoothed, without weights, and that part is averaged over the positions"
    q,count = soft_targets(own, other, lam, w, ignore, 0)
    return (1-eps)*q/(count.sum() if reduction=='mean' else 1) + eps/C/(len(own) if reduction=='mean' else 1)

def by_hand(z, q):
    "The loss of each position with logits `z` (positions, C) and soft targets `q`, and the gradient of their sum"
    p = np.exp(z-z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return -(q*np.log(p)).sum(1), q.sum(1, keepdims=True)*p - q

class Twice(nn.CrossEntropyLoss):
    "A subclass that changes the computation: to be called, not guessed"
    def forward(self, pred, y): return 2*super().forward(pred, y)

class Quiet(nn.CrossEntropyLoss): "A subclass that changes nothing"

def smoothing(label_smoothing, ignore_index, **kw): return LabelSmoothingCrossEntropyFlat(eps=label_smoothing, **kw)

families = {'nn': nn.CrossEntropyLoss, 'partial': partial(partial, F.cross_entropy), 'Quiet': Quiet, 'nll': nn.NLLLoss,
    'partial-nll': partial(partial, F.nll_loss),
            'Flat': CrossEntropyLossFlat, 'Smoothing': smoothing}
cells = dict(nn='n series map', partial='n map', Quiet='n', nll='n map', **{'partial-nll': 'n'},
    Flat='flat series map text column', Smoothing='flat map text')
cells = [(f, r, eps, ignore, weighted, red) for f,rs in cells.items() for r in rs.split() for eps in (0,.2) for ignore in (None,-100,2)
         for weighted in (False,True) for red in reductions if not ('nll' in f and eps or f=='Smoothing' and ignore is not None)]

@pytest.mark.parametrize('family,rank,eps,ignore,weighted,reduction', covering(cells, 3))
def test_cross_entropy(family, rank, eps, ignore, weighted, reduction):
    fastais,is_nll,axis = family in ('Flat','Smoothing'),'nll' in family,ranks[rank][1]
    dtype,tol = (torch.float32,2e-5) if fastais else (torch.float64,1e-9)  # fastai's losses cast to float32
    kw = dict(weight=weight.to(dtype) if weighted else None, ignore_index=-100 if ignore is None else ignore, reduction=reduction)
    if not is_nll: kw['label_smoothing'] = eps
    if fastais: kw['axis'] = axis
    f = families[family](**kw)
    pred,y = draw(rank, ignore, dtype)
    loss = mixed_loss(f, F.log_softmax(pred, 1) if is_nll else pred, y, mix)
    loss.sum().backward()

    def by_position(t): return t.transpose(axis, -1) if fastais else t.movedim(axis, -1)
    labels = by_position(y) if fastais else y
    w,ignored,lam = numpy(weight) if weighted else np.ones(C),kw['ignore_index'],np.repeat(numpy(lams), y.numel()//n)
    own,other = labels.flatten().tolist(),labels[mix.partner].flatten().tolist()
    if family=='Smoothing': q = smoothed_fastai(own, other, lam, w, ignored, eps, reduction)
    else:
        q,count = soft_targets(own, other, lam, w, ignored, eps)
        q /= count.sum() if reduction=='mean' else 1
    rows,grad = by_hand(numpy(by_position(pred)).reshape(-1, C), q)
    np.testing.assert_allclose(numpy(loss).flatten(), rows if reduction=='none' else [rows.sum()], rtol=tol, atol=tol)
    np.testing.assert_allclose(numpy(by_position(pred.grad)).reshape(-1, C), grad, rtol=tol, atol=tol)
    assert is_by_row(f)

@pytest.mark.parametrize('dtype', [torch.int8,torch.int16,torch.int32,torch.uint8])
@pytest.mark.parametrize('f', [nn.CrossEntropyLoss(), F.cross_entropy, CrossEntropyLossFlat(), LabelSmoothingCrossEntropyFlat()], ids=named)
def test_any_integer_labels(f, dtype):
    pred,y = draw('n')
    assert_close(mixed_loss(f, pred, y.to(dtype), mix), mixed_loss(f, pred, y, mix), rtol=0, atol=0)

def test_uint8_labels_have_their_ignore_index():
    pred,y = draw('map', ignore=255)
    assert_close(mixed_loss(nn.CrossEntropyLoss(ignore_index=255), pred, y.to(torch.uint8), mix),
        mixed_loss(nn.CrossEntropyLoss(ignore_index=255), pred, y, mix))

@pytest.mark.parametrize('weighted', [False,True], ids=['','weighted'])
@pytest.mark.parametrize('dtype,tol', [(torch.float16,2e-3), (torch.bfloat16,2e-2), (torch.float32,1e-6)])
@pytest.mark.parametrize('cls', [nn.CrossEntropyLoss, CrossEntropyLossFlat, FocalLossFlat])
def test_predictions_in_any_precision(cls, dtype, tol, weighted):
    pred,y = draw('n', dtype=dtype)
    wide = torch.float32 if cls is FocalLossFlat else torch.float64
    f,exact = (cls(weight=weight.to(dtype).to(d) if weighted else None) for d in (dtype,wide))
    try: f(pred, y)
    except RuntimeError as e: pytest.skip(f'no plain loss either: {e}')  # half precision on the CPU, torch before 2.4
    exact = mixed_loss(exact, pred.to(wide), y, mix)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loss = mixed_loss(f, pred, y, mix)
    assert loss.dtype==dtype
    assert_close(loss, exact, rtol=tol, atol=tol, check_dtype=False)
    loss.backward()
    assert pred.grad.isfinite().all()

def test_log_softmax_only_once(monkeypatch):
    calls = []
    plain = F.log_softmax
    monkeypatch.setattr(F, 'log_softmax', lambda *a, **k: calls.append(1) or plain(*a, **k))
    mixed_loss(nn.CrossEntropyLoss(), *draw('n'), mix)
    assert len(calls)==1


# ---- other losses: each row's from a loop over rows

def focal(z, y, w):
    ce = by_hand(z[None], np.eye(C)[y][None]*w[y])[0][0]
    return (1-np.exp(-ce))**2 * ce

def hinge(z, y, w):
    return sum(w[y]*max(0, 1-z[y]+z[c]) for c in range(C) if c!=y)/C

@pytest.mark.parametrize('reduction', reductions)
@pytest.mark.parametrize('weighted', [False,True], ids=['','weighted'])
@pytest.mark.parametrize('cls,row', [(FocalLoss,focal), (FocalLossFlat,focal), (nn.MultiMarginLoss,hinge)])
def test_losses_that_are_not_linear_in_the_target(cls, row, weighted, reduction):
    "Also with class weights these average over the rows"
    pred,y = draw('n')
    w = numpy(weight) if weighted else np.ones(C)
    dtype,tol = (torch.float32,1e-5) if cls is FocalLossFlat else (torch.float64,1e-9)
    f = cls(weight=weight.to(dtype) if weighted else None, reduction=reduction)
    rows = [l*row(z, y[i], w)+(1-l)*row(z, y[j], w) for i,(z,l,j) in enumerate(zip(numpy(pred), numpy(lams), mix.partner))]
    expected = dict(mean=np.mean, sum=np.sum, none=np.array)[reduction](rows)
    np.testing.assert_allclose(numpy(mixed_loss(f, pred.to(dtype), y, mix)), expected, rtol=tol)

class WeightedFocal(nn.Module):
    "A loss of the user's own: weighted, yet it averages over the rows"
    def __init__(self, weight=None, reduction='mean'):
        super().__init__()
        self.weight,self.reduction = weight,reduction
    def forward(self, pred, y):
        rows = F.cross_entropy(pred, y, weight=self.weight, reduction='none').square()
        return dict(mean=torch.mean, sum=torch.sum, none=lambda o: o)[self.reduction](rows)

@pytest.mark.parametrize('reduction', reductions)
@pytest.mark.parametrize('weighted', [False,True], ids=['','weighted'])
def test_a_loss_of_ones_own(weighted, reduction):
    pred,y = draw('n')
    f = by_row(WeightedFocal(weight if weighted else None, reduction))
    rows = lambda y: F.cross_entropy(pred, y, weight=f.weight, reduction='none')**2
    rows = torch.lerp(rows(y[mix.partner]), rows(y), lams.double())
    assert_close(mixed_loss(f, pred, y, mix), dict(mean=rows.mean(), sum=rows.sum(), none=rows)[reduction])

@pytest.mark.parametrize('before', ['sum','none'])
def test_reduction_changed_between_fits(before):
    pred,y = draw('n')
    f = by_row(WeightedFocal(weight, before))
    mixed_loss(f, pred, y, mix)
    f.reduction = 'mean'
    assert_close(mixed_loss(f, pred, y, mix), mixed_loss(by_row(WeightedFocal(weight)), pred, y, mix))

@pytest.mark.parametrize('reduction', ['sum','mean'])
def test_dice(reduction):
    "Dice adds up over classes and rows of the batch together: one lam"
    pred,y = draw('map')
    f = DiceLoss(reduction=reduction)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loss = mixed_loss(f, pred, y, even)
    assert_close(loss, .7*f(pred, y)+.3*f(pred, y[mix.partner]))

numbers = {'mse': (nn.MSELoss, lambda z,t: (z-t)**2), 'mse-flat': (MSELossFlat, lambda z,t: (z-t)**2),
    'l1': (nn.L1Loss, lambda z,t: abs(z-t)), 'l1-flat': (L1LossFlat, lambda z,t: abs(z-t)),
    'bce': (nn.BCEWithLogitsLoss, lambda z,t: np.log1p(np.exp(z))-t*z), 'bce-flat': (BCEWithLogitsLossFlat,
        lambda z,t: np.log1p(np.exp(z))-t*z),
    'bce-partial': (partial(partial, F.binary_cross_entropy_with_logits),
        lambda z,t: np.log1p(np.exp(z))-t*z), 'mse-partial': (partial(partial, F.mse_loss), lambda z,t: (z-t)**2),
    'huber': (nn.HuberLoss, lambda z,t: np.where(abs(z-t)<1, (z-t)**2/2, abs(z-t)-.5)), 'poisson': (nn.PoissonNLLLoss,
        lambda z,t: np.exp(z)-t*z)}

@pytest.mark.parametrize('name,dtype,reduction', covering(product(numbers,
    [torch.float64,torch.float32,torch.int64,torch.int8,torch.uint8,torch.bool], reductions)))
def test_losses_that_take_numbers_see_blended_ones(name, dtype, reduction):
    cls,row = numbers[name]
    pred = torch.randn(n, C, dtype=torch.float64, requires_grad=True)
    y = torch.randint(2, (n,C)).to(dtype)
    t = np.array([[l*a+(1-l)*b for a,b in zip(y[i].tolist(), y[j].tolist())] for i,(l,j) in enumerate(zip(numpy(lams), mix.partner))])
    rows = row(numpy(pred), t)
    loss = mixed_loss(cls(reduction=reduction), pred, y, mix)
    np.testing.assert_allclose(numpy(loss).flatten(), rows.flatten() if reduction=='none' else [getattr(rows, reduction)()], rtol=1e-6)

@pytest.mark.parametrize('cls', [nn.BCEWithLogitsLoss,BCEWithLogitsLossFlat])
def test_integer_multi_label_with_pos_weight(cls):
    pred,y = torch.randn(n, C),torch.randint(2, (n,C))
    w = tensor([1.,2.,.5,3.,1.])
    def value(z, c, y): return w[c]*F.softplus(-z) if y else F.softplus(z)
    rows = [[l*value(z, c, y[i,c]) + (1-l)*value(z, c, y[j,c]) for c,z in enumerate(pred[i])]
            for i,(l,j) in enumerate(zip(lams, mix.partner))]
    assert_close(mixed_loss(cls(pos_weight=w), pred, y, mix), tensor(rows).mean(), check_dtype=False)

def test_soft_targets_are_blended():
    pred,y = draw('n')
    soft = F.one_hot(y, C).double()
    assert_close(mixed_loss(nn.CrossEntropyLoss(), pred, soft, mix), mixed_loss(nn.CrossEntropyLoss(), pred, y, mix))

@given(st.integers(2, 9), st.integers(2, 6), st.randoms())
def test_a_pair_of_losses_is_soft_targets_for_cross_entropy(n, c, rnd):
    pred,y,lam = torch.randn(n, c),torch.randint(c, (n,)),torch.rand(n)
    partner = tensor(rnd.choices(range(n), k=n))
    soft = lam[:,None]*F.one_hot(y, c) + (1-lam[:,None])*F.one_hot(y[partner], c)
    assert_close(mixed_loss(F.cross_entropy, pred, y, Mix(partner, lam)), F.cross_entropy(pred, soft), rtol=1e-5, atol=1e-6)


# ---- losses that are called whole

class Ignores(nn.Module):
    reduction = 'mean'
    def forward(self, pred, y): return F.cross_entropy(pred, y)

class Refuses(nn.Module):
    reduction = 'mean'
    def forward(self, pred, y):
        if self.reduction=='none': raise NotImplementedError
        return F.cross_entropy(pred, y)

class Joins(nn.Module):
    def __init__(self):
        super().__init__()
        self.ce = nn.CrossEntropyLoss()
    def forward(self, pred, y): return self.ce(pred, y)

class Called:
    __hash__ = None  # can't be remembered
    def __call__(self, pred, y): return F.cross_entropy(pred, y)

def function(pred, y): return F.cross_entropy(pred, y)

whole = {'function': function, 'lambda': lambda pred, y: F.cross_entropy(pred, y), 'ignores': Ignores(), 'refuses': Refuses(),
    'joins': Joins(), 'bound method': Joins().forward, 'BaseLoss': BaseLoss(Ignores), 'partial': partial(function),
    'TorchScript': torch.jit.script(nn.CrossEntropyLoss())}

@pytest.mark.parametrize('f', whole.values(), ids=whole)
def test_the_papers_formula(f):
    pred,y = draw('n')
    loss = mixed_loss(f, pred, y, even)
    assert_close(loss, .7*F.cross_entropy(pred, y)+.3*F.cross_entropy(pred, y[mix.partner]), check_dtype=False)
    assert not is_by_row(f)

def test_a_known_loss_may_have_further_targets():
    "`F.cross_entropy` takes class weights as the second: here one for each of five rows, mixed as a target is"
    pred,y,w,partner = torch.randn(5, 5).double(),tensor([0,3,1,1,4]),torch.rand(5).double(),tensor([1,2,0,4,3])
    loss = mixed_loss(F.cross_entropy, pred, (y, w), Mix(partner, torch.full((5,), .7)))
    assert_close(loss, .7*F.cross_entropy(pred, y, w)+.3*F.cross_entropy(pred, y[partner], w[partner]))

def test_a_loss_that_can_not_be_hashed_is_right_too():
    pred,y = draw('n')
    assert_close(mixed_loss(Called(), pred, y, even), .7*F.cross_entropy(pred, y)+.3*F.cross_entropy(pred, y[mix.partner]))


# ---- laws

@pytest.mark.parametrize('f', [nn.CrossEntropyLoss(reduction='none'), nn.MultiMarginLoss(reduction='none')], ids=named)
def test_a_loss_that_comes_from_a_file_is_the_same(f):
    "Its reduction is another object than the string in the code"
    pred,y = draw('n')
    assert_close(mixed_loss(pickle.loads(pickle.dumps(f)), pred, y, mix), mixed_loss(f, pred, y, mix), rtol=0, atol=0)

class Counts(nn.Module):
    "It counts its calls, in an attribute, in a tensor, in a buffer and in a part"
    def __init__(self):
        super().__init__()
        self.reduction,self.calls,self.seen,self.part = 'mean',0,torch.ones(()),nn.BatchNorm1d(1)
        self.register_buffer('grown', torch.ones(()))
    def forward(self, pred, y):
        self.calls += 1
        self.seen *= 2
        self.grown = self.grown+1
        self.part(torch.randn(2, 1))
        values = F.cross_entropy(pred, y, reduction='none')*self.calls*self.seen.clone()*self.grown
        return values.mean() if self.reduction=='mean' else values

def test_a_marked_loss_moves_its_state_once_a_step():
    pred,y = draw('n')
    ours,plain = by_row(Counts()),Counts()
    for _ in range(3): assert_close(mixed_loss(ours, pred, y, one), plain(pred, y))
    mixed_loss(ours, pred, y, mix)
    assert (ours.calls, ours.seen, ours.grown, ours.part.num_batches_tracked, ours.reduction)==(4, 16, 5, 4, 'mean')

class Forwards(nn.Module):
    "Its reduction is that of its part"
    def __init__(self):
        super().__init__()
        self.part,self.seen = nn.MultiMarginLoss(),[]
    reduction = property(lambda self: self.part.reduction, lambda self, value: setattr(self.part, 'reduction', value))
    def forward(self, pred, y): return self.part(pred, y)

def test_a_marked_loss_whose_part_has_the_reduction():
    (pred,y),f = draw('n'),by_row(Forwards())
    assert_close(mixed_loss(f, pred, y, mix), mixed_loss(nn.MultiMarginLoss(), pred, y, mix))
    assert f.part.reduction=='mean'

def test_while_its_values_are_taken_the_loss_itself_keeps_its_reduction():
    seen = []
    class Peeks(nn.CrossEntropyLoss):
        def forward(self, pred, y):
            seen.append((self.reduction, f.reduction))
            return super().forward(pred, y)
    f = by_row(Peeks())
    mixed_loss(f, *draw('n'), mix)
    assert seen==[('none', 'mean')]*2

def test_a_mark_counts_for_the_computation_that_was_marked():
    class Own(nn.Module):
        reduction = 'mean'
        def forward(self, pred, y): return F.cross_entropy(pred, y, reduction=self.reduction)
    class Quiet(by_row(Own)): pass
    class Other(Own):
        def forward(self, pred, y): return super().forward(pred, y)/2
    assert is_by_row(Own()) and is_by_row(Quiet()) and is_by_row(by_row(Other())) and not is_by_row(Other())

def test_a_marked_loss_in_a_partial():
    pred,y = draw('n')
    f = partial(by_row(nn.MultiMarginLoss()))  # takes no keyword `reduction`, so it is called whole
    assert_close(mixed_loss(f, pred, y, even), .7*f(pred, y)+.3*f(pred, y[even.partner]))
    assert not is_by_row(f) and not is_by_row(partial(F.multi_margin_loss, size_average=False))

@pytest.mark.parametrize('shape', [lambda v: v.T, lambda v: v.repeat(2, 1).flatten()], ids=['turned', 'doubled'])
def test_values_that_do_not_belong_to_the_rows_are_refused(shape):
    class Strange(nn.Module):
        reduction = 'mean'
        def forward(self, pred, y):
            values = F.mse_loss(pred, F.one_hot(y, pred.shape[1]).to(pred), reduction='none')
            return values.mean() if self.reduction=='mean' else shape(values)
    pred = torch.randn(n, n//2)
    with pytest.raises(ValueError, match='one value per row or position'):
        mixed_loss(by_row(Strange()), pred, torch.arange(n)%(n//2), mix)

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('f', [nn.CrossEntropyLoss, partial(nn.CrossEntropyLoss, label_smoothing=.1), nn.NLLLoss,
    LabelSmoothingCrossEntropy], ids=named)
def test_the_gradient_where_no_label_counts(f, reduction):
    "None through the labels, as in torch, even beside infinite values; smoothing of fastai's counts them nevertheless"
    f,(pred,y) = f(reduction=reduction),draw('n')
    y.fill_(-100)
    for p in (pred, pred.detach().index_fill(0, tensor([0]), -torch.inf).requires_grad_()):
        want,got = (torch.autograd.grad(loss(p, y).sum(), p)[0] for loss in (f, lambda p, y: mixed_loss(f, p, y, mix)))
        assert_close(got, want, equal_nan=True)

@pytest.mark.parametrize('f', [nn.CrossEntropyLoss(reduction='middle'), nn.CrossEntropyLoss(weight=torch.ones(9)),
    nn.NLLLoss(weight=torch.ones(0)), nn.CrossEntropyLoss(label_smoothing=1.5), nn.MultiMarginLoss(reduction='middle')], ids=named)
def test_settings_that_torch_refuses_are_refused_by_torch(f):
    pred,y = draw('n')
    with pytest.raises((ValueError, RuntimeError)) as want: f(pred, y)
    with pytest.raises(want.type) as got: mixed_loss(f, pred, y, mix)
    assert str(got.value)==str(want.value)

@pytest.mark.parametrize('f', [nn.CrossEntropyLoss(), CrossEntropyLossFlat(), nn.NLLLoss(), nn.CrossEntropyLoss(label_smoothing=.1)],
    ids=named)
def test_autocast_computes_in_float32_as_torch_does(f):
    pred,y = draw('n')
    pred = pred.detach().bfloat16()
    with torch.autocast('cpu', torch.bfloat16): want,got = f(pred, y),mixed_loss(f, pred, y, one)
    assert got.dtype==want.dtype
    assert_close(got, want)
    assert mixed_loss(nn.CrossEntropyLoss(), pred, y, one).dtype==torch.bfloat16

@pytest.mark.parametrize('f', [nn.HingeEmbeddingLoss(), nn.SoftMarginLoss(), F.soft_margin_loss, partial(F.hinge_embedding_loss, margin=2.),
    BaseLoss(nn.HingeEmbeddingLoss, floatify=True)], ids=named)
def test_signs_are_not_blended(f):
    "There is nothing between 1 and -1 for them"
    pred,sign = torch.randn(n).double(),tensor([1,-1]*(n//2))
    assert_close(mixed_loss(f, pred, sign, even), .7*f(pred, sign)+.3*f(pred, sign[even.partner]))
    with pytest.raises(TypeError, match='knows the targets 1 and -1.*give them as integers'): mixed_loss(f, pred, sign.double(), even)

def test_the_sign_is_the_last_target():
    a,b,sign = torch.randn(n, 3),torch.randn(n, 3),tensor([1,-1]*(n//2))
    f = nn.CosineEmbeddingLoss()
    assert_close(mixed_loss(f, a, (b, sign), even), .7*f(a, b, sign)+.3*f(a, b[even.partner], sign[even.partner]))
    with pytest.raises(TypeError, match='give them as integers'): mixed_loss(f, a, (b, sign.float()), even)

@pytest.mark.parametrize('wrap', [lambda t: t, lambda t: {'a': [t]}], ids=['tensor', 'structure'])
def test_a_loss_that_changes_its_prediction_in_place_is_refused(wrap):
    def halves(pred, y): return F.cross_entropy((pred['a'][0] if isinstance(pred, dict) else pred).div_(2), y)
    pred,y = draw('n')
    with pytest.raises(TypeError, match='halves changes its prediction in place'): mixed_loss(halves, wrap(pred.detach()), y, mix)

def test_a_loss_may_take_parts_out_of_its_prediction():
    def pops(pred, y): return F.cross_entropy(pred['out'], y) + pred.pop('more').mean()
    pred,y = draw('n')
    got = mixed_loss(pops, {'out': pred, 'more': pred}, y, even)
    assert_close(got, .7*pops({'out': pred, 'more': pred}, y) + .3*pops({'out': pred, 'more': pred}, y[even.partner]))

def test_random_numbers_are_drawn_for_the_own_target_first():
    pred,y = draw('n')
    def noisy(pred, y): return F.cross_entropy(pred, y)*torch.rand(())
    torch.manual_seed(0); want = noisy(pred, y)
    torch.manual_seed(0); assert_close(mixed_loss(noisy, pred, y, one), want)

def test_a_count_is_mixed_as_a_number():
    pred,y = draw('n')
    def errors(pred, y): return (pred.argmax(-1)!=y).sum()
    want = .7*errors(pred, y)+.3*errors(pred, y[even.partner])
    assert_close(mixed_loss(errors, pred, y, even), want, check_dtype=False, rtol=1e-6, atol=0)

class Passes:
    "Passes all on, also what a copy asks for"
    def __init__(self, inner): self.inner = inner
    def __getattr__(self, k): return getattr(self.inner, k)
    def __call__(self, pred, y): return 2*self.inner(pred, y)

@pytest.mark.parametrize('make', [lambda: torch.jit.trace(lambda p, t: F.cross_entropy(p, t), draw('n')), lambda: Passes(nn.L1Loss())],
    ids=['traced', 'passes'])
def test_what_can_not_be_copied_is_called_itself(make):
    (pred,y),f = draw('n'),make()
    if isinstance(f, Passes): pred,y = (pred,),torch.randint(9, (n,C)); f.inner = lambda p, t: F.l1_loss(p[0], t)
    assert_close(mixed_loss(f, pred, y, even), .7*f(pred, y)+.3*f(pred, y[even.partner]))

@pytest.mark.parametrize('name', ['forward', 'forward_pre', 'full_backward', 'full_backward_pre'])
def test_a_loss_with_a_hook_is_called_whole(name):
    f = nn.CrossEntropyLoss()
    assert is_by_row(f)
    getattr(f, f'register_{name}_hook')(lambda *args: None)
    assert not is_by_row(f)

@pytest.mark.parametrize('f,name', [(MSELossFlat(), 'MSELoss'), (partial(F.cross_entropy), 'cross_entropy'), (nn.L1Loss(), 'L1Loss')],
    ids=named)
def test_a_message_names_the_loss_that_is_wrapped(f, name): assert loss_name(f)==name

@pytest.mark.parametrize('f', [F.nll_loss, nn.NLLLoss()], ids=named)
def test_log_probabilities_are_taken_as_they_come(f):
    "Also where they do not add up to one"
    pred,y = draw('n')
    assert_close(mixed_loss(f, pred, y, even), .7*f(pred, y)+.3*f(pred, y[mix.partner]))

def test_one_row_has_any_number_of_values():
    pred,y = torch.randn(1, 3),tensor([[1,-1,1]])
    assert_close(mixed_loss(nn.SoftMarginLoss(), pred, y, Mix(tensor([0]), tensor([.7]))), F.soft_margin_loss(pred, y))

def test_a_share_for_each_position_of_a_series_of_signs():
    pred,y,mask = torch.randn(n, 7).double(),2*torch.randint(2, (n,7))-1,torch.rand(n, 1, 7).double()
    loss = mixed_loss(nn.SoftMarginLoss(), pred, y, Mix(mix.partner, mask.mean((1,2)), mask))
    share,other = mask[:,0],y[mix.partner]
    assert_close(loss, (share*(-y*pred).exp().log1p() + (1-share)*(-other*pred).exp().log1p()).mean())

def test_a_mask_that_does_not_lie_over_a_target_names_it():
    cut = Mix(mix.partner, lams, torch.rand(n, 1, 4, 3)<.5)
    with pytest.raises(ValueError, match=r"target 1: a tensor of shape \(6, 5, 3\) .*use mixup, which needs no positions"):
        mixed_loss(nn.CrossEntropyLoss(), torch.randn(n, C), (tensor([0]*n), torch.randint(2, (n,5,3))), cut)

@pytest.mark.parametrize('f', [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=weight),
    nn.CrossEntropyLoss(weight=weight, label_smoothing=.1), nn.CrossEntropyLoss(ignore_index=2, reduction='sum'),
    CrossEntropyLossFlat(weight=w32), LabelSmoothingCrossEntropyFlat(weight=w32), LabelSmoothingCrossEntropy(reduction='none'),
    FocalLossFlat(weight=w32), Twice(weight=weight),
    nn.MultiMarginLoss(weight=weight), WeightedFocal(weight), *whole.values(), F.cross_entropy, partial(F.cross_entropy,
        weight=weight)], ids=named)
def test_lam_one_is_the_plain_loss_and_lam_zero_the_partners(f):
    flat = isinstance(f, BaseLoss)
    pred,y = draw('n', dtype=torch.float32 if flat else torch.float64)
    for m,t in ((one,y), (zero,y[mix.partner])):
        assert_close(mixed_loss(f, pred, y, m), f(pred, t), rtol=1e-6 if flat else 1e-12, atol=0,
        check_dtype=False)

def minus_log(pred, y, reduction='mean'):
    rows = -pred.gather(1, y[:,None])[:,0].log()
    return rows if reduction=='none' else rows.mean()

@pytest.mark.parametrize('f', [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=weight), FocalLoss(), Twice(), minus_log, function],
    ids=named)
@pytest.mark.parametrize('m', [one,zero], ids=['lam=1','lam=0'])
def test_what_counts_nothing_may_be_infinite(f, m):
    "A class ruled out by a prediction of -inf, or of probability 0, is the label of those that have no share only"
    y = tensor([0,1,2,3,4,1])
    counted = y if m is one else y[m.partner]
    allowed = F.one_hot(counted, C).bool()
    allowed[:,0] |= ~(F.one_hot(y, C)|F.one_hot(y[m.partner], C)).bool()[:,0]
    pred = torch.randn(n, C).double()
    pred = pred.exp()*allowed if f is minus_log else pred.masked_fill(~allowed, -torch.inf)
    grads = []
    for loss in (lambda p: mixed_loss(f, p, y, m), lambda p: f(p, counted)):
        p = pred.clone().requires_grad_()
        value = loss(p)
        value.backward()
        grads.append((value.detach(), p.grad))
    assert_close(*grads)

def test_an_infinite_loss_that_counts_is_infinite():
    pred = torch.zeros(n, C).index_fill(1, tensor([0]), -torch.inf)
    y = tensor([0,0,1,1,0,0])
    for f in (nn.CrossEntropyLoss(), Twice()): assert mixed_loss(f, pred, y, Mix(mix.partner, torch.full((n,), .6)))==torch.inf

@pytest.mark.parametrize('eps', [0,.1])
def test_rows_that_are_all_ignored(eps):
    "Even where nothing is finite there"
    pred,y = draw('series')
    bad = pred.detach().clone()
    bad[0] = -torch.inf
    y[0],y[1] = -100,-100
    m = Mix(tensor([1,0,3,2,5,4]), lams)
    f = nn.CrossEntropyLoss(label_smoothing=eps)
    assert_close(mixed_loss(f, bad, y, one), f(bad, y))
    assert_close(mixed_loss(f, bad, y, m), mixed_loss(f, pred, y, m))

@pytest.mark.parametrize('reduction,value', [('mean',torch.nan), ('sum',0.)])
def test_nothing_but_ignored_labels(reduction, value):
    pred,y = draw('n')
    f = nn.CrossEntropyLoss(reduction=reduction)
    loss = mixed_loss(f, pred, y.fill_(-100), mix)
    assert_close(loss, f(pred, y), equal_nan=True)
    assert_close(loss.item(), value, equal_nan=True)

@pytest.mark.parametrize('f', [nn.CrossEntropyLoss(weight=weight), CrossEntropyLossFlat(label_smoothing=.1), FocalLoss(),
    Twice(weight=weight)], ids=named)
def test_gradients_of_gradients(f):
    pred,y = draw('n')
    assert torch.autograd.gradcheck(lambda p: mixed_loss(f, p, y, mix), pred)
    assert torch.autograd.gradgradcheck(lambda p: mixed_loss(f, p, y, mix), pred)

@given(st.permutations(range(n)))
def test_the_order_of_the_rows_does_not_matter(order):
    pred,y = torch.randn(n, C),torch.randint(C, (n,))
    order = tensor(order)
    moved = Mix(order.argsort()[mix.partner[order]], lams[order])
    for f in (nn.CrossEntropyLoss(weight=w32), FocalLossFlat(reduction='none')):
        a,b = mixed_loss(f, pred, y, mix),mixed_loss(f, pred[order], y[order], moved)
        assert_close(a if a.dim()==0 else a[order], b)


# ---- several targets, and targets under a mask

class Joint(nn.Module):
    "Class and value in one loss"
    reduction = 'mean'
    def forward(self, pred, label, value):
        rows = F.cross_entropy(pred[:,1:], label, reduction='none') + (pred[:,0]-value).square()
        return rows if self.reduction=='none' else rows.mean()

def test_an_integer_and_a_floating_target():
    pred,y = draw('n')
    y,v = y.clamp(max=C-2),torch.randn(n, dtype=torch.float64)
    def row(i, j): return F.cross_entropy(pred[i,1:], y[j]) + (pred[i,0]-v[j])**2
    rows = [l*row(i, i)+(1-l)*row(i, j) for i,(l,j) in enumerate(zip(lams.double(), mix.partner))]
    assert_close(mixed_loss(by_row(Joint()), pred, (y,v), mix), sum(rows)/n)
    assert_close(mixed_loss(by_row(Joint()), pred, [y,v], mix), sum(rows)/n)

def test_two_predictions_two_labels():
    "The prediction may be anything that the loss understands"
    (a,y),(b,z) = draw('n'),draw('n')
    f = by_row(lambda pred, y, z, reduction='mean': F.cross_entropy(pred['a'], y, reduction=reduction)+F.cross_entropy(pred['b'], z,
        reduction=reduction))
    assert_close(mixed_loss(f, dict(a=a, b=b), (y,z), mix), mixed_loss(F.cross_entropy, a, y, mix)+mixed_loss(F.cross_entropy, b, z, mix))

def test_no_target_is_the_plain_loss():
    assert_close(mixed_loss(lambda pred: pred.mean(), torch.arange(6.), (), mix), tensor(2.5))

mask = torch.rand(n, 1, 4, 3)<.5
cut = Mix(mix.partner, mask.float().mean((1,2,3)), mask)

@pytest.mark.parametrize('shape', [(n,4,3), (n,1,4,3)])
def test_labels_per_position_are_pasted(shape):
    pred,y = draw('map')
    pasted = torch.stack([torch.where(mask[i,0], y[i], y[j]) for i,j in enumerate(mix.partner)])
    f = CrossEntropyLossFlat(axis=1, weight=w32)
    assert_close(mixed_loss(f, pred, y.view(shape), cut), f(pred, pasted), check_dtype=False)

@pytest.mark.parametrize('cls,kw', [(nn.CrossEntropyLoss,dict(weight=weight, ignore_index=2)),
    (nn.CrossEntropyLoss,dict(reduction='none')),
    (CrossEntropyLossFlat,dict(weight=w32)), (CrossEntropyLossFlat,dict(reduction='none')), (FocalLossFlat,dict(weight=w32))])
@pytest.mark.parametrize('by_position', [mask.float(), torch.rand(n, 1, 4, 3)], ids=['cut','any'])
def test_a_share_per_position(cls, kw, by_position):
    "A floating mask, as one_of draws it (some rows cut, others interpolated), is a batch in which each position is a row"
    cut_row = tensor([1,0,1,0,0,1]).bool().view(-1, 1, 1, 1)
    own = torch.where(cut_row, by_position, lams.view(-1, 1, 1, 1))
    pred,y = draw('map')
    flat = issubclass(cls, BaseLoss)
    if flat: pred = pred.float()
    loss = mixed_loss(cls(**kw, axis=1) if flat else cls(**kw), pred, y, Mix(mix.partner, own.mean((1,2,3)), own))
    if flat and loss.dim(): loss = loss.view(n, 3, 4).transpose(1, 2)  # fastai's are flattened class axis last
    partner = 12*mix.partner[:,None] + torch.arange(12)
    assert_close(loss.flatten(), mixed_loss(cls(**kw), pred.movedim(1, -1).reshape(-1, C), y.flatten(),
        Mix(partner.flatten(), own.flatten())).flatten(), check_dtype=False)

def test_a_label_per_row_under_a_mask_has_the_rows_share():
    pred,y = draw('n')
    assert_close(mixed_loss(F.cross_entropy, pred, y, cut), mixed_loss(F.cross_entropy, pred, y, Mix(cut.partner, cut.lam)))


# ---- nothing is left behind

@pytest.mark.parametrize('f', [nn.CrossEntropyLoss(), CrossEntropyLossFlat(), FocalLossFlat(), Twice(), WeightedFocal(),
    *[o for o in whole.values() if hasattr(o, 'reduction')]], ids=named)
def test_the_loss_object_stays_as_it_was(f):
    pred,y = draw('n')
    before = dict(vars(f))
    mixed_loss(f, pred, y, mix)
    assert vars(f)==before and f.reduction=='mean'

@pytest.mark.parametrize('f', [nn.CrossEntropyLoss(weight=weight), FocalLoss(), nn.MultiMarginLoss(), Twice()], ids=named)
def test_a_compiled_loss_is_the_loss(f):
    "What is set on the wrapper, or on a copy of it, is set on the loss"
    pred,y = draw('n')
    compiled = torch.compile(f, backend='eager')
    m = mix if is_by_row(f) else even
    assert_close(mixed_loss(compiled, pred, y, m), mixed_loss(f, pred, y, m))
    assert is_by_row(compiled) is is_by_row(f)
    assert compiled.reduction==f.reduction=='mean'

def test_reduction_is_given_back_when_the_loss_raises():
    class Falls(Twice):
        calls = 0
        def forward(self, pred, y):
            Falls.calls += 1
            if self.reduction=='none' and Falls.calls>2: raise RuntimeError('out of memory')
            return super().forward(pred, y)
    f,(pred,y) = by_row(Falls()),draw('n')
    mixed_loss(f, pred, y, mix)
    with pytest.raises(RuntimeError, match='out of memory'): mixed_loss(f, pred, y, mix)
    assert f.reduction=='mean'

def test_a_loss_that_fails_says_so_itself():
    "The first call is the plain one: its own error comes out"
    def broken(pred, y, reduction='mean'): raise KeyError('mine')
    with pytest.raises(KeyError, match='mine'): mixed_loss(broken, *draw('n'), mix)

def test_a_loss_is_not_kept_alive():
    import gc
    import weakref
    f = Twice()
    mixed_loss(f, *draw('n'), mix)
    ref = weakref.ref(f)
    del f
    gc.collect()
    assert ref() is None

def test_the_loss_object_still_pickles():
    f = CrossEntropyLossFlat(weight=weight)
    mixed_loss(f, *draw('n'), mix)
    assert_close(pickle.loads(pickle.dumps(f)).func.weight, weight)

def test_targets_and_predictions_are_not_written_to():
    pred,y = draw('map')
    v = torch.randn(n, 4, 3)
    before = [t.clone() for t in (pred,y,v)]
    for f,t in ((nn.CrossEntropyLoss(), y), (Twice(), y), (nn.MSELoss(), v)):
        for m in (mix,cut): mixed_loss(f, pred if t is y else v+1, t, m)
    for t,b in zip((pred,y,v), before): assert_close(t, b, rtol=0, atol=0)

# ---- what a loss holds twice, or watches

class Child(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.parent = [parent]  # a list, so that it is no part

class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = Child(self),Child(self)
    def forward(self, pred, y): return F.cross_entropy(pred, y)

class HeldTwice(nn.Module):
    "One part under two names"
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False, momentum=.9)
        self.steps,self.also = [self.norm],(self.norm.running_var,)
    def forward(self, pred, y):
        self.steps[0](pred)
        self.also[0].add_(1)
        return F.cross_entropy((pred-self.norm.running_mean)/self.norm.running_var, y)

class Features(nn.Module):
    "A hook on a part writes down what the loss reads"
    def __init__(self, detach=False, closure=False):
        super().__init__()
        torch.manual_seed(0)
        self.net,self.seen,self.detach = nn.Linear(3, 3),{},detach
        self.net.register_forward_hook((lambda m, x, out: self.save(m, x, out)) if closure else self.save)
    def save(self, m, x, out): self.seen['out'] = out.detach() if self.detach else out
    def forward(self, pred, y):
        self.net(pred)
        return F.cross_entropy(self.seen['out'], y)

class Named(nn.Module):
    "Attributes with PyTorch's names, and another meaning"
    def __init__(self, smoothing):
        super().__init__()
        self.label_smoothing = smoothing
    def forward(self, pred, y): return F.cross_entropy(pred, y)

holding = {'parents': Parent, 'twice': HeldTwice, 'features': Features, 'detached': partial(Features, True),
    'closure': partial(Features, closure=True), 'None': partial(Named, None), 'vector': partial(Named, torch.ones(3))}

@pytest.mark.parametrize('make', holding.values(), ids=holding)
def test_a_loss_with_parts_of_its_own_is_the_pair_of_two_calls(make):
    pred,y,mix = torch.randn(4, 3),torch.tensor([0,1,2,1]),Mix(torch.tensor([1,2,3,0]), torch.full((4,), .7))
    f = make()
    for _ in range(2):  # the second call begins where the first ended
        own,other = (deepcopy(f), deepcopy(f)) if make is HeldTwice else (make(), make())  # the others have no state
        expected = .7*own(pred, y) + .3*other(pred, y[mix.partner])
        assert_close(mixed_loss(f, pred, y, mix).detach(), expected.detach())

def test_wraps_takes_no_mark_along():
    @by_row
    def marked(pred, y, reduction='mean'): return F.cross_entropy(pred, y, reduction=reduction)
    @wraps(marked)
    def squared(pred, y): return marked(pred, y)**2
    pred,y,mix = torch.randn(4, 3),torch.tensor([0,1,2,1]),Mix(torch.tensor([1,2,3,0]), torch.ones(4))
    assert is_by_row(marked) and is_by_row(torch.compile(marked, backend='eager')) and not is_by_row(squared)
    assert_close(mixed_loss(squared, pred, y, mix), squared(pred, y))

class Counting(nn.Module):
    def __init__(self, reduction='mean', axis=-1):
        super().__init__()
        self.reduction,self.calls = reduction,0
    def forward(self, pred, y):
        self.calls += 1
        return F.cross_entropy(pred, y, reduction=self.reduction)

def test_the_state_of_a_marked_part_moves_once_a_step():
    f,pred,y = by_row(BaseLoss(Counting)),torch.randn(4, 3),torch.tensor([0,1,2,1])
    for _ in range(3): mixed_loss(f, pred, y, Mix(torch.tensor([1,2,3,0]), torch.rand(4)))
    assert f.func.calls==3 and f.reduction=='mean'

def test_a_mark_counts_only_for_the_reductions_that_are_known():
    @by_row
    def mean(pred, y, reduction=None):
        values = F.cross_entropy(pred, y, reduction='none')
        return values if reduction=='none' else values.mean()
    pred,y = torch.randn(4, 3),torch.tensor([0,1,2,1])
    assert not is_by_row(mean) and mixed_loss(mean, pred, y, Mix(torch.tensor([1,2,3,0]), torch.rand(4))).dim()==0

@pytest.mark.parametrize('f', [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=torch.ones(3))], ids=['plain', 'weighted'])
def test_labels_out_of_range_and_no_rows(f):
    pred,y,mix = torch.randn(4, 3),torch.tensor([0,1,2,3]),Mix(torch.tensor([1,2,3,0]), torch.rand(4))
    with pytest.raises(ValueError, match='labels must lie between 0 and 2'): mixed_loss(f, pred, y, mix)
    assert mixed_loss(f, pred[:0], y[:0], Mix(mix.partner[:0], mix.lam[:0])).isnan()

class Fixed(nn.Module):
    @property
    def reduction(self): return 'mean'
    def forward(self, pred, y): return F.cross_entropy(pred, y)

def test_a_reduction_that_is_fixed_is_refused():
    with pytest.raises(TypeError, match="by_row: the reduction of Fixed can't be set to 'none'"):
        mixed_loss(by_row(Fixed()), torch.randn(4, 3), torch.tensor([0,1,2,1]), Mix(torch.tensor([1,2,3,0]), torch.rand(4)))
