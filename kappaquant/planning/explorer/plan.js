// The plan that is shown, as the file that quantize reads, and the commands that go with it.

/** The text of a plan file, version 2: one line for each tensor. */
function planText(contents, problem, size, active, result) {
  const entries = new Array(contents.names.length);
  for (const row of contents.fixed) for (const name of row.names) entries[name] = { format: row.format, why: row.why };
  contents.units.forEach((unit, number) => {
    const at = result.chosen[number];
    const where = unit.layer === null ? unit.role : `layer ${unit.layer}, ${unit.role}`;
    const what = contents.divergence ? "nats predicted" : "of the predicted error";
    const why = `${where}: ${digits(unit.loss[at])} of ${digits(result.loss)} ${what}`;
    for (const row of unit.tensors) for (const name of row.names) entries[name] = { format: row.formats[at], why };
  });
  const inputs = { chosen_in: "explorer", size, evidence: contents.evidence };
  if (contents.divergence) inputs.predicted_kld = Number(result.loss.toPrecision(6));
  if (active < problem.largest.active) inputs.active = Math.floor(active);
  if (contents.kinds.join() !== "k") inputs.formats = contents.kinds; // as plans that the command line writes
  const head = {
    plan_version: 2,
    policy: "sensitivity",
    inputs: { ...inputs, overrides: contents.overrides, fuse: contents.fuse, ...(contents.target && { target: contents.target }) },
    group_size: contents.group_size,
    warnings: contents.warnings,
  };
  const lines = Object.entries(head).map(([key, value]) => ` ${JSON.stringify(key)}: ${spaced(value)},`);
  const tensors = entries.map((entry, name) => `  ${JSON.stringify(contents.names[name])}: ${spaced(entry)}`);
  return ["{", ...lines, ' "tensors": {', tensors.join(",\n"), " }", "}", ""].join("\n");
}

/** JSON on one line with spaces, as the plans that the command line writes have it. */
function spaced(value) {
  if (Array.isArray(value)) return `[${value.map(spaced).join(", ")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([key, part]) => `${JSON.stringify(key)}: ${spaced(part)}`).join(", ")}}`;
}

/** What makes such a plan anew and what quantizes it; the first solves exactly, and may differ in single tensors. */
function commandText(contents, problem, size, active) {
  const limit = active < problem.largest.active ? ` --active ${Math.floor(active)}B` : "";
  const files = size + contents.headers;
  return `${contents.command} --size ${files}B${limit} -o plan.json\nkappaquant quantize ${contents.source} -o OUTPUT --plan plan.json`;
}
