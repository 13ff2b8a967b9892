"""The evidence pages show the results that are kept, and the harness below them counts, pairs and sorts into bands as it says."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

root = Path(__file__).parents[1]/'nbs/evidence'
sys.path.insert(0, str(root))
sys.path.insert(0, str(root.parents[1]/'tools'))
import check_pages
import harness

pages = sorted(root.glob('*.ipynb'))
kept = {o.stem: json.loads(o.read_text()) for o in sorted((root/'results').glob('*.json'))}

def outputs(page):
    "All Markdown that the page shows as output, and as it stands in the file"
    cells = json.loads(page.read_text())['cells']
    data = [o.get('data', {}) for c in cells for o in c.get('outputs', ())]
    return '\n'.join(''.join(o.get('text/markdown', '')) for o in data)

def page_of(name): return next(o for o in pages if o.name[:2]==name[:2])

def code_of(page): return '\n'.join(''.join(c['source']) for c in json.loads(page.read_text())['cells'] if c['cell_type']=='code')

# The pages

@pytest.mark.parametrize('name', kept)
def test_page_shows_what_is_kept(name):
    "The committed table and verdict are those of the committed results"
    pairs = harness.kept_pairs(kept[name])
    shown = outputs(page_of(name))
    for row in harness.rows_of(pairs): assert '| '+' | '.join(row)+' |' in shown
    assert f"**{kept[name]['claim']}: {harness.overall(pairs)}.**" in shown

@pytest.mark.parametrize('name', kept)
def test_enough_seeds(name):
    for c in kept[name]['comparisons']: assert len(c['plain'])==len(c['mixup'])>=5 and np.isfinite(c['plain']+c['mixup']).all()

@pytest.mark.parametrize('page', pages, ids=lambda o: o.stem)
def test_page(page):
    "Every page ran, is small, shows its results before its runs, and says how it is made anew"
    text,code = page.read_text(),code_of(page)
    assert outputs(page) and len(text)<150_000
    if page.stem!='00_summary':
        assert f'MIXUP_EVIDENCE=full nbdev-test --save nbs/evidence/{page.name}' in text
        assert any(page_of(o)==page for o in kept)
        assert code.index('result: kept') < code.index('pick(')
        assert 'paired t-test' not in text  # the tables of an earlier engine
    assert max(len(o) for o in code.splitlines() if not o.startswith('#| fig-alt'))<=130

@pytest.mark.parametrize('page', pages, ids=lambda o: o.stem)
def test_page_is_fit_for_readers(page):
    "No line of code is cut off, and the versions that a page was made with stand on it"
    assert not check_pages.long_lines(page) and not check_pages.needs_versions(page) and not check_pages.compare_kept(page)

def test_summary_shows_every_page():
    "Each file of results has a sentence, a number and a band; the counts are those of all comparisons"
    shown = outputs(root/'00_summary.ipynb')
    for name,o in kept.items():
        pairs = harness.kept_pairs(o)
        rows = [f'{row[0]} | ' + f"{o['measure']}: {row[1].split(' ±')[0]} → {row[2].split(' ±')[0]}, {row[3]} | {band}"
            for row,band in zip(harness.rows_of(pairs), harness.bands(pairs))]
        assert name=='10_advice' or any(row in shown for row in rows), name
    found = [band for o in kept.values() for band in harness.bands(harness.kept_pairs(o))]
    assert f'{len(found)} comparisons: ' in shown
    for band in harness.GAIN, harness.UNSURE, harness.LOSS: assert f'{band} in {found.count(band)}' in shown

# Bands

def made(seed=0, n=8):
    "Pairs with a clear gain, a clear loss, and no effect"
    rng = np.random.default_rng(seed)
    plain = 10+rng.normal(size=n)
    shifts = -2, 2, 0
    return [harness.Pair(str(o), plain, plain+o+.1*rng.normal(size=n)) for o in shifts]

def test_bands():
    "All measures are better if lower, whatever the claim says"
    assert harness.bands(made())==[harness.GAIN, harness.LOSS, harness.UNSURE]
    for o in made(): assert harness.bands([harness.Pair(o.setting, o.plain, o.mixup, higher=True)])==harness.bands([o])
    plain = made()[0].plain
    assert harness.bands([harness.Pair('', plain, plain)])==[harness.UNSURE]

def test_bands_after_holm():
    "A p just below 0.05 counts alone, and not among others without effect; Holm's p is that of the definition"
    pairs = made(n=6)
    ps = [ttest_rel(o.mixup, o.plain).pvalue for o in pairs]
    order = np.argsort(ps)
    by_hand = np.empty(3)
    by_hand[order] = np.minimum(np.maximum.accumulate([ps[o]*(3-k) for k,o in enumerate(order)]), 1)
    np.testing.assert_allclose(harness.corrected(pairs), by_hand, rtol=1e-9)
    weak = harness.Pair('', [0.]*6, np.array([-1, -1, -1, -1, -.2, .4]))
    assert .005<weak.effect.p<.05 and harness.bands([weak])==[harness.GAIN]
    assert harness.bands([weak]+[pairs[2]]*9)[0]==harness.UNSURE

def test_overall():
    assert harness.overall(made())=="clear gain in 1, can't tell in 1, clear loss in 1 of 3"
    assert harness.overall(made()[:1])=='clear gain in 1 of 1'

def test_change_in_per_cent():
    "The change does not depend on the unit of the measure"
    o, = made()[:1]
    small = harness.Pair('', np.array(o.plain)/7, np.array(o.mixup)/7)
    assert np.allclose([getattr(small.change, k) for k in ('mean', 'low', 'high')], [getattr(o.change, k) for k in ('mean', 'low', 'high')])
    assert o.change.mean==pytest.approx(100*(np.mean(o.mixup)/np.mean(o.plain)-1))

def test_visible_effects_are_seen():
    "Four of five draws of the smallest visible difference are told apart"
    rng = np.random.default_rng(0)
    d = rng.normal(size=6)
    d = (d-d.mean())/d.std(ddof=1)
    least, = harness.visible([harness.Pair('', [10.]*6, 10+d)])
    drawn = least+rng.normal(size=(4000, 6))
    seen = np.mean([ttest_rel(o, np.zeros(6)).pvalue<.05 for o in drawn])
    assert seen==pytest.approx(.8, abs=.02)

def test_forest(monkeypatch, tmp_path):
    "Every comparison has a line of its own in the plot, in the order of the bands"
    monkeypatch.setattr(harness, 'results', tmp_path)
    for name,base in ('aa_x', 'plain'), ('bb_x', 'plain'), ('bb_y', 'b'):
        rows = [dict(setting=o.setting, plain=o.plain, mixup=o.mixup) for o in made()]
        (tmp_path/f'{name}.json').write_text(json.dumps(dict(claim='', measure=name, columns=[base, 'c'], comparisons=rows)))
    seen = []
    monkeypatch.setattr(harness, 'show', lambda fig, colours: seen.extend(o.get_text() for o in fig.axes[0].get_yticklabels()))
    harness.forest('aa_x', 'bb_x', 'bb_y')
    for k,shift in enumerate((-2, 0, 2)):
        assert sorted(seen[3*k:3*k+3])==[f'aa: {shift}', f'bb: {shift} (bb_x)', f'bb: {shift}, against b (bb_y)']

# Runs

def test_passes():
    assert harness.passes((torch.zeros(1000),), 30)==15 and harness.passes((torch.zeros(20),), 3, steps=2)==6

def test_batches():
    "An epoch has `steps` batches, in which every row turns up as often as the next one"
    x = torch.arange(7)
    batches = list(harness.Batches(x, x, bs=5, steps=14))
    assert len(batches)==14 and all(len(o)==5 for o,_ in batches)
    assert torch.cat([o for o,_ in batches]).bincount().tolist()==[10]*7
    assert all((a==b).all() for a,b in batches)

def test_runs_are_paired(monkeypatch):
    "Without and with mixup: the same first weights, the same batches"
    seen = []
    batch_of = harness.Batches.__iter__
    def spy(self):
        for b in batch_of(self):
            seen[-1].append(b[1])
            yield b
    monkeypatch.setattr(harness.Batches, '__iter__', spy)
    class First(harness.nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            seen.append([self.weight.detach().clone()])
    data = torch.randn(60, 4), torch.randint(3, (60,))
    a,b = (harness.train(First, data, seed=1, alpha=alpha, epochs=2, bs=16) for alpha in (0, .4))
    assert all(torch.equal(*o) for o in zip(*seen)) and len(seen[0])==len(seen[1])==21
    assert not torch.equal(a.model.weight, b.model.weight)

def test_quick_run_keeps_nothing(monkeypatch, tmp_path):
    "A quick page leaves the kept results alone, and fails if they are not its own"
    monkeypatch.setattr(harness, 'results', tmp_path)
    def keep_one(full, claim='it helps', setting='a', values=(1., 2.)):
        monkeypatch.setattr(harness, 'full', full)
        harness.keep('page', claim, '', '', [harness.Pair(setting, values, values)])
    keep_one(True)
    before = (tmp_path/'page.json').read_text()
    keep_one(False, values=(3., 4.))
    assert (tmp_path/'page.json').read_text()==before
    with pytest.raises(AssertionError, match='MIXUP_EVIDENCE=full'): keep_one(False, claim='it hurts')
    with pytest.raises(AssertionError, match='MIXUP_EVIDENCE=full'): keep_one(False, setting='b')
