// Scales of colour. One hue from pale to dark (on a dark page from dark to bright), or blue and orange about a neutral middle: both
// are told apart by lightness, and blue and orange by readers who confuse red and green. Each picture has a legend with numbers.

const STOPS = {
  light: { up: ['#ffffff', '#cfe1f2', '#6aaed6', '#2070b4', '#083a7d'], down: ['#ffffff', '#fdd9b0', '#f5a14e', '#d9690f', '#9a3f00'] },
  dark: { up: ['#1d2026', '#12395f', '#1f6bb0', '#4f9fe0', '#a6d8ff'], down: ['#1d2026', '#57300d', '#a3560d', '#e08324', '#ffbe70'] },
};

const dark = () => document.documentElement.dataset.theme === 'dark';
const parse = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

/** The colour, red, green and blue, at a share from 0 to 1 of a row of stops. */
function between(stops, share) {
  const at = clamp(share, 0, 1) * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2);
  const [a, b] = [parse(stops[i]), parse(stops[i + 1])];
  return a.map((x, k) => Math.round(x + (b[k] - x) * (at - i)));
}

/**
 * A scale: `colour(x)` and a legend. From 0 to `high`, or to both sides of 0 (`both`). `power` below 1 spreads what is small; `low` is what
 * the palest colour stands for.
 */
function scale({ high, low = 0, both = false, power = 1, show = plain, name }) {
  const top = high > low ? high : low + 1;
  const share = (x) => clamp((Math.abs(x) - low) / (top - low), 0, 1) ** power;
  const colour = (x) => between(STOPS[dark() ? 'dark' : 'light'][both && x < 0 ? 'down' : 'up'], share(x));
  const value = (s) => Math.sign(s) * (low + Math.abs(s) ** (1 / power) * (top - low));
  const legend = () => {
    const marks = both ? [-1, -0.5, 0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1];
    const values = marks.map((s) => (s === 0 ? (both ? 0 : low) : value(s)));
    const steps = range(41).map((i) => (both ? i / 20 - 1 : i / 40));
    const stops = steps.map((s) => css(colour(s === 0 ? (both ? 0 : low) : value(s))));
    return node(
      'div',
      { class: 'legend' },
      node('span', {}, name),
      node('div', {}, node('i', { style: { background: `linear-gradient(to right, ${stops.join(',')})` } }), node('div', {}, values.map((x) => node('span', {}, show(x))))),
    );
  };
  return { colour, legend, show };
}

const css = (rgb) => `rgb(${rgb.join(',')})`;

/** Black or white, whichever is read more easily on a colour (relative luminance as WCAG 2 has it). */
function ink(rgb) {
  const [r, g, b] = rgb.map((x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? '#000' : '#fff';
}

/** 256 colours for weights as 8-bit numbers. */
const lookup = (ramp) => range(256).map((x) => ramp.colour(x / 255));
