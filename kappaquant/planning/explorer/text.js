// Numbers as people read them, sizes as they write them, and elements.

const SVG = "http://www.w3.org/2000/svg";

/** Bytes in decimal and binary units that suit the largest of a page. */
function sizesLike(largest) {
  const at = Math.min(Math.max(Math.floor(Math.log10(largest) / 3), 0), 4);
  const prefix = ["", "k", "M", "G", "T"][at];
  const places = (value) => (value >= 1000 ? 1 : value >= 100 ? 2 : 3);
  const in_ = (bytes, unit) => (bytes / unit).toFixed(places(bytes / unit));
  return {
    unit: prefix + "B",
    scale: 1000 ** at,
    decimal: (bytes) => `${in_(bytes, 1000 ** at)} ${prefix}B`,
    binary: (bytes) => `${in_(bytes, 1024 ** at)} ${prefix ? prefix.toUpperCase().replace("K", "k") + "i" : ""}B`,
  };
}

/** Bytes of "18 GB" or "17.5GiB"; null for what is no size, or has no unit. */
function parsedSize(text) {
  const found = /^\s*(\d+(?:[.,]\d+)?)\s*([KMGT]?)(i?)B\s*$/i.exec(text);
  if (!found) return null;
  const base = found[3] ? 1024 : 1000;
  return Math.floor(Number(found[1].replace(",", ".")) * base ** " KMGT".indexOf(found[2].toUpperCase() || " "));
}

/** Three digits: 0.0123, 4.56e-6. */
function digits(value) {
  if (value === 0) return "0";
  return value >= 1e-4 && value < 1e4 ? String(Number(value.toPrecision(3))) : value.toExponential(2).replace(/\.?0+e/, "e");
}

/** "3" is 3 bits where there are codebooks alone; "t3" says its kind and needs no word. */
function widthText(format) {
  return /^\d/.test(format) ? `${format} bits` : format;
}

function words(role) {
  return role.replace(/[._]/g, " ");
}

/** An element with these attributes and children, text or elements. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  return filled(made, attributes, children);
}

function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  return filled(made, attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function byId(id) {
  return document.getElementById(id);
}
