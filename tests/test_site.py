"""The documentation site in a real browser: built once, served on this machine, every page opened on a telephone and on a desk."""
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, namedtuple
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from urllib.parse import urldefrag

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from nbdev.config import get_config
from PIL import Image
from playwright.sync_api import Error, expect, sync_playwright

root = Path(__file__).parents[1]
sys.path.insert(0, str(root/'tools'))
from build_site import Handler

screenshots = root/'build/screenshots'  # CI keeps them
phone, desk = dict(width=390, height=844), dict(width=1280, height=900)
themes = 'light', 'dark'
sections = ['Home', 'Learn', 'Do', 'Understand', 'Measured', 'Reference', 'Changelog']

def build(project, out):
    return subprocess.run([sys.executable, 'tools/build_site.py', '--out', str(out)], cwd=project, capture_output=True, text=True)

@pytest.fixture(scope='session')
def browser():
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    with sync_playwright() as p:
        try: res = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        except Error as e:
            give_up = pytest.fail if os.environ.get('CI') in ('true', '1') else pytest.skip
            give_up(f"no browser to read the site in: install chromium, or run `playwright install chromium`\n{e.message}")
        yield res
        res.close()

class Quiet(Handler):
    def log_message(self, *args): pass

Site = namedtuple('Site', 'folder url pages')

@pytest.fixture(scope='session')
def site(browser, tmp_path_factory):
    "The whole site, built once and served on this machine"
    out = tmp_path_factory.mktemp('site')
    res = build(root, out)
    assert res.returncode==0, res.stdout + res.stderr
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=out)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        pages = sorted(o.relative_to(out).as_posix() for o in out.rglob('*.html') if o.name!='404.html')
        yield Site(out, f'http://127.0.0.1:{server.server_port}/', pages)
        server.shutdown()

@contextmanager
def tab(browser, complaints=None, **kwargs):
    "A fresh browser tab; what goes wrong in it is added to `complaints`"
    context = browser.new_context(**kwargs)
    page = context.new_page()
    if complaints is not None:
        page.on('request', lambda o: o.url.startswith(('http://127.0.0.1:', 'data:')) or complaints.append(f'{page.url} asks for {o.url}'))
        page.on('response', lambda o: o.status<400 or complaints.append(f'{page.url}: {o.status} for {o.url}'))
        page.on('console', lambda o: o.type in ('error', 'warning') and complaints.append(f'{page.url}: {o.text}'))
        page.on('pageerror', lambda o: complaints.append(f'{page.url}: {o}'))
    yield page
    context.close()

def test_head(site):
    "Search engines and link previews get the page's address, a title, a description and a picture that exists"
    home = get_config(root).doc_url.rstrip('/')
    for o in site.pages:
        head = (site.folder/o).read_text().partition('</head>')[0]
        address = f'{home}/{o}'.removesuffix('index.html')
        assert f'<link rel="canonical" href="{address}">' in head
        found = dict(re.findall(r'<meta property="(og:\w+)" content="([^"]*)"', head))
        assert found['og:title'] and found['og:description'] and found['og:url']==address
        assert (site.folder/found['og:image'].removeprefix(home + '/')).is_file() and '`' not in found['og:description']

facts = """() => {
    const main = document.querySelector('main'), edge = main.getBoundingClientRect().right + 1;
    const scrolls = o => o && (/auto|scroll/.test(getComputedStyle(o).overflowX) || scrolls(o.parentElement));
    const all = (css, keep=o => true) => [...main.querySelectorAll(css)].filter(keep);
    const html = o => o.outerHTML.slice(0, 200);
    const prose = main.cloneNode(true);
    prose.querySelectorAll('pre, code, math').forEach(o => o.remove());
    return {
        links: [...document.querySelectorAll('a[href]')].map(o => o.href),
        ids: [...document.querySelectorAll('[id]')].map(o => o.id),
        wide: document.documentElement.scrollWidth > innerWidth ? ['the page'] :
            all('*', o => o.getBoundingClientRect().right > edge && !scrolls(o.parentElement)).map(html),
        pictures: all('img, svg:not([aria-hidden])').length,
        mute: all('img', o => !(o.complete && o.naturalWidth && o.alt.trim())).map(html),
        formulas: all('.math').length,
        titles: [...document.querySelectorAll('h1')].map(o => o.textContent),
        crumbs: [...document.querySelectorAll('.quarto-title-breadcrumbs .breadcrumb-item')].map(o => o.textContent.trim()),
        small: all('.picture img', o => o.width < .79*Math.min(o.naturalWidth, 1000)).map(html),
        raw: all('.math', o => !o.querySelector('math')?.getBoundingClientRect().width).map(html)
            .concat(prose.textContent.match(/\\\\[(\\[]|\\$\\$|^#\\|.*/gm) ?? []),
    }}"""

cut = """() => [...document.querySelectorAll('main pre:not(.diff)')].filter(o => o.scrollWidth > o.clientWidth)
    .map(o => o.textContent.trim().split('\\n')[0].slice(0, 60))"""

@pytest.fixture(scope='session')
def walk(browser, site):
    "What every page says of itself, on a telephone and on a desk, and all that went wrong on the way"
    found, complaints = {}, []
    for name,size in dict(phone=phone, desk=desk).items():
        with tab(browser, complaints, viewport=size) as page:
            for o in site.pages:
                page.goto(site.url + o)
                found[name,o] = page.evaluate(facts)
                page.add_style_tag(content='pre, pre code { white-space: pre !important; }')  # or what is too long goes on in the next line
                found[name,o]['cut'] = page.evaluate(cut)
    return found, complaints

def collect(walk, fact): return [f'{page}, {size}: {o}' for (size,page),res in walk[0].items() for o in res[fact]]

def test_pages_are_self_contained(walk):
    assert not walk[1], 'a request that leaves the machine or fails, or an error in the console'

def test_pages_fit(walk): assert not collect(walk, 'wide')

def test_pictures(walk):
    assert sum(o['pictures'] for o in walk[0].values())
    assert not collect(walk, 'mute'), 'a picture that does not load, or has no alternative text'

def test_formulas(walk):
    assert sum(o['formulas'] for o in walk[0].values())
    assert not collect(walk, 'raw'), 'a formula or a directive that is shown as written'

def test_links(site, walk):
    ids = {site.url + page: o['ids'] for (size,page),o in walk[0].items() if size=='desk'}
    ours, source = get_config(root).doc_url, f'{get_config(root).git_url}/blob/main/'
    def broken(link):
        url,anchor = urldefrag(link)
        if url.startswith(source): return not re.fullmatch(r'L\d+|', anchor) or not (root/url.removeprefix(source)).exists()
        if not url.startswith(site.url): return url.startswith(ours.rstrip('/'))
        if url.endswith('/'): url += 'index.html'
        if url in ids: return anchor and anchor not in ids[url]
        return not (site.folder/url.removeprefix(site.url)).is_file()
    assert not {f'{page}: {o}' for (_,page),res in walk[0].items() for o in res['links'] if broken(o)}

def test_one_title(walk):
    "A page has one title, and its place among the sections is not named twice"
    assert not {o: res['titles'] for (_,o),res in walk[0].items() if len(res['titles'])!=1}
    assert not {o: res['crumbs'] for (_,o),res in walk[0].items() if len(res['crumbs'])!=len({*res['crumbs']})}

def test_code_is_not_cut_off(walk):
    "On a desk no block of code or output on a page for readers is wider than its box"
    cut = {o: res['cut'] for (size,o),res in walk[0].items() if size=='desk' and not o.startswith('api/') and res['cut']}
    assert not cut, f'{sum(map(len, cut.values()))} blocks are cut off; python tools/check_pages.py --list counts their long lines'

def test_letters_in_pictures_are_readable(walk):
    "On a telephone a picture is not made much smaller than it was drawn: it scrolls"
    assert not {o: res['small'] for (size,o),res in walk[0].items() if size=='phone' and res['small']}

def test_address_that_does_not_exist(browser, site):
    with tab(browser, viewport=desk) as page:
        assert page.goto(site.url + 'no/such/page.html').status==404
        expect(page.locator('h1')).to_have_text('No such page')
        assert page.evaluate("getComputedStyle(document.querySelector('#quarto-content')).display")=='grid', 'shown without its style'
        page.locator('main a', has_text='home page').click()
        expect(page.locator('h1')).to_have_text('fastai_mixup_ext')

def test_sidebar(browser, site):
    with tab(browser, viewport=desk) as page:
        page.goto(site.url)
        assert page.locator('.sidebar-menu-container > ul > li > .sidebar-item-container .menu-text').all_inner_texts()==sections
        links = page.locator('.sidebar-menu-container a[href$=".html"]')
        listed,names = links.evaluate_all('os => os.map(o => o.href)'),links.all_inner_texts()
    assert sorted(listed)==sorted(site.url + o for o in site.pages), 'a page that the sidebar does not list, or lists twice'
    assert len({*map(str.lower, names + sections)})==len({*names} | {*sections})==len(names) + len(sections) - 2, 'two entries of one name'

def test_sidebar_on_a_phone_opens_at_its_top(browser, site):
    with tab(browser, viewport=phone) as page:
        for o in 'index.html', site.pages[-1]:
            page.goto(site.url + o)
            page.get_by_label('Toggle sidebar navigation').click()
            expect(page.locator('#quarto-sidebar')).to_have_class(re.compile('show'))
            page.wait_for_function("document.querySelector('#quarto-sidebar').getBoundingClientRect().left >= 0")
            first = page.locator('#quarto-sidebar .sidebar-link').first.bounding_box()
            header = page.locator('#quarto-header').bounding_box()
            assert header['y'] + header['height'] <= first['y'] < phone['height']/2

def test_markdown_copies(site):
    index = (site.folder/'llms.txt').read_text()
    for o in site.pages:
        assert f'{o}.md' in index
        assert (site.folder/f'{o}.md').read_text().startswith('#')

@pytest.mark.parametrize('size', [phone, desk], ids=['phone', 'desk'])
def test_search_finds_and_opens(browser, site, size):
    with tab(browser, viewport=size) as page:
        page.goto(site.url)
        if size is phone: page.get_by_label('Toggle navigation').click()
        page.get_by_label('Search', exact=True).fill('MixUpCallback')
        page.wait_for_load_state('networkidle')  # once the index is there the results are written anew: a click before that may be lost
        page.locator('.search-result').first.click()
        page.wait_for_url('**/api/*.html#mixupcallback')
        expect(page.locator('h3#mixupcallback')).to_be_in_viewport()

def test_copy_button(browser, site):
    with tab(browser, viewport=desk, permissions=['clipboard-read', 'clipboard-write']) as page:
        page.goto(site.url)
        block = page.locator('main :has(> .code-copy-button)').first
        block.hover()
        block.locator('.code-copy-button').click()
        expect(block.locator('.code-copy-button-checked')).to_be_visible()
        assert page.evaluate('navigator.clipboard.readText()').strip()==block.locator('code').inner_text().strip()!=''

def test_dark_mode_switches_and_stays(browser, site):
    def background(): return page.evaluate("getComputedStyle(document.body).backgroundColor")
    with tab(browser, viewport=desk, color_scheme='light') as page:
        page.goto(site.url)
        light = background()
        page.get_by_title('Toggle dark mode').click()
        expect(page.locator('html')).to_have_class(re.compile('quarto-dark'))
        dark = background()
        page.goto(site.url + 'changelog.html')
        assert background()==dark!=light

def test_pictures_fit_dark_mode(browser, site):
    "A plot, and a picture without a ground, get the page's dark background; a photograph keeps its colours, on a light panel"
    def shade(css): return np.asarray(Image.open(BytesIO(page.locator(css).first.screenshot())).convert('L'))
    with tab(browser, viewport=desk, color_scheme='dark') as page:
        for kind in 'plot', 'photo', 'clear':
            page.goto(site.url + next(o for o in site.pages if f'class="picture {kind}"' in (site.folder/o).read_text()))
            seen = shade(f'.{kind} img')
            assert seen[4].mean()>200 if kind=='photo' else seen[0].mean()<60

@pytest.mark.parametrize('query,page', [('alpha default', 'MixUpCallback'), ('mixup alpha default', 'mixup'),
    ('MixUpCalback', 'MixUpCallback')])
def test_search_by_words(browser, site, query, page):
    with tab(browser, viewport=desk) as t:
        t.goto(site.url)
        t.get_by_label('Search', exact=True).fill(query)
        expect(t.locator('.search-result').first).to_be_visible()
        assert any(page in o for o in t.locator('.search-result').all_inner_texts()[:5])

def test_search_shows_formulas_as_they_are_read(site):
    entries = json.loads((site.folder/'search.json').read_text())
    tex = re.compile(r'\\(frac|sqrt|text|tilde|hat|bar|lambda|alpha|ell|sum|sim|mathcal|operatorname|begin|left)\b(?![^ ]*[\'"])')
    assert not [o['href'] for o in entries if tex.search(o['text'])]

class Tables(HTMLParser):
    "The rows of all tables of a page, each a list of the cells' texts"
    def __init__(self, text):
        super().__init__()
        self.rows,self.cell = [],None
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        if tag=='tr': self.rows.append([])
        if tag in ('td', 'th'): self.cell = ''
    def handle_data(self, data):
        if self.cell is not None: self.cell += data
    def handle_endtag(self, tag):
        if tag in ('td', 'th'): self.rows[-1],self.cell = [*self.rows[-1], self.cell.strip()],None

@pytest.fixture(scope='session')
def reference(site): return {o: (site.folder/o).read_text() for o in site.pages if o.startswith('api/')}

def test_every_parameter_is_described(reference):
    "Each has a row of its own, with words"
    blank = []
    for page,text in reference.items():
        for part in re.split(r'(?=<h[1-4][ >])', text):
            name = re.sub('<[^>]*>', '', part.partition('</h')[0])
            width = 0  # of the table of parameters, where we are in one; what a cell prints below has another
            for row in Tables(part).rows:
                if row[-1]=='meaning': width = len(row)
                elif len(row)!=width: width = 0
                elif not row[-1]: blank.append(f'{page}: {name}: {row[0]}')
    assert not blank, '\n'.join(['parameters without a description:', *blank])

def test_calls_are_what_a_caller_writes(reference):
    call = re.compile(r'<h[23][^>]*>[^<]*</h[23]>\s*<div class="code-copy[^>]*>.*?</code>', re.S)
    plain = [(page, re.sub('<[^>]*>', '', o)) for page,text in reference.items() for o in call.findall(text)]
    assert plain
    assert not [o for o in plain if re.search(r'\bdef \w|\bself\b|__main__|\*args|->', o[1])]
    assert not [page for page,text in reference.items() if '__main__' in text]

def test_no_doubled_headings(reference):
    "No entry stands under a heading of the same name"
    heading = re.compile(r'<h[1-4][^>]*>(.*?)</h[1-4]>', re.S)
    def names(text): return [re.sub('<[^>]*>', '', o).lower() for o in heading.findall(text.partition('<main')[2])]
    assert not [(page, a) for page,text in reference.items() for a,b in zip(names(text), names(text)[1:]) if a==b]

def axe(page, kinds, context=None, **options):
    "What axe finds of each of these kinds of results: the rule and the node"
    res = Axe().run(page, context=context, options=dict(resultTypes=kinds, **options)).response
    return [[(o, n) for o in res[kind] for n in o['nodes']] for kind in kinds]

def part_of(page): return page.split('/')[0] if page.startswith(('api/', 'evidence/')) else 'others'

@pytest.mark.parametrize('part', ['api', 'evidence', 'others'])
def test_accessible(browser, site, part):
    "All of axe's rules but that of contrast, which is the one that another theme changes"
    found,pages = [],[o for o in site.pages if part_of(o)==part]
    assert pages
    with tab(browser, viewport=desk, color_scheme='light') as page:
        for o in pages:
            page.goto(site.url + o)
            bad, = axe(page, ['violations'], rules={'color-contrast': dict(enabled=False)})
            found += [f"{o}: {v['id']}: {n['html'][:150]}" for v,n in bad if v['impact'] in ('serious', 'critical')]
    assert not found

looks = """known => {
    const seen = new Set(known), found = [], looks = new Map([[null, '']]);
    const look = o => {
        if (!looks.has(o)) {
            const s = getComputedStyle(o), ground = [s.backgroundColor, s.backgroundImage, s.opacity, s.filter];
            const text = [s.color, s.fontSize, s.fontWeight, s.textShadow];
            looks.set(o, [look(o.parentElement), o.localName, o.getAttribute('class'), ground, text].join());
        }
        return looks.get(o);
    };
    for (const o of document.body.querySelectorAll('*')) {
        const text = o.matches('input, select, textarea') || [...o.childNodes].some(t => t.nodeType == 3 && t.data.trim());
        if (!text || !o.checkVisibility() || seen.has(look(o))) continue;
        seen.add(look(o));
        o.dataset.look = found.push(look(o)) - 1;
    }
    return found}"""

def pale(page, known):
    """Texts that axe finds too pale, one of each look: its colours, its size and all grounds that it stands on. Looks that `known` has
    three times are left out: each time axe could not tell, since something else lay over the text. If it could, that counts as three"""
    new = page.evaluate(looks, [o for o,times in known.items() if times>=3])
    if not new: return []
    bad,unsure = axe(page, ['violations', 'incomplete'], dict(include=[['[data-look]']]), runOnly=['color-contrast'])
    targets = [n['target'][-1] for _,n in unsure]
    unsure = page.evaluate('os => os.map(o => +document.querySelector(o).dataset.look)', targets)
    known.update({o: 1 if i in unsure else 3 for i,o in enumerate(new)})
    return [n['html'][:150] for _,n in bad]

@pytest.mark.parametrize('theme', themes)
def test_contrast(browser, site, theme):
    known,found = Counter(),[]
    with tab(browser, viewport=desk, color_scheme=theme, reduced_motion='reduce') as page:  # no colour on its way to another
        for o in site.pages:
            page.goto(site.url + o)
            found += [f'{o}: {text}' for text in pale(page, known)]
        assert len(known)>100 and not found
        page.goto(site.url + 'changelog.html')
        page.add_style_tag(content='main li { color: #888; background: #999; }')
        assert pale(page, known), 'a look that is new is looked at'

@pytest.mark.parametrize('theme', themes)
def test_screenshots(browser, site, theme):
    screenshots.mkdir(parents=True, exist_ok=True)
    firsts = [next(o for o in site.pages if o.startswith(f'{s}/')) for s in ('tutorials', 'explanations', 'evidence')]
    with tab(browser, viewport=desk, color_scheme=theme) as page:
        for o in ['index.html', *firsts, 'api/callback.html']:
            page.goto(site.url + o)
            page.screenshot(path=screenshots/f"{o.replace('/', '-').removesuffix('.html')}-{theme}.png", full_page=True)

def test_build_fails_on_bad_pages(tmp_path):
    "A broken link, a picture without alternative text and a formula that can't be shown are named, and the build fails"
    for o in 'pyproject.toml', 'nbs/_quarto.yml', 'tools':
        (shutil.copytree if (root/o).is_dir() else shutil.copy)(root/o, (tmp_path/'nbs').mkdir(exist_ok=True) or tmp_path/o)
    (tmp_path/'nbs/index.qmd').write_text('# Home\n\n[gone](gone.ipynb) $\\nonsense$\n\n<img src="x.png">\n')
    res = build(tmp_path, tmp_path/'out')
    assert res.returncode
    for o in 'gone.ipynb', 'nonsense', 'alternative text': assert o in res.stderr
