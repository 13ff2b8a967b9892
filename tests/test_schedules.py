"""Numbers, and functions of the fraction of training done."""
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from fastai.callback.schedule import SchedCos, SchedExp, SchedLin, SchedNo, SchedPoly, combine_scheds
from hypothesis import given
from hypothesis import strategies as st

from fastai_mixup_ext import (CutMixCallback, FMixCallback, MixCallback, MixUpCallback, cutmix, fmix, mixup, one_of, until,
    without_hesitation)
from fastai_mixup_ext.schedules import check_value, value_at

inf,nan = float('inf'),float('nan')

@pytest.mark.parametrize('name,make', [('alpha',mixup), ('alpha',cutmix), ('alpha',fmix), ('alpha',MixUpCallback),
    ('alpha',CutMixCallback), ('alpha',FMixCallback),
    ('p',lambda p: MixUpCallback(p=p)), ('p',lambda p: MixCallback(cutmix(), p=p)), ('frac',until)])
@pytest.mark.parametrize('value,error', [(-.1,ValueError), (nan,ValueError), (inf,ValueError), (-inf,ValueError), ('1',TypeError),
    (None,TypeError), (True,TypeError), ([.5],TypeError), (1j,TypeError)])
def test_a_bad_number_is_refused_at_once(name, make, value, error):
    "By its name, its value, the rule and the remedy"
    with pytest.raises(error) as e: make(value)
    assert f"{name}={value!r} must be a" in str(e.value) and 'switches mixing off' in str(e.value)

@pytest.mark.parametrize('p', [1.001,2,inf])
def test_a_probability_is_at_most_one(p):
    with pytest.raises(ValueError, match=r'must be a number from 0 to 1\b'): MixUpCallback(p=p)

@pytest.mark.parametrize('value', [0,1,.4,np.float32(.5),np.int64(1),Fraction(1, 2)])
def test_any_real_number_is_a_number(value): assert mixup(value).alpha==value and MixUpCallback(value, p=value).p==value

scheds = {'cos': SchedCos(1, 0), 'lin': SchedLin(.1, .9), 'exp': SchedExp(1e-3, 1), 'no': SchedNo(.3, .3), 'poly': SchedPoly(0, 1, 2),
    'combined': combine_scheds([.25,.75], [SchedLin(0, 1), SchedCos(1, 0)]),
    'lambda': lambda t: t**2, 'tensor': lambda t: torch.tensor(t), 'numpy': lambda t: np.float64(t), 'until': until(.5, .7),
    'without_hesitation': without_hesitation()}

@pytest.mark.parametrize('f', scheds.values(), ids=scheds)
@given(st.floats(0, 1))
def test_a_function_is_called_with_the_fraction(f, t):
    value = value_at('p', f, t, 1.)
    assert value==float(f(t)) and 0<=value<=1+1e-9

@pytest.mark.parametrize('value,error', [(-.1,ValueError), (1.5,ValueError), (nan,ValueError), ('much',TypeError), (None,TypeError)])
def test_a_function_is_held_to_the_rule(value, error):
    with pytest.raises(error, match=r'p\(0.25\)=.* must be a number from 0 to 1'): value_at('p', lambda t: value, .25, 1.)

@given(st.floats(0, 1), st.floats(0, 1))
def test_until(frac, t):
    assert until(frac)(t)==(1. if t<frac else 0.)
    assert until(frac, lambda t: 3*t)(t)==(3*t if t<frac else 0.)

@pytest.mark.parametrize('frac', [-.1,1.1,nan,'half'])
def test_until_takes_a_fraction(frac):
    with pytest.raises((ValueError,TypeError), match='frac='): until(frac)

def test_until_refuses_a_bad_value():
    with pytest.raises((ValueError,TypeError), match='value='): until(.5, -1)

# ---- mixup without hesitation

def share_of_the_authors(epoch, epochs=100, start=60, end=90):
    "The share of mixed batches in the two epochs around `epoch`, as github.com/yuhao318/mwh has it for 100 epochs"
    if epoch>=end: return (epochs-epoch)/(epochs-end)
    return .5 if epoch>=start else 1.

@pytest.mark.parametrize('epoch', range(100))
def test_without_hesitation_is_that_of_the_authors(epoch):
    assert without_hesitation()(epoch/100)==pytest.approx(share_of_the_authors(epoch))

@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_without_hesitation(a, b, t):
    half,fade = sorted((a, b))
    p = without_hesitation(half, fade)(t)
    assert 0<=p<=1 and p==(1 if t<half else .5 if t<fade else pytest.approx((1-t)/(1-fade)) if t<1 else 0)

def test_the_batches_without_hesitation():
    "In a fit of 1,000 batches: 600, about half of 300, and about half of 100"
    cb = MixUpCallback(p=without_hesitation(), seed=0)
    mixed = torch.tensor([value_at('p', cb.p, t/1000, 1.) for t in range(1000)])
    assert (mixed[:600]==1).all() and (mixed[600:900]==.5).all() and mixed[900:].mean()==pytest.approx(.505, abs=.001)

@pytest.mark.parametrize('ends', [(-.1, .9), (.9, .6), (.6, 1.1), (nan, .9), ('a', .9), (None, 1), (True, 1), (.6, True)])
def test_bad_ends_are_refused(ends):
    with pytest.raises(ValueError, match=r'half=.* and fade=.* must be fractions of training'): without_hesitation(*ends)

def test_whole_training():
    assert [until(1.)(t) for t in (0., .5, .999)]==[1.]*3 and until(0.)(0.)==0

@pytest.mark.parametrize('o', [until(.8, .4), without_hesitation()], ids=str)
def test_schedules_pickle(o): assert pickle.loads(pickle.dumps(o))==o

def test_alpha_follows_its_schedule():
    "The mean share falls as alpha rises: alpha 0 is no mixing, alpha 50 is half and half"
    r,x = mixup(SchedLin(0, 50)),torch.zeros(4000, 1)
    assert (r(x, progress=0.).lam==1).all() and not r.active(0.) and r.active(.1)
    assert abs(r(x, progress=1.).lam.mean()-.5)<.06

def test_weights_follow_their_schedules():
    r,x = one_of(mixup(1.), cutmix(1.), weights=[until(.5), SchedLin(0, 1)]),torch.zeros(8, 1, 6, 6)
    assert all(r(x, progress=0.).mask is None for _ in range(9))
    assert all(r(x, progress=.7).mask.dtype==torch.bool for _ in range(9))

def test_all_weights_zero_is_no_mixing():
    r = one_of(mixup(1.), cutmix(1.), weights=[until(.5), until(.5)])
    assert r.active(.4) and not r.active(.6)

def test_check_value_gives_the_value_back():
    f = SchedCos(0, 1)
    assert check_value('p', f) is f and check_value('p', .3)==.3

def test_a_schedule_that_returns_an_endless_number_is_refused():
    with pytest.raises(ValueError, match=r'alpha\(0.5\)=.* must be a finite number'): value_at('alpha', lambda progress: 10**400, .5)
