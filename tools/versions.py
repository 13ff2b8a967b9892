"""Run all tests at one end of the declared versions: `python tools/versions.py current|lowest [ENVIRONMENT]`.

*current* has the newest of everything and nbdev 3; *lowest* has the lower bounds of settings.ini and its nbdev 2.
Either gets a new virtual environment, made by the Python that runs this script, in the folder ENVIRONMENT or in a temporary one."""
import os
import sys
from configparser import ConfigParser
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory

root = Path(__file__).parents[1]
settings = ConfigParser()
settings.read(root/'settings.ini')
requirements, dev = (settings['DEFAULT'][o].split() for o in ('requirements', 'dev_requirements'))
sessions = {
    'current': [['--upgrade', '-e', '.[dev]']],
    'lowest': [[req.replace('>=', '==') for req in requirements] + dev, ['--no-deps', '-e', '.']]}

def main(session, env):
    def sh(*command):
        print('+', *command, flush=True)
        code = run(command, cwd=root, env={**os.environ, 'PATH': f"{env}/bin:{os.environ['PATH']}"}).returncode
        if code: sys.exit(code)
    sh(sys.executable, '-m', 'venv', '--clear', env)
    for packages in sessions[session]: sh(f'{env}/bin/pip', 'install', *packages)
    sh(f'{env}/bin/pytest')

if __name__=='__main__':
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in sessions: sys.exit(__doc__)
    with TemporaryDirectory() as tmp: main(sys.argv[1], *map(os.path.abspath, sys.argv[2:] or [tmp]))
