"""What all the tests share: the same seed before each, no window, and no test of a tool that this environment lacks."""
import os, signal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'Agg')
worker = 'PYTEST_XDIST_WORKER' in os.environ  # one of the processes in which the whole suite runs
if worker: os.environ['OMP_NUM_THREADS'] = '1'  # of torch, which is not imported yet, and of all that a test starts: they share the cores
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and so would our children

import pytest
import torch
from fastai.torch_core import defaults as fastai_defaults
from fastai.torch_core import set_seed

try: from hypothesis import settings
except ImportError: pass  # a machine with a GPU may have no more than PyTorch and fastai: `pytest -m cuda`
else:
    settings.register_profile('project', deadline=None, derandomize=True)
    settings.load_profile('project')

here = Path(__file__).parent

def nbdev_2():
    try: return version('nbdev')<'3'
    except PackageNotFoundError: return False

# with nbdev 2: the notebooks and the code; package, README and site are made with nbdev 3
made_with_3 = 'api_surface', 'evidence', 'package', 'readme', 'release', 'site', 'troubleshooting'
collect_ignore = [f'test_{o}.py' for o in made_with_3 if nbdev_2()]
# other people's libraries, in an environment of their own: `.ci/run clients`
collect_ignore += ['clients']

@pytest.fixture(autouse=True)
def seed(): set_seed(42)

@pytest.fixture(autouse=True)
def no_hook_is_left():
    "A global hook that one test left would change the next"
    yield
    from common import global_hooks
    assert not global_hooks()

@pytest.fixture(autouse=True)
def nothing_is_left():
    "A default that one test changed for all would change the next, and a file that it wrote stays"
    before = defaults(),files()
    yield
    assert defaults()==before[0]
    assert files()<=before[1]

def defaults():
    "What is the same for all of torch, of fastai and of the process"
    return dict(dtype=torch.get_default_dtype(), device=torch.get_default_device(), grad=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(), anomaly=torch.is_anomaly_enabled(), threads=torch.get_num_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(), autocast=autocasts(),
        cuda=fastai_defaults.use_cuda, folder=os.getcwd())

def autocasts():
    try: return torch.is_autocast_enabled('cpu')
    except TypeError: return torch.is_autocast_cpu_enabled()  # PyTorch before 2.4

def files():
    "In the root of the project and beside the tests, but for the caches of tools"
    caches = {'__pycache__', '.hypothesis', '.pytest_cache', '.mypy_cache', '.ruff_cache', 'build', '_proc', '_docs'}
    return {o for folder in (here, here.parent) for o in folder.iterdir() if o.name not in caches and o.suffix!='.egg-info'}

@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def device(request):
    "The CPU, and a GPU where there is one"
    return request.param

# The whole suite runs in two processes, if pytest-xdist is there. A file stays together, since it may make something once for all of
# its tests: by its name, and not by a mark of a group. pytest-xdist 3.8 writes that into an item's `_nodeid`, which pytest 9.2 has no more,
# and a worker, which reads the command line anew, does not know that groups were asked for here

@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    whole = config.args_source is config.ArgsSource.TESTPATHS and not (config.option.markexpr or config.option.keyword)
    if whole and not worker and getattr(config.option, 'numprocesses', 0) is None:
        vars(config.option).update(numprocesses=2, dist='loadfile', loadscopereorder=False)

longest = 'notebooks', 'site', 'distributed', 'nosync', 'faults', 'exits', 'demo', 'fuzz', 'benchmarks', 'long', 'release'
longest = [f'test_{o}' for o in longest]  # first: a short file at the end keeps nobody waiting

def pytest_collection_modifyitems(config, items):
    "The tests of a GPU are there only where one is; asked for, they do not pass unseen"
    if worker: items.sort(key=lambda o: longest.index(o.path.stem) if o.path.stem in longest else len(longest))
    if torch.cuda.is_available(): return
    if config.option.markexpr=='cuda': pytest.exit('pytest -m cuda: torch finds no GPU here', 1)
    away = [o for o in items if o.get_closest_marker('cuda')]
    items[:] = [o for o in items if o not in away]
    if away: config.hook.pytest_deselected(items=away)

def pytest_ignore_collect(collection_path, config):
    "A machine with a GPU may lack what the other tests import"
    if config.option.markexpr=='cuda' and collection_path.suffix=='.py' and collection_path.name!='test_cuda.py': return True
