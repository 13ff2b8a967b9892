"""`blend` against a loop over rows: dtypes, shapes, masks, boxes, memory formats, subclasses; and the laws that it keeps."""
import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorCategory, TensorImage, TensorMask
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from common import covering
from fastai_mixup_ext import Mix, blend, mixup
from fastai_mixup_ext.embeddings import mix_input

lams = tensor([.9,.25,1.,.6,0.,.75])
partner = tensor([1,0,3,3,2,4])
n = len(lams)
mix = Mix(partner, lams)
floats = torch.float16,torch.bfloat16,torch.float32,torch.float64
complexes = torch.complex64,torch.complex128
integers = torch.int8,torch.int16,torch.int32,torch.int64,torch.bool
sizes = {'vector': (7,), 'series': (2,7), 'picture': (3,5,4), 'oblong': (3,33,7), 'volume': (2,3,4,5), 'row': ()}

def draw(shape, dtype):
    if dtype==torch.bool: return torch.rand(shape)<.5
    if dtype==torch.uint8: return torch.randint(256, shape, dtype=dtype)
    if dtype in integers: return torch.randint(-99, 99, shape, dtype=dtype)
    return torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)

def wide(t): return t.detach().as_subclass(torch.Tensor).to(torch.complex128 if t.is_complex() else torch.float64).numpy()

def by_hand(x, mix):
    "Row by row in float64"
    res = np.empty_like(wide(x))
    for i,(row,l,j) in enumerate(zip(wide(x), mix.lam.double().tolist(), mix.partner.tolist())): res[i] = l*row + (1-l)*wide(x)[j]
    return res

def masks(spatial, floating=False):
    r = torch.rand(n, 1, *spatial)
    return {'row': r if floating else r<.5, 'batch': r[:1] if floating else r[:1]<.5}


# ---- interpolation

@pytest.mark.parametrize('dtype', [*floats,*complexes,torch.uint8], ids=str)
@pytest.mark.parametrize('shape', sizes.values(), ids=sizes)
def test_interpolation(shape, dtype):
    x = draw((n,*shape), dtype)
    res = blend(x, mix)
    tol = dict(rtol=0, atol=.50001) if dtype==torch.uint8 else dict(rtol={torch.float16:1e-3, torch.bfloat16:8e-3}.get(dtype, 1e-6),
        atol=1e-6)
    assert res.dtype==dtype and res.shape==x.shape
    assert_close(torch.from_numpy(wide(res)), torch.from_numpy(by_hand(x, mix)), **tol)

def test_double_stays_exact():
    x = draw((n,3), torch.float64)
    assert_close(blend(x, mix), torch.from_numpy(by_hand(x, mix)), rtol=1e-15, atol=1e-15)

@pytest.mark.parametrize('own,other,lam,expected', [(255,255,.3,255), (0,255,.5,128), (255,0,.999,255), (0,1,.4,1), (1,0,.4,0),
    (254,255,.4,255), (0,255,.001,255)])
def test_uint8_is_rounded(own, other, lam, expected):
    x = tensor([[own],[other]], dtype=torch.uint8)
    assert blend(x, Mix(tensor([1,1]), tensor([lam,1.])))[0].item()==expected

@pytest.mark.parametrize('dtype', integers, ids=str)
def test_integers_are_not_interpolated(dtype):
    with pytest.raises(TypeError, match=f"{dtype} values can't be interpolated"): blend(draw((n,3), dtype), mix)

@pytest.mark.parametrize('dtype', [*floats,torch.uint8], ids=str)
def test_lam_one_and_zero_are_exact(dtype):
    x = draw((n,3,5,4), dtype)
    assert_close(blend(x, Mix(partner, torch.ones(n))), x, rtol=0, atol=0)
    assert_close(blend(x, Mix(partner, torch.zeros(n))), x[partner], rtol=0, atol=0)


# ---- masks

@pytest.mark.parametrize('spatial,per,dtype', covering(product([(7,), (5,4), (33,7), (3,4,5)], ['row','batch'],
    [*floats,*complexes,torch.uint8,*integers])), ids=str)
def test_cut(spatial, per, dtype):
    mask = masks(spatial)[per]
    x = draw((n,2,*spatial), dtype)
    expected = torch.stack([torch.where(mask[i if per=='row' else 0], x[i], x[j]) for i,j in enumerate(partner)])
    assert_close(blend(x, Mix(partner, lams, mask)), expected, rtol=0, atol=0)

@pytest.mark.parametrize('per', ['row','batch'])
@pytest.mark.parametrize('dtype', [*floats,torch.uint8], ids=str)
def test_share_per_position(dtype, per):
    mask = masks((5,4), floating=True)[per]
    x = draw((n,3,5,4), dtype)
    own = mask.double().expand(n, 1, 5, 4)
    expected = own*x.double() + (1-own)*x[partner].double()
    tol = dict(rtol=0, atol=.50001) if dtype==torch.uint8 else dict(rtol={torch.float16:1e-3, torch.bfloat16:8e-3}.get(dtype, 1e-5),
        atol=1e-6)
    assert_close(blend(x, Mix(partner, lams, mask)).double(), expected, **tol)

@pytest.mark.parametrize('shape', [(n,5,4), (n,1,5,4), (n,3,5,4)], ids=str)
@pytest.mark.parametrize('dtype', [torch.int64,torch.float32], ids=str)
def test_a_map_of_labels_or_values_is_cut_like_the_picture(shape, dtype):
    mask = masks((5,4))['row']
    y = draw(shape, dtype)
    m = mask[:,0] if y.dim()==3 else mask
    assert_close(blend(y, Mix(partner, lams, mask)), torch.where(m, y, y[partner]), rtol=0, atol=0)

@pytest.mark.parametrize('shape', [(n,), (n,1), (n,9)], ids=str)
def test_what_has_no_positions_has_the_rows_share(shape):
    y = draw(shape, torch.float64)
    assert_close(blend(y, Mix(partner, lams, masks((5,4))['row'])), torch.from_numpy(by_hand(y, mix)))

@pytest.mark.parametrize('shape', [(n,3,4,5), (n,3,9,9), (n,3,5), (n,2,5,4,4)], ids=str)
def test_other_positions_are_refused(shape):
    with pytest.raises(ValueError, match=r"can't be cut by a mask over \(5, 4\)"): blend(torch.zeros(shape),
        Mix(partner, lams, masks((5,4))['row']))


# ---- boxes: the partner, shrunk

@pytest.mark.parametrize('spatial', [(16,), (12,8), (33,7), (8,12,4)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32,torch.float64,torch.float16,torch.uint8], ids=str)
def test_shrunk_constants_stay_constant(spatial, dtype):
    "Shrinking keeps what is the same everywhere, to the box's last pixel"
    d = len(spatial)
    x = tensor([3,7,11,19,23,29]).view(-1, *[1]*(d+1)).expand(n, 2, *spatial).to(dtype)
    mask = masks(spatial)['row']
    start = torch.rand(n, d)*.4
    box = torch.stack([start, .1+torch.rand(n, d)*.5], 1)
    assert_close(blend(x, Mix(partner, lams, mask, box)), torch.where(mask, x, x[partner]), rtol=0,
        atol=0 if dtype==torch.uint8 else 1e-5 if dtype!=torch.float16 else 2e-2)

@pytest.mark.parametrize('dtype', [torch.int64,torch.bool,torch.int32], ids=str)
def test_shrunk_labels_are_labels(dtype):
    "Each is that of a nearest position, found in a loop"
    y = draw((n,12,8), dtype)
    lo,size = tensor([3,2]),tensor([6,4])  # half as large
    mask = torch.ones(n, 1, 12, 8, dtype=torch.bool)
    mask[:,:,3:9,2:6] = False
    box = torch.stack([lo/tensor([12,8]), size/tensor([12,8])])[None]
    expected,got_all = y.clone(),blend(y, Mix(partner, lams, mask, box))
    for r in range(6):
        for c in range(4):
            at = [int((o+.5)*2) for o in (r,c)]
            near = y[partner][:, at[0]-1:at[0]+1, at[1]-1:at[1]+1].flatten(1)  # halfway between four: any of them
            got = got_all[:, 3+r, 2+c]
            assert (got[:,None]==near).any(1).all()
            expected[:, 3+r, 2+c] = got
    assert_close(got_all, expected, rtol=0, atol=0)

def test_a_box_that_is_everything_changes_nothing():
    x,mask = torch.randn(n, 3, 6, 5),masks((6,5))['row']
    box = tensor([[[0.,0],[1,1]]])
    assert_close(blend(x, Mix(partner, lams, mask, box)), blend(x, Mix(partner, lams, mask)))


# ---- what is kept

quarter = tensor([[[.5,.5],[.5,.5]]])

@pytest.mark.parametrize('m', [mix, Mix(partner, lams, masks((5,4))['row']), Mix(partner, lams, masks((5,4), True)['row']),
    Mix(partner, lams, masks((5,4))['row'], quarter), Mix(partner, lams, masks((5,4), True)['row'], quarter)],
    ids=['lerp','cut','shares','box','shares in a box'])
@pytest.mark.parametrize('dtype', [torch.float32,torch.float16,torch.uint8], ids=str)
@pytest.mark.parametrize('grad', [False,True])
def test_channels_last_is_kept(dtype, m, grad):
    if grad and dtype==torch.uint8: return
    x = draw((n,3,5,4), dtype).contiguous(memory_format=torch.channels_last).requires_grad_(grad)
    res = blend(x, m)
    assert res.is_contiguous(memory_format=torch.channels_last) and not res.is_contiguous()
    assert_close(res, blend(x.contiguous(), m))

def test_channels_last_3d_is_kept():
    x = torch.randn(n, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    assert blend(x, mix).is_contiguous(memory_format=torch.channels_last_3d)

views = {'transposed': lambda x: x.transpose(1, 3), 'every other row': lambda x: x.repeat_interleave(2, 0)[::2],
    'expanded': lambda x: x[:,:1].expand(-1, 3, -1, -1), 'flipped': lambda x: x.flip(0)}
@pytest.mark.parametrize('view', views.values(), ids=views)
def test_any_strides(view):
    x = view(torch.randn(n, 3, 5, 4))
    assert_close(blend(x, mix), blend(x.contiguous(), mix))

@pytest.mark.parametrize('cls,x', [(TensorImage,torch.rand(n, 3, 5, 4)), (TensorMask,torch.rand(n, 5, 4)), (TensorCategory,torch.rand(n))])
@pytest.mark.parametrize('m', [mix, Mix(partner, lams, masks((5,4))['row'])], ids=['lerp','cut'])
def test_subclass_and_its_attributes_are_kept(cls, x, m):
    x = cls(x)
    x.codes,x.img_size = ['void','cat'],(5,4)
    res = blend(x, m)
    assert type(res) is cls and res.codes is x.codes and res.img_size==(5,4)
    assert_close(res.as_subclass(torch.Tensor), blend(x.as_subclass(torch.Tensor), m))

class Own(torch.Tensor): pass

def test_a_subclass_of_the_users():
    x = torch.randn(n, 3).as_subclass(Own)
    assert type(blend(x, mix)) is Own

def test_a_parameter_becomes_a_tensor():
    x = torch.nn.Parameter(torch.randn(n, 3))
    assert type(blend(x, mix)) is torch.Tensor and blend(x, mix).requires_grad

@pytest.mark.parametrize('dtype', [*floats,torch.uint8], ids=str)
def test_inputs_are_never_written_to(dtype):
    x = draw((n,3,5,4), dtype)
    box = tensor([[[.1,.1],[.5,.5]]])
    for m in (mix, Mix(partner, lams, masks((5,4))['row']), Mix(partner, lams, masks((5,4), True)['batch']),
        Mix(partner, lams, masks((5,4))['row'], box)):
        before = [t.clone() for t in (x,m.partner,m.lam) ] + [m.mask if m.mask is None else m.mask.clone()]
        version = x._version
        blend(x, m)
        blend(x, m, out=torch.empty_like(x))
        assert x._version==version
        for a,b in zip((x,m.partner,m.lam,m.mask), before): assert b is None or (a==b).all()


# ---- large batches, in memory of another kind

def large(rows=n, channels=3, **kwargs): return torch.rand(rows, channels, 700, 700, **kwargs)  # 35 MB

larges = {'dense': large, 'channels last': lambda: large().to(memory_format=torch.channels_last), 'every other': lambda: large(2*n)[::2],
    'needs its gradient': lambda: large(requires_grad=True), 'half': lambda: large(channels=6).half()}

@pytest.mark.parametrize('m', [mix, Mix(partner, lams, mask=torch.rand(n, 1, 700, 700)<.5)], ids=['lerp','cut'])
@pytest.mark.parametrize('make', larges.values(), ids=larges)
def test_a_row_of_a_large_batch_is_that_of_a_small_one(make, m):
    x = make()
    res = blend(x, m)
    assert res.stride()==torch.empty_like(x).stride() and res.requires_grad==x.requires_grad
    for i,j in enumerate(partner.tolist()):
        two = Mix(tensor([1,0]), lams[[i,j]], None if m.mask is None else m.mask[[i,j]])
        assert_close(res[i], blend(x[[i,j]], two)[0])

# ---- out=

@pytest.mark.parametrize('dtype', [*floats,torch.uint8,torch.complex64], ids=str)
@pytest.mark.parametrize('m', [mix, Mix(partner, lams, masks((5,4))['row']),
    Mix(partner, lams, masks((5,4))['row'], tensor([[[.1,.1],[.5,.5]]]))], ids=['lerp','cut','box'])
def test_out(dtype, m):
    if m.box is not None and dtype==torch.complex64: return
    x = draw((n,3,5,4), dtype)
    out = torch.empty_like(x)
    res = blend(x, m, out)
    assert res.data_ptr()==out.data_ptr()
    assert_close(res, blend(x, m), rtol=0, atol=0)

def test_out_with_strides_of_its_own():
    x = torch.randn(n, 3, 5, 4)
    out = torch.empty(n, 5, 4, 3).permute(0, 3, 1, 2)
    assert_close(blend(x, mix, out), blend(x, mix))
    assert_close(out, blend(x, mix))

def test_out_for_an_input_that_needs_its_gradient():
    x = torch.randn(n, 3, requires_grad=True)
    blend(x, mix, torch.empty(n, 3)).sum().backward()
    assert_close(x.grad.sum(), tensor(3.*n))


# ---- autograd

@pytest.mark.parametrize('m', [mix, Mix(partner, lams.double()), Mix(partner, lams, torch.rand(n, 1, 3, 2)<.5),
    Mix(partner, lams, torch.rand(1, 1, 3, 2).double())], ids=['lerp','double','cut','shares'])
def test_gradients(m):
    x = torch.randn(n, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: blend(x, m), x) and torch.autograd.gradgradcheck(lambda x: blend(x, m), x)

def test_gradients_through_a_box():
    x = torch.randn(n, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    m = Mix(partner, lams, torch.rand(n, 1, 6, 4)<.5, tensor([[[.13,.17],[.61,.57]]]))
    assert torch.autograd.gradcheck(lambda x: blend(x, m), x)

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16], ids=str)
def test_gradients_in_half_precision(dtype):
    x = torch.randn(n, 4).to(dtype).requires_grad_()
    blend(x, mix).sum().backward()
    shares = torch.zeros(n)
    for i,(l,j) in enumerate(zip(lams, partner)):
        shares[i] += l
        shares[j] += 1-l
    assert_close(x.grad.float(), shares[:,None].expand(n, 4), rtol=1e-2, atol=1e-2)

def test_no_graph_without_a_need():
    x = torch.randn(n, 3, requires_grad=True)
    with torch.no_grad(): assert not blend(x, mix).requires_grad
    assert not blend(torch.randn(n, 3), mix).requires_grad

def test_jacobian():
    x = torch.randn(n, 2)
    jac = torch.autograd.functional.jacobian(lambda x: blend(x, mix), x)
    expected = torch.zeros(n, 2, n, 2)
    for i,(l,j) in enumerate(zip(lams, partner)):
        for c in range(2):
            expected[i,c,i,c] += l
            expected[i,c,j,c] += 1-l
    assert_close(jac, expected)


# ---- laws

def mixes(n, spatial):
    def f(seed):
        g = torch.Generator().manual_seed(seed)
        kind,mask = seed%3,torch.rand(n, 1, *spatial, generator=g)
        return Mix(torch.randint(n, (n,), generator=g), torch.rand(n, generator=g), (None, mask<.5, mask)[kind])
    return st.integers(0, 2**31).map(f)

@given(mixes(5, (3,2)), st.permutations(range(5)))
def test_permuting_the_batch_permutes_the_result(m, order):
    x,order = torch.randn(5, 2, 3, 2),tensor(order)
    moved = Mix(order.argsort()[m.partner[order]], m.lam[order], None if m.mask is None else m.mask[order])
    assert_close(blend(x, m)[order], blend(x[order], moved))

@given(mixes(5, (3,2)))
def test_a_row_with_itself_is_itself(m):
    x = torch.randn(5, 2, 3, 2)
    assert_close(blend(x, Mix(torch.arange(5), m.lam, m.mask)), x)

@given(mixes(5, (3,2)))
def test_blending_is_linear(m):
    a,b = torch.randn(2, 5, 2, 3, 2, dtype=torch.float64)
    assert_close(blend(2*a-b, m), 2*blend(a, m)-blend(b, m), rtol=1e-6, atol=1e-6)

@given(mixes(5, (3,2)))
def test_nothing_leaves_the_range_of_the_two(m):
    x = torch.randn(5, 2, 3, 2)
    a,b = torch.minimum(x, x[m.partner]),torch.maximum(x, x[m.partner])
    assert (blend(x, m)>=a-1e-6).all() and (blend(x, m)<=b+1e-6).all()

@pytest.mark.parametrize('x', [torch.randn(0, 3), torch.randn(0, 3, 4, 4)])
def test_no_rows(x): assert blend(x, Mix(torch.zeros(0, dtype=torch.int64), torch.zeros(0))).shape==x.shape


# ---- the value itself

@pytest.mark.parametrize('kw,says', [
    (dict(partner=[1,0], lam=torch.ones(2)), r"Mix\(partner=...\) is \[1, 0\]; it must be a 1-D int64 tensor"),
    (dict(partner=torch.ones(2), lam=torch.ones(2)), "torch.float32 of shape"),
    (dict(partner=tensor([1,0]), lam=.5), r"Mix\(lam=...\) is 0.5; it must be a floating tensor of shape \(2,\)"),
    (dict(partner=tensor([1,0]), lam=torch.ones(3)), r"floating tensor of shape \(2,\)"),
    (dict(partner=tensor([1,0]), lam=tensor([1,0])), "torch.int64 of shape"),
    (dict(partner=tensor([1,0]), lam=torch.ones(2), mask=torch.ones(2, 3, 4, dtype=torch.bool)), r"shape \(2 or 1, 1, \*spatial\)"),
    (dict(partner=tensor([1,0]), lam=torch.ones(2), mask=torch.ones(3, 1, 4, dtype=torch.bool)), r"shape \(2 or 1, 1, \*spatial\)"),
    (dict(partner=tensor([1,0]), lam=torch.ones(2), mask=torch.ones(2, 1, 4, dtype=torch.int64)), "torch.int64"),
    (dict(partner=tensor([1,0]), lam=torch.ones(2), mask='all'), "Mix.mask=.... is 'all'"),
    (dict(partner=tensor([1,0]), lam=torch.ones(2), mask=torch.ones(2, 1, 4, 4)>0, box=torch.ones(2, 2, 1)), "Mix.box"),
    (dict(partner=tensor([1,0]), lam=torch.ones(2), mask=torch.ones(2, 1, 4, 4)>0, box=torch.ones(3, 2, 2)), "Mix.box")])
def test_what_is_no_mix_is_refused(kw, says):
    with pytest.raises(ValueError, match=says): Mix(**kw)

def not_dense():
    "Batches of two rows that are no dense tensors"
    rows = [torch.rand(3, 2), torch.rand(4, 2)]
    return torch.rand(2, 3).to_sparse(), *(torch.nested.nested_tensor(rows, layout=o) for o in (torch.strided, torch.jagged))

@pytest.mark.filterwarnings('ignore:The PyTorch API of nested tensors')
def test_what_is_not_dense_is_refused():
    two = Mix(tensor([1,0]), tensor([.5,.5]))
    for x in not_dense():
        for f in (lambda: blend(x, two), lambda: mix_input(x, two, name='input 0'), lambda: mixup()(x)):
            with pytest.raises(TypeError, match='dense') as e: f()
            assert len(str(e.value))<150  # not the whole tensor

@pytest.mark.parametrize('x', [torch.zeros(n+1, 3), tensor(1.), torch.zeros(0, 3)])
def test_other_rows_are_refused(x):
    with pytest.raises(ValueError, match=f"the mix has {n} rows"): blend(x, mix)

def test_a_mix_is_frozen_and_travels():
    with pytest.raises(AttributeError): mix.lam = 0
    for m in (copy.deepcopy(mix), pickle.loads(pickle.dumps(mix))): assert_close(m.lam, lams)
    assert len(mix)==n and mix in {mix}

@pytest.mark.parametrize('form', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.complex64])
def test_whole_large_rows_are_the_same_bit_for_bit(dtype, form):
    x = torch.randn(4, 3, 64, 64).to(dtype).to(memory_format=form)
    x[1],x[0,0] = float('inf'),-0.
    mix = Mix(tensor([1,2,3,1]), tensor([1.,1.,.5,1.]))
    for out in None,torch.empty_like(x):
        res = blend(x, mix, out)
        for i in 0,1,3: assert torch.equal(res[i].contiguous().view(torch.uint8), x[i].contiguous().view(torch.uint8))
        assert_close(res[2], torch.lerp(x[3], x[2], .5) if dtype!=torch.float16 else (.5*x[3].float()+.5*x[2].float()).half())
