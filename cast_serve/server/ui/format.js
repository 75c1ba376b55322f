// Numbers as people read them.

const upTo = (digits) => new Intl.NumberFormat("en", { maximumFractionDigits: digits });

const DIGITS = [upTo(0), upTo(1), upTo(2)];

/** Three significant digits, or all of those before the point: 0.25, 4.5, 1,234. */
export function short(value) {
  const size = Math.abs(value);
  return DIGITS[size >= 100 ? 0 : size >= 10 ? 1 : 2].format(value);
}

export const whole = (value) => DIGITS[0].format(value);

export const percent = (share) => `${DIGITS[1].format(100 * share)} %`;

export function seconds(value) {
  return value < 1 ? `${short(1000 * value)} ms` : `${short(value)} s`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${DIGITS[unit === 0 ? 0 : 1].format(value)} ${units[unit]}`;
}
