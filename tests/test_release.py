"""What a release would publish: the files of wheel and sdist, and the wheel at work in an environment and a folder of its own."""
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import fastai_mixup_ext
from common import copied

root = Path(__file__).parents[1]
bin = Path(sys.executable).parent
name = f'fastai_mixup_ext-{fastai_mixup_ext.__version__}'
modules = {f'fastai_mixup_ext/{o.name}' for o in (root/'fastai_mixup_ext').glob('*.py')} | {'fastai_mixup_ext/py.typed'}

def sh(*command, **kwargs):
    res = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    assert res.returncode==0, res.stdout
    return res.stdout

@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "A folder with the wheel and the sdist"
    res = tmp_path_factory.mktemp('dist')
    sh(sys.executable, '-m', 'build', '--outdir', res, copied(tmp_path_factory.mktemp('copy')))
    return res

@pytest.fixture(scope='module')
def env(dist, tmp_path_factory):
    "The `bin` of an environment with the wheel, which borrows the dependencies from this one"
    res = tmp_path_factory.mktemp('env')
    venv.create(res)
    site, = res.glob('lib/python*/site-packages')
    (site/'borrowed.pth').write_text(sysconfig.get_path('purelib'))
    sh(bin/'pip', '--python', res/'bin/python', 'install', '--no-deps', '--no-index', *dist.glob('*.whl'))
    return res/'bin'

def test_twine_accepts(dist): assert sh(bin/'twine', 'check', '--strict', *dist.iterdir()).count('PASSED')==2

def test_wheel_holds_the_package_and_nothing_else(dist):
    files = {*zipfile.ZipFile(dist/f'{name}-py3-none-any.whl').namelist()}
    info = {f'{name}.dist-info/{o}' for o in ('licenses/LICENSE', 'METADATA', 'WHEEL', 'entry_points.txt', 'top_level.txt', 'RECORD')}
    assert files==modules|info

def files_under(folder):
    "The files of `folder` that belong to a release: no caches, nothing that a build leaves behind"
    made = {'__pycache__', '_proc', '_docs', '.ipynb_checkpoints', 'models', 'sidebar.yml'}
    return {o.relative_to(root).as_posix() for o in (root/folder).rglob('*') if o.is_file() and not made & {*o.parts}}

@pytest.fixture(scope='module')
def sdist(dist):
    "The names of the files in the sdist"
    with tarfile.open(dist/f'{name}.tar.gz') as f: return {o.name.removeprefix(f'{name}/') for o in f.getmembers() if o.isfile()}

def test_sdist_holds_what_the_tests_need_and_nothing_else(sdist):
    folders = '.ci', '.github', 'benchmarks', 'examples', 'index_files', 'nbs', 'tests', 'tools'
    single = {'CHANGELOG.md', 'CONTRIBUTING.md', 'LICENSE', 'MANIFEST.in', 'README.md', 'pyproject.toml', 'settings.ini'}
    made = {'PKG-INFO', 'setup.cfg'}
    held = {o for o in sdist if not o.startswith('fastai_mixup_ext.egg-info/')}
    assert held==modules|single|made|set().union(*map(files_under, folders))

def test_sdist_holds_tests_settings_and_pictures(sdist):
    for o in 'tests/test_release.py', 'tests/api_surface.txt', 'settings.ini', 'nbs/index.ipynb': assert o in sdist
    assert {o for o in sdist if o.startswith('index_files/')}=={f'index_files/{o.name}' for o in (root/'index_files').glob('*.png')}!=set()

def test_wheel_is_what_runs(env, tmp_path):
    file = sh(env/'python', '-c', 'import fastai_mixup_ext as m; print(m.__file__)', cwd=tmp_path).splitlines()[-1]
    assert Path(file).is_relative_to(env.parent)

def test_demo_tells_its_version(env, tmp_path):
    assert fastai_mixup_ext.__version__ in sh(env/'mixup-demo', '--version', cwd=tmp_path)

def test_demo_runs_from_another_folder(env, tmp_path):
    sh(env/'mixup-demo', '--epochs', '2', '--seeds', '1', '--out', 'report', cwd=tmp_path)
    assert {'mixed_batch.png', 'forest.png', 'curves.png', 'results.csv', 'report.html'} <= {o.name for o in (tmp_path/'report').iterdir()}

def test_type_checker_knows_the_public_names(env, tmp_path):
    "Each `type: ignore` names an error that the checker must find"
    (tmp_path/'user.py').write_text('''
import torch
from fastai_mixup_ext import Mix, MixCallback, MixUpCallback, blend, cutmix, deranged, mixed_loss, mixup, one_of, until

x = torch.rand(4, 3, 8, 8)
y = torch.tensor([0, 1, 1, 0])
mix: Mix = mixup(.4)(x, y, pair=deranged)
mixed: torch.Tensor = blend(x, mix)
loss: torch.Tensor = mixed_loss(torch.nn.CrossEntropyLoss(), torch.rand(4, 2), y, mix)
MixUpCallback(1, p=until(.8), seed=42)
MixCallback(one_of(mixup(.4), cutmix(1.)), at=[torch.nn.Linear(1, 1)])

share: float = mix.lam  # type: ignore[assignment]
blend(x, .3)  # type: ignore[arg-type]
Mix(y)  # type: ignore[call-arg]
MixUpCallback('often')  # type: ignore[arg-type]
MixUpCallback(.4, .5)  # type: ignore[call-arg]
MixUpCallback(probability=.5)  # type: ignore[call-arg]
''')
    sh(bin/'mypy', '--python-executable', env/'python', '--warn-unused-ignores', 'user.py', cwd=tmp_path)
