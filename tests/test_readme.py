"""README.md is what nbs/index.ipynb says, and can be read on a package index, where the repository is not around it."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nbdev.config import get_config

root = Path(__file__).parents[1]
text = (root/'README.md').read_text()

def test_readme_is_in_step():
    res = subprocess.run([sys.executable, 'tools/readme.py', '--check'], cwd=root, capture_output=True, text=True)
    assert res.returncode==0, res.stdout + res.stderr

@pytest.fixture
def links(): return re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'(?:href|src)="([^"]+)"', text)

def test_links_are_whole(links):
    assert links
    assert not [o for o in links if not o.startswith(('https://', '#'))], 'broken on a package index'

def test_pictures_are_files_of_the_repository(links):
    cfg = get_config(root)
    ours = [o for o in links if o.startswith(f'{cfg.git_url}/')]
    pictures = [o for o in ours if '/raw/' in o]
    assert pictures
    for o in ours: assert (root/re.sub(f'^{cfg.git_url}/(raw|blob)/{cfg.branch}/', '', o)).is_file(), o
