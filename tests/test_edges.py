"""What the other tests left open, found by mutants (`tools/mutants.py`): values at the edge, the second of two, another device."""
from collections import ChainMap, OrderedDict, UserDict
from collections.abc import MutableMapping
from dataclasses import FrozenInstanceError
from fractions import Fraction
from functools import partial
from itertools import combinations
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.losses import LabelSmoothingCrossEntropy
from fastai.torch_core import TensorCategory, set_seed
from fastai.vision.core import TensorBBox
from torch import nn, tensor
from torch.testing import assert_close

from common import BS, covering, make_learner, make_mixer, named, torch_27
from fastai_mixup_ext import (Mix, MixUpCallback, Recipe, across_class, balanced, blend, by_target_distance, cutmix, fmix, mix_input,
    mixed_loss, mixup, one_of, pairing, per_batch, remix, resizemix, until, within_class, without_hesitation)
from fastai_mixup_ext.losses import is_by_row
from fastai_mixup_ext.memory import Scratch
from fastai_mixup_ext.places import Place, first_rows
from fastai_mixup_ext.tensors import reordered

def gen(seed=0): return torch.Generator().manual_seed(seed)

@pytest.mark.parametrize('value', [until(.5), without_hesitation(), by_target_distance(1.), mixup(), cutmix(), fmix(),
    resizemix()], ids=str)
def test_a_value_does_not_change_and_is_a_key(value):
    with pytest.raises(FrozenInstanceError): setattr(value, next(iter(vars(value))), .1)
    assert {value: 1}[value]==1

@pytest.mark.parametrize('strength', [1,2,3])
def test_covering_leaves_nothing_out(strength):
    "What the other files choose their cases with: everything that meets in some case still meets in one"
    cells = [(a, b, c, d) for a in 'xyz' for b in (0,1,None) for c in 'pq' for d in range(4) if not (a=='x' and d==3)]
    def together(cells): return {tuple((i, o[i]) for i in axes) for o in cells for axes in combinations(range(4), strength)}
    few = covering(cells, strength)
    assert together(few)==together(cells) and set(few)<=set(cells) and len(few)<={1: 4, 2: 13, 3: 40}[strength]

def test_the_first_of_two_targets_counts():
    x,first,second = torch.zeros(6, 1),tensor([0,0,0,1,1,1]),tensor([0,1,0,1,0,1])
    within = within_class(x, (first, second), gen())
    assert (first[within]==first).all() and (first[across_class(x, (first, second), gen())]!=first).all()
    near = by_target_distance(.1)(x, (first.float(), second.float()), gen())
    assert (first[near]==first).all()

@pytest.mark.parametrize('counts', [[5,-1], [5.,-.5], [0,0], [2**70,1], [[1,2]], [1.,torch.inf], ['a'], [object()], {0: 5}], ids=named)
def test_counts_are_numbers_from_zero_on(counts):
    for make in (balanced, partial(remix, mixup())):
        with pytest.raises((TypeError, ValueError), match='counts'): make(counts)

def test_no_draw_leads_to_a_far_partner(monkeypatch):
    "A uniform number may be 0, and the logarithm of it is not finite"
    monkeypatch.setattr(pairing, 'uniform', lambda size, device, generator: torch.zeros(size))
    y = tensor([9.,0.,5.])
    assert by_target_distance(.1)(torch.zeros(3), y).tolist()==[0,1,2]

# ---- losses

even = Mix(tensor([1,0,3,2]), torch.full((4,), .7))

def other_forward():
    f = nn.CrossEntropyLoss()
    f.forward = lambda pred, y: 2*F.cross_entropy(pred, y)
    return f

def hooked(register):
    f = nn.CrossEntropyLoss()
    getattr(f, register)(dict(register_forward_hook=lambda f, args, out: 2*out,
        register_forward_pre_hook=lambda f, args: (2*args[0], args[1]))[register])
    return f

@pytest.mark.parametrize('make', [other_forward, partial(hooked, 'register_forward_hook'), partial(hooked, 'register_forward_pre_hook')],
    ids=['forward', 'hook', 'pre-hook'])
def test_a_loss_that_was_changed_by_hand_is_called(make):
    f,pred,y = make(),torch.randn(4, 3),tensor([0,1,2,0])
    assert not is_by_row(f)
    assert_close(mixed_loss(f, pred, y, even), .7*f(pred, y)+.3*f(pred, y[even.partner]))

@pytest.mark.parametrize('y,found', [([0,1,2,3], '0 to 3'), ([-1,0,1,2], '-1 to 2'), ([-2,5,0,0], '-2 to 5')])
def test_labels_out_of_range_are_named(y, found):
    says = f"between 0 and 2, the last class of the prediction, or be ignored .`ignore_index`.; they run from {found}"
    with pytest.raises(ValueError, match=says): mixed_loss(nn.CrossEntropyLoss(), torch.randn(4, 3), tensor(y), even)

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_fastais_smoothing_counts_rows_that_torch_ignores(reduction):
    "Their label is skipped, and their smoothing is not"
    f,pred,y = LabelSmoothingCrossEntropy(reduction=reduction),torch.randn(4, 3),tensor([0,-100,2,-100])
    whole = Mix(even.partner, torch.ones(4))
    assert_close(mixed_loss(f, pred, y, whole), f(pred, y))
    total = LabelSmoothingCrossEntropy(reduction='sum')
    assert_close(mixed_loss(total, pred, y, even), .7*total(pred, y)+.3*total(pred, y[even.partner]))


def test_a_mix_set_after_the_prediction_is_what_the_loss_goes_by():
    seen = []
    class Mine(Callback):
        order,run_valid = 50,False
        def after_pred(self):
            self.learn.mix_up.mix = Mix(torch.arange(BS).roll(1), torch.full((BS,), .6))
            self.y = self.learn.mix_up.sources[0][0][0]
        def after_loss(self):
            p = self.learn.pred
            want = .6*F.cross_entropy(p, self.y) + .4*F.cross_entropy(p, self.y.roll(1))
            seen.append((self.learn.loss.detach(), want.detach()))
    make_learner('labels', [MixUpCallback(), Mine()]).fit(1)
    assert len(seen)==2
    for got,want in seen: assert_close(got, want)

@pytest.mark.parametrize('kind', ['labels', 'blended', 'place'])
def test_after_a_mix_that_does_not_fit_all_goes_on_with_the_one_before(kind):
    "Who catches the error has the loss of the batch as it was mixed"
    seen = []
    class Wrong(Callback):
        order,run_valid = 50,False
        def after_pred(self):
            cb = self.learn.mix_up
            self.was = cb.mix
            with pytest.raises((IndexError, RuntimeError)): cb.mix = Mix(torch.full((BS,), BS), torch.full((BS,), .6))
            assert cb.mix is self.was
        def after_loss(self): seen.append((self.learn.loss.detach(), mixed_loss(F.mse_loss if kind=='blended' else F.cross_entropy,
            self.learn.pred, self.learn.mix_up._batch.own, self.was).detach()))
    make_learner(kind, [make_mixer(kind), Wrong()]).fit(1)
    assert len(seen)==2
    for got,want in seen: assert_close(got, want)


# ---- values

def test_defaults(): assert (mixup(), cutmix(), fmix(), resizemix())==(mixup(.4), cutmix(1.), fmix(1., 3.), resizemix((.1,.8)))

def test_a_box_needs_its_mask():
    with pytest.raises(ValueError, match='Mix.box=.*with a mask over d axes'): Mix(even.partner, even.lam, None, torch.rand(4, 2, 2))

def test_a_mask_has_positions_or_rows_only():
    for mask in torch.rand(4, 1), torch.rand(4, 1)<.5:
        with pytest.raises(ValueError, match='Mix.mask='): Mix(even.partner, even.lam, mask)

@pytest.mark.parametrize('x', [tensor(1.), torch.eye(3).to_sparse(), [1., 2.], None], ids=['a number', 'sparse', 'a list', 'none'])
def test_a_recipe_mixes_dense_rows(x):
    with pytest.raises(TypeError, match='x must be a dense tensor with one row per item'): mixup()(x)

bad = torch.inf,-torch.inf,torch.nan

def each_share(test):
    "For values of every kind, a share wherever it may stand, and with a gradient or without"
    dtypes = torch.float16,torch.bfloat16,torch.float32,torch.float64,torch.complex64
    for name,values in dict(dtype=dtypes, where=['lam','share','position'], grad=[False,True]).items():
        test = pytest.mark.parametrize(name, values, ids=str)(test)
    return test

@each_share
def test_what_keeps_all_is_as_it_was_beside_what_is_not_finite(dtype, where, grad):
    "Row 0 keeps all of its own, row 1 is bad"
    x = torch.randn(2, 3, 4).to(dtype)
    ones,part = torch.ones(2),tensor([.5,.5])
    mask = dict(lam=None, share=ones, position=torch.ones(2, 1, 4))[where]
    mix = Mix(tensor([1,0]), ones if where=='lam' else part, mask)
    for b in bad:
        x[1] = b
        res = blend(x.clone().requires_grad_(grad), mix)
        assert torch.equal(res[0], x[0])
    assert torch.equal(mix_input((x, x.real), mix)[1][0], x[0].real)

@each_share
def test_what_keeps_all_is_as_it_was_even_if_that_is_not_finite(dtype, where, grad):
    "Row 0 keeps all of its own, row 1 half"
    x = torch.randn(2, 3, 4).to(dtype)
    x[0,0,:3] = tensor(bad)
    part = tensor([1.,.5])
    mask = dict(lam=None, share=part, position=part.view(2, 1, 1).expand(2, 1, 4))[where]
    mix = Mix(tensor([1,0]), part if where=='lam' else tensor([.5,.5]), mask)
    x.requires_grad_(grad)
    res = blend(x, mix)
    torch.testing.assert_close(res[0], x[0], rtol=0, atol=0, equal_nan=True)
    assert res.isfinite().all(1).tolist()==[[False,False,False,True]]*2
    if grad: assert torch.autograd.grad(res[0].real[:,3].sum(), x)[0].isfinite().all()

@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_under_vmap_and_beside_what_is_not_finite():
    x,lams = tensor([[torch.inf],[2.]]),tensor([[1.,0.],[.5,1.]])
    got = torch.func.vmap(lambda lam: blend(x, Mix(tensor([1,0]), lam)))(lams)
    assert got[0,0]==torch.inf and got[1,1]==2

def test_scratch_is_for_the_cpu(): assert Scratch().like(torch.empty(600, 1000, device='meta')) is None

class Equal(nn.Module):
    "A module that equals every other"
    __hash__ = nn.Module.__hash__
    def __eq__(self, other): return True
    def forward(self, x): return x

def test_a_place_is_a_module_and_not_its_equal():
    model = nn.Sequential(Equal(), Equal(), nn.Flatten())
    with Place(model, model[1], lambda out: out+1) as place: assert (model(torch.zeros(2, 3))==1).all() and place.done
    with Place(model, model[2], lambda out: out+1) as place: assert (model(torch.zeros(2, 3))==1).all() and place.done

@pytest.mark.parametrize('f', [F.multi_margin_loss, F.multilabel_margin_loss, F.soft_margin_loss, F.hinge_embedding_loss], ids=named)
def test_a_keyword_leaves_a_function_known_and_an_argument_does_not(f):
    assert is_by_row(f) and is_by_row(partial(f, reduction='sum'))
    assert not is_by_row(partial(f, torch.zeros(2)))

def test_the_memory_that_is_offered_is_used():
    x,mix = torch.rand(4, 3),mixup(1.)(torch.rand(4, 3))
    memory = torch.full((4, 3), torch.nan)
    res = mix_input(x, mix, lambda t: memory)
    assert res.data_ptr()==memory.data_ptr() and torch.equal(res, blend(x, mix))
    assert torch.equal(mix_input(x, mix, lambda t: None), res)

def test_a_part_without_rows_is_refused_at_a_place():
    SentenceEncoder = type('SentenceEncoder', (nn.Sequential,), {})
    model = nn.Sequential(SentenceEncoder(nn.Linear(3, 3)))
    place = Place(model, model[0][0], lambda out: out)
    assert place.in_parts and place.whole(torch.rand(2, 3), 5).shape==(5, 3)
    for x in torch.rand(0, 3),torch.rand(6, 3):
        with pytest.raises(ValueError, match='has shape .*but the batch has 5 rows'): place.whole(x, 5)

def test_the_first_rows_of_a_mask_by_position():
    "Each row's mask is cut out whole; a row whose partner is missing keeps its own by `lam`"
    mask = torch.rand(4, 1, 5)<.5
    mix = Mix(tensor([1,3,0,2]), torch.rand(4), mask)
    part = first_rows(mix, 2)
    assert torch.equal(part.mask, mask[:2]) and part.partner.tolist()==[1,1] and part.lam.tolist()==[mix.lam[0].item(), 1.]

def test_counts_do_not_follow_what_they_were_made_of():
    n = torch.ones(3)
    counts = pairing.Counts(n)
    n[0] = 9
    assert counts.values.tolist()==[1., 1., 1.]

def test_a_recipe_that_draws_no_mix_is_told_what_it_must():
    class Wrong(Recipe):
        def draw(self, batch): return batch.partner
    says = "Wrong.draw returned a Tensor; it must return a Mix of the batch's 4 rows"
    with pytest.raises(TypeError, match=says): Wrong()(torch.rand(4, 2))

def test_counts_are_on_the_device_that_asks():
    counts = pairing.Counts([3, 1])
    assert counts.on(torch.device('meta')).device.type=='meta' and counts.on(torch.device('cpu')) is counts.values

def test_without_hesitation_ends_plain_wherever_it_fades():
    for fade in .9,1.: assert [without_hesitation(.5, fade)(p) for p in (0., .5, 1.)]==[1., .5, 0.]

class Copies(Callback):
    "Puts a copy in the place of the targets, behind the mixing callback"
    order = 1
    def before_batch(self): self.learn.yb = tuple(y.clone() for y in self.learn.yb)

class Notes(Callback):
    order,run_valid = 2,False
    def __init__(self): self.noted = []
    def after_loss(self): self.noted.append(self.learn.loss.item())

def test_a_copy_of_the_targets_is_still_mixed():
    def losses(*cbs):
        noted = Notes()
        set_seed(0)
        make_learner('labels', [MixUpCallback(seed=1), noted, *cbs]).fit(1)
        return noted.noted
    assert losses()==losses(Copies())

def test_boxes_are_refused_behind_another_target():
    class Boxes(Callback):
        order = -1
        def before_batch(self): self.learn.yb = TensorCategory(self.yb[0]),TensorBBox(torch.rand(len(self.yb[0]), 2, 4))
    with pytest.raises(TypeError, match='target 1 is a TensorBBox'): make_learner('labels', [MixUpCallback(), Boxes()]).fit(1)

# What keeps all of its own, or gives all

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_a_whole_row_keeps_its_negative_zeros(dtype):
    "Long enough for the processor's own wide instructions"
    x = torch.full((2, 64), -0.).to(dtype)
    got,want = blend(x, Mix(tensor([1,0]), tensor([1.,.5]))),x
    if x.is_complex(): got,want = torch.view_as_real(got),torch.view_as_real(want)
    assert torch.equal(got[0].signbit(), want[0].signbit())

@pytest.mark.parametrize('bad', [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize('grad', [False, True])
def test_a_position_that_gives_nothing_spoils_nothing(bad, grad):
    x = tensor([[[1.,bad]], [[3.,4.]]], requires_grad=grad)
    got = blend(x, Mix(tensor([1,0]), tensor([.5,.5]), tensor([1.,0.]).expand(2, 1, 2)))
    assert_close(got, tensor([[[1.,4.]], [[3.,bad]]]), equal_nan=True)

@pytest.mark.filterwarnings('ignore:ComplexHalf')
def test_small_complex_values_keep_both_parts():
    x = tensor([[1+2j], [3+4j]]).to(torch.complex32)
    got = blend(x, Mix(tensor([1,0]), tensor([1.,.5])))
    assert got.dtype==torch.complex32 and got.to(torch.complex64).flatten().tolist()==[1+2j, 2+3j]

def test_vmap_over_shares_by_position_alone():
    x,shares = torch.randn(3, 2, 4),torch.rand(5, 3, 1, 4)
    def f(s): return blend(x, Mix(tensor([1,2,0]), torch.full((3,), .5), s))
    assert_close(torch.vmap(f)(shares), torch.stack([f(s) for s in shares]))

@pytest.mark.parametrize('strict', [False, pytest.param(True, marks=torch_27)])
def test_export_for_any_number_of_rows(strict):
    class Blends(torch.nn.Module):
        def forward(self, x, partner, lam): return blend(x, Mix(partner, lam))
    def args(n): return torch.randn(n, 2, 4),torch.arange(n).roll(1),torch.rand(n)
    rows = torch.export.Dim('rows')
    shapes = dict(x={0:rows}, partner={0:rows}, lam={0:rows})
    program = torch.export.export(Blends(), args(3), dynamic_shapes=shapes, strict=strict).module()
    seven = args(7)
    assert_close(program(*seven), Blends()(*seven))

@pytest.mark.parametrize('out', [torch.empty(2, 3), torch.empty(3, 2), torch.empty(3, 3, dtype=torch.float64), 'memory', None],
    ids=['columns', 'rows', 'dtype', 'text', 'itself'])
def test_memory_for_the_result_must_fit(out):
    x,mix = torch.randn(3, 3),Mix(tensor([1,2,0]), torch.rand(3))
    with pytest.raises(ValueError, match=r'blend: out is .*must be other memory for torch.float32 of shape \(3, 3\)'):
        blend(x, mix, x if out is None else out)

# Recipes within others

class Roll(Recipe):
    "Partners of its own"
    def __init__(self, by, lam=.5): self.by,self.lam = by,lam
    def draw(self, batch): return Mix(torch.arange(len(batch)).roll(self.by), torch.full((len(batch),), self.lam))

def test_a_choice_by_row_takes_the_partner_with_the_share():
    mix = one_of(Roll(1, .6), Roll(2, .7), per_row=True)(torch.zeros(50, 1))
    want = torch.where(mix.lam==.6, torch.arange(50).roll(1), torch.arange(50).roll(2))
    assert torch.equal(mix.partner, want) and mix.lam.unique().numel()==2

@pytest.mark.parametrize('outer', [lambda r: one_of(r, mixup(.4)), lambda r: one_of(r, mixup(.4), per_row=True), per_batch],
    ids=['one_of', 'per_row', 'per_batch'])
def test_what_an_inner_recipe_draws_is_looked_at(outer):
    class Short(Recipe):
        def draw(self, batch): return Mix(tensor([0]), tensor([.5]))
    class Nothing(Recipe):
        def draw(self, batch): pass
    for recipe,got in (Short(), 'a mix of 1 rows'), (Nothing(), 'a NoneType'):
        with pytest.raises(TypeError, match=f'{type(recipe).__name__}.draw returned {got}'):
            for _ in range(20): outer(recipe)(torch.zeros(4, 1))

def test_a_choice_within_a_choice_draws_from_the_generator():
    class Share(Recipe):
        def __init__(self, lam): self.lam = lam
        def draw(self, batch): return Mix(batch.partner, torch.full((len(batch),), self.lam))
    recipe = one_of(Share(.5), one_of(Share(.6), Share(.7)), weights=[1,5], per_row=True)
    def draw(seed): return recipe(torch.zeros(20, 1), generator=torch.Generator().manual_seed(seed)).lam.max().item()
    assert len({draw(0) for _ in range(8)})==1 and len({draw(seed) for seed in range(8)})==2

def test_a_pair_of_sizes_is_a_value():
    assert resizemix([.1,.8])==resizemix((.1,.8)) and hash(resizemix([.1,.8]))==hash(resizemix())
    with pytest.raises(ValueError, match='must be a pair'): resizemix((True, 1))

@pytest.mark.parametrize('decay', [0., 3., 20., 300.])
def test_noise_of_any_decay_is_noise(decay):
    "Frequencies that fade past what a number can hold are gone; the rest is a blob"
    mask = fmix(1., decay)(torch.zeros(1, 1, 224, 224)).mask
    lam = fmix(1., decay)(torch.zeros(200, 1, 64, 64)).lam
    assert mask.any() and not mask.all() and lam.isfinite().all()
    edges = [(mask.diff(dim=d)).float().mean().item() for d in (2, 3)]
    assert min(edges)>0 and max(edges)<20*min(edges)

@pytest.mark.parametrize('make', [lambda: fmix(1., float('inf')), lambda: mixup(1e39), lambda: mixup(10**400)],
    ids=['decay', 'float', 'int'])
def test_endless_numbers_are_refused(make):
    with pytest.raises(ValueError, match='finite number'): make()

def test_a_fraction_is_a_number():
    half = Fraction(1, 2)
    x,y = torch.randn(6, 1, 8, 8),torch.randn(6)
    assert len(mixup(half)(x))==len(cutmix(half)(x))==len(resizemix((Fraction(1, 4), half))(x))==len(fmix(half, half)(x))==6
    assert len(by_target_distance(half)(x, y))==6

def test_a_target_that_is_no_number_is_its_own_partner():
    y = tensor([0., 1., torch.nan, 3.])
    for _ in range(20):
        partner = by_target_distance(1.)(torch.zeros(4, 1), y)
        assert partner[2]==2 and not (partner[[0,1,3]]==2).any()
    assert (by_target_distance(1e300)(torch.zeros(4, 1), y)<4).all()

@pytest.mark.parametrize('make', [lambda: torch.quantize_per_tensor(torch.zeros(3, 2), 1., 0, torch.qint8),
    lambda: torch.nested.nested_tensor([torch.zeros(2)]*3)], ids=['quantised', 'nested'])
@pytest.mark.filterwarnings('ignore')
def test_a_strided_tensor_that_is_not_dense_is_called_by_its_kind(make):
    with pytest.raises(TypeError, match='quantised or nested'): mixup(.4)(make())

class Wraps(MutableMapping):
    "Keeps all in a dict of its own, which a shallow copy shares"
    def __init__(self, d): self.d = dict(d)
    def __getitem__(self, k): return self.d[k]
    def __setitem__(self, k, v): self.d[k] = v
    def __delitem__(self, k): del self.d[k]
    def __iter__(self): return iter(self.d)
    def __len__(self): return len(self.d)

@pytest.mark.parametrize('kind', [Wraps, MappingProxyType, ChainMap, UserDict, OrderedDict])
def test_a_mapping_is_never_written_to(kind):
    x = torch.rand(2, 3)
    batch = kind({'a': x})
    got = mix_input(batch, Mix(tensor([1,0]), tensor([.5,.5])))
    assert type(got) is kind and batch['a'] is x and torch.equal(got['a'], x.mean(0).expand(2, 3))

def test_rows_in_another_order_in_any_structure():
    x,order = torch.arange(3),tensor([2,0,1])
    got = reordered((x, {'a': [x, None]}, 'text'), order)
    assert got[0].tolist()==got[1]['a'][0].tolist()==[2,0,1] and got[1]['a'][1] is None and got[2]=='text'
