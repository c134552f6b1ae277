// Predicted loss against size: the curve of all solutions, recipes and checkpoints beside it, and where the page stands.

const CURVE = { height: 384, left: 74, right: 16, top: 14, bottom: 46 };
const DECADES = 5; // the curve falls to nothing at 16 bits; below this share of its top it says nothing more

/** Where a label may lie beside its point: to the right or left, so far away and up; the nearest first. */
const PLACES = [1, -1]
  .flatMap((side) => [10, 18, 30, 44, 60, 80, 110, 140].map((away) => ({ side, away })))
  .flatMap((place) => [0, 9, -9, 17, -17, 26, -26, 36, -36, 48, -48, 62, -62, 78, 96].map((up) => ({ ...place, up })))
  .map((place) => ({ ...place, cost: Math.hypot(place.away, 1.4 * place.up) + (place.side < 0 ? 6 : 0) }))
  .sort((a, b) => a.cost - b.cost);

/** Draws the curve anew; returns how to move the point on it. */
function drawCurve(svg, contents, problem, sizes, take) {
  const width = Math.max(svg.parentElement.clientWidth, 300);
  const inner = { right: width - CURVE.right, bottom: CURVE.height - CURVE.bottom };
  const { smallest, largest } = problem;
  const shown = contents.marks.filter((mark) => mark.loss > 0);
  const losses = [smallest.loss, ...shown.map((mark) => mark.loss)];
  const most = Math.max(...losses) * 1.3;
  const least = Math.max(Math.min(...problem.path.totals.map((t) => t.loss).filter((loss) => loss > 0), most), most * 10 ** -DECADES);
  const bytesOf = [Math.min(smallest.bytes, ...shown.map((m) => m.nbytes)), Math.max(largest.bytes, ...shown.map((m) => m.nbytes))];
  const x = logScale(bytesOf, [CURVE.left, inner.right]);
  const y = logScale([least, most], [inner.bottom, CURVE.top]);
  const scale = { x, y, inner, least, most, sizes };
  svg.replaceChildren(
    drawn("title", {}, contents.divergence ? "Predicted KL divergence against size" : "Predicted error against size"),
    ...axes(scale, bytesOf, contents),
    outline(problem, scale),
  );
  svg.setAttribute("viewBox", `0 0 ${width} ${CURVE.height}`);
  svg.setAttribute("height", CURVE.height);
  const here = drawn("g", { class: "here" }, drawn("path"), drawn("circle", { r: 6 }));
  svg.append(...marksOf(shown, scale, problem, take), here);
  return (result) => {
    const [left, top] = [x(result.bytes), Math.min(y(Math.max(result.loss, least)), inner.bottom)];
    here.children[0].setAttribute("d", `M${left} ${inner.bottom}V${top}H${CURVE.left}`);
    here.children[1].setAttribute("cx", left);
    here.children[1].setAttribute("cy", top);
  };
}

function logScale([low, high], [from, to]) {
  const span = Math.log(high / low) || 1;
  return (value) => from + (Math.log(value / low) / span) * (to - from);
}

function axes({ x, y, inner, least, most, sizes }, [low, high], contents) {
  const parts = [];
  let free = inner.bottom + 1e9;
  for (const loss of ticks(least, most, Math.log10(most / least) > 2 ? [1] : [1, 2, 5])) {
    if (free - y(loss) < 20) continue;
    free = y(loss);
    parts.push(drawn("path", { class: "grid", d: `M${CURVE.left} ${y(loss)}H${inner.right}` }));
    parts.push(drawn("text", { class: "tick", x: CURVE.left - 8, y: y(loss) + 4, "text-anchor": "end" }, digits(loss)));
  }
  free = -Infinity;
  for (const bytes of ticks(low, high, high / low > 20 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8])) {
    if (x(bytes) - free < 40) continue;
    free = x(bytes);
    parts.push(drawn("path", { class: "grid", d: `M${x(bytes)} ${CURVE.top}V${inner.bottom}` }));
    const label = String(Number((bytes / sizes.scale).toPrecision(3)));
    parts.push(drawn("text", { class: "tick", x: x(bytes), y: inner.bottom + 18, "text-anchor": "middle" }, label));
  }
  const middle = (CURVE.left + inner.right) / 2;
  const below = { class: "axis", x: middle, y: CURVE.height - 6, "text-anchor": "middle" };
  parts.push(drawn("text", below, `size of all tensors, ${sizes.unit} (logarithmic)`));
  const what = contents.divergence ? "predicted KLD, nats" : "predicted error";
  const beside = { class: "axis", transform: `translate(13 ${(CURVE.top + inner.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" };
  parts.push(drawn("text", beside, what));
  return parts;
}

/** Round numbers in a range: these leading digits in each power of ten. */
function ticks(low, high, leading) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const digit of leading) found.push(Number(`${digit}e${power}`));
  }
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

/** The line through what each step of the path gives, thinned to what can be seen. */
function outline(problem, { x, y, least }) {
  let d = "";
  let last = -Infinity;
  for (const total of problem.path.totals) {
    if (total.loss < least) break;
    const at = x(total.bytes);
    if (at - last < 1.5) continue;
    d += `${d ? "L" : "M"}${at.toFixed(1)} ${y(total.loss).toFixed(1)}`;
    last = at;
  }
  return drawn("path", { class: "curve", d });
}

/** Points with names that do not lie on each other; a click takes the size. */
function marksOf(marks, { x, y, least, sizes, inner }, problem, take) {
  const line = problem.path.totals.filter((total) => total.loss >= least);
  const points = marks.map((mark) => [x(mark.nbytes), Math.min(y(Math.max(mark.loss, least)), inner.bottom)]);
  const taken = line.map((total) => boxAround(x(total.bytes), y(total.loss), 2, 2));
  taken.push(...points.map((point) => boxAround(...point, 6, 6)));
  const labels = labelled(marks, points, taken, inner);
  return marks.map((mark, number) => {
    const [left, top] = points[number];
    const label = labels[number];
    const kind = mark.measured ? "measured" : "recipe";
    const hint = `${mark.name}: ${sizes.decimal(mark.nbytes)}, ${digits(mark.loss)} ${mark.measured ? "measured" : "predicted"}`;
    const group = drawn("g", { class: `mark ${kind}` }, drawn("title", {}, hint));
    if (mark.interval_95) {
      const [low, high] = mark.interval_95.map((loss) => y(Math.max(loss, least)));
      group.append(drawn("path", { class: "interval", d: `M${left} ${low}V${high}` }));
    }
    if (label.far) group.append(drawn("path", { class: "leader", d: `M${left} ${top}L${label.start[0] - 2} ${label.start[1]}` }));
    group.append(
      mark.measured
        ? drawn("circle", { cx: left, cy: top, r: 5 })
        : drawn("path", { d: `M${left} ${top - 6}l6 6l-6 6l-6 -6z` }),
      drawn("text", { x: label.x, y: label.y }, mark.name),
    );
    group.addEventListener("click", () => take(mark.nbytes));
    return group;
  });
}

/** A place for each label; those whose points stand alone are placed first, beside them, and the crowded ones around these. */
function labelled(marks, points, taken, inner) {
  const alone = (point) => Math.min(...points.filter((other) => other !== point).map((other) => distanceOf(point, other)));
  const order = points.map((_, number) => number).sort((a, b) => alone(points[b]) - alone(points[a]));
  const labels = [];
  const boxes = [];
  for (const number of order) {
    const width = marks[number].name.length * 6.6 + 4;
    const label = placed(points[number], width, taken, boxes, points, inner);
    taken.push(label.box, ...label.line);
    boxes.push(label.box);
    labels[number] = label;
  }
  return labels;
}

/** The nearest place where nothing is yet. Beside its point a label is nearest to it; from farther off a line leads to it. */
function placed(point, width, taken, labels, points, inner) {
  const others = points.filter((other) => distanceOf(other, point) > 12).map((other) => boxAround(...other, 7, 7));
  for (const { side, away, up, cost } of PLACES) {
    const x = side > 0 ? point[0] + away : point[0] - away - width;
    const y = point[1] + 4 - up;
    const box = { left: x, right: x + width, top: y - 12, bottom: y + 4 };
    const inside = box.left > CURVE.left && box.right < inner.right + 8 && box.top > 0 && box.bottom < inner.bottom;
    if (!inside || taken.some((other) => overlap(box, other))) continue;
    const start = [side > 0 ? x : x + width, y - 4];
    const far = cost > 22;
    if (!far && points.some((other) => distanceOf(other, start) < distanceOf(point, start) - 3)) continue;
    const line = far ? between(point, start) : [];
    if (line.some((part) => [...labels, ...others].some((other) => overlap(part, other)))) continue;
    return { x, y, far, start, box, line };
  }
  const [x, y] = [point[0] + 10, point[1] - 8];
  return { x, y, far: false, start: [x, y], box: boxAround(x, y, 4, 4), line: [] };
}

function distanceOf(a, b) {
  return Math.hypot(a[0] - b[0], a[1] - b[1]);
}

/** Small boxes along the line from a point to its label. */
function between([left, top], [right, bottom]) {
  const shares = [0.2, 0.35, 0.5, 0.65, 0.8];
  return shares.map((share) => boxAround(left + share * (right - left), top + share * (bottom - top), 1, 1));
}

function boxAround(x, y, across, down) {
  return { left: x - across, right: x + across, top: y - down, bottom: y + down };
}

function overlap(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}
