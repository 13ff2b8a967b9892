"""Laws of the pairing policies: who may be paired with whom, and how often."""
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import tensor

from common import named
from fastai_mixup_ext import across_class, balanced, by_target_distance, deranged, shuffled, within_class

def gen(seed=0): return torch.Generator().manual_seed(seed)

def frequencies(pair, y, draws=6000):
    "How often row i got partner j"
    g,x,res = gen(),torch.zeros(len(y), 1),torch.zeros(len(y), len(y))
    for _ in range(draws): res[torch.arange(len(y)), pair(x, y, g)] += 1
    return res.numpy()

def fits(counts, p):
    "No evidence against the frequencies `p`"
    p = np.asarray(p, dtype=float)
    assert counts[p==0].sum()==0
    return (p>0).sum()==1 or chisquare(counts[p>0], counts.sum()*p[p>0]/p.sum()).pvalue > 1e-4

batches = st.integers(1, 40).flatmap(lambda n: st.tuples(st.lists(st.integers(0, 3), min_size=n, max_size=n), st.integers(0, 2**31)))
policies = shuffled,deranged,within_class,across_class,by_target_distance(.5),balanced(),balanced([100, 30, 10, 1])

def targets(pair, y): return tensor(y).float() if isinstance(pair, by_target_distance) else tensor(y)

@pytest.mark.parametrize('pair', policies, ids=named)
@given(batches)
def test_partners_are_rows(pair, batch):
    y,seed = batch
    p = pair(torch.zeros(len(y), 2, 2), targets(pair, y), gen(seed))
    assert p.shape==(len(y),) and p.dtype==torch.int64 and p.min()>=0 and p.max()<len(y)

@pytest.mark.parametrize('pair', [shuffled,deranged,within_class], ids=named)
@given(batches)
def test_permutations(pair, batch):
    y,seed = batch
    assert sorted(pair(torch.zeros(len(y)), tensor(y), gen(seed)).tolist())==list(range(len(y)))

@given(batches)
def test_deranged_leaves_nobody_with_itself(batch):
    y,seed = batch
    p = deranged(torch.zeros(len(y)), (), gen(seed)).tolist()
    assert len(y)==1 or all(i!=j for i,j in enumerate(p))

@given(batches)
def test_within_class(batch):
    y,seed = batch
    size = Counter(y)
    for i,j in enumerate(within_class(torch.zeros(len(y)), tensor(y), gen(seed)).tolist()):
        assert y[i]==y[j] and (i!=j or size[y[i]]==1)

@given(batches)
def test_across_class(batch):
    y,seed = batch
    for i,j in enumerate(across_class(torch.zeros(len(y)), tensor(y), gen(seed)).tolist()):
        assert y[i]!=y[j] or i==j and len({*y})==1


# ---- frequencies

labels = tensor([0,0,1,1,1,2,0])
same = (labels[:,None]==labels).numpy()
nobody_else = np.eye(len(labels), dtype=bool)

@pytest.mark.parametrize('pair,allowed', [(shuffled,np.ones_like(same)), (deranged,~nobody_else), (across_class,~same),
    (within_class, (same&~nobody_else) | (nobody_else&(same.sum(1)==1)))], ids=lambda o: getattr(o, '__name__', ''))
def test_every_partner_allowed_is_as_likely(pair, allowed):
    for row,p in zip(frequencies(pair, labels), allowed): assert fits(row, p)

def test_every_permutation_is_as_likely():
    count = Counter(tuple(shuffled(torch.zeros(4), (), g).tolist()) for g in [gen()] for _ in range(4800))
    assert len(count)==24 and fits(np.array([*count.values()]), np.ones(24))

def test_deranged_draws_every_circle():
    count = Counter(tuple(deranged(torch.zeros(4), (), g).tolist()) for g in [gen()] for _ in range(4800))
    assert len(count)==6 and fits(np.array([*count.values()]), np.ones(6))

@pytest.mark.parametrize('h', [.3,1.,5.])
@pytest.mark.parametrize('y', [tensor([0.,.2,.5,1.,3.]), tensor([[0.,0.],[.3,.4],[1.,0.],[0.,2.]])], ids=['number','vector'])
def test_distance(y, h):
    "Kernel of the target distance, C-Mixup's formula: exp(-d^2/2h^2)"
    rows = y.view(len(y), -1).tolist()
    kernel = [[np.exp(-sum((a-b)**2 for a,b in zip(u, v))/(2*h*h)) for v in rows] for u in rows]
    for row,p in zip(frequencies(by_target_distance(h), y), [np.array(o)/sum(o) for o in kernel]):
        rare = p*row.sum()<5  # too rare for chi-squared
        assert row[rare].sum() <= 30
        assert fits(row[~rare], p[~rare])

@pytest.mark.parametrize('counts', [None, [100, 10, 1], [1, 1, 1], [.5, .25, 0]], ids=named)
def test_balanced(counts):
    "1 over the number of rows of the class, in a loop; a class without rows is taken where it is present"
    n = [labels.tolist().count(k) for k in range(3)] if counts is None else [max(o, 1e-12) for o in counts]
    p = np.array([1/n[k] for k in labels])
    for row in frequencies(balanced(counts), labels):
        if counts==[.5, .25, 0]: assert row[5]==row.sum()
        else: assert fits(row, p/p.sum())

def test_balanced_by_class():
    "Of the batch: each class is as likely, whatever its size"
    counts = frequencies(balanced(), labels).sum(0)
    assert fits(np.array([counts[labels==k].sum() for k in range(3)]), np.ones(3))

def test_balanced_over_batches():
    "A rare class is absent from most batches; given counts make up for it, those of the batch don't"
    g,sizes = gen(),[90, 9, 1]
    rows = torch.arange(3).repeat_interleave(tensor(sizes))
    def share(policy):
        ys = (rows[torch.randperm(100, generator=g)[:20]] for _ in range(1500))
        return torch.cat([y[policy(y, y, g)] for y in ys]).bincount(minlength=3)[2]/30_000
    by_batch,by_counts = share(balanced()),share(balanced(sizes))
    assert by_batch<.1<by_counts<1/3

@pytest.mark.parametrize('y', [tensor([0.,1e4,2e4]), tensor([1e8,1e8,0.])], ids=['far','large'])
def test_distance_far_beyond_the_bandwidth(y):
    "Then the nearest are drawn: no underflow, no nan"
    p = by_target_distance(1e-3)(torch.zeros(3), y, gen())
    assert (y[p]==y).all()

def test_near_targets_of_a_large_value_are_told_apart():
    y = tensor([1e9,1e9+1,1e9+2], dtype=torch.float64)
    for i,row in enumerate(frequencies(by_target_distance(1.), y, 3000)): assert fits(row, (-(y-y[i]).square()/2).exp().numpy())

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64], ids=named)
def test_distance_in_any_precision(dtype):
    y = tensor([0.,.5,300.]).to(dtype)
    row = frequencies(by_target_distance(1.), y, 2000)
    assert row[2,2]==2000 and fits(row[0,:2], [1,np.exp(-.125)])


# ---- which target counts

@pytest.mark.parametrize('y', [tensor([0,0,1,1]), tensor([[0],[0],[1],[1]], dtype=torch.int8), (torch.rand(4), tensor([0,0,1,1])),
    [torch.randint(9, (4,3)), tensor([0,0,1,1], dtype=torch.uint8)],
    tensor([False,False,True,True])], ids=['(n,)','(n,1) int8','behind a number','behind a table','bool'])
def test_the_label(y):
    assert within_class(torch.zeros(4), y, gen()).tolist()==[1,0,3,2]
    assert {*across_class(torch.zeros(4), y, gen())[:2].tolist()} <= {2,3}

@pytest.mark.parametrize('pair', [within_class,across_class,balanced(),balanced([1, 1])], ids=named)
@pytest.mark.parametrize('y', [(), torch.rand(4), torch.randint(9, (4,5))], ids=['none','float','map'])
def test_no_label_is_refused(pair, y):
    name = getattr(pair, '__name__', 'balanced')
    with pytest.raises(ValueError, match=f'{name} needs an integer target with one label per row.*shuffled'): pair(torch.zeros(4),
        y)

@pytest.mark.parametrize('y', [(), tensor([0,1,0,1])], ids=['none','labels'])
def test_distance_needs_a_number(y):
    with pytest.raises(ValueError, match='needs a floating target'): by_target_distance(1.)(torch.zeros(4), y)

@pytest.mark.parametrize('h', [0,-1,float('nan'),'1',None])
def test_a_bad_bandwidth_is_refused(h):
    with pytest.raises((ValueError,TypeError), match='bandwidth='): by_target_distance(h)

@pytest.mark.parametrize('pair', policies, ids=named)
def test_own_generator_only(pair):
    y,x = targets(pair, [0,0,1,1,2]),torch.zeros(5)
    state = torch.get_rng_state()
    a = pair(x, y, gen(3))
    assert (torch.get_rng_state()==state).all()
    torch.rand(7)
    assert (pair(x, y, gen(3))==a).all()
    torch.manual_seed(3)
    assert (pair(x, y)==a).all()

@pytest.mark.parametrize('pair', policies, ids=named)
def test_policies_pickle(pair):
    assert pickle.loads(pickle.dumps(pair))==pair

@pytest.mark.parametrize('pair', policies, ids=named)
def test_targets_are_not_written_to(pair):
    y = targets(pair, [0,0,1,1,2])
    before = y.clone()
    pair(torch.zeros(5), y)
    assert (y==before).all()

@pytest.mark.parametrize('pair', policies, ids=named)
def test_draws_name_their_device(pair):
    "Whatever torch's default is"
    y = targets(pair, [0,0,1,1,2])
    x = torch.zeros(5)
    with torch.device('meta'): assert pair(x, y).device.type=='cpu'
