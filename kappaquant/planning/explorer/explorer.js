// Puts the page together: what it holds, what the controls say, and what follows from them.

const STEPS = 1000;
const contents = JSON.parse(byId("contents").textContent);
const problem = posed(contents);
const sizes = sizesLike(problem.largest.bytes);
const state = { bytes: startingSize(), active: Infinity, colour: "bits", result: null, unit: 0, width: 0, later: 0 };
let movePoint = () => {};
let paintMap = () => ({});

/** Where the page starts: what its address says, else the size of the plan that it was made for. */
function startingSize() {
  return within(Number(location.hash.slice(1)) || contents.start);
}

function within(bytes) {
  return Math.floor(Math.min(Math.max(bytes, problem.smallest.bytes), problem.largest.bytes));
}

/** Slider and axis are logarithmic, so that 2 to 4 bits get as much room as 4 to 8. */
function atPosition(position, key) {
  const [low, high] = [problem.smallest[key], problem.largest[key]];
  if (position >= STEPS) return high;
  return Math.floor(low * (high / low) ** (position / STEPS));
}

function positionOf(value, key) {
  const [low, high] = [problem.smallest[key], problem.largest[key]];
  return high > low ? Math.round((Math.log(value / low) / Math.log(high / low)) * STEPS) : STEPS;
}

function takeSize(bytes) {
  state.bytes = within(bytes);
  byId("size").value = positionOf(state.bytes, "bytes");
  update();
}

/** Solve and show; called for every move of a control. */
function update() {
  const result = solve(problem, state.bytes, state.active);
  state.result = result;
  byId("loss").textContent = digits(result.loss);
  byId("decimal").textContent = sizes.decimal(result.bytes);
  byId("binary").textContent = sizes.binary(result.bytes);
  byId("per-weight").textContent = ((8 * result.bytes) / contents.weights).toFixed(3);
  byId("active").textContent = sizes.decimal(result.active);
  byId("gap").textContent = `${gapText(result)} ${((100 * result.bytes) / state.bytes).toFixed(2)} % of it used.`;
  byId("wanted").value = sizes.decimal(state.bytes);
  byId("wanted-problem").textContent = "";
  byId("limit-text").textContent = state.active < problem.largest.active ? sizes.decimal(state.active) : "no limit";
  const said = `${sizes.decimal(result.bytes)}, ${lossName()} ${digits(result.loss)}`;
  byId("size").setAttribute("aria-valuetext", said);
  byId("limit").setAttribute("aria-valuetext", byId("limit-text").textContent);
  byId("curve-text").textContent = `The point stands at ${said}.`;
  byId("command").textContent = commandText(contents, problem, state.bytes, state.active);
  byId("done").textContent = "";
  movePoint(result);
  showColours();
  showUnit(state.unit);
  clearTimeout(state.later); // browsers limit how often an address may change
  state.later = setTimeout(() => history.replaceState(null, "", `#${state.bytes}`), 300);
}

function gapText({ loss, bound }) {
  if (loss <= bound * 1.00005) return "The best prediction at this size;";
  const share = bound > 0 ? `${(100 * (1 - bound / loss)).toPrecision(2)} %` : digits(loss - bound);
  return `At most ${share} above the best prediction at this size;`;
}

function lossName() {
  return contents.divergence ? "predicted KLD, nats" : "predicted error";
}

function showColours() {
  const range = paintMap(state.result, state.colour);
  const swatches = byId("legend");
  if (state.colour === "bits") return swatches.replaceChildren(...formatShares());
  const text = (value) => (state.colour === "bytes" ? sizes.decimal(value) : digits(value));
  const squares = Array.from({ length: LEVELS }, (_, level) => element("i", { class: `swatch level${level}` }));
  const ends = range.any ? [text(range.least), text(range.most)] : ["none", "known"];
  return swatches.replaceChildren(COLOURS[state.colour].name, element("span", { class: "ramp" }, ends[0], ...squares, ends[1]));
}

/** A swatch for each format with its share of the bytes that are chosen for; a width has one colour, whatever its kind. */
function formatShares() {
  const shares = new Map();
  let all = 0;
  contents.units.forEach((unit, number) => {
    const at = state.result.chosen[number];
    const share = shares.get(unit.formats[at]) || { bits: unit.widths[at], bytes: 0 };
    shares.set(unit.formats[at], { ...share, bytes: share.bytes + unit.bytes[at] });
    all += unit.bytes[at];
  });
  const parts = [...shares].sort(([one, a], [other, b]) => a.bits - b.bits || (one < other ? -1 : 1));
  return parts.map(([format, { bits, bytes }]) => {
    const share = `${widthText(format)}: ${((100 * bytes) / all).toFixed(1)} %`;
    return element("span", { class: "share" }, element("i", { class: `swatch level${widthLevel(bits)}` }), share);
  });
}

/** What is known of one unit: each format's bytes and predicted loss, the chosen one marked. */
function showUnit(number) {
  state.unit = number;
  const unit = contents.units[number];
  if (!unit) return;
  const names = unit.tensors.flatMap((row) => row.names).map((name) => contents.names[name]);
  const more = names.length > 1 ? ` and ${names.length - 1} more` : "";
  const facts = [unit.kurtosis === null ? "κ unknown" : `κ ${digits(unit.kurtosis)}`];
  if (unit.kld !== null) {
    const interval = unit.interval_95 ? ` (${unit.interval_95.map(digits).join(" – ")})` : "";
    facts.push(`measured at ${widthText(unit.measured_at)}: ${digits(unit.kld)} nats${interval}`);
  }
  const where = unit.layer === null ? unit.role : `layer ${unit.layer}, ${unit.role}`;
  const rows = [
    [contents.kinds.join() === "k" ? "bits" : "format", ...unit.formats],
    [`size, ${sizes.unit}`, ...unit.bytes.map((bytes) => sizes.decimal(bytes).split(" ")[0])],
    [lossName(), ...unit.loss.map(digits)],
  ];
  const chosen = state.result.chosen[number] + 1;
  const table = rows.map((row, r) =>
    element("tr", {}, ...row.map((text, c) => element(r && c ? "td" : "th", { class: c === chosen ? "chosen" : "" }, String(text)))),
  );
  byId("unit").replaceChildren(
    element("h3", {}, `${where} `, element("small", {}, unit.family)),
    element("p", { class: "note" }, `${names[0]}${more}; ${facts.join("; ")}`),
    element("div", { class: "scroll" }, element("table", {}, ...table)),
  );
}

/** Recipes and checkpoints, and what this page finds at their size. */
function showMarks() {
  const head = ["plan", "size", lossName(), "solved at its size"].map((text) => element("th", { scope: "col" }, text));
  const rows = contents.marks.map((mark) => {
    const solved = solve(problem, mark.nbytes);
    const interval = mark.interval_95 ? ` (${mark.interval_95.map(digits).join(" – ")})` : "";
    const ratio = solved && mark.loss > 0 && !mark.measured ? ` (${(solved.loss / mark.loss).toFixed(2)}×)` : "";
    const button = element("button", { type: "button", class: "link", title: "take its size" }, mark.name);
    button.addEventListener("click", () => takeSize(mark.nbytes));
    const texts = [sizes.decimal(mark.nbytes), digits(mark.loss) + (mark.measured ? `${interval} measured` : "")];
    const cells = [...texts, solved ? digits(solved.loss) + ratio : "too small"].map((text) => element("td", {}, text));
    return element("tr", {}, element("th", { scope: "row" }, button), ...cells);
  });
  byId("marks").replaceChildren(element("tr", {}, ...head), ...rows);
}

function showFixed() {
  const fixed = [...contents.fixed].sort((a, b) => b.bytes - a.bytes);
  const count = fixed.reduce((sum, row) => sum + row.names.length, 0);
  byId("fixed-summary").textContent = `${sizes.decimal(problem.fixed.bytes)} in ${count} tensors are not chosen for, and why`;
  const head = ["family", "tensors", "size", "format", "why"].map((text) => element("th", { scope: "col" }, text));
  const rows = fixed.map((row) => {
    const texts = [row.names.length, sizes.decimal(row.bytes), row.format, row.why].map(String);
    return element("tr", {}, element("th", { scope: "row" }, row.family), ...texts.map((text) => element("td", {}, text)));
  });
  byId("fixed").replaceChildren(element("tr", {}, ...head), ...rows);
}

/** To the clipboard where the browser lets a page of a file do so, else by a selection. */
async function copied(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", { class: "hidden" }, text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  byId("done").textContent = `${what} copied.`;
}

function shownPlan() {
  return planText(contents, problem, state.bytes, state.active, state.result);
}

function savePlan() {
  const address = URL.createObjectURL(new Blob([shownPlan()], { type: "application/json" }));
  element("a", { href: address, download: "plan.json" }).click();
  URL.revokeObjectURL(address);
  byId("done").textContent = "plan.json saved.";
}

function takeWanted(event) {
  event.preventDefault();
  const bytes = parsedSize(byId("wanted").value);
  const { smallest, largest } = problem;
  const rounding = 1.001; // what is shown is rounded, and may be sent as it stands
  if (bytes !== null && bytes * rounding >= smallest.bytes && bytes <= largest.bytes * rounding) return takeSize(bytes);
  const range = `from ${sizes.decimal(smallest.bytes)} to ${sizes.decimal(largest.bytes)}`;
  byId("wanted-problem").textContent = bytes === null ? "Write a number and a unit, such as 18GB or 17.5GiB." : `Plans take ${range}.`;
  return undefined;
}

function draw() {
  state.width = document.documentElement.clientWidth;
  movePoint = drawCurve(byId("curve"), contents, problem, sizes, takeSize);
  paintMap = drawMap(byId("map"), contents, sizes, showUnit);
  if (state.result) movePoint(state.result);
  if (state.result) showColours();
}

function evidenceText() {
  const { kind, effort, group_size } = contents;
  const told = (value) => typeof value === "number" || (typeof value === "string" && value.length < 40); // no hashes
  const text = Object.entries(contents.text).filter(([, value]) => told(value));
  const facts = text.map(([key, value]) => `${words(key)} ${value}`).join(", ");
  const how = kind === "calibration" ? `measured with text (${facts})` : "errors of weights alone, without text: a fallback";
  return `Evidence: ${how}; rounding “${effort}”, group size ${group_size}.`;
}

function start() {
  byId("evidence").textContent = evidenceText();
  byId("loss-name").textContent = lossName();
  byId("assumptions").textContent =
    "Predicted losses of units are added up, as if they did not depend on each other. Sizes are those of tensors, exact; headers of files come on top, for which the command's size allows.";
  byId("size").addEventListener("input", () => {
    state.bytes = atPosition(Number(byId("size").value), "bytes");
    update();
  });
  byId("limit").addEventListener("input", () => {
    const position = Number(byId("limit").value);
    state.active = position >= STEPS ? Infinity : atPosition(position, "active");
    update();
  });
  byId("exact").addEventListener("submit", takeWanted);
  byId("colours").addEventListener("change", (event) => {
    state.colour = event.target.value;
    showColours();
  });
  byId("copy-plan").addEventListener("click", () => copied(shownPlan(), "Plan"));
  byId("save-plan").addEventListener("click", savePlan);
  byId("copy-command").addEventListener("click", () => copied(byId("command").textContent, "Commands"));
  window.addEventListener("resize", () => state.width !== document.documentElement.clientWidth && draw());
  showMarks();
  showFixed();
  draw();
  takeSize(state.bytes);
}

start();
