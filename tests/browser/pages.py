"""Writes the pages that `make browser` tries, and the reports that they show: python -m tests.browser.pages FOLDER"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.interpret.synthetic_report import synthetic_report
from weft.interpret.page.build import build

EVIL = '</script><script>window.ran=1</script><img src=x onerror="window.ran=1"><b>\u202e\u2028\x00&lt;'


def evil() -> dict[str, Any]:
    """A report whose every text is markup that would run if it became markup."""
    report = synthetic_report(layers=4, heads=2, tokens=9, experts=True, against=True)
    report |= {'title': EVIL, 'strings': [EVIL] * len(report['strings']), 'index': {'tokens': 1, 'source': EVIL}}
    report |= {'patch': None, 'patch_reason': EVIL}
    report['made'] |= {'command': EVIL, 'run': EVIL, 'weft': EVIL}
    report['model']['name'] = EVIL
    for cell in report['cells'].values():
        cell['texts'] = [{'before': EVIL, 'token': EVIL, 'after': EVIL, 'activation': 1.0}]
    for text in report['texts']:
        text['text'] = EVIL
        text['heads']['role'] = [[EVIL] * 2] * 4
    return report


def absent() -> dict[str, Any]:
    """A report of a model for which most instruments mean nothing: no attention, no cells, no experts."""
    report = synthetic_report(layers=3, heads=2, tokens=5, index=False)
    report['texts'][0] |= {'attention': None, 'heads': None, 'cells_top': None, 'experts': None}
    report['texts'][0]['ablation'] |= {'heads': None, 'cells': []}
    report['model'] |= {'heads': None, 'kv_heads': None, 'hidden': None}
    return report


def one_token() -> dict[str, Any]:
    """The shortest text."""
    return synthetic_report(layers=1, heads=1, tokens=1)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    reports = {
        'dense': synthetic_report(),
        'experts': synthetic_report(experts=True, index=False),
        'against': synthetic_report(against=True),
        'evil': evil(),
        'absent': absent(),
        'one_token': one_token(),
    }
    for name, report in reports.items():
        (folder / f'{name}.html').write_text(build(report), encoding='utf-8')
        (folder / f'{name}.json').write_text(json.dumps(report), encoding='utf-8')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
