"""What the recipes draw: the labels' weights are the pictures' shares, and the draws follow their distributions."""
import copy
import pickle
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.mixup import CutMix
from scipy.stats import beta, binomtest, chisquare, ks_2samp, kstest, uniform
from torch import nn, tensor
from torch.testing import assert_close

from common import covering
from fastai_mixup_ext import (Mix, Recipe, across_class, blend, by_target_distance, cutmix, deranged, fmix, mixed_loss, mixup, one_of,
    per_batch, resizemix, shuffled, within_class)
from fastai_mixup_ext.recipes import draw_beta

class stripes(Recipe):
    "A recipe of the user's own: the last rows of the picture are the partner's"
    def draw(self, batch):
        x = batch.x
        rows = torch.randint(x.shape[2]+1, (len(x),), device=x.device, generator=batch.generator)
        kept = torch.arange(x.shape[2], device=x.device) < rows[:,None]
        mask = kept.view(len(x), 1, -1, *[1]*(x.dim()-3)).expand(-1, -1, *x.shape[2:])
        return Mix(batch.partner, rows.float()/x.shape[2], mask)

class constant(Recipe):
    "Another: every row keeps `lam`"
    def __init__(self, lam): self.lam = lam
    def draw(self, batch): return Mix(batch.partner, torch.full((len(batch),), self.lam, device=batch.device))

recipes = {  # each for any number of spatial axes
    'mixup': mixup(.4), 'mixup8': mixup(8),
    'cutmix': cutmix(1.), 'cutmix.2': cutmix(.2),
    'fmix': fmix(), 'fmix rough': fmix(.5, 1.),
    'resizemix': resizemix(), 'resizemix all': resizemix((.01,1.)),
    'one_of': one_of(mixup(1.), cutmix(1.)),
    'one_of rows': one_of(mixup(1.), cutmix(1.), fmix(), resizemix(), per_row=True),
    'one_of cuts': one_of(cutmix(), fmix(), resizemix(), per_row=True),
    'one_of one_of': one_of(one_of(mixup(1.), cutmix(), per_row=True), resizemix()),
    'per_batch': per_batch(cutmix()), 'per_batch resizemix': per_batch(resizemix()),
    'per_batch one_of': per_batch(one_of(mixup(1.), resizemix(), per_row=True)),
    'one_of per_batch': one_of(per_batch(mixup(1.)), fmix(), per_row=True),
    'stripes': stripes(), 'one_of stripes': one_of(stripes(), mixup(1.))}
shapes = {'series': (17,), 'square': (16,16), 'oblong': (33,7), 'wide': (32,64), 'line': (1,9), 'point': (1,1), 'volume': (5,6,7)}
each_recipe = pytest.mark.parametrize('recipe', recipes.values(), ids=recipes)
each_shape = pytest.mark.parametrize('spatial', shapes.values(), ids=shapes)

def gen(seed=0): return torch.Generator().manual_seed(seed)
def rows(n, *spatial): return torch.zeros(n, 1, *spatial)
rows_on_cpu = rows(6, 8, 6)

def label_weights(mix, n):
    "What the loss of each row counts each label for: a loss that is linear in the prediction tells"
    pred = torch.zeros(n, n, dtype=torch.float64, requires_grad=True)
    mixed_loss(nn.NLLLoss(reduction='sum'), pred, torch.arange(n), mix).backward()
    return -pred.grad


# ---- the audit

policies = {'shuffled': shuffled, 'deranged': deranged, 'within_class': within_class, 'across_class': across_class,
    'by_target_distance': by_target_distance(3.)}

@pytest.mark.parametrize('recipe,shape,pair,dtype', covering(product(recipes, shapes, policies, (torch.float32,torch.float64))))
def test_the_loss_carries_the_shares_of_the_pixels(recipe, shape, pair, dtype):
    "Picture i is 1 in channel i only, so that the means of the channels are the weights of the labels; a mask has the same share"
    n,spatial = 9,shapes[shape]
    x = torch.eye(n, dtype=dtype).view(n, n, *[1]*len(spatial)).expand(n, n, *spatial).contiguous()
    for seed in range(3):
        mix = recipes[recipe](x, (torch.arange(n)//4, torch.arange(n).float()), pair=policies[pair], generator=gen(seed))
        assert mix.lam.shape==(n,) and mix.lam.dtype==torch.float32 and mix.lam.min()>=0 and mix.lam.max()<=1
        assert_close(blend(x, mix).flatten(2).mean(2).double(), label_weights(mix, n), rtol=0, atol=3e-6)
        if mix.mask is not None: assert_close(mix.mask.float().flatten(1).mean(1).expand(n), mix.lam, rtol=0, atol=2e-6)

@pytest.mark.parametrize('dtype', [torch.uint8,torch.float16,torch.bfloat16], ids=str)
@each_recipe
def test_any_dtype_draws_the_same(recipe, dtype):
    a,b = (recipe(rows(5, 8, 6).to(d), generator=gen()) for d in (dtype,torch.float32))
    for p,q in zip(vars(a).values(), vars(b).values()): assert p is q is None or (p==q).all()


# ---- distributions

def folded(alpha):
    "The distribution of max(B, 1-B)"
    return lambda l: beta.cdf(l, alpha, alpha)-beta.cdf(1-l, alpha, alpha)

@pytest.mark.parametrize('alpha', [.05,.2,.4,1.,3,50.])
def test_mixup_lam(alpha):
    lam = mixup(alpha)(rows(20000), generator=gen()).lam
    assert lam.min()>=.5
    lam = lam[lam<1-1e-6]  # float32 rounds the rest to 1
    assert abs(len(lam)/20000-folded(alpha)(1-1e-6))<.02
    assert kstest(lam.double().numpy(), lambda l: folded(alpha)(l)/folded(alpha)(1-1e-6)).pvalue>1e-3

@pytest.mark.parametrize('formula', [False,True], ids=['as chosen','formula'])
@pytest.mark.parametrize('alpha', [.05,.4,1.,3.,50.])
def test_beta(alpha, formula, monkeypatch):
    "Also by the formula that compiled code and other devices use"
    if formula: monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    b = draw_beta(40000, alpha, generator=gen()).double().numpy()
    b = b[(b>1e-5)&(b<1-1e-5)]
    lo,hi = beta.cdf([1e-5,1-1e-5], alpha, alpha)
    assert binomtest(len(b), 40000, hi-lo).pvalue>1e-4
    assert kstest(b, lambda t: (beta.cdf(t, alpha, alpha)-lo)/(hi-lo)).pvalue>1e-3

@pytest.mark.parametrize('alpha', [1e-6,1e-4,1e-3,5e-3,.0099,.01,.02])
def test_beta_of_a_tiny_alpha(alpha):
    "Where torch's own sampler inverts: almost every draw is at an end, both ends alike"
    b = draw_beta(100000, alpha, generator=gen())
    assert b.isfinite().all() and b.min()>=0 and b.max()<=1
    for lo,hi in ((.05,.95), (.3,.7)):
        assert binomtest(int(((b>lo)&(b<hi)).sum()), 100000, beta.cdf(hi, alpha, alpha)-beta.cdf(lo, alpha, alpha)).pvalue>1e-4
    assert binomtest(int((b>.5).sum()), 100000).pvalue>1e-4

def test_mixup_draws_what_fastai_draws():
    for alpha in (.02,.4,1,8.):
        torch.manual_seed(5)
        mix = mixup(alpha)(rows(64))
        torch.manual_seed(5)
        lam = torch.distributions.Beta(tensor(float(alpha)), tensor(float(alpha))).sample((64,))
        assert (mix.lam==torch.max(lam, 1-lam)).all() and (mix.partner==torch.randperm(64)).all()

def box_of(cut):
    "First and last+1 position along each axis of what is cut out of a row; None: nothing is"
    where = cut.nonzero()
    return None if not len(where) else (where.min(0).values, where.max(0).values+1)

@each_shape
@pytest.mark.parametrize('recipe', [cutmix(1.),cutmix(4.),resizemix()], ids=str)
def test_what_is_cut_is_a_box(recipe, spatial):
    mix = recipe(rows(60, *spatial), generator=gen())
    for m,l in zip(~mix.mask[:,0], mix.lam):
        box = box_of(m)
        if box is None: assert l==1
        else:
            area = (box[1]-box[0]).prod()
            assert m.sum()==area
            assert_close(l, 1-area/m.numel(), rtol=0, atol=1e-6)

def cutmix_by_hand(rng, alpha, spatial):
    "The paper's box, drawn in numpy: its sides, around a uniform centre, clipped"
    side = (1-rng.beta(alpha, alpha))**(1/len(spatial))
    cut = np.ones(spatial, dtype=bool)
    for axis,s in enumerate(spatial):
        size,centre = int(s*side),rng.integers(s)
        lo = centre-size//2
        pos = np.arange(s)
        cut &= ((pos>=lo)&(pos<lo+size)).reshape([-1 if a==axis else 1 for a in range(len(spatial))])
    return cut

@pytest.mark.parametrize('alpha', [.3,1.,4.])
@pytest.mark.parametrize('spatial', [(17,), (33,7), (32,64), (5,6,7)], ids=str)
def test_cutmix_shares_and_places(spatial, alpha):
    n,rng = 3000,np.random.default_rng(0)
    mix = cutmix(alpha)(rows(n, *spatial), generator=gen())
    cuts = np.stack([cutmix_by_hand(rng, alpha, spatial) for _ in range(n)])
    ours = (~mix.mask[:,0]).numpy()
    assert ks_2samp(*(o.reshape(n, -1).sum(1) for o in (ours,cuts))).pvalue>1e-3
    for axis in range(len(spatial)):  # how often each line is touched, and where the box begins
        other = tuple(a+1 for a in range(len(spatial)) if a!=axis)
        a,b = (o.any(other) for o in (ours,cuts))
        assert (np.abs(a.mean(0)-b.mean(0)) < 5*np.sqrt(.5/n)).all()
        assert ks_2samp(a.argmax(1), b.argmax(1)).pvalue>1e-3

def test_cutmix_centres_are_uniform():
    "A small box that is not clipped begins at any place alike"
    mix = cutmix(1.)(rows(60000, 20), generator=gen())
    cut = ~mix.mask[:,0]
    lo,size = cut.int().argmax(1),cut.sum(1)
    inner = lo[(size==3)&(lo>0)&(lo<17)]  # size 3 and away from the edges: not clipped
    assert chisquare(torch.bincount(inner, minlength=17)[1:17].numpy()).pvalue>1e-4

@pytest.mark.parametrize('alpha', [.3,1.,4.])
def test_fmix_share(alpha):
    lam = torch.stack([fmix(alpha)(rows(2, 24, 24), generator=g).lam[0] for g in [gen()] for _ in range(1500)])
    rng = np.random.default_rng(0)
    assert ks_2samp((576*lam).round().numpy(), np.round(576*rng.beta(alpha, alpha, 6000))).pvalue>1e-3

@pytest.mark.parametrize('spatial', [(24,24), (33,7), (64,), (8,9,10)], ids=str)
def test_fmix_is_smooth_and_its_share_exact(spatial):
    "Few borders between the two pictures, and fewer the larger the decay"
    def borders(decay):
        count = total = 0
        g = gen()
        for _ in range(40):
            mix = fmix(5., decay)(rows(2, *spatial), generator=g)
            m = mix.mask[0,0].float()
            assert_close(m.mean(), mix.lam[0], rtol=0, atol=1e-6)
            assert mix.mask.shape==(1, 1, *spatial) and (mix.lam==mix.lam[0]).all()
            for axis in range(m.dim()): count,total = count+m.diff(dim=axis).abs().sum(), total+m.diff(dim=axis).numel()
        return count/total
    white,rough,smooth = map(borders, (0.,1.,3.))
    assert .35<white<.55 and smooth<rough<white and smooth<.5*white

def test_fmix_has_no_preferred_place():
    m = torch.cat([fmix(1.)(rows(1, 8, 8), generator=g).mask for g in [gen()] for _ in range(2000)]).float().mean((0,1))
    assert (m-.5).abs().max()<.06

@pytest.mark.parametrize('scale', [(.1,.8),(.5,.5),(.01,1.)])
@pytest.mark.parametrize('spatial', [(40,), (33,7), (32,64), (12,10,8)], ids=str)
def test_resizemix_boxes(spatial, scale):
    n = 4000
    mix = resizemix(scale)(rows(n, *spatial), generator=gen())
    start,size = (mix.box*tensor(spatial)).round().long().unbind(1)
    assert_close(mix.box*tensor(spatial), torch.stack([start,size], 1).float(), rtol=0, atol=1e-4)
    assert (start>=0).all() and (start+size<=tensor(spatial)).all() and (size>=1).all()
    rng = np.random.default_rng(0)
    tau = rng.uniform(*scale, n)
    for i,s in enumerate(spatial):
        by_hand = np.clip(np.round(tau*s), 1, s)
        assert ks_2samp(size[:,i].numpy(), by_hand, method='asymp').pvalue>1e-3
        assert ks_2samp(start[:,i].numpy(), rng.integers(0, s-by_hand.astype(int)+1), method='asymp').pvalue>1e-3
    assert_close(mix.lam, 1-size.prod(1)/np.prod(spatial), check_dtype=False)
    for k in range(20):
        cut = torch.ones(spatial, dtype=torch.bool)
        for i,s in enumerate(spatial):
            pos = torch.arange(s)
            cut &= ((pos>=start[k,i])&(pos<(start+size)[k,i])).view([-1 if a==i else 1 for a in range(len(spatial))])
        assert (~mix.mask[k,0]==cut).all()


# ---- peers and loops as oracles

@pytest.mark.parametrize('spatial', [(40,), (16,16), (33,7), (32,64), (6,8,10)], ids=str)
def test_resizemix_is_interpolate_row_by_row(spatial):
    n,mode = 12,{1:'linear', 2:'bilinear', 3:'trilinear'}[len(spatial)]
    x = torch.randn(n, 3, *spatial)
    for seed in range(5):
        mix = resizemix((.05,1.))(x, generator=gen(seed))
        expected = x.clone()
        for i,j in enumerate(mix.partner):
            lo,hi = box_of(~mix.mask[i,0])
            small = F.interpolate(x[j][None], size=(hi-lo).tolist(), mode=mode, align_corners=False)[0]
            expected[(i, slice(None), *map(slice, lo, hi))] = small
        assert_close(blend(x, mix), expected, rtol=1e-4, atol=1e-4)

def test_resizemix_pastes_label_maps():
    "Class per position: shrunk to the nearest position, as F.interpolate's nearest-exact"
    y = torch.randint(256, (6,1,32,64))
    mix = resizemix((.25,.25))(y.float(), generator=gen())
    expected = y.clone()
    for i,j in enumerate(mix.partner):
        (r,c),(r1,c1) = box_of(~mix.mask[i,0])
        expected[i,:,r:r1,c:c1] = F.interpolate(y[j][None].double(), size=(8,16), mode='nearest-exact')[0].long()
    same = blend(y[:,0], mix)==expected[:,0]
    assert same.float().mean()>.95 and same[mix.mask[:,0]].all()  # halfway, the two round apart

def fastai_cutmix(x, y, box, partner, monkeypatch):
    cb = CutMix(1.)
    cb.learn,cb.stack_y = SimpleNamespace(x=x.clone(), y=y, xb=(x.clone(),), yb=(y,)),True
    monkeypatch.setattr(CutMix, 'rand_bbox', lambda *a: box)
    monkeypatch.setattr(torch, 'randperm', lambda n, **kw: partner)
    cb.before_batch()
    return cb.learn.xb[0],cb.lam

@pytest.mark.parametrize('spatial', [(16,16), (33,7), (32,64)], ids=str)
def test_fastais_cutmix_with_our_box(spatial, monkeypatch):
    x,y = torch.randn(8, 3, *spatial),torch.arange(8)
    for seed in range(8):
        mix = per_batch(cutmix(1.))(x, generator=gen(seed))
        box = box_of(~mix.mask[0,0])
        (r,c),(r1,c1) = box or (tensor([0,0]),)*2
        with monkeypatch.context() as m: theirs,lam = fastai_cutmix(x, y, (c,r,c1,r1), mix.partner, m)
        assert_close(blend(x, mix), theirs, rtol=0, atol=0)
        assert_close(mix.lam[0], torch.as_tensor(lam, dtype=torch.float32))

def params_of(t): return next(o for o in ('make_params', '_get_params') if hasattr(t, o))  # what draws; the second before torchvision 0.20

@pytest.mark.parametrize('spatial', [(16,16), (33,7), (32,64)], ids=str)
def test_torchvisions_cutmix_with_our_box(spatial, monkeypatch):
    v2 = pytest.importorskip('torchvision.transforms.v2')
    n = 6
    x,y = torch.randn(n, 3, *spatial),torch.arange(n)
    roll = lambda x, yb, generator: (torch.arange(len(x))-1)%len(x)
    for seed in range(8):
        mix = per_batch(cutmix(1.))(x, pair=roll, generator=gen(seed))
        (r,c),(r1,c1) = (o.tolist() for o in box_of(~mix.mask[0,0]) or (tensor([0,0]),)*2)
        t = v2.CutMix(num_classes=n)
        monkeypatch.setattr(t, params_of(t), lambda flat, box=(c,r,c1,r1), lam=float(mix.lam[0]): dict(box=box, lam_adjusted=lam))
        theirs,labels = t(x, y)
        assert_close(blend(x, mix), theirs, rtol=0, atol=0)
        assert_close(label_weights(mix, n), labels.double(), rtol=0, atol=1e-6)

def test_torchvisions_mixup_with_our_lam(monkeypatch):
    v2 = pytest.importorskip('torchvision.transforms.v2')
    x,y = torch.randn(6, 3, 5, 4),torch.arange(6)
    mix = per_batch(mixup(1.))(x, pair=lambda x, *_: (torch.arange(len(x))-1)%len(x), generator=gen())
    t = v2.MixUp(num_classes=6)
    monkeypatch.setattr(t, params_of(t), lambda flat: dict(lam=float(mix.lam[0])))
    theirs,labels = t(x, y)
    assert_close(blend(x, mix), theirs)
    assert_close(label_weights(mix, 6), labels.double(), rtol=0, atol=1e-6)


# ---- choosing among recipes

@pytest.mark.parametrize('per_row', [False,True], ids=['per batch','per row'])
@pytest.mark.parametrize('weights', [None,[1,2,5],[.2,0,.1],[0,0,3]], ids=str)
def test_one_of_chooses_by_weight(weights, per_row):
    r,w = one_of(constant(.1), constant(.2), constant(.3), weights=weights, per_row=per_row),np.array(weights or [1,1,1])
    g,x = gen(),rows(1 if per_row else 3)
    lams = r(rows(4000), generator=g).lam if per_row else torch.stack([r(x, generator=g).lam for _ in range(2500)])
    if not per_row: assert (lams==lams[:,:1]).all()
    count = torch.bincount((lams.flatten()*10).round().long()-1, minlength=3).numpy()/(1 if per_row else 3)
    assert (count[w==0]==0).all()
    if (w>0).sum()>1: assert chisquare(count[w>0], count.sum()*w[w>0]/w.sum()).pvalue>1e-4

def test_one_of_rows_are_what_their_recipe_draws():
    "Interpolated rows have one share everywhere, cut rows have shares of 0 and 1"
    x = torch.randn(2000, 1, 12, 12)
    mix = one_of(mixup(1.), cutmix(1.), per_row=True)(x, generator=gen())
    own = mix.mask.flatten(1)
    cut = ((own==0)|(own==1)).all(1)
    even = (own==own[:,:1]).all(1)
    assert (cut|even).all() and binomtest(int(cut.sum()), 2000).pvalue>1e-4
    assert_close(own.mean(1), mix.lam)
    assert kstest(mix.lam[~cut].numpy(), uniform(.5, .5).cdf).pvalue>1e-3  # Beta(1,1), folded

def test_one_of_applies_a_box_only_to_its_own_rows():
    x = torch.randn(40, 2, 16, 12)
    mix = one_of(cutmix(1.), resizemix(), per_row=True)(x, generator=gen())
    whole = (mix.box==tensor([[0.,0],[1,1]])).all(-1).all(-1)
    assert 5<whole.sum()<35
    assert_close(blend(x, mix)[whole], torch.where(mix.mask, x, x[mix.partner])[whole], rtol=1e-4, atol=1e-5)

def test_per_batch():
    for r in (mixup(1.),cutmix(1.),fmix(),resizemix(),one_of(mixup(1.), cutmix(), per_row=True)):
        mix = per_batch(r)(rows(9, 8, 6), generator=gen())
        assert mix.lam.shape==(9,) and (mix.lam==mix.lam[0]).all()
        assert mix.mask is None or len(mix.mask)==1
        assert mix.box is None or len(mix.box)==1

def test_per_batch_refuses_a_mix_of_its_own_kind():
    "Its further shares would be lost"
    class Several(Mix): pass
    class Draws(Recipe):
        def draw(self, batch): return Several(batch.partner, torch.ones(len(batch)))
    with pytest.raises(TypeError, match="draws a Several, which can't get one share for the batch; use a loss that is taken apart"):
        per_batch(Draws())(rows(4))

@pytest.mark.parametrize('args,kw,error,says', [((),{},TypeError,'needs two or more recipes'), ((mixup(),),{},TypeError,'two or more'),
    ((mixup(),cutmix),{},TypeError,'one_of'),
    ((mixup(),cutmix()),dict(weights=[1]),ValueError,'one entry for each of the 2'),
    ((mixup(),cutmix()),dict(weights=2),TypeError,'weights'), ((mixup(),cutmix()),dict(weights=[0,0]),ValueError,'must not all be 0'),
    ((mixup(),cutmix()),dict(weights=[1,-1]),ValueError,'weight=-1'),
    ((mixup(),cutmix()),dict(weights=['a',1]),TypeError,"weight='a'")])
def test_one_of_refuses(args, kw, error, says):
    with pytest.raises(error, match=says): one_of(*args, **kw)

@pytest.mark.parametrize('f,says', [(lambda: resizemix((.5,.1)), 'scale='), (lambda: resizemix((0,.5)), 'scale='),
    (lambda: resizemix((.1,1.5)), 'scale='), (lambda: resizemix(.5), 'scale='),
    (lambda: resizemix(('a','b')), 'scale='), (lambda: resizemix((.1,.2,.3)), 'scale='), (lambda: fmix(1., -1),
        'decay='), (lambda: fmix(1., float('nan')), 'decay='), (lambda: fmix(1., 'fast'), 'decay='),
    (lambda: per_batch(.4), 'recipe'), (lambda: per_batch(mixup), 'recipe')])
def test_bad_arguments_are_refused_at_once(f, says):
    with pytest.raises((ValueError,TypeError), match=says): f()


# ---- laws

taken = {  # what a recipe draws for 6 rows of 8 by 5 positions, before the partners: whoever changes it changes what users' seeds mean
    mixup(.4): lambda g: draw_beta(6, .4, generator=g),
    cutmix(.4): lambda g: (draw_beta(6, .4, generator=g), torch.rand(6, 2, generator=g)),
    resizemix(): lambda g: torch.rand(6, 3, generator=g),
    fmix(.4): lambda g: (draw_beta(1, .4, generator=g), torch.randn(8, 5, generator=g)),
    per_batch(mixup(.4)): lambda g: draw_beta(6, .4, generator=g),
    one_of(mixup(.4), resizemix()): lambda g: (torch.rand(1, generator=g), draw_beta(6, .4, generator=g))}

@pytest.mark.parametrize('recipe,take', taken.items(), ids=map(str, taken))
def test_nothing_more_is_drawn(recipe, take):
    ours,theirs = gen(),gen()
    mix = recipe(rows(6, 8, 5), generator=ours)
    take(theirs)
    assert torch.equal(mix.partner, torch.randperm(6, generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())

cuts = cutmix(),fmix(),resizemix()

@pytest.mark.parametrize('recipe', cuts, ids=str)
@pytest.mark.parametrize('shape', [(8,), (8,5)], ids=str)
def test_a_vector_can_not_be_cut(recipe, shape):
    with pytest.raises(ValueError, match=rf"{type(recipe).__name__} needs positions.*\({shape[0]},.*use mixup"): recipe(torch.zeros(shape))

@pytest.mark.parametrize('recipe', [mixup(0),cutmix(0),fmix(0)], ids=str)
def test_alpha_zero_is_the_identity(recipe):
    x = torch.randn(5, 2, 6, 4)
    mix = recipe(x)
    assert (mix.lam==1).all() and not recipe.active(.5)
    assert_close(blend(x, mix), x, rtol=0, atol=0)

@each_recipe
def test_own_generator_only(recipe):
    x = rows(6, 8, 6)
    state = torch.get_rng_state()
    a = recipe(x, generator=gen(3))
    assert (torch.get_rng_state()==state).all()
    torch.rand(5)
    b = recipe(x, generator=gen(3))
    torch.manual_seed(3)
    c = recipe(x)
    for p,q,r in zip(*(vars(o).values() for o in (a,b,c))): assert p is q is r is None or ((p==q)&(q==r)).all()
    assert not (recipe(x, generator=gen(4)).lam==a.lam).all()

@each_recipe
def test_a_batch_of_one(recipe):
    x = torch.randn(1, 2, 8, 6)
    assert_close(blend(x, recipe(x))[0], x[0], rtol=1e-5, atol=1e-5) if recipe(x).box is None else blend(x, recipe(x))

@each_recipe
def test_recipes_pickle_copy_and_show(recipe):
    for r in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe)):
        assert (r(rows(4, 6, 6), generator=gen()).lam==recipe(rows(4, 6, 6), generator=gen()).lam).all()
    assert '0x' not in repr(recipe) or isinstance(recipe, (stripes, one_of))

@each_recipe
def test_draws_name_their_device(recipe):
    "Whatever torch's default is"
    with torch.device('meta'): mix = recipe(rows_on_cpu, pair=lambda x, *_: torch.zeros(len(x), dtype=torch.int64, device=x.device))
    assert all(t is None or t.device.type=='cpu' for t in vars(mix).values())

@each_recipe
def test_draws_under_a_double_default(recipe):
    torch.set_default_dtype(torch.float64)
    try: mix = recipe(torch.randn(6, 2, 8, 6, dtype=torch.float32), generator=gen())
    finally: torch.set_default_dtype(torch.float32)
    assert mix.lam.dtype==torch.float32
    assert blend(torch.randn(6, 2, 8, 6), mix).dtype==torch.float32

def test_a_recipe_without_draw_says_so():
    class unfinished(Recipe): pass
    with pytest.raises(NotImplementedError, match='unfinished must define draw'): unfinished()(rows(2))

def test_fresh_tensors_each_time():
    "A mix that was kept is not written to by the next draw"
    x = rows(6, 8, 6)
    for r in recipes.values():
        first = r(x)
        kept = [None if t is None else t.clone() for t in vars(first).values()]
        r(x)
        for t,k in zip(vars(first).values(), kept): assert t is k is None or (t==k).all()
