"""Build the documentation site without Quarto: `python tools/build_site.py [--out FOLDER] [--serve]`.

nbdev prepares the notebooks, smalldocs renders them, and `SelfContained` sees to it that every page stands on its own: no script,
style or font comes from elsewhere. Quarto users get the same pages from the same notebooks and `nbs/_quarto.yml` with `nbdev-docs`."""
import html, os, re, sys, warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path, PurePosixPath

from fastcore.docments import DocmentTbl
from fastcore.script import call_parse, store_true
from fontTools.ttLib import TTFont
from latex2mathml.converter import convert
from nbdev import showdoc
from nbdev.config import nbpath2html
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.config import load
from smalldocs.site import Site

import fastai_mixup_ext

root = Path(__file__).parents[1]
expected = re.compile('unknown key format-links|format commonmark is not built|output-file is not read')  # Quarto's and nbdev's own keys
formula = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
mute_picture = re.compile(r'<img(?![^>]* alt="[^"])|<svg(?![^>]*(?: aria-hidden="true"| alt="[^"]| aria-label="[^"]))')
scroller = re.compile(r'<(?=pre|span class="math display")(\w+)')
table = re.compile(r'<table.*?</table>', re.S)
web_font = re.compile(r'@import url\(https?:[^)]*\);?')


class TableRenderer(showdoc.BasicMarkdownRenderer):
    "nbdev's entry for a symbol, with its parameters in a table below the signature instead of in comments inside it"
    def __init__(self, sym, **kwargs):
        super().__init__(sym, maxline=72, **kwargs)
        for p in getattr(self.dm, 'dm', {}).values(): p['docment'] = None

    def _repr_markdown_(self):
        exported = getattr(fastai_mixup_ext, self.nm, self.sym)  # Python can't find the source of a dataclass that a notebook defines
        return f'{super()._repr_markdown_()}\n\n{DocmentTbl(exported)}'


class SelfContained(Site):
    "smalldocs' site with nbdev's page names, relative links, formulas as MathML, and nothing from elsewhere"
    def read(self, src):
        page = super().read(src)
        page.out = PurePosixPath(nbpath2html(page.out))
        return page

    def find_page(self, target): return super().find_page(target) or next((p for p in self.pages.values() if p.out==target), None)

    def resolve(self, href, page, record=True):
        home = self.project.website['site-url']  # where nbdev's links from a name to its documentation lead
        return super().resolve(f"/{href.removeprefix(home).lstrip('/')}" if href.startswith(home) else href, page, record)

    def render_page(self, page):
        super().render_page(page)
        page.env['math'] = False  # no KaTeX from a CDN: the formulas are MathML
        if mute_picture.search(page.html): self.warn(f'{page.src}: a picture without alternative text; give its cell a `#| fig-alt: ...`')
        page.html = formula.sub(partial(self.mathml, page), page.html)
        page.html = scroller.sub(r'<\1 tabindex="0"', page.html)  # what scrolls sideways must do so from the keyboard
        page.html = table.sub(r'<div class="table-responsive" tabindex="0">\g<0></div>', page.html)

    def mathml(self, page, m):
        res = convert(html.unescape(m[2]), display='inline' if m[1]=='inline' else 'block')
        res = res.replace('<mi>&#x0007E;</mi>', '<mo>&#x0223C;</mo>')  # its \sim is a tilde, and no relation
        if '\\' in res or '<mi>&</mi>' in res: self.warn(f'{page.src}: latex2mathml does not know a command of {m[2]}')
        return f'<span class="math {m[1]}">{res}</span>'

    def copy_assets(self, nav):
        super().copy_assets(nav)
        libs = self.out/'site_libs'
        for f in (libs/'themes').glob('*.css'): f.write_text(web_font.sub('', f.read_text()))
        font = TTFont(files('ziamath.fonts')/'STIXTwoMath-Regular.ttf')  # for systems without a font for formulas
        font.flavor = 'woff'
        font.save(libs/'math.woff')


def rename_copies(out):
    "Name the Markdown copies `page.html.md`: the modules' docstrings link to them"
    for f in [out/'llms.txt', *out.rglob('*.llms.md')]:
        text = f.read_text().replace('.llms.md', '.html.md')
        f.unlink()
        f.with_name(f.name.replace('.llms.md', '.html.md')).write_text(text)


def build(out):
    "Build the whole site into `out`; return the warnings that are not expected"
    refresh_quarto_yml()
    showdoc.BasicMarkdownRenderer = TableRenderer  # where show_doc finds it; naming it in pyproject.toml would break nbdev-docs
    warnings.filterwarnings('error', 'Found cells containing imports')  # such cells would run while the site is built
    site = SelfContained(load(proc_nbs(n_workers=0, force=True)))
    site.out = out
    site.build()
    rename_copies(out)
    (out/'.nojekyll').touch()
    return [w for w in site.warnings if not expected.search(w)]


def serve_site(out, port):
    "Serve the site on this machine alone, until Ctrl-C"
    server = ThreadingHTTPServer(('127.0.0.1', port), partial(SimpleHTTPRequestHandler, directory=out))
    print(f'http://127.0.0.1:{server.server_port}/  (Ctrl-C to stop)')
    try: server.serve_forever()
    except KeyboardInterrupt: pass


@call_parse
def main(
    out:Path=root/'_docs', # Where to write the site
    serve:store_true=False, # Serve it afterwards?
    port:int=8000, # The port to serve it at
):
    "Build the documentation site, and fail on any unexpected warning"
    out = out.resolve()
    os.chdir(root)
    if problems := build(out): sys.exit('\n'.join(problems))
    print(f'wrote {out}')
    if serve: serve_site(out, port)
