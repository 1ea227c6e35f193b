// Panel: two texts side by side, where their vectors part, and activation patching.

panels.compare = (() => {
  let pairs, map, next;
  const NAMES = ['A', 'B'];

  const side = (i, t) => (t === null ? '–' : wordChip(report.texts[i].tokens[t]));
  const alignment = () => report.compare.alignment;
  const pair = () => alignment().findIndex((two) => two[state.text] === state.token);
  const name = (a) => alignment()[a].map((t, i) => (t === null ? '–' : `“${visible(word(report.texts[i].tokens[t]))}”`)).join(' / ');
  const both = (a) => alignment()[a].every((t) => t !== null);
  const same = (a) => both(a) && new Set(alignment()[a].map((t, i) => report.texts[i].ids[t])).size === 1;

  function choose(a) {
    const [i, j] = alignment()[a];
    const text = [i, j][state.text] !== null ? state.text : 1 - state.text;
    go({ text, token: [i, j][text] });
  }

  function patching() {
    const { patch } = report;
    if (!patch) return [node('p', { class: 'absent' }, report.patch_reason ? `No patching: ${report.patch_reason}` : 'This report was made without patching.')];
    const answers = patch.answers.every((answer, i) => report.texts[i].next.top.at(-1)[0] === answer);
    const ramp = () => scale({ high: 1, both: true, show: percent, name: 'share of the difference that comes back: 0 % nothing, 100 % all' });
    const rows = layersDown(report.model.layers);
    const columns = patch.positions.map((t, i) => ({ key: i, label: word(report.texts[1].tokens[t]) }));
    const kinds = [['residual', 'Residual stream after a layer'], ['attention', 'Output of attention'], ['feed_forward', 'Output of the feed-forward network']];
    const figures = kinds.filter(([key]) => patch[key]).map(([key, title]) => {
      const grid = heatmap({
        label: `Patching: ${title}`, rows, columns, tokens: true, corner: 'layer', scale: ramp(),
        value: (l, i) => patch[key].at(l, i),
        say: (l, i) => `layer ${l}, at “${visible(columns[i].label)}” (${patch.positions[i]}): ${percent2(patch[key].at(l, i))} comes back`,
        select: (layer, i) => go({ layer, text: 1, token: patch.positions[i] }),
      });
      grid.root.classList.add('small');
      return node('figure', {}, node('figcaption', {}, node('b', {}, title)), grid.root);
    });
    if (patch.heads) {
      const grid = heatmap({
        label: 'Patching: single heads', rows, corner: 'layer', scale: ramp(),
        columns: range(patch.heads.shape[1]).map((n) => ({ key: n, label: String(n) })),
        value: (l, n) => patch.heads.at(l, n),
        say: (l, n) => `layer ${l}, head ${n}: ${percent2(patch.heads.at(l, n))} comes back`,
        select: (layer, head) => go({ layer, head }),
      });
      grid.root.classList.add('small');
      figures.push(node('figure', {}, node('figcaption', {}, node('b', {}, 'Single heads, at all tokens')), grid.root));
    }
    return [
      node('p', { class: 'facts' }, 'Compared are ', wordChip(patch.answers[0], 'right'), `, ${answers ? "text A's answer" : 'which text A favours more than text B does'}, and `, wordChip(patch.answers[1], 'right'), `, ${answers ? "text B's" : 'which text B favours more than text A does'}. Log-probability of the first less that of the second: ${signed(patch.clean)} after text A, ${signed(patch.corrupted)} after text B.`),
      node('div', { class: 'charts narrow' }, figures),
    ];
  }

  const percent2 = (x) => (x < 0 ? MINUS : '') + percent(Math.abs(x));

  function build(root) {
    const { cosine, parted } = report.compare;
    const columns = range(alignment().length).filter(both).map((a) => {
      const [s, t] = alignment()[a].map((i, k) => word(report.texts[k].tokens[i]));
      return { key: a, label: s === t ? s : `${s}/${t}` };
    });
    pairs = node('div', { class: 'scroll' });
    map = heatmap({
      label: 'Cosine of aligned tokens, layers by tokens',
      rows: range(report.model.layers + 1).reverse().map((r) => ({ key: r, label: r ? String(r - 1) : 'emb.' })),
      columns, tokens: true, corner: 'layer',
      value: (r, a) => cosine.at(r, a),
      mark: (r, a) => (parted[a] === r ? 'decided' : ''),
      say: (r, a) => `${row(r)}, ${name(a)}: cosine ${signed(cosine.at(r, a), 3)}${parted[a] === r ? '; here they part' : ''}`,
      select: (r, a) => {
        state.row = r;
        choose(a);
      },
      scale: scale({ high: 1, both: cosine.data.some((x) => x < 0), power: 2, show: plain, name: 'cosine: 1 is the same direction (steps near 1 are widened)' }),
    });
    next = node('div', { class: 'charts' });
    replace(
      root,
      node('div', { class: 'beside' }, node('div', {}, node('h3', {}, 'Aligned tokens'), pairs), node('div', {}, node('h3', {}, 'How alike their vectors are'), node('p', { class: 'key' }, node('span', { class: 'sample decided' }), ' where tokens that are the same part: the cosine falls below 0.9'), map.root)),
      node('h3', { class: 'of' }),
      next,
      node('h3', {}, 'Patching: which parts carry the difference?'),
      node('p', {}, 'The model reads text B, but one vector is replaced by the one that text A has in its place: at tokens that differ, those right after them, and the last. Where much of the difference in the answer comes back, that place carries what tells the two texts apart.'),
      patching(),
    );
  }

  function update() {
    const { cosine, parted } = report.compare;
    const a = pair();
    const last = cosine.shape[0] - 1;
    const rows = alignment().map(([i, j], p) => ({
      on: p === a,
      select: () => choose(p),
      cells: [side(0, i), side(1, j), same(p) ? (parted[p] === null || parted[p] === undefined ? 'never' : row(parted[p])) : both(p) ? 'differ' : '', both(p) ? bar(cosine.at(last, p), 1, 0) : '', both(p) ? signed(cosine.at(last, p), 3) : 'only in one'],
    }));
    const before = pairs.scrollTop;
    replace(pairs, table('Aligned tokens of the two texts', ['text A', 'text B', 'part at', 'cosine after the last layer', ''], rows, 'bars'));
    pairs.scrollTop = before;
    const on = pairs.querySelector('tr.on');
    if (on && (on.offsetTop < pairs.scrollTop + 30 || on.offsetTop + on.offsetHeight > pairs.scrollTop + pairs.clientHeight)) pairs.scrollTop = on.offsetTop - pairs.clientHeight / 2;
    map.point(state.row ?? state.layer + 1, a, true);
    const two = a < 0 ? [] : alignment()[a];
    replace(pairs.closest('.body').querySelector('h3.of'), 'What comes next after these');
    replace(
      next,
      two.map((t, i) => {
        if (t === null) return node('figure', {}, node('figcaption', {}, `Text ${NAMES[i]} has no such token.`));
        const { top, probability } = report.texts[i].next;
        const five = top[t].slice(0, 5).map((s, k) => ({ cells: [wordChip(s), bar(probability[t][k], 1), percent(probability[t][k])] }));
        return node('figure', {}, node('figcaption', {}, `Text ${NAMES[i]}, after `, wordChip(report.texts[i].tokens[t], 'on')), table(`Next tokens of text ${NAMES[i]}`, ['token', '', 'probability'], five, 'bars'));
      }),
    );
  }

  return { absent: () => (report.compare ? null : 'This report is of one text. Two are put side by side by: scripts/xray.py RUN --text TEXT --against TEXT'), build, update };
})();
