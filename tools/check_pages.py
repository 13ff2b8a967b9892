"""Run the pages and compare what they print and draw with what is committed: `python tools/check_pages.py [PAGE ...]`.

Without names all pages are checked. A page is *run*, in a copy, unless it is a page of evidence whose results are kept: its tables
must then show what `evidence/results` holds (`--full` runs it whole instead, which takes hours). How outputs are compared:

- text, tables: the words must be equal, and a number may differ by a share of itself (`--rtol`) or by one in its last decimal;
  what is below a millionth is rounding;
- a picture must be there, and have the same size;
- times of day, durations such as 00:12, dates and temporary folders are not compared; of a cell with `#| measured: true`, which times
  something, neither numbers nor sizes of pictures;
- in the line that the cell with `version(` prints, the package's version counts; torch's and fastai's are reported.

The script says where a page and its outputs disagree, and exits 1.

A page with figures ends with a cell that prints what it was made with (its imports have `from importlib.metadata import version`):

    #| echo: false
    print(', '.join(f'{o} {version(o)}' for o in ('torch', 'fastai', 'fastai_mixup_ext')))
"""
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from base64 import b64decode
from io import BytesIO
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from fastcore.nbio import read_nb
from nbdev.clean import clean_nb
from PIL import Image

root = Path(__file__).parents[1]
number = re.compile(r'(?<![\w.])[-+−]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?', re.I)
passing = re.compile(r'\b\d{1,2}:\d\d(?::\d\d)?\b|\b\d{4}-\d\d-\d\d\b|0x[0-9a-f]{6,}|/tmp/[\w/]+')  # times, dates, places
markup = re.compile(r'<style.*?</style>|<[^>]*>', re.S)
fenced = re.compile(r'^```(?!diff)[^`\n]*\n(.*?)^```', re.M|re.S)  # a patch has the lines of others' code
measured = re.compile(r'^#\| *measured: *true', re.M)
versions = 'version('
shown = 'image/png', 'image/jpeg', 'image/svg+xml', 'text/html', 'text/markdown', 'text/latex', 'text/plain'  # the first is what is seen


def joined(o): return ''.join(o) if isinstance(o, list) else o
def short(o): return repr(o if len(o)<=70 else o[:67]+'...')


# Outputs

def seen(cell):
    "What a reader sees of a code cell's outputs: a list of kinds and contents, a stream in one piece"
    res = []
    for o in cell.get('outputs', ()):
        if o['output_type']=='error': res.append(('error', o['ename']))
        elif o['output_type']=='stream':
            if res and res[-1][0]==o['name']: res[-1] = o['name'], res[-1][1] + joined(o['text'])
            else: res.append((o['name'], joined(o['text'])))
        else:
            kind = next((k for k in shown if k in o['data']), None)
            if kind: res.append((kind, joined(o['data'][kind])))
    return [o for o in res if o[0]!='stderr']


def words_and_numbers(text, kind='text/plain'):
    "The words of `text` without its numbers, and the numbers as they are written"
    if kind=='text/html': text = markup.sub(' ', text)
    text = passing.sub('…', text)
    return re.sub(r'-{3,}', '---', number.sub('#', text)).split(), number.findall(text)


def agree(old, new, rtol):
    "Are two written numbers equal, up to `rtol` or one in the last decimal of the shorter?"
    a,b = (float(o.replace('−', '-')) for o in (old, new))
    decimals = min(len(o.partition('.')[2]) if 'e' not in o.lower() else 0 for o in (old, new))
    return isclose(a, b, rel_tol=rtol, abs_tol=1.01*10**-decimals if decimals else 1e-6)


def picture_size(kind, data):
    if kind=='image/svg+xml': return re.findall(r'<svg[^>]*? (?:width|viewBox)="([^"]*)"', data)[:1]
    with Image.open(BytesIO(b64decode(data))) as o: return o.size


def differences(old, new, rtol):
    "In what two outputs, each a kind and a content, differ"
    (kind, a), (now, b) = old, new
    if kind!=now: return [f'a {kind} has become a {now}']
    if kind.startswith('image/'):
        if rtol is None: return []
        sizes = picture_size(kind, a), picture_size(kind, b)
        return [] if sizes[0]==sizes[1] else [f'a picture of {sizes[0]} has become one of {sizes[1]}']
    (words, numbers), (words_now, numbers_now) = (words_and_numbers(o, kind) for o in (a, b))
    if words!=words_now:
        changed = next((i for i,(x,y) in enumerate(zip(words, words_now)) if x!=y), min(len(words), len(words_now)))
        return [f"{short(' '.join(words[changed:]))} has become {short(' '.join(words_now[changed:]))}"]
    if rtol is None: return []
    return [f'{x} has become {y}' for x,y in zip(numbers, numbers_now) if not agree(x, y, rtol)]


def version_differences(old, new):
    "Of a line of versions the package's must be the same; the others are named in a note"
    was,now = (dict(re.findall(r'(\w+) (\d[\w.+]*)', o)) for _,o in (old, new))
    for k in was.keys() & now.keys() - {'fastai_mixup_ext'}:
        if was[k]!=now[k]: print(f'note: made with {k} {was[k]}, run with {now[k]}')
    k = 'fastai_mixup_ext'
    return [] if was.get(k)==now.get(k) else [f'the package {was.get(k)} has become {now.get(k)}']


def compare_cells(old, new, rtol):
    "In what the outputs of two runs of a cell differ"
    a,b = seen(old), seen(new)
    if len(a)!=len(b): return [f'{len(a)} outputs have become {len(b)}']
    if versions in old.source and a: return version_differences(a[0], b[0])
    if measured.search(old.source): rtol = None
    return [d for x,y in zip(a, b) for d in differences(x, y, rtol)]


def compare(old, new, rtol):
    "In what two runs of a notebook differ, a line for each difference, with the cell's id"
    pairs = [(a, b) for a,b in zip(old.cells, new.cells) if a.cell_type=='code']
    return [f'{a.id}: {d}' for a,b in pairs for d in compare_cells(a, b, rtol)]


# Kept results

def kept_results(page):
    "The files of kept results that belong to `page`: those that begin with its number"
    return sorted((page.parent/'results').glob(f'{page.name[:2]}_*.json')) if re.match(r'\d\d_', page.name) else []


def table_rows(text):
    "The rows of the Markdown tables in `text`, by their first cell: a list for each, since several tables may have one of that name"
    res = {}
    for line in text.splitlines():
        first,_,others = line.removeprefix('| ').partition(' | ')
        if line.startswith('| '): res.setdefault(first.strip(), []).append(words_and_numbers(others)[1])
    return res


def shows(numbers, value):
    "Is `value` among the written `numbers`, to three digits or to as many as are written?"
    return any(float(f'{value:.3g}')==float(o.replace('−', '-')) or agree(o, f'{value:.6f}', .005) for o in numbers)


def compare_kept(page):
    "Where the tables of a page of evidence differ from the results that are kept for it"
    text = '\n'.join(o for c in read_nb(page).cells if c.cell_type=='code' for kind,o in seen(c) if kind=='text/markdown')
    rows,found = table_rows(text), []
    for file in kept_results(page):
        for o in json.loads(file.read_text()).get('comparisons', ()):
            means = [np.mean(o[k]) for k in ('plain', 'mixup')]
            if not any(all(shows(row, m) for m in means) for row in rows.get(o['setting'], ())):
                found.append(f"{file.name}, {o['setting']}: no row shows the kept means {means[0]:.3g} and {means[1]:.3g}")
    return found


# Runs

def rerun(pages, folder, full):
    "Run copies of `pages` in `folder`, as `nbdev-test --save` does; return them by page"
    for o in root.iterdir():
        if o.name not in ('nbs', '.git', '_docs', '_proc', 'build', 'dist'): (folder/o.name).symlink_to(o)
    shutil.copytree(root/'nbs', folder/'nbs', ignore=shutil.ignore_patterns('_proc', '_docs', 'models'))
    copies = {o: folder/o.relative_to(root) for o in pages}
    env = {**os.environ, 'MPLBACKEND': 'Agg', 'PYTHONPATH': str(root), **({'MIXUP_EVIDENCE': 'full'} if full else {})}
    command = Path(sys.executable).with_name('nbdev-test')
    only = '|'.join(f'/{re.escape(o.relative_to(root).as_posix())}$' for o in pages)
    res = subprocess.run([command, '--save', '--cell-timeout', '0', '--path-re', only], cwd=folder, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    failed = {o.strip() for o in res.stdout.partition('Tests Failed On')[2].splitlines()} if res.returncode else set()
    if res.returncode: print(res.stdout)
    return {page: None if page.name in failed else copy for page,copy in copies.items()}


def check(pages, full=False, rtol=.02):
    "Where `pages` disagree with their outputs: a list of lines for each"
    runs = [o for o in pages if full or not kept_results(o)]
    found = {o: compare_kept(o) for o in pages if o not in runs}
    with TemporaryDirectory() as tmp:
        for page,copy in (rerun(runs, Path(tmp), full) if runs else {}).items():
            if copy is None: found[page] = ['it does not run']
            else: found[page] = compare(read_nb(page), clean(read_nb(copy)), rtol)
    return found


def clean(nb):
    clean_nb(nb)
    return nb


def needs_versions(page):
    "Does a page for readers show a picture or a number with decimals, and not the versions that it was made with?"
    if 'api' in page.parts: return False
    cells = [o for o in read_nb(page).cells if o.cell_type=='code']
    said = any(versions in o.source and seen(o) for o in cells)
    return not said and any(kind.startswith('image/') or re.search(r'\d\.\d', o) for c in cells for kind,o in seen(c))


def code_in(cell):
    "The texts of a cell in a fixed pitch: code, printed output, and blocks of code in Markdown"
    if cell.cell_type=='markdown': return fenced.findall(cell.source)
    code = [o for o in cell.source.splitlines() if not o.startswith('#|')]  # directives are neither code nor shown
    printed = [o for kind,text in seen(cell) for o in ([text] if kind in ('stdout', 'text/plain') else fenced.findall(text))]
    return ['\n'.join(code), *printed]


def long_lines(page, width=90):
    "The cells of a page for readers that have lines of code or output of more than `width` characters, and how many"
    if 'api' in page.parts: return {}
    found = {c.id: sum(len(o)>width for text in code_in(c) for o in text.splitlines()) for c in read_nb(page).cells}
    return {k: v for k,v in found.items() if v}


def find(names):
    "The notebooks called `names`, with or without folder, number and ending; all of them without names"
    every = sorted(o for o in (root/'nbs').rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(root).parts))
    def called(page, name):
        name = name.removesuffix('.ipynb')
        return name in (page.stem, re.sub(r'^\d+_', '', page.stem)) or str(page.with_suffix('')).endswith(f'/{name}')
    for name in names:
        if not any(called(o, name) for o in every): sys.exit(f'no page is called {name!r}; --list shows their names')
    return [o for o in every if not names or any(called(o, name) for name in names)]


def list_pages(pages):
    "How each page is checked, and what is to be mended on it"
    for o in pages:
        how = 'kept results' if kept_results(o) else 'run'
        wide = long_lines(o)
        notes = ['no versions'] if needs_versions(o) else []
        notes += [f"{sum(wide.values())} lines over 90 characters in {', '.join(wide)}"] if wide else []
        print(f"{o.relative_to(root/'nbs').as_posix():35}{how:15}{'; '.join(notes)}".rstrip())


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('pages', nargs='*', help='pages by name, e.g. concepts or tutorials/text; all without any')
    parser.add_argument('--list', action='store_true', help='only list the pages, and how each is checked')
    parser.add_argument('--full', action='store_true', help='run the pages of evidence whole')
    parser.add_argument('--rtol', type=float, default=.02, help='by what share of itself a number may differ (default %(default)s)')
    args = parser.parse_args()
    pages = find(args.pages)
    if args.list: return list_pages(pages)
    found = check(pages, args.full, args.rtol)
    for page in pages:
        print(f"{'ok  ' if not found[page] else 'STALE'} {page.relative_to(root).as_posix()}")
        for o in found[page]: print(f'      {o}')
    if any(found.values()): sys.exit(1)


if __name__=='__main__': main()
