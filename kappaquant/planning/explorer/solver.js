"use strict";
// Which format each block gets: as little predicted loss as the bytes allow, and never a byte more. A block is the units that
// must share a width and a kind. Its options lie on the lower convex hull of (bytes, loss); the hulls' segments, sorted once by what a
// byte buys, are the whole curve, so a size is found by binary search. What is left is filled by single exchanges.

const EXCHANGES = 100; // some twenty are found; a bound, so that a slider never waits
const NO_MOVE = { block: -1, bytes: 0, active: 0, loss: 0 };

/** The problem that a page's contents pose: blocks with options by ascending bytes, and what is fixed. */
function posed(contents) {
  const members = new Map();
  contents.units.forEach((unit, number) => {
    if (!members.has(unit.block)) members.set(unit.block, []);
    members.get(unit.block).push(number);
  });
  const blocks = [...members.values()].map((units) => ({ units, options: optionsOf(units.map((n) => contents.units[n])) }));
  const fixed = { bytes: 0, active: 0, loss: 0 };
  for (const row of contents.fixed) add(fixed, row, 1);
  const problem = { blocks, fixed, units: contents.units.length };
  problem.path = pathOf(problem, 0);
  problem.smallest = totalOf(problem, blocks.map(() => 0));
  problem.largest = totalOf(problem, blocks.map((block) => block.options.length - 1));
  return problem;
}

/** Formats that all of these units have, each with its sums; those that take as many bytes or more and lose no less are left out. */
function optionsOf(units) {
  const options = [];
  for (const format of units[0].formats) {
    const at = units.map((unit) => unit.formats.indexOf(format));
    if (at.includes(-1)) continue;
    const option = { at, bytes: 0, active: 0, loss: 0 };
    units.forEach((unit, i) => {
      add(option, { bytes: unit.bytes[at[i]], active: unit.active[at[i]], loss: unit.loss[at[i]] }, 1);
    });
    options.push(option);
  }
  options.sort((a, b) => a.bytes - b.bytes || a.loss - b.loss);
  return options.filter((option, i) => options.slice(0, i).every((cheaper) => cheaper.loss > option.loss));
}

/** Indices of the options on the lower convex hull of (bytes, loss + price * active). */
function hullOf(options, price) {
  const cost = (i) => options[i].loss + price * options[i].active;
  const gain = (i, j) => (cost(i) - cost(j)) / (options[j].bytes - options[i].bytes);
  const hull = [];
  for (let i = 0; i < options.length; i++) {
    if (hull.length && cost(i) >= cost(hull.at(-1))) continue;
    while (hull.length > 1 && gain(hull.at(-2), hull.at(-1)) <= gain(hull.at(-1), i)) hull.pop();
    hull.push(i);
  }
  return hull;
}

/** Every step up any hull, the one that gains most a byte first, with running totals; totals[k] is before step k. */
function pathOf(problem, price) {
  const steps = [];
  problem.blocks.forEach(({ options }, block) => {
    const hull = hullOf(options, price);
    for (let k = 1; k < hull.length; k++) {
      const change = add({ ...options[hull[k]] }, options[hull[k - 1]], -1);
      const gain = -(change.loss + price * change.active);
      steps.push({ block, from: hull[k - 1], to: hull[k], change, gain, rate: gain / change.bytes });
    }
  });
  steps.sort((a, b) => b.rate - a.rate || a.block - b.block || a.to - b.to);
  const totals = [totalOf(problem, problem.blocks.map(() => 0))];
  for (const step of steps) totals.push(add({ ...totals.at(-1) }, step.change, 1));
  return { price, steps, totals };
}

/** The plan within so many bytes, of which decoding a token reads at most ``active``; null where none is so small. */
function solve(problem, bytes, active = Infinity) {
  const { smallest } = problem;
  if (bytes < smallest.bytes || active < smallest.active) return null;
  let path = problem.path;
  let found = walked(problem, path, bytes);
  if (found.total.active > active) {
    let [low, high] = [0, problem.path.steps[0].rate / 1024];
    while (walked(problem, pathOf(problem, high), bytes).total.active > active) [low, high] = [high, 2 * high];
    for (let halvings = 0; halvings < 24; halvings++) {
      const middle = (low + high) / 2;
      if (walked(problem, pathOf(problem, middle), bytes).total.active > active) low = middle;
      else high = middle;
    }
    path = pathOf(problem, high);
    found = walked(problem, path, bytes);
  }
  const bound = relaxed(path, bytes) - (path.price ? path.price * active : 0);
  goOn(path, found, bytes, active);
  improve(problem, found, bytes, active);
  const chosen = new Array(problem.units); // of each unit, which of its formats
  problem.blocks.forEach((block, b) => {
    block.units.forEach((unit, i) => (chosen[unit] = block.options[found.choice[b]].at[i]));
  });
  return { chosen, ...totalOf(problem, found.choice), bound: Math.max(bound, 0) };
}

/** As far along a path as the bytes reach. */
function walked(problem, path, bytes) {
  const reached = reach(path, bytes);
  const choice = problem.blocks.map(() => 0);
  for (let k = 0; k < reached; k++) choice[path.steps[k].block] = path.steps[k].to;
  return { choice, total: { ...path.totals[reached] } };
}

/** How many steps of a path fit. */
function reach(path, bytes) {
  let [low, high] = [0, path.steps.length];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (path.totals[middle].bytes <= bytes) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** What no plan within the bytes can lose less than: the path with a part of its next step. */
function relaxed(path, bytes) {
  const at = reach(path, bytes);
  const { bytes: used, loss, active } = path.totals[at];
  const rate = at < path.steps.length ? path.steps[at].rate : 0;
  return loss + path.price * active - rate * (bytes - used);
}

/** Take what still fits of the steps that the path has not come to. */
function goOn(path, { choice, total }, bytes, active) {
  for (const { block, from, to, change } of path.steps) {
    if (choice[block] !== from || total.bytes + change.bytes > bytes || total.active + change.active > active) continue;
    choice[block] = to;
    add(total, change, 1);
  }
}

/** Fill what is left: one block up, or one up and another down, whatever loses least, until nothing helps. */
function improve(problem, found, bytes, active) {
  const { choice, total } = found;
  const fits = (a, b) => total.bytes + a.bytes + b.bytes <= bytes && total.active + a.active + b.active <= active;
  for (let exchanges = 0; exchanges < EXCHANGES; exchanges++) {
    const ups = moves(problem, choice, 1);
    const downs = moves(problem, choice, -1);
    let least = -1e-9 * total.loss;
    let best = null;
    for (const up of ups) {
      if (up.loss >= least) break; // the other move only adds to it
      for (const down of [NO_MOVE, ...downs]) {
        if (up.loss + down.loss >= least) break;
        if (down.block === up.block || !fits(up, down)) continue;
        least = up.loss + down.loss;
        best = [up, down];
      }
    }
    if (!best) return;
    for (const move of best) {
      add(total, move, 1);
      if (move !== NO_MOVE) choice[move.block] = move.to;
    }
  }
}

/** Each block's step to its next larger (1) or smaller (-1) option, the one that loses least first. */
function moves({ blocks }, choice, by) {
  const found = [];
  for (let block = 0; block < blocks.length; block++) {
    const from = blocks[block].options[choice[block]];
    const to = blocks[block].options[choice[block] + by];
    if (!to) continue;
    const { bytes, active, loss } = from;
    found.push({ block, to: choice[block] + by, bytes: to.bytes - bytes, active: to.active - active, loss: to.loss - loss });
  }
  return found.sort((a, b) => a.loss - b.loss);
}

function totalOf(problem, choice) {
  const total = { ...problem.fixed };
  problem.blocks.forEach(({ options }, block) => add(total, options[choice[block]], 1));
  return total;
}

function add(total, part, sign) {
  for (const key of ["bytes", "active", "loss"]) total[key] += sign * part[key];
  return total;
}
