"""Puts the TeX of each formula of an html page in its place, once.

Pages hold formulas as MathML, as KaTeX or MathJax (TeX beside one or two drawings of it), as
scripts of TeX or MathML, or as pictures with TeX as their other text. An extractor of text loses
some of them and gives others twice. `with_formulas` rewrites the page before that."""

import html
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import parse_qs, unquote, urlsplit

SIGNS = re.compile(
    r'<(?:\w+:)?math\b|math/(?:tex|mml|ascii)|katex|mathjax|mjx-|latex|mathtex|mimetex|[\s"\'](?:tex|math)\b'
    r'|numberedequation|inlineformula|displayformula',
    re.I,
)
# pictures of formulas, by their class or by where they are drawn
PICTURE = re.compile(
    r'(?:^|\s)(?:tex|latex|math|mwe-math-\S+|latex\S*|equation|numberedequation|inlineformula|displayformula)'
    r'(?:\s|$)',
    re.I,
)
DRAWN = re.compile(
    r'latex\.php|latex\.codecogs|mathtex|mimetex|math/render|[?&](?:latex|tex)=|cht=tx|/equations/',
    re.I,
)
# drawings of a formula whose source stands beside them
DRAWING = re.compile(r'(?:^|\s)(?:MathJax(?:_\w+)?|mjx-chtml|MathJax_Preview)(?:\s|$)')
HIDDEN = re.compile(r'mwe-math-mathml|katex-mathml|MJX_Assistive')
VOID = {'img', 'br', 'hr', 'input', 'meta', 'link', 'wbr', 'area', 'base', 'col', 'embed', 'source'}
STYLE = re.compile(r'^\{\s*\\(?:display|text|script)style\s*(.*)\}$', re.S)
UNSEEN = dict.fromkeys(map(ord, '\u2061\u2062\u2063\u2064\u200b\ufeff'))
FUNCTIONS = set(
    """arccos arcsin arctan arg cos cosh cot coth csc deg det dim exp gcd hom inf ker lg lim liminf
    limsup ln log max min Pr sec sin sinh sup tan tanh""".split()
)
ACCENTS = {
    '¯': 'bar', '‾': 'overline', '_': 'overline', '^': 'hat', '˜': 'tilde', '~': 'tilde',
    '→': 'vec', '⃗': 'vec', '˙': 'dot', '¨': 'ddot', '⏞': 'overbrace', 'ˇ': 'check',
}  # fmt: skip


@dataclass
class Node:
    "An element of MathML."

    tag: str
    attrs: dict = field(default_factory=dict)
    inside: list = field(default_factory=list)  # elements and texts

    @property
    def nodes(self) -> list:
        "The elements inside."
        return [one for one in self.inside if isinstance(one, Node)]

    @property
    def text(self) -> str:
        "All text inside."
        return ''.join(one.text if isinstance(one, Node) else one for one in self.inside)


def bare(tex: str) -> str:
    "TeX without the dollar signs, brackets or style that stand around all of it."
    tex = tex.strip()
    for first, last in (('$$', '$$'), ('$', '$'), ('\\(', '\\)'), ('\\[', '\\]')):
        inner = tex[len(first) : len(tex) - len(last)]
        if tex.startswith(first) and tex.endswith(last) and len(tex) > len(first + last):
            if last not in inner:
                tex = inner.strip()
    style = STYLE.match(tex)
    return style[1].strip() if style and style[1].count('{') == style[1].count('}') else tex


def group(tex: str) -> str:
    "TeX as one argument of a script."
    return tex if len(tex) == 1 or re.fullmatch(r'\\[A-Za-z]+', tex) else f'{{{tex}}}'


def leaf(node: Node) -> str:
    "The TeX of an element that holds text."
    text = ' '.join(node.text.translate(UNSEEN).split())
    if node.tag == 'mi' and text in FUNCTIONS:
        return f'\\{text} '
    if node.tag in ('mtext', 'ms') and re.search(r'[^\W\d_]{2}| ', text):
        return f'\\text{{{text}}}'
    return text


def over(base: str, mark: str) -> str:
    "The TeX of something above a base: an accent, or a script."
    if mark in ACCENTS:
        return f'\\{ACCENTS[mark]}{{{base}}}'
    return f'{group(base)}^{{{mark}}}'


def table(node: Node) -> str:
    "The TeX of a table; the label of a row becomes its number."
    rows, tag = [], ''
    for row in node.nodes:
        cells = [tex_of(cell) for cell in row.nodes]
        if row.tag == 'mlabeledtr' and cells:
            label = row.nodes[0].text.strip().strip('()')
            tag, cells = f'\\tag{{{label}}}', cells[1:]
        rows.append(' & '.join(cells))
    if len(rows) == 1 and tag:
        return f'{rows[0]} {tag}'
    return '\\begin{matrix}' + ' \\\\ '.join(rows) + '\\end{matrix}' + tag


def scripts(parts: list) -> str:
    "The TeX of a base with scripts on both sides (mmultiscripts)."
    base, after, before = parts[0], parts[1:], []
    if None in after:
        at = after.index(None)
        after, before = after[:at], after[at + 1 :]
    pairs = lambda some: ''.join(
        (f'_{{{low}}}' if low else '') + (f'^{{{high}}}' if high else '')
        for low, high in zip(some[::2], some[1::2])
    )
    return (f'{{}}{pairs(before)}' if before else '') + group(base) + pairs(after)


def fenced(node: Node, parts: list) -> str:
    "The TeX of a list between brackets (mfenced)."
    marks = node.attrs.get('separators', ',').strip() or ' '
    text = ''.join(
        part + (marks[min(i, len(marks) - 1)] if i < len(parts) - 1 else '')
        for i, part in enumerate(parts)
    )
    return node.attrs.get('open', '(') + text + node.attrs.get('close', ')')


def annotation(node: Node) -> str:
    "The TeX that stands in an annotation of a formula, or ''."
    for one in node.nodes:
        if one.tag == 'annotation' and 'tex' in one.attrs.get('encoding', '').lower():
            return bare(one.text)
        if found := annotation(one):
            return found
    return ''


def tex_of(node: Node) -> str:
    "The TeX of an element of MathML."
    tag, few = node.tag, 2
    if tag in ('mi', 'mn', 'mo', 'mtext', 'ms', 'ci', 'cn'):
        return leaf(node)
    if tag in ('annotation', 'annotation-xml', 'mphantom', 'none'):
        return ''
    if tag == 'mtable':
        return table(node)
    nodes = node.nodes
    if tag == 'semantics':
        return annotation(node) or (tex_of(nodes[0]) if nodes else '')
    if tag == 'mmultiscripts' and nodes:
        return scripts([None if one.tag == 'mprescripts' else tex_of(one) for one in nodes])
    parts = [tex_of(one) for one in nodes]
    few = 3 if tag in ('msubsup', 'munderover') else 2
    if tag in SHAPES and len(parts) >= few:
        return SHAPES[tag](node, *parts[:few])
    if tag == 'mfenced':
        return fenced(node, parts)
    row = ''.join(parts) or node.text.strip()
    if tag == 'mspace':
        return ' '
    return f'\\sqrt{{{row}}}' if tag == 'msqrt' else row


def fraction(node: Node, above: str, below: str) -> str:
    "The TeX of a fraction, or of two lines without a bar."
    if node.attrs.get('linethickness', '1').startswith('0'):
        return f'{{{above} \\atop {below}}}'
    return f'\\frac{{{above}}}{{{below}}}'


def primes(base: str, script: str) -> str:
    "The TeX of a base with a script above, which may be primes."
    marks = script.replace('″', '′′').replace('‴', '′′′')
    if marks and set(marks) <= {'′', "'"}:
        return base + "'" * len(marks)
    return f'{group(base)}^{{{script}}}'


SHAPES = {
    'mfrac': fraction,
    'msup': lambda node, base, high: primes(base, high),
    'msub': lambda node, base, low: f'{group(base)}_{{{low}}}',
    'munder': lambda node, base, low: f'{group(base)}_{{{low}}}',
    'mover': lambda node, base, high: over(base, high),
    'msubsup': lambda node, base, low, high: f'{group(base)}_{{{low}}}^{{{high}}}',
    'munderover': lambda node, base, low, high: f'{group(base)}_{{{low}}}^{{{high}}}',
    'mroot': lambda node, base, index: f'\\sqrt[{index}]{{{base}}}',
}


def formula_tex(math: Node) -> str:
    "The TeX of a whole formula: its annotation, its other text if that is TeX, or what its elements say."
    other = math.attrs.get('alttext', '')
    return annotation(math) or (bare(other) if '\\' in other else '') or tex_of(math).strip()


def picture_tex(attrs: dict) -> str:
    "The TeX of a picture of a formula, or '' if it is a picture of something else."
    source = ' '.join(attrs.get(name, '') for name in ('src', 'data-src', 'data-lazy-src'))
    alt, drawn = attrs.get('alt', '').strip(), DRAWN.search(source)
    if not drawn and not PICTURE.search(attrs.get('class', '')):
        return ''
    prose = len(alt.split()) > 3 and not re.search(r'[\\^_=<>{}+]', alt)
    if alt and (drawn or not prose):
        return bare(alt)
    parts = urlsplit(source.strip())
    asked = parse_qs(parts.query)
    named = next((asked[name][0] for name in ('latex', 'tex', 'chl') if name in asked), '')
    return bare(named or (unquote(parts.query) if drawn and not asked else ''))


class Rewriter(HTMLParser):
    "Writes a page again, with each formula as text."

    def __init__(self, scripts: bool):
        super().__init__(convert_charrefs=False)
        self.scripts = scripts  # whether formulas stand in scripts, beside their drawings
        self.out: list[str] = []
        self.math: list[Node] = []  # the open elements of a formula
        self.skipped = ['', 0]  # a tag whose content is left out, and how often it is open
        self.kind, self.block, self.seen, self.number = '', False, False, ''
        self.labelled, self.glyphs, self.blocks = 0, '', []

    def write(self, text: str):
        "Adds to the page, unless inside something that is left out."
        if not self.skipped[1]:
            self.out.append(text)

    def formula(self, tex: str, block: bool = False):
        "Writes a formula."
        if not tex:
            return
        if self.number and '\\tag' not in tex:
            tex = f'{tex} \\tag{{{self.number}}}'
        self.number, self.seen = '', True
        marks = '$$' if block else '$'
        self.write(html.escape(f'{marks}{tex}{marks}', quote=False))

    def handle_starttag(self, tag, attrs):
        attrs = {name: value or '' for name, value in attrs}
        name, css = tag.rpartition(':')[2], attrs.get('class', '')
        if self.math:
            self.math[-1].inside.append(node := Node(name, attrs))
            self.math.append(node)
        elif self.skipped[1]:
            self.look(tag, attrs)
        elif name == 'math':
            self.math = [Node(name, attrs)]
        elif tag == 'script' and attrs.get('type', '').lower().startswith('math/'):
            self.kind = attrs['type'].lower()
        elif tag == 'img':
            self.picture(attrs, css)
        else:
            self.element(tag, css, attrs)

    def look(self, tag: str, attrs: dict):
        "Inside a drawing: counts its elements and finds the number of the formula, or its letters."
        self.skipped[1] += tag == self.skipped[0]
        self.labelled += attrs.get('id', '').startswith('mjx-eqn') or bool(self.labelled)
        if letter := re.search(r'\bmjx-c([0-9A-F]{2,6})\b', attrs.get('class', '')):
            self.glyphs += chr(min(int(letter[1], 16), 0x10FFFF))

    def picture(self, attrs: dict, css: str):
        "A picture: as its formula, as nothing if that stands beside it, or as it is."
        tex = picture_tex(attrs)
        if not tex:
            self.write(self.get_starttag_text() or '')
        elif not ('mwe-math-fallback' in css and self.seen):
            self.formula(tex)

    def element(self, tag: str, css: str, attrs: dict):
        "Any other element: left out if it is the drawing of a formula whose source is there."
        if re.search(r'(?:^|\s)(?:katex|mwe-math-element)(?:\s|$)', css) or tag == 'mjx-container':
            self.seen = False
        self.block = self.block or 'katex-display' in css or attrs.get('display') == 'true'
        if 'katex-html' in css and self.seen or tag == 'mjx-math' or tag == 'svg' and self.blocks:
            self.glyphs = attrs.get('data-latex', '')
            self.skipped = [tag, 1]
        elif (
            DRAWING.search(css)
            and tag != 'mjx-container'
            and (self.scripts or 'data-mathml' in attrs)
        ):
            if not self.scripts:
                self.formula(rewritten(attrs['data-mathml'])[0], 'Display' in css)
            self.skipped = [tag, 1]
        elif tag.startswith('mjx-'):
            self.blocks += [tag] if tag == 'mjx-container' else []
        elif HIDDEN.search(css):
            self.write(f'<{tag}>')
        else:
            self.write(self.get_starttag_text() or '')

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.math or self.skipped[1] and tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        name = tag.rpartition(':')[2]
        if self.math:
            self.close_math(name)
        elif self.skipped[1]:
            self.skipped[1] -= tag == self.skipped[0]
            self.labelled -= bool(self.labelled)
        elif self.kind and tag == 'script':
            self.kind = ''
        elif tag == 'mjx-container':
            if not self.seen:
                self.formula(self.glyphs, self.block)
            self.blocks, self.glyphs, self.block = self.blocks[:-1], '', False
        elif not tag.startswith('mjx-'):
            self.write(f'</{tag}>')

    def close_math(self, name: str):
        "Closes an element of a formula, and the formula with its last one."
        at = next((i for i, node in enumerate(self.math) if node.tag == name), None)
        if at is None:
            return
        math, self.math = self.math[0], self.math[:at]
        if not self.math:
            block = self.block or 'block' in (math.attrs.get('display'), math.attrs.get('mode'))
            self.formula(formula_tex(math), block)
            self.block = self.block and bool(self.blocks)

    def handle_data(self, data):
        if self.math:
            self.math[-1].inside.append(data)
        elif self.labelled:
            self.number = data.strip().strip('()') or self.number
        elif self.kind.startswith('math/mml'):
            self.formula(rewritten(data)[0], 'display' in self.kind)
        elif self.kind:
            self.formula(bare(html.unescape(data)), 'mode=display' in self.kind.replace(' ', ''))
        else:
            self.write(data)

    def handle_entityref(self, name):
        self.handle_data(html.unescape(f'&{name};') if self.math else f'&{name};')

    def handle_charref(self, name):
        self.handle_data(html.unescape(f'&#{name};') if self.math else f'&#{name};')

    def handle_comment(self, data):
        self.write('' if self.math else f'<!--{data}-->')

    def handle_decl(self, decl):
        self.write(f'<!{decl}>')

    def unknown_decl(self, data):
        if self.math:
            self.math[-1].inside.append(data.removeprefix('CDATA['))
        else:
            self.write(f'<![{data}]>')

    def handle_pi(self, data):
        self.write(f'<?{data}>')


def rewritten(mathml: str) -> list[str]:
    "The TeX of the formulas in a text of MathML; ['']  if there are none."
    inner = Rewriter(False)
    found: list[str] = []
    inner.formula = lambda tex, block=False: found.append(tex)  # type: ignore[method-assign]
    inner.feed(mathml)
    inner.close()
    return found or ['']


def with_formulas(page: str) -> str:
    "A page with each formula as TeX between $, or $$ where it stands alone; other pages as they are."
    if not SIGNS.search(page):
        return page
    rewriter = Rewriter(bool(re.search(r'<script[^>]*math/', page, re.I)))
    try:
        rewriter.feed(page)
        rewriter.close()
        rewriter.close_math('math')
    except AssertionError:  # of html.parser, for a declaration that it does not know
        return page
    return ''.join(rewriter.out)
