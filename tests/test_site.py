"""The site, built from a few pages, or one that is there (U2SEG_SITE=_docs/site): every link leads somewhere."""

import html.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from test_name import browser  # noqa: F401, a fixture
from u2seg import _modidx, site

root = Path(__file__).parents[1]


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.ids, self.images, self.text = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag == 'a' and a.get('href'):
            self.links.append(a['href'])
        if tag in ('img', 'script') and 'src' in a:
            assert a['src'], f'{tag} without a source'
            self.images.append(a['src'])
        if tag == 'link' and a.get('href') and a.get('rel') != 'canonical':
            self.images.append(a['href'])
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}

    def handle_data(self, data):
        self.text.append(data)


def faults(folder):
    "What leads nowhere: (page, link)."
    pages = {}
    for p in sorted(folder.rglob('*.html')):
        pages[p] = Page()
        pages[p].feed(p.read_text())
    out = []
    for p, page in pages.items():
        if p.name == '404.html':
            continue  # its links are those of the host's root
        for link in page.links + page.images:
            u = urlsplit(link)
            if u.scheme or u.netloc or link.startswith(('data:', 'javascript:')):
                continue
            to = (p.parent / unquote(u.path)).resolve() if u.path else p
            if to.is_dir():
                to = to / 'index.html'
            if not to.exists():
                out.append((p.name, link))
            elif u.fragment and to in pages and link in page.links:
                if unquote(u.fragment) not in pages[to].ids:
                    out.append((p.name, link))
    return pages, out


def links(path):
    "Links of a Markdown file, or of a notebook's prose; code apart."
    text = path.read_text()
    if path.suffix == '.ipynb':
        cells = json.loads(text)['cells']
        text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    text = re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S)
    return re.findall(r'\]\(([^)\s]+)\)', text)


def test_every_link_of_notebooks_and_readme_leads_to_a_file():
    for path in [*root.glob('*.md'), *(root / 'nbs').glob('*.ipynb')]:
        for link in links(path):
            if link.startswith(('http', '#')):
                continue
            assert (path.parent / link.split('#')[0]).exists(), f'{path.name}: {link}'


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "What mkdocs makes the site of; not to be changed."
    to = tmp_path_factory.mktemp('site') / 'docs'
    site.prepare(root, to)
    return to


def test_links_of_the_book_s_sources(sources):
    "Without building: pages that notebooks and README point to are there, and no placeholder is shown."
    pages = sources / 'pages'
    for path in [*pages.glob('*.ipynb'), *pages.glob('*.md')]:
        for link in links(path):
            name = link.split('#')[0]
            if link.startswith(('http', '#')):
                continue
            assert (pages / name).exists() or (pages / name.replace('.html', '.ipynb')).exists(), f'{path.name}: {link}'
    for path in [sources / 'mkdocs.yml', *pages.rglob('*.md'), *pages.glob('*.ipynb')]:
        assert 'example.org/u2seg' not in path.read_text(), f'{path.name}: a placeholder is shown'


def test_each_name_of_the_library_leads_to_the_cell_that_defines_it(sources):
    "Without building: of each page of a module, every link finds its anchor, and no public function is without one."
    pages, checked = sources / 'pages', 0
    anchors = {p.stem: set(re.findall(r'<a id=\\"([\w-]+)\\"', p.read_text())) for p in pages.glob('*.ipynb')}
    for module, names in _modidx.d['syms'].items():
        page = (pages / 'api' / f'{module.removeprefix("u2seg.")}.md').read_text()
        found = re.findall(r'^\[source\]\(\.\./(\w+)\.html#([\w-]+)\)$', page, re.M)
        dead = [(stem, anchor) for stem, anchor in found if anchor not in anchors[stem]]
        assert not dead, f'{module}: {dead}'
        public = {n for n in (name.removeprefix(f'{module}.') for name in names) if not re.search(r'^_|\.', n)}
        assert {f'source-{n}' for n in public} <= {anchor for _, anchor in found}, module
        checked += len(found)
    assert checked > 300


def test_headings_give_the_same_anchor_to_the_page_and_to_its_contents():
    "The list at the side counts headings that stand twice and drops marks of code; the page does neither."
    for path in (root / 'nbs').glob('*.ipynb'):
        cells = json.loads(path.read_text())['cells']
        prose = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        headings = re.findall(r'^#+ (.+)$', re.sub('```.*?```', '', prose, flags=re.S), re.M)
        twice = {h for h in headings if [x.lower() for x in headings].count(h.lower()) > 1}
        assert not twice and not [h for h in headings if '`' in h], path.name


def test_every_page_leads_to_its_neighbours(sources):
    book = [c.path.stem for c in site.chapters(root)]
    for i, name in enumerate(book):
        last = links(sources / 'pages' / f'{name}.ipynb')
        neighbours = [f'{book[j]}.html' for j in (i - 1, i + 1) if 0 <= j < len(book)]
        assert last[-len(neighbours) :] == neighbours, name
    index = json.loads((sources / 'pages' / 'index.ipynb').read_text())
    assert ''.join(index['cells'][0]['source']).startswith('# Overview')


def written(path):
    "Formulas of a notebook: pairs of dollars in prose, code apart."
    cells = json.loads(path.read_text())['cells']
    prose = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
    dollars = sum(len(re.findall(r'(?<!\$)\${1,2}', re.sub(r'```.*?```|`[^`]*`', '', p, flags=re.S))) for p in prose)
    assert dollars % 2 == 0, path.name
    return dollars // 2


def test_every_formula_becomes_mathml():
    pytest.importorskip('latex2mathml', reason='latex2mathml is not installed: make docs installs it')
    total = 0
    for path in sorted((root / 'nbs').glob('[0-9]*.ipynb')):
        count = written(path)
        page = site.readable(path.read_text())
        shown = path.read_text()  # notebook 96 shows one as text
        made = [page.count(tag) - shown.count(tag) for tag in ('<math ', '</math>')]
        assert made == [count, count], path.name
        prose = [c['source'] for c in json.loads(page)['cells'] if c['cell_type'] == 'markdown']
        assert not [p for p in prose if 'skip_exec' in p], path.name
        total += count
    assert total > 300


def test_menu_has_the_groups_of_the_contents():
    book = site.chapters(root)[1:]
    menu = site.navigation(site.chapters(root))
    groups = re.findall(r'^ *"\*\*([^*]+)\*\*\\n"', (root / 'nbs' / '00_overview.ipynb').read_text(), re.M)
    assert [title for entry in menu for title in entry] == ['Overview', 'README', *groups, 'Library']
    chapters = [title for entry in menu[2:-1] for part in entry.values() for c in part for title in c]
    assert chapters == [c.title for c in book] and all(re.match(r'\d\d ', t) for t in chapters)


def present(menu, pages):
    "The menu's entries that have a page."
    kept = []
    for entry in menu:
        ((title, to),) = entry.items()
        if isinstance(to, list):
            to = present(to, pages)
        if to and (isinstance(to, list) or (pages / to).exists()):
            kept.append({title: to})
    return kept


def build(docs):
    "A small site: six chapters."
    pages, path = docs / 'pages', docs / 'mkdocs.yml'
    for p in sorted(pages.glob('[0-9]*.ipynb'))[6:]:
        p.unlink()
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | dict(nav=present(config['nav'], pages))))
    command = [sys.executable, '-m', 'mkdocs', 'build', '-q', '-f', str(path)]
    subprocess.run(command, check=True, env=os.environ | dict(NO_MKDOCS_2_WARNING='1'))
    return docs / 'site'


def test_no_broken_link_or_image(tmp_path):
    built = os.environ.get('U2SEG_SITE')
    if not built:
        pytest.importorskip('mkdocs', reason='mkdocs is not installed: make docs installs it')
        site.prepare(root, tmp_path / 'docs')
    pages, broken = faults((Path(built) if built else build(tmp_path / 'docs')).resolve())
    if not built:
        broken = [(p, l) for p, l in broken if not re.match(r'(\.\./)?\d\d_\w+\.(html|ipynb)', l)]  # left out
    assert len(pages) > 10 and not broken, broken[:20]
    assert all(len(' '.join(page.text)) > 200 for page in pages.values())


SHOWN = "[...document.querySelectorAll('math')].filter(m => m.getBoundingClientRect().width > 0).length"
ERRORS = "document.querySelectorAll('merror').length"
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def test_formulas_are_shown_and_nothing_is_cut_off(tmp_path, browser):  # noqa: F811
    built = os.environ.get('U2SEG_SITE')
    if not built:
        pytest.importorskip('mkdocs', reason='mkdocs is not installed: make docs installs it')
        site.prepare(root, tmp_path / 'docs')
    folder = (Path(built) if built else build(tmp_path / 'docs')).resolve()
    pages = [p for p in sorted(folder.glob('*.html')) if p.name != '404.html']
    shown = 0
    for width in (1400, 690, 400):
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
        browser('POST', '/goog/cdp/execute', cmd='Emulation.setDeviceMetricsOverride', params=size)
        for page in pages:
            browser('POST', '/url', url=page.as_uri())
            notebook = root / 'nbs' / f'{page.stem}.ipynb'
            if notebook.exists():
                assert browser.run(SHOWN) == written(notebook), page.name
                shown += written(notebook)
            assert browser.run(ERRORS) == 0 and browser.run(WIDER) <= 0, (page.name, width)
    browser('POST', '/goog/cdp/execute', cmd='Emulation.clearDeviceMetricsOverride', params={})
    assert shown > 0
