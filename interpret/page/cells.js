// Panel: the feed-forward network as a memory of keys and values (Geva et al. 2020, arXiv:2012.14913).

panels.cells = (() => {
  let map, detail, layerPicker;

  const cells = () => current().cells_top;
  const dense = (l) => report.model.kinds[l] === 'dense';
  const share = (l, t) => (dense(l) ? cells().share.at(l, t, 0) : null);

  function build(root) {
    detail = node('div');
    layerPicker = picker('layer', layerNames(), state.layer, (layer) => go({ layer }));
    map = heatmap({
      label: 'Share of the strongest cell, layers by tokens',
      rows: layersDown(report.model.layers),
      columns: tokenColumns(),
      tokens: true,
      corner: 'layer',
      value: share,
      say: (l, t) => (dense(l) ? `layer ${l}, ${tokenName(t)}: cell ${cells().cell.at(l, t, 0)} makes ${percent(share(l, t))} of what the layer adds` : `layer ${l} has experts: see the panel Experts`),
      select: (layer, token) => go({ layer, token }),
      scale: scale({ high: peak(cells().share), power: 0.5, show: percent, name: "the strongest cell's share of what the layer adds" }),
    });
    replace(root, layerPicker.root, detail, node('h3', {}, 'Where one cell does much'), node('p', {}, 'Dark: a single cell makes a large part of what the layer adds at that token. Choose a place to see its cells.'), map.root);
  }

  function example({ before, token, after, activation }) {
    return node('li', {}, node('small', {}, `${signed(activation)} `), node('bdi', {}, readable(before), node('mark', {}, readable(token)), readable(after)));
  }

  function card(cell, activation, part, high) {
    const known = report.cells[`${state.layer}:${cell}`];
    const facts = node('p', { class: 'facts' }, `fires with ${signed(activation)}, ${percent(part)} of what the layer adds here`, known ? `; its value has length ${plain(known.norm)}` : '');
    const head = [node('h4', {}, `Cell ${cell}`), bar(part, high), facts];
    if (!known) return node('li', { class: 'card' }, head, node('p', {}, 'Its value is not in this page, which keeps those of the cells that fire most.'));
    const turned = activation < 0;
    const lists = [
      node('p', {}, node('b', {}, turned ? 'Firing negatively, it lowers: ' : 'Its value promotes: '), chips(known.promotes, signed)),
      node('p', {}, node('b', {}, turned ? 'and promotes: ' : 'and lowers: '), chips(known.suppresses, signed)),
    ];
    let texts;
    if (known.texts === null) texts = node('p', { class: 'quiet' }, 'Training texts that fire it: not indexed. Make the index with ', node('code', {}, 'scripts/xray.py index RUN'), ' (of an imported model with ', node('code', {}, '--data FILES'), '), then this report anew.');
    else if (!known.texts.length) texts = node('p', { class: 'quiet' }, 'No text of the index fires it.');
    else texts = node('div', {}, node('b', {}, 'Training texts that fire it most (at the marked token):'), node('ul', { class: 'texts' }, known.texts.map(example)));
    return node('li', { class: 'card' }, head, lists, texts);
  }

  function update() {
    const { layer: l, token: t } = state;
    layerPicker.set(l);
    map.point(l, t, true);
    if (!dense(l)) {
      replace(detail, node('p', { class: 'absent' }, `Layer ${l} has experts instead of one feed-forward network: the panel Experts shows their paths.`));
      return;
    }
    const shown = range(cells().cell.shape[2]).filter((k) => cells().share.at(l, t, k) > 0);
    const rest = shown.reduce((sum, k) => sum + cells().share.at(l, t, k), 0);
    const high = shown.length ? cells().share.at(l, t, 0) : 1;
    const index = report.index ? ` The index was made over ${report.index.tokens.toLocaleString('en')} tokens of ${visible(report.index.source)}.` : '';
    replace(
      detail,
      node('h3', {}, `The cells of layer ${l} that fire most at `, tokenChip(t, 'on')),
      node('p', { class: 'facts' }, `${shown.length} of ${report.model.hidden.toLocaleString('en')} cells, together ${percent(rest)} of what all of them add by length.${index}`),
      node('ol', { class: 'cards' }, shown.map((k) => card(cells().cell.at(l, t, k), cells().activation.at(l, t, k), cells().share.at(l, t, k), high))),
    );
  }

  return { absent: () => (cells() ? null : 'Every layer of this model has experts: the panel Experts shows them.'), build, update };
})();
