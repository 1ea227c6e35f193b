// The report's data, the state of the page, and what all panels are made of.
// Letters: L layers, N heads, T tokens, M layers of experts, E experts, K experts a token, A aligned pairs, P positions.
// Text of models and users goes into the page as text nodes alone, by `node`: nothing here parses markup.

const ARRAYS = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, f16: Uint16Array, f32: Float32Array };
const SVG = 'http://www.w3.org/2000/svg';

/** The bytes that base64 text holds, inflated (zlib). */
async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Response(stream).arrayBuffer();
}

/** A half-precision number from its 16 bits (IEEE 754; the report holds no infinities). */
function half(bits) {
  const exponent = (bits >> 10) & 31;
  const size = exponent ? (1 + (bits & 1023) / 1024) * 2 ** (exponent - 15) : (bits & 1023) * 2 ** -24;
  return bits & 0x8000 ? -size : size;
}

/** An array of numbers with dims, read by `at`. */
class Dims {
  constructor(shape, data) {
    this.shape = shape;
    this.data = data;
  }
  at(...index) {
    let place = 0;
    for (let dim = 0; dim < index.length; dim++) place = place * this.shape[dim] + index[dim];
    return this.data[place];
  }
}

/** The report with each packed array as `Dims` and each packed table as an object. */
async function unpack(value) {
  if (Array.isArray(value)) {
    if (!value.some((item) => item && typeof item === 'object')) return value;
    return Promise.all(value.map(unpack));
  }
  if (!value || typeof value !== 'object') return value;
  if ('table' in value) return JSON.parse(new TextDecoder().decode(await inflate(value.table)));
  if ('b64' in value) {
    const data = new ARRAYS[value.dtype](await inflate(value.b64)); // little-endian, as every browser's machine is
    return new Dims(value.shape, value.dtype === 'f16' ? Float32Array.from(data, half) : data);
  }
  const entries = await Promise.all(Object.entries(value).map(async ([key, item]) => [key, await unpack(item)]));
  return Object.fromEntries(entries);
}

let report; // the data, set once when it is read
const state = { panel: 'next', text: 0, token: 0, layer: 0, head: 0 };
const panels = {}; // name → {absent(), build(root), update()}

const current = () => report.texts[state.text];
const word = (string) => report.strings[string];
const count = () => current().tokens.length;
const range = (n) => Array.from({ length: n }, (_, i) => i);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** An element. `on…` attributes are listeners, `style` an object, children that are no nodes become text. */
function node(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'style') for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** An element of a drawing. */
function shape(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const MINUS = '\u2212';
const signed = (x, digits = 2) => {
  const size = plain(Math.abs(x), digits);
  return (Number(size) === 0 ? '' : x < 0 ? MINUS : '+') + size; // what is rounded to nothing has no sign
};

/** A number in at most so many decimals; asked for three and more, in powers of ten where that would show nothing. */
function plain(x, digits = 2) {
  if (x === 0) return '0';
  const size = Math.abs(x);
  const minus = x < 0 ? MINUS : '';
  if (size >= 100000 || (digits > 2 && size < 0.5 * 10 ** -digits)) {
    const [mantissa, power] = size.toExponential(1).split('e');
    return `${minus}${mantissa}·10${superscript(Number(power))}`;
  }
  return minus + size.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : digits);
}

const superscript = (n) => [...String(n)].map((letter) => '⁰¹²³⁴⁵⁶⁷⁸⁹'[letter] ?? '⁻').join('');

/** A probability in percent. */
function percent(p) {
  const share = 100 * p;
  return `${share >= 10 ? share.toFixed(1) : share >= 0.1 || share === 0 ? share.toFixed(2) : plain(share, 3)}\u00a0%`;
}

// What shows nothing by itself: controls, and marks that turn the direction of text or have no width.
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

const BLANK = /[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]/g; // spaces of other kinds, each named by its number

/** A token's text with spaces, line breaks and controls made visible. */
function visible(text) {
  if (text === '') return '∅';
  const named = { '\n': '↵', '\t': '⇥', '\r': '␍' };
  const code = (letter) => `⟨${letter.codePointAt(0).toString(16).toUpperCase().padStart(2, '0')}⟩`;
  return text.replace(/ /g, '·').replace(BLANK, code).replace(HIDDEN, (letter) => named[letter] ?? code(letter));
}

/** Running text of which only what shows nothing is replaced. */
const readable = (text) => text.replace(HIDDEN, (letter) => visible(letter));

/** A token in running text or a table; its spaces are read aloud as spaces. */
const chip = (text, more = '') => node('bdi', { class: `token ${more}` }, visible(text));
const wordChip = (string, more = '') => chip(word(string), more);
const tokenChip = (t, more = '') => wordChip(current().tokens[t], more);
const short = (text) => ((letters) => (letters.length > 18 ? `${letters.slice(0, 17).join('')}…` : text))([...text]);
const tokenName = (t, text = current()) => `“${short(visible(word(text.tokens[t])))}” (${t})`;

/** Chips with a number behind each. */
const chips = (pairs, show) =>
  node('span', { class: 'chips' }, pairs.map(([string, x]) => node('span', {}, wordChip(string), ' ', node('small', {}, show(x)))));

/** A bar from 0 to `high`; with `low` below 0, to both sides of its zero. */
function bar(x, high, low = 0, kind = '') {
  const span = high - low || 1;
  const from = (Math.min(x, 0) - low) / span;
  const width = Math.abs(x) / span;
  const part = { left: `${100 * clamp(from, 0, 1)}%`, width: `${100 * clamp(width, 0, 1)}%` };
  const zero = low < 0 ? [node('i', { class: 'zero', style: { left: `${(-100 * low) / span}%` } })] : [];
  return node('span', { class: `bar ${kind} ${x < 0 ? 'minus' : ''}`, 'aria-hidden': 'true' }, node('i', { style: part }), zero);
}

/** A table with heads of columns; cells are texts, nodes, or lists of them. A row with `select` is chosen by a click or by Enter. */
function table(caption, heads, rows, more = '') {
  const head = node('tr', {}, heads.map((text) => node('th', { scope: 'col' }, text)));
  const lines = rows.map((row) => {
    const attributes = row.select ? { class: 'can', tabindex: '-1', 'aria-current': row.on ? 'true' : null, onclick: row.select } : {};
    const line = node('tr', attributes, (row.cells ?? row).map((cell) => node('td', {}, cell)));
    if (row.on) line.classList.add('on');
    return line;
  });
  const can = lines.filter((line) => line.classList.contains('can'));
  const first = can.find((line) => line.classList.contains('on')) ?? can[0];
  if (first) first.tabIndex = 0; // Tab stops at one row of a table; the arrow keys go to the others
  const body = node('tbody', {}, lines);
  body.addEventListener('keydown', (event) => {
    const at = can.indexOf(event.target);
    const to = { ArrowUp: at - 1, ArrowDown: at + 1 }[event.key];
    if (at < 0 || (to === undefined && event.key !== 'Enter' && event.key !== ' ')) return;
    event.preventDefault();
    if (to === undefined) event.target.click();
    else can[to]?.focus();
  });
  return node('table', { class: `list ${more}` }, node('caption', { class: 'aloud' }, caption), node('thead', {}, head), body);
}

/** A choice among few, as buttons of which one is pressed. */
function choice(label, options, chosen, choose) {
  const buttons = options.map(([key, text]) =>
    node('button', { type: 'button', 'aria-pressed': String(key === chosen), onclick: () => press(key) }, text),
  );
  const press = (key) => {
    buttons.forEach((button, i) => button.setAttribute('aria-pressed', String(options[i][0] === key)));
    choose(key);
  };
  return node('div', { class: 'choice', role: 'group', 'aria-label': label }, node('span', {}, label), buttons);
}

/** A list to choose from, with buttons for the one before and the one after. */
function picker(label, names, value, choose) {
  const list = node('select', { 'aria-label': label, onchange: () => choose(Number(list.value)) });
  list.append(...names.map((name, i) => node('option', { value: String(i) }, name)));
  list.value = String(value);
  const step = (by, text, name) =>
    node('button', { type: 'button', 'aria-label': name, onclick: () => choose(clamp(Number(list.value) + by, 0, names.length - 1)) }, text);
  const root = node('span', { class: 'picker' }, node('span', {}, label), step(-1, '‹', `${label}: the one before`), list, step(1, '›', `${label}: the next`));
  return { root, set: (i) => (list.value = String(i)) };
}

const layerNames = () => range(report.model.layers).map(String);
const row = (r) => (r === 0 ? 'embedding' : `layer\u00a0${r - 1}`); // of the residual stream: row r is what layer r − 1 leaves
const ROLES = { previous: 'previous token', first: 'first token', duplicate: 'duplicate token', induction: 'induction' };
const roleOf = (l, n) => ((name) => ROLES[name] ?? name)(current().heads?.role[l]?.[n] ?? '');
const peak = (dims) => dims.data.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
const biggest = (values) => values.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
const replace = (root, ...children) => root.replaceChildren(...children.flat().filter((child) => child !== null));
