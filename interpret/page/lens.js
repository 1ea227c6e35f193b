// Panel: the logit lens, layers × tokens.

panels.lens = (() => {
  let map, detail, by = 'probability';

  const layers = () => report.model.layers;
  const scales = () => ({
    probability: scale({ high: 1, show: percent, name: 'probability of the token that is on top' }),
    entropy: scale({ high: peak(current().lens.entropy), name: 'entropy in nats: 0 is sure' }),
    answer: scale({ high: 1, show: percent, name: "probability of the answer, the last layer's token" }),
  });
  const measured = {
    probability: (r, t) => current().lens.probability.at(r, t, 0),
    entropy: (r, t) => current().lens.entropy.at(r, t),
    answer: (r, t) => current().lens.answer.at(r, t),
  };
  const decided = (r, t) => current().lens.decided[t] === r;

  function say(r, t) {
    const { lens } = current();
    const top = `${row(r)}, at ${tokenName(t)}: on top “${visible(word(lens.top.at(r, t, 0)))}” with ${percent(lens.probability.at(r, t, 0))}`;
    return `${top}; the answer has ${percent(lens.answer.at(r, t))}; entropy ${plain(lens.entropy.at(r, t))} nats${decided(r, t) ? '; decided here' : ''}`;
  }

  function build(root) {
    detail = node('div', { class: 'side' });
    map = heatmap({
      label: 'Logit lens: layers by tokens',
      rows: range(layers() + 1).reverse().map((r) => ({ key: r, label: r ? String(r - 1) : 'emb.' })),
      columns: tokenColumns(),
      corner: 'layer',
      value: (r, t) => measured[by](r, t),
      text: (r, t) => visible(word(current().lens.top.at(r, t, 0))),
      mark: (r, t) => (decided(r, t) ? 'decided' : current().lens.decided[t] < r ? 'kept' : ''),
      say,
      select: (r, t) => go({ token: t, layer: Math.max(r - 1, 0), row: r }),
      scale: scales()[by],
    });
    const choose = choice('Colour by', [['probability', 'probability'], ['entropy', 'entropy'], ['answer', "the answer's probability"]], by, (key) => {
      by = key;
      map.paint(scales()[by]);
    });
    const key = node('p', { class: 'key' }, node('span', { class: 'sample decided' }), ' decided here: from this layer up the answer stays on top ', node('span', { class: 'sample kept' }), ' stays so');
    replace(root, choose, key, node('div', { class: 'beside' }, map.root, detail));
  }

  /** The answer's probability from the embedding to the last layer, as a line. */
  function course(t, chosen) {
    const [width, height, n] = [320, 110, layers()];
    const x = (r) => 34 + (r / n) * (width - 44);
    const y = (p) => 10 + (1 - p) * (height - 32);
    const values = range(n + 1).map((r) => current().lens.answer.at(r, t));
    const line = shape('polyline', { class: 'line', points: values.map((p, r) => `${x(r)},${y(p)}`).join(' ') });
    const at = shape('circle', { class: 'dot', r: 4, cx: x(chosen), cy: y(values[chosen]) });
    const d = current().lens.decided[t];
    const from = shape('line', { class: 'from', x1: x(d), x2: x(d), y1: y(1), y2: y(0) });
    const words = (text, left, top, anchor = 'start') => shape('text', { x: left, y: top, 'text-anchor': anchor }, text);
    const axes = shape('path', { class: 'axis', d: `M${x(0)},${y(1)}V${y(0)}H${x(n)}` });
    const name = `Probability of the answer by layer: ${percent(values[0])} at the embedding, ${percent(values[n])} after the last layer`;
    return shape(
      'svg', { class: 'course', viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': name },
      axes, from, line, at, words('1', 28, y(1) + 4, 'end'), words('0', 28, y(0) + 4, 'end'), words('emb.', x(0), height - 6), words(`layer ${n - 1}`, x(n), height - 6, 'end'),
    );
  }

  function update() {
    const t = state.token;
    const r = state.row ?? state.layer + 1;
    const { lens } = current();
    map.point(r, t, true);
    const five = range(lens.top.shape[2]).map((k) => {
      const [s, p] = [lens.top.at(r, t, k), lens.probability.at(r, t, k)];
      return { cells: [wordChip(s), bar(p, 1), percent(p)] };
    });
    const answer = wordChip(lens.top.at(layers(), t, 0));
    replace(
      detail,
      node('h3', {}, 'At ', tokenChip(t, 'on'), r ? `, after layer ${r - 1}` : ', of the embedding'),
      table('The five tokens on top', ['token', '', 'probability'], five, 'bars'),
      node('p', {}, 'The answer is ', answer, `, decided at ${lens.decided[t] ? '' : 'the '}${row(lens.decided[t])} (dashed). Its probability after each layer:`),
      course(t, r),
    );
  }

  return { absent: () => (current().lens ? null : 'This report holds no logit lens.'), build, update };
})();
