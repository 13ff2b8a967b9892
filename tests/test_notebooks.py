"""The notebooks are lessons and tests at once: nbdev runs every cell of all of them, with warnings from this package as errors."""
import os
import subprocess
import sys
from pathlib import Path

root = Path(__file__).parents[1]

def test_notebooks():
    command = next(o for o in Path(sys.executable).parent.glob('nbdev?test') if o.name in ('nbdev-test', 'nbdev_test'))  # nbdev 3, nbdev 2
    modules = [f'fastai_mixup_ext.{o.stem}' for o in (root/'fastai_mixup_ext').glob('[!_]*.py')]
    env = {**os.environ, 'MPLBACKEND': 'Agg', 'PYTHONWARNINGS': ','.join(f'error:::{o}' for o in modules)}
    res = subprocess.run([command, '--timing'], cwd=root, env=env, capture_output=True, text=True)
    print(res.stdout)
    assert res.returncode==0 and 'Success.' in res.stdout, res.stdout + res.stderr
