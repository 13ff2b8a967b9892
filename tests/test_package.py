"""What the project says of itself agrees: pyproject.toml with settings.ini, the changelog with the version, imports with the layers."""
import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from nbdev.config import get_config
from packaging.requirements import Requirement

import fastai_mixup_ext

try: import tomllib
except ImportError: import tomli as tomllib  # Python 3.10

root = Path(__file__).parents[1]
package = root/'fastai_mixup_ext'
project = tomllib.loads((root/'pyproject.toml').read_text())['project']
api = root/'nbs/api'  # a module's number is its layer; the demo's are above all others
layers = [o.stem.split('_', 1)[1] for folder in (api, api/'demo') for o in sorted(folder.glob('[0-9]*.ipynb'))]

sources = packages_distributions()  # of every module that can be imported here

def names(reqs): return {o.name.lower() for o in map(Requirement, reqs) if 'extra' not in str(o.marker)}

def imports(module):
    "The names of the modules that `module` imports, at its top or inside a function; one of this package starts with a dot"
    for node in ast.walk(ast.parse((package/f'{module}.py').read_text())):
        if isinstance(node, ast.Import): yield from (o.name for o in node.names)
        if isinstance(node, ast.ImportFrom):  # one inside a function keeps the package's name
            yield '.'*node.level + re.sub(r'^fastai_mixup_ext\b\.?', '.', node.module or '')


def test_settings_match_pyproject():
    settings = ConfigParser()
    settings.read(root/'settings.ini')
    settings = dict(settings['DEFAULT'])
    dev = names(settings.pop('dev_requirements').split())
    pins = {'execnb', 'fastgit', 'ghapi', 'plum-dispatch'}  # what nbdev 2 and the oldest fastai need an old version of
    assert dev - pins <= names(project['optional-dependencies']['dev'] + project['optional-dependencies']['docs'])

    cfg = get_config(root).d
    classifiers = dict(o.split(' :: ')[:2] for o in project['classifiers'])
    shared = '''repo lib_name min_python doc_path lib_path nbs_path recursive tst_flags put_version_in_init branch custom_sidebar
        doc_host doc_baseurl git_url title author author_email description user'''.split()
    assert settings == {k: str(cfg[k]) for k in shared} | dict(
        version=fastai_mixup_ext.__version__, license={'Apache-2.0': 'apache2'}[project['license']], update_pyproject='False',
        copyright=f"2026 onwards, {cfg['author']}", keywords=' '.join(cfg['keywords']), audience=classifiers['Intended Audience'],
        language=classifiers['Natural Language'], status=classifiers['Development Status'][0],
        requirements=' '.join(project['dependencies']), console_scripts=' '.join(f'{k}={v}' for k,v in project['scripts'].items()))

def test_changelog_has_the_version():
    assert f'\n## [{fastai_mixup_ext.__version__}]' in (root/'CHANGELOG.md').read_text()

@pytest.mark.parametrize('layer,module', [*enumerate(layers)])
def test_imports_go_one_way(layer, module):
    below = {f'.{o}' for o in layers[:layer]} | ({'.'} if module.startswith('demo') else set())  # a program may ask for the version
    if module=='demo_start': below.add('.demo')  # which it loads when it has answered what needs no torch
    assert {o for o in imports(module) if o.startswith('.')} <= below

@pytest.mark.parametrize('module', layers)
def test_no_line_is_wider_than_120(module):
    "But for the list of names that nbdev writes"
    lines = (package/f'{module}.py').read_text().splitlines()
    assert not [o for o in lines if len(o)>120 and not o.startswith('__all__')]

@pytest.mark.parametrize('module', layers)
def test_imports_only_the_dependencies(module):
    dists = {'torch'} if module=='mix' else names([*project['dependencies'], *requires('fastai'), 'numpy'])
    tops = {o.split('.')[0] for o in imports(module) if not o.startswith('.')} - sys.stdlib_module_names
    assert {d.lower() for o in tops for d in sources.get(o, [o])} <= dists

def test_three_runtime_dependencies(): assert names(project['dependencies'])=={'fastai', 'torch', 'fastcore'}

@pytest.mark.parametrize('module', layers)
def test_no_pickle_eval_shell_or_network(module):
    tops = {o.split('.')[0] for o in imports(module)}
    assert not tops & {'ftplib', 'http', 'marshal', 'pickle', 'pty', 'requests', 'shelve', 'socket', 'ssl', 'subprocess', 'urllib'}
    tree = ast.parse((package/f'{module}.py').read_text())
    called = {ast.unparse(o.func) for o in ast.walk(tree) if isinstance(o, ast.Call)}
    assert not called & {'__import__', 'compile', 'eval', 'exec', 'load_learner', 'os.popen', 'os.system', 'torch.load', 'untar_data'}

def test_importing_loads_nothing_that_fastai_did_not():
    code = '''if True:
        import sys, time
        import fastai.basics
        before, start = {*sys.modules}, time.perf_counter()
        from fastai_mixup_ext import MixUpCallback
        print(f'{1000*(time.perf_counter()-start):.0f}', *{o.split('.')[0] for o in {*sys.modules}-before})'''
    res = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, check=True)
    ms, *loaded = res.stdout.split()
    print(f'import fastai_mixup_ext: {ms} ms on top of fastai.basics')
    assert {*loaded} - sys.stdlib_module_names <= {'fastai_mixup_ext', 'fastai', 'torch', 'fastcore'}

def test_workflow_actions_are_pinned():
    uses = [o for f in (root/'.github/workflows').glob('*.yml') for o in re.findall(r'uses:\s*(.*)', f.read_text())]
    assert uses and all(re.fullmatch(r'[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+', o) for o in uses), uses
