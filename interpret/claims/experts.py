"""“Experts: standard FFNs specializing in specific domains (e.g., code, literature) during training”: do they, by topic?

Loads of experts are counted over pieces of the run's own validation data, by the topic of the text, which is the folder or the
first part of the name of the file that it is from, and by the kind of a token (experts.py of the X-ray). How much a
choice tells of the topic is their mutual information; as pieces of one text are alike in many ways, it is compared with that of
topics dealt out anew among whole texts, many times, and of kinds among the tokens of a text.

Letters: M layers of experts, T tokens, K experts of a token, E experts, R permutations.
"""

import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weft.inference.run import TrainedRun
from weft.interpret import intervals
from weft.interpret.claims.heads import Progress
from weft.interpret.xray import programs
from weft.interpret.xray.experts import KINDS, kind_of
from weft.runtime.errors import UserError

TOPICS = {  # of Python's standard library, which the demo is trained on
    'network': 'http email urllib smtplib ftplib imaplib poplib socketserver ssl',
    'asyncio': 'asyncio concurrent',
    'unittest': 'unittest doctest',
    'numbers': 'statistics fractions decimal _pydecimal random numbers colorsys _pylong',
    'files': 'shutil zipfile tarfile tempfile pathlib glob fnmatch gzip bz2 lzma posixpath ntpath zipimport filecmp',
    'text': 'json html xml csv textwrap difflib string pprint gettext configparser shlex',
    'interpreter': 'importlib dis inspect ast tokenize traceback pdb bdb symtable pyclbr codeop',
}
PIECES, LENGTH = 24, 256  # of each topic at most, and tokens of each
PERMUTATIONS = 200


def experts(run: TrainedRun, seed: int, say: Progress) -> dict[str, Any]:
    """All figures by name; information is in bits a choice, for each layer of experts."""
    c, tokenizer = run.model.config, run.tokenizer
    assert tokenizer is not None
    assert c.moe is not None
    rows, topics = pieces(run)
    choice, kinds = list[np.ndarray](), list[np.ndarray]()
    length = max(map(len, rows))
    at_once = programs.rows_for(programs.columns_for(length)) * 4
    for begin in range(0, len(rows), at_once):
        say(f'texts: {begin} of {len(rows)}')
        some = rows[begin : begin + at_once]
        filled = programs.padded(c, [*some, *[some[0]] * (at_once - len(some))], programs.columns_for(length))
        found_MBTK = programs.captured(run.model, ['router.choices'], filled)['router.choices']
        for row, ids in enumerate(some):
            choice.append(found_MBTK[:, row, : len(ids)])
            kinds.append(np.array([KINDS.index(kind_of(tokenizer.decode([token]))) for token in ids]))
    E, rng = c.moe.experts, np.random.default_rng(seed)
    count_RME = np.stack([counts(one, np.zeros(one.shape[1], int), 1, E)[0] for one in choice])  # of each text
    topic_R = np.array(topics)
    by_topic = lambda topic_R: np.stack([count_RME[topic_R == number].sum(0) for number in range(len(TOPICS))])

    def by_kind(dealt: Sequence[np.ndarray]) -> np.ndarray:
        each = [counts(one, kind, len(KINDS), E) for one, kind in zip(choice, dealt, strict=True)]
        return np.sum(each, axis=0)

    say('permutations')
    topic_M, kind_M = information(by_topic(topic_R)), information(by_kind(kinds))
    topic_QM = np.stack([information(by_topic(rng.permutation(topic_R))) for _ in range(PERMUTATIONS)])
    kind_QM = np.stack([information(by_kind(list(map(rng.permutation, kinds)))) for _ in range(PERMUTATIONS)])
    load_CME = by_topic(topic_R)
    share_CME = load_CME / load_CME.sum(-1, keepdims=True)
    kind_CME = by_kind(kinds)
    present = kind_CME.sum((1, 2)) > 0
    kind_share_CME = kind_CME[present] / kind_CME[present].sum(-1, keepdims=True)
    return {
        'texts': len(rows),
        'tokens': int(sum(map(len, rows))),
        'topics': list(TOPICS),
        'entropy': [float(one) for one in entropy(count_RME.sum(0))],
        'topic': [float(one) for one in topic_M],
        'topic_by_chance': [intervals.of_draws(topic_QM[:, layer]) for layer in range(len(topic_M))],
        'topic_p': [float((1 + (topic_QM[:, at] >= one).sum()) / (1 + PERMUTATIONS)) for at, one in enumerate(topic_M)],
        'kind': [float(one) for one in kind_M],
        'kind_by_chance': [intervals.of_draws(kind_QM[:, layer]) for layer in range(len(kind_M))],
        'kind_p': [float((1 + (kind_QM[:, at] >= one).sum()) / (1 + PERMUTATIONS)) for at, one in enumerate(kind_M)],
        'largest_share_of_a_topic': float(share_CME.max()),
        'largest_share_of_a_kind': float(kind_share_CME.max()),
        'permutations': PERMUTATIONS,
    }


def pieces(run: TrainedRun) -> tuple[list[list[int]], list[int]]:
    """Beginnings of files of the standard library as tokens, each of another file, and the number of the topic of each."""
    assert run.tokenizer is not None
    folder, rows, topics = Path(sysconfig.get_path('stdlib')), list[list[int]](), list[int]()
    for number, names in enumerate(TOPICS.values()):
        files = list[Path]()
        for name in names.split():
            files += sorted(folder.glob(f'{name}.py')) + sorted((folder / name).rglob('*.py'))
        texts = [file.read_text(encoding='utf-8') for file in files if file.stat().st_size > 4 * LENGTH][:PIECES]
        for ids in run.tokenizer.encode_batch(texts):
            rows.append([*run.tokenizer.prefix, *ids][: min(LENGTH, run.context)])
            topics.append(number)
    if not rows:
        raise UserError(f'experts: {folder} has no sources of the standard library of Python {sys.version_info[0]}')
    return rows, topics


def counts(choice_MTK: np.ndarray, class_T: np.ndarray, classes: int, experts: int) -> np.ndarray:
    """int [C, M, E]: how often tokens of each class choose each expert."""
    M, T, K = choice_MTK.shape
    found_CME = np.zeros((classes, M, experts), np.int64)
    layer_MTK = np.broadcast_to(np.arange(M)[:, None, None], choice_MTK.shape)
    np.add.at(found_CME, (np.broadcast_to(class_T[None, :, None], (M, T, K)), layer_MTK, choice_MTK), 1)
    return found_CME


def entropy(count_ME: np.ndarray) -> np.ndarray:
    """Bits of a choice, [M]."""
    p_ME = count_ME / count_ME.sum(-1, keepdims=True)
    return -(p_ME * np.log2(np.where(p_ME > 0, p_ME, 1))).sum(-1)


def information(count_CME: np.ndarray) -> np.ndarray:
    """Bits that an expert tells of a class, [M]: the mutual information of both."""
    p_CME = count_CME / count_CME.sum((0, 2), keepdims=True)
    flat_MC = p_CME.transpose(1, 0, 2).reshape(p_CME.shape[1], -1)
    of = lambda p_MX: -(p_MX * np.log2(np.where(p_MX > 0, p_MX, 1))).sum(-1)
    return of(p_CME.sum(2).T) + of(p_CME.sum(0)) - of(flat_MC)
