// Panel: what attention and the feed-forward network of each layer add to the residual stream.

panels.layers = (() => {
  let bars, map, measure = 'feed_forward_answer';

  const PARTS = [['attention', 'attention', 'blue'], ['feed_forward', 'feed-forward', 'orange']];
  const MEASURES = {
    norm: ['size', 'length of the vector that is added', plain, false],
    cosine: ['direction', 'cosine with the stream: +1 along it, 0 across it, −1 against it', signed, true],
    answer: ['towards the answer', "what it adds to the answer's logit", signed, true],
  };
  const added = (part, kind) => current().layers[`${part}_${kind}`];
  const OPTIONS = PARTS.flatMap(([part, name]) => Object.entries(MEASURES).map(([kind, [title]]) => [`${part}_${kind}`, `${name}: ${title}`])).concat([['residual_norm', 'residual stream: size']]);
  const shown = () => {
    const dims = current().layers[measure];
    const kind = Object.keys(MEASURES).find((name) => measure.endsWith(name));
    const [, text, show, both] = MEASURES[kind];
    const high = kind === 'cosine' ? 1 : peak(dims);
    return { dims, scale: scale({ high, both, power: kind === 'norm' ? 0.5 : 0.7, show, name: measure === 'residual_norm' ? 'length of the residual stream' : text }) };
  };
  const label = (r) => (measure === 'residual_norm' ? row(r) : `layer ${r}`);
  const value = (r, t) => (r < shown().dims.shape[0] ? shown().dims.at(r, t) : null);

  /** What else the answer's logit is the sum of: the embedding and biases; and the sum. */
  function others(t, high) {
    const { embedding_answer: embedding, constant_answer: constant } = current().layers;
    const whole = embedding.at(t) + constant.at(t) + PARTS.reduce((sum, [part]) => sum + range(report.model.layers).reduce((s, l) => s + added(part, 'answer').at(l, t), 0), 0);
    const line = (name, x) => ({ cells: [name, bar(x, high, -high), signed(x)] });
    return [line('emb.', embedding.at(t)), line('biases', constant.at(t)), { cells: [node('b', {}, 'sum'), "the answer's logit", node('b', {}, signed(whole))] }];
  }

  function build(root) {
    bars = node('div', { class: 'charts' });
    const place = node('div');
    const draw = () => {
      const { dims, scale: colours } = shown();
      map = heatmap({
        label: 'What is added, layers by tokens',
        rows: range(dims.shape[0]).reverse().map((r) => ({ key: r, label: measure === 'residual_norm' ? (r ? String(r - 1) : 'emb.') : String(r) })),
        columns: tokenColumns(),
        tokens: true,
        corner: 'layer',
        value,
        say: (r, t) => `${label(r)}, ${tokenName(t)}: ${OPTIONS.find(([key]) => key === measure)[1]} ${colours.show(value(r, t), 3)}`,
        select: (r, t) => go({ token: t, layer: measure === 'residual_norm' ? Math.max(r - 1, 0) : r }),
        scale: colours,
      });
      replace(place, map.root);
    };
    const list = node('select', { 'aria-label': 'Measure', onchange: () => ((measure = list.value), draw(), point()) });
    list.append(...OPTIONS.map(([key, text]) => node('option', { value: key }, text)));
    list.value = measure;
    draw();
    replace(root, node('h3', { class: 'of' }), bars, node('h3', {}, 'The same for every token'), node('p', {}, 'Each token has an answer of its own: what the model finds likeliest after it.'), node('p', { class: 'picker' }, 'show ', list), place);
  }

  const point = () => map.point(measure === 'residual_norm' ? state.layer + 1 : state.layer, state.token, true);

  function update() {
    const t = state.token;
    const { layers } = report.model;
    const answer = current().lens ? wordChip(current().lens.top.at(layers, t, 0)) : 'its answer';
    replace(bars.parentElement.querySelector('h3.of'), 'Layer by layer, at ', tokenChip(t, 'on'), '; the answer is ', answer);
    const charts = Object.entries(MEASURES).map(([kind, [title, text, show, both]]) => {
      const values = PARTS.map(([part]) => range(layers).map((l) => added(part, kind).at(l, t)));
      const high = kind === 'cosine' ? 1 : biggest(values.flat());
      const rows = range(layers).reverse().map((l) => ({
        on: l === state.layer,
        select: () => go({ layer: l }),
        cells: [
          String(l),
          PARTS.map(([, , colour], i) => bar(values[i][l], high, both ? -high : 0, colour)),
          PARTS.map((_, i) => node('div', {}, show(values[i][l]))),
          kind === 'norm' ? plain(current().layers.residual_norm.at(l + 1, t), 1) : null,
        ].filter((cell) => cell !== null),
      }));
      if (kind === 'answer') rows.push(...others(t, high));
      const heads = ['layer', '', kind === 'norm' ? 'added' : 'value', ...(kind === 'norm' ? ['stream after'] : [])];
      return node('figure', {}, node('figcaption', {}, node('b', {}, title), node('br'), text), table(title, heads, rows, 'bars pairs'));
    });
    const key = node('p', { class: 'key' }, PARTS.map(([, name, colour]) => node('span', {}, node('i', { class: `sample ${colour}` }), ` ${name} `)));
    replace(bars, key, charts);
    point();
  }

  return { absent: () => (current().layers ? null : 'This report does not hold what layers add.'), build, update };
})();
