"""Paired comparisons: the statistics against oracles, the pairing, and the law of `mix_find`: the learner is as it was."""
import dataclasses
import functools
import itertools
import math
import random
import re
import types

import numpy as np
import pandas as pd
import pytest
import torch
from fastai import metrics as fastai_metrics
from fastai.basics import (Callback, CancelFitException, CancelTrainException, CancelValidException, CrossEntropyLossFlat, DataLoaders,
    Datasets, Learner, MSELossFlat, OptimWrapper, Recorder, TrainEvalCallback, Transform, accuracy, error_rate, noop, set_seed,
    trainable_params)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import ParamScheduler  # noqa: F401 patches Learner.fit_one_cycle
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.load import DataLoader
from fastai.learner import AvgMetric, Metric, mk_metric
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, CategoryBlock, ColReader, DataBlock, TextBlock, awd_lstm_clas_config, text_classifier_learner
from scipy import stats
from sklearn.datasets import load_digits, load_wine
from torch import nn

from fastai_mixup_ext import MixCallback, MixUpCallback, cutmix, mixup, one_of
from fastai_mixup_ext import find
from fastai_mixup_ext.compare import GAIN, LOSS, UNSURE, Comparison, Run, is_lower_better
from fastai_mixup_ext.effects import common_noise, holm, paired, power, seeds_needed, smallest_effect
from fastai_mixup_ext.find import as_candidates, compare_fits, default_candidates

@pytest.fixture(autouse=True)
def quick(monkeypatch): monkeypatch.setattr(find, 'ROUNDS', 1)  # of the measurement of costs

# Statistics

@pytest.mark.parametrize('n', [2, 3, 10])
def test_paired_is_scipys_paired_t_test(n):
    rng = np.random.default_rng(n)
    a,b = rng.normal(1, 1, n),rng.normal(0, 2, n)
    e,theirs = paired(a, b),stats.ttest_rel(a, b)
    ci = theirs.confidence_interval(.95)
    assert np.allclose([e.mean, e.low, e.high, e.p], [np.mean(a-b), ci.low, ci.high, theirs.pvalue])
    assert math.isclose(e.sd, np.std(a-b, ddof=1)) and e.n==n

def test_paired_without_spread():
    "Equal values: an interval of width zero, and no find"
    e = paired([.5]*3, [.5]*3)
    assert (e.mean, e.low, e.high, e.p, e.sd)==(0, 0, 0, 1, 0)
    e = paired([.3, .6, .9], [.2, .5, .8])  # up to rounding the same difference with every seed
    assert math.isclose(e.mean, .1) and e.low==e.high==e.mean and (e.p, e.sd)==(1, 0)
    assert paired([.1+.2], [.3]).mean==0  # rounding is no difference
    e = paired(np.float32([.96, .97, .98]), np.float32([.95, .96, .97]))  # 32 bits: their spread is rounding as well
    assert math.isclose(e.mean, .01, rel_tol=1e-4) and (e.p, e.sd)==(1, 0)

def test_paired_with_one_or_no_pair():
    one,none = paired([2.], [1.]),paired([], [])
    assert one.mean==1 and math.isnan(one.low) and math.isnan(one.p) and one.n==1
    assert math.isnan(none.mean) and none.n==0

def slow_holm(ps):
    "Step by step, as in the paper: the smallest p against level/m, the next against level/(m-1), until one fails"
    m,order,out,worst = len(ps),sorted(range(len(ps)), key=lambda i: ps[i]),[0.]*len(ps),0.
    for rank,i in enumerate(order):
        worst = max(worst, min(1., (m-rank)*ps[i]))
        out[i] = worst
    return out

def test_holm():
    assert np.allclose(holm([.01, .04, .03, .005]), [.03, .06, .06, .02])
    rng = np.random.default_rng(0)
    for m in range(1, 7):
        ps = rng.uniform(0, .3, m)
        assert np.allclose(holm(ps), slow_holm(list(ps)))
    assert np.allclose(holm([.02, math.nan, .01]), [.02, math.nan, .02], equal_nan=True) and len(holm([]))==0

@pytest.mark.parametrize('n,effect,level', [(3, 1.5, .05), (5, 1., .05), (8, 1., .0125)])
def test_power_is_the_share_of_simulations_that_show_the_effect(n, effect, level):
    rng = np.random.default_rng(1)
    d = rng.normal(effect, 1, (40_000, n))
    found = stats.ttest_1samp(d, 0, axis=1).pvalue<level
    assert abs(power(effect, 1, n, level)-found.mean())<.01
    assert math.isclose(power(0, 1, n, level), level, rel_tol=1e-3) and math.isclose(power(1e3, 1, n, level), 1, rel_tol=1e-3)

@pytest.mark.parametrize('effect,level', [(2., .05), (.7, .05), (.7, .0125), (.3, .01)])
def test_seeds_needed_is_the_first_that_is_enough(effect, level):
    n = seeds_needed(effect, 1., level)
    assert n==next(n for n in itertools.count(2) if power(effect, 1., n, level)>=.8)
    assert smallest_effect(1., n, level)<=effect and (n==2 or smallest_effect(1., n-1, level)>effect)

@pytest.mark.parametrize('n,level', [(2, .05), (3, .0125), (20, .05)])
def test_smallest_effect_has_a_power_of_80_percent(n, level):
    assert math.isclose(power(smallest_effect(.02, n, level), .02, n, level), .8, rel_tol=1e-3)
    assert smallest_effect(0., n, level)==0

def test_hopeless_power(): assert seeds_needed(1e-6, 1.) is None

# The noise in common

def test_the_common_noise_is_the_residual_of_randomised_blocks():
    "as the textbook has it for complete tables: twice the mean square of interaction"
    rng = np.random.default_rng(3)
    for k,n in ((1, 2), (2, 3), (4, 3), (5, 6)):
        x = rng.normal(rng.normal(0, 5, (k+1, 1))+rng.normal(0, 5, (1, n)), 1)
        left = x-x.mean(1, keepdims=True)-x.mean(0, keepdims=True)+x.mean()
        assert np.allclose(common_noise(x), (2*(left**2).sum()/(k*(n-1)), k*(n-1)))
    one = rng.normal(0, 1, (2, 4))
    assert math.isclose(common_noise(one)[0], np.var(one[1]-one[0], ddof=1))  # of one candidate: that of its differences

def test_the_common_noise_where_runs_are_missing():
    "A candidate's or seed's only run says nothing; the others count as if it were not there"
    x = np.random.default_rng(4).normal(0, 1, (4, 3))
    more = np.full((5, 4), math.nan)
    more[:4,:3] = x
    more[4,0],more[2,3] = 7.,8.
    assert np.allclose(common_noise(more), common_noise(x))
    whole = common_noise(x)[1]
    x[1,2] = math.nan
    assert common_noise(x)[1]==whole-1
    for none in ([], [[]], [[1., 2.]], [[1.], [2.]], [[math.nan]*3]*2): assert np.isnan(common_noise(none)[0]) and common_noise(none)[1]==0
    assert common_noise([[.1, .2, .3], [.2, .3, .4]])==(0, 2)  # but for rounding the same

def noise_of(x):
    "The textbook's, of complete tables"
    left = x-x.mean(1, keepdims=True)-x.mean(0, keepdims=True)+x.mean()
    df = (len(x)-1)*(x.shape[1]-1)
    return 2*(left**2).sum()/df,df

def slow_finds(x, common):
    "Which candidates differ from the first row, by the common noise of those that are not far noisier, or each by its own"
    n,d = x.shape[1],x[1:]-x[0]
    own,rows = d.var(1, ddof=1),list(range(len(d)))
    def noise(rows): return noise_of(x[[0, *(i+1 for i in rows)]])
    while len(rows)>1:
        worst = max(rows, key=lambda i: own[i])
        var,df = noise([i for i in rows if i!=worst])
        if stats.f.sf(own[worst]/var, n-1, df)>=.01: break
        rows.remove(worst)
    k,others = len(rows),x[1:][rows].mean(0)  # the baseline against the mean of these
    if k>1 and (x[0]-others).var(ddof=1)*2/(1+1/k) > noise_of(x[1:][rows])[0]*stats.f.ppf(.95, n-1, (k-1)*(n-1)): rows = []
    var,df = noise(rows) if rows else (math.nan, 0)
    def p(i): return 2*stats.t.sf(abs(d[i].mean())/math.sqrt((max(own[i], var) if shared(i) else own[i])/n), df if shared(i) else n-1)
    def shared(i): return common and i in rows
    return np.array(slow_holm([p(i) for i in range(len(d))]))<.05

def found_by_chance_and_not(sds, effect, common=True, times=1500, n=3):
    "The share of comparisons with a find, and the share of differences that are found"
    rng = np.random.default_rng(5)
    x = rng.normal(0, 1, (times, len(sds), n))*np.array(sds)[:,None]
    x[:,1:] -= effect
    finds = np.array([slow_finds(o, common) for o in x])
    for o,f in zip(x[:30] if common else [], finds):
        c = figures(values=dict(enumerate(o)), metric='loss')
        assert [c.verdict(i)!=UNSURE for i in c.effects]==list(f)
    return finds.any(1).mean(),finds.mean(0)

@pytest.mark.parametrize('sds,share', [([1]*5, .05), ([1]*3, .05), ([1, 1, 1, 1, 3], .07), ([1, 1, 3], .07),
    ([2, 1, 1, 1, 1], .07), ([5, 1, 1, 1, 1], .08), ([10, 1, 1, 1, 1], .05), ([.5, 1, 1, 1, 1], .05), ([1, 1, 1, 1, 10], .1)])
def test_few_finds_by_chance(sds, share):
    "At most 5 in 100, and not many more where the noise differs by a factor of three or ten"
    assert found_by_chance_and_not(sds, 0)[0]<=share+2*math.sqrt(share*(1-share)/1500)

def test_the_common_noise_finds_more():
    assert found_by_chance_and_not([1]*5, 3)[1].min()>.6 and found_by_chance_and_not([1]*5, 3, common=False)[1].max()<.25

def test_a_wild_candidate_hides_nothing():
    assert found_by_chance_and_not([1]*4+[10], 3)[1][:3].min()>.45
    wild = [.10, .30, .02, .25, .15]
    c = figures(values=dict(none=NONE, cutmix=BETTER['values']['cutmix'], wild=wild))
    assert c.best=='cutmix' and c.steady==['cutmix'] and 'from its own runs alone: wild.' in repr(c)
    assert c.effects['wild']==paired(wild, NONE)

def test_a_wild_baseline_shares_no_noise():
    wild = [.10, .30, .02, .25, .15]
    c = figures(values=dict(none=wild, a=BETTER['values']['cutmix'], b=BETTER['values']['mixup']))
    assert c.effects['a']==paired(BETTER['values']['cutmix'], wild) and not c.steady
    assert 'Against none the others vary more than among themselves' in repr(c)
    assert math.isclose(c.sd**2, np.mean([e.sd**2 for e in c.effects.values()])) and c.detectable==smallest_effect(c.sd, 5, .025)
    assert 'more than 10,000' not in str(c)

@pytest.mark.parametrize('n,effect,k', [(3, 3., 4), (2, 5., 4), (5, 2., 2)])
def test_power_with_the_common_noise(n, effect, k):
    rng = np.random.default_rng(6)
    x = rng.normal(0, 1/math.sqrt(2), (20_000, k+1, n))  # differences have a standard deviation of 1
    x[:,1] += effect/math.sqrt(2)
    d,left = x[:,1]-x[:,0],x-x.mean(2, keepdims=True)-x.mean(1, keepdims=True)+x.mean((1,2), keepdims=True)
    var = np.maximum(d.var(1, ddof=1), 2*(left**2).sum((1,2))/(k*(n-1)))
    found = 2*stats.t.sf(np.abs(d.mean(1))/np.sqrt(var/n), k*(n-1))<.05/k
    assert abs(power(effect/math.sqrt(2), 1, n, .05/k, k)-found.mean())<.012

# Comparison

def figures(**kwargs): return Comparison(kwargs.pop('values'), kwargs.pop('metric', 'error_rate'), **kwargs)

NONE = [.101, .099, .102, .098, .100]
BETTER = dict(values=dict(none=NONE, cutmix=[.081, .078, .083, .079, .080], mixup=[.102, .098, .101, .099, .101]))

def test_a_gain():
    c = figures(**BETTER, costs=dict(none=1., cutmix=1.04, mixup=1.2))
    c.suggestions['cutmix'] = lambda: 'a callback'
    assert c.best=='cutmix' and c.suggestion=='a callback' and c.baseline=='none'
    e = c.effects['cutmix']
    assert str(c)==f'cutmix: error 8.0 % instead of 10.0 %: 2.0 points less [{-100*e.high:.1f}, {-100*e.low:.1f}]; costs 4 % more time'
    assert (e.low, e.high)==dataclasses.astuple(paired(BETTER['values']['cutmix'], NONE, common_noise([*BETTER['values'].values()])))[1:3]
    assert (c.verdict('cutmix'), c.verdict('mixup'))==(GAIN, UNSURE)

def test_the_same_gain_where_higher_is_better():
    values = {k: [1-x for x in v] for k,v in BETTER['values'].items()}
    assert str(figures(values=values, metric='accuracy'))==str(figures(**BETTER))
    hit = figures(values=values, metric='dice')
    assert str(hit).startswith('cutmix: dice 0.920 instead of 0.900: 0.020 higher [0.01') and hit.gain('cutmix')>0
    ours = figures(values=values, metric='hits', lower_is_better=False)
    assert str(ours).startswith('cutmix: hits 0.920 instead of 0.900: 0.020 higher')
    wrong = figures(values=values, metric='hits', lower_is_better=True)
    assert wrong.best is None and wrong.verdict('cutmix')==LOSS

def test_the_largest_clear_gain_is_suggested():
    values = dict(none=NONE, a=[x-.01 for x in (.1, .1012, .1008, .0991, .0999)], b=[x-.03 for x in (.1, .1012, .1008, .0991, .0999)],
        c=[.01, .15, .02, .16, .01])  # a larger mean difference, but within its noise
    assert figures(values=values).best=='b'

def test_cant_tell_says_how_many_seeds():
    c = figures(values=dict(none=[.10, .12, .09], mixup=[.09, .13, .085]))
    n = seeds_needed(.01, np.std([-.01, .01, -.005], ddof=1))
    assert str(c)==f'none: no candidate is better than its noise; to see a difference of 1 point you would need about {n} seeds'
    assert c.best is None and c.suggestion is None
    assert math.isclose(c.detectable, smallest_effect(np.std([-.01, .01, -.005], ddof=1), 3))

def test_cant_tell_though_it_would_have_shown():
    c = figures(values=dict(none=NONE, mixup=[.1005, .0992, .1021, .0982, .0998]))
    assert str(c)=='none: no candidate is better than its noise; a difference of 1 point would probably have shown'

def test_all_are_worse():
    near = .1,.1012,.1008,.0991,.0999
    c = figures(values=dict(none=NONE, a=[x+.02 for x in near], b=[x+.05 for x in near]))
    assert str(c).startswith('none: every candidate is worse; the mildest is a: error 12.0 % instead of 10.0 %: 2.0 points more [1.')

def test_holm_decides():
    "p = .03 is a find alone, but not among five"
    d,base = np.array([-.018, -.005, -.014, -.007]),np.array([.1, .1, .1, .1])
    others = zip('bcde', np.random.default_rng(0).normal(0, .012, (4, 4)))
    alone,among = figures(values=dict(none=base, a=base+d)),figures(values=dict(none=base, a=base+d) | {k: base+o for k,o in others})
    assert .01<alone.effects['a'].p<.05 and .01<among.effects['a'].p<.05
    assert alone.best=='a' and among.best is None

def test_one_seed_is_said_in_words():
    c = figures(values=dict(none=[.1], mixup=[.08]))
    assert 'one seed gives no interval' in str(c) and c.best is None and math.isnan(c.detectable)
    check_all_forms(c)

def test_equal_values():
    c = figures(values=dict(none=[.1]*3, mixup=[.1]*3))
    assert str(c).startswith('none: the differences are the same with every seed') and c.detectable==0
    check_all_forms(c)

def test_only_the_baseline():
    c = figures(values=dict(none=NONE))
    assert 'no other candidate has finished' in str(c)
    check_all_forms(c)

def test_missing_runs_are_left_out_by_seed():
    values = dict(none=[.1, .2, .3, None], a=[None, .1, .25, .1])
    c = figures(values=values)
    e = paired([.1, .25], [.2, .3])
    assert dataclasses.astuple(c.effects['a'])==pytest.approx(dataclasses.astuple(e)) and c.seeds==2 and c.table.loc['a', 'runs']==3
    check_all_forms(c)

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_diverged(bad):
    c = figures(values=dict(none=NONE, a=[.1, bad, .1, .1, .1]), metric='loss')
    assert c.verdict('a')==LOSS and 'every candidate diverged' in str(c)
    check_all_forms(c)
    check_all_forms(figures(values=dict(none=[math.nan]*2, a=[.1, .2])))

def test_a_baseline_that_diverged_is_called_so():
    c = figures(values=dict(none=[math.nan]*3, a=[.5, .51, .52], b=[math.nan, .5, .6]))
    assert str(c)=='none: diverged with every seed; a did not' and c.best is None
    assert str(figures(values=dict(none=[math.inf], a=[math.nan])))=='none: diverged with every seed'
    c = figures(values=dict(none=[math.nan, .1, .11], a=[.1, .2, .31]))
    assert 'none diverged in 1 of 3 runs; their pairs are left out.' in c.remarks and c.seeds==2

def check_all_forms(c):
    assert c.conclusion in repr(c) and len(c._repr_html_()) and len(c.table)==len(c.names)
    c.plot().canvas.draw()

@pytest.mark.parametrize('values,metric,words', [
    (dict(none=[5971., 5989., 5965.], a=[2970., 2990., 2961.]), 'loss', 'a: loss 2974 instead of 5975: 3001 lower ['),
    (dict(none=[5971., 5389., 6965.], a=[5970., 5990., 5961.]), 'loss',
        'to see a difference of 61 in loss (1 %) you would need about 1,400 seeds'),
    (dict(none=[.1, .6, .2], a=[.6, .1, .8]), 'error_rate', 'to see a difference of 1 point you would need more than 10,000 seeds'),
    (dict(none=[3e-5, 3.1e-5, 3e-5], a=[1e-5, 1.1e-5, 1.01e-5]), 'mse', 'a: mse 0.000010 instead of 0.000030: 0.000020 lower ['),
    (dict(none=[.5, .6], a=[.6, .1]), 'accuracy', '2 seeds show no difference in errors, however large: their noise is too large')])
def test_figures_for_people(values, metric, words):
    "no exponents, whatever the size"
    c = figures(values=values, metric=metric)
    assert words in repr(c) and not re.search(r'[0-9]e[+-]?[0-9]', repr(c)+c._repr_html_())

def test_the_same_runs_by_another_measure():
    c = Comparison(runs(none=(.1, None), a=(.2, None)), 'accuracy', costs=dict(none=1., a=3.))
    c.suggestions['a'],c.notes = 1,['a note']
    other = c.by('loss')
    assert (other.metric, other.lower, other.costs, other.suggestions, other.notes)==('loss', True, c.costs, c.suggestions, c.notes)
    assert math.isclose(other.table.loc['a', 'loss'], .98) and c.by('loss').by('accuracy').table.equals(c.table)
    with pytest.raises(ValueError, match=r"metric='dice' was not measured; it must be one of \['accuracy', 'loss'\]"): c.by('dice')

def runs(**kwargs): return [Run(n, s, {'accuracy': [.2, .4+d, .8+d], 'loss': [2., 1.5, 1-d]}, sec, gap)
    for n,(sec,gap) in kwargs.items() for s,d in enumerate([.01, .03, .02])]

def test_table_has_means_deviations_and_costs():
    c = Comparison(runs(none=(.1, None), a=(.2, None)), 'accuracy')
    t = c.table
    assert math.isclose(t.loc['none', 'accuracy'], .82) and math.isclose(t.loc['none', 'accuracy sd'], .01)
    assert math.isclose(t.loc['a', 'loss'], .98) and t.loc['a', 'difference']==0 and math.isnan(t.loc['none', 'difference'])
    assert t.loc['a', 'cost']==2 and t.loc['none', 'cost']==1 and list(t['runs'])==[3, 3]
    assert '±' in repr(c) and '<table' in c._repr_html_()
    assert '&lt;b&gt;' in Comparison({'<b>': [1.], 'a': [2.]})._repr_html_()

def test_plot_has_a_forest_and_curves():
    fig = Comparison(runs(none=(.1, None), a=(.2, None), b=(.1, None)), 'accuracy').plot()
    forest,curves = fig.axes
    assert [t.get_text().split('\n')[0] for t in forest.get_yticklabels()]==['a', 'b']
    assert [list(line.get_ydata().round(6)) for line in curves.lines]==[[.2, .42, .82]]*3
    bands = [sorted({round(float(y), 6) for y in o.get_paths()[0].vertices[:,1]}) for o in curves.collections]
    assert bands==[[.2, .41, .43, .81, .83]]*3  # from the lowest of three seeds to the highest
    assert len(Comparison(dict(none=[1., 2.], a=[1., 3.])).plot().axes)==1  # nothing to draw a curve from

def test_memorising_is_said_if_there_is_no_winner():
    def said(gap): return str(Comparison(runs(none=(.1, gap), a=(.1, None)), 'accuracy'))
    assert said((.1, .2)).endswith('It memorises (loss 0.1 in training, 0.2 in validation): try longer')
    assert 'memorises' not in said((.11, .2)) and 'memorises' not in said(None) and 'memorises' not in said((-2., -1.))

def test_memorising_is_not_said_where_it_leads_nowhere():
    "no errors to save, or every candidate clearly worse"
    def said(none, a, metric='error_rate'):
        values = [(n, s, v) for n,o in dict(none=none, a=a).items() for s,v in enumerate(o)]
        return str(Comparison([Run(n, s, {metric:[v]}, None, (.1, .9)) for n,s,v in values], metric))
    assert 'memorises' in said([.10, .11, .09], [.11, .10, .09]) and 'memorises' in said([.010, .011, .009], [.011, .010, .009], 'rmse')
    assert 'memorises' not in said([.010, .011, .009], [.011, .010, .009])
    assert 'memorises' not in said([.10, .11, .09], [.20, .211, .19]) and 'memorises' not in said([.20, .21, .19], [.10, .111, .09])

def test_the_order_of_the_candidates_changes_no_figure():
    values = dict(none=[.10, .12, .11, .13], a=[.08, .09, .09, .10], b=[.2, .1, .4, .3])
    one,other = (figures(values={k:values[k] for k in names.split()}, baseline='none') for names in ('none a b', 'b a none'))
    for o in 'ab': assert np.allclose(dataclasses.astuple(one.effects[o]), dataclasses.astuple(other.effects[o]))

def test_directions_of_all_of_fastais_metrics():
    made = []
    for n in fastai_metrics.__all__:
        o = getattr(fastai_metrics, n)
        if n in ('AccumMetric', 'skm_to_fastai', 'optim_metric', 'LossMetric', 'LossMetrics'): continue
        try: made.append(mk_metric(o() if n[0].isupper() else o).name)
        except TypeError: made.append(mk_metric(o(.5)).name)  # FBeta needs one
    lower = {'error_rate', '_rmse', '_exp_rmspe', 'mse', 'mae', 'msle', 'perplexity', 'brier_score_loss', 'hamming_loss'}
    assert {o: is_lower_better(o) for o in made}=={o: o in lower for o in made}
    assert is_lower_better('loss')
    with pytest.raises(ValueError, match="'profit'.*lower_is_better"): is_lower_better('profit')

def test_bad_comparisons():
    with pytest.raises(ValueError, match='runs is empty'): Comparison([])
    with pytest.raises(ValueError, match="baseline='plain' has no run"): figures(**BETTER, baseline='plain')
    with pytest.raises(ValueError, match="metric='dice' was not measured"): Comparison(runs(none=(.1, None)), 'dice')
    with pytest.raises(ValueError, match='lower_is_better'): figures(**BETTER | dict(metric='x'))

def test_values_by_seed_and_values_that_are_none():
    c = figures(**BETTER)
    for again in ({o: c.values(o) for o in c.names}, {o: pd.Series(c.values(o)) for o in c.names}):
        assert figures(values=again).table.equals(c.table)
    e = figures(values=dict(none={7: .1, 3: .2}, a={3: .1, 7: .1})).effects['a']
    assert math.isclose(e.mean, -.05)
    twice = [Run('none', 0, {'loss': [1.]})]*2
    for bad,words in ((dict(none=.5), '0.5'), (pd.DataFrame(dict(none=[.5])), "'none'"), (twice, r"\('none', 0\)")):
        with pytest.raises(ValueError, match=f'runs has {words}, which is no Run or comes twice'): Comparison(bad)
    with pytest.raises(ValueError, match="='higher' must be True, False or None"): figures(**BETTER, lower_is_better='higher')

def test_an_interval_without_0_is_written_without_0():
    c = Comparison(dict(none=[1.5, 1.9, 2.1], a=[.9, 1.4, 1.82]))
    assert str(c)=='a: loss 1.37 instead of 1.83: 0.46 lower [0.05, 0.87]'

# Learners of all kinds

def pictures(n=60):
    d = load_digits()
    return list(zip(torch.tensor(d.images[:n], dtype=torch.float32)[:,None]/16, torch.tensor(d.target[:n])))

def net(): return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(.2), nn.Linear(36, 10))

def digits_learner(path, cbs=(), **kwargs):
    items = pictures()
    dls = DataLoaders.from_dsets(items[:40], items[40:], bs=10, num_workers=0, device='cpu')
    return Learner(dls, net(), **dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path, cbs=list(cbs), lr=.01) | kwargs)

def table_learner(path):
    df = load_wine(as_frame=True).frame.sample(60, random_state=0).reset_index(drop=True)
    df['cat'] = (df['alcohol']>13).astype(str)
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['cat'], cont_names=list(df.columns[:4]),
        y_names='target', y_block=CategoryBlock(), valid_idx=list(range(20)), bs=10, num_workers=0, device='cpu')
    return tabular_learner(dls, layers=[8], metrics=accuracy, path=path)

def text_learner(path):
    words = np.random.default_rng(0).choice('good bad film plot a the'.split(), (30, 12))
    df = pd.DataFrame(dict(text=[' '.join(o[:5+i%7]) for i,o in enumerate(words)], label=['ny'[i%2] for i in range(30)]))
    block = DataBlock((TextBlock(str.split, seq_len=8, min_freq=1), CategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'),
        splitter=lambda df: (list(range(20)), list(range(20, 30))))
    config = awd_lstm_clas_config | dict(emb_sz=6, n_hid=7, n_layers=2)
    dls = block.dataloaders(df, bs=10, num_workers=0)
    return text_classifier_learner(dls, AWD_LSTM, seq_len=8, config=config, pretrained=False, metrics=accuracy, path=path)

def frozen_learner(path):
    learn = digits_learner(path, splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    learn.freeze()
    return learn

def precise_learner(path): return digits_learner(path, [MixedPrecision(amp_mode='bf16'), GradientAccumulation(20)])

def mixing_learner(path): return digits_learner(path, [MixUpCallback(.4, seed=3)])

def saving_learner(path):
    learn = digits_learner(path, [SaveModelCallback(fname='mine'), SaveModelCallback(fname=path/'absolute'), CSVLogger(path/'log.csv'),
        EarlyStoppingCallback(patience=9)])
    for name in ('models/mine.pth', 'absolute.pth', 'log.csv'):
        (path/name).parent.mkdir(exist_ok=True)
        (path/name).write_text("a user's file")
    return learn

def wrapped_learner(path):
    "torch's loaders with generators of their own, torch's optimizer, and a loss in numbers"
    items = [(x, x.mean((1,2))) for x,_ in pictures()]
    def loader(o, **kwargs): return torch.utils.data.DataLoader(o, batch_size=10, **kwargs)
    dls = DataLoaders(loader(items[:40], shuffle=True, generator=torch.Generator().manual_seed(5)), loader(items[40:]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    opt = OptimWrapper(trainable_params(model), torch.optim.AdamW)
    return Learner(dls, model, loss_func=MSELossFlat(), opt_func=opt, path=path, lr=.01)

KINDS = dict(pictures=digits_learner, tables=table_learner, text=text_learner, frozen=frozen_learner, precise=precise_learner,
    mixing=mixing_learner, saving=saving_learner, wrapped=wrapped_learner)

def made(kind, path):
    "A learner of that kind, the same each time, without bars"
    set_seed(7)
    learn = KINDS[kind](path)
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

# As it was

STATE = {random.Random: random.Random.getstate, np.random.RandomState: np.random.RandomState.get_state,
    torch.Generator: torch.Generator.get_state, np.random.Generator: lambda g: g.bit_generator.state}

PLAIN = str,bytes,int,float,complex,type(None),types.FunctionType,types.BuiltinFunctionType,type,types.ModuleType,torch.dtype,torch.device

def values(t): return t.detach().as_subclass(torch.Tensor).reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b''

def digest(o, seen=None):
    "All that `o` reaches, as plain values that can be compared"
    seen = {} if seen is None else seen
    if isinstance(o, PLAIN): return repr(o)
    if id(o) in seen: return seen[id(o)][1]
    seen[id(o)] = o,f'#{len(seen)}'  # keeps it alive, so that no id comes twice
    get = next((f for k,f in STATE.items() if isinstance(o, k)), None)
    if get: return digest(get(o), seen)
    if isinstance(o, torch.Tensor):
        return type(o).__name__,o.dtype,o.device.type,o.requires_grad,tuple(o.shape),values(o),digest(o.grad, seen) if o.is_leaf else None
    if isinstance(o, np.ndarray): return o.tobytes() if o.dtype!=object else [digest(v, seen) for v in o.flat]
    if isinstance(o, functools.partial): return digest([o.func, o.args, o.keywords], seen)
    if isinstance(o, dict): return {k if isinstance(k, (str, int)) else id(k): digest(v, seen) for k,v in o.items()}
    if isinstance(o, (list, tuple, set)): return [digest(v, seen) for v in o]
    if isinstance(o, (pd.DataFrame, pd.Series)): return o.to_csv()
    return type(o).__name__,{k: digest(v, seen) for k,v in getattr(o, '__dict__', {}).items() if k!='lock'}

def state(learn):
    "All that the learner reaches, the random states, the files, and who is who"
    files = {o: o.read_bytes() for o in learn.path.rglob('*') if o.is_file()}
    who = [*map(id, (learn.model, learn.opt, learn.dls, learn.loss_func, *learn.cbs, *learn.model.parameters()))]
    return digest(vars(learn)),digest([random.getstate(), np.random.get_state(), torch.get_rng_state()]),files,who

def check_as_it_was(before, after):
    for name,a,b in zip(('learner', 'random states', 'files', 'identities'), before, after):
        if isinstance(a, dict): assert not [k for k in a.keys()|b.keys() if a.get(k)!=b.get(k)], name
        assert a==b, name

@pytest.mark.parametrize('fitted', [False, True], ids=['new', 'fitted'])
@pytest.mark.parametrize('kind', KINDS)
def test_the_learner_is_as_it_was(kind, fitted, tmp_path):
    learn = made(kind, tmp_path)
    if fitted and kind!='saving': learn.fit(1)
    before = state(learn)
    c = learn.mix_find(1, [mixup(1.)], seeds=1)
    check_as_it_was(before, state(learn))
    assert len(c.runs)==(3 if kind=='mixing' else 2)

@pytest.mark.parametrize('kind', [k for k in KINDS if k!='saving'])
def test_training_goes_on_as_if_nothing_had_been(kind, tmp_path):
    def losses(between):
        learn = made(kind, tmp_path)
        learn.fit(1)
        between(learn)
        learn.fit(1)
        return torch.stack([o.cpu() for o in learn.recorder.losses]),digest(learn.model.state_dict())
    (a,model_a),(b,model_b) = losses(noop),losses(lambda learn: learn.mix_find(1, [mixup(1.)], seeds=1))
    assert torch.equal(a, b) and model_a==model_b

class Counting(nn.Module):
    "State beside parameters and buffers, changed in place"
    def __init__(self): super().__init__(); self.mean,self.calls,self.seen = torch.zeros(2),[0],{'first'}
    def forward(self, x):
        self.mean.add_(1)
        self.calls[0] += 1
        self.seen.add(len(x))
        return x

class OwnLoss:
    "A plain object with a tensor and a module that learns"
    def __init__(self): self.steps,self.scale = torch.zeros(1),nn.Linear(10, 10)
    def __call__(self, pred, y):
        self.steps += 1
        return nn.functional.cross_entropy(self.scale(pred), y)

def test_as_it_was_where_state_changes_in_place(tmp_path):
    model,loss = nn.Sequential(net(), Counting()),OwnLoss()
    learn = digits_learner(tmp_path, loss_func=loss, splitter=lambda m: [[*m.parameters(), *loss.scale.parameters()]])
    learn.model = model
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    before = state(learn)
    learn.mix_find(1, [Idle], seeds=1)
    check_as_it_was(before, state(learn))

class RaiseAt(Callback):
    "Raises `exc` when `event` comes in the `nth` training step of a run; the measurement of the cost has six"
    def __init__(self, event, exc, nth=7): self.event,self.exc,self.nth = event,exc,nth
    def __call__(self, name):
        if name==self.event and self.learn.training and self.learn.train_iter==self.nth-1: raise self.exc

FAULTS = torch.cuda.OutOfMemoryError('full'),MemoryError('full'),ValueError('mine')

@pytest.mark.parametrize('kind', ['pictures', 'text', 'mixing', 'saving', 'wrapped'])
@pytest.mark.parametrize('exc', FAULTS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('event', ['after_pred', 'before_step'])
def test_as_it_was_after_an_exception(kind, exc, event, tmp_path):
    learn = made(kind, tmp_path)
    if kind!='saving': learn.fit(1)
    before = state(learn)
    with pytest.raises(type(exc)): learn.mix_find(4, dict(none=None, bad=[RaiseAt(event, exc), MixUpCallback()]))
    check_as_it_was(before, state(learn))

class Trip:
    "A forward hook of the user's that raises in its nth call"
    def __init__(self, nth, exc): self.left,self.exc = nth,exc
    def __call__(self, *args):
        self.left -= 1
        if not self.left: raise self.exc

@pytest.mark.parametrize('exc', [KeyboardInterrupt(), RuntimeError('in forward')], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('nth', [1, 3, 70])
def test_as_it_was_after_an_exception_in_forward_before_a_run_is_finished(exc, nth, tmp_path):
    "in the measurement of the cost, or in the first run"
    learn = made('pictures', tmp_path)
    learn.fit(1)
    trip = Trip(nth, exc)
    learn.model[0].register_forward_pre_hook(trip)
    before = state(learn)
    with pytest.raises(type(exc)): learn.mix_find(50, [MixUpCallback(at=lambda m: [m[2]])])
    assert trip.left==0
    trip.left = nth
    check_as_it_was(before, state(learn))

@pytest.mark.parametrize('kind', ['pictures', 'tables', 'text', 'frozen', 'precise', 'mixing', 'wrapped'])
def test_an_interrupt_returns_what_is_finished(kind, tmp_path):
    learn,fits = made(kind, tmp_path),[]
    learn.fit(1)
    before = state(learn)
    def fit(learn):
        fits.append(learn)
        if len(fits)==6: learn.add_cb(RaiseAt('after_backward', KeyboardInterrupt(), 2))
        learn.fit_one_cycle(1)
    c = learn.mix_find(fit, dict(none=None, a=mixup(1.)) , seeds=[5, 3, 9, 1])
    check_as_it_was(before, state(learn))
    assert len(c.runs)==5 and 'Stopped: 5 of' in repr(c)
    assert [o.seed for o in c.runs][:2]==[5, 5] and c.seeds==(1 if kind=='mixing' else 2)

def test_a_cancelled_fit_counts_as_far_as_it_went(tmp_path):
    learn = made('pictures', tmp_path)
    before = state(learn)
    c = learn.mix_find(3, dict(none=None, stops=RaiseAt('before_batch', CancelFitException(), 9)), seeds=2)
    check_as_it_was(before, state(learn))
    assert {o.name: len(o.curves['accuracy']) for o in c.runs}==dict(none=3, stops=2)
    c = learn.mix_find(1, dict(none=None, stops=RaiseAt('before_batch', CancelFitException(), 1)), seeds=2)  # not one epoch
    assert c.verdict('stops')==LOSS

# Pairs

LOG = []

class Noted(nn.Module):
    "Dropout's kind of module: draws in training"
    def forward(self, x):
        if self.training: LOG.append(torch.rand(()).item())
        return x

class Rows(Callback):
    "The batch before it is mixed"
    order = -5
    def before_batch(self):
        if self.training: LOG.append(self.xb[0].double().sum().item())

def noisy_learner(path='.'):
    def augment(b): return b[0]+torch.randn_like(b[0])*random.random(),b[1]
    items = pictures()
    train = DataLoader(items[:40], bs=10, shuffle=True, after_batch=augment)
    return Learner(DataLoaders(train, DataLoader(items[40:], bs=10)), nn.Sequential(Noted(), net()), loss_func=CrossEntropyLossFlat(),
        metrics=accuracy, cbs=Rows(), path=path, default_cbs=False).add_cbs([TrainEvalCallback(), Recorder()])

ALL = dict(none=None, ours=mixup(1.), cut=cutmix(1.), theirs=MixUp(.4), box=CutMix, hidden=MixUpCallback(1., at=lambda m: [m[0], m[1][1]]))

def draws_of_runs(find):
    "What `find` draws in each run"
    starts,LOG[:] = [],[]
    def fit(learn):
        starts.append(len(LOG))
        learn.fit(2)
        starts.append(len(LOG))
    c = find(fit)
    return {(o.name, o.seed): LOG[a:b] for o,a,b in zip(c.runs, starts[::2], starts[1::2])}

@pytest.mark.parametrize('how', ['find', 'fits'])
def test_a_pair_has_the_same_batches_and_draws(how):
    "whoever mixes, with whatever generator; another seed has others"
    if how=='find': draws = draws_of_runs(lambda fit: noisy_learner().mix_find(fit, ALL, seeds=2))
    else: draws = draws_of_runs(lambda fit: compare_fits(lambda seed: noisy_learner(), ALL, fit, seeds=2))
    assert list(draws)==[(n, s) for s in (0, 1) for n in ALL]  # interleaved: one seed after another
    for s in (0, 1): assert len(draws['none', s])==16 and all(draws[n, s]==draws['none', s] for n in ALL)
    assert not set(draws['none', 0]) & set(draws['none', 1]) and len(set(draws['none', 0]))==16

@pytest.mark.skipif(not hasattr(torch, 'accelerator'), reason='before PyTorch 2.6 every kind of device is seeded')
@pytest.mark.parametrize('there', [True, False])
def test_an_accelerator_is_seeded_where_there_is_one(monkeypatch, there):
    "Beside the CPU's generator, whose draws are those of `torch.manual_seed`"
    seeds,seed_all = [],torch.manual_seed
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: there)
    monkeypatch.setattr(torch, 'manual_seed', lambda seed: seeds.append(seed) or seed_all(seed))
    cb = find.SameDraws(3)
    cb.learn = types.SimpleNamespace(train_iter=5)
    cb.before_batch()
    drawn,seed = torch.rand(4),3*1_000_003 + 2*5
    assert seeds==[seed]*there and torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(seed)))

def test_each_run_starts_at_the_present_weights(tmp_path):
    learn,starts = made('pictures', tmp_path),[]
    def fit(learn):
        starts.append(digest(learn.model.state_dict()))
        learn.fit(1)
    learn.fit(1)
    now = digest(learn.model.state_dict())
    learn.mix_find(fit, [mixup(1.)], seeds=2)
    assert starts==[now]*4

def test_new_learners_start_alike_in_a_pair_and_seeds_differ():
    starts = {}
    def make(seed):
        learn = digits_learner('.')
        starts.setdefault(seed, []).append(digest(learn.model.state_dict()))
        return learn
    before = digest([random.getstate(), np.random.get_state(), torch.get_rng_state()])
    c = compare_fits(make, [mixup(1.)], 1, seeds=[4, 7])
    assert before==digest([random.getstate(), np.random.get_state(), torch.get_rng_state()])
    assert [(o.name, o.seed) for o in c.runs]==[('none', 4), ('mixup(1.0)', 4), ('none', 7), ('mixup(1.0)', 7)]
    assert all(o==v[0] for v in starts.values() for o in v) and starts[4][0]!=starts[7][0]

class Idle(Callback): "Does nothing, so that it must change nothing"

@pytest.mark.parametrize('kind', ['pictures', 'wrapped'])
def test_what_learners_share_begins_each_run_alike(kind, tmp_path):
    "Loaders, which shuffle with the seed, and even a model; all is as it was in the end"
    one,learners = made(kind, tmp_path),[]
    def make(seed):
        learners.append(Learner(one.dls, one.model, loss_func=one.loss_func, lr=.01, path=tmp_path, cbs=Quiet()))
        return learners[-1]
    before = state(one)
    a,b = (compare_fits(make, [Idle], 2, seeds=2) for _ in range(2))
    curves = [o.curves for o in a.runs]
    assert curves[0]==curves[1]!=curves[2]==curves[3] and curves==[o.curves for o in b.runs]
    check_as_it_was(before, state(one))

class Quiet(Callback):
    def after_create(self):
        self.learn.remove_cbs(ProgressCallback)
        self.learn.logger = noop

def test_learners_that_go_on_training_are_refused(tmp_path):
    again = {o: made('pictures', tmp_path) for o in (0, 1)}
    models = {o: net() for o in (0, 1)}
    def fresh(seed):
        learn = made('pictures', tmp_path)
        learn.model = models[seed]
        return learn
    for make in (lambda seed: again[0], again.get, fresh):
        with pytest.raises(ValueError, match=r'make\([01]\) returned.*anew from the seed'): compare_fits(make, [Idle], 1, seeds=2)
    with pytest.raises(TypeError, match=r'make\(seed\) returned 0; it must return a new Learner'): compare_fits(noop, [Idle], 1)

def test_a_comparison_repeats_itself(tmp_path):
    learn = made('pictures', tmp_path)
    a,b = (learn.mix_find(2, [mixup(1.), MixUp(1.)], seeds=2) for _ in range(2))
    assert [o.curves for o in a.runs]==[o.curves for o in b.runs]
    assert a.runs[0].curves!=a.runs[1].curves and a.runs[0].curves!=a.runs[3].curves

def test_the_plain_run_is_a_plain_fit(tmp_path):
    "with the learner's own rate and schedule"
    learn,rates = made('pictures', tmp_path),[]
    def fit(learn):
        learn.fit_one_cycle(2)
        rates.append(learn.recorder.lrs)
    a,b = learn.mix_find(fit, [mixup(1.)], seeds=1),learn.mix_find(2, [mixup(1.)], seeds=1)
    assert [o.curves for o in a.runs]==[o.curves for o in b.runs] and max(rates[0])<=.01
    c = learn.mix_find(lambda learn: learn.fit(2), [mixup(1.)], seeds=1)
    assert c.runs[0].curves!=a.runs[0].curves

# What is compared

def test_default_candidates(tmp_path):
    switch = 'one_of(mixup(0.4), cutmix(1.0))'
    assert list(default_candidates(torch.zeros(2, 3, 8, 8)))==['none', 'mixup(0.2)', 'mixup(1.0)', 'cutmix(1.0)', switch]
    for x in (torch.zeros(2, 3, 8), torch.zeros(2, 1, 4, 4, 4), torch.zeros(2, 3, 8, 8).byte()): assert switch in default_candidates(x)
    for x in (torch.zeros(2, 3), torch.zeros(2, 3, 8).long(), torch.zeros(2, 3, 0), 'a'):
        assert list(default_candidates(x))==['none', 'mixup(0.2)', 'mixup(1.0)']
    for kind,n in dict(pictures=5, tables=3, text=3, wrapped=5).items():
        assert len(made(kind, tmp_path).mix_find(1, seeds=1).names)==n

def test_candidates_by_list_and_by_name():
    cb = MixUp(.3)
    assert as_candidates([mixup(.2), cb, MixUp])=={'none': [], 'mixup(0.2)': [mixup(.2)], 'MixUp': [cb], 'MixUp #2': [MixUp]}
    assert list(as_candidates(dict(mix=[mixup(.2), EarlyStoppingCallback()], plain=None)))==['plain', 'mix']
    assert as_candidates(mixup(.2))==as_candidates([None, mixup(.2)])
    assert list(as_candidates([[mixup(.2), cb]]))==['none', 'mixup(0.2)+MixUp']
    assert list(as_candidates(dict(none=mixup(.2))))==['none #2', 'none']
    assert list(as_candidates([one_of(mixup(.4), cutmix(1.), weights=[1., 3.])]))[1]=='one_of(mixup(0.4), cutmix(1.0), weights=[1.0, 3.0])'

@pytest.mark.parametrize('theirs', [False, True])
def test_a_mixing_callback_on_board_is_one_of_the_candidates(theirs, tmp_path):
    own,mixers = MixUp(.4) if theirs else MixUpCallback(.4, p=.5),[]
    learn = digits_learner(tmp_path, [own])
    def fit(learn):
        mixers.append([(type(cb), cb is own) for cb in learn.cbs if 'Mix' in type(cb).__name__])
        learn.fit(1)
    with learn.no_bar(), learn.no_logging(): c = learn.mix_find(fit, [cutmix(1.)], seeds=1)
    assert c.names==['none', 'cutmix(1.0)', 'MixUp (yours)' if theirs else 'mixup(0.4) (yours)']
    assert mixers==[[], [(MixCallback, False)], [(type(own), False)]] and own in learn.cbs and own.learn is learn

def test_the_suggestion_is_ready_to_use(tmp_path):
    learn = made('pictures', tmp_path)
    both = [cutmix(.5), EarlyStoppingCallback(patience=2)]
    c = learn.mix_find(1, dict(none=None, rec=mixup(.3), cls=MixUp, both=both, own=MixUpCallback(.1, seed=4)), seeds=1)
    made_ = {k: f() for k,f in c.suggestions.items()}
    assert made_['rec'].recipe==mixup(.3) and made_['rec'].seed is None and type(made_['cls']) is MixUp and made_['own'].seed==4
    assert made_['both'][0].recipe==cutmix(.5) and made_['both'][1].patience==2 and 'none' not in made_
    for cb in made_.values(): learn.fit(1, cbs=cb)

def test_callbacks_are_fresh_in_every_run_and_writers_stay_out(tmp_path):
    learn,seen = made('saving', tmp_path),[]
    def fit(learn):
        seen.append({type(cb).__name__: cb for cb in learn.cbs})
        learn.fit(1)
    learn.mix_find(fit, [EarlyStoppingCallback()], seeds=2)
    assert not {'SaveModelCallback', 'CSVLogger', 'ProgressCallback'} & {k for o in seen for k in o}
    assert len({id(o['EarlyStoppingCallback']) for o in seen})==4 and learn.early_stopping not in [o['EarlyStoppingCallback'] for o in seen]

class Writer(Callback):
    "Saves the model wherever the learner is told to, in every epoch"
    def after_epoch(self): self.learn.save('mine')

def test_what_a_callback_writes_goes_elsewhere(tmp_path):
    learn = digits_learner(tmp_path, [Writer()])
    learn.save('mine')
    before = (tmp_path/'models'/'mine.pth').read_bytes()
    with learn.no_bar(), learn.no_logging(): learn.mix_find(1, [mixup(1.)], seeds=1)
    assert before==(tmp_path/'models'/'mine.pth').read_bytes() and len(list(tmp_path.rglob('*.pth')))==1

# What is measured

def test_the_metric_that_decides(tmp_path):
    def hits(pred, y): return (pred.argmax(1)==y).float().mean()
    learn = made('pictures', tmp_path)
    learn.metrics = [hits, error_rate]
    with pytest.raises(ValueError, match="'hits'.*lower_is_better"): learn.mix_find(1)
    quick = dict(candidates=[mixup(1.)], seeds=1)
    assert learn.mix_find(1, **quick, lower_is_better=False).lower is False
    found = compare_fits(lambda seed: digits_learner('.', metrics=[hits, error_rate]), epochs=1, **quick, lower_is_better=False)
    assert found.metric=='hits' and found.by('error_rate').lower and found.by('loss').lower
    learn.metrics = [error_rate, hits]
    assert learn.mix_find(1, **quick).metric=='error_rate'
    learn.metrics = []
    assert learn.mix_find(1, **quick).metric=='loss'

class Pair(Metric):
    "Has two values"
    name,value = 'pair',(1., 2.)
    def reset(self): pass
    def accumulate(self, learn): pass

def test_a_metric_without_a_number_is_refused_after_the_first_run(tmp_path):
    seen = []
    def fit(learn): seen.append(learn.fit(1))
    learn = made('pictures', tmp_path)
    before = state(learn)
    with pytest.raises(ValueError, match="metric 'accuracy' gave no number in the first run"): learn.mix_find(seen.append, [Idle])
    check_as_it_was(before, state(learn))
    learn.metrics = [Pair()]
    with pytest.raises(ValueError, match="metric 'pair' gave no number"): learn.mix_find(fit, [Idle], lower_is_better=False)
    assert len(seen)==2

def test_a_model_without_shapes_is_refused(tmp_path):
    learn = made('pictures', tmp_path)
    learn.model = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(ValueError, match='parameters without a shape.*run one batch'): learn.mix_find(1)

def test_a_direction_of_no_metric_is_refused(tmp_path):
    learn = made('wrapped', tmp_path)
    with pytest.raises(ValueError, match='=False is about the first metric.*has none'): learn.mix_find(1, lower_is_better=False)
    assert learn.mix_find(1, [Idle], seeds=1, lower_is_better=True).lower

def test_two_metrics_of_one_name_are_two_measures(tmp_path):
    "The first decides, and none is taken for the loss"
    class Named(AvgMetric):
        def __init__(self, func, name): super().__init__(func); self.given = name
        name = property(lambda self: self.given)
    learn = made('pictures', tmp_path)
    for name,other in (('rate', 'rate #2'), ('loss #2', 'loss #3')):
        learn.metrics = [Named(accuracy, name[:4]), Named(error_rate, name[:4])]
        c = learn.mix_find(2, [mixup(1.)], seeds=1, lower_is_better=False)
        assert c.metric==name and list(c.runs[0].curves)==['loss', name, other]
        for o in c.runs: assert len(o.curves[name])==2 and math.isclose(o.value(name)+o.value(other), 1, rel_tol=1e-6)

class HalfEpochs(Callback):
    def after_batch(self):
        if self.training and self.iter: raise CancelTrainException

def test_values_where_a_callback_cuts_the_epochs_short(tmp_path):
    "fastai then leaves the training's loss out of its record"
    learn = digits_learner(tmp_path, [HalfEpochs()], metrics=[accuracy, error_rate])
    with learn.no_bar(), learn.no_logging(): c = learn.mix_find(2, [mixup(1.)], seeds=1)
    for o in c.runs:
        assert all(len(v)==2 for v in o.curves.values()) and math.isclose(o.value('accuracy')+o.value('error_rate'), 1, rel_tol=1e-6)
        assert o.value('loss')>1.5

def test_a_recorder_of_training_metrics(tmp_path):
    learn = made('pictures', tmp_path)
    plain = learn.mix_find(2, [mixup(1.)], seeds=1)
    for kw in (dict(train_metrics=True), dict(train_metrics=True, valid_metrics=False)):
        learn.remove_cb(Recorder)
        learn.add_cb(Recorder(**kw))
        assert [o.curves for o in learn.mix_find(2, [mixup(1.)], seeds=1).runs]==[o.curves for o in plain.runs]

def test_costs_are_measured_for_every_candidate(tmp_path):
    c = made('pictures', tmp_path).mix_find(1, [mixup(1.), MixUp], seeds=1)
    assert c.costs['none']==1 and set(c.costs)==set(c.names) and all(0<o<100 for o in c.costs.values())
    assert all(o.seconds>0 for o in c.runs)

def test_the_cost_is_taken_of_several_steps(tmp_path):
    count = []
    class Counts(Callback):
        run_valid = False
        def before_batch(self): count.append(self.train_iter)
    made('pictures', tmp_path).mix_find(1, [Counts], seeds=1)
    assert len(count)==4 + find.STEPS*find.ROUNDS  # an epoch, and the measurement

def test_each_seed_has_draws_of_its_own_even_where_the_callback_has_a_seed(tmp_path):
    shares = []
    class Notes(type(mixup())):
        def draw(self, batch):
            mix = super().draw(batch)
            shares.append(tuple(mix.lam.tolist()))
            return mix
    made('pictures', tmp_path).mix_find(1, dict(a=MixCallback(Notes(1.), seed=7)), seeds=2)
    assert len(set(shares))>=8  # four batches of either seed; the measurement of costs draws some of them again

class Notes(list):
    "Shared by the copies of a callback"
    def __deepcopy__(self, memo): return self

class Draws(Callback):
    "Notes the rows that are seen, and numbers drawn at the beginning of the training and of each batch"
    order,run_valid = 100,False
    def __init__(self, notes): self.notes = notes
    def before_batch(self): self.notes[-1].append((self.x.sum().item(), np.random.rand(), random.random(), torch.rand(1).item()))
    def before_fit(self): self.notes.append([])

class Wastes(Callback):
    "Draws what the others do not"
    run_valid = False
    def before_fit(self): torch.rand(7),np.random.rand(7),random.random()
    def before_batch(self): torch.rand(3),np.random.rand(3),random.random()

def test_what_a_candidate_draws_changes_no_other_draw(tmp_path):
    class Noisy(list):  # rows that are drawn anew whenever they are read
        def __getitem__(self, i): return super().__getitem__(i)[0]+torch.rand(1),super().__getitem__(i)[1]
    notes,learn = Notes(),made('pictures', tmp_path)
    learn.dls = DataLoaders.from_dsets(Noisy(pictures()[:40]), pictures()[40:], bs=10, num_workers=0, device='cpu')
    learn.add_cb(Draws(notes))
    learn.mix_find(2, [Wastes], seeds=[5])
    runs = [o for o in notes if len(o)==8]  # two epochs of four batches; the measurement of costs has six
    assert len(runs)==2 and runs[0]==runs[1] and len(set(runs[0]))==8

def test_each_seed_has_an_order_of_its_own_where_the_loader_has_a_generator(tmp_path):
    notes = Notes()
    learn = made('wrapped', tmp_path)
    learn.add_cb(Draws(notes))
    learn.mix_find(1, [Wastes], seeds=2)
    rows = {tuple(o[0] for o in run) for run in notes if len(run)==4}  # an epoch has four batches
    assert len(rows)==2

@pytest.mark.parametrize('epochs', [1, 2, 3, 4])
def test_the_expected_time_is_said_once(tmp_path, capsys, epochs):
    set_seed(7)
    learn = digits_learner(tmp_path)
    learn.remove_cbs(ProgressCallback)
    learn.mix_find(epochs, [mixup(1.)], seeds=2)
    assert capsys.readouterr().out.count(' in all')==1

@pytest.mark.parametrize('seconds,words', [(.2, '1 s'), (59, '59 s'), (60, '1 min 0 s'), (59*60+1, '59 min 1 s'), (3600, '1 h 0 min'),
    (3600*25+60*59, '25 h 59 min')])
def test_a_duration_in_words(seconds, words): assert find._duration(seconds)==words

def test_the_gap_is_between_losses_in_eval_mode_and_unmixed(tmp_path):
    set_seed(0)
    items = pictures()
    dls = DataLoaders.from_dsets(items[:20], items[20:], bs=10, num_workers=0, device='cpu')
    model = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(64, 10))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): c = learn.mix_find(lambda learn: learn.fit(1, lr=0.), [mixup(1.)], seeds=2)
    model.eval()
    def loss(rows):
        x,y = map(torch.stack, zip(*rows))
        with torch.no_grad(): return nn.functional.cross_entropy(model(x), y).item()
    assert np.allclose(c.gap, [loss(items[:20]), loss(items[20:])])
    assert [o.gap is None for o in c.runs]==[False, True]*2

class NoValidation(Callback):
    "But after each epoch"
    epochs = False
    def before_train(self): self.epochs = True
    def after_validate(self): self.epochs = False
    def before_validate(self):
        if not self.epochs: raise CancelValidException

def test_no_gap_where_a_callback_skips_the_validation(tmp_path):
    learn = digits_learner(tmp_path, [NoValidation()])
    with learn.no_bar(), learn.no_logging(): c = learn.mix_find(1, [mixup(1.)], seeds=1)
    assert c.gap is None and 'memorises' not in repr(c)

def test_the_gap_reads_no_more_training_rows_than_there_are_validation_rows(tmp_path):
    LOG[:] = []
    class Count(nn.Module):
        def forward(self, x):
            if not self.training: LOG.append(len(x))
            return x
    items = pictures()
    dls = DataLoaders.from_dsets(items[:50], items[50:], bs=5, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Sequential(Count(), net()), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.mix_find(1, [mixup(1.)], seeds=1)
    assert sum(LOG)==10+20+10  # two epochs end with a validation, and the first run with the gap

class FailsInTheGap(Callback):
    "In the second batch of training rows that are looked at for the gap"
    def after_pred(self):
        if isinstance(self.dl, find._Few) and not self.training and self.iter: raise KeyboardInterrupt

def test_training_rows_are_augmented_again_after_an_interrupt_in_the_gap(tmp_path):
    splits = []
    class Augment(Transform):
        split_idx = 0
        def encodes(self, x:torch.Tensor): return splits.append(0) or x
    items = pictures()
    dsets = Datasets(range(60), [[lambda i: items[i][0], Augment()], [lambda i: items[i][1]]], splits=(range(40), range(40, 60)))
    dls = dsets.dataloaders(bs=10, num_workers=0, device='cpu')
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), path=tmp_path, cbs=FailsInTheGap())
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.mix_find(1, [mixup(1.)], seeds=1)
    splits.clear()
    list(learn.dls.train)
    assert len(splits)==40

# What is said

def test_a_bar_and_the_expected_time(tmp_path, capsys):
    learn = digits_learner(tmp_path)
    learn.mix_find(2, [mixup(1.)], seeds=1)
    out = capsys.readouterr().out
    assert out.count('2 runs of 2 epochs: about') == 1 and '[4/4' in out and 'mixup(1.0), seed 0' in out
    with learn.no_bar(): learn.mix_find(2, [mixup(1.)], seeds=1)
    out = capsys.readouterr().out
    words = r'2 runs of 2 epochs: about .* in all\n\[1/2\] none, seed 0: loss .*, accuracy .*\n\[2/2\] mixup\(1.0\), seed 0: .*\n'
    assert re.fullmatch(words, out)
    with learn.no_bar(): learn.mix_find(lambda learn: learn.fine_tune(1), [mixup(1.)], seeds=1)
    assert capsys.readouterr().out.startswith('2 runs: about')
    with learn.no_bar(), learn.no_logging(): learn.mix_find(2, [mixup(1.)], seeds=1)
    assert capsys.readouterr().out==''

BAD = [
    (dict(epochs=0), ValueError, 'epochs=0 must be a whole number of at least 1'),
    (dict(epochs=1.5), ValueError, 'epochs=1.5.*or a function that trains a learner'),
    (dict(epochs=True), ValueError, 'epochs=True'),
    (dict(seeds=0), ValueError, 'seeds=0'),
    (dict(seeds=[1, 1]), ValueError, r'seeds=\[1, 1\]'),
    (dict(seeds=[]), ValueError, r'seeds=\[\]'),
    (dict(seeds=[2**70, 1]), ValueError, r'must be .* whole numbers below 2\*\*32'),
    (dict(seeds=[True, False]), ValueError, r'seeds=\[True, False\]'),
    (dict(lower_is_better='higher'), ValueError, "lower_is_better='higher' must be"),
    (dict(candidates=[]), ValueError, 'at least one recipe'),
    (dict(candidates=[None]), ValueError, 'at least one recipe'),
    (dict(candidates='mixup'), TypeError, "candidates='mixup' must be a list"),
    (dict(candidates=[.4]), TypeError, '0.4.*must be a recipe'),
    (dict(candidates=dict(a=nn.ReLU)), TypeError, "candidate 'a'.*must be a recipe"),
    (dict(candidates=.4), TypeError, 'candidates=0.4'),
]
@pytest.mark.parametrize('kwargs,error,words', BAD)
def test_bad_arguments_are_refused_before_training(kwargs, error, words, tmp_path):
    learn = made('pictures', tmp_path)
    learn.model.register_forward_pre_hook(Trip(1, AssertionError('it trained')))
    before = state(learn)
    with pytest.raises(error, match=words): learn.mix_find(**dict(epochs=1) | kwargs)
    check_as_it_was(before, state(learn))

def test_no_validation_set(tmp_path):
    items = pictures()
    one = DataLoader(items, bs=10)
    for loaders in ([one], [one, DataLoader(items[:0], bs=10)]):
        learn = Learner(DataLoaders(*loaders), net(), loss_func=CrossEntropyLossFlat(), path=tmp_path)
        with pytest.raises(ValueError, match='no validation batches.*split the data'): learn.mix_find(1)
    learn = Learner(DataLoaders(DataLoader(items, bs=100, drop_last=True), one), net(), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    with pytest.raises(ValueError, match='no training batches'): learn.mix_find(1)

class DistributedTrainer(Callback): pass

def test_several_processes_are_refused(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match='distrib_ctx'): digits_learner(tmp_path, [DistributedTrainer()]).mix_find(1)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(RuntimeError, match='distrib_ctx'): digits_learner(tmp_path).mix_find(1)

class Uncopyable(Callback):
    def __deepcopy__(self, memo): raise ValueError('it has an open file')

def test_a_callback_that_cant_be_copied_is_named(tmp_path):
    learn = made('pictures', tmp_path)
    learn.add_cb(Uncopyable())
    before = state(learn)
    with pytest.raises(TypeError, match="Uncopyable can't be copied.*open file.*remove it"): learn.mix_find(1)
    check_as_it_was(before, state(learn))
