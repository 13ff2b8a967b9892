"""What all the tests share: the same seed before each, no window, and no test of a tool that this environment lacks."""
import os, signal
from importlib.metadata import version

os.environ.setdefault('MPLBACKEND', 'Agg')
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and so would our children

import pytest
from fastai.torch_core import set_seed
from hypothesis import settings

settings.register_profile('project', deadline=None, derandomize=True)
settings.load_profile('project')

# with nbdev 2: the notebooks and the code; package, README and site are made with nbdev 3
collect_ignore = [f'test_{o}.py' for o in ('api_surface', 'package', 'readme', 'release', 'site') if version('nbdev')<'3']
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
