"""The benchmarks' one command runs, and writes every table and plot. What the figures are is no test: they depend on the machine."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.measure import busy
from benchmarks.sections import budgets, sections
from common import torch_27

root = Path(__file__).parents[1]

@torch_27
def test_command(tmp_path):
    command = [sys.executable, '-m', 'benchmarks', '--quick', '--device', 'cpu', '--threads', '1', '--out', tmp_path]
    res = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    tables = json.loads((tmp_path/'results.json').read_text())
    assert {*tables}=={*'callback switch family mixing growth loss memory cut training step compiled tried budgets'.split()}
    for name,table in tables.items():
        assert f'{name}: {table["title"]}' in res.stdout
        assert table['rows'] and all(math.isfinite(v) for r in table['rows'] for v in r.values() if isinstance(v, float)), name
    assert {o['who'] for o in tables['mixing']['rows']} >= {'clone', 'ours', 'fastai', "the paper's formula"}
    assert {o.name for o in tmp_path.glob('*.png')}=={'speed_mixing.png', 'speed_growth.png'}

def test_budgets_of_a_gpu():
    "Ours against a number, and against the quickest peer in each size"
    def row(who, time): return {'batch': '64×3×32×32', 'who': who, 'time/clone': time}
    mixing = [row('ours', 1.2), row('ours, fresh memory', 1.31), row('torchvision', 1.1), row('fastai', 2.), row('kornia', .1)]
    step = [{'batch': '512×3×32×32', 'who': k, 'time/none': v} for k,v in dict(none=1., fastai=1.1, ours=1.004).items()]
    rows = budgets(dict(mixing=dict(rows=mixing), step=dict(rows=step)), 'cuda')
    assert [(o['budget'], o['met']) for o in rows]==[(1.01, 'yes'), (1.3, 'yes'), (1.3, 'missed'), (1.1, 'missed')]

def test_programs_beside_run_and_end():
    with pytest.raises(KeyboardInterrupt), busy(2) as beside:
        assert [o.poll() for o in beside]==[None, None]
        raise KeyboardInterrupt
    assert None not in [o.poll() for o in beside]

def test_unknown_section():
    with pytest.raises(SystemExit, match='no such section: fastest; there are callback, '): main(only='fastest')

def test_a_section_that_fails_leaves_the_others(monkeypatch, tmp_path, capfd):
    def fails(run): raise RuntimeError('no such library')
    monkeypatch.setitem(sections, 'callback', fails)
    monkeypatch.setitem(sections, 'gpu', lambda run: {'kernels': [dict(who='ours', kernels=3)]})
    with pytest.raises(SystemExit, match='failed: callback'):
        main(only='callback,gpu', quick=True, device='cpu', threads=torch.get_num_threads(), out=tmp_path)
    assert {*json.loads((tmp_path/'results.json').read_text())}=={'kernels'}
    assert 'no such library' in capfd.readouterr().err
