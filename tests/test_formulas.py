"""Formulas of html pages: each form that pages use gives its TeX once, whole and with its number."""

import pytest

from k2lab.corpus.formulas import with_formulas
from k2lab.corpus.readers import page_text

KATEX = (
    '<span class="katex"><span class="katex-mathml"><math xmlns="http://www.w3.org/1998/Math/MathML">'
    '<semantics><mrow><msup><mi>x</mi><mn>2</mn></msup></mrow>'
    '<annotation encoding="application/x-tex">x^2 \\le 9</annotation></semantics></math></span>'
    '<span class="katex-html" aria-hidden="true"><span class="base"><span class="mord">x</span>'
    '<span class="vlist-t"><span>2</span></span><span>9</span></span></span></span>'
)
WIKIPEDIA = (
    '<span class="mwe-math-element"><span class="mwe-math-mathml-inline mwe-math-mathml-a11y" '
    'style="display: none;"><math alttext="{\\displaystyle x^{2}\\leq 9}"><semantics><mi>x</mi>'
    '<annotation encoding="application/x-tex">{\\displaystyle x^{2}\\leq 9}</annotation></semantics></math>'
    '</span><img src="https://wikimedia.org/api/rest_v1/media/math/render/svg/a" '
    'class="mwe-math-fallback-image-inline" alt="{\\displaystyle x^{2}\\leq 9}"/></span>'
)
MATHJAX2 = (
    '<span class="MathJax_Preview" style="color: inherit;"></span>'
    '<span class="MathJax" id="MathJax-Element-1-Frame" data-mathml="&lt;math&gt;&lt;mi&gt;x&lt;/mi&gt;&lt;/math&gt;">'
    '<nobr aria-hidden="true"><span class="math"><span class="mi">x</span><span class="mn">2</span></span></nobr>'
    '<span class="MJX_Assistive_MathML"><math><mi>x</mi></math></span></span>'
    '<script type="math/tex" id="MathJax-Element-1">x^2 \\le 9</script>'
)
MATHJAX3 = (
    '<mjx-container class="MathJax" jax="CHTML"><mjx-math class="MJX-TEX" aria-hidden="true"><mjx-msup>'
    '<mjx-mi class="mjx-i"><mjx-c class="mjx-c1D465 TEX-I"></mjx-c></mjx-mi></mjx-msup></mjx-math>'
    '<mjx-assistive-mml unselectable="on" display="inline"><math><msup><mi>x</mi><mn>2</mn></msup>'
    '<mo>≤</mo><mn>9</mn></math></mjx-assistive-mml></mjx-container>'
)
MATHML = '<math><msup><mi>x</mi><mn>2</mn></msup><mo>&#x2264;</mo><mn>9</mn></math>'
PREFIX = (
    '<mml:math><mml:msup><mml:mi>x</mml:mi><mml:mn>2</mml:mn></mml:msup>'
    '<mml:mo>≤</mml:mo><mml:mn>9</mml:mn></mml:math>'
)
WORDPRESS = '<img src="https://s0.wp.com/latex.php?latex=x%5E2+%5Cle+9&amp;bg=fff" alt="x^2 &#92;le 9" class="latex" />'
CODECOGS = '<img src="https://latex.codecogs.com/svg.latex?x%5E2%20%5Cle%209">'
SCRIPT = '<script type="math/tex; mode=display">x^2 \\le 9</script>'
NUMBERED = (
    '<math display="block"><mtable><mlabeledtr><mtd id="mjx-eqn-7"><mtext>(7)</mtext></mtd><mtd>'
    '<msup><mi>x</mi><mn>2</mn></msup><mo>≤</mo><mn>9</mn></mtd></mlabeledtr></mtable></math>'
)
IN_SCRIPT = '<script type="math/mml"><math><msup><mi>x</mi><mn>2</mn></msup><mo>≤</mo><mn>9</mn></math></script>'
FORMS = dict(
    katex=(KATEX, '$x^2 \\le 9$'),
    wikipedia=(WIKIPEDIA, '$x^{2}\\leq 9$'),
    mathjax2=(MATHJAX2, '$x^2 \\le 9$'),
    mathjax3=(MATHJAX3, '$x^{2}≤9$'),
    mathml=(MATHML, '$x^{2}≤9$'),
    prefix=(PREFIX, '$x^{2}≤9$'),
    wordpress=(WORDPRESS, '$x^2 \\le 9$'),
    codecogs=(CODECOGS, '$x^2 \\le 9$'),
    script=(SCRIPT, '$$x^2 \\le 9$$'),
    numbered=(NUMBERED, '$$x^{2}≤9 \\tag{7}$$'),
    mathml_in_script=(IN_SCRIPT, '$x^{2}≤9$'),
    raw=('\\(x^2 \\le 9\\)', '\\(x^2 \\le 9\\)'),
    dollars=('$x^2 &lt; 9$', '$x^2 < 9$'),
)


@pytest.mark.parametrize('name', FORMS)
def test_a_formula_comes_out_once(name):
    form, want = FORMS[name]
    page = (
        '<html><body><main><h1>Bounds</h1><p>For every number of the set we know that the bound '
        f'{form} holds, and so does the next one that is proved below.</p></main></body></html>'
    )
    text = ' '.join(page_text(page.encode()).split())
    assert f'the bound {want} holds' in text or want.startswith('$$') and text.count(want) == 1, (
        text
    )
    assert text.count('9') == 1


@pytest.mark.parametrize(
    'mathml,tex',
    [
        ('<mfrac><mi>a</mi><mrow><mi>b</mi><mo>+</mo><mn>1</mn></mrow></mfrac>', '\\frac{a}{b+1}'),
        ('<msqrt><mi>a</mi><mo>+</mo><mi>b</mi></msqrt>', '\\sqrt{a+b}'),
        ('<mroot><mi>a</mi><mn>3</mn></mroot>', '\\sqrt[3]{a}'),
        ('<msubsup><mo>∫</mo><mn>0</mn><mn>1</mn></msubsup><mi>f</mi>', '∫_{0}^{1}f'),
        (
            '<munder><mi>lim</mi><mrow><mi>n</mi><mo>→</mo><mi>∞</mi></mrow></munder>',
            '{\\lim }_{n→∞}',
        ),
        ('<mover><mi>x</mi><mo>¯</mo></mover>', '\\bar{x}'),
        ('<msup><mi>f</mi><mo>′</mo></msup><mo>&#x2061;</mo><mi>x</mi>', "f'x"),
        ('<mi>sin</mi><mi>x</mi><mtext> if real</mtext>', '\\sin x\\text{if real}'),
        (
            '<mtable><mtr><mtd><mn>1</mn></mtd><mtd><mn>2</mn></mtd></mtr></mtable>',
            '\\begin{matrix}1 & 2\\end{matrix}',
        ),
        ('<mfenced><mi>a</mi><mi>b</mi></mfenced>', '(a,b)'),
        (
            '<mmultiscripts><mi>R</mi><mi>i</mi><none/><mprescripts/><mn>2</mn><mn>3</mn></mmultiscripts>',
            '{}_{2}^{3}R_{i}',
        ),
        ('<mfrac linethickness="0"><mi>n</mi><mi>k</mi></mfrac>', '{n \\atop k}'),
        ('<mphantom><mi>q</mi></mphantom><mi>a</mi><mspace width="1em"/><mi>b</mi>', 'a b'),
    ],
)
def test_mathml_by_hand(mathml, tex):
    assert with_formulas(f'<p><math>{mathml}</math></p>') == f'<p>${tex}$</p>'.replace('&', '&amp;')


@pytest.mark.parametrize(
    'page',
    [
        '<p>Nothing of the kind, at 5 $ and 6 $.</p>',
        '<p><img class="math-logo" alt="Department of Mathematics at home" src="a.png"></p>',
        '<script>var math = "<b>";</script><!-- latex --><p>a &lt; b &amp; c</p><br/>',
        '<!DOCTYPE html><p class="tex">a</p>',
    ],
)
def test_other_pages_stay(page):
    assert with_formulas(page) == page


@pytest.mark.parametrize(
    'page',
    [
        '<math>',
        '<math><mi>x',
        '</math>',
        '<math></mi></math>',
        '<script type="math/tex">x',
        '<math><![CDATA[x',
        '<mjx-container>',
    ],
)
def test_a_broken_page_is_no_error(page):
    assert isinstance(with_formulas(page), str)
