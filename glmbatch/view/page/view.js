// The viewer's page. Text of rows is only ever set as text, never read as HTML.

const PAGE = 50;
const LABEL = "label", LABELS = "labels", FIELDS = "fields", NUMBER = "number";
const state = {
  output: null,     // what is published: its steps, files and rows
  step: null,       // the step in focus, one of output.steps
  rows: [],         // the lines of the list so far
  isWhole: false,   // whether the list has all rows that meet the filters
  at: -1,           // the selected line
  row: null,        // that row in full
  draft: null,      // several labels that are chosen, and not yet kept
  undo: [],         // corrections to take back, the last one last
  asked: 0,         // number of the newest list asked for; older ones are dropped
};
const $ = (id) => document.getElementById(id);
const filters = $("filters");

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// ---- asking the server; all addresses are below the page's own, which has the token

async function ask(path, options) {
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({ detail: response.statusText }));
  if (response.ok) return answer;
  const detail = typeof answer.detail === "string" ? answer.detail : "the request was refused";
  if (response.status === 409) {
    complain("A run has published other answers. Load the page again to see them.");
  } else {
    complain(detail);
  }
  throw new Error(detail);
}

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

let hiding = 0;
function say(text) {
  $("said").textContent = text;
  $("said").classList.add("shown");
  clearTimeout(hiding);
  hiding = setTimeout(() => $("said").classList.remove("shown"), 2500);
}

function chosen() {
  const values = new URLSearchParams({ step: state.step.name });
  for (const [name, value] of new FormData(filters)) {
    if (value !== "") values.set(name, name === "differs" ? "true" : value);
  }
  return values;
}

// ---- the list

async function load() {
  const values = chosen();
  history.replaceState(null, "", `#${values}`);
  const asked = ++state.asked;
  Object.assign(state, { rows: [], at: -1, row: null, isWhole: false });
  $("list").replaceChildren();
  $("more").hidden = true;
  $("count").textContent = "Reading …";
  complain("");
  await loadMore();
  if (asked !== state.asked) return;
  if (state.rows.length) await select(0);
  else show();
  const { rows } = await ask(`api/count?${values}`);
  if (asked !== state.asked) return;
  $("count").textContent = `${rows.toLocaleString("en")} ${rows === 1 ? "row" : "rows"}`;
}

async function loadMore() {
  const asked = state.asked;
  const sorted = filters.elements.order.value !== "file";
  const room = sorted ? state.output.deepest - state.rows.length : PAGE;
  const wanted = Math.min(PAGE, room);
  if (wanted <= 0) return complain("Only the first rows are sorted. Set a filter to see others.");
  const path = `api/rows/${state.rows.length}/${wanted}?${chosen()}`;
  const { rows, version } = await ask(path);
  if (asked !== state.asked) return;
  if (version !== state.output.version) return start();
  state.isWhole = rows.length < wanted;
  for (const row of rows) {
    state.rows.push(row);
    $("list").append(element("li", { role: "option" }));
    draw(state.rows.length - 1);
  }
  $("more").hidden = state.isWhole;
}

function plain(value) {
  return Array.isArray(value) ? value.join(", ") || "none" : String(value);
}

function same(one, other) {
  const sorted = (value) => (Array.isArray(value) ? [...value].sort() : value);
  return JSON.stringify(sorted(one)) === JSON.stringify(sorted(other));
}

function draw(place) {
  const line = state.rows[place];
  const item = $("list").children[place];
  const isRight = line.truth !== null && shownAnswer(line.truth) === line.answer;
  const under = element("span", { class: "under" });
  if (line.answer !== null) {
    const was = line.truth !== null && !isRight;
    under.append(element("span", { class: was ? "answer was" : "answer" }, line.answer));
  }
  if (line.error !== null) under.append(element("span", { class: "error" }, line.error));
  if (line.truth !== null) {
    under.append(element("span", { class: "truth" }, isRight ? "✓ right" : `✓ ${plain(line.truth)}`));
  }
  if (line.score !== null) under.append(element("span", { class: "number" }, line.score.toFixed(3)));
  item.replaceChildren(element("span", { class: "text" }, line.text ?? "(no text)"), under);
  item.setAttribute("aria-selected", place === state.at);
  item.onclick = () => select(place);
}

// As the list shows an answer, which for several labels is DuckDB's form of a list.
function shownAnswer(value) {
  return Array.isArray(value) ? `[${value.join(", ")}]` : String(value);
}

async function select(place) {
  if (place >= state.rows.length && !state.isWhole) await loadMore();
  if (place < 0 || place >= state.rows.length) return;
  const before = state.at;
  state.at = place;
  state.draft = null;
  if (before >= 0) draw(before);
  draw(place);
  // On a phone the row is above the list.
  if (matchMedia("(max-width: 760px)").matches) { if (before >= 0) scrollTo({ top: 0 }); }
  else $("list").children[place].scrollIntoView({ block: "nearest" });
  const { file, row } = state.rows[place];
  const full = await ask(`api/row/${state.output.version}/${file}/${row}`);
  if (state.at !== place) return;
  state.row = full;
  show();
}

// ---- the row

function current() {
  return state.row?.steps.find((step) => step.name === state.step.name);
}

function show() {
  const article = $("row");
  article.scrollTop = 0;
  if (!state.row) {
    return article.replaceChildren(element("p", { class: "empty" }, "No row meets the filters."));
  }
  const { row } = state;
  const body = row.text_column === null ? null : row.columns[row.text_column];
  const others = Object.entries(row.columns).filter(([name]) => name !== row.text_column);
  article.replaceChildren(
    element("p", { class: "place" }, `${row.source}, row ${row.source_row.toLocaleString("en")}`),
    element("p", { class: "body" }, body ?? "(no text)"),
    ...stepParts(current()),
    ...row.steps.filter((step) => step !== current()).flatMap(otherStep),
    columns(others),
  );
}

function stepParts(step) {
  const parts = [heading(step)];
  if (step.error !== null || step.error_type !== null) parts.push(failure(step));
  if ([LABEL, LABELS].includes(state.step.kind)) parts.push(labels(step));
  else parts.push(answerText(step));
  parts.push(...beside(step), actions(step), ...fields(step), numbers(step), prompt(step));
  return parts.filter(Boolean);
}

function heading(step) {
  const hint = { label: "press its number", labels: "press numbers, then Enter" }[state.step.kind];
  const what = step.can_correct ? hint ?? "e to write the right answer" : "was not asked";
  const kind = step.can_correct ? "keys" : "";
  return element("h2", {}, `${step.name} `, element("span", { class: kind }, `· ${what}`));
}

function failure(step) {
  return element("p", { class: "error" }, step.error ?? step.error_type);
}

function labels(step) {
  const answered = [].concat(step.answer ?? []);
  const truth = state.draft ?? step.truth;
  const right = truth === null ? [] : [].concat(truth);
  const box = element("div", { class: "labels", role: "group", "aria-label": "Labels" });
  state.step.labels.forEach((label, place) => {
    const share = step.scores?.[label] ?? null;
    const isRight = right.includes(label);
    const said = [answered.includes(label) ? "model" : "", isRight ? "✓ right" : ""];
    const fill = element("span", { class: "fill", "aria-hidden": true });
    fill.style.width = `${100 * (share ?? 0)}%`;
    const key = place < 9 ? element("kbd", {}, String(place + 1)) : null;
    const kind = [answered.includes(label) ? "chosen" : "", isRight ? "right" : ""].join(" ");
    box.append(element(
      "button",
      { type: "button", class: kind, disabled: !step.can_correct, onclick: () => press(place) },
      fill, key, element("span", { class: "name" }, label),
      element("span", { class: "said" }, said.filter(Boolean).join(" · ")),
      element("span", { class: "number" }, share === null ? "" : share.toFixed(3)),
    ));
  });
  return box;
}

function answerText(step) {
  const isRight = step.truth !== null;
  const text = plain(isRight ? step.truth : step.answer ?? "(no answer)");
  const box = element("p", { class: isRight ? "answer-text right" : "answer-text" }, text);
  const div = element("div", {}, box);
  if (isRight && !same(step.truth, step.answer)) {
    div.append(element("p", { class: "note" }, `the model: ${plain(step.answer ?? "no answer")}`));
  }
  return div;
}

function beside(step) {
  if (step.is_beside !== true) return [];
  const differs = !same(step.beside, step.answer);
  const text = differs ? `other output: ${plain(step.beside ?? "no answer")}` : "other output: the same";
  return [element("p", { class: differs ? "note differs" : "note" }, text)];
}

function actions(step) {
  const box = element("div", { class: "actions" });
  const button = (text, key, onclick) =>
    box.append(element("button", { type: "button", onclick }, text, " ", element("kbd", {}, key)));
  if (!step.can_correct) {
    button("Next", "j", () => select(state.at + 1));
    return box;
  }
  if (step.answer !== null || state.draft !== null) button("Right", "Enter", confirm);
  if (![LABEL, LABELS].includes(state.step.kind) || state.step.labels.length > 9) {
    button("Write", "e", edit);
  }
  button("Next", "j", () => select(state.at + 1));
  if (state.undo.length) button("Undo", "u", undo);
  if (step.truth !== null) button("Withdraw", "0", () => keep(null));
  return box;
}

function fields(step) {
  const values = Object.entries(step.fields);
  if (!values.length) return [];
  const list = element("dl", { class: "values" });
  for (const [name, { value, score, mean_log_prob: mean }] of values) {
    const sure = score ?? (mean === null ? null : Math.exp(mean));
    const text = `${value ?? "null"}${sure === null ? "" : `  (${sure.toFixed(3)})`}`;
    list.append(element("dt", {}, name), element("dd", {}, text));
  }
  return [element("h2", {}, "Fields"), list];
}

function numbers(step) {
  const known = Object.entries(step.numbers).filter(([, value]) => value !== null);
  const text = known.map(([name, value]) => `${name.replaceAll("_", " ")} ${number(value)}`);
  return known.length ? element("p", { class: "note" }, text.join(" · ")) : null;
}

function number(value) {
  return typeof value === "number" && !Number.isInteger(value) ? value.toFixed(4) : plain(value);
}

function prompt(step) {
  const { text, is_cut: isCut, lack } = step.prompt;
  const title = isCut ? "Prompt as the model saw it (cut)" : "Prompt as the model saw it";
  const shown = text === null ? element("p", { class: "note" }, lack) : element("pre", {}, text);
  const isOpen = localStorage.getItem("prompt") === "open";
  return element("details", { class: "prompt", open: isOpen, ontoggle: remember },
    element("summary", {}, title), shown);
}

function remember(event) {
  localStorage.setItem("prompt", event.target.open ? "open" : "closed");
}

function otherStep(step) {
  const parts = [element("h2", {}, step.name)];
  if (step.error !== null) parts.push(failure(step));
  else parts.push(element("p", { class: "answer-text" }, plain(step.answer ?? "(no answer)")));
  if (step.truth !== null && !same(step.truth, step.answer)) {
    parts.push(element("p", { class: "note truth" }, `✓ ${plain(step.truth)}`));
  }
  return parts;
}

function columns(values) {
  const list = element("dl", { class: "values" });
  for (const [name, value] of values) {
    list.append(element("dt", {}, name), element("dd", {}, value ?? "null"));
  }
  list.append(element("dt", {}, "file"), element("dd", {}, state.row.file));
  return element("details", { open: true }, element("summary", {}, "Columns"), list);
}

// ---- corrections

async function keep(truth, isUndo = false) {
  const place = state.at, step = current(), line = state.rows[place];
  if (!step?.can_correct) return say("This row was not asked, so there is nothing to correct.");
  const before = step.truth;
  const { version } = state.output;
  const body = JSON.stringify({ version, file: line.file, row: line.row, step: step.name, truth });
  const headers = { "Content-Type": "application/json" };
  const { corrected } = await ask("api/corrections", { method: "POST", headers, body });
  complain("");
  if (!isUndo) state.undo.push({ place, step: step.name, list: state.asked, truth: before });
  step.truth = line.truth = truth;
  state.draft = null;
  state.step.corrected = corrected;
  facts();
  draw(place);
  show();
  if (isUndo) return say("Taken back");
  say(truth === null ? "Withdrawn" : `✓ ${plain(truth).slice(0, 60)}   (u takes it back)`);
  if (truth !== null) await select(place + 1);
}

async function press(place) {
  const step = current(), label = state.step.labels[place];
  if (label === undefined || !step?.can_correct) return;
  if (state.step.kind === LABEL) return keep(label);
  if (state.step.kind !== LABELS) return;
  const chosenNow = state.draft ?? step.truth ?? step.answer ?? [];
  const has = chosenNow.includes(label);
  state.draft = state.step.labels.filter((one) => (one === label ? !has : chosenNow.includes(one)));
  show();
}

function confirm() {
  const step = current();
  const truth = state.draft ?? step?.truth ?? step?.answer ?? null;
  if (truth === null) return say("There is no answer that could be right.");
  return keep(truth);
}

async function undo() {
  const last = state.undo.at(-1);
  if (!last) return say("Nothing to take back");
  if (last.list !== state.asked || last.step !== state.step.name) {
    return say("The list has changed since. Find the row, and withdraw it with 0.");
  }
  state.undo.pop();
  await select(last.place);
  await keep(last.truth, true);
}

function edit() {
  const step = current(), open = $("row").querySelector("textarea");
  if (open) return open.focus();
  if (!step?.can_correct || state.step.kind === LABELS) return;
  const shown = pretty(step.truth ?? step.answer ?? "");
  const area = element("textarea", { "aria-label": "The right answer", spellcheck: "true" });
  area.value = shown;
  const done = element("button", { type: "button", onclick: () => written(area) }, "Keep ",
    element("kbd", {}, "Ctrl Enter"));
  const form = element("div", {}, area, element("div", { class: "actions" }, done));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) written(area);
    else if (event.key === "Escape") closeEditor();
    else return;
    event.preventDefault();
  });
  $("row").querySelector(".answer-text, .labels").replaceWith(form);
  area.focus();
}

function closeEditor() {
  if (!$("row").querySelector("textarea")) return;
  complain("");
  show();
}

function pretty(value) {
  if (state.step.kind !== FIELDS) return String(value);
  try {
    return JSON.stringify(JSON.parse(value), null, 1);
  } catch {
    return String(value);
  }
}

function written(area) {
  const value = area.value;
  if (state.step.kind === NUMBER) {
    const number = value.trim() ? Number(value) : NaN;  // an empty text would be 0
    return Number.isFinite(number) ? keep(number) : complain(`${value || "Nothing"} is no number.`);
  }
  return keep(state.step.kind === LABEL ? value.trim() : value);
}

// ---- keys

const KEYS = {
  j: () => select(state.at + 1), ArrowDown: () => select(state.at + 1),
  k: () => select(state.at - 1), ArrowUp: () => select(state.at - 1),
  Enter: confirm, u: undo, e: edit, 0: () => keep(null),
  Escape: closeEditor,
  "/": () => filters.elements.text.focus(),
  "?": () => $("help").showModal(),
  s: () => focusStep((state.output.steps.indexOf(state.step) + 1) % state.output.steps.length),
  p: () => { const it = $("row").querySelector(".prompt"); if (it) it.open = !it.open; },
};

let turn = Promise.resolve();  // one key after the other, however fast they come
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const { target } = event;
  if (target.matches("input, textarea, select")) {
    // Leaving a field is what applies it.
    if (event.key === "Escape" || (event.key === "Enter" && !target.matches("textarea"))) target.blur();
    return;
  }
  if (event.key === "Enter" && target.matches("button, summary, a")) return;
  const act = /^[1-9]$/.test(event.key) ? () => press(Number(event.key) - 1) : KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  turn = turn.then(act).catch(() => {});
});

// ---- the page around it

function options(select, values) {
  const before = select.value;
  select.replaceChildren(...values.map(([value, text]) => element("option", { value }, text)));
  select.value = values.some(([value]) => value === before) ? before : values[0][0];
}

function facts() {
  const { output, step } = state;
  const size = `${output.rows.toLocaleString("en")} rows in ${output.files.toLocaleString("en")} files`;
  const done = `${step.corrected.toLocaleString("en")} looked at`;
  $("facts").textContent = `${size} · ${done}${output.limit ? " · a trial run" : ""}`;
  $("facts").title = `Corrections are kept in ${output.corrections}`;
}

async function focusStep(place) {
  state.step = state.output.steps[place];
  [...$("steps").children].forEach((button, number) =>
    button.setAttribute("aria-pressed", number === place));
  const { step } = state;
  $("label-filter").hidden = !step.labels.length;
  $("differs-filter").hidden = !step.compared;
  filters.elements.order.querySelector("[value=differs]").hidden = !step.compared;
  filters.elements.order.querySelector("[value=grown]").hidden = !Object.keys(step.grown).length;
  const count = (rows) => (rows === undefined ? "" : ` (${rows.toLocaleString("en")})`);
  options(filters.elements.label, [["", "any"], ...step.labels.map((label) => [label, label])]);
  options(filters.elements.error, [["", "any"], ["none", "without an error"], ["any", "failed"]]);
  facts();
  const loading = load();
  const facets = await ask(`api/facets?${new URLSearchParams({ step: step.name })}`);
  if (state.step !== step) return;
  const labelled = step.labels.map((label) => [label, `${label}${count(facets.labels[label] ?? 0)}`]);
  options(filters.elements.label, [["", "any"], ...labelled]);
  const kinds = Object.entries(facets.errors).map(([kind, rows]) => [kind, `${kind}${count(rows)}`]);
  const plainly = [["", "any"], ["none", "without an error"], ["any", "failed"]];
  options(filters.elements.error, [...plainly, ...kinds]);
  await loading;
}

async function start() {
  complain("");
  state.output = await ask("api/output");
  state.undo = [];
  const { steps, output, beside: other } = state.output;
  // The ends of the paths, since whole ones fill the head of the page on a phone.
  const end = (path) => path.split("/").filter(Boolean).slice(-2).join("/");
  $("output").textContent = other ? `${end(output)} beside ${end(other)}` : end(output);
  $("output").title = other ? `${output} beside ${other}` : output;
  document.title = `${output} · glmbatch view`;
  $("steps").replaceChildren(...steps.map((step, place) => element(
    "button", { type: "button", onclick: () => focusStep(place) }, step.name)));
  const given = new URLSearchParams(location.hash.slice(1));
  const place = Math.max(0, steps.findIndex((step) => step.name === given.get("step")));
  state.step = steps[place];
  options(filters.elements.label, [["", ""], ...steps[place].labels.map((label) => [label, label])]);
  for (const [name, value] of given) {
    const field = filters.elements[name];
    if (field?.type === "checkbox") field.checked = value === "true";
    else if (field) field.value = value;
  }
  await focusStep(place);
}

filters.addEventListener("change", load);
filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("reset", () => setTimeout(load));
$("more").addEventListener("click", () => loadMore());
$("filters-button").addEventListener("click", () => {
  const isOpen = filters.classList.toggle("open");
  $("filters-button").setAttribute("aria-expanded", isOpen);
});
$("help-button").addEventListener("click", () => $("help").showModal());
start();
