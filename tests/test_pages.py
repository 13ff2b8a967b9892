"""The pages: listed, narrow enough to read, saying their versions; and the gate that compares them with a new run does its work."""
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import ForwardRef

import pytest

if version('nbdev')<'3': pytest.skip('the site is made with nbdev 3', allow_module_level=True)

from fastcore.nbio import mk_cell, new_nb, read_nb, write_nb

root = Path(__file__).parents[1]
sys.path.insert(0, str(root/'tools'))
import build_site
import check_pages
import reference

pages = check_pages.find([])

# The order

def test_every_page_is_in_the_sidebar():
    assert pages and not build_site.unlisted(), 'list them in nbs/_quarto.yml, where a reader looks for them'

def test_order_tolerates_pages_to_come_and_new_numbers():
    entries = ['index.ipynb', {'section': 'A', 'contents': ['api/10_b.ipynb', {'text': 'C', 'href': 'api/c.ipynb'}, 'api/gone.ipynb']},
        {'section': 'B', 'contents': ['b/none.ipynb']}]
    found = build_site.in_order(entries, ['api/08_b.ipynb', 'index.ipynb', 'api/00_c.ipynb'])
    assert [*build_site.listed(found)]==['index.ipynb', 'api/08_b.ipynb', 'api/00_c.ipynb']
    assert [o.get('section') for o in found]==[None, 'A'] and found[1]['contents'][1]['text']=='C'

def test_entry_under_its_own_heading_loses_its_own():
    entry = '### mixup\n\n```python\nmixup(alpha)\n```'
    assert build_site.without_doubles(f'## mixup\n\nWords.\n\n{entry}')=='## mixup\n\nWords.\n\n```python\nmixup(alpha)\n```'
    for other in '## CutMix\n\n', '```python\n## mixup\n```\n\n', '': assert build_site.without_doubles(other + entry)==other + entry

# The reference

class Recorder:
    def __call__(self, x): pass
    def show(self, x, *rest, n=9, **kwargs): pass
    @classmethod
    def made(cls, x): pass

def written(f): return reference.call(reference.callee(f, f.__qualname__), reference.parameters(f))

def test_a_name_of_two_modules():
    from fastai_mixup_ext import demo_folders, tensors
    for o in tensors.first, demo_folders.first: assert reference.from_package(o) is o

def test_inherited_fields_are_described():
    from fastai_mixup_ext.mix import Mix
    from fastai_mixup_ext.spans import PaddedMix
    rows = reference.described(Mix, reference.parameters(Mix)).splitlines()[2:]
    inherited = reference.described(PaddedMix, reference.parameters(PaddedMix)).splitlines()[2:]
    words = [o.split('|')[-2] for o in rows]
    assert [o.split('|')[-2] for o in inherited[:len(rows)]]==words and all(map(str.strip, words))

def test_types_are_text():
    assert reference.type_name(ForwardRef('Tensor | None'))=='`Tensor | None`'

def test_calls():
    def f(x, y=1., *, pair=len, seed=None): pass
    def long(first_of_many=1, second_of_many=2, third_of_many=3, fourth_of_many=4, fifth_of_many=5): pass
    f.__qualname__,long.__qualname__ = 'f','long'
    assert written(f)=='f(x, y=1.0, *, pair=len, seed=None)'
    assert written(Recorder.show)=='recorder.show(x, *rest, n=9, **kwargs)'
    assert written(Recorder.__call__)=='recorder(x)' and written(Recorder.made)=='Recorder.made(x)'
    assert reference.parameters(Recorder)=={}
    lines = written(long).splitlines()
    assert max(map(len, lines))<=80 and lines[0]=='long(' and lines[-1]==')'
    compile(written(long), '', 'eval')

def test_table_has_a_row_for_every_parameter():
    def f(x, # (n,) the input
        y=1., # a|b
        z=None): pass
    rows = reference.described(f, reference.parameters(f)).splitlines()
    assert rows[2:]==['| `x` |  | (n,) the input |', r'| `y` | `1.0` | a\|b |', '| `z` | `None` |  |']

# What readers meet

def test_wide_lines_are_found(tmp_path):
    "In code, shown or not, in printed output, and in blocks of code in Markdown; a directive is neither"
    wide = 'x'*91
    cells = [mk_cell(f'#| echo: false\n#| fig-alt: {wide}\ny'), mk_cell(f'#| echo: false\n{wide}'), mk_cell(wide, 'markdown'),
        mk_cell(f'```sh\n{wide}\n```', 'markdown'), mk_cell('print(x)')]
    cells[-1]['outputs'] = [{'output_type': 'stream', 'name': 'stdout', 'text': wide}]
    for i,o in enumerate(cells): o['id'] = f'cell-{i}'
    write_nb(new_nb(cells), tmp_path/'page.ipynb')
    assert check_pages.long_lines(tmp_path/'page.ipynb')=={'cell-1': 1, 'cell-3': 1, 'cell-4': 1}

def test_code_is_at_most_90_wide():
    found = {o.relative_to(root/'nbs').as_posix(): check_pages.long_lines(o) for o in pages}
    assert not {k: v for k,v in found.items() if v}

def test_pages_with_figures_say_their_versions():
    assert not [o.relative_to(root/'nbs').as_posix() for o in pages if check_pages.needs_versions(o)]

# The gate

@pytest.mark.parametrize('old,new,same', [
    ('0.5000', '0.5004', True), ('0.50', '0.60', False), ('0.50', '0.51', True), ('10', '11', False), ('100', '101', True),
    ('1e-5', '3e-5', False), ('0', '1e-8', True), ('−0.50', '-0.50', True), ('0.5', '-0.5', False)])
def test_numbers(old, new, same): assert check_pages.agree(old, new, .02)==same

@pytest.mark.parametrize('old,new,same', [
    ('loss 0.50 after 3 epochs', 'loss 0.50 after 3 epochs', True), ('loss 0.50', 'loss 0.70', False), ('loss 0.50', 'error 0.50', False),
    ('took 00:12', 'took 01:40', True), ('at 0x7f00aa11', 'at 0x7f00bb22', True), ('p < 0.001.', 'p < 0.001.', True)])
def test_text(old, new, same): assert (not check_pages.differences(('stdout', old), ('stdout', new), .02))==same

def test_kinds(): assert check_pages.differences(('stdout', '1'), ('text/plain', '1'), .02)

def test_markup_is_no_text():
    old,new = ('<td style="width: 10px">0.5</td>', '<td style="width: 99px">0.5</td>')
    assert not check_pages.differences(('text/html', old), ('text/html', new), .02)
    assert check_pages.differences(('text/html', old), ('text/html', new.replace('0.5<', '0.9<')), .02)

@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A project of one page, which ran"
    tmp = tmp_path_factory.mktemp('project')
    for o in 'pyproject.toml', 'fastai_mixup_ext', 'tools': (tmp/o).symlink_to(root/o) if o!='tools' else shutil.copytree(root/o, tmp/o)
    (tmp/'nbs').mkdir()
    cells = [mk_cell('# A page', 'markdown'),
        mk_cell('import torch\nimport matplotlib.pyplot as plt\nfrom importlib.metadata import version'),
        mk_cell("g = torch.Generator().manual_seed(0)\nprint(f'the mean is {torch.rand(1000, generator=g).mean():.4f}')"),
        mk_cell('plt.figure(figsize=(2,2)); plt.plot([1, 2]);'),
        mk_cell("#| measured: true\nimport time\nprint(f'{time.time():.2f} seconds')"),
        mk_cell("print(', '.join(f'{o} {version(o)}' for o in ('torch', 'fastai', 'fastai_mixup_ext')))")]
    for i,o in enumerate(cells): o['id'] = f'cell-{i}'
    write_nb(new_nb(cells), tmp/'nbs/page.ipynb')
    subprocess.run([Path(sys.executable).with_name('nbdev-test'), '--save', 'nbs/page.ipynb'], cwd=tmp, check=True)
    return tmp

def gate(project, *args):
    command = [sys.executable, 'tools/check_pages.py', *args]
    res = subprocess.run(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return res.returncode, res.stdout

def change(project, cell, old, new):
    page = project/'nbs/page.ipynb'
    nb = read_nb(page)
    found = next(o for o in nb.cells if o.id==cell)
    assert old in str(found.outputs)
    for o in found.outputs:
        if 'text' in o: o['text'] = ''.join(o['text']).replace(old, new)
    write_nb(nb, page)

@pytest.fixture
def page(project):
    "The page, put back afterwards"
    before = (project/'nbs/page.ipynb').read_text()
    yield project/'nbs/page.ipynb'
    (project/'nbs/page.ipynb').write_text(before)

def test_gate_passes_an_untouched_page(project): assert gate(project)==(0, 'ok   nbs/page.ipynb\n')

def test_gate_fails_on_a_changed_number(project, page):
    change(project, 'cell-2', 'the mean is 0.', 'the mean is 3.')
    code,out = gate(project, 'page')
    assert code==1 and 'STALE nbs/page.ipynb' in out and 'cell-2: 3.' in out

def test_gate_fails_on_changed_code_and_on_an_error(project, page):
    text = page.read_text()
    page.write_text(text.replace('figsize=(2,2)', 'figsize=(3,2)'))
    assert gate(project)[0]==1
    page.write_text(text.replace('plt.plot([1, 2])', 'plt.plot(1/0)'))
    code,out = gate(project)
    assert code==1 and 'it does not run' in out

def test_gate_tells_other_versions(project, page):
    change(project, 'cell-5', f"torch {version('torch')}", 'torch 1.0')
    code,out = gate(project)
    assert code==0 and f"note: made with torch 1.0, run with {version('torch')}" in out
    change(project, 'cell-5', f"fastai_mixup_ext {version('fastai_mixup_ext')}", 'fastai_mixup_ext 0.0.1')
    assert gate(project)[0]==1

def test_gate_knows_its_pages(project):
    assert gate(project, '--list')==(0, 'page.ipynb                         run\n')
    code,out = gate(project, 'nonsense')
    assert code==1 and "no page is called 'nonsense'" in out

def test_kept_results_are_in_the_tables(tmp_path):
    "A page of evidence that shows other means than those that are kept is found out"
    (tmp_path/'results').mkdir()
    (tmp_path/'results/01_a.json').write_text('{"comparisons": [{"setting": "digits", "plain": [10, 12], "mixup": [7, 9]}]}')
    def found(row):
        cell = mk_cell('table')
        table = f'| setting | plain | mixup |\n|---|---|---|\n{row}'
        cell['outputs'] = [{'output_type': 'display_data', 'metadata': {}, 'data': {'text/markdown': table}}]
        write_nb(new_nb([cell]), tmp_path/'01_page.ipynb')
        return check_pages.compare_kept(tmp_path/'01_page.ipynb')
    assert not found('| digits | 11 ± 1.4 | 8 ± 1.4 |')
    assert found('| digits | 11 ± 1.4 | 9 ± 1.4 |') and found('| letters | 11 ± 1.4 | 8 ± 1.4 |')
