"""Do the tests notice a mistake? `pip install cosmic-ray`, then `python tools/mutants.py --sample 200 --seed 0`.

cosmic-ray makes mutants: copies of the package with one small change each, such as `<` for `<=`, or a line that is missing.
Each runs against its module's own tests, and if it survives those, against the fast rest, two mutants at a time.
Both pass first without a mutant, the rest when it is first wanted.
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
    tensors='mix fuzz data', classes='losses laws', losses='losses laws', embeddings='embeddings fuzz', places='exits family',
    callback='callbacks exits family faults data', memory='memory', mix='mix laws', effects='compare', trials='compare', find='compare')
fast = 'mix recipes losses pairing schedules laws family callbacks data embeddings neighbours metrics parity show export'

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

def passes(tree, tests, limit):
    "Do these tests pass in this copy, in `limit` seconds?"
    files = [f'tests/test_{o}.py' for o in tests if (tree/f'tests/test_{o}.py').exists()]
    if not files: return True
    job = get_context('fork').Process(target=_pytest, args=(tree, files, tree/'log.txt'))
    job.start()
    job.join(limit)
    if job.exitcode is None: os.killpg(job.pid, signal.SIGKILL)
    job.join()
    return job.exitcode==0

@cache
def check(tree, tests, limit):
    "Without a mutant they pass, or what fails with one says nothing"
    if not passes(tree, tests, limit): raise SystemExit(f"{' '.join(tests)}: a test fails without a mutant; mend it first")

def survives(one, tree, rest, limit):
    "Does no test notice the mutant?"
    file = tree/package/f'{one.module}.py'
    was = file.read_text()
    own = f'edges {own_tests.get(one.module, one.module)}'
    for tests,seconds in (tuple(own.split()), limit), (tuple(rest.split()), 5*limit):
        check(tree, tests, 5*limit)
        file.write_text(one.code)
        try:
            if not passes(tree, tests, seconds): return False
        finally: file.write_text(was)
    return True

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
    limit:int=120, # Seconds for a module's own tests; five times as many for the rest
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
            try: alive = one.key not in known and survives(one, tree, rest, limit)
            finally: trees.put(tree)
            print(f'{one}\n  {"survived" if alive else "equivalent" if one.key in known else "killed"}', flush=True)
            return alive
        alive = [*pool.map(run, found)]
    made,same = Counter(o.module for o in found),Counter(o.module for o in found if o.key in known)
    left = Counter(o.module for o,a in zip(found, alive) if a)
    print()
    for m in sorted(made): print(f'{m}: {made[m]-same[m]-left[m]} of {made[m]-same[m]} killed, {same[m]} equivalent')
    total = len(found)-sum(same.values())
    print(f'all: {total-sum(alive)} of {total} killed, {sum(same.values())} equivalent, in {(time.time()-start)/60:.0f} minutes')
    if any(alive): sys.exit('\n'.join(['', 'survived:', *(str(o) for o,a in zip(found, alive) if a)]))
