"""RegMixUp: which rows stay clean, how the others are mixed, and the loss that comes out on average."""
import pickle

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.schedule import SchedLin
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, chisquare, kstest
from torch import tensor
from torch.testing import assert_close

from fastai_mixup_ext import Mix, blend, cutmix, deranged, mixed_loss, mixup, one_of, per_batch, regmixup

def gen(seed=0): return torch.Generator().manual_seed(seed)

@given(st.integers(1, 60), st.integers(0, 2**31))
def test_half_of_the_rows_are_clean(n, seed):
    "Of an odd number one more; the others are mixup's, drawn with the same numbers"
    x = torch.zeros(n, 2)
    mix,plain = regmixup(1.)(x, generator=gen(seed)),mixup(1.)(x, generator=gen(seed))
    clean = mix.lam!=plain.lam
    assert (mix.partner==plain.partner).all() and (mix.lam[clean]==1).all() and mix.mask is None
    assert clean.sum()<=(n+1)//2<=(mix.lam==1).sum()  # mixup itself may leave a row clean

def test_every_row_is_as_likely():
    g,counts = gen(),torch.zeros(7)
    for _ in range(4000): counts += regmixup()(torch.zeros(7, 1), generator=g).lam==1
    assert counts.sum()==4*4000 and chisquare(counts.numpy()).pvalue>1e-4

def test_the_clean_rows_pass_bit_for_bit():
    x = torch.randn(20, 3)
    x[3] = torch.nan
    for seed in range(20):
        mix = regmixup()(x, generator=gen(seed))
        clean = (mix.lam==1) & (torch.arange(20)!=3)
        assert (blend(x, mix)[clean]==x[clean]).all()

@pytest.mark.parametrize('alpha', [.4, 10., 20.])
def test_the_share_of_the_mixed(alpha):
    lam = regmixup(alpha)(torch.zeros(4000, 1), generator=gen()).lam
    lam = lam[lam<1].double().numpy()
    assert kstest(lam, lambda v: 2*beta(alpha, alpha).cdf(v)-1).pvalue>1e-4  # folded to the larger share

def test_the_mean_loss_is_the_mean_of_both_terms():
    "Over all choices of the clean rows, with the same shares and partners: exactly; a loop in float64"
    n,C,g = 4,3,gen()
    x,w,y = torch.randn(n, 2, generator=g).double(),torch.randn(2, C, generator=g).double(),torch.randint(C, (n,), generator=g)
    partner,lam = tensor([1,2,3,0]),torch.rand(n, generator=g).double()
    def ce(row, k): return -(row@w).log_softmax(0)[k]
    clean = sum(ce(x[i], y[i]) for i in range(n))/n
    mixed = sum(lam[i]*ce(lam[i]*x[i]+(1-lam[i])*x[j], y[i]) + (1-lam[i])*ce(lam[i]*x[i]+(1-lam[i])*x[j], y[j])
        for i,j in enumerate(partner))/n
    halves = [o for o in torch.cartesian_prod(*[tensor([True,False])]*n) if o.sum()==n//2]
    losses = []
    for half in halves:
        mix = Mix(partner, lam.masked_fill(half, 1.))
        losses.append(mixed_loss(F.cross_entropy, blend(x, mix)@w, y, mix))
    assert_close(torch.stack(losses).mean(), (clean+mixed)/2)

def test_off_and_on():
    assert not regmixup(0).active(0.) and regmixup().active(0.) and regmixup(SchedLin(0, 20)).active(.1)
    assert (regmixup(0)(torch.zeros(9, 1)).lam==1).all()
    assert regmixup(SchedLin(0, 20))(torch.zeros(9, 1), progress=1.).lam.min()<1

@pytest.mark.parametrize('alpha', [-1, 'much', None, True])
def test_a_bad_alpha_is_refused_at_once(alpha):
    with pytest.raises((TypeError, ValueError), match='alpha='): regmixup(alpha)

def test_a_value():
    assert regmixup()==regmixup(20.)==pickle.loads(pickle.dumps(regmixup())) and hash(regmixup())==hash(regmixup(20.))

def test_with_others():
    x = torch.randn(8, 1, 6, 6)
    mix = one_of(regmixup(), cutmix(), per_row=True)(x)
    assert mix.mask.shape==(8,1,6,6)
    assert (regmixup()(x, pair=deranged).partner!=torch.arange(8)).all()

def test_one_share_for_the_batch_is_a_clean_or_a_mixed_batch():
    g = gen()
    lams = torch.stack([per_batch(regmixup())(torch.zeros(4, 1), generator=g).lam for _ in range(2000)])
    assert (lams==lams[:,:1]).all() and abs((lams[:,0]==1).float().mean()-.5)<.05
