"""tsai's learners for time series, and its own mixing callbacks beside ours."""
import numpy as np
import pytest
import torch
from looking import blends_inputs, fit
from tape import close, cross_entropy, lerped, paired, squared
from tsai.basics import TSClassification, TSRegression, TSTensor, get_ts_dls, ts_learner
from tsai.data.mixed_augmentation import CutMix1d, MixUp1d
from tsai.models.FCN import FCN
from tsai.models.InceptionTime import InceptionTime

from fastai_mixup_ext import CutMixCallback, MixCallback, MixUpCallback, cutmix, mixup, one_of

def learner(kind=TSClassification, arch=FCN, n=24):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n,2,20)).astype('float32')
    y = rng.integers(3, size=n) if kind is TSClassification else rng.normal(size=n).astype('float32')
    dls = get_ts_dls(x, y, splits=(list(range(16)), list(range(16, n))), tfms=[None, kind()], bs=8, num_workers=0, device='cpu')
    return ts_learner(dls, arch, arch_config=dict(nf=4) if arch is InceptionTime else {})

@pytest.mark.parametrize('arch', [InceptionTime,FCN])
@pytest.mark.parametrize('cb', [MixUpCallback,CutMixCallback])
def test_classification(cb, arch):
    steps = fit(learner(arch=arch), cb(seed=1))
    blends_inputs(steps)
    for o in steps:
        assert isinstance(o.x[0], TSTensor)
        close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))

def test_regression():
    steps = fit(learner(TSRegression), MixUpCallback(seed=1))
    blends_inputs(steps)
    for o in steps:
        close(o.yb[0], lerped(o.y[0], o.mix))
        close(o.loss, squared(o.pred.double().flatten(), lerped(o.y[0], o.mix).flatten()))

def test_a_switch_over_series():
    steps = fit(learner(), MixCallback(one_of(mixup(.4), cutmix(1.)), seed=2), epochs=4)
    assert {o.mix.mask is None for o in steps}=={True, False}
    blends_inputs(steps)
    for o in steps: close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))

@pytest.mark.parametrize('ours_first', [True,False])
@pytest.mark.parametrize('theirs', [MixUp1d,CutMix1d])
def test_a_second_mixing_callback_is_refused(theirs, ours_first):
    "Before anything is trained, by the names of both"
    learn = learner()
    cbs = [MixUpCallback(),theirs()]
    before = [p.clone() for p in learn.model.parameters()]
    loss_func = learn.loss_func
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match=rf'(?s)(?=.*\bMixUpCallback\b)(?=.*\b{theirs.__name__}\b)'):
        learn.fit(1, cbs=cbs if ours_first else cbs[::-1])
    assert all(map(torch.equal, before, learn.model.parameters())) and learn.loss_func is loss_func

@pytest.mark.parametrize('theirs', [MixUp1d,CutMix1d])
def test_theirs_alone_still_trains(theirs):
    learn = learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=theirs())
    steps = fit(learn, MixUpCallback(seed=1))
    for o in steps: close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))
