"""Beside other libraries and callbacks, and after abnormal ends: nothing is left, nothing mixed in silence, errors say what to do."""
import ast
import gc
import subprocess
import sys
import weakref
from collections import OrderedDict, UserDict, defaultdict
from pathlib import Path

import pytest
import torch
from fastai.basics import Callback
from fastai.vision.core import TensorBBox, TensorPoint
from fastcore.foundation import L
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import fastai_mixup_ext
from common import BS, WIDTH, Raise, Watch, global_hooks, hooks_on, make_items, make_learner, make_mixer
from test_exits import leave
from fastai_mixup_ext import Mix, MixUpCallback, blend, cutmix, fmix, mix_input, mixed_loss, mixup, one_of

package = Path(fastai_mixup_ext.__file__).parent

# Abnormal ends

@pytest.mark.parametrize('exc', [RuntimeError('stop'), KeyboardInterrupt('stop')], ids=['error','interrupt'])
@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss','after_backward'])
def test_an_exception_inside_leaves_nothing(event, exc):
    "With `at=`: no hook, a call by hand is not mixed, and the model can be freed"
    learn = make_learner('place', [cb := make_mixer('place')])
    leave(learn, exc, cbs=Raise(event, exc, 5))
    assert not global_hooks() and not hooks_on(learn.model)
    x = torch.stack([x for x,_ in make_items()[:BS]])
    assert torch.equal(learn.model.train()(x), learn.model(x))
    ref = weakref.ref(learn.model)
    exc.__traceback__ = None
    learn.destroy() if hasattr(learn, 'destroy') else None
    del learn, cb
    gc.collect()
    assert ref() is None

removals = [(e, o) for e in 'before_batch after_pred after_loss before_backward after_step after_batch'.split() for o in (-5, 5)]

@pytest.mark.parametrize('event,order', removals)
def test_a_removed_callback_leaves_a_whole_batch(event, order):
    learn = make_learner(cbs=[cb := MixUpCallback()])
    class Remove(Callback):
        run_valid = False
        def remove(self):
            if cb in self.learn.cbs: self.learn.remove_cb(cb)
    remove = Remove()
    remove.order = order
    setattr(remove, event, remove.remove)
    whole = Watch('after_batch', lambda learn: (len(learn.yb), learn.loss.isfinite().item()))
    learn.fit(1, cbs=[remove, whole])
    assert len(whole.seen)==2 and all(o==(1, True) for o in whole.seen)

# Other callbacks

def test_one_callback_in_several_learners_mixes_for_each():
    "Made first, fitted after, in any order"
    cb = MixUpCallback()
    learns = [make_learner(cbs=[cb]) for _ in range(3)]
    for learn in (*learns, learns[0]):
        mixed = Watch('after_loss', lambda learn: (mix := learn.mix_up.mix) is not None and torch.equal(
            learn.loss, mixed_loss(learn.loss_func, learn.pred, learn.yb, mix)))
        learn.fit(1, cbs=mixed)
        assert mixed.seen==[True]*2

@pytest.mark.parametrize('kind', ['labels','blended'])
def test_targets_set_anew_behind_ours_are_left_alone(kind):
    "The loss is that of the new targets, unmixed"
    class Anew(Callback):
        order,run_valid = 5,False
        def before_batch(self): self.learn.yb = (self.y.flip(0)+(0 if kind=='labels' else 1),)
    learn = make_learner(kind, [MixUpCallback()])
    right = Watch('after_loss', lambda learn: torch.equal(learn.loss, learn.loss_func(learn.pred, *learn.yb)))
    learn.fit(1, cbs=[Anew(), right])
    assert right.seen==[True]*2

def test_targets_that_are_no_tensors_are_left_alone_too():
    class Words(Callback):
        order = 5
        def before_batch(self): self.learn.yb = ('some words',)
    told = []
    def loss_func(pred, text):
        told.append(text)
        return pred.square().mean()
    make_learner(cbs=[MixUpCallback()], loss_func=loss_func).fit(1, cbs=Words())
    assert {*told}=={'some words'}

def test_a_callback_that_is_kept_does_not_keep_the_model():
    learn = make_learner('place', [cb := make_mixer('place')])
    learn.fit(1)
    learn.remove_cb(cb)
    ref = weakref.ref(learn.model)
    del learn
    gc.collect()
    assert ref() is None

@pytest.mark.parametrize('kind', [L, list, tuple])
def test_any_sequence_as_inputs(kind):
    class Recast(Callback):
        order = -5
        def before_batch(self): self.learn.xb,self.learn.yb = kind(self.learn.xb),kind(self.learn.yb)
    learn = make_learner(cbs=[cb := MixUpCallback()])
    right = Watch('after_loss', lambda learn: torch.equal(learn.loss, mixed_loss(learn.loss_func, learn.pred, learn.yb, cb.mix)))
    learn.fit(1, cbs=[Recast(), right])
    assert right.seen==[True]*2

class MixHandler1d(Callback): "The base of tsai's"
class MixHandlerX(Callback): "The base of fastxtend's"
class MixUp1d(MixHandler1d): "Another library's"
class CutMixUp(MixHandlerX): "Another library's"

@pytest.mark.parametrize('other', [MixUp1d, CutMixUp])
def test_other_libraries_mixers_are_refused(other):
    with pytest.raises(ValueError, match=f"(?s){other.__name__}.*keep one"): make_learner(cbs=[MixUpCallback(), other()]).fit(1)

class OwnLoss(nn.Module):
    "As in transformers: the labels are among the inputs"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(WIDTH, 3)
    def forward(self, inputs): return F.cross_entropy(self.lin(inputs['x']), inputs['labels'])

def test_labels_among_the_inputs():
    learn = make_learner(cbs=[MixUpCallback()])
    class Hide(Callback):
        order = -5
        def before_batch(self): self.learn.xb,self.learn.yb = (dict(x=self.x, labels=self.y),),()
    learn.model = OwnLoss()
    with pytest.raises(TypeError, match=r"(?s)Labels among the inputs.*targets"): learn.fit(1, cbs=Hide())

@pytest.mark.parametrize('order', [-5, 5])
def test_a_mix_set_after_the_prediction(order):
    "Before ours or behind it, the loss goes by it"
    cb = MixUpCallback()
    class Set(Callback):
        run_valid = False
        def after_pred(self): cb.mix = Mix(cb.mix.partner, torch.full((len(cb.mix),), .9))
    setter = Set()
    setter.order = order
    learn,owns = make_learner(cbs=[cb]),Watch('before_batch', lambda learn: learn.yb, order=-5)
    right = Watch('after_loss', lambda learn: learn.loss.item()==pytest.approx((.9*learn.loss_func(learn.pred, *learn.yb)
        + .1*learn.loss_func(learn.pred, learn.y[cb.mix.partner])).item()))
    learn.fit(1, cbs=[setter, right, owns])
    assert right.seen==[True]*2

# Messages

@pytest.mark.parametrize('cls', [TensorBBox, TensorPoint])
def test_boxes_and_points_are_refused_before_the_forward(cls):
    class Points(Callback):
        order = -5
        def before_batch(self): self.learn.yb = (cls(torch.rand(len(self.y), 2, 4 if cls is TensorBBox else 2)),)
    learn = make_learner(cbs=[MixUpCallback()])
    calls = []
    learn.model.register_forward_hook(lambda *a: calls.append(1))
    with pytest.raises(TypeError, match=f"target 0 is a {cls.__name__}.*plain tensor"): learn.fit(1, cbs=Points())
    assert not calls

x = torch.randn(6, 3, 8, 8)
mix = Mix(torch.arange(6).roll(1), torch.full((6,), .7))

@pytest.mark.parametrize('f', [lambda: mixup(.4)([x]), lambda: blend('a text'*999, mix), lambda: blend([x], mix), lambda: blend(x, [x]),
    lambda: mixed_loss(F.cross_entropy, x, torch.zeros(6), [x]), lambda: mix_input([x, 'a'], mix), lambda: Mix([x], x),
    lambda: blend(x[:4], mix), lambda: mixed_loss(F.cross_entropy, x, [x.tolist()], mix), lambda: one_of(mixup(.4), x)])
def test_no_message_prints_a_batch(f):
    with pytest.raises((TypeError, ValueError)) as e: f()
    assert len(str(e.value))<400

not_dense = dict(sparse=x.to_sparse, quantised=lambda: torch.quantize_per_tensor(x, .1, 0, torch.qint8))

@pytest.mark.filterwarnings('ignore:.*quantized tensor creation')
@pytest.mark.parametrize('kind', not_dense)
def test_what_is_not_dense_is_refused_in_our_words(kind):
    other = not_dense[kind]()
    remedy = 'sparse.*to_dense|quantised.*dequantize'
    for f in (lambda: blend(other, mix), lambda: mix_input(other, mix), lambda: mixed_loss(F.mse_loss, x, other, mix)):
        with pytest.raises(TypeError, match=remedy): f()
    with pytest.raises(TypeError, match='dense'): mixup(.4)(other)

@pytest.mark.parametrize('kind', [torch.float64, torch.complex128, torch.int64], ids=str)
@pytest.mark.parametrize('d', [1, 2, 3, 4])
def test_a_box_shrinks_axis_by_axis(d, kind):
    "Any number of axes, against a loop over rows, axes and positions in float64"
    v = (torch.randn(3, 2, *range(5, 5-d, -1))*9).to(kind)
    m = Mix(torch.tensor([1,2,0]), torch.rand(3), torch.rand(3, 1, *v.shape[2:])>.5, .2+.4*torch.rand(3, 2, d))
    want = v[m.partner].clone()
    for i in range(3):
        for axis in range(d):
            row,s = want[i].clone(),v.shape[2+axis]
            for p in range(s):
                start,size = m.box[i,:,axis].double().tolist()
                look = min(max(((p+.5)/s-start)/size*s-.5, 0), s-1)
                low = int(look)
                a,b = row.select(1+axis, low),row.select(1+axis, min(low+1, s-1))
                near = a if look-low<=.5 else b
                want[i].select(1+axis, p).copy_((1-look+low)*a+(look-low)*b if kind!=torch.int64 else near)
    assert_close(blend(v, m), torch.where(m.mask, v, want), rtol=1e-5, atol=1e-5)

# Values

@pytest.mark.parametrize('bad', [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize('kind', ['lam','share','mask','soft mask'])
def test_a_row_that_keeps_all_of_its_own(kind, bad):
    "Bit for bit, whatever its partner holds"
    v = torch.stack([x[0], torch.full_like(x[0], bad)])
    one = torch.tensor([1., .5])
    masks = {'lam': None, 'share': one, 'mask': torch.ones(2, 1, 8, 8)>0, 'soft mask': torch.ones(2, 1, 8, 8)}
    assert torch.equal(blend(v, Mix(torch.tensor([1,0]), one, masks[kind]))[0], v[0])

floats = torch.float16, torch.bfloat16, torch.float32, torch.float64

@pytest.mark.parametrize('share', floats, ids=str)
@pytest.mark.parametrize('values', [*floats, torch.uint8, torch.complex64], ids=str)
def test_shares_of_any_dtype_with_values_of_any(values, share):
    v = (x*50+99).clamp(0, 255).to(values)
    for mask in (None, torch.full((6,), .25, dtype=share), torch.full((1,1,8,8), .25, dtype=share)):
        got = blend(v, Mix(mix.partner, torch.full((6,), .25, dtype=share), mask))
        wide = torch.complex128 if values.is_complex else torch.float64
        want = .25*v.to(wide)+.75*v[mix.partner].to(wide)
        assert got.dtype==values
        assert_close(got.to(wide), want, rtol=1e-2, atol=.51 if values==torch.uint8 else 1e-2)

def test_under_a_box_nothing_is_rounded():
    box = torch.tensor([[[0.,0.],[1.,1.]]])
    m = Mix(mix.partner, torch.zeros(6), torch.zeros(6, 1, 8, 8)>0, box)
    ids = torch.randint(2**24, 2**40, (6,8,8))
    assert torch.equal(blend(ids, m), ids[mix.partner])
    z = torch.complex(x, -2*x)
    assert_close(blend(z, m), z[mix.partner])

half = torch.arange(8)<4
masks = dict(lam=None, share=torch.full((6,), .3), bool=half.expand(6, 1, 8, 8), soft=half.float().expand(6, 1, 8, 8)*.5,
    one=half.expand(1, 1, 8, 8))
mixes = {k: Mix(mix.partner, mix.lam, v) for k,v in masks.items()}
mixes['box'] = Mix(mix.partner, mix.lam, masks['bool'], torch.tensor([[[0.,.5],[1.,.5]]]))

@pytest.mark.parametrize('m', mixes.values(), ids=mixes)
def test_forward_derivatives(m):
    t = torch.randn_like(x)
    assert_close(torch.func.jvp(lambda v: blend(v, m), (x,), (t,)), (blend(x, m), blend(t, m)))

@pytest.mark.filterwarnings('ignore:There is a performance drop')
@pytest.mark.parametrize('m', mixes.values(), ids=mixes)
def test_vmap_over_the_inputs(m):
    xs = torch.stack([x, 2*x])
    assert_close(torch.func.vmap(lambda v: blend(v, m))(xs), torch.stack([blend(o, m) for o in xs]))

@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_vmap_over_the_shares():
    lams = torch.rand(4, 6)
    f = lambda lam: blend(x, Mix(mix.partner, lam))  # noqa: E731
    assert_close(torch.func.vmap(f)(lams), torch.stack([f(o) for o in lams]))

class Blend(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, x): return blend(x, self.m)

@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('m', mixes.values(), ids=mixes)
def test_export(m, strict):
    assert_close(torch.export.export(Blend(m), (x,), strict=strict).module()(x), blend(x, m))

def test_pinned(monkeypatch):
    "Every tensor of a mix, as a `DataLoader` asks for; here without the memory of a GPU"
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda t: t.clone())
    for m in mixes.values():
        pinned = torch.utils.data._utils.pin_memory.pin_memory(m, 'cuda')
        for k,t in vars(m).items(): assert t is None or getattr(pinned, k) is not t and torch.equal(getattr(pinned, k), t)

def test_other_mappings():
    "Kept as they are, with their order and defaults"
    for d in (defaultdict(list, a=x), OrderedDict(b=x, a=x), UserDict(a=x)):
        got = mix_input(d, mix)
        assert type(got) is type(d) and list(got)==list(d) and got is not d and d['a'] is x
        assert torch.equal(got['a'], blend(x, mix))
        if isinstance(d, defaultdict): assert got['new']==[]

def test_a_choice_is_equal_by_value():
    a,b = (one_of(mixup(.4), cutmix(1.), weights=[1,2]) for _ in range(2))
    assert a==b and hash(a)==hash(b) and a!=one_of(mixup(.4), cutmix(1.)) and a!=one_of(mixup(.4), cutmix(1.), weights=[1,2], per_row=True)

@pytest.mark.parametrize('sizes', [(32,32), (16,16,16)])
def test_fmix_has_no_preferred_direction(sizes):
    "As many edges along each axis, within the noise of the estimate"
    v,draws = torch.zeros(2, 1, *sizes),[]
    for _ in range(300):
        keep = fmix(1.)(v).mask[0,0]
        draws.append(torch.stack([(keep.diff(dim=d)!=0).float().mean() for d in range(len(sizes))]))
    draws = torch.stack(draws)
    for i in range(1, len(sizes)):
        gap = draws[:,i]-draws[:,0]
        assert gap.mean().abs()<4*gap.std()/len(gap)**.5

def test_a_mix_travels():
    moved = mixes['box'].to('meta')
    assert {o.device.type for o in (moved.partner, moved.lam, moved.mask, moved.box)}=={'meta'} and mix.to('cpu').mask is None

# The package

def test_star_import():
    names = {}
    exec('from fastai_mixup_ext import *', names)
    assert set(fastai_mixup_ext.__all__)<=set(names)

core = 'tensors mix pairing schedules recipes classes losses embeddings'.split()

def test_the_core_needs_neither_fastai_nor_fastcore():
    code = f"""
import sys
sys.modules['fastai'] = sys.modules['fastcore'] = None
from importlib import import_module
for o in {core!r}: import_module('fastai_mixup_ext.'+o)
import torch, torch.nn.functional as F
from fastai_mixup_ext import cutmix, mixup, mix_input, mixed_loss, one_of
x,y = torch.randn(8, 3, 4, 4),torch.arange(8)
for recipe in (mixup(.4), cutmix(1.), one_of(mixup(.4), cutmix(1.), per_row=True)):
    mix = recipe(x, y)
    assert mix_input(x, mix).shape==x.shape
    for f in (F.cross_entropy, torch.nn.MultiMarginLoss(), lambda p, y: F.cross_entropy(p, y)):
        assert mixed_loss(f, torch.randn(8, 8), y, mix).isfinite()
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode==0, done.stderr

def test_no_private_name_crosses_a_module():
    for path in package.glob('*.py'):
        ours = [o for o in ast.walk(ast.parse(path.read_text())) if isinstance(o, ast.ImportFrom) and o.level]
        assert not [a.name for o in ours for a in o.names if a.name[0]=='_' and a.name[1]!='_'], path.name
