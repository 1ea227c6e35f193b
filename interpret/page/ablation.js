// Panel: what is lost when a part is put out of action.

panels.ablation = (() => {
  let heads, parts, experts;

  const held = () => current().ablation;
  const PARTS = [['attention', 'attention'], ['feed_forward', 'feed-forward']];
  const words = (x) => `${signed(x, 3)} nats: the answer becomes ${x < 0 ? `${plain(Math.exp(-x), 2)} times less` : `${plain(Math.exp(x), 2)} times more`} probable`;
  const ramp = (dims) => scale({ high: Math.max(...dims.map(peak)), both: true, power: 0.5, show: signed, name: "change of the answer's log-probability (orange: the model needs the part)" });

  function everything() {
    const { heads: byHead, cells, experts: byExpert } = held();
    const { layers } = report.model;
    const found = [];
    for (const l of range(layers)) {
      for (const [key, name] of PARTS) found.push([held()[key].at(l), `layer\u00a0${l}, ${name}`, { layer: l }]);
      if (byHead) for (const n of range(byHead.shape[1])) found.push([byHead.at(l, n), `layer\u00a0${l}, head\u00a0${n}`, { layer: l, head: n }]);
    }
    if (byExpert) current().experts.layers.forEach((l, m) => range(byExpert.shape[1]).forEach((e) => found.push([byExpert.at(m, e), `layer\u00a0${l}, expert\u00a0${e}`, { layer: l }])));
    for (const cell of cells) found.push([cell.change, `layer\u00a0${cell.layer}, cell\u00a0${cell.cell}`, { layer: cell.layer }]);
    return found.sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]));
  }

  function build(root) {
    const { answer, logprob, heads: byHead, experts: byExpert } = held();
    const rows = layersDown(report.model.layers);
    heads = byHead && heatmap({
      label: 'Ablation of heads: layers by heads', rows, corner: 'layer',
      columns: range(byHead.shape[1]).map((n) => ({ key: n, label: String(n) })),
      value: (l, n) => byHead.at(l, n),
      say: (l, n) => `layer ${l}, head ${n}: ${words(byHead.at(l, n))}`,
      select: (layer, head) => go({ layer, head }),
      scale: ramp([byHead]),
    });
    const dims = PARTS.map(([key]) => held()[key]);
    parts = heatmap({
      label: 'Ablation of whole attention and feed-forward parts', rows, corner: 'layer',
      columns: PARTS.map(([, name], i) => ({ key: i, label: name })),
      value: (l, i) => dims[i].at(l),
      text: (l, i) => signed(dims[i].at(l)),
      say: (l, i) => `layer ${l}, ${PARTS[i][1]}: ${words(dims[i].at(l))}`,
      select: (layer) => go({ layer }),
      scale: ramp(dims),
    });
    const asked = byExpert && current().experts.chosen;
    const visited = byExpert && range(byExpert.shape[0]).map((m) => new Set(range(asked.shape[1]).flatMap((t) => range(asked.shape[2]).map((k) => asked.at(m, t, k)))));
    experts = byExpert && heatmap({
      label: 'Ablation of experts', corner: 'layer',
      rows: current().experts.layers.map((l, m) => ({ key: m, label: String(l) })).reverse(),
      columns: range(byExpert.shape[1]).map((e) => ({ key: e, label: String(e) })),
      value: (m, e) => (visited[m].has(e) ? byExpert.at(m, e) : null),
      say: (m, e) => `layer ${current().experts.layers[m]}, expert ${e}: ${visited[m].has(e) ? words(byExpert.at(m, e)) : 'no token of the text visits it'}`,
      select: (m) => go({ layer: current().experts.layers[m] }),
      scale: ramp([byExpert]),
    });
    for (const map of [heads, experts]) if (map) map.root.classList.add('small');
    experts?.root.classList.add('wide');
    const all = everything();
    const high = Math.abs(all[0]?.[0] ?? 1);
    const strongest = (kind) => all.filter(([, name]) => kind === 'all' || name.includes(kind)).slice(0, 15).map(([x, name, where]) => ({ select: () => go(where), cells: [name, bar(x, high, -high), signed(x, 3), `× ${plain(Math.exp(x), 3)}`] }));
    const list = node('div');
    const show = (kind) => replace(list, table('The strongest first', ['what is put out', '', 'nats', 'probability'], strongest(kind), 'bars named'));
    const kinds = [['all', 'all'], ['head', 'heads'], ['attention', 'attention'], ['feed-forward', 'feed-forward'], ['expert', 'experts'], ['cell', 'cells']].filter(([kind]) => kind === 'all' || all.some(([, name]) => name.includes(kind)));
    show('all');
    const figure = (title, map) => map && node('figure', {}, node('figcaption', {}, node('b', {}, title)), map.root);
    replace(
      root,
      node('p', { class: 'facts' }, `At the last token${report.texts.length > 1 ? ` of text ${'AB'[state.text]}` : ''}, `, tokenChip(count() - 1), ', the answer is ', wordChip(answer, 'right'), ` with ${percent(Math.exp(logprob))} (log-probability ${signed(logprob)}). All that follows is about this answer, whichever token is chosen above.`),
      node('div', { class: 'beside three' }, figure('Single heads', heads), figure('Whole parts of a layer', parts), node('div', {}, node('h3', {}, 'The strongest first'), choice('of', kinds, 'all', show), list)),
      figure('Single experts', experts),
    );
  }

  function update() {
    heads?.point(state.layer, state.head, true);
    parts.point(null, null);
  }

  return { absent: () => (held() ? null : 'This report was made without ablations.'), build, update };
})();
