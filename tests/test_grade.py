"The grader: one final answer in a reply, compared by kind; right replies, and wrong ones that must not be taken."

import json
import time
from importlib import metadata
from pathlib import Path

import pytest

from k2lab.lab.config import LabError
from k2lab.tasks import values, verify as module
from k2lab.tasks.sandbox import why_not
from k2lab.tasks.verify import check_row, grader_version, judge_of, verify, why_wrong

DATA = Path(__file__).with_name('data')


def cases(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding='utf-8').splitlines()]


Q, SHARE, FIND = 'What is the result?', 'Which share?', 'Find all.'
PICK = 'Which planet is the largest?\n(A) Mars\n(B) Jupiter\n(C) Venus\n(D) none of these'
LINES = 'Pick one.\nA. 3\nB. 4\nC. 5'
PYTHON = 'Write f that adds one.'
ADD = 'def f(x):\n    return x + 1'

RIGHT = {
    'number': [
        (Q, '42', 'The result is **42**.'),
        (Q, '42', 'Adding the two gives 42'),
        (Q, '42', '6 × 7 = 42'),
        (Q, '42', 'We have 6 rows of 7 chairs, so there are 42 chairs.'),
        (Q, '42', 'Let me add.\n30 + 12 = 42\n\n**Answer: 42**'),
        (Q, '42', 'The answer is 42, not 43.'),
        (Q, '42', '42. This follows from 6 * 7.'),
        (Q, '42', '#### 42'),
        (Q, '42', '| step | value |\n|---|---|\n| 1 | 30 |\n| 2 | 12 |\n\nThe total is 42.'),
        (Q, '42', '| Answer | 42 |'),
        (Q, '42', 'I first thought 41, but the answer is 42.'),
        (Q, '42', 'The answer is 41. Wait, that is wrong. The answer is 42.'),
        (Q, '42', 'It is 42 (six times seven).'),
        (Q, '42', 'forty-two'),
        (Q, '-7', 'minus seven'),
        (Q, '-7', 'negative 7'),
        (Q, '-7', '负七'),
        (Q, '5/2', '2 1/2'),
        (Q, '5/2', '2½'),
        (Q, '5/2', '$2\\frac{1}{2}$'),
        (Q, '2/3', 'two thirds'),
        (Q, '0.75', '\\frac34'),
        (Q, '1200', '1.2 thousand'),
        (Q, '12500', '12 500'),
        (Q, '0.001', '10^{-3}'),
        (Q, '0.00042', '4.2 × 10⁻⁴'),
        (Q, '128', '١٢٨'),
        (Q, '12300', '一万二千三百'),
        (Q, '0.25', '四分之一'),
        (Q, '25%', '百分之二十五'),
        (Q, '36', '答案：36。'),
        (Q, '36', '一共有36个苹果。'),
        (Q, '\\sqrt{8}', '$2\\sqrt{2}$'),
        (Q, 'x^2+2x+1', '$(x+1)^2$'),
        (Q, '2\\pi', 'The answer is $2\\pi$.'),
        (Q, '9' * 400, '9' * 400),
        ('What is the ratio of cats to dogs?', '2:3', '4:6'),
        ('What is the ratio of cats to dogs?', '2:3', 'The ratio is 2 to 3.'),
    ],
    'unit': [
        ('How far?', '5 km', '5 kilometers'),
        ('How far?', '5 km', 'The distance is $5\\text{ km}$.'),
        ('How far?', '5 km', '\\boxed{5000\\,\\text{m}}'),
        ('How far, in km?', '5 km', '5'),
        ('How long, in cm?', '12', '120 mm'),
        ('How long does it take?', '90 min', '1 h 30 min'),
        ('How long does it take?', '1.5 hours', '90 minutes'),
        ('How fast?', '36 km/h', '10 m/s'),
        ('How fast?', '36 km/h', '36 kilometers per hour'),
        ('What area?', '25 cm^2', '25 square centimetres'),
        ('What area?', '25 cm²', '$25\\text{ cm}^2$'),
        ('How much?', '$18', '18 dollars'),
        ('How much?', '$18', '1800 cents'),
        ('How much?', '18 €', '€18.00'),
        ('How much?', '18元', '十八元'),
        ('Which angle?', '90°', '90 degrees'),
        (SHARE, '25%', '25 percent'),
        (SHARE, '0.25', '25 per cent'),
        ('Which percentage?', '25', '25%'),
        ('How many apples?', '3 apples', '3'),
        ('How many apples?', '3', '3 red apples'),
    ],
    'set': [
        (FIND, '2, 5', '5 and 2'),
        (FIND, '2, 5', '{2, 5}'),
        (FIND, '2, 5', '- 2\n- 5'),
        (FIND, '2, 5', 'The solutions are $x = 2$ and $x = 5$.'),
        (FIND, '2, 5', '$x_1 = 2$, $x_2 = 5$'),
        (FIND, '2, 5', '$\\boxed{2}$ and $\\boxed{5}$'),
        (FIND, '2, 5', '\\boxed{2, 5}'),
        (FIND, '3, -3', 'x = ±3'),
        (FIND, '1/2, 3', '0.5 or 3'),
        ('Sort: 3, 1, 2.', '1, 2, 3', 'Sorted: 1, 2, 3'),
        ('Which point?', '(1, 2)', 'The point is (1, 2).'),
        ('List all colours of the flag.', 'red, white, blue', 'Blue, white and red'),
        (FIND, '\\{1, 2, 3\\}', 'The answer is {3, 2, 1}.'),
        (FIND, '(1, 2), (3, 4)', '(3, 4) and (1, 2)'),
    ],
    'interval': [
        ('Where?', '[0, 1)', '0 ≤ x < 1'),
        ('Where?', '[0, 1)', 'x ∈ [0, 1)'),
        ('Where?', '[0, 1)', 'The inequality holds for $x \\in [0, 1)$.'),
        ('Where?', '(-\\infty, 3]', '3 ≥ x'),
        ('Where?', '(-\\infty, 3]', 'x is at most 3'),
        ('Where?', '(-\\infty, -1) \\cup (2, \\infty)', 'x < -1 or x > 2'),
        ('Which interval?', '(0, 1)', '0 < x < 1'),
        ('Where?', 'x > 1/2', '$(0.5, \\infty)$'),
        ('Where?', 'x > 1/2', 'The answer is (1/2, ∞).'),
    ],
    'choice': [
        (PICK, 'B', 'B'),
        (PICK, 'B', '**B) Jupiter**'),
        (PICK, 'B', 'Jupiter'),
        (PICK, 'B', 'The answer is (B) Jupiter.'),
        (PICK, 'B', 'A is too small. The largest is B.'),
        (PICK, '(B)', 'Option B'),
        (PICK, 'B', '\\boxed{\\text{B}}'),
        (PICK, 'B', 'A is wrong, so B.'),
        (PICK, 'D', 'none of these'),
        (LINES, 'B', 'B. 4'),
        (LINES, 'B', '答案是B。'),
    ],
    'yesno': [
        ('Is 9 prime?', 'no', 'No, it is not prime.'),
        ('Is 9 prime?', 'no', 'The answer is no.'),
        ('Is 9 prime?', 'no', '**No.** 9 = 3 * 3.'),
        ('Is 7 prime?', 'yes', 'Yes. No doubt about it.'),
        ('Is 7 prime?', 'Yes', 'yes!'),
        ('True or false: 7 is prime.', 'True', 'The statement is true.'),
        ('True or false: 9 is prime.', 'false', 'It is not true.'),
        ('7是质数吗?', '是', '是的。'),
    ],
    'text': [
        ('Capital?', 'Paris', 'The capital is Paris.'),
        ('Capital?', 'Paris', 'Paris is the capital of France.'),
        ('Capital?', 'Paris', '**Paris**\n\nLet me know if you need more.'),
        ('Capital?', 'Paris', 'The answer is "Paris".'),
        ('首都?', '北京', '答案是北京。'),
        ('Which default?', 'None', 'Use `None`.'),
        ('When?', '4 July 1776', 'July 4, 1776'),
        ('When?', '4 July 1776', 'The date was 1776/07/04.'),
        ('Which version?', '1.2.3', 'The version is 1.2.3.'),
        ('Who?', 'the Beatles', 'Beatles'),
        ('Poem?', 'Roses are red.\nViolets are blue.', 'Roses are red.\n  Violets are blue.'),
        ('Which animal?', 'a cat', '\\boxed{\\text{cat}}'),
    ],
    'code': [
        (PYTHON, ADD, '```python\ndef f(x):\n    "Add one."\n    return x+1  # one\n```'),
        (PYTHON, ADD, '```bash\npython f.py\n```\nwith\n```python\nf = lambda x: x + 1\n```'),
        ('Write SQL.', 'SELECT 1;', '```sql\nSELECT 1;\n```'),
        (
            'Write JavaScript.',
            'const f = (x) => {\n  return x;\n};',
            '```js\nconst f = (x) => {\n  return x;\n};\n```',
        ),
    ],
}

WRONG = {
    'number': [
        (Q, '4', '3 or 4'),
        (Q, '4', 'Either 3 or 4.'),
        (Q, '4', 'The answer is 3. Or maybe 4.'),
        (Q, '4', '3, maybe 4'),
        (Q, '4', '3-4'),
        (Q, '4', '3 to 4'),
        (Q, '4', 'between 3 and 4'),
        (Q, '4', 'The answer is not 4.'),
        (Q, '4', "It isn't 4."),
        (Q, '4', 'It is not the case that the answer is 4.'),
        (Q, '4', 'more than 4'),
        (Q, '4', 'At least 4'),
        (Q, '4', 'Is it 4?'),
        (Q, '4', '4 is wrong.'),
        (Q, '4', 'The answer is 4. No, wait, it is 5.'),
        (Q, '4', 'The answer is 4. The answer is 5.'),
        (Q, '4', '4\n5'),
        (Q, '4', '4. It could also be 5.'),
        (Q, '4', 'x = 3, x = 4'),
        (Q, '4', 'x = 3\nx = 4'),
        (Q, '4', 'There are 4 cats and 5 dogs.'),
        (Q, '4', '1, 2, 3, 4'),
        (Q, '4', 'If x is even the answer is 4, else 5.'),
        (Q, '4', 'I doubt that the answer is 4.'),
        (Q, '4', '4x'),
        (Q, '4', '4π'),
        (Q, '4', 'four and a half'),
        (Q, '4', '4 squared'),
        (Q, '4', 'the answer is 5 since 2*2 = 4'),
        (Q, '4', '5, because 2*2 = 4'),
        (Q, '4', '\\boxed{4}, no: \\boxed{5}'),
        (Q, '4', 'The answer is 4 or so \\boxed{'),
        (Q, '4', '<think>4'),
        (Q, '4', '<think>a</think>4<think>no'),
        (Q, '4', '<think>4</think>'),
        (Q, '4', '4 million'),
        (Q, '4', '4 (or 5)'),
        (Q, '12500', '12.500'),
        (Q, '1234', '1, 234'),
        (Q, '1/3', '0.333'),
        (Q, '2.5', '2 5/1'),
        (Q, '-7', '7'),
        (Q, '36', '三十五'),
        (Q, '36', '三十六或三十七'),
        (Q, '36', '不是36'),
        (Q, '42', 'forty-three'),
        (Q, '\\sqrt{8}', '$2\\sqrt{3}$'),
        (Q, '\\pi', '3.14'),
        ('Compute 6*7.', '42', '6*7'),
        ('What is the ratio of cats to dogs?', '2:3', '3:2'),
    ],
    'unit': [
        ('How far?', '5 km', '5 m'),
        ('How far?', '5 km', '5 miles'),
        ('How far?', '5 km', '5 kg'),
        ('How far, in km?', '5', '5 m'),
        ('How long, in cm?', '12', '12 mm'),
        ('A rope of 30 cm is cut in two. How long is a half?', '15', '15 m'),
        ('How long?', '90 min', '90 s'),
        ('How fast?', '36 km/h', '36 m/s'),
        ('What area?', '25 cm^2', '25 cm'),
        ('How much, in dollars?', '18', '€18'),
        ('How much?', '$18', '18 cents'),
        (SHARE, '25%', '25'),
        (SHARE, '25%', '2.5%'),
        (SHARE, '0.25', '0.25%'),
        ('How many apples?', '3 apples', '3 pears'),
        ('How far?', '5 km', '5 km or 6 km'),
    ],
    'set': [
        (FIND, '2, 5', '2'),
        (FIND, '2, 5', '2, 5, 7'),
        (FIND, '2, 5', 'x = 2 or x = 6'),
        (FIND, '2, 5', 'maybe 2, maybe 5'),
        (FIND, '2, 5', 'The solutions are not 2 and 5.'),
        (FIND, '2, 5', '2 and 5, or perhaps 3'),
        (FIND, '2, 5', 'between 2 and 5'),
        (FIND, '3, -3', 'x = 3'),
        ('Sort: 3, 1, 2.', '1, 2, 3', '3, 2, 1'),
        ('Which point?', '(1, 2)', '(2, 1)'),
        ('List all colours of the flag.', 'red, white, blue', 'red and white'),
        (FIND, '25', '2, 5'),
    ],
    'interval': [
        ('Where?', '[0, 1)', '(0, 1)'),
        ('Where?', '[0, 1)', '[0, 1]'),
        ('Where?', '[0, 1)', '0 < x < 1'),
        ('Where?', '[0, 1)', 'from 0 to 1'),
        ('Where?', '[0, 1)', '0, 1'),
        ('Where?', '(-\\infty, 3]', 'x < 3'),
        ('Where?', '(-\\infty, 3]', 'x ≥ 3'),
        ('Where?', '(-\\infty, -1) \\cup (2, \\infty)', 'x > 2'),
        ('Which interval?', '(0, 1)', '(0, 1) or [0, 1]'),
    ],
    'choice': [
        (PICK, 'B', 'A or B'),
        (PICK, 'B', 'Both A and B'),
        (PICK, 'B', '(B) Venus'),
        (PICK, 'B', '(A) Mars (B) Jupiter (C) Venus'),
        (PICK, 'B', 'Not B.'),
        (PICK, 'B', 'B is wrong.'),
        (PICK, 'B', 'The answer is A, not B.'),
        (PICK, 'B', 'Because it is big.'),
        (PICK, 'A', 'A planet is large.'),
        (PICK, 'B', 'Mars or Jupiter'),
        (PICK, 'B', 'B? No, C.'),
        (LINES, 'B', '5'),
        (LINES, 'B', 'A, B and C'),
    ],
    'yesno': [
        ('Is 9 prime?', 'no', 'Yes. No doubt.'),
        ('Is 9 prime?', 'no', 'Yes and no.'),
        ('Is 9 prime?', 'no', 'Yes, no, maybe.'),
        ('Is 9 prime?', 'no', 'Not sure.'),
        ('Is 7 prime?', 'yes', 'No... yes... I do not know.'),
        ('Is 7 prime?', 'yes', 'yes/no'),
        ('Is 7 prime?', 'yes', 'Maybe yes.'),
        ('Is 7 prime?', 'yes', 'The answer is not yes.'),
        ('True or false: 7 is prime.', 'True', 'That is not true.'),
        ('True or false: 7 is prime.', 'True', 'true or false'),
        ('7是质数吗?', '是', '不是。'),
    ],
    'text': [
        ('Capital?', 'Paris', 'Paris or London'),
        ('Capital?', 'Paris', 'Not Paris but London.'),
        ('Capital?', 'Paris', 'The capital is not Paris.'),
        ('Capital?', 'Paris', 'The capital is London. The capital is Paris.'),
        ('Capital?', 'Paris', 'Paris\nLondon'),
        ('Capital?', 'Paris', 'Paris, London'),
        ('Capital?', 'Paris', 'Paris is wrong.'),
        ('Capital?', 'Paris', 'Is it Paris?'),
        ('Capital?', 'Paris', 'The capital is London and the largest city is Paris.'),
        ('Capital?', 'Paris', 'It might be Paris.'),
        ('Capital?', 'Paris', 'Paris. Actually, London.'),
        ('Which default?', 'None', 'The default is `None` or `1`.'),
        ('Which default?', 'None', 'There is none of that kind.'),
        ('When?', '4 July 1776', '7 April 1776'),
        ('Which version?', '1.2.3', '1.2.4'),
        ('Which object?', 'a cat', 'concatenate'),
    ],
    'code': [
        (PYTHON, ADD, '```python\ndef f(x):\n    return x + 2\n```'),
        (PYTHON, ADD, '```python\ndef g(x):\n    return x + 1\n```'),
        (PYTHON, ADD, ''),
        ('Write SQL.', 'SELECT 1;', '```sql\nSELECT 2;\n```'),
        ('Write SQL.', "SELECT 'a b';", "SELECT 'ab';"),
    ],
}


def of(table):
    return [(kind, *case) for kind, cases in table.items() for case in cases]


def row(prompt, answer, **more):
    return dict(prompt=prompt, answer=answer, family='own', **more)


FILES = ('grader_52.jsonl', 'grader_more.jsonl', 'grader_world.jsonl')
CASES = [case for name in FILES for case in cases(name)]


@pytest.mark.parametrize('case', CASES, ids=lambda case: case['id'])
def test_recorded_answers(case):
    reply = case['reply'].replace('{LONG}', 'blah ' * 20_000)
    assert verify(row(case['prompt'], case['answer']), reply) is case['right']


@pytest.mark.parametrize('kind,prompt,answer,reply', of(RIGHT))
def test_right_replies_are_taken(kind, prompt, answer, reply):
    assert verify(row(prompt, answer), f'<think>so</think>{reply}<|im_end|>')


@pytest.mark.parametrize('kind,prompt,answer,reply', of(WRONG))
def test_wrong_replies_are_not_taken(kind, prompt, answer, reply):
    assert not verify(row(prompt, answer), reply)


@pytest.mark.parametrize('kind,prompt,answer,reply', of(RIGHT))
def test_each_answer_is_right_for_itself_and_no_reply_is_not(kind, prompt, answer, reply):
    asked = row(prompt, answer)
    assert verify(asked, answer)
    assert not verify(asked, '') and not verify(asked, '<think>' + answer)


@pytest.mark.parametrize(
    'answer,question,kind',
    [
        ('1,234', Q, 'number'),
        ('1,234', 'Give both numbers.', 'set'),
        ('2, 5', Q, 'set'),
        ('(1, 2)', 'Which point?', 'set'),
        ('(1, 2)', 'On which interval?', 'interval'),
        ('B', LINES, 'choice'),
        ('B', 'Which vitamin?', 'text'),
        ('12:30', 'When?', 'text'),
        ('3-4', 'How many?', 'text'),
        ('Paris, France', 'Where is it?', 'text'),
        ('weight=None', 'Which default?', 'text'),
        ('import os', 'How?', 'code'),
    ],
)
def test_the_kind_is_found_from_answer_and_question(answer, question, kind):
    assert judge_of(row(question, answer)) == kind


def test_a_row_may_name_its_kind():
    assert verify(row('Which?', '3, 4', judge='set'), '4 and 3')
    assert not verify(row('Which?', '3, 4', judge='exact'), '4, 3')
    assert verify(row('Which?', 'B', judge='choice'), 'The answer is (B).')
    assert not verify(row('Which?', '7', judge='text'), 'seven')
    with pytest.raises(LabError, match="did you mean 'interval'"):
        verify(row('Which?', '7', judge='intervall'), '7')
    with pytest.raises(LabError, match="'Paris' cannot be read as a number"):
        verify(row('Which?', 'Paris', judge='number'), '7')


@pytest.mark.skipif(bool(why_not()), reason=f'no sandbox: {why_not()}')
def test_code_with_tests_is_run():
    asked = row(PYTHON, None, tests=['assert f(1) == 2', 'assert f(-1) == 0'])
    asked.pop('answer')
    asked['final'] = ADD
    assert verify(asked, '```python\ndef f(n):\n    n += 1\n    return n\n```')
    assert why_wrong(asked, 'def f(x): return 2') == 'tests fail'
    assert why_wrong(asked, '<think>def f(x): return x + 1') == 'no final answer'
    check_row(asked, 'a row')


def test_without_math_verify_a_formula_is_refused_and_numbers_are_graded(monkeypatch):
    missing = lambda name: (_ for _ in ()).throw(metadata.PackageNotFoundError(name))
    monkeypatch.setattr(values, 'version', missing)
    monkeypatch.setitem(__import__('sys').modules, 'math_verify', None)
    assert verify(row(Q, '4'), 'The answer is 4.') and not verify(row(Q, '4'), '$\\sqrt{15}$')
    with pytest.raises(
        LabError, match=r"row 1: a formula is compared by math-verify.*k2lab\[eval\]"
    ):
        check_row(row(Q, '\\sqrt{8}'), 'a.jsonl: row 1')


HOSTILE = [
    '9^{9^{9^{9}}}', '99999999!', '2^{99999999}', '1e999999999', '(' * 5000, '\\boxed{' * 5000, '{' * 9000,
    '1,' * 9000, 'a = ' * 5000, '**' * 9000, '```' * 9000, 'is ' * 9000, '\\frac' * 3000, '9' * 20_000,
    'not ' * 9000, '| 1 ' * 5000, '1/' * 5000, '分之' * 5000, '\n' * 20_000, '"' * 20_000, 'or 1 ' * 5000,
]  # fmt: skip


@pytest.mark.parametrize('answer', ['42', '\\sqrt{2}', '2, 5', '[0, 1)', 'yes', 'Paris', ADD])
def test_hostile_replies_are_wrong_and_soon(answer):
    for reply in HOSTILE:
        began = time.monotonic()
        assert not verify(row(Q, answer), reply), reply[:20]
        assert time.monotonic() - began < 12, reply[:20]


def test_the_version_of_the_grader_changes_with_its_libraries(monkeypatch):
    before = grader_version()
    assert before == module.GRADER and len(before) == 16
    with monkeypatch.context() as m:
        m.setattr(values, 'version', lambda name: '0.0')
        assert grader_version() != before
    for source in module.SOURCES:  # the code of each of the three counts
        monkeypatch.setattr(module, 'SOURCES', [s for s in module.SOURCES if s != source])
        assert grader_version() != before
        monkeypatch.undo()
