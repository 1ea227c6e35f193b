// A heat map that is a table: the keyboard walks it, screen readers read it, its colours have a legend and its cells exact values.

/**
 * A heat map.
 *
 * rows, columns: [{key, label}], in the order shown; a label is a text, or a token where `tokens` is true.
 * value(row, column): the number that `scale` colours, or null for a cell that is not there.
 * say(row, column): the cell in words with exact values, shown in the line above the map and read aloud.
 * text(row, column): what stands in the cell, if anything; mark(row, column): a class for cells that stand out.
 * select(row, column): what a click, or an arrow key, chooses.
 */
function heatmap({ label, rows, columns, value, say, text, mark, select, scale: colours, tokens = false, corner = '' }) {
  const readout = node('p', { class: 'readout' });
  const cells = new Map(); // 'row column' → its td
  const key = (r, c) => `${r} ${c}`;
  const heads = columns.map((column) => node('th', { scope: 'col' }, node('span', {}, tokens ? visible(column.label) : column.label)));
  const left = rows.map((line) => node('th', { scope: 'row' }, line.label));
  const body = rows.map((line, i) => {
    const tr = node('tr', {}, left[i]);
    for (const column of columns) {
      const td = node('td', { tabindex: '-1', 'data-r': String(line.key), 'data-c': String(column.key) });
      cells.set(key(line.key, column.key), td);
      tr.append(td);
    }
    return tr;
  });
  const grid = node(
    'table',
    { class: `heat ${text ? 'worded' : ''} ${tokens ? 'upright' : ''}`, role: 'grid', 'aria-label': label },
    node('thead', {}, node('tr', {}, node('td', { class: 'corner' }, corner), heads)),
    node('tbody', {}, body),
  );
  const names = { rows: rows.map((line) => String(line.key)), columns: columns.map((column) => String(column.key)) };
  const find = (event) => event.target.closest('td[data-r]');
  const where = (td) => [Number(td.dataset.r), Number(td.dataset.c)];
  const tell = (td) => (readout.textContent = td ? say(...where(td)) : 'Point at a square, or go there with the arrow keys, for its numbers.');
  let chosen = null;

  grid.addEventListener('mouseover', (event) => find(event) && tell(find(event)));
  grid.addEventListener('mouseleave', () => tell(chosen));
  grid.addEventListener('focusin', (event) => find(event) && tell(find(event)));
  grid.addEventListener('click', (event) => find(event) && choose(find(event)));
  grid.addEventListener('keydown', (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const td = find(event);
    if (!td || event.ctrlKey || event.metaKey || event.altKey) return;
    const [i, j] = [names.rows.indexOf(td.dataset.r), names.columns.indexOf(td.dataset.c)];
    let to = null;
    if (moves[event.key]) to = [i + moves[event.key][0], j + moves[event.key][1]];
    else if (event.key === 'Home') to = [i, 0];
    else if (event.key === 'End') to = [i, columns.length - 1];
    else if (event.key === 'Enter' || event.key === ' ') to = [i, j];
    if (!to) return;
    event.preventDefault();
    event.stopPropagation();
    const next = cells.get(key(names.rows[clamp(to[0], 0, rows.length - 1)], names.columns[clamp(to[1], 0, columns.length - 1)]));
    choose(next);
    next.focus({ preventScroll: true });
    into(next);
  });

  /** Scrolls the map's own box, and never the page, until a cell is seen beside the heads of rows and columns. */
  function into(td) {
    const box = grid.parentElement;
    if (!box) return;
    const [top, start] = [grid.tHead.offsetHeight, left[0]?.offsetWidth ?? 0];
    const [y, x] = [td.offsetTop, td.offsetLeft];
    if (y - top < box.scrollTop) box.scrollTop = y - top;
    else if (y + td.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = y + td.offsetHeight - box.clientHeight;
    if (x - start < box.scrollLeft) box.scrollLeft = x - start;
    else if (x + td.offsetWidth > box.scrollLeft + box.clientWidth) box.scrollLeft = x + td.offsetWidth - box.clientWidth;
  }

  function choose(td) {
    const [r, c] = where(td);
    point(r, c);
    if (select) select(r, c);
  }

  /** Marks a cell as the chosen one: null for a row or column that has none. */
  function point(r, c, scroll = false) {
    const td = cells.get(key(r, c)) ?? null;
    if (chosen) chosen.removeAttribute('aria-selected');
    grid.querySelectorAll('[tabindex="0"]').forEach((old) => old.setAttribute('tabindex', '-1'));
    left.forEach((th, i) => th.classList.toggle('on', names.rows[i] === String(r)));
    heads.forEach((th, j) => th.classList.toggle('on', names.columns[j] === String(c)));
    chosen = td;
    if (td) td.setAttribute('aria-selected', 'true');
    (td ?? cells.values().next().value)?.setAttribute('tabindex', '0');
    tell(td);
    if (td && scroll) into(td);
  }

  /** Paints every cell by what `value` and `text` say now. */
  function paint(by = colours) {
    colours = by;
    legend.replaceChildren(colours.legend());
    for (const [name, td] of cells) {
      const [r, c] = name.split(' ').map(Number);
      const x = value(r, c);
      td.setAttribute('aria-label', say(r, c));
      td.className = x === null ? 'none' : (mark && mark(r, c)) || '';
      if (x === null) {
        td.style.removeProperty('background-color');
        td.textContent = '';
        continue;
      }
      const rgb = colours.colour(x);
      td.style.setProperty('background-color', css(rgb));
      td.style.setProperty('color', ink(rgb));
      if (text) td.textContent = text(r, c);
    }
    tell(chosen);
  }

  const legend = node('div', { class: 'legends' });
  paint();
  point(null, null);
  return { root: node('div', { class: 'map' }, legend, readout, node('div', { class: 'scroll' }, grid)), paint, point };
}

const layersDown = (n) => range(n).reverse().map((l) => ({ key: l, label: String(l) })); // the last layer on top
const tokenColumns = (text = current()) => text.tokens.map((s, t) => ({ key: t, label: word(s) }));
