"""Do the tests notice a mistake? `pip install cosmic-ray`, then `python tools/mutants.py --sample 200 --seed 0`.

cosmic-ray makes mutants: copies of the package with one small change each, such as `<` for `<=`, or a line that is missing.
Each runs against its module's own tests, and if it survives those, against the fast rest, two mutants at a time.
Both pass first without a mutant, the rest when it is first wanted; a mutant may take five times as long.
A survivor is a hole in the tests, a line that does nothing, or equivalent; those stand with their reason in `equivalent_mutants.txt`."""
import ast
import difflib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from typing import NamedTuple

os.environ.update(OMP_NUM_THREADS='1', MPLBACKEND='Agg', PYTHONDONTWRITEBYTECODE='1')
sys.dont_write_bytecode = True  # a mutant as large as the one before, made in the same second, would be that one

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names
from fastcore.script import call_parse
from parso.python.tree import Keyword

root = Path(__file__).parents[1]
package = 'fastai_mixup_ext'
modules = sorted(o.stem for o in (root/package).glob('[!_]*.py') if not o.stem.startswith('demo'))
own_tests = dict(  # where the name of the file does not say it
    tensors='mix data', classes='losses laws', losses='losses laws edges', callback='callbacks family data midway', mix='mix laws edges',
    regmix='regmixup', effects='compare', trials='compare', find='compare', unbalanced='rare')
fast = 'mix recipes losses pairing schedules laws family callbacks data embeddings neighbours metrics parity places show exits'
fast += ' edges midway api_surface'

class DeleteStatement(Operator):
    "A call, an error, or an assignment to a part of something, that is missing; without a name that is assigned nothing would run"
    def mutation_positions(self, node):
        does = node.children[0] if node.type=='expr_stmt' else node
        alone = node.parent and node.parent.type=='simple_stmt'
        if alone and does.type in ('atom_expr', 'power', 'raise_stmt'): yield node.start_pos, node.end_pos

    def mutate(self, node, index): return Keyword('pass', node.start_pos, prefix=node.get_first_leaf().prefix)

    @classmethod
    def examples(cls): return ()

class Mutant(NamedTuple):
    module:str
    line:int
    before:str # The line, and what it becomes
    after:str
    code:str # Of the whole module

    @property
    def key(self): return f'{self.module}: {self.after}'
    def __str__(self): return f'{self.module}:{self.line}\n  - {self.before}\n  + {self.after}'

def operators():
    classes = map(get_operator, operator_names())
    return [*(o() for o in classes if not o.arguments()), DeleteStatement()]

def unseen(code):
    "Places where a change changes nothing: annotations are not evaluated, and what a type checker reads does not run"
    tree = ast.parse(code)
    found = [o for node in ast.walk(tree) for o in (getattr(node, 'annotation', None), getattr(node, 'returns', None)) if o is not None]
    return [((o.lineno, o.col_offset), (o.end_lineno, o.end_col_offset)) for o in found]

def places(module):
    "The places where the module can be changed, each with the ways to change it: (operator, number of its occurrence)"
    code,res = (root/package/f'{module}.py').read_text(),{}
    hidden,tree = unseen(code),get_ast(code)
    for op in operators():
        spots = (spot for node in ast_nodes(tree) for spot in op.mutation_positions(node))
        for k,(start,end) in enumerate(spots):
            if not any(a<=start and end<=b for a,b in hidden): res.setdefault((module, start, end), []).append((op, k))
    return res

def mutant(place, way):
    module,(line,_),_ = place
    old = (root/package/f'{module}.py').read_text()
    new = mutate_code(old, *way)
    changed = [o[1:].strip() for o in difflib.ndiff(old.splitlines(), new.splitlines()) if o[0] in '-+'] if new else []
    return Mutant(module, line, changed[0], changed[-1], new) if len(changed)>1 and changed[0]!=changed[-1] else None

def drawn(only, n, seed):
    "`n` mutants, no two of the same place"
    rng,found = random.Random(seed),[]
    every = [o for m in only for o in places(m).items()]
    for place,ways in rng.sample(every, len(every)):
        if len(found)==n: break
        if (one := mutant(place, rng.choice(ways))): found.append(one)
    return found

def warm():
    "Import what all tests import, once; a forked process has it at once"
    import fastai.tabular.all, fastai.text.all, fastai.vision.all, hypothesis, pytest, scipy.stats, torch  # noqa: F401
    torch.set_num_threads(1)

def _pytest(tree, files, log):
    import pytest
    os.setsid()
    out = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    os.chdir(tree)
    os.environ['PYTHONPATH'] = str(tree)
    sys.path[:0] = [str(tree), str(tree/'tests')]
    os._exit(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '-o', 'addopts=', *files]))

def passes(tree, tests, limit=1800):
    "Do these tests pass in this copy? None: not in `limit` seconds"
    files = [f'tests/test_{o}.py' for o in tests if (tree/f'tests/test_{o}.py').exists()]
    if not files: return True
    job = get_context('fork').Process(target=_pytest, args=(tree, files, tree/'log.txt'))
    job.start()
    job.join(limit)
    late = job.exitcode is None
    if late: os.killpg(job.pid, signal.SIGKILL)
    job.join()
    return None if late else job.exitcode==0

@cache
def took(tree, tests):
    "The seconds that they take without a mutant; what fails without one says nothing"
    start = time.time()
    if not passes(tree, tests): raise SystemExit(f"a test fails without a mutant; mend it first\n{(tree/'log.txt').read_text()[-3000:]}")
    return time.time()-start

def fate(one, tree, rest):
    "What becomes of the mutant"
    file = tree/package/f'{one.module}.py'
    was = file.read_text()
    for tests in f'edges {own_tests.get(one.module, one.module)}'.split(), rest.split():
        limit = 60 + 5*took(tree, tuple(tests))
        file.write_text(one.code)
        try: passed = passes(tree, tests, limit)
        finally: file.write_text(was)
        if not passed: return 'killed' if passed is False else 'killed, since it takes too long'
    return 'survived'

def copies(folder, n):
    "As many copies of what git lists"
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=root, capture_output=True, text=True, check=True)
    for tree in (folder/str(i) for i in range(n)):
        for o in listed.stdout.splitlines():
            if not (root/o).is_file(): continue
            (tree/o).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root/o, tree/o)
        yield tree

def equivalents():
    "The mutants that no test can notice"
    return {o for o in (root/'tools/equivalent_mutants.txt').read_text().splitlines() if o and not o.startswith(('#', ' '))}

@call_parse
def main(
    sample:int=200, # How many mutants
    seed:int=0, # Of the draw
    only:str='', # Modules, comma separated; all but the demo's by default
    rest:str=fast, # Tests for those that survive the tests of their module
    jobs:int=2 # Mutants at a time
):
    "Make mutants, and say which of them no test notices"
    chosen = only.split(',') if only else modules
    found,known,start = drawn(chosen, sample, seed),equivalents(),time.time()
    warm()
    with TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        trees = Queue()
        for o in copies(Path(folder), jobs): trees.put(o)
        def run(one):
            tree = trees.get()
            try: res = 'equivalent' if one.key in known else fate(one, tree, rest)
            finally: trees.put(tree)
            print(f'{one}\n  {res}', flush=True)
            return res
        fates = [*pool.map(run, found)]
    def count(res): return Counter(o.module for o,f in zip(found, fates) if f.startswith(res))
    killed,same,left = map(count, ('killed', 'equivalent', 'survived'))
    print()
    for m in sorted({o.module for o in found}): print(f'{m}: {killed[m]} of {killed[m]+left[m]} killed, {same[m]} equivalent')
    total = killed.total()+left.total()
    print(f'all: {killed.total()} of {total} killed, {same.total()} equivalent, in {(time.time()-start)/60:.0f} minutes')
    if left: sys.exit('\n'.join(['', 'survived:', *(str(o) for o,f in zip(found, fates) if f=='survived')]))
