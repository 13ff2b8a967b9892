"""The notebooks are source, lessons and tests at once, for nbdev 3 and nbdev 2: they run, the modules are theirs, and they are clean."""
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from common import copied

root = Path(__file__).parents[1]
package = 'fastai_mixup_ext'
nbdev2 = version('nbdev')<'3'

def nbdev(command, *args, cwd, **env):
    script = Path(sys.executable).with_name(f"nbdev{'_' if nbdev2 else '-'}{command}")
    res = subprocess.run([script, *args], cwd=cwd, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert res.returncode==0, res.stdout
    return res.stdout

drafts = 'upstream.ipynb'  # patches of the newest fastai, which do not fit the older one that goes with nbdev 2

def pages(part):
    "The notebooks of a folder, or the one that stands beside the folders; those beside a `.notest` have a session of their own"
    found = part.rglob('*.ipynb') if part.is_dir() else [part]
    return sorted(o.name for o in found if o.suffix=='.ipynb' and not (o.parent/'.notest').exists() and not (nbdev2 and o.name==drafts)
        and not any(part[0] in '._' for part in o.relative_to(root/'nbs').parts))

parts = {o.name: names for o in sorted((root/'nbs').iterdir()) if (names := pages(o))}

@pytest.fixture(scope='module')
def tree(tmp_path_factory): return copied(tmp_path_factory.mktemp('tree'))

@pytest.mark.parametrize('part', parts)
def test_notebooks_run(tree, part):
    "Every cell of every notebook, with the warnings of this package as errors"
    errors = [f'error:::{package}.{o.stem}' for o in (root/package).glob('[!_]*.py')]
    processes = [f"--n{'_' if nbdev2 else '-'}workers", '0'] if 'PYTEST_XDIST_WORKER' in os.environ else []  # the other runs other tests
    path = ['--path', f'nbs/{part}', '--skip_file_glob', drafts] if nbdev2 else [f'nbs/{part}']
    out = nbdev('test', *path, '--timing', *processes, cwd=tree, MPLBACKEND='Agg', PYTHONWARNINGS=','.join(errors))
    print(out)
    assert 'Success.' in out
    assert sorted(re.findall(r'(\S+\.ipynb)(?: took|:) \d+ sec', out))==parts[part]

@pytest.fixture
def bare(tmp_path):
    "A copy of the project without the modules that nbdev writes"
    shutil.copytree(root/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('_proc', '_docs', 'models', 'data'))
    (tmp_path/package).mkdir()
    for o in ('pyproject.toml', 'settings.ini', f'{package}/__init__.py'): shutil.copy(root/o, tmp_path/o)
    return tmp_path

def source(path):
    "Module `path` as nbdev 3 writes it; for nbdev 2, which words the comments differently, only its code"
    lines = path.read_text().splitlines()
    return [o.rstrip('"') for o in lines if o and not o.startswith(('#', 'Docs: '))] if nbdev2 else lines

def test_modules_are_in_step_with_notebooks(bare):
    nbdev('export', cwd=bare)
    fresh, ours = ({o.name: source(o) for o in (path/package).glob('*.py')} for path in (bare, root))
    assert not [k for k in fresh.keys()|ours.keys() if fresh.get(k)!=ours.get(k)], 'not as the notebooks have it; run nbdev-export'

@pytest.mark.skipif(nbdev2, reason='nbdev 3 cleans more')
def test_notebooks_are_clean(bare):
    nbdev('clean', cwd=bare)
    unclean = [o.name for o in (bare/'nbs').rglob('*.ipynb') if o.read_text()!=(root/o.relative_to(bare)).read_text()]
    assert not unclean, 'run nbdev-clean'
