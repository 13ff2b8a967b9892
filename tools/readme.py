"""Generate README.md from nbs/index.ipynb without Quarto: `python tools/readme.py [--check]`.

The notebook's outputs are used as they are saved; its pictures are written beside README.md, in index_files/. All links and
pictures have whole addresses, since package indexes show the text without the repository around it."""
import os, re, sys
from base64 import b64decode
from pathlib import Path

from fastcore.nbio import read_nb
from fastcore.script import call_parse, store_true
from nbdev.config import get_config
from nbdev.processors import FilterDefaults
from nbdev.readme_filter import doc_link

root = Path(__file__).parents[1]
folder = 'index_files'
directive = re.compile(r'^#\| *([^\s:]+):? *(.*)\n?', re.M)
callout = re.compile(r'^::: *\{\.callout-(\w+)[^}]*\}\n(.*?)\n:::$', re.S|re.M)
link = re.compile(r'(?<=\]\()([^)\s]+)')


def joined(text): return ''.join(text) if isinstance(text, list) else text
def indented(text): return re.sub('^(?=.)', '    ', joined(text).rstrip('\n'), flags=re.M)
def alert(m): return re.sub('^', '> ', f'[!{m[1].upper()}]\n{m[2]}', flags=re.M).replace('> \n', '>\n')


def address(path, kind):
    "Where the repository shows file `path`: as a page (`blob`) or as it is (`raw`)"
    cfg = get_config()
    return f'{cfg.git_url}/{kind}/{cfg.branch}/{path}'


def whole(m):
    "The whole address for link `m`: a notebook's page, or a file of the repository, relative to nbs/"
    found = doc_link(m[1], get_config().doc_url)
    if re.match(r'[a-z]+:|#', found): return found
    return address(os.path.normpath(os.path.join('nbs', found)), 'raw' if found.endswith(('.png', '.svg')) else 'blob')


def prose(text):
    "A markdown cell as GitHub reads it"
    return link.sub(whole, callout.sub(alert, directive.sub('', text)))


def output(out, name, alt, pictures):
    "One saved output as Markdown; a picture is put into `pictures`"
    if out['output_type']=='stream': return indented(out['text'])
    data = out['data']
    if 'image/png' in data:
        pictures[f'{folder}/{name}.png'] = b64decode(joined(data['image/png']))
        return f'![{alt}]({address(f"{folder}/{name}.png", "raw")})'
    return joined(data['text/markdown']) if 'text/markdown' in data else indented(data['text/plain'])


def code(cell, pictures):
    "A code cell and its outputs, less what its directives hide"
    opts = dict(directive.findall(cell.source))
    if opts.get('include')=='false': return []
    src = directive.sub('', cell.source).strip()
    shown = [f'```python\n{src}\n```'] if src and opts.get('echo')!='false' else []
    if opts.get('output')=='false': return shown
    return shown + [output(o, opts.get('label', cell.id), opts.get('fig-alt', ''), pictures) for o in cell.outputs]


def readme():
    "README.md and its pictures, by path"
    nb = read_nb('nbs/index.ipynb')
    FilterDefaults()(nb)
    head, pictures = nb.frontmatter_, {}
    parts = [f"# {head['title']}", '<!-- tools/readme.py makes this from nbs/index.ipynb: edit that -->', f"> {head['description']}"]
    for cell in nb.cells:
        if cell.cell_type=='markdown' and not cell.source.startswith('<!--'): parts.append(prose(cell.source).strip())
        if cell.cell_type=='code': parts += code(cell, pictures)
    return {'README.md': ('\n\n'.join(parts) + '\n').encode(), **pictures}


@call_parse
def main(
    check:store_true, # Write nothing; exit 1 where README.md or a picture differs?
):
    "Generate README.md from nbs/index.ipynb"
    os.chdir(root)
    new = readme()
    old = {p: Path(p).read_bytes() for p in ('README.md', *map(str, Path(folder).glob('*'))) if Path(p).exists()}
    if check: sys.exit('README.md is out of step with nbs/index.ipynb: run python tools/readme.py' if new!=old else 0)
    for p in old.keys()-new.keys(): Path(p).unlink()
    for p,data in new.items():
        Path(p).parent.mkdir(exist_ok=True)
        Path(p).write_bytes(data)
