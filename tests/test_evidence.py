"""The evidence pages show the results that are kept, and the harness below them counts, pairs and judges as it says."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

root = Path(__file__).parents[1]/'nbs/evidence'
sys.path.insert(0, str(root))
import harness

pages = sorted(root.glob('*.ipynb'))
kept = {o.stem: json.loads(o.read_text()) for o in sorted((root/'results').glob('*.json'))}

def outputs(page):
    "All Markdown that the page shows as output, and as it stands in the file"
    cells = json.loads(page.read_text())['cells']
    data = [o.get('data', {}) for c in cells for o in c.get('outputs', ())]
    return '\n'.join(''.join(o.get('text/markdown', '')) for o in data)

def page_of(name): return next(o for o in pages if o.name[:2]==name[:2])

@pytest.mark.parametrize('name', kept)
def test_page_shows_what_is_kept(name):
    "The committed table, tests and verdict are those of the committed results"
    o = kept[name]
    comparisons = harness.kept_comparisons(o)
    shown = outputs(page_of(name))
    for c in comparisons: assert '| '+' | '.join(c.cells())+' |' in shown
    assert f"**{o['claim']}: {harness.overall(comparisons)}.**" in shown

@pytest.mark.parametrize('name', kept)
def test_enough_seeds(name):
    for c in kept[name]['comparisons']: assert len(c['plain'])==len(c['mixup'])>=5 and np.isfinite(c['plain']+c['mixup']).all()

def test_summary_is_up_to_date():
    shown = outputs(root/'00_summary.ipynb')
    assert len(shown.splitlines())==len(kept)+2
    for o,row in zip(kept.values(), shown.splitlines()[2:]):
        found = [c.verdict for c in harness.kept_comparisons(o)]
        assert o['claim'] in row and o['paper'] in row
        for word in 'confirmed', 'not shown', 'contrary': assert (f'{found.count(word)} {word}' in row) == (word in found)

@pytest.mark.parametrize('page', pages, ids=lambda o: o.stem)
def test_page(page):
    "Every page ran, is small, is summed up, and says how it is made anew"
    text = page.read_text()
    assert outputs(page) and len(text)<150_000
    if page.stem!='00_summary':
        assert f'MIXUP_EVIDENCE=full nbdev-test --save nbs/evidence/{page.name}' in text
        assert any(page_of(o)==page for o in kept)

def test_verdicts():
    rng = np.random.default_rng(0)
    plain = rng.normal(size=8)
    lower,same = plain-2+.1*rng.normal(size=8), plain+.1*rng.normal(size=8)
    assert harness.Comparison('', plain, lower).verdict=='confirmed'
    assert harness.Comparison('', plain, lower, higher=True).verdict=='contrary'
    assert harness.Comparison('', plain, same).verdict=='not shown'
    assert harness.Comparison('', plain, plain).verdict=='not shown'
    good,bad,none = harness.Comparison('', plain, lower), harness.Comparison('', lower, plain), harness.Comparison('', plain, same)
    assert harness.overall([good, good])=='confirmed' and harness.overall([none])=='not shown'
    assert harness.overall([good, bad, none])=='confirmed in 1 of 3, contrary in 1 of 3'

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
    def conclude(full, claim='it helps', setting='a', values=(1., 2.)):
        monkeypatch.setattr(harness, 'full', full)
        return harness.conclude('page', claim, '', '', [harness.Comparison(setting, values, values)])
    conclude(True)
    before = (tmp_path/'page.json').read_text()
    conclude(False, values=(3., 4.))
    assert (tmp_path/'page.json').read_text()==before
    with pytest.raises(AssertionError, match='MIXUP_EVIDENCE=full'): conclude(False, claim='it hurts')
    with pytest.raises(AssertionError, match='MIXUP_EVIDENCE=full'): conclude(False, setting='b')
