// Layers by roles: a cell for each unit, coloured by what one asks for; arrow keys walk it as a grid.

const CELL = { height: 22, heading: 20, labels: 116, least: 19, most: 30 };
const LEVELS = 8; // colours of the style sheet, level0 to level7
const COLOURS = {
  bits: { name: "bits", of: (unit, at) => unit.widths[at] },
  kurtosis: { name: "κ, excess kurtosis (largest of a cell's tensors)", of: (unit) => unit.kurtosis },
  sensitivity: { name: "predicted loss in the format that was measured", of: (unit) => unit.loss[Math.max(unit.formats.indexOf(unit.measured_at), 0)] },
  bytes: { name: "bytes", of: (unit, at) => unit.bytes[at] },
};

/** Builds the grid; returns how to colour it by a result. */
function drawMap(place, contents, sizes, inspect) {
  const { rows, columns } = laidOut(contents.units);
  const room = place.clientWidth - CELL.labels - 4;
  const across = Math.min(Math.max(Math.floor(room / columns.length), CELL.least), CELL.most);
  const height = CELL.heading + rows.reduce((sum, row) => sum + (row.cells ? CELL.height : CELL.heading), 0);
  const labels = drawn("svg", { class: "labels", width: CELL.labels, height, "aria-hidden": "true" });
  const grid = drawn("svg", { class: "cells", width: across * columns.length + 2, height, role: "grid", "aria-label": "Units: layers by roles" });
  const each = [1, 2, 5, 10].find((step) => step * across >= 28);
  columns.forEach((layer, column) => {
    const text = layer === null ? "–" : String(layer);
    if (layer === null || layer % each === 0) {
      grid.append(drawn("text", { class: "tick", x: (column + 0.5) * across, y: 13, "text-anchor": "middle" }, text));
    }
  });
  const cells = [];
  let top = CELL.heading;
  for (const row of rows) {
    if (!row.cells) {
      labels.append(drawn("text", { class: "group", x: 0, y: top + 15 }, row.label));
      top += CELL.heading;
      continue;
    }
    labels.append(drawn("text", { x: CELL.labels - 8, y: top + 15, "text-anchor": "end" }, row.label));
    const line = drawn("g", { role: "row", "aria-label": row.role });
    for (const [column, number] of row.cells) {
      const box = drawn("rect", { x: column * across + 1, y: top + 1, width: across - 2, height: CELL.height - 2, rx: 3 });
      const text = drawn("text", { x: (column + 0.5) * across, y: top + 15, "text-anchor": "middle" });
      const cell = drawn("g", { role: "gridcell", tabindex: -1 }, box, text);
      cells.push({ cell, text, number, column, row: rows.indexOf(row) });
      line.append(cell);
    }
    grid.append(line);
    top += CELL.height;
  }
  place.replaceChildren(labels, element("div", { class: "scroll" }, grid));
  walkable(grid, cells, inspect);
  return (result, colour) => paint(cells, contents, sizes, result, colour);
}

/** Rows by role, under a heading where several roles share a first word, and the layers that occur. */
function laidOut(units) {
  const roles = new Map();
  units.forEach((unit, number) => {
    if (!roles.has(unit.role)) roles.set(unit.role, []);
    roles.get(unit.role).push(number);
  });
  const columns = [...new Set(units.map((unit) => unit.layer))].sort((a, b) => (a === null ? -1 : b === null ? 1 : a - b));
  const at = new Map(columns.map((layer, column) => [layer, column]));
  const groups = new Map();
  for (const [role, numbers] of roles) {
    const [group, part] = role.includes(".") ? role.split(/\.(.*)/) : ["", role];
    if (!groups.has(group)) groups.set(group, []);
    const cells = numbers.map((number) => [at.get(units[number].layer), number]).sort((a, b) => a[0] - b[0]);
    groups.get(group).push({ role, label: words(part), cells });
  }
  const rows = [];
  for (const [group, members] of groups) {
    if (group) rows.push({ label: words(group) });
    rows.push(...members);
  }
  return { rows, columns };
}

/** One cell is in the tab order; arrows, Home and End move among the others. */
function walkable(grid, cells, inspect) {
  let now = cells[0];
  now?.cell.setAttribute("tabindex", 0);
  const go = (next) => {
    now.cell.setAttribute("tabindex", -1);
    now = next;
    now.cell.setAttribute("tabindex", 0);
    now.cell.focus();
  };
  for (const each of cells) {
    each.cell.addEventListener("pointerenter", () => inspect(each.number));
    each.cell.addEventListener("focus", () => inspect(each.number));
    each.cell.addEventListener("click", () => go(each));
  }
  grid.addEventListener("keydown", (event) => {
    const beside = (by) => cells.filter((c) => c.row === now.row && Math.sign(c.column - now.column) === by);
    const below = (by) => cells.filter((c) => Math.sign(c.row - now.row) === by);
    const near = (found) => found.sort((a, b) => distance(a, now) - distance(b, now))[0];
    const far = (found) => found.sort((a, b) => distance(b, now) - distance(a, now))[0];
    const ways = {
      ArrowLeft: () => near(beside(-1)), ArrowRight: () => near(beside(1)), ArrowUp: () => near(below(-1)),
      ArrowDown: () => near(below(1)), Home: () => far(beside(-1)), End: () => far(beside(1)),
    };
    if (!(event.key in ways)) return;
    event.preventDefault();
    const next = ways[event.key]();
    if (next) go(next);
  });
}

function distance(a, b) {
  return Math.abs(a.row - b.row) * 1000 + Math.abs(a.column - b.column);
}

/** Colours all cells, names them for screen readers, and returns what a legend needs. */
function paint(cells, contents, sizes, result, colour) {
  const valueOf = (number) => COLOURS[colour].of(contents.units[number], result.chosen[number]);
  const known = cells.map((each) => valueOf(each.number)).filter((value) => value !== null);
  const levelOf = colour === "bits" ? widthLevel : levels(known, colour === "kurtosis");
  for (const { cell, text, number } of cells) {
    const unit = contents.units[number];
    const at = result.chosen[number];
    const value = valueOf(number);
    cell.setAttribute("class", value === null ? "unknown" : `level${levelOf(value)}`);
    text.textContent = unit.formats[at];
    const where = unit.layer === null ? words(unit.role) : `layer ${unit.layer}, ${words(unit.role)}`;
    const kurtosis = unit.kurtosis === null ? "" : `, kappa ${digits(unit.kurtosis)}`;
    const size = sizes.decimal(unit.bytes[at]);
    cell.setAttribute("aria-label", `${where}: ${widthText(unit.formats[at])}, ${size}, predicted loss ${digits(unit.loss[at])}${kurtosis}`);
  }
  return { least: Math.min(...known), most: Math.max(...known), any: known.length > 0 };
}

/** 2 to 8 bits and 16, each a colour of its own. */
function widthLevel(bits) {
  return Math.min(bits - 2, LEVELS - 1);
}

/** Levels in equal ratios; κ, which may be negative, from 1 on, so that what is near a Gaussian looks alike. */
function levels(known, shifted) {
  const scaled = (value) => Math.log(shifted ? Math.max(value, 0) + 1 : Math.max(value, 1e-30));
  const positive = shifted ? known : known.filter((value) => value > 0);
  const low = Math.min(...positive.map(scaled));
  const span = Math.max(...positive.map(scaled)) - low || 1;
  return (value) => Math.min(Math.max(Math.floor(((scaled(value) - low) / span) * LEVELS), 0), LEVELS - 1);
}
