"use strict";
// Sorts, filters and pages the rows in #session-data, and shows a session when it is clicked.
(() => {
  const SIZE = 50; // rows on a page of the table
  const at = (id) => document.getElementById(id);
  const data = JSON.parse(at("session-data").textContent);
  const compare = new Intl.Collator("en", { numeric: true }).compare;

  const make = (tag, attributes, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };

  const missing = (row) => data.measures.filter((_, place) => row.values[place] === null);
  const check = (row) => {
    const far = data.measures.filter((one) => row.far?.[one.field]).map((one) => `${one.short} ${row.far[one.field][0]}`);
    const gone = missing(row).map((one) => `${one.short} missing`);
    return [...far, ...gone].join("; ") || "nothing outlying";
  };

  // What each column shows, and which end comes first when it is sorted: -1 for high values.
  const columns = [
    { title: "Session", of: (row) => row.key, first: 1 },
    ...(data.cohorts.length > 1 ? [{ title: "Cohort", of: (row) => data.cohorts[row.cohort], first: 1 }] : []),
    { title: "Split", of: (row) => data.splits[row.split], first: 1 },
    { title: "Check", of: (row) => row.order, first: 1 },
    ...data.measures.map((measure, place) => (
      { title: measure.title, name: measure.name, measure, of: (row) => row.values[place], first: measure.bad === "low" ? 1 : -1 }
    )),
  ];
  data.rows.forEach((row, order) => Object.assign(row, { order, text: `${row.key} ${row.subject}`.toLowerCase() }));

  const CHECK = columns.findIndex((one) => one.title === "Check");
  let sorted = { column: CHECK, way: 1 };
  let shown = data.rows; // the rows that pass the filters, in order
  let page = 0;
  let opened = 0; // place in `shown` of the session in the dialog

  const passes = {
    all: () => true,
    outlying: (row) => row.far !== undefined,
    missing: (row) => missing(row).length > 0,
    picture: (row) => row.picture !== undefined,
  };

  function arrange() {
    const text = at("find").value.trim().toLowerCase();
    const [state, cohort, split] = ["state", "cohort", "split"].map((id) => at(id).value);
    shown = data.rows.filter((row) => passes[state](row) && row.text.includes(text) &&
      (cohort === "" || row.cohort === Number(cohort)) && (split === "" || row.split === Number(split)));
    const { of } = columns[sorted.column];
    shown.sort((one, other) => {
      const [a, b] = [of(one), of(other)];
      if (a === null || b === null) return (a === null) - (b === null) || one.order - other.order; // missing ones last
      return sorted.way * (typeof a === "string" ? compare(a, b) : a - b) || one.order - other.order;
    });
    turn(0);
  }

  function turn(to) {
    const pages = Math.max(1, Math.ceil(shown.length / SIZE));
    page = Math.min(Math.max(to, 0), pages - 1);
    const [begin, end] = [page * SIZE, Math.min((page + 1) * SIZE, shown.length)];
    at("rows").replaceChildren(...shown.slice(begin, end).map(line));
    at("range").textContent = shown.length ? `${begin + 1}–${end} of ${shown.length}` : "none";
    if (shown.length < data.rows.length) at("range").textContent += ` (${data.rows.length} in all)`;
    at("page").textContent = `Page ${page + 1} of ${pages}`;
    at("before").disabled = page === 0;
    at("after").disabled = page === pages - 1;
    [...at("columns").children].forEach((head, number) => {
      const way = number === sorted.column ? (sorted.way > 0 ? "ascending" : "descending") : "none";
      head.setAttribute("aria-sort", way);
    });
  }

  function line(row) {
    const cells = columns.map((column, number) => {
      if (number === 0) return make("td", {}, make("button", { type: "button", "aria-haspopup": "dialog" }, row.key));
      const label = { "data-label": column.title };
      if (number === CHECK) return make("td", label, check(row));
      const value = column.of(row);
      if (!column.measure) return make("td", label, value);
      if (value === null) return make("td", { ...label, class: "number missing" }, "missing");
      const far = row.far?.[column.measure.field];
      const words = far ? `${value} ${far[0] === "low" ? "▼" : "▲"}` : `${value}`;
      return make("td", { ...label, class: far ? "number far" : "number" }, words);
    });
    const made = make("tr", {}, ...cells);
    made.addEventListener("click", () => open(shown.indexOf(row)));
    return made;
  }

  function open(place) {
    opened = place;
    const row = shown[place];
    at("session-title").textContent = row.key;
    const names = `${data.cohorts[row.cohort]}, ${row.subject}, ${data.splits[row.split]}`;
    const facts = [["Cohort, subject, split", names]];
    data.measures.forEach((measure, number) => facts.push([measure.name, row.values[number] ?? "missing"]));
    facts.push(...row.facts.map((number) => data.facts[number]));
    at("session-facts").replaceChildren(
      ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
    const far = Object.values(row.far ?? {}).map((one) => one[1]);
    at("session-far").textContent = far.length ? `Outlying: ${far.join("; ")}.` : "";
    at("session-picture").replaceChildren(picture(row));
    at("session-before").disabled = place === 0;
    at("session-after").disabled = place === shown.length - 1;
    if (!at("session").open) at("session").showModal();
    at("session").scrollTop = 0;
  }

  function picture(row) {
    if (!row.picture) return make("p", {}, "This session was not drawn: slim-brain report DATASET --pictures all draws all sessions.");
    const [source, caption, width] = row.picture;
    const image = make("img", { alt: data.alt + row.key, width });
    image.addEventListener("error", () => {
      image.replaceWith(make("p", {}, `The picture ${source} is not beside this page: copy its folder with the page.`));
    });
    const figure = make("figure", {}, image, make("figcaption", {}, caption));
    if (source.startsWith("#")) {
      image.src = at(source.slice(1)).src;
      const link = make("a", { href: source }, "To its interactive views");
      link.addEventListener("click", () => at("session").close());
      figure.prepend(make("p", {}, link));
    } else image.src = source;
    return figure;
  }

  at("columns").append(...columns.map((column, number) => {
    const button = make("button", { type: "button", title: column.name ?? column.title }, column.title);
    button.addEventListener("click", () => {
      sorted = { column: number, way: number === sorted.column ? -sorted.way : column.first };
      arrange();
    });
    return make("th", { scope: "col", class: column.measure ? "number" : "" }, button);
  }));
  for (const id of ["find", "state", "cohort", "split"]) at(id).addEventListener("input", arrange);
  at("before").addEventListener("click", () => turn(page - 1));
  at("after").addEventListener("click", () => turn(page + 1));
  at("session-before").addEventListener("click", () => open(opened - 1));
  at("session-after").addEventListener("click", () => open(opened + 1));
  at("session-close").addEventListener("click", () => at("session").close());
  at("session").addEventListener("keydown", (event) => {
    const place = opened + { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (place >= 0 && place < shown.length) open(place);
  });
  at("table").hidden = false;
  arrange();
})();
