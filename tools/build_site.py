"""Build the documentation site without Quarto: `python tools/build_site.py [--out FOLDER] [--serve]`.

nbdev prepares the notebooks, smalldocs renders them, and `SelfContained` sees to it that every page stands on its own: no script,
style or font comes from elsewhere. Quarto users get the same pages from the same notebooks and `nbs/_quarto.yml` with `nbdev-docs`.

The order of the pages is the sidebar of `nbs/_quarto.yml`. A page that it lists and that is not written yet is left out."""
import gc, html, os, re, sys, warnings
from base64 import b64decode
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from io import BytesIO
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import numpy as np
import yaml
from fastcore.script import call_parse, store_true
from fontTools.ttLib import TTFont
from latex2mathml.converter import convert
from nbdev import showdoc
from nbdev.config import get_config, nbpath2html
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from PIL import Image
from smalldocs.config import load
from smalldocs.site import Site

import reference

root = Path(__file__).parents[1]
card = 'images/mixed_batch.png'  # the picture that stands beside a link to any page
described = re.compile(r'<meta (?:name|property)="(?:og:)?description"[^>]*>')
expected = re.compile('unknown key format-links|format commonmark is not built|output-file is not read')  # Quarto's and nbdev's own keys
formula = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
mute_picture = re.compile(r'<img(?![^>]* alt="[^"])|<svg(?![^>]*(?: aria-hidden="true"| alt="[^"]| aria-label="[^"]))')
embedded = re.compile(r'<img[^>]*src="data:image/(?:png|jpeg);base64,([^"]*)"[^>]*>')
heading = re.compile(r'^(#{1,4}) +(.+?)(?: *\{[^}]*\})?$|^(```+)[^\n]*\n.*?^\3$', re.M|re.S)
scroller = re.compile(r'<(?=pre|span class="math display")(\w+)')
table = re.compile(r'<table.*?</table>', re.S)
deviation = re.compile(r'(?<=\d) ± (?=\d)')  # a figure and its deviation stay in one line
link_in_link = re.compile(r'\[(\[`[^`\n]+`\]\([^)\n]*\))\]\([^)\n]*\)')  # nbdev links a name that is the text of a link
parameters = re.compile(r'<th[^>]*>meaning</th>\s*</tr>')
web_font = re.compile(r'@import url\(https?:[^)]*\);?')


def numberless(path): return re.sub(r'(^|/)\d+_', r'\1', str(path))


def in_order(entries, pages):
    "The sidebar's `entries`, less those whose page is not in `pages`; the number in a notebook's name may have changed"
    files = {numberless(o): str(o) for o in pages}
    def one(o):
        if 'contents' in o: return {**o, 'contents': in_order(o['contents'], pages)}
        return {**o, 'href': files.get(numberless(o['href']))}
    entries = [one(o if isinstance(o, dict) else {'href': o}) for o in entries]
    return [o for o in entries if o.get('contents') or o.get('href')]


def listed(entries):
    "The pages that the sidebar's `entries` name, in their order"
    for o in entries:
        if isinstance(o, dict) and 'contents' in o: yield from listed(o['contents'])
        else: yield o['href'] if isinstance(o, dict) else o


def unlisted():
    "The pages under nbs/ that the sidebar forgets"
    sidebar = yaml.safe_load((root/'nbs/_quarto.yml').read_text())['website']['sidebar']
    pages = (o.relative_to(root/'nbs').as_posix() for o in (root/'nbs').rglob('*') if o.suffix in ('.ipynb', '.qmd'))
    known = {'404.qmd', *map(numberless, listed(sidebar['contents']))}
    return sorted(o for o in pages if not any(part[0] in '._' for part in o.split('/')) and numberless(o) not in known)


def without_doubles(body):
    "Markdown in which no entry of the reference repeats the name of the heading that it stands under"
    above, res = '', body
    for m in heading.finditer(body):
        if m[2] is None: continue
        name = m[2].strip('` ').lower()
        if name==above and m[1]=='###': res = res.replace(m[0]+'\n\n```python', '```python', 1)
        above = name
    return res


def kind_of(drawn):
    "How dark mode shows a picture: clear as it is, a plot with its colours turned, a photo in a white frame"
    pixels = np.asarray(drawn)
    if (pixels[...,3]==0).mean()>=.2: return 'clear'  # without a ground: drawn for light and dark
    light,black = (pixels[...,:3].min(-1)>=225).mean(), (pixels[...,:3].max(-1)<80).mean()
    return 'plot' if light>=.5 and black<.08 else 'photo'


def picture(m):
    "The picture `m` in a box that scrolls on a telephone"
    with Image.open(BytesIO(b64decode(m[1]))) as o: drawn = o.convert('RGBA')
    kind = kind_of(drawn)
    return f'<span class="picture {kind}" style="--natural-width: {drawn.width}px" tabindex="0">{m[0]}</span>'


def boxed(m):
    "The table `m` in a box: on a telephone that of parameters becomes a list, any other scrolls"
    kind = ' parameters' if parameters.search(m[0]) else ''
    return f'<div class="table-responsive{kind}" tabindex="0">' + deviation.sub('\u00a0±\u00a0', m[0]) + '</div>'


class SelfContained(Site):
    "smalldocs' site with nbdev's page names, relative links, formulas as MathML, and nothing from elsewhere"
    def discover(self):
        "The pages in the order of the sidebar, which loses the entries of pages that are not there"
        pages, sidebar = super().discover(), self.project.website.get('sidebar')
        if not sidebar: return pages
        sidebar['contents'] = in_order(sidebar['contents'], pages)
        order = [*listed(sidebar['contents'])]
        return sorted(pages, key=lambda o: order.index(str(o)) if str(o) in order else len(order))

    def read(self, src):
        page = super().read(src)
        page.out = PurePosixPath(nbpath2html(page.out))
        page.body = link_in_link.sub(r'\1', without_doubles(page.body))
        return page

    def find_page(self, target): return super().find_page(target) or next((p for p in self.pages.values() if p.out==target), None)

    def resolve(self, href, page, record=True):
        home = self.project.website['site-url']  # where nbdev's links from a name to its documentation lead
        return super().resolve(f"/{href.removeprefix(home).lstrip('/')}" if href.startswith(home) else href, page, record)

    def render_page(self, page):
        super().render_page(page)
        page.env['math'] = False  # no KaTeX from a CDN: the formulas are MathML
        if mute_picture.search(page.html): self.warn(f'{page.src}: a picture without alternative text; give its cell a `#| fig-alt: ...`')
        self.untex(page)
        page.html = formula.sub(partial(self.mathml, page), page.html)
        page.html = embedded.sub(picture, page.html)
        page.html = scroller.sub(r'<\1 tabindex="0"', page.html)  # what scrolls sideways must do so from the keyboard
        page.html = table.sub(boxed, page.html)

    def mathml(self, page, m):
        res = convert(html.unescape(m[2]), display='inline' if m[1]=='inline' else 'block')
        res = res.replace('<mi>&#x0007E;</mi>', '<mo>&#x0223C;</mo>')  # its \sim is a tilde, and no relation
        if '\\' in res or '<mi>&</mi>' in res: self.warn(f'{page.src}: latex2mathml does not know a command of {m[2]}')
        return f'<span class="math {m[1]}">{res}</span>'

    def untex(self, page):
        "The search shows a formula as it is read"
        def read(m): return re.sub('<[^>]*>', '', html.unescape(self.mathml(page, m)))
        seen = {' '.join(html.unescape(m[2]).split()): read(m) for m in formula.finditer(page.html)}
        for tex in sorted((o for o in seen if '\\' in o), key=len, reverse=True):  # a short one may be a part of a long one
            for o in page.env['search']: o['text'] = o['text'].replace(tex, seen[tex])

    def copy_assets(self, nav):
        super().copy_assets(nav)
        libs = self.out/'site_libs'
        with (libs/'fuse/fuse.min.js').open('a') as f: f.write((root/'tools/search.js').read_text())
        with (libs/'smalldocs.js').open('a') as f: f.write((root/'tools/site.js').read_text())
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


def finish_head(out):
    "What search engines and link previews read: the page's own address, and a picture"
    home, about = get_config().doc_url.rstrip('/'), html.escape(get_config().description)
    for f in out.rglob('*.html'):
        if f.name=='404.html': continue
        url = f'{home}/{f.relative_to(out).as_posix()}'.removesuffix('index.html')
        metas = {'og:url': url, 'og:type': 'website', 'og:image': f'{home}/{card}'}
        text = described.sub(lambda m: m[0].replace('`', ''), f.read_text())
        if 'og:description' not in text: metas |= {'og:description': about}
        more = f'<link rel="canonical" href="{url}">' + ''.join(f'<meta property="{k}" content="{v}">' for k,v in metas.items())
        f.write_text(text.replace('</head>', f'{more}<meta name="twitter:card" content="summary_large_image"></head>', 1))


def finish_404(out):
    "The page for an address that does not exist is shown at that address: its links start at the site's root"
    f = out/'404.html'
    base = urlsplit(get_config().doc_url).path.rstrip('/') + '/'
    f.write_text(f.read_text().replace('<head>', f'<head><base href="{base}"><meta name="robots" content="noindex">', 1))
    (out/'404.html.md').unlink(missing_ok=True)
    sitemap = out/'sitemap.xml'
    sitemap.write_text(re.sub(r'  <url>\s*<loc>[^<]*/404.html</loc>.*?</url>\n', '', sitemap.read_text(), flags=re.S))


def build(out):
    "Build the whole site into `out`; return the warnings that are not expected"
    refresh_quarto_yml()
    showdoc.BasicMarkdownRenderer = reference.Entry  # where show_doc finds it; naming it in pyproject.toml would break nbdev-docs
    warnings.filterwarnings('error', 'Found cells containing imports')  # such cells would run while the site is built
    site = SelfContained(load(proc_nbs(n_workers=0, force=True)))
    site.out = out
    site.build()
    rename_copies(out)
    finish_head(out)
    if (out/'404.html').exists(): finish_404(out)
    (out/'.nojekyll').touch()
    return [w for w in site.warnings if not expected.search(w)]


class Handler(SimpleHTTPRequestHandler):
    "Serves the site at / and at the path that it has when it is published, with its own page for addresses that do not exist"
    prefix = urlsplit(get_config(root).doc_url).path.rstrip('/')
    def translate_path(self, path): return super().translate_path(path.removeprefix(self.prefix) or '/')

    def send_error(self, code, *args, **kwargs):
        page = Path(self.directory)/'404.html'
        if code!=404 or not page.exists(): return super().send_error(code, *args, **kwargs)
        body = page.read_bytes()
        self.send_response(404)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.send_header('Content-Length', len(body))
        self.end_headers()
        self.wfile.write(body)


def serve_site(out, port):
    "Serve the site on this machine alone, until Ctrl-C"
    server = ThreadingHTTPServer(('127.0.0.1', port), partial(Handler, directory=out))
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
    problems = build(out)
    gc.freeze()  # at the end each notebook's shell looks through all the memory for garbage, which took longer than the site
    if problems: sys.exit('\n'.join(problems))
    print(f'wrote {out}')
    if serve: serve_site(out, port)
