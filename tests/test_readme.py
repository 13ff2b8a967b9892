"""README.md is what nbs/index.ipynb says."""
import subprocess
import sys
from pathlib import Path

root = Path(__file__).parents[1]

def test_readme_is_in_step():
    res = subprocess.run([sys.executable, 'tools/readme.py', '--check'], cwd=root, capture_output=True, text=True)
    assert res.returncode==0, res.stdout + res.stderr
