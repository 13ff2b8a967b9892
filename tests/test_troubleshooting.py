"""The page *Troubleshooting* lists every message that the package raises or warns with."""
import ast
import re
from pathlib import Path

import pytest
from fastcore.nbio import read_nb

root = Path(__file__).parents[1]
makers = re.compile(r'(\w*Error|Refused|warn|_bad|_lost)$')  # what makes a message: exceptions, warnings, two functions that build them

def written(node):
    "The strings that `node` writes out: alternatives of a conditional each, the fixed parts of an f-string each"
    if isinstance(node, ast.Constant): return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr): return [o.value for o in node.values if isinstance(o, ast.Constant)]
    if isinstance(node, ast.IfExp): return written(node.body) + written(node.orelse)
    return []

def names(node): return {o.id for o in ast.walk(node) if isinstance(o, ast.Name)}

def messages(source):
    "The fixed parts of all messages in `source`, also of those that a variable of the function holds"
    res = set()
    for f in [o for o in ast.walk(ast.parse(source)) if isinstance(o, (ast.FunctionDef, ast.Lambda))]:
        assigned = [(t.id, o.value) for o in ast.walk(f) if isinstance(o, ast.Assign) for t in o.targets if isinstance(t, ast.Name)]
        calls = [o for o in ast.walk(f) if isinstance(o, ast.Call) and makers.search(ast.unparse(o.func))]
        for arg in [a for c in calls for a in c.args]:
            used = names(arg) | {n for k,v in assigned if k in names(arg) for n in names(v)}
            for part in written(arg) + [s for k,v in assigned if k in used for s in written(v)]: res.add(part)
    return {' '.join(o.split()) for o in res if len(re.findall('[a-z]{2,}', o))>=2}

sources = {o.name: o.read_text() for o in sorted((root/'fastai_mixup_ext').glob('*.py')) if o.name!='_modidx.py'}
page = ' '.join(' '.join(c.source.split()) for c in read_nb(root/'nbs/howto/troubleshooting.ipynb').cells if c.cell_type=='markdown')

def test_parts_are_found():
    source = '''def f(x, n):
    rule = f"{n} must be a number"
    if x: raise ValueError(f"x={x!r} is too large; " "take another one")
    if n: warn("this is slow")
    raise TypeError(f"{rule}; or leave it out")'''
    assert messages(source)=={'must be a number', 'is too large; take another one', 'this is slow', '; or leave it out'}

def test_messages_are_found_in_the_package(): assert sum(len(messages(o)) for o in sources.values())>80

@pytest.mark.parametrize('name', sources)
def test_page_has_every_message(name):
    missing = sorted(o for o in messages(sources[name]) if o not in page)
    assert not missing, f'nbs/howto/troubleshooting.ipynb has no entry with: {missing}'

def test_page_has_no_message_of_the_past():
    "Every clause of every entry is written in the source"
    nodes = [o for s in sources.values() for o in ast.walk(ast.parse(s))]
    known = ' '.join(' '.join(o.value.split()) for o in nodes if isinstance(o, ast.Constant) and isinstance(o.value, str))
    entries = re.findall(r'\*\*(?:\w+(?:Error|Warning)|mixup-demo)\*\*: (`+) ?(.+?) ?\1(?= - \*Cause)', page)
    assert len(entries)>50
    clauses = [re.sub('^ *(it )?must be ', '', o).strip() for _,e in entries for o in re.split('[;:,…]', e)]
    gone = [o for o in clauses if len(re.findall('[a-z]{2,}', o))>=3 and o not in known]
    assert not gone, f'nobody says this any more: {gone}'
