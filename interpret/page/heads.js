// Panel: what each head writes, and the scores by which heads are given roles.

panels.heads = (() => {
  let map, detail, measure = 'answer';

  const MEASURES = {
    answer: ["adds to the answer's logit (selected token)", 'logit units', true],
    write_norm: ['size of what it writes (selected token)', 'length of the vector', false],
  };
  for (const [key, name] of Object.entries(ROLES)) {
    MEASURES[`${key}_random`] = [`score: ${name}, on repeated random tokens`, 'mean weight', false];
    MEASURES[key] = [`score: ${name}, on this text`, 'mean weight', false];
  }
  /** What the report holds; on a text that repeats no token there is nothing to copy. */
  const copies = (key) => (key === 'duplicate' || key === 'induction') && current().heads.repeats === 0;
  const there = () => Object.keys(MEASURES).filter((key) => current().heads[key] && !copies(key));
  const value = (l, n) => {
    const dims = current().heads[measure];
    return dims.shape.length === 3 ? dims.at(l, n, state.token) : dims.at(l, n);
  };
  const ramp = () => {
    const [, name, both] = MEASURES[measure];
    const dims = current().heads[measure];
    const weight = name === 'mean weight';
    return scale({ high: weight ? 1 : peak(dims), both, power: weight ? 1 : 0.5, show: both ? signed : plain, name });
  };
  const say = (l, n) => {
    const role = roleOf(l, n);
    return `layer ${l}, head ${n}${role ? `, ${role}` : ''}: ${MEASURES[measure][0]} ${ramp().show(value(l, n), 3)}`;
  };

  /** The heads with the highest scores of a kind. */
  function leaders(key) {
    const dims = current().heads[key];
    const all = range(dims.shape[0]).flatMap((l) => range(dims.shape[1]).map((n) => [dims.at(l, n), l, n]));
    return all.sort((a, b) => b[0] - a[0]).slice(0, 5);
  }

  function build(root) {
    if (!there().includes(measure)) measure = there()[0];
    map = heatmap({
      label: 'Heads: layers by heads',
      rows: layersDown(report.model.layers),
      columns: range(report.model.heads).map((n) => ({ key: n, label: String(n) })),
      corner: 'layer',
      value,
      say,
      text: (l, n) => roleOf(l, n).slice(0, 1).toUpperCase(),
      select: (layer, head) => go({ layer, head }),
      scale: ramp(),
    });
    map.root.classList.add('small');
    detail = node('div', { class: 'side' });
    const list = node('select', { 'aria-label': 'Measure', onchange: () => ((measure = list.value), map.paint(ramp())) });
    list.append(...there().map((key) => node('option', { value: key }, MEASURES[key][0])));
    list.value = measure;
    const scores = there().filter((key) => MEASURES[key][1] === 'mean weight');
    const best = scores.map((key) =>
      node('figure', {}, node('figcaption', {}, node('b', {}, MEASURES[key][0].replace('score: ', ''))), table(MEASURES[key][0], ['layer', 'head', '', 'score'], leaders(key).map(([x, l, n]) => ({ select: () => go({ layer: l, head: n }), cells: [String(l), String(n), bar(x, 1), plain(x)] })), 'bars')),
    );
    replace(
      root,
      node('p', { class: 'picker' }, 'show ', list),
      node('div', { class: 'beside' }, node('div', {}, map.root, node('p', { class: 'key' }, 'Letters: the role of a head (first letter; the line above the map spells it out, the panel Attention explains it).')), detail),
      node('h3', {}, 'The five heads with the highest scores'),
      node('div', { class: 'charts narrow' }, best),
    );
  }

  function update() {
    const { layer: l, head: n, token: t } = state;
    const { heads, tokens } = current();
    map.paint(ramp());
    map.point(l, n, true);
    const high = biggest(range(tokens.length).map((i) => heads.answer.at(l, n, i)));
    const long = biggest(range(tokens.length).map((i) => heads.write_norm.at(l, n, i)));
    const rows = tokens.map((_, i) => ({
      on: i === t,
      select: () => go({ token: i }),
      cells: [tokenChip(i), chips(range(heads.promotes.shape[3]).map((k) => [heads.promotes.at(l, n, i, k)]), () => ''), bar(heads.write_norm.at(l, n, i), long), plain(heads.write_norm.at(l, n, i)), bar(heads.answer.at(l, n, i), high, -high), signed(heads.answer.at(l, n, i))],
    }));
    const role = roleOf(l, n);
    const scored = (more) => Object.entries(ROLES).filter(([key]) => there().includes(key + more)).map(([key, name]) => `${name} ${plain(heads[key + more].at(l, n))}`).join(', ');
    const scores = [['', 'on this text'], ['_random', 'on repeated random tokens']].filter(([more]) => scored(more)).map(([more, where]) => `${where} ${scored(more)}`);
    const list = node('div', { class: 'scroll' }, table('What this head writes at each token', ['at', 'promotes', '', 'size', '', 'to the answer'], rows, 'bars twice'));
    const before = detail.querySelector('.scroll')?.scrollTop ?? 0;
    replace(detail, node('h3', {}, `Layer ${l}, head ${n}`, role ? `: ${role}` : ''), node('p', { class: 'facts' }, scores.length ? `Scores ${scores.join('; ')}.` : ''), list);
    list.scrollTop = before;
    const on = list.querySelector('tr.on');
    if (on && (on.offsetTop < list.scrollTop + 30 || on.offsetTop + on.offsetHeight > list.scrollTop + list.clientHeight)) list.scrollTop = on.offsetTop - list.clientHeight / 2;
  }

  return { absent: () => (current().heads ? null : 'No layer of this model has attention heads that write by themselves.'), build, update };
})();
