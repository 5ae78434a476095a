// The page of the inference server: films in, answers out. No framework, no build step, no other site.
//
// A film travels: waiting → sent (POST predict) → done or failed; "explain" then fetches its heat map. All state is in
// `films`; every `show…` function draws one part of the page from it. Text from files and server is set as text only.

const PARALLEL = 3; // requests under way at once: the server batches them, and refuses more than its queue holds
const MOST_TRIES = 5; // of a request that a busy server turned away
const $ = (id) => document.getElementById(id);

/** @type {{id: number, file: File, state: string, note: string, result: object|null, error: string,
 *          preview: string, unshowable: boolean, map: object|null, explaining: string,
 *          told: Object<string, string>}[]} told: what goes to the server beside the film, by column */
const films = [];
let selected = null;
let apiKey = "";
let keyWanted = false;
let reads = []; // columns that the model reads beside the film
let squash = true; // whether the model's square covers the whole film, so that its map can lie over our own preview
let nextId = 1;
let running = 0;

// --- talking to the server -----------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(message, status, wait) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

/** The JSON answer of `path`; Refused with words for the user otherwise. */
async function ask(path, options = {}) {
  const headers = apiKey ? { "X-API-Key": apiKey } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Refused("The server cannot be reached. Is it still running?", 0, 0);
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body !== null) return body;
  const wait = Math.min(30, Number(response.headers.get("Retry-After") ?? 2) || 0); // seconds; a date counts as 0
  throw new Refused(inWords(response.status, detailOf(body)), response.status, wait);
}

function detailOf(body) {
  const detail = body && (body.detail ?? body.error);
  if (Array.isArray(detail)) return detail.map((item) => item.msg || "").join("; ");
  return typeof detail === "string" ? detail.replace(/^uploaded image: /, "") : "";
}

/** What a refusal means to the person at the screen; the server's own reason follows where it gives one. */
function inWords(status, detail) {
  const reason = detail ? ` (${detail})` : "";
  if (status === 401 || status === 403) return "The server wants a valid API key.";
  if (status === 404) return `The server does not offer this.${reason}`;
  if (status === 413) return `The film is too large for this server.${reason}`;
  if (status === 415) return `The server cannot read this kind of file.${reason}`;
  if (status === 400 || status === 422) return detail ? `Not answered: ${detail}` : "The server cannot read this film.";
  if (status === 429) return "Too many requests with this key.";
  if (status === 503) return "The server is busy.";
  if (status === 408) return "The film did not arrive in time. Send it again.";
  if (status >= 500) return "The server failed on this film. The fault is noted there.";
  return `Unexpected answer ${status}.${reason}`;
}

/** `ask`, patient with a busy server; `say` hears what it waits for. */
async function askPatiently(path, options, say) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await ask(path, options());
    } catch (error) {
      if (![429, 503].includes(error.status) || attempt === MOST_TRIES) throw error;
      say(`${error.message} Trying again in ${error.wait} s.`);
      await new Promise((resume) => setTimeout(resume, error.wait * 1000));
    }
  }
}

function upload(film) {
  const form = new FormData();
  form.append("file", film.file, "film"); // the name stays here: it may name a patient
  for (const [name, value] of Object.entries(film.told)) form.append(name, value);
  return { method: "POST", body: form };
}

// --- the films -----------------------------------------------------------------------------------------------------

function addFilms(files) {
  const added = [...files].map((file) => ({
    id: nextId++, file, state: "waiting", note: "", result: null, error: "", preview: "", unshowable: false, map: null,
    explaining: "", told: told(),
  }));
  if (!added.length) return;
  films.push(...added);
  say(added.length === 1 ? `${added[0].file.name} added.` : `${added.length} films added.`);
  if (selected === null) select(added[0]);
  showList();
  sendWaiting();
}

/** What stands in the boxes of note and values, by column; empty ones are left out. */
function told() {
  const inputs = [["text", $("note")], ...[...$("values").querySelectorAll("input")].map((input) => [input.name, input])];
  return Object.fromEntries(inputs.filter(([name, input]) => reads.includes(name) && input.value.trim())
    .map(([name, input]) => [name, input.value.trim()]));
}

function sendWaiting() {
  for (const film of films) {
    if (running >= PARALLEL || keyWanted) return;
    if (film.state === "waiting") predict(film);
  }
}

async function predict(film) {
  film.state = "sent";
  running += 1;
  changed(film);
  try {
    film.result = await askPatiently("predict", () => upload(film), (note) => changed(film, { note }));
    changed(film, { state: "done", note: "" });
    say(`${film.file.name}: ${spoken(film.result)}`);
  } catch (error) {
    if (error.status === 401 || error.status === 403) {
      changed(film, { state: "waiting", note: "" });
      askForKey();
    } else {
      changed(film, { state: "failed", error: error.message, note: "" });
      say(`${film.file.name}: ${error.message}`);
    }
  }
  running -= 1;
  sendWaiting();
}

async function explain(film) {
  changed(film, { explaining: "Computing the heat map …" });
  try {
    // Opacity 0 leaves the overlay as the plain film that the model saw: the page lays the map over it itself.
    const answer = await askPatiently(
      "explain?opacity=0", () => upload(film), (note) => changed(film, { explaining: note }),
    );
    const heat = await coloured(answer.heat_map_png);
    film.map = { film: pngUrl(answer.overlay_png), heat, target: answer.target, words: answer.words || [] };
    changed(film, { explaining: "" });
    say(`Heat map of ${film.file.name} is shown.`);
  } catch (error) {
    if (error.status === 401 || error.status === 403) askForKey();
    changed(film, { explaining: error.message || "The heat map cannot be shown." });
  }
}

function changed(film, values = {}) {
  if (!films.includes(film)) return; // removed while the server was at it
  Object.assign(film, values);
  showList();
  if (film === selected) showResult();
}

function select(film) {
  selected = film;
  if (film && !film.preview) film.preview = URL.createObjectURL(film.file);
  showList();
  showResult();
}

/** Select at the user's wish. The focus stays on the row, so that Tab goes on from there. */
function choose(film) {
  select(film);
  say(`${film.file.name}: ${saidOf(film)}`);
  if (matchMedia("(max-width: 760px)").matches) $("result").scrollIntoView({ block: "start" });
}

function removeAll() {
  for (const film of films) {
    if (film.preview) URL.revokeObjectURL(film.preview);
    if (film.map) URL.revokeObjectURL(film.map.film);
  }
  films.length = 0;
  select(null);
  say("All films removed.");
  $("files").focus();
}

// --- the API key ---------------------------------------------------------------------------------------------------

function askForKey() {
  $("key-error").textContent = apiKey ? "That key was not accepted." : "";
  keyWanted = true;
  $("key-form").hidden = false;
  $("key").focus();
  say("The server asks for an API key.");
}

function useKey(event) {
  event.preventDefault();
  apiKey = $("key").value.trim();
  keyWanted = false;
  $("key").value = "";
  $("key-error").textContent = "";
  $("key-form").hidden = true;
  $("files").focus();
  loadCard();
  sendWaiting();
}

// --- drawing -------------------------------------------------------------------------------------------------------

const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`; // never broken over two lines
const say = (words) => { $("live").textContent = words; };

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function hasPoint(result) {
  return Boolean(result.positive_class) && typeof result.threshold === "number";
}

/** The class, or the findings called. */
function named(result) {
  return (result.findings || []).join(", ") || result.prediction;
}

/** The answer as one sentence for the list and for screen readers. */
function spoken(result) {
  const words = hasPoint(result)
    ? `${result.prediction}; probability of ${result.positive_class} ${percent(result.probabilities[result.positive_class])}`
    : `${named(result)}, confidence ${percent(result.confidence)}`;
  return result.in_distribution === false ? `${words}. Unlike the films the model was trained on` : words;
}

const TAGS = { waiting: ["waiting", ""], sent: ["working …", ""], failed: ["not answered", "bad"] };

function tagOf(film) {
  if (film.state !== "done") return TAGS[film.state];
  return film.result.in_distribution === false ? ["unlike", "warn"] : ["", ""];
}

function saidOf(film) {
  if (film.state === "done") return spoken(film.result);
  return film.state === "failed" ? film.error : film.note;
}

/** One row a film, kept while the film is: replacing a focused button would throw the keyboard out of the list. */
function showList() {
  const rows = new Map([...$("list").children].map((row) => [Number(row.dataset.id), row]));
  const wanted = new Set(films.map((film) => film.id));
  for (const [id, row] of rows) if (!wanted.has(id)) row.remove();
  for (const film of films) {
    const row = rows.get(film.id) || $("list").appendChild(newRow(film));
    const [name, said, tag] = row.firstChild.children;
    const [word, kind] = tagOf(film);
    row.firstChild.setAttribute("aria-current", String(film === selected));
    name.textContent = film.file.name;
    said.textContent = saidOf(film);
    tag.textContent = word;
    tag.className = `tag ${kind}`;
  }
  const over = films.filter((film) => film.state === "done" || film.state === "failed").length;
  $("tally").textContent = `${over} of ${films.length} answered`;
  $("tally").hidden = films.length < 2;
  $("clear").hidden = !films.length;
}

function newRow(film) {
  const row = element("li");
  row.dataset.id = film.id;
  const button = element("button");
  button.type = "button";
  button.append(element("span", "", "name"), element("span", "", "said"), element("span", "", "tag"));
  button.addEventListener("click", () => choose(film));
  row.append(button);
  return row;
}

function showResult() {
  $("result").hidden = selected === null;
  if (selected === null) return;
  const { result, state } = selected;
  $("result-title").textContent = selected.file.name;
  $("trouble").hidden = state !== "failed";
  $("trouble").textContent = selected.error;
  $("answer").hidden = state !== "done";
  $("unlike").hidden = !(result && result.in_distribution === false);
  if (result) showAnswer(result);
  showPicture();
}

function showAnswer(result) {
  $("unlike-reason").textContent = sentence(result.reason || "");
  $("prediction").textContent = named(result);
  $("confidence").textContent = percent(result.confidence);
  $("point").hidden = !hasPoint(result);
  if (hasPoint(result)) showMeter(result.probabilities[result.positive_class], result.threshold, result.positive_class);
  const rows = Object.entries(result.probabilities).sort((a, b) => b[1] - a[1]);
  $("probabilities").tBodies[0].replaceChildren(...rows.map(([name, share]) => {
    const row = element("tr");
    const head = element("th", name);
    head.scope = "row";
    const from = (result.thresholds || {})[name]; // of several findings each has a threshold of its own
    const words = from === undefined ? percent(share) : `${percent(share)}, called from ${percent(from)}`;
    row.append(head, element("td", words, "n"));
    return row;
  }));
  $("told").textContent = toldInWords(selected.told);
  $("timing").textContent = `Answered in ${Math.round(result.inference_time_ms)} ms by ${result.model_version}`;
}

/** What was read beside the film; nothing of a model that reads films alone. */
function toldInWords({ text, ...values }) {
  const columns = reads.filter((name) => name !== "text").map((name) => `${name} ${values[name] || "missing"}`);
  const note = !reads.includes("text") ? [] : [text ? `note: ${text}` : "no note"];
  return reads.length ? `Read beside the film: ${[...columns, ...note].join("; ")}` : "";
}

function showMeter(probability, threshold, name) {
  const side = probability >= threshold ? "at or above" : "below";
  $("meter-title").textContent = `Probability of ${name}: ${percent(probability)}`;
  $("meter-words").textContent =
    `It is ${side} the operating point of ${percent(threshold)}, from which the model says ${name}.`;
  $("meter").setAttribute("aria-valuenow", (100 * probability).toFixed(1));
  $("meter").setAttribute("aria-valuetext", `${percent(probability)}, ${side} the operating point of ${percent(threshold)}`);
  $("meter-fill").style.width = `${100 * probability}%`;
  $("meter-mark").style.left = `${100 * threshold}%`;
  $("mark-label").textContent = `operating point ${percent(threshold)}`;
  $("mark-label").style.left = `${Math.min(66, Math.max(34, 100 * threshold))}%`;
}

const sentence = (text) => (text ? `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}` : "");

// --- the picture ---------------------------------------------------------------------------------------------------

function showPicture() {
  const { map, state, explaining, unshowable, preview, result } = selected;
  const own = !unshowable && (!map || squash); // our own preview is sharper than the model's square
  const source = own ? preview : map && map.film;
  $("picture").hidden = state === "failed" && unshowable;
  $("film").hidden = !source;
  $("film").alt = source ? `The film ${selected.file.name}` : "";
  if (source && $("film").src !== source) $("film").src = source;
  $("no-preview").hidden = Boolean(source);
  $("no-preview").textContent = explaining || "This browser cannot show such a file; the server's picture follows the answer.";
  $("overlay").hidden = !map;
  if (map) drawHeat(map.heat);
  $("explain").hidden = state !== "done" || Boolean(map);
  $("explain").disabled = explaining.endsWith("…");
  $("opacity-row").hidden = !map;
  $("explain-state").textContent = explaining || (map && result && result.findings ? `The map is of ${map.target}.` : "");
  showWords(map ? map.words : []);
  if (unshowable && state === "done" && !map && !explaining) explain(selected);
}

/** The words of the note, coloured by what they did to the score, the strongest most. */
function showWords(words) {
  const strongest = Math.max(...words.map(({ evidence }) => Math.abs(evidence)), 1e-9);
  $("words").hidden = !words.length;
  $("words-line").replaceChildren(...words.flatMap(({ word, evidence }) => {
    const share = (0.5 * Math.abs(evidence)) / strongest;
    const span = element("span", word);
    span.style.backgroundColor = evidence > 0 ? `rgba(230, 120, 0, ${share})` : `rgba(40, 110, 200, ${share})`;
    span.title = `${evidence > 0 ? "+" : ""}${evidence.toFixed(2)}`;
    if (share >= 0.25) span.append(element("span", evidence > 0 ? " (raised it)" : " (lowered it)", "unseen"));
    return [span, " "];
  }));
}

function filmFailed() {
  if (selected === null || $("film").src !== selected.preview) return;
  selected.unshowable = true;
  showPicture();
}

function drawHeat(heat) {
  const canvas = $("overlay");
  if (canvas.width !== heat.width || canvas.height !== heat.height) Object.assign(canvas, { width: heat.width, height: heat.height });
  canvas.getContext("2d").putImageData(heat, 0, 0);
}

function showOpacity() {
  $("overlay").style.opacity = $("opacity").value / 100;
  $("opacity-value").textContent = `${$("opacity").value} %`;
  $("opacity").setAttribute("aria-valuetext", `${$("opacity").value} percent`);
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

function pngUrl(base64) {
  return URL.createObjectURL(new Blob([bytesOf(base64)], { type: "image/png" }));
}

/** A grey heat map as red over orange to yellow, as opaque as it is hot. */
async function coloured(base64) {
  const bitmap = await createImageBitmap(new Blob([bytesOf(base64)], { type: "image/png" }));
  const canvas = Object.assign(document.createElement("canvas"), { width: bitmap.width, height: bitmap.height });
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const heat = context.getImageData(0, 0, bitmap.width, bitmap.height);
  for (let at = 0; at < heat.data.length; at += 4) {
    const value = heat.data[at] / 255;
    heat.data.set([235, 235 * value, 40 * value, 215 * value ** 1.5], at); // cold places stay as they are
  }
  return heat;
}

// --- the model card ------------------------------------------------------------------------------------------------

const round = (value) => (typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(4))) : String(value));

function calibration(info) {
  if ((info.operating_point || {}).findings) return "slope and intercept of each finding, fitted on validation films";
  return info.temperature && `temperature ${round(info.temperature)}, fitted on validation films`;
}

function operatingPoint(info) {
  const findings = Object.entries((info.operating_point || {}).findings || {});
  if (findings.length) return `each finding by itself: ${findings.map(([name, own]) => `${name} from ${percent(own.threshold)}`).join(", ")}`;
  if (!info.positive_class) return "none: the most probable class is said";
  const { rule, sensitivity, specificity, n } = info.operating_point || {};
  const chosen = rule ? `, chosen by ${rule}` : "";
  const reached = [["sensitivity", sensitivity], ["specificity", specificity]]
    .filter(([, value]) => typeof value === "number").map(([name, value]) => `${name} ${percent(value)}`);
  const films = reached.length ? ` (${reached.join(", ")} on ${n} validation films)` : "";
  return `${info.positive_class} from ${percent(info.threshold)}${chosen}${films}`;
}

function gateWords(gate) {
  if (!gate) return "none: unsuitable films are not recognised";
  return `fitted on ${gate.train_films} films; refuses ${percent(gate.false_refusals_on_val)} of ${gate.val_films} ` +
    `validation films (set to at most ${percent(gate.false_refusals_set)})`;
}

function seenAs({ image_size: side, channels, resize }) {
  const ways = { squash: "stretched to the square", pad: "padded to the square", crop: "their centre cut out" };
  return `at ${side} × ${side} pixels, ${channels === 1 ? "in grey" : "in colour"}, ${ways[resize] || resize}`;
}

/** [label, text] of what a reader of the answers should know; entries the server does not give are left out. */
function cardRows(info) {
  const { preprocess, provenance, limits } = info;
  const rows = [
    ["Model", info.model_type],
    ["Version", info.model_version],
    ["Classes", (info.classes || []).join(", ")],
    ["Operating point", operatingPoint(info)],
    ["Calibration", calibration(info)],
    ["Films are seen", preprocess && seenAs(preprocess)],
    ["Check of unsuitable films", gateWords(info.input_gate)],
    ["Such films are", info.input_gate && (info.abstain ? "refused" : "answered with a warning")],
    ["Computed by", info.engine && `${info.engine} on ${info.device}`],
    ["Largest file", limits && `${round(limits.max_file_mb)} MiB`],
  ];
  const facts = Object.entries(provenance || {}).filter(([, value]) => ["string", "number"].includes(typeof value));
  rows.push(...facts.map(([name, value]) => [sentence(name.replaceAll("_", " ")).slice(0, -1), round(value)]));
  return rows.filter(([, text]) => text);
}

/** The boxes of what the model reads beside a film. */
function showBoxes(columns) {
  reads = columns;
  $("note-box").hidden = !reads.includes("text");
  const values = reads.filter((name) => name !== "text");
  $("values-box").hidden = !values.length;
  $("values").replaceChildren(...values.map((name) => {
    const label = element("label", `${name} `);
    const input = element("input");
    Object.assign(input, { name, type: "text", autocomplete: "off", spellcheck: false });
    label.append(input);
    return label;
  }));
}

async function loadCard() {
  try {
    const info = await ask("model/info");
    squash = !info.preprocess || info.preprocess.resize === "squash";
    showBoxes(info.reads || []);
    $("model-line").textContent = `${info.model_type || ""} ${info.classes ? `· ${info.classes.join((info.operating_point || {}).findings ? ", " : " or ")}` : ""}`;
    $("card").replaceChildren(...cardRows(info).map(([label, text]) => {
      const pair = element("div");
      pair.append(element("dt", label), element("dd", text));
      return pair;
    }));
    $("card-error").textContent = "";
  } catch (error) {
    if (error.status === 401 || error.status === 403) askForKey();
    $("model-line").textContent = error.status ? "" : error.message;
    $("card-error").textContent = error.message;
  }
}

// --- the page ------------------------------------------------------------------------------------------------------

function acceptDrops() {
  let inside = 0; // dragenter and dragleave come for every child as well
  const over = (count) => { inside = count; $("drop").classList.toggle("over", inside > 0); };
  document.addEventListener("dragenter", () => over(inside + 1));
  document.addEventListener("dragleave", () => over(Math.max(0, inside - 1)));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    over(0);
    addFilms(event.dataTransfer.files);
  });
}

$("files").addEventListener("change", () => {
  addFilms($("files").files);
  $("files").value = ""; // the same file may be chosen again
});
$("clear").addEventListener("click", removeAll);
$("key-form").addEventListener("submit", useKey);
$("explain").addEventListener("click", () => explain(selected));
$("opacity").addEventListener("input", showOpacity);
$("film").addEventListener("error", filmFailed);
acceptDrops();
showOpacity();
loadCard();
