"""What all the tests share: the same seed before each, no window, and no test of a tool that this environment lacks."""
import os
from importlib.metadata import version

os.environ.setdefault('MPLBACKEND', 'Agg')

import pytest
from fastai.torch_core import set_seed
from hypothesis import settings

settings.register_profile('project', deadline=None, derandomize=True)
settings.load_profile('project')

# nbdev 2 runs the notebooks; packaging, README and site are nbdev 3's
collect_ignore = [] if version('nbdev')>='3' else ['test_package.py', 'test_release.py', 'test_api_surface.py', 'test_readme.py', 'test_site.py']

@pytest.fixture(autouse=True)
def seed(): set_seed(42)
