"""The page of an X-ray: one file, whose data come back as they were, in which no text is markup; tests/browser opens it."""

import base64
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.house import ROOT
from tests.interpret.synthetic_report import synthetic_report
from weft.interpret.page import build as page

EVIL = (
    '</script><script>window.ran=1</script><img src=x onerror="window.ran=1">&lt;\u2028\u2029\x00<!--{{data}}{{script}}'
)


class Tags(HTMLParser):
    """The elements of a page, with their attributes, and the text inside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag in ('script', 'style')
        self.inside += [''] * self.open

    def handle_endtag(self, tag: str) -> None:
        self.open = False

    def handle_data(self, data: str) -> None:
        if self.open:
            self.inside[-1] += data


def unpacked(value: Any) -> Any:
    """What base.js makes of the page's data."""
    if isinstance(value, dict) and 'table' in value:
        return json.loads(zlib.decompress(base64.b64decode(value['table'])))
    if isinstance(value, dict) and 'b64' in value:
        return {**value, 'b64': base64.b64encode(zlib.decompress(base64.b64decode(value['b64']))).decode()}
    if isinstance(value, dict):
        return {key: unpacked(item) for key, item in value.items()}
    return [unpacked(item) for item in value] if isinstance(value, list) else value


def data(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return unpacked(json.loads(found[1]))


@pytest.fixture(scope='module')
def report() -> dict[str, Any]:
    return synthetic_report(layers=4, heads=2, tokens=9, experts=True, against=True)


def test_data_come_back_as_they_were(report):
    assert data(page.build(report)) == json.loads(json.dumps(report))


def test_sixty_four_tokens_of_smollm2_take_at_most_five_megabytes():
    report = synthetic_report()
    assert len(report['texts'][0]['tokens']) == 64
    assert 1e6 < len(page.build(report)) < 5e6


def test_text_of_models_and_users_is_no_markup(report):
    plain = Tags(page.build(report))
    spoilt = json.loads(json.dumps(report))
    spoilt |= {
        'title': EVIL,
        'strings': [EVIL] * len(report['strings']),
        'index': {'tokens': 1, 'source': EVIL},
        'patch_reason': EVIL,
    }
    spoilt['made'] |= {'command': EVIL, 'run': EVIL, 'weft': EVIL}
    spoilt['model']['name'] = EVIL
    for cell in spoilt['cells'].values():
        cell['texts'] = [{'before': EVIL, 'token': EVIL, 'after': EVIL, 'activation': 1.0}]
    for text in spoilt['texts']:
        text['text'] = EVIL
    made = page.build(spoilt)
    assert Tags(made).tags == plain.tags
    assert data(made) == spoilt
    assert 'onerror' not in re.sub(r'<script.*?</script>', '', made, flags=re.DOTALL)


def test_nothing_is_loaded_from_elsewhere_and_only_its_own_script_runs(report):
    text = page.build(report)
    found = Tags(text)
    loading = {'src', 'href', 'action', 'data', 'style', 'onclick', 'onload', 'onerror'}
    assert not {name for _, attributes in found.tags for name in attributes} & loading
    assert not re.search(r'https?://(?!www\.w3\.org/2000/svg)', text)
    (policy,) = [a['content'] for _, a in found.tags if a.get('http-equiv') == 'Content-Security-Policy']
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in found.inside]
    style, _, script = hashes
    assert policy == f"default-src 'none'; script-src {script}; style-src {style}; base-uri 'none'; form-action 'none'"


def test_scripts_parse_no_markup_and_use_all_that_a_report_holds(report):
    code = ''.join(map(page._file, page.SCRIPTS))
    assert not re.search(
        r'innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|\.srcdoc|DOMParser', code
    )
    unused = {'version', 'ids', 'text'}  # what a page shows as tokens; for those who read the data themselves

    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            inside = {key: item for key, item in value.items() if key not in ('cells', 'load_by_kind')}
            return set(inside) | {key for item in value.values() for key in keys(item)}
        return {key for item in value for key in keys(item)} if isinstance(value, list) else set()

    wanted = {key for key in keys(report) - unused if ':' not in key}
    built = {f'{part}_{kind}' for part in ('attention', 'feed_forward') for kind in ('norm', 'cosine', 'answer')}
    built |= {f'{role}_random' for role in ('previous', 'first', 'duplicate', 'induction')}  # as `${key}_random`
    assert len(wanted) > 60
    assert not {key for key in wanted - built if not re.search(rf'\b{key}\b', code)}


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_a_number_that_json_has_no_form_for_is_refused(report, number):
    with pytest.raises(ValueError, match='not JSON compliant'):
        page.build({**report, 'made': {**report['made'], 'seconds': number}})


def test_each_panel_names_a_section_of_the_docs(report):
    named = re.findall(r'docs/interpret\.md, “X-ray”, “([^”]+)”', page.build(report))
    section = (ROOT / 'docs/interpret.md').read_text(encoding='utf-8').split('\n## X-ray\n')[1].split('\n## ')[0]
    assert named == re.findall(r'^### (.+)$', section, re.MULTILINE)
    assert len(named) == 9
