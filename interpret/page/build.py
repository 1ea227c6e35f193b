"""One HTML file out of the data of an X-ray report: template, style, scripts and data, and nothing from elsewhere."""

import base64
import hashlib
import json
import zlib
from importlib import resources
from typing import Any

# In the order in which they are put together: what is common, the panels, what starts them.
SCRIPTS = (
    'base.js',
    'colours.js',
    'grid.js',
    'next.js',
    'lens.js',
    'attention.js',
    'layers.js',
    'heads.js',
    'cells.js',
    'experts.js',
    'ablation.js',
    'compare.js',
    'xray.js',
)
# What could end a script or begin markup is written as JSON's escapes, which mean the letters themselves. `json.dumps` escapes
# all that is not ASCII: line separators (U+2028, U+2029), NUL, halves of surrogate pairs.
ESCAPES = str.maketrans({letter: f'\\u{ord(letter):04x}' for letter in '<>&'})


def build(report: dict[str, Any]) -> str:
    """The page that shows a report.

    Text of models and users is in the data alone: a JSON island in which no letter is left that HTML gives a meaning to, and
    whose strings the scripts put into the page as text nodes. A content security policy (CSP, level 3) names the hashes of the
    page's own style and script: markup in a text could neither run nor load anything even if it became markup.

    Args:
        report: as `weft.interpret.xray` makes it: JSON values, and arrays as {'b64', 'dtype', 'shape'}, little-endian.

    Returns:
        HTML. Arrays, and the table of cells, are compressed (zlib), which makes it less than half as large.

    Raises:
        ValueError: for a number that JSON has no form for, such as NaN.
    """
    style, script = _file('xray.css'), f"(() => {{\n'use strict';\n{''.join(map(_file, SCRIPTS))}}})();\n"
    own = f"script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    policy = f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"
    data = json.dumps(packed(report), allow_nan=False, separators=(',', ':')).translate(ESCAPES)
    page = _file('xray.html')
    # The data last: what stands in it is not searched for the names of places.
    for name, text in {'policy': policy, 'style': style, 'script': script, 'data': data}.items():
        before, after = page.split(f'{{{{{name}}}}}')
        page = before + text + after
    return page


def packed(report: dict[str, Any]) -> dict[str, Any]:
    """The report with its arrays and the table of cells compressed, as base.js unpacks them."""
    cells = json.dumps(report['cells'], allow_nan=False, separators=(',', ':')).encode()
    return {key: {'table': _compressed(cells)} if key == 'cells' else _packed(item) for key, item in report.items()}


def _packed(value: Any) -> Any:
    if isinstance(value, dict) and 'b64' in value:
        return {**value, 'b64': _compressed(base64.b64decode(value['b64'], validate=True))}
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    return [_packed(item) for item in value] if isinstance(value, list) else value


def _compressed(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw, 9)).decode()


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding='utf-8')


def _hash(text: str) -> str:
    """The hash by which a content security policy names an inline style or script."""
    return f'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'
