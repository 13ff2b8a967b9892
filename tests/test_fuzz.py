"""Whatever a batch is made of: a right result or one of our errors, never another exception, and the batch is as it was."""
import dis, random, warnings
from collections import Counter, namedtuple
from pathlib import Path
import numpy as np
import pytest, torch
import fastai_mixup_ext
from fastai.basics import DataLoaders, Learner, TrainEvalCallback
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.vision.core import TensorImage, TensorMask
from torch import Tensor, nn
from torch.nn import functional as F
from fastai_mixup_ext import (Mix, MixCallback, across_class, blend, by_target_distance, cutmix, deranged, fmix, mixed_loss, mixup, one_of,
    per_batch, resizemix, shuffled, within_class)
from fastai_mixup_ext.embeddings import MixedIds, mix_input

RECIPES = [mixup(.4), mixup(0), mixup(1e-4), cutmix(1.), cutmix(0), fmix(1.), resizemix((.1, .8)), resizemix((1, 1)), per_batch(mixup(.4)),
    per_batch(cutmix(1.)), one_of(mixup(.4), cutmix(1.)), one_of(cutmix(1.), fmix(1.), per_row=True),
    one_of(mixup(.4), cutmix(1.), resizemix(), per_row=True)]
PAIRS = [shuffled, deranged, within_class, across_class, by_target_distance(1.)]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
DTYPES = FLOATS + INTS + [torch.complex64]
Pair = namedtuple('Pair', 'first second')

# Batches, drawn by `r`, a random.Random

DENSE = ['plain']*6 + ['image', 'transposed', 'channels_last', 'expanded', 'grad']
FORMS = [*DENSE, 'sparse']

def a_tensor(r, n, dtypes=DTYPES, min_dim=0, forms=FORMS):
    "A tensor, mostly of `n` rows, of any dtype, rank and size, with NaN and infinities, dense or not"
    dtype,g = r.choice(dtypes),torch.Generator().manual_seed(r.randrange(99))
    shape = (r.choice([n]*18 + [n+1, 0]), *(r.choice([0, 1, 2, 3, 3, 4, 5]) for _ in range(r.randint(min_dim, 4))))
    if not min_dim and r.random()<.03: shape = ()
    x = (torch.randint(4, shape, generator=g) if dtype in INTS else torch.randn(shape, generator=g)*3).to(dtype)
    if dtype in FLOATS and x.numel() and r.random()<.3: x.view(-1)[r.randrange(x.numel())] = r.choice([torch.nan, torch.inf, -torch.inf])
    form = r.choice(forms)
    if form=='image': x = x.as_subclass(TensorMask if dtype in INTS else TensorImage)
    if form=='transposed' and x.dim()>1: x = x.transpose(1, -1).contiguous().transpose(1, -1)
    if form=='channels_last' and x.dim()==4: x = x.contiguous(memory_format=torch.channels_last)
    if form=='expanded' and x.dim()>1: x = x[:,:1].expand_as(x) if x.shape[1] else x
    if form=='sparse' and x.dim(): x = x.to_sparse()
    return x.requires_grad_() if form=='grad' and dtype in FLOATS else x

def a_batch(r, n, depth=2):
    "A tensor, or tensors in tuples, lists, dicts and named tuples; now and then something else"
    kind = r.choice(['tensor']*3 + ['list', 'tuple', 'dict', 'named']) if depth else 'tensor'
    parts = [a_batch(r, n, depth-1) for _ in range(2 if kind=='named' else r.randint(0, 3))] if kind!='tensor' else []
    if kind=='tensor': return a_tensor(r, n) if r.random()<.96 else r.choice([None, 'text', 3, np.zeros((n,2)), object()])
    return dict(zip('abc', parts)) if kind=='dict' else Pair(*parts) if kind=='named' else tuple(parts) if kind=='tuple' else parts

def leaves(o):
    if isinstance(o, dict): o = list(o.values())
    return [l for a in o for l in leaves(a)] if isinstance(o, (tuple, list)) else [o]

# What must hold

OURS = str(Path(fastai_mixup_ext.__file__).parent)
cases = Counter()

@pytest.fixture(scope='module', autouse=True)
def report(pytestconfig):
    yield
    pytestconfig.get_terminal_writer().line(f"\nfuzzed: {dict(cases)}")

def is_ours(e):
    "Raised by a `raise` of this package, with a message"
    tb = e.__traceback__
    while tb.tb_next: tb = tb.tb_next
    code = tb.tb_frame.f_code
    raised = dis.opname[code.co_code[tb.tb_lasti]]=='RAISE_VARARGS'
    return type(e) in (ValueError, TypeError) and code.co_filename.startswith(OURS) and raised and len(str(e))>20

def attempt(kind, f, *args, **kwargs):
    "The result, or None after one of our errors; any other exception is a failure"
    cases[kind] += 1
    try: return f(*args, **kwargs)
    except Exception as e:
        if not is_ours(e): raise
        cases[f'{kind}, refused'] += 1

def bits(*ts):
    "Shape, dtype and every bit of all tensors"
    ts = [t.to_dense() if t.layout!=torch.strided else t for t in ts if isinstance(t, Tensor)]
    return [(t.shape, t.dtype, t.detach().as_subclass(Tensor).contiguous().reshape(-1).view(torch.uint8).tolist()) for t in ts]

def share(mix, x):
    "The share of each own value of `x`, by the definition of `Mix`"
    if mix.mask is not None:
        sp = mix.mask.shape[2:]
        if x.shape[2:]==sp: return mix.mask.expand(x.shape)
        if x.shape[1:]==sp and (len(sp)>1 or not (x.is_floating_point() or x.is_complex())): return mix.mask[:,0].expand(x.shape)
    return mix.lam.view(-1, *[1]*(x.dim()-1)).expand(x.shape)

def check_mixed(x, got, mix):
    "`got` is `x` mixed: each value by its share; what is not finite reaches only those that were mixed with it"
    if not isinstance(x, Tensor): return
    if isinstance(got, MixedIds):
        mixed = share(mix, x)!=1  # where a row keeps all, it may be its own partner
        assert torch.equal(got.own, x) and torch.equal(got.other[mixed], x[mix.partner][mixed])
        assert bits(got.lam)==bits(share(mix, x))
        return
    assert got.shape==x.shape and got.dtype==x.dtype and type(got) is type(x)
    own,res,s = (t.detach().as_subclass(Tensor) for t in (x, got, share(mix, x)))
    other = own[mix.partner]
    if s.dtype==torch.bool:
        assert bits(res[s])==bits(own[s])
        if mix.box is None: assert bits(res[~s])==bits(other[~s])
    elif x.dtype==torch.bool:
        assert torch.equal(res[s!=1], (own|other)[s!=1]) and (res|own==res).all()
    else:
        if mix.box is not None and s.shape[2:]==mix.mask.shape[2:]:
            if not own.isfinite().all(): return
            own,other,res,s = (t[s==1] for t in (own, other, res, s))  # the rest was shrunk
        wide = torch.complex128 if x.is_complex() else torch.float64
        s,fine = s.to(wide),own.isfinite() & other.isfinite()
        want = s*own.to(wide) + (1-s)*other.to(wide)
        tol = {torch.float16:1e-2, torch.bfloat16:5e-2, torch.uint8:.5001}.get(x.dtype, 1e-5)
        torch.testing.assert_close(res.to(wide)[fine], want[fine], atol=tol, rtol=0 if x.dtype==torch.uint8 else tol)

def every(n, f):
    "`n` cases, each with a source of chance of its own; a failure names it"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for seed in range(n):
            torch.manual_seed(seed)
            try: f(random.Random(seed))
            except Exception as e: raise AssertionError(f"{f.__name__}(random.Random({seed}))") from e

# The cases

def test_recipes_and_blend(): every(3000, recipe_and_blend)

def recipe_and_blend(r):
    "Any recipe and pairing for any tensor, then `blend` of it and of another"
    n = r.choice([2, 3, 4, 1, 0])
    x,y,other = a_tensor(r, n, min_dim=r.choice([0, 2, 2])),a_tensor(r, n),a_tensor(r, n)
    before = bits(x, y, other)
    mix = attempt('recipe', r.choice(RECIPES), x, (y,), pair=r.choice(PAIRS))
    if mix is not None:
        assert isinstance(mix, Mix) and len(mix)==len(x) and (0<=mix.partner).all() and (mix.partner<len(x)).all()
        assert ((0<=mix.lam)&(mix.lam<=1)).all()
        if mix.mask is not None and mix.mask.dtype==torch.bool: assert mix.mask.shape[2:]==x.shape[2:]
        if mix.mask is not None and mix.mask.dtype==torch.bool and len(mix.mask):
            torch.testing.assert_close(mix.mask.flatten(1).float().mean(1).expand(len(mix)), mix.lam)
        for t in x, other:
            got = attempt('blend', blend, t, mix)
            if got is not None: check_mixed(t, got, mix)
    assert bits(x, y, other)==before

def test_mix_input(): every(2000, a_mixed_batch)

def a_mixed_batch(r):
    "Any structure, mixed as a whole: the same structure"
    n = r.choice([3, 4])
    batch,x = a_batch(r, n),torch.randn(n, 2, *r.choice([(3,), (3, 4), (2, 3, 4)]))
    before = bits(*leaves(batch))
    mix = r.choice(RECIPES)(x)
    got = attempt('mix_input', mix_input, batch, mix)
    if got is not None or batch is None:
        assert len(leaves(got))==len(leaves(batch)) and type(got) in (type(batch), MixedIds)
        for a,b in zip(leaves(batch), leaves(got)): check_mixed(a, b, mix)
    assert bits(*leaves(batch))==before

LOSSES = [CrossEntropyLossFlat(), CrossEntropyLossFlat(axis=1), CrossEntropyLossFlat(reduction='sum'), LabelSmoothingCrossEntropyFlat(),
    nn.CrossEntropyLoss(reduction='none'), nn.NLLLoss(), FocalLossFlat(), nn.MultiMarginLoss(), BCEWithLogitsLossFlat(), MSELossFlat(),
    nn.L1Loss(), nn.SmoothL1Loss(reduction='sum'), F.cross_entropy, F.mse_loss, lambda p, y: F.cross_entropy(p, y)]

def a_target(r, pred, n):
    "Labels of rows, of positions with the classes on axis 1 or last, numbers like the prediction, or anything"
    kind,shape = r.randrange(5),pred.shape
    if kind==0: return torch.arange(len(pred)) % max(shape[1], 1)
    if kind==1: return torch.randint(max(shape[1], 1), (shape[0], *shape[2:]))
    if kind==2: return torch.randint(max(shape[-1], 1), shape[:-1])
    return pred.detach().sigmoid() if kind==3 else a_tensor(r, n, [d for d in DTYPES if d!=torch.bool], forms=DENSE)

def test_mixed_loss(): every(3000, a_loss)

def a_loss(r):
    "Where the loss works plainly it works mixed: the same shape, and with lam=1 the same value"
    n,loss_func = r.choice([2, 3, 4]),r.choice(LOSSES)
    pred = a_tensor(r, n, FLOATS, min_dim=1, forms=DENSE)
    y = a_target(r, pred, n)
    mix = Mix(torch.randperm(n), r.choice([torch.ones(n), torch.rand(n)]))
    before = bits(pred, y)
    try: plain = loss_func(pred, y)
    except Exception as e: plain = e
    bad = type(plain) if isinstance(plain, Exception) else ()  # what fails plainly may fail likewise
    try: got = attempt('mixed_loss', mixed_loss, loss_func, pred, (y,), mix)
    except bad: got = None
    if got is not None and not bad:
        assert got.shape==plain.shape
        if (mix.lam==1).all() and plain.isfinite().all():
            half = torch.float16 in (pred.dtype, y.dtype) or torch.bfloat16 in (pred.dtype, y.dtype)
            plain,tol = (loss_func(pred.float(), y), 2e-2) if half else (plain, 1e-4)  # torch's own mean of halves is rounded at every step
            torch.testing.assert_close(got.double().as_subclass(Tensor), plain.double().as_subclass(Tensor), rtol=tol, atol=tol)
    assert bits(pred, y)==before

class Anything(nn.Module):
    "Makes a prediction out of any structure of tensors"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
    def forward(self, *xb):
        xs = [(t.real if t.is_complex() else t).float() for t in leaves(xb) if isinstance(t, Tensor)]
        return self.w + sum(t.reshape(len(t), -1).sum(1, keepdim=True) for t in xs)

def train(b, n_inp, cbs):
    dls = DataLoaders([b, b], [])
    dls.n_inp = n_inp
    soft = isinstance(b[-1], Tensor) and b[-1].is_floating_point()
    loss = MSELossFlat() if soft else CrossEntropyLossFlat()
    learn = Learner(dls, Anything(), loss, default_cbs=False, cbs=[TrainEvalCallback(), *cbs])
    try: learn.fit(1)
    finally: assert learn.loss_func is loss and loss.reduction=='mean'

def test_callback(): every(1500, a_fit)

def a_fit(r):
    "What trains plainly trains mixed, or is refused by us"
    n = r.choice([2, 3, 4, 1])
    xs = [a_batch(r, n, 1) for _ in range(r.randint(1, 2))]
    labels = torch.arange(n)%3
    y = r.choice([labels]*3 + [labels[:,None].to(torch.int8), torch.rand(n, 3), torch.arange(n+1)%3, torch.tensor(1), 'y', None])
    b = (*xs, y)
    before = bits(*leaves(b))
    bad = ()
    try: train(b, len(xs), [])
    except Exception as e: bad = type(e)
    try: attempt('fit that fails plainly' if bad else 'fit', train, b, len(xs), [MixCallback(r.choice(RECIPES), pair=r.choice(PAIRS))])
    except bad: pass
    assert bits(*leaves(b))==before
