"""The benchmarks' one command runs, and writes every table and plot. What the figures are is no test: they depend on the machine."""
import json
import math
import subprocess
import sys
from pathlib import Path

from common import torch_27

root = Path(__file__).parents[1]

@torch_27
def test_command(tmp_path):
    command = [sys.executable, '-m', 'benchmarks', '--quick', '--device', 'cpu', '--threads', '1', '--out', tmp_path]
    res = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    tables = json.loads((tmp_path/'results.json').read_text())
    assert {'callback', 'switch', 'mixing', 'growth', 'loss', 'memory', 'cut', 'training', 'compiled', 'tried', 'budgets'}==set(tables)
    for name,table in tables.items():
        assert f'{name}: {table["title"]}' in res.stdout
        assert table['rows'] and all(math.isfinite(v) for r in table['rows'] for v in r.values() if isinstance(v, float)), name
    assert {o['who'] for o in tables['mixing']['rows']} >= {'clone', 'ours', 'fastai', "the paper's formula"}
    assert {o.name for o in tmp_path.glob('*.png')}=={'speed_mixing.png', 'speed_growth.png'}

def test_unknown_section():
    res = subprocess.run([sys.executable, '-m', 'benchmarks', '--only', 'fastest'], cwd=root, capture_output=True, text=True)
    assert res.returncode!=0 and 'no such section: fastest; there are callback, ' in res.stderr
