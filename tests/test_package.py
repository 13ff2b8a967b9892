"""What the project says of itself agrees: pyproject.toml with settings.ini, modules with notebooks, imports with the layers."""
import ast
import re
import shutil
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
layers = [o.stem.split('_', 1)[1] for o in sorted((root/'nbs/api').glob('[0-9]*.ipynb'))]  # a module's number is its layer

def names(reqs): return {Requirement(o).name.lower() for o in reqs}

def imports(module):
    "The names of the modules that `module` imports, at its top or inside a function; one of this package starts with a dot"
    for node in ast.walk(ast.parse((package/f'{module}.py').read_text())):
        if isinstance(node, ast.Import): yield from (o.name for o in node.names)
        if isinstance(node, ast.ImportFrom): yield '.'*node.level + (node.module or '')


def test_settings_match_pyproject():
    settings = ConfigParser()
    settings.read(root/'settings.ini')
    settings = dict(settings['DEFAULT'])
    dev = names(settings.pop('dev_requirements').split())
    assert dev - {'execnb', 'fastgit', 'ghapi'} <= names(project['optional-dependencies']['dev'])  # those three only pin what nbdev 2 can use

    cfg = get_config(root).d
    classifiers = dict(o.split(' :: ')[:2] for o in project['classifiers'])
    shared = '''repo lib_name min_python doc_path lib_path nbs_path recursive tst_flags put_version_in_init branch custom_sidebar
        doc_host doc_baseurl git_url title author author_email description user'''.split()
    assert settings == {k: str(cfg[k]) for k in shared} | dict(
        version=fastai_mixup_ext.__version__, license={'Apache-2.0': 'apache2'}[project['license']], update_pyproject='False',
        copyright=f"2026 onwards, {cfg['author']}", keywords=' '.join(cfg['keywords']), audience=classifiers['Intended Audience'],
        language=classifiers['Natural Language'], status=classifiers['Development Status'][0], requirements=' '.join(project['dependencies']),
        console_scripts=' '.join(f'{k}={v}' for k,v in project['scripts'].items()))

def test_changelog_has_the_version():
    assert f'\n## [{fastai_mixup_ext.__version__}]' in (root/'CHANGELOG.md').read_text()

def test_modules_are_in_step_with_notebooks(tmp_path):
    shutil.copytree(root/'nbs', tmp_path/'nbs', ignore=lambda path, fs: [o for o in fs if Path(path, o).is_file() and not o.endswith('.ipynb')])
    (tmp_path/package.name).mkdir()
    for o in (root/'pyproject.toml', package/'__init__.py'): shutil.copy(o, tmp_path/o.relative_to(root))
    subprocess.run([Path(sys.executable).with_name('nbdev-export')], cwd=tmp_path, check=True)
    fresh, ours = ({o.name: o.read_text() for o in (path/package.name).glob('*.py')} for path in (tmp_path, root))
    assert fresh==ours

@pytest.mark.parametrize('layer,module', [*enumerate(layers)])
def test_imports_go_one_way(layer, module):
    ours = {o[1:] for o in imports(module) if o.startswith('.')}
    assert ours <= {*layers[:layer]}, f'{module} may import only the modules before it'

@pytest.mark.parametrize('module', layers)
def test_imports_only_the_dependencies(module):
    dists = {'torch'} if module=='mix' else names(project['dependencies'] + requires('fastai'))
    tops = {o.split('.')[0] for o in imports(module) if not o.startswith('.')} - sys.stdlib_module_names
    assert {d.lower() for o in tops for d in packages_distributions().get(o, [o])} <= dists

def test_three_runtime_dependencies(): assert names(project['dependencies'])=={'fastai', 'torch', 'fastcore'}

@pytest.mark.parametrize('module', layers)
def test_no_pickle_eval_shell_or_network(module):
    assert not {'pickle', 'marshal', 'shelve', 'subprocess', 'pty', 'socket', 'ssl', 'http', 'urllib', 'requests', 'ftplib'} & {o.split('.')[0] for o in imports(module)}
    tree = ast.parse((package/f'{module}.py').read_text())
    called = {ast.unparse(o.func) for o in ast.walk(tree) if isinstance(o, ast.Call)}
    assert not {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'torch.load', 'load_learner', 'untar_data'} & called

def test_importing_loads_nothing_that_fastai_did_not():
    code = '''
        import sys, time
        import fastai.basics
        before, start = {*sys.modules}, time.perf_counter()
        from fastai_mixup_ext import MixUpCallback
        print(f'{1000*(time.perf_counter()-start):.0f}', *{o.split('.')[0] for o in {*sys.modules}-before} - {*before} - sys.stdlib_module_names)'''
    res = subprocess.run([sys.executable, '-c', re.sub('\n +', '\n', code)], capture_output=True, text=True, check=True)
    ms, *loaded = res.stdout.split()
    print(f'import fastai_mixup_ext: {ms} ms on top of fastai.basics')
    assert loaded==['fastai_mixup_ext']

def test_workflow_actions_are_pinned():
    uses = [o for f in (root/'.github/workflows').glob('*.yml') for o in re.findall(r'uses:\s*(.*)', f.read_text())]
    assert uses and all(re.fullmatch(r'[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+', o) for o in uses), uses
